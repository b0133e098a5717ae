//! The destination falls silent, idles or closes at every message.

use super::{attempt, hasty, patient};
use crate::each;
use crate::liar::{Answer, Deed, Liar, Point};

#[test]
fn it_falls_silent() {
    let gone = "the control connection did not come back within 1 s";
    let cases = [
        (Point::Setup, "the peer was silent on the control connection for 2 s"),
        (Point::Channels, "none of the 2 data channels could be opened"),
        (Point::Round, gone),
        (Point::Barrier, gone),
        (Point::LastRound, gone),
        (Point::Finish, "waited for Ready"),
    ];
    let cases = cases.map(|(point, words)| (format!("silent at {point:?}"), (point, words))).to_vec();
    each(cases, |name, (point, words)| {
        let liar = Liar::start(point, Deed::FallSilent, vec![Answer::Silence]);
        let mut options = hasty(liar.address());
        if !matches!(point, Point::Finish) {
            // What notices is the link.
            options.patience = patient(liar.address()).patience;
        }
        attempt(name, options).rolled_back(&[words]);
    });
}

/// It lives, says its heartbeats, and never does what it owes.
#[test]
fn it_idles() {
    let cases = [
        (Point::Setup, "waited for Accept"),
        (Point::Channels, "none of the 2 data channels could be opened"),
        (Point::Round, "waited for the barrier of a round"),
        (Point::Barrier, "waited for the barrier of a round"),
        (Point::LastRound, "waited for the barrier of the last round"),
        (Point::Finish, "waited for Ready"),
    ];
    let cases = cases.map(|(point, words)| (format!("idle at {point:?}"), (point, words))).to_vec();
    each(cases, |name, (point, words)| {
        let liar = Liar::start(point, Deed::Idle, vec![Answer::Silence]);
        attempt(name, hasty(liar.address())).rolled_back(&[words]);
        assert!(liar.hears_abort().is_some(), "{name}: the destination is told that it is over");
    });
}

#[test]
fn it_closes() {
    let cases = [
        (Point::Setup, "the control connection was lost before it could be resumed"),
        (Point::Channels, "none of the 2 data channels could be opened"),
        (Point::Round, "lost"),
        (Point::Barrier, "lost"),
        (Point::LastRound, "lost"),
        (Point::Finish, "refuses: this host was started anew"),
    ];
    let cases = cases.map(|(point, words)| (format!("closes at {point:?}"), (point, words))).to_vec();
    each(cases, |name, (point, words)| {
        let liar = Liar::start(point, Deed::Close, vec![Answer::Close]);
        attempt(name, patient(liar.address())).rolled_back(&[words]);
    });
}

#[test]
fn it_dies() {
    let cases = [
        (Point::Setup, "the control connection was lost before it could be resumed"),
        (Point::Channels, "none of the 2 data channels could be opened"),
        (Point::Round, "lost"),
        (Point::Barrier, "lost"),
        (Point::LastRound, "lost"),
        (Point::Finish, "did not come back within 1 s"),
    ];
    let cases = cases.map(|(point, words)| (format!("dies at {point:?}"), (point, words))).to_vec();
    each(cases, |name, (point, words)| {
        let liar = Liar::start(point, Deed::Die, vec![]);
        attempt(name, hasty(liar.address())).rolled_back(&[words]);
    });
}

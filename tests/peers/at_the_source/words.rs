//! The destination says what it has no right to say, at every point where the source listens.

use super::{attempt, patient};
use crate::control::nonsense;
use crate::liar::{Answer, Deed, Liar, Point};
use crate::{OTHER, TOKEN, each, every_message};

use pageferry::wire::control::Message;

/// Whether that message is the one that the source waits for.
fn is_due(point: Point, message: &Message) -> bool {
    matches!(
        (point, message),
        (Point::Setup, Message::Accept(_))
            | (Point::Finish, Message::Ready(_))
            | (Point::Commit, Message::Running(_) | Message::Fenced(_))
    )
}

#[test]
fn every_message_at_every_point_before_commit() {
    for point in Point::TALKING.into_iter().filter(|point| *point != Point::Commit) {
        let wrong = every_message().into_iter().filter(|message| !is_due(point, message));
        let cases = wrong.map(|message| (format!("{} at {point:?}", message.name()), message)).collect();
        each(cases, |name, message| {
            let said = match &message {
                Message::Abort(cause) => format!("the destination ended the migration: {cause}"),
                _ => format!("the destination broke the protocol: it sent {} while", message.name()),
            };
            let liar = Liar::start(point, Deed::Say(message), vec![Answer::Close]);
            attempt(name, patient(liar.address())).rolled_back(&[&said]);
            let told = liar.hears_abort();
            assert!(told.as_ref().is_some_and(|told| told.contains(&said)), "{name}: told {told:?}");
        });
    }
}

/// Once it is committed only Running and Fenced about its token say anything; for all else the destination is asked.
#[test]
fn every_message_after_commit() {
    let mut said = every_message();
    said.extend([Message::Running(OTHER), Message::Fenced(OTHER), Message::Ready(OTHER)]);
    let wrong = said.into_iter().filter(|message| {
        !is_due(Point::Commit, message) || matches!(message, Message::Running(OTHER) | Message::Fenced(OTHER))
    });
    let cases = wrong
        .flat_map(|message| {
            [Message::Running(TOKEN), Message::Fenced(TOKEN)].map(|truth| (message.clone(), truth))
        })
        .map(|(message, truth)| {
            (format!("{message:.20?} after Commit, then {}", truth.name()), (message, truth))
        })
        .collect();
    each(cases, |name, (message, truth)| {
        let liar = Liar::start(Point::Commit, Deed::Say(message), vec![Answer::Say(truth.clone())]);
        let ended = attempt(name, patient(liar.address()));
        match truth {
            Message::Running(_) => ended.completed(),
            _ => ended.rolled_back(&["the destination has not started the guest and never will"]),
        }
        assert_eq!(liar.asked(), [Message::Query(TOKEN)], "{name}");
    });
}

#[test]
fn nonsense_at_every_point() {
    for point in Point::TALKING {
        let cases = nonsense().into_iter();
        let cases =
            cases.map(|(name, noise, words)| (format!("{name} at {point:?}"), (noise, words))).collect();
        each(cases, |name, (noise, words)| {
            let liar = Liar::start(point, Deed::MakeNoise(noise), vec![Answer::Say(Message::Fenced(TOKEN))]);
            attempt(name, patient(liar.address())).rolled_back(&[words]);
        });
    }
}

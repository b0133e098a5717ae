//! From `Commit` on only the destination's word decides: silence there is doubt, and doubt is asked about.

use super::{attempt, hasty, patient};
use crate::liar::{Answer, Deed, Liar, Point};
use crate::{OTHER, TOKEN, each};

use pageferry::wire::control::Message;

/// Every way in which the destination can be lost at `Commit`.
fn losses() -> [Deed; 3] {
    [Deed::Idle, Deed::FallSilent, Deed::Close]
}

#[test]
fn a_question_settles_it() {
    let running = || Answer::Say(Message::Running(TOKEN));
    let fenced = || Answer::Say(Message::Fenced(TOKEN));
    let answers = [
        ("running", vec![running()]),
        ("fenced", vec![fenced()]),
        // What is no answer is asked again.
        ("closed, then running", vec![Answer::Close, running()]),
        ("another token, then fenced", vec![Answer::Say(Message::Running(OTHER)), fenced()]),
        ("another token fenced, then running", vec![Answer::Say(Message::Fenced(OTHER)), running()]),
        ("an abort, then fenced", vec![Answer::Say(Message::Abort("no".into())), fenced()]),
        ("garbage, then running", vec![Answer::Bytes(vec![0xff; 50]), running()]),
        ("Ready, then fenced", vec![Answer::Say(Message::Ready(TOKEN)), fenced()]),
    ];
    let cases = [Deed::Idle, Deed::Close].into_iter().flat_map(|deed| {
        answers
            .clone()
            .map(|(what, answers)| (format!("{deed:?} after Commit, {what}"), (deed.clone(), answers)))
    });
    each(cases.collect(), |name, (deed, answers)| {
        let questions = answers.len();
        let liar = Liar::start(Point::Commit, deed, answers);
        let mut options = patient(liar.address());
        options.patience.running = hasty(liar.address()).patience.running;
        let ended = attempt(name, options);
        if name.ends_with("running") {
            ended.completed();
        } else {
            ended.rolled_back(&["the destination has not started the guest and never will"]);
        }
        assert_eq!(liar.asked(), vec![Message::Query(TOKEN); questions], "{name}");
    });
}

#[test]
fn without_an_answer_it_stays_in_doubt() {
    let silences =
        [Answer::Silence, Answer::Close, Answer::Say(Message::Running(OTHER)), Answer::Bytes(vec![])];
    let cases = losses().into_iter().flat_map(|deed| {
        silences.clone().map(|answer| (format!("{deed:?} after Commit, {answer:?}"), (deed.clone(), answer)))
    });
    each(cases.collect(), |name, (deed, answer)| {
        let liar = Liar::start(Point::Commit, deed, vec![answer]);
        let ended = attempt(name, hasty(liar.address()));
        ended.in_doubt();
    });
}

#[test]
fn a_destination_that_is_gone_leaves_doubt_and_says_so() {
    let liar = Liar::start(Point::Commit, Deed::Die, vec![]);
    let ended = attempt("dies at Commit", hasty(liar.address()));
    ended.in_doubt();
    ended.warned("asked, and got no answer: cannot connect");
}

/// The token of `Ready` is the one that counts.
#[test]
fn ready_with_one_token_and_running_with_another() {
    let liar = Liar::start(
        Point::Finish,
        Deed::Say(Message::Ready(OTHER)),
        vec![Answer::Say(Message::Running(TOKEN)), Answer::Say(Message::Running(OTHER))],
    );
    // The script runs what it is told to run, which is OTHER: that is the honest case.
    attempt("one token throughout", patient(liar.address())).completed();
    let liar = Liar::start(
        Point::Commit,
        Deed::Say(Message::Running(OTHER)),
        vec![Answer::Say(Message::Running(OTHER)), Answer::Say(Message::Running(TOKEN))],
    );
    attempt("two tokens", patient(liar.address())).completed();
    assert_eq!(liar.asked(), vec![Message::Query(TOKEN); 2]);
}

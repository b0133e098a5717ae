//! The source lies about its guest's state.

use super::Host;
use crate::cheat::{Cheat, Stage, WRITTEN};
use crate::each;
use crate::guest::state_with;

use pageferry::wire::control::{MAX_STATE_BYTES, Message, STATE_CHUNK_BYTES};

fn finish(state_bytes: u64) -> Message {
    Message::Finish { state_bytes, stopped_at: 0 }
}

#[test]
fn a_state_that_is_not_what_was_said_is_refused() {
    let state = || Message::State(state_with(WRITTEN));
    let length = state_with(WRITTEN).len() as u64;
    let cases = vec![
        (
            "less than was said",
            vec![state(), finish(length + 1)],
            "8192 bytes of guest state came, 8193 were sent",
        ),
        ("more than was said", vec![state(), finish(1)], "8192 bytes of guest state came, 1 were sent"),
        ("none at all", vec![finish(length)], "0 bytes of guest state came, 8192 were sent"),
        (
            "more than may be, said",
            vec![state(), finish(u64::MAX)],
            "guest's state has a length of 18446744073709551615",
        ),
        (
            "of another guest",
            vec![Message::State(vec![1, 2, 3]), finish(3)],
            "a state of 3 bytes is not of this guest",
        ),
        ("none, honestly", vec![finish(0)], "a state of 0 bytes is not of this guest"),
        (
            "a long piece",
            vec![Message::State(vec![0; STATE_CHUNK_BYTES + 1])],
            "a piece of guest state has a length of 262145",
        ),
    ];
    let cases = cases.into_iter().map(|(name, said, words)| (name.to_owned(), (said, words))).collect();
    each(cases, |name, (said, words)| {
        let host = Host::patient();
        let arriving = host.await_one();
        let cheat = Cheat::at(host.address(), Stage::Placed);
        said.iter().for_each(|message| cheat.control.say(message));
        arriving.discarded(name, &[words]);
    });
}

#[test]
fn a_state_without_end_is_refused() {
    let host = Host::patient();
    let arriving = host.await_one();
    let cheat = Cheat::at(host.address(), Stage::Placed);
    let piece = Message::State(vec![0; STATE_CHUNK_BYTES]);
    for _ in 0..MAX_STATE_BYTES / STATE_CHUNK_BYTES as u64 + 1 {
        cheat.control.say(&piece);
    }
    arriving.discarded("endless state", &["the guest's state is longer than 67108864 bytes"]);
}

/// Times that lie in the future, or before any clock: only the guest's clock may come to harm.
#[test]
fn any_wall_clock_is_taken() {
    let cases = [0, 1, u64::MAX].map(|stopped_at| (format!("stopped at {stopped_at}"), stopped_at)).to_vec();
    each(cases, |name, stopped_at| {
        let host = Host::patient();
        let arriving = host.await_one();
        let cheat = Cheat::at(host.address(), Stage::StateSent);
        cheat.control.say(&Message::Finish { state_bytes: state_with(WRITTEN).len() as u64, stopped_at });
        let Some(Message::Ready(token)) = cheat.control.hear() else { panic!("{name}: no Ready") };
        cheat.control.say(&Message::Commit(token));
        arriving.runs(name);
    });
}

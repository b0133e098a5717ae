//! The source falls silent, idles or closes at every stage.

use std::time::Duration;

use super::Host;
use crate::cheat::{Cheat, Stage};
use crate::each;

fn at_every_stage(
    what: &str,
    idle_after: u64,
    words: impl Fn(Stage) -> &'static str + Sync,
    deed: impl Fn(&mut Cheat) + Sync,
) {
    let cases = Stage::ALL.map(|stage| (format!("{what} at {stage:?}"), stage)).to_vec();
    each(cases, |name, stage| {
        let mut host = Host::hasty();
        host.options.idle_after = Duration::from_secs(idle_after);
        let arriving = host.await_one();
        let mut cheat = Cheat::at(host.address(), stage);
        deed(&mut cheat);
        arriving.discarded(name, &[words(stage)]);
        // The place is free for an honest one.
        let arriving = host.await_one();
        let honest = Cheat::at(host.address(), Stage::Ready);
        honest.control.say(&pageferry::wire::control::Message::Commit(honest.token));
        arriving.runs(name);
    });
}

#[test]
fn it_falls_silent() {
    at_every_stage(
        "silent",
        30,
        |stage| match stage {
            Stage::Connected => "the source said nothing in time",
            Stage::Ready => "the source did not commit in time",
            _ => "the control connection did not come back within 1 s",
        },
        |cheat| cheat.control.fall_silent(),
    );
}

#[test]
fn it_idles() {
    at_every_stage(
        "idle",
        2,
        |stage| match stage {
            Stage::Connected => "waited for Setup",
            Stage::Ready => "waited for Commit",
            _ => "the source lives and has sent neither pages nor messages",
        },
        |_| {},
    );
}

#[test]
fn it_closes() {
    at_every_stage(
        "closes",
        30,
        |stage| match stage {
            Stage::Connected => {
                "lost before it could be resumed: the control connection broke: the peer closed it"
            }
            Stage::Ready => "the source did not commit in time",
            _ => "the control connection did not come back within 1 s",
        },
        |cheat| {
            cheat.control.close();
            cheat.channels.clear();
        },
    );
}

/// Connections that never say what they are for do not take the place of a migration.
#[test]
fn strangers_do_not_block_a_source() {
    let host = Host::patient();
    let arriving = host.await_one();
    let silent: Vec<_> = (0..70).map(|_| std::net::TcpStream::connect(host.address()).unwrap()).collect();
    let cheat = Cheat::at(host.address(), Stage::Ready);
    cheat.control.say(&pageferry::wire::control::Message::Commit(cheat.token));
    arriving.runs("among strangers");
    drop(silent);
}

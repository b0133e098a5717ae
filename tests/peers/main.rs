//! Both engines against peers that lie, stop, close and talk nonsense, over real sockets on the loopback.
//!
//! At one end stands the real [`migrate`](pageferry::engine::source::migrate) or
//! [`receive`](pageferry::engine::destination::receive), at the other a script ([`liar`], [`cheat`]) that follows the
//! protocol up to a point and then does something else. Whatever that is: the migration ends in bounded time with a cause
//! that names it, the guest goes on at the source and its memory is what it wrote, and nothing of it is left at the
//! destination.
#![allow(clippy::panic, clippy::unwrap_used, reason = "a test")]

mod allocation;
mod at_the_destination;
mod at_the_source;
mod cheat;
mod control;
mod guest;
mod liar;
mod resume;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::mpsc;
use std::time::Duration;

use pageferry::layout::RamLayout;
use pageferry::units::RoundId;
use pageferry::wire::control::{Accept, Message, Setup, Token};

/// Counts every byte on the heap, so that a lie about a length can be seen not to be believed.
#[global_allocator]
static HEAP: peak_alloc::PeakAlloc = peak_alloc::PeakAlloc;

/// What every scripted destination calls its token.
const TOKEN: Token = Token([7; 16]);
/// A token that stands for nothing.
const OTHER: Token = Token([8; 16]);

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// One message of every kind, about [`TOKEN`].
fn every_message() -> Vec<Message> {
    vec![
        Message::Setup(Setup {
            name: "guest".into(),
            guest: guest::KIND.into(),
            config: guest::CONFIG.to_vec(),
            layout: guest::layout(),
            touched_pages: 1,
            mode: "tcp".into(),
            capabilities: vec![],
        }),
        Message::Accept(Accept { secret: [1; 32], capabilities: vec![] }),
        Message::RoundDone { round: RoundId(0), dirtied: 0 },
        Message::State(vec![1, 2, 3]),
        Message::Finish { state_bytes: 3, stopped_at: 0 },
        Message::Ready(TOKEN),
        Message::Commit(TOKEN),
        Message::Running(TOKEN),
        Message::Query(TOKEN),
        Message::Fenced(TOKEN),
        Message::Abort("the dog ate it".into()),
    ]
}

/// Runs something that must end in time, in a thread of its own, since what hangs cannot be stopped.
fn within<T: Send + 'static>(limit: Duration, what: &str, run: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, result) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        // Nobody waits any more when the time is over.
        let _ = sender.send(run());
    });
    match result.recv_timeout(limit) {
        Ok(result) => result,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("{what}: no end within {limit:?}"),
        Err(mpsc::RecvTimeoutError::Disconnected) => match thread.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => unreachable!("it ends with a result or a panic"),
        },
    }
}

/// Runs every case of a table at the same time (most of them wait), and tells of all that failed.
fn each<C: Send>(cases: Vec<(String, C)>, run: impl Fn(&str, C) + Sync) {
    let failed: Vec<String> = std::thread::scope(|scope| {
        let run = &run;
        let cases: Vec<_> = cases
            .into_iter()
            .map(|(name, case)| {
                let shown = name.clone();
                (shown, scope.spawn(move || run(&name, case)))
            })
            .collect();
        cases.into_iter().filter_map(|(name, thread)| thread.join().err().map(|_| name)).collect()
    });
    assert!(failed.is_empty(), "these cases failed, their words are above: {failed:#?}");
}

/// A layout that is as large as a lie needs it to be.
fn flat(bytes: u64) -> RamLayout {
    RamLayout::flat(bytes).unwrap()
}

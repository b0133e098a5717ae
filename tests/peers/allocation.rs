//! A length that a peer tells is not allocated before it is checked, nor does a peer fill the memory by talking.

use std::time::Duration;

use crate::HEAP;
use crate::at_the_destination::Host;
use crate::at_the_destination::data::lies;
use crate::at_the_destination::setup::raw_setup;
use crate::cheat::{Cheat, Stage, dial, setup};
use crate::control::nonsense;
use crate::flat;
use crate::guest::StampingGuest;

use pageferry::wire::control::{Message, STATE_CHUNK_BYTES, Setup};
use pageferry::wire::link::{LinkHeader, LinkKind};
use pageferry::wire::preamble::{MigrationId, Preamble, Purpose, Secret};

/// Room for what both sides need honestly, and far from the lies, which are of a GiB and more.
const ROOM: usize = 64 << 20;

/// Runs something, and fails when the heap grows by more than [`ROOM`] meanwhile.
fn within_room(name: &str, run: impl FnOnce()) {
    let before = HEAP.current_usage();
    HEAP.reset_peak_usage();
    run();
    let grown = HEAP.peak_usage().saturating_sub(before);
    println!("{name}: {} KiB", grown >> 10);
    assert!(grown < ROOM, "{name}: the heap grew by {grown} bytes");
}

/// The heap is the process's: under nextest a test has one to itself.
fn has_heap_to_itself() -> bool {
    let alone = std::env::var_os("NEXTEST").is_some();
    if !alone {
        println!("SKIP: the heap is shared with other tests; cargo nextest runs this");
    }
    alone
}

#[test]
fn the_heap_is_watched() {
    let grown = std::panic::catch_unwind(|| within_room("an allocation", || drop(vec![1u8; ROOM + 1])));
    assert!(grown.is_err());
}

#[test]
fn lies_about_lengths_take_no_memory() {
    if !has_heap_to_itself() {
        return;
    }
    for stage in [Stage::Connected, Stage::Placed] {
        for (name, noise, words) in nonsense() {
            within_room(name, || {
                let host = Host::patient();
                let arriving = host.await_one();
                let cheat = Cheat::at(host.address(), stage);
                cheat.control.make(&noise);
                arriving.discarded(name, &[words]);
            });
        }
    }
    for (name, bytes, words) in lies().into_iter().filter(|(name, ..)| *name != "a bomb") {
        within_room(name, || {
            let host = Host::patient();
            let arriving = host.await_one();
            let mut cheat = Cheat::at(host.address(), Stage::Accepted);
            let channel = cheat.open_channel();
            cheat.channels[channel].write(&bytes);
            arriving.discarded(name, &[words]);
        });
    }
    for terabytes in [1, 64, 65, 1 << 20] {
        let name = format!("a guest of {terabytes} TiB");
        within_room(&name, || {
            let host = Host::patient();
            let arriving = host.await_one();
            let cheat = Cheat::connect(host.address());
            cheat.control.say_bytes(&raw_setup(&[(0, terabytes << 40)], 0, &[]));
            arriving.discarded(&name, &[]);
        });
    }
    within_room("a question of 4 GiB", || {
        let host = Host::patient();
        let preamble = Preamble::new(Purpose::Query, MigrationId([1; 16]), Secret::NONE);
        let (mut stream, _) = dial(host.address(), &preamble).unwrap();
        let mut header = LinkHeader { kind: LinkKind::Message, bytes: 0, number: 0 }.encode();
        header[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        std::io::Write::write_all(&mut stream, &header).unwrap();
        // It is closed, without an answer.
        let answer = std::io::Read::read(&mut stream, &mut [0; 100]);
        assert!(answer.is_err() || answer.is_ok_and(|bytes| bytes == 0));
    });
}

/// An adapter that maps whatever the source says: what the engine keeps per page must not follow that number.
#[test]
fn a_huge_empty_guest_takes_no_memory() {
    if !has_heap_to_itself() {
        return;
    }
    within_room("a guest of 16 TiB, all of it empty", || {
        let host = Host::patient();
        let census = crate::guest::Census::default();
        let arriving = host.await_with(move |setup| StampingGuest::empty(setup.layout.clone(), &census));
        let mut cheat = Cheat::connect(host.address());
        cheat.set_up(&Setup { layout: flat(16 << 40), ..setup() });
        cheat.place();
        cheat.control.say(&Message::Abort("enough".into()));
        arriving.discarded("a guest of 16 TiB", &["enough"]);
    });
}

/// A source that talks while it is not listened to waits in its socket.
#[test]
fn a_flood_of_messages_takes_no_memory() {
    if !has_heap_to_itself() {
        return;
    }
    within_room("a flood", || {
        let host = Host::patient();
        let arriving = host.await_with(|_| {
            std::thread::sleep(Duration::from_secs(2));
            Err(pageferry::guest::GuestError::new("this adapter is slow and then does not want to"))
        });
        let cheat = Cheat::connect(host.address());
        cheat.control.say(&Message::Setup(setup()));
        let piece = Message::State(vec![0; STATE_CHUNK_BYTES]).encode();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for number in 1..2000 {
                    // Not by `say`, which keeps everything that it said.
                    let header = LinkHeader { kind: LinkKind::Message, bytes: piece.len() as u32, number };
                    cheat.control.write(&[&header.encode()[..], &piece].concat());
                }
            });
            arriving.discarded("a flood", &["slow and then does not want to"]);
            cheat.control.close();
        });
    });
}

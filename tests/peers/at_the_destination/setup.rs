//! The source lies about its guest.

use super::{Host, abort_in};
use crate::cheat::{Cheat, setup};
use crate::guest::{CONFIG, KIND};
use crate::{each, flat};

use pageferry::wire::control::{MAX_CONFIG_BYTES, Message, Setup};

/// A field of a protobuf message: its number, and a number or bytes.
fn varint(mut value: u64, into: &mut Vec<u8>) {
    while value >= 0x80 {
        into.push(value as u8 | 0x80);
        value >>= 7;
    }
    into.push(value as u8);
}

fn number(field: u64, value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    varint(field << 3, &mut bytes);
    varint(value, &mut bytes);
    bytes
}

fn bytes(field: u64, content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    varint(field << 3 | 2, &mut bytes);
    varint(content.len() as u64, &mut bytes);
    bytes.extend(content);
    bytes
}

/// A `Setup` as no honest encoder makes it.
pub(crate) fn raw_setup(regions: &[(u64, u64)], touched: u64, more: &[Vec<u8>]) -> Vec<u8> {
    let mut setup = [bytes(2, KIND.as_bytes()), bytes(3, CONFIG), number(5, touched)].concat();
    for (start, length) in regions {
        setup.extend(bytes(4, &[number(1, *start), number(2, *length)].concat()));
    }
    setup.extend(more.concat());
    bytes(1, &setup)
}

#[test]
fn a_setup_that_cannot_be_is_named() {
    let fits = [(0, 2 << 20), (1 << 32, 2 << 20)];
    let no_more: &[Vec<u8>] = &[];
    let cases = vec![
        ("no region", raw_setup(&[], 0, no_more), "needs at least one RAM region"),
        ("65 regions", raw_setup(&[(0, 4096); 65], 0, no_more), "list of RAM regions has a length of 65"),
        ("an empty region", raw_setup(&[(0, 0)], 0, no_more), "RAM region 0 is empty"),
        ("half a page", raw_setup(&[(0, 2048)], 0, no_more), "is not a whole number of 4 KiB pages"),
        (
            "regions over each other",
            raw_setup(&[(0, 8192), (4096, 4096)], 0, no_more),
            "RAM region 1 starts before",
        ),
        ("128 TiB", raw_setup(&[(0, 128 << 40)], 0, no_more), "more than the 64 TiB"),
        ("16 EiB", raw_setup(&[(0, u64::MAX - 4095)], 0, no_more), "more than the 64 TiB"),
        ("past the address space", raw_setup(&[(1 << 63, 1 << 63)], 0, no_more), "more than the 64 TiB"),
        ("more touched than there is", raw_setup(&fits, 1025, no_more), "1025 of 1024 pages are touched"),
        ("everything touched", raw_setup(&fits, u64::MAX, no_more), "18446744073709551615 of 1024 pages"),
        (
            "a long configuration",
            raw_setup(&fits, 0, &[bytes(3, &vec![0; MAX_CONFIG_BYTES + 1])]),
            "configuration has a length of 1048577",
        ),
        ("a long name", raw_setup(&fits, 0, &[bytes(1, &[b'a'; 1025])]), "name has a length of 1025"),
        ("a name that is no text", raw_setup(&fits, 0, &[bytes(1, &[0xff, 0xfe])]), "not well-formed"),
        (
            "65 capabilities",
            raw_setup(&fits, 0, &vec![bytes(7, b"x"); 65]),
            "capabilities has a length of 65",
        ),
    ];
    let cases = cases.into_iter().map(|(name, said, words)| (name.to_owned(), (said, words))).collect();
    each(cases, |name, (said, words)| {
        let host = Host::patient();
        let arriving = host.await_one();
        let cheat = Cheat::connect(host.address());
        cheat.control.say_bytes(&said);
        arriving.discarded(name, &["the source broke the protocol: it sent what is no message", words]);
        let heard = cheat.control.hear_out();
        assert!(abort_in(&heard).is_some_and(|told| told.contains(words)), "{name}: {heard:?}");
    });
}

#[test]
fn a_guest_that_cannot_be_made_is_named() {
    let cases: Vec<(&str, Setup, &str)> = vec![
        (
            "another hypervisor",
            Setup { guest: "abacus".into(), ..setup() },
            "no adapter for a \"abacus\" guest",
        ),
        (
            "garbage for a configuration",
            Setup { config: vec![0xff; 99], ..setup() },
            "configuration of the guest",
        ),
        ("no configuration", Setup { config: vec![], ..setup() }, "configuration of the guest"),
        (
            "a larger layout",
            Setup { layout: flat(1 << 40), ..setup() },
            "other RAM regions than the source says",
        ),
        ("a smaller layout", Setup { layout: flat(4096), touched_pages: 0, ..setup() }, "other RAM regions"),
        (
            "all of 64 TiB",
            Setup { layout: flat(64 << 40), touched_pages: 1 << 34, ..setup() },
            "the guest uses 64 TiB of memory and this host has",
        ),
    ];
    let cases = cases.into_iter().map(|(name, setup, words)| (name.to_owned(), (setup, words))).collect();
    each(cases, |name, (setup, words)| {
        let host = Host::patient();
        let arriving = host.await_one();
        let cheat = Cheat::connect(host.address());
        cheat.control.say(&Message::Setup(setup));
        arriving.discarded(name, &["could not make the guest", words]);
        let heard = cheat.control.hear_out();
        assert!(abort_in(&heard).is_some_and(|told| told.contains(words)), "{name}: {heard:?}");
    });
}

//! The source lies on its data channels.

use super::{Host, abort_in};
use crate::cheat::{Cheat, Stage, frame};
use crate::each;
use crate::guest::stamped;

use pageferry::units::{RoundId, Run};
use pageferry::wire::control::Message;
use pageferry::wire::data::{BarrierId, ChannelId, FrameKind, encode_barrier};
use pageferry::wire::preamble::{MigrationId, Preamble, Purpose, RefusalCode, Secret};

/// What is no frame of this guest.
pub(crate) fn lies() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let page = vec![0xee; 4096];
    let one = Run::new(5, 1);
    let honest = || frame(FrameKind::Raw, 1, &[one], &page);
    let with = |at: usize, bytes: &[u8]| {
        let mut frame = honest();
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        frame
    };
    vec![
        ("garbage", b"GET / HTTP/1.1\r\nHost: pageferry\r\n\r\n".to_vec(), "instead of its magic"),
        ("a payload of 4 GiB", with(12, &u32::MAX.to_le_bytes()), "payload of 4294967295 bytes"),
        ("a payload of half a page", with(12, &2048u32.to_le_bytes()), "payload of 2048 bytes"),
        ("65535 runs", with(6, &u16::MAX.to_le_bytes()), "65535 table entries"),
        ("no runs", with(6, &0u16.to_le_bytes()), "0 table entries"),
        ("an unknown kind", with(4, &[99]), "kind 99"),
        ("a frame left out", with(16, &7u64.to_le_bytes()), "frame 7 arrived where 1 was due"),
        (
            "a run outside",
            frame(FrameKind::Raw, 1, &[Run::new(1023, 2)], &page.repeat(2)),
            "2 pages from page 1023",
        ),
        (
            "a run far outside",
            frame(FrameKind::Zero, 1, &[Run::new(u64::MAX, 1)], &[]),
            "18446744073709551615 on",
        ),
        (
            "a run of 16 TiB",
            frame(FrameKind::Zero, 1, &[Run::new(0, u64::from(u32::MAX))], &[]),
            "4294967295 pages from",
        ),
        (
            "a run over a border",
            frame(FrameKind::Raw, 1, &[Run::new(511, 2)], &page.repeat(2)),
            "2 pages from page 511",
        ),
        ("an empty run", frame(FrameKind::Zero, 1, &[Run::new(5, 0)], &[]), "0 pages from page 5"),
        ("a page twice", frame(FrameKind::Raw, 1, &[one, one], &page.repeat(2)), "overlap"),
        ("no zstd", frame(FrameKind::Zstd, 1, &[one], b"no zstd frame"), "cannot be taken apart"),
        ("a bomb", frame(FrameKind::Zstd, 1, &[one], &bomb()), "cannot be taken apart"),
        (
            "a barrier that closes itself",
            encode_barrier(BarrierId(1), RoundId(0), 1, &[ChannelId(0)]),
            "says of itself that it was given up",
        ),
    ]
}

/// 64 MiB in a few KiB, in a frame for one page.
fn bomb() -> Vec<u8> {
    let mut compressor = pageferry::codec::Compressor::new().unwrap();
    let packed = compressor.compress(&vec![0xee; 64 << 20], 19).unwrap().to_vec();
    // What the header may say of one page.
    if packed.len() > 4096 { packed[..4096].to_vec() } else { packed }
}

#[test]
fn a_lie_on_a_channel_ends_the_migration() {
    let cases = lies().into_iter().map(|(name, bytes, words)| (name.to_owned(), (bytes, words))).collect();
    each(cases, |name, (bytes, words)| {
        let host = Host::patient();
        let arriving = host.await_one();
        let mut cheat = Cheat::at(host.address(), Stage::Accepted);
        let channel = cheat.open_channel();
        // An honest channel beside it does not make it better.
        let honest = cheat.open_channel();
        cheat.channels[honest].place(&[]);
        cheat.channels[channel].write(&bytes);
        arriving.discarded(name, &["the source broke the protocol: channel 0", words]);
        let heard = cheat.control.hear_out();
        assert!(abort_in(&heard).is_some_and(|told| told.contains(words)), "{name}: {heard:?}");
    });
}

/// A channel may break: its pages come again over another, which says so in its barrier. Both send what the guest holds: the
/// broken one's last bytes may be placed after the other's, until the barrier, and what the guest wrote between goes with the
/// next round (decision 3).
#[test]
fn a_channel_that_breaks_within_a_frame_is_replaced() {
    let pages: Vec<u8> = (0..crate::cheat::WRITTEN).flat_map(|page| stamped(page, 1)).collect();
    let whole = frame(FrameKind::Raw, 1, &[Run::new(0, crate::cheat::WRITTEN)], &pages);
    let cases =
        [0, 7, 40, whole.len() - 100].map(|length| (format!("after {length} bytes"), length)).to_vec();
    each(cases, |name, length| {
        let host = Host::patient();
        let arriving = host.await_one();
        let mut cheat = Cheat::at(host.address(), Stage::Accepted);
        let broken = cheat.open_channel();
        cheat.channels[broken].write(&whole[..length]);
        cheat.channels[broken].stream.shutdown(std::net::Shutdown::Both).unwrap();
        let good = cheat.open_channel();
        cheat.channels[good].place(&[ChannelId(0)]);
        cheat.control.say(&Message::State(crate::guest::state_with(crate::cheat::WRITTEN)));
        cheat.finish();
        cheat.control.say(&Message::Commit(cheat.token));
        let received = arriving.runs(name);
        let warnings = &received.report.warnings;
        assert!(
            warnings.iter().any(|warning| warning.contains("channel 0 was lost")),
            "{name}: {warnings:?}"
        );
    });
}

/// Whoever has not the secret, or comes before there is one, is refused, and the migration goes on.
#[test]
fn strangers_are_kept_off_the_channels() {
    let host = Host::patient();
    let arriving = host.await_one();
    let mut cheat = Cheat::connect(host.address());
    let knock = |migration, secret| {
        let preamble = Preamble::new(Purpose::Data { channel: 0 }, migration, secret);
        crate::cheat::dial(host.address(), &preamble).unwrap_err().0
    };
    assert_eq!(knock(cheat.migration, Secret::NONE), RefusalCode::UnknownMigration);
    assert_eq!(knock(cheat.migration, Secret([1; 32])), RefusalCode::UnknownMigration);
    cheat.set_up(&crate::cheat::setup());
    let mut close = cheat.secret;
    close.0[31] ^= 1;
    for secret in [Secret::NONE, Secret([1; 32]), close] {
        assert_eq!(knock(cheat.migration, secret), RefusalCode::WrongSecret);
    }
    assert_eq!(knock(MigrationId([1; 16]), cheat.secret), RefusalCode::UnknownMigration);
    cheat.place();
    assert_eq!(knock(cheat.migration, cheat.secret), RefusalCode::NotNow, "the number is taken");
    cheat.control.say(&Message::State(crate::guest::state_with(crate::cheat::WRITTEN)));
    cheat.finish();
    // Nothing reaches the memory of a guest whose state is loaded.
    let preamble = Preamble::new(Purpose::Data { channel: 9 }, cheat.migration, cheat.secret);
    assert_eq!(crate::cheat::dial(host.address(), &preamble).unwrap_err().0, RefusalCode::NotNow);
    cheat.control.say(&Message::Commit(cheat.token));
    arriving.runs("with strangers about");
}

/// Pages that come while the state is loaded go nowhere: the channels are closed before.
#[test]
fn pages_after_finish_go_nowhere() {
    let host = Host::patient();
    let arriving = host.await_one();
    let mut cheat = Cheat::at(host.address(), Stage::StateSent);
    let late = frame(FrameKind::Raw, 3, &[Run::new(0, 8)], &vec![0xee; 8 * 4096]);
    cheat.finish();
    cheat.channels[0].write(&late);
    std::thread::sleep(std::time::Duration::from_millis(50));
    cheat.control.say(&Message::Commit(cheat.token));
    arriving.runs("late pages");
}

//! Channels that are lost and come back, and caps that change on the way.

use std::collections::BTreeMap;

use super::gate::Gate;
use super::*;
use crate::wire::data::ChannelId;

/// Memory full of random pages, a destination, and a way to it that can be cut.
fn through_a_gate(seed: u64) -> (GuestMemory, Host, Gate) {
    let (source, host) = (memory(Backing::Memfd), host(memory(Backing::Memfd)));
    let mut seed = seed;
    (0..8192).for_each(|page| write_page(&source, page, &mut seed, false));
    let gate = Gate::before(host.listener.local_addresses()[0]);
    (source, host, gate)
}

fn reopening(source: &GuestMemory, host: &Host, paths: Vec<Path>, within: Duration) -> SourceOptions {
    let channels = paths.len();
    SourceOptions { paths, reopen: Some(within), ..options(source, host, channels, TransferMode::Tcp) }
}

fn lost(events: &Receiver<SessionEvent>) -> (ChannelId, Path) {
    match next(events) {
        SessionEvent::ChannelLost { channel, path, .. } => (channel, path),
        other => panic!("{other:?} instead of a lost channel"),
    }
}

fn returned(events: &Receiver<SessionEvent>) -> (ChannelId, Path) {
    match next(events) {
        SessionEvent::ChannelReturned { channel, path, after } => {
            assert!(after < PATIENCE);
            (channel, path)
        }
        other => panic!("{other:?} instead of a channel that is back"),
    }
}

#[test]
fn a_lost_channel_comes_back_and_works() {
    let (source, host, gate) = through_a_gate(5);
    let paths = vec![path_to(&host.listener), gate.path()];
    let mut slow = reopening(&source, &host, paths, PATIENCE);
    // Eight seconds for the round: much longer than it takes until the channel is tried again.
    slow.rate_caps = RateCaps::new(Some(4 << 20));
    let caps = slow.rate_caps.clone();
    let (sender, events) = unbounded();
    let session = SourceSession::open(slow, sender).unwrap();
    session.place(RoundId(0), PageSet::full(8192));
    gate.cut();
    assert_eq!(lost(&events), (ChannelId(1), gate.path()));
    assert!(session.stats().none_for.is_none(), "the other channel lives");
    assert_eq!(returned(&events), (ChannelId(2), gate.path()));
    caps.set_total(None);
    placed(&events);
    assert_equal(&source, &host.memory);

    let mut seed = 6;
    (0..8192).for_each(|page| write_page(&source, page, &mut seed, false));
    let before = session.stats().channels[2].bytes;
    session.place(RoundId(1), PageSet::full(8192));
    placed(&events);
    assert_equal(&source, &host.memory);
    let channels = session.stats().channels;
    assert_eq!(channels.iter().map(|channel| channel.alive).collect::<Vec<_>>(), [true, false, true]);
    assert!(channels[2].bytes > before, "it carries something");
}

#[test]
fn a_channel_that_did_not_open_at_first_comes_later() {
    let (source, host, mut gate) = through_a_gate(9);
    gate.shut();
    let paths = vec![path_to(&host.listener), gate.path()];
    let (sender, events) = unbounded();
    let session = SourceSession::open(reopening(&source, &host, paths, PATIENCE), sender).unwrap();
    assert_eq!(lost(&events), (ChannelId(1), gate.path()));
    gate.open();
    assert_eq!(returned(&events).1, gate.path());
    session.place(RoundId(0), PageSet::full(8192));
    placed(&events);
    assert_equal(&source, &host.memory);
}

#[test]
fn a_round_waits_for_a_channel_when_there_is_none() {
    let (source, host, mut gate) = through_a_gate(7);
    let mut slow = reopening(&source, &host, vec![gate.path()], PATIENCE);
    slow.rate_caps = RateCaps::new(Some(4 << 20));
    let caps = slow.rate_caps.clone();
    let (sender, events) = unbounded();
    let session = SourceSession::open(slow, sender).unwrap();
    session.place(RoundId(0), PageSet::full(8192));
    gate.shut();
    lost(&events);
    let early = events.recv_timeout(Duration::from_millis(1500));
    assert!(early.is_err(), "{early:?} while there is no way");
    let stats = session.stats();
    assert!(stats.none_for.is_some_and(|none| none >= Duration::from_secs(1)), "{:?}", stats.none_for);
    assert!(stats.remaining_pages > 0);
    gate.open();
    returned(&events);
    caps.set_total(None);
    placed(&events);
    assert!(session.stats().none_for.is_none());
    assert_equal(&source, &host.memory);

    // A round that begins while there is none waits just as well.
    gate.shut();
    lost(&events);
    let mut seed = 8;
    (100..200).for_each(|page| write_page(&source, page, &mut seed, false));
    session.place(RoundId(1), set(&source, &[Run::new(100, 100)]));
    gate.open();
    returned(&events);
    assert_eq!(placed(&events).0, RoundId(1));
    assert_equal(&source, &host.memory);
}

#[test]
fn a_round_that_waited_too_long_fails_and_says_what_is_owed() {
    let (source, host, mut gate) = through_a_gate(11);
    let mut slow = reopening(&source, &host, vec![gate.path()], Duration::from_secs(1));
    slow.rate_caps = RateCaps::new(Some(32 << 20));
    let caps = slow.rate_caps.clone();
    let (sender, events) = unbounded();
    let session = SourceSession::open(slow, sender).unwrap();
    session.place(RoundId(0), PageSet::full(8192));
    eventually("something is placed", || session.stats().placed_pages > 0);
    gate.shut();
    lost(&events);
    let SessionEvent::Failed { cause: SessionError::AllChannelsLost { last: Some(_) }, owed } = next(&events)
    else {
        panic!("a round that fails")
    };
    assert_eq!(owed.len(), 8192 - session.stats().placed_pages);
    let (mut a, mut b) = (vec![0; 4096], vec![0; 4096]);
    for page in (0..8192).map(PageIndex).filter(|page| !owed.contains(*page)) {
        source.read_page(page, &mut a);
        host.memory.read_page(page, &mut b);
        assert!(a == b, "page {} was confirmed and differs", page.0);
    }
    // The session is not over: what is owed can be placed when there is a way again.
    caps.set_total(None);
    gate.open();
    returned(&events);
    session.place(RoundId(1), owed);
    placed(&events);
    assert_equal(&source, &host.memory);
}

#[test]
fn the_channels_of_an_interface_that_is_down_are_given_up_at_once() {
    let (source, host, _gate) = through_a_gate(13);
    let paths = vec![path_to(&host.listener); 2];
    let mut slow = reopening(&source, &host, paths, PATIENCE);
    slow.rate_caps = RateCaps::new(Some(4 << 20));
    let caps = slow.rate_caps.clone();
    let (sender, events) = unbounded();
    let session = SourceSession::open(slow, sender).unwrap();
    session.place(RoundId(0), PageSet::full(8192));
    session.interface_is_down("none0");
    assert!(events.recv_timeout(Duration::from_millis(200)).is_err(), "no channel uses it");
    session.interface_is_down("lo");
    let mut gone = [lost(&events).0, lost(&events).0];
    gone.sort_unstable();
    assert_eq!(gone, [ChannelId(0), ChannelId(1)]);
    returned(&events);
    returned(&events);
    caps.set_total(None);
    placed(&events);
    assert_equal(&source, &host.memory);
}

/// What the channels send between now and then is within a rate: each may be one batch of 1 MiB ahead when it begins, and one
/// when it ends.
fn keeps(session: &SourceSession, rate: u64) {
    let (begin, before) = (Instant::now(), session.stats().wire_bytes);
    std::thread::sleep(Duration::from_millis(700));
    let sent = session.stats().wire_bytes - before;
    let allowed = (begin.elapsed().as_secs_f64() * rate as f64) as u64 + (5 << 20);
    assert!(sent <= allowed, "{sent} bytes instead of {allowed}");
}

#[test]
fn caps_that_change_within_a_round_are_kept() {
    let (source, host, _gate) = through_a_gate(17);
    let mut capped = options(&source, &host, 2, TransferMode::Tcp);
    capped.rate_caps = RateCaps::new(Some(1 << 20));
    let caps = capped.rate_caps.clone();
    let (sender, events) = unbounded();
    let session = SourceSession::open(capped, sender).unwrap();
    session.place(RoundId(0), PageSet::full(8192));
    keeps(&session, 1 << 20);
    // Of this interface, while the whole is free; then of another one, and of the whole again.
    let interfaces = |name: &str, rate| BTreeMap::from([(name.to_owned(), rate)]);
    caps.set_interfaces(interfaces("lo", 2 << 20));
    caps.set_total(None);
    keeps(&session, 2 << 20);
    caps.set_total(Some(1 << 20));
    caps.set_interfaces(interfaces("none0", 1));
    keeps(&session, 1 << 20);
    assert!(session.stats().remaining_pages > 0, "the caps held it up");
    assert!(events.try_recv().is_err());
    caps.set_total(None);
    placed(&events);
    assert_equal(&source, &host.memory);
}

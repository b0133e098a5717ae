//! Sessions over emulated RDMA: what carries the pages, what happens when it fails, and that no byte is wrong then.

use std::net::IpAddr;
use std::sync::Arc;

use super::*;
use crate::channel::rdma::RdmaOptions;
use crate::channel::rdma::emulated::{Host as Devices, Lie, Network};
use crate::channel::rdma::fabric::Retries;

/// The addresses of two rails. Both hosts have the same: it is one machine.
const RAILS: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::new(127, 0, 0, 1)), IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2))];

/// Two hosts with emulated devices, and guest memory in the first.
struct Rails {
    network: Network,
    ours: Arc<Devices>,
    theirs: Arc<Devices>,
    host: Host,
    source: GuestMemory,
    seed: u64,
}

impl Rails {
    fn new() -> Self {
        Self::between(&RAILS, &RAILS)
    }

    /// Hosts whose devices have these addresses.
    fn between(ours: &[IpAddr], theirs: &[IpAddr]) -> Self {
        Self::demanding(ours, theirs, Encryption::default())
    }

    /// A destination that demands this of the payload.
    fn demanding(ours: &[IpAddr], theirs: &[IpAddr], encryption: Encryption) -> Self {
        let network = Network::default();
        let (ours, theirs) = (network.host(ours), network.host(theirs));
        let (sender, incoming) = unbounded();
        let listen = RAILS.map(|address| SocketAddr::from((address, 0)));
        let listener = Listener::bind(&listen, ListenerOptions::default(), sender).unwrap();
        let links = links(&listener, &incoming, ControlOptions::default());
        let (sender, events) = unbounded();
        let memory = memory(Backing::Memfd);
        let rdma = RdmaSupport::with(theirs.clone(), RdmaOptions::default());
        let session =
            DestinationSession::with(memory.clone(), MIGRATION, PATIENCE, &rdma, encryption, sender);
        listener.register(MIGRATION, SECRET, &session, &links.destination);
        let host = Host { listener, memory, session, events, links };
        Self { network, ours, theirs, host, source: super::memory(Backing::Memfd), seed: 77 }
    }

    fn paths(&self) -> Vec<Path> {
        let to = self.host.listener.local_addresses();
        let path = |(source, destination): (IpAddr, &SocketAddr)| Path {
            source: Some(source),
            destination: *destination,
            interface: None,
        };
        RAILS.into_iter().zip(to).map(path).collect()
    }

    fn open(&self, paths: &[Path], channels: usize) -> (SourceSession, Receiver<SessionEvent>) {
        let (sender, events) = unbounded();
        (SourceSession::open(self.options(paths, channels), sender).unwrap(), events)
    }

    fn options(&self, paths: &[Path], channels: usize) -> SourceOptions {
        SourceOptions {
            paths: paths.to_vec(),
            rdma: RdmaSupport::with(self.ours.clone(), RdmaOptions::default()),
            reopen: Some(PATIENCE),
            ..options(&self.source, &self.host, channels, TransferMode::Rdma)
        }
    }

    /// Changes pages here and there, of which a third become zero.
    fn scribble(&mut self, pages: u64) -> PageSet {
        self.scribble_below(8192, pages)
    }

    /// The same, in the first pages only: fewer pieces are registered.
    fn scribble_below(&mut self, end: u64, pages: u64) -> PageSet {
        let mut changed = PageSet::empty(8192);
        for _ in 0..pages {
            let page = random(&mut self.seed) % end;
            changed.insert(PageIndex(page));
            if random(&mut self.seed).is_multiple_of(3) {
                self.source.zero_run(Run::new(page, 1));
            } else {
                write_page(&self.source, page, &mut self.seed, false);
            }
        }
        changed
    }

    fn round(
        &self,
        session: &SourceSession,
        events: &Receiver<SessionEvent>,
        round: u32,
        pages: PageSet,
    ) -> RoundStats {
        session.place(RoundId(round), pages);
        let (placed, stats) = placed(events);
        assert_eq!(placed, RoundId(round));
        assert_equal(&self.source, &self.host.memory);
        stats
    }

    /// Ends both sides. Nothing of either is left on any device.
    fn close(self, session: SourceSession) {
        session.close();
        self.host.session.close();
        assert_eq!(self.network.held(), (0, 0), "regions and queue pairs that are left");
    }
}

/// What a host file says of queue pairs is what they are made with, as far as the port has it.
#[test]
fn queue_pairs_are_as_the_host_has_chosen() {
    let chosen = |mtu, queue_depth, timeout, retries| RdmaOptions {
        mtu,
        queue_depth,
        timeout,
        retries,
        ..RdmaOptions::default()
    };
    let made =
        |timeout, retries| Some(Retries { timeout, retries, not_ready_retries: 6, not_ready_timer: 12 });
    // The emulated port has packets of 1024 bytes and holds 40 requests; the destination has what is usual.
    for (options, expected) in [
        (chosen(256, 16, 20, 3), (16, 256, made(20, 3))),
        (chosen(4096, 512, 31, 0), (40, 1024, made(31, 0))),
        (chosen(512, 20, 1, 7), (20, 512, made(1, 6))),
    ] {
        let mut rails = Rails::new();
        let all = rails.scribble(2000);
        let (sender, events) = unbounded();
        let rdma = RdmaSupport::with(rails.ours.clone(), options);
        let session =
            SourceSession::open(SourceOptions { rdma, ..rails.options(&rails.paths(), 2) }, sender).unwrap();
        assert_eq!(rails.network.senders(), [expected; 2], "{options:?}");
        rails.round(&session, &events, 0, all);
        rails.close(session);
    }
}

/// Encryption on every network but those of these addresses.
fn required(isolated: &[IpAddr]) -> Encryption {
    Encryption { required: true, isolated: isolated.to_vec() }
}

/// RDMA's payload is plain, so it is used on isolated networks only: here the second rail.
#[test]
fn a_rail_that_has_to_be_encrypted_is_left_out() {
    for encryption in [
        EncryptionPolicy { ours: required(&RAILS[1..]), ..EncryptionPolicy::default() },
        EncryptionPolicy { theirs: required(&RAILS[1..]), ..EncryptionPolicy::default() },
    ] {
        let mut rails = Rails::demanding(&RAILS, &RAILS, required(&RAILS[1..]));
        let all = rails.scribble(500);
        let options = SourceOptions { encryption, ..rails.options(&rails.paths(), 2) };
        let (sender, events) = unbounded();
        let session = SourceSession::open(options, sender).unwrap();
        match next(&events) {
            SessionEvent::PathLeftOut { path, reason } => {
                assert_eq!(path.source, Some(RAILS[0]));
                assert!(reason.contains("demands encryption, and RDMA's payload is plain"), "{reason}");
            }
            other => panic!("{other:?} instead of a path that is left out"),
        }
        assert_eq!(carriers(&session), [(TransferMode::Rdma, true)]);
        rails.round(&session, &events, 0, all);
        rails.close(session);
    }
}

/// A source that knows of no such demand is refused in words, and TCP is refused as well.
#[test]
fn a_destination_refuses_rdma_where_it_demands_encryption() {
    let rails = Rails::demanding(&RAILS, &RAILS, required(&[]));
    let (sender, events) = unbounded();
    let error = SourceSession::open(rails.options(&rails.paths(), 2), sender).unwrap_err();
    assert!(matches!(error, SessionError::NoChannel { .. }), "{error:?}");
    let (to, reason) = changed(&events);
    assert_eq!(to, TransferMode::Tcp);
    assert!(
        reason.contains("the host file of the destination demands encryption, and RDMA's payload"),
        "{reason}"
    );
    assert_eq!(rails.network.held(), (0, 0));
}

/// Waits for a change of what carries the pages.
fn changed(events: &Receiver<SessionEvent>) -> (TransferMode, String) {
    loop {
        match next(events) {
            SessionEvent::CarrierChanged { to, reason } => return (to, reason),
            SessionEvent::ChannelLost { .. } | SessionEvent::ChannelReturned { .. } => {}
            other => panic!("{other:?} instead of another carrier"),
        }
    }
}

fn carriers(session: &SourceSession) -> Vec<(TransferMode, bool)> {
    session.stats().channels.iter().map(|channel| (channel.mode, channel.alive)).collect()
}

#[test]
fn pages_are_written_by_rdma_on_both_rails_and_zeros_are_only_told() {
    let mut rails = Rails::new();
    let first = rails.scribble(4000);
    let (session, events) = rails.open(&rails.paths(), 4);
    let stats = rails.round(&session, &events, 0, first);
    assert!(stats.zero_pages > 500);
    assert_eq!(rails.network.written(), stats.payload_bytes);
    let second = rails.scribble(500);
    let more = rails.round(&session, &events, 1, second);
    assert_eq!(rails.network.written(), stats.payload_bytes + more.payload_bytes);
    rails.round(&session, &events, 2, PageSet::empty(8192));

    assert_eq!(carriers(&session), [(TransferMode::Rdma, true); 4]);
    let seen = session.stats();
    assert_eq!((seen.mode, seen.mode_reason), (TransferMode::Rdma, None));
    assert!(seen.channels.iter().all(|channel| channel.bytes > 100_000), "each takes part");
    assert!(matches!(&seen.channels[1].carrier, Carrier::Rdma { device, port: 1, .. } if device == "emu1"));
    let theirs = rails.host.session.stats();
    assert_eq!(theirs.wire_bytes, seen.wire_bytes);
    assert!(theirs.channels.iter().all(|channel| channel.mode == TransferMode::Rdma));
    assert!(events.try_recv().is_err());
    rails.close(session);
}

#[test]
fn memory_that_is_touched_later_is_registered_then() {
    let mut rails = Rails::new();
    let (session, events) = rails.open(&rails.paths()[..1], 1);
    assert_eq!(rails.network.held().0, 2, "only slots for headers, at both ends");
    let first = rails.scribble(50);
    rails.round(&session, &events, 0, first);
    assert!(rails.network.held().0 > 10);
    rails.close(session);
}

#[test]
fn a_rail_that_is_cut_in_a_round_leaves_its_pages_to_the_other_and_comes_back() {
    let mut rails = Rails::new();
    let all = rails.scribble(3000);
    let (session, events) = rails.open(&rails.paths(), 2);
    rails.network.cut(RAILS[1]);
    rails.ours.set_down(RAILS[1], true);
    rails.round(&session, &events, 0, all);
    assert_eq!(carriers(&session), [(TransferMode::Rdma, true), (TransferMode::Rdma, false)]);
    rails.network.mend(RAILS[1]);
    rails.ours.set_down(RAILS[1], false);
    eventually("the rail's return", || session.stats().channels.len() == 3);
    let (before, mut round) = (session.stats().channels[2].bytes, 1);
    // Its part of a round may be next to nothing, where the other rail's thread has the processor.
    eventually("pages on the rail that came back", || {
        let more = rails.scribble(3000);
        rails.round(&session, &events, round, more);
        round += 1;
        session.stats().channels[2].bytes > before + 100_000
    });
    assert_eq!(carriers(&session)[2], (TransferMode::Rdma, true));
    rails.close(session);
}

#[test]
fn tcp_finishes_a_round_that_loses_all_rails_and_rdma_comes_back_at_a_border() {
    let mut rails = Rails::new();
    let all = rails.scribble(3000);
    let (session, events) = rails.open(&rails.paths(), 2);
    RAILS.iter().for_each(|rail| rails.network.cut(*rail));
    session.place(RoundId(0), all);
    let (to, reason) = changed(&events);
    assert_eq!(to, TransferMode::Tcp);
    assert!(
        reason.contains(
            "RDMA was lost, and tcp took over: the RDMA queue pair failed: the peer did not answer"
        ),
        "{reason}"
    );
    placed(&events);
    assert_equal(&rails.source, &rails.host.memory);
    assert_eq!(session.stats().mode, TransferMode::Tcp);
    assert_eq!(session.stats().mode_reason, Some(reason));
    // On the same wires, until queue pairs stand by; then with the next round.
    RAILS.iter().for_each(|rail| rails.network.mend(*rail));
    let mut round = 1;
    eventually("RDMA's return", || {
        let more = rails.scribble(100);
        rails.round(&session, &events, round, more);
        round += 1;
        session.stats().mode == TransferMode::Rdma
    });
    let written = rails.network.written();
    let more = rails.scribble(300);
    let stats = rails.round(&session, &events, round, more);
    assert_eq!(rails.network.written(), written + stats.payload_bytes);
    let alive: Vec<_> = carriers(&session).into_iter().filter(|(_, alive)| *alive).collect();
    assert_eq!(alive, [(TransferMode::Rdma, true); 2]);
    rails.close(session);
}

#[test]
fn what_stands_by_does_not_take_over_in_the_pause() {
    let mut rails = Rails::new();
    let (session, events) = rails.open(&rails.paths(), 2);
    RAILS.iter().for_each(|rail| rails.network.cut(*rail));
    let all = rails.scribble(100);
    rails.round(&session, &events, 0, all);
    RAILS.iter().for_each(|rail| rails.network.mend(*rail));
    let attached = || rails.host.session.stats().channels.iter().filter(|channel| channel.alive).count();
    eventually("queue pairs that stand by", || attached() == 4);
    session.settle();
    let last = rails.scribble(100);
    rails.round(&session, &events, 1, last);
    assert_eq!(session.stats().mode, TransferMode::Tcp);
    rails.close(session);
}

#[test]
fn a_path_without_rdma_is_left_out_while_another_has_it() {
    for here in [true, false] {
        let (ours, theirs) = if here { (&RAILS[..1], &RAILS[..]) } else { (&RAILS[..], &RAILS[..1]) };
        let mut rails = Rails::between(ours, theirs);
        let all = rails.scribble(300);
        let (session, events) = rails.open(&rails.paths(), 2);
        let SessionEvent::PathLeftOut { path, reason } = next(&events) else {
            panic!("a path that is left out")
        };
        assert_eq!(path, rails.paths()[1]);
        let whose = if here { "this host" } else { "the destination" };
        assert!(
            reason.contains(whose) && reason.contains("none of its RDMA devices has the address 127.0.0.2"),
            "{reason}"
        );
        rails.round(&session, &events, 0, all);
        assert_eq!(carriers(&session), [(TransferMode::Rdma, true)]);
        rails.close(session);
    }
}

#[test]
fn where_rdma_is_not_to_be_had_tcp_carries_everything_and_says_why() {
    let elsewhere: [IpAddr; 1] = [IpAddr::V4(Ipv4Addr::new(127, 0, 0, 9))];
    let cases: [(&dyn Fn() -> Rails, &str); 5] = [
        (&|| Rails::between(&elsewhere, &RAILS), "this host: none of its RDMA devices has the address"),
        (&|| Rails::between(&RAILS, &elsewhere), "the destination: none of its RDMA devices has the address"),
        (&|| Rails::between(&RAILS, &[]), "this host has no RDMA device"),
        (
            &|| {
                let rails = Rails::new();
                rails.ours.limit_locking(1000);
                rails
            },
            "this process may lock 1000 bytes of memory, and RDMA needs",
        ),
        (
            &|| {
                let rails = Rails::new();
                rails.theirs.limit_locking(1000);
                rails
            },
            "the destination: this process may lock 1000 bytes",
        ),
    ];
    for (rails, expected) in cases {
        let mut rails = rails();
        let all = rails.scribble(300);
        let (session, events) = rails.open(&rails.paths(), 2);
        let (to, reason) = changed(&events);
        assert!(to == TransferMode::Tcp && reason.contains(expected), "{reason}");
        rails.round(&session, &events, 0, all);
        assert_eq!(carriers(&session), [(TransferMode::Tcp, true); 2]);
        assert_eq!(rails.network.written(), 0);
        rails.close(session);
    }
}

#[test]
fn a_network_that_drops_packets_of_rdma_is_found_out_before_a_round() {
    let mut rails = Rails::new();
    let all = rails.scribble(300);
    rails.network.hold(RAILS[0]);
    rails.network.cut(RAILS[1]);
    let (session, events) = rails.open(&rails.paths(), 2);
    let (to, reason) = changed(&events);
    assert!(
        to == TransferMode::Tcp && reason.contains("no packet of RDMA was answered within 3 s"),
        "{reason}"
    );
    rails.round(&session, &events, 0, all);
    assert_eq!(carriers(&session), [(TransferMode::Tcp, true); 2]);
    rails.close(session);
}

/// A driver waits for all who have its device open. What is under way goes on without it.
#[test]
fn a_device_that_is_taken_away_is_let_go_at_once_and_taken_again_when_it_is_back() {
    for here in [true, false] {
        let mut rails = Rails::new();
        let all = rails.scribble(300);
        let (session, events) = rails.open(&rails.paths()[..1], 2);
        rails.round(&session, &events, 0, all);
        let host = if here { rails.ours.clone() } else { rails.theirs.clone() };
        host.take_away(RAILS[0]);
        // Between rounds, when nothing else would be noticed.
        let (to, reason) = changed(&events);
        assert_eq!(to, TransferMode::Tcp);
        assert!(!here || reason.contains("the RDMA device emu0 was taken away"), "{reason}");
        eventually("a device that nobody has open", || host.opened() == 0);
        let more = rails.scribble(300);
        rails.round(&session, &events, 1, more);
        host.set_down(RAILS[0], false);
        let mut round = 2;
        eventually("the device's return", || {
            let more = rails.scribble(50);
            rails.round(&session, &events, round, more);
            round += 1;
            session.stats().mode == TransferMode::Rdma
        });
        rails.close(session);
    }
}

/// Stale writes: a wire that keeps what was posted for longer than the channel lives.
#[test]
fn what_a_lost_channel_still_has_under_way_never_lands() {
    let mut rails = Rails::new();
    let all = rails.scribble(2000);
    let (sender, events) = unbounded();
    let options = SourceOptions { cut: Some((1, 1)), ..rails.options(&rails.paths(), 2) };
    let session = SourceSession::open(options, sender).unwrap();
    rails.network.hold(RAILS[1]);
    session.set_batch_pages(8);
    session.place(RoundId(0), all);
    placed(&events);
    assert_equal(&rails.source, &rails.host.memory);
    assert!(rails.network.on_the_wire() > 0, "something is under way");
    let changed = rails.scribble(2000);
    rails.round(&session, &events, 1, changed);
    rails.network.release(RAILS[1]);
    assert_eq!(rails.network.on_the_wire(), 0);
    assert_equal(&rails.source, &rails.host.memory);
    rails.close(session);
}

#[test]
fn a_destination_that_lies_about_its_memory_gets_it_by_tcp() {
    for lie in [Lie::Key, Lie::Short] {
        let mut rails = Rails::new();
        rails.network.lie(lie);
        let all = rails.scribble(3000);
        let (session, events) = rails.open(&rails.paths(), 2);
        session.place(RoundId(0), all);
        let (to, reason) = changed(&events);
        assert!(
            to == TransferMode::Tcp && reason.contains("the peer's memory does not allow it"),
            "{reason}"
        );
        placed(&events);
        assert_equal(&rails.source, &rails.host.memory);
        // Tried again at borders, and then no more.
        let mut round = 1;
        eventually("an end of trying", || {
            rails.network.lie(lie);
            let more = rails.scribble(50);
            rails.round(&session, &events, round, more);
            round += 1;
            session.stats().mode_reason.is_some_and(|reason| reason.contains("is not tried again"))
        });
        rails.close(session);
    }
}

/// Every call to a device fails once, at both ends. The pages arrive all the same.
#[test]
fn no_failure_of_a_device_loses_or_changes_a_page() {
    let run = |fail_at: Option<u64>| {
        let mut rails = Rails::new();
        let first = rails.scribble_below(1500, 60);
        rails.network.fail_at(fail_at);
        let (session, events) = rails.open(&rails.paths(), 2);
        rails.round(&session, &events, 0, first);
        let second = rails.scribble_below(1500, 20);
        rails.round(&session, &events, 1, second);
        let calls = rails.network.calls();
        rails.network.fail_at(None);
        rails.close(session);
        calls
    };
    let calls = run(None);
    assert!(calls > 40, "{calls} calls");
    // Threads take turns in ways of their own, so there may be a few more.
    for call in 1..=calls + calls / 10 {
        run(Some(call));
    }
}

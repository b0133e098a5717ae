//! Memory that is encrypted on its way: that it arrives, that nobody reads it, and that each host gets what it demands.

use std::net::IpAddr;

use super::certificates::{Authority, in_host};
use super::gate::Gate;
use super::*;
use crate::session::trust::Trust;
use crate::wire::data::ChannelId;
use crate::wire::preamble::{Preamble, Purpose, RefusalCode};

/// Encryption on every network but those of these addresses.
fn required(isolated: &[IpAddr]) -> Encryption {
    Encryption { required: true, isolated: isolated.to_vec() }
}

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A destination `beta` with this demand, and what a source `alpha` of the same authority has.
fn beta(demand: Encryption) -> (Host, PeerTrust) {
    let authority = Authority::new("the lab's");
    let in_beta = in_host(&authority.host("alpha"), "beta");
    let listening = ListenerOptions { trust: authority.host("beta"), ..ListenerOptions::default() };
    let opening = Opening { trust: in_beta.clone(), ..Opening::default() };
    (demanding_host(memory(Backing::Memfd), listening, opening, demand), in_beta)
}

fn policy(trust: &PeerTrust, ours: Encryption, theirs: Encryption) -> EncryptionPolicy {
    EncryptionPolicy { trust: trust.clone(), ours, theirs, theirs_can: true }
}

fn carriers(session: &SourceSession) -> Vec<Carrier> {
    session.stats().channels.into_iter().map(|channel| channel.carrier).collect()
}

/// Random pages, zero pages and pages that shrink, in three rounds.
fn rounds(source: &GuestMemory, host: &Host, options: SourceOptions) -> SessionStats {
    let (sender, events) = unbounded();
    let session = SourceSession::open(options, sender).unwrap();
    let mut seed = 5;
    for round in 0..3 {
        let mut changed = PageSet::empty(8192);
        for number in 0..1500 {
            let page = random(&mut seed) % 8192;
            changed.insert(PageIndex(page));
            match number % 3 {
                0 => source.zero_run(Run::new(page, 1)),
                kind => write_page(source, page, &mut seed, kind == 1),
            }
        }
        // Runs that are longer than what is copied at once, up to a border between regions.
        changed.extend([Run::new(2000, 48), Run::new(2048, 17), Run::new(5000, 1100)]);
        session.place(RoundId(round), changed.clone());
        assert_eq!(placed(&events).1.pages, changed.len());
        assert_equal(source, &host.memory);
    }
    let stats = session.stats();
    assert_eq!(host.session.stats().wire_bytes, stats.wire_bytes);
    assert!(host.session.stats().channels.iter().all(|channel| channel.carrier == Carrier::Sealed));
    session.close();
    stats
}

#[test]
fn pages_of_all_kinds_arrive_encrypted() {
    for (mode, channels) in [(TransferMode::Tcp, 1), (TransferMode::Tcp, 3), (TransferMode::Compression, 2)] {
        let source = memory(Backing::Memfd);
        let (host, in_beta) = beta(required(&[]));
        let encryption = policy(&in_beta, required(&[]), required(&[]));
        let stats =
            rounds(&source, &host, SourceOptions { encryption, ..options(&source, &host, channels, mode) });
        assert_eq!(stats.channels.len(), channels);
        assert!(stats.channels.iter().all(|channel| channel.alive && channel.mode == mode));
        assert!(stats.channels.iter().all(|channel| channel.carrier == Carrier::Sealed));
        assert!(
            stats.channels.iter().all(|channel| channel.carrier.is_encrypted() && channel.bytes > 10_000)
        );
    }
}

#[test]
fn a_lost_encrypted_channel_leaves_its_pages_to_another_and_comes_back() {
    let source = memory(Backing::Memfd);
    let (host, in_beta) = beta(required(&[]));
    let mut seed = 3;
    (0..8192).for_each(|page| write_page(&source, page, &mut seed, false));
    let options = SourceOptions {
        encryption: policy(&in_beta, required(&[]), Encryption::default()),
        reopen: Some(PATIENCE),
        cut: Some((1, 3 << 20)),
        ..options(&source, &host, 2, TransferMode::Tcp)
    };
    let (sender, events) = unbounded();
    let session = SourceSession::open(options, sender).unwrap();
    session.place(RoundId(0), PageSet::full(8192));
    placed(&events);
    assert_equal(&source, &host.memory);
    eventually("another channel", || session.stats().channels.len() == 3);
    assert_eq!(carriers(&session), [Carrier::Sealed, Carrier::Sealed, Carrier::Sealed]);
    assert!(!session.stats().channels[1].alive && session.stats().channels[2].alive);
    (0..1000).for_each(|page| write_page(&source, page, &mut seed, false));
    session.place(RoundId(1), set(&source, &[Run::new(0, 1000)]));
    placed(&events);
    assert_equal(&source, &host.memory);
}

/// The same pages once in plain and once encrypted, with somebody on the wire.
#[test]
fn nobody_on_the_wire_reads_a_page() {
    const WORDS: &[u8] = b"what the guest keeps to itself. ";
    let source = memory(Backing::Memfd);
    for page in 0..500 {
        source.write_run(Run::new(page, 1), &WORDS.repeat(4096 / WORDS.len()));
    }
    for (mode, encrypted) in
        [(TransferMode::Tcp, false), (TransferMode::Tcp, true), (TransferMode::Compression, true)]
    {
        let demand = if encrypted { required(&[]) } else { Encryption::default() };
        let (host, in_beta) = beta(demand.clone());
        let gate = Gate::before(host.listener.local_addresses()[0]);
        gate.eavesdrop();
        let options = SourceOptions {
            encryption: policy(&in_beta, Encryption::default(), demand),
            paths: vec![gate.path()],
            ..options(&source, &host, 1, mode)
        };
        let (sender, events) = unbounded();
        let session = SourceSession::open(options, sender).unwrap();
        session.place(RoundId(0), PageSet::full(8192));
        placed(&events);
        assert_equal(&source, &host.memory);
        let heard = gate.heard();
        let has = |words: &[u8]| heard.windows(words.len()).any(|window| window == words);
        assert!(mode != TransferMode::Tcp || heard.len() > 500 * 4096, "{} bytes", heard.len());
        assert_eq!(has(WORDS), !encrypted, "the guest's words");
        assert_eq!(gate.preambles()[0].starts_with(b"PGFERRY"), !encrypted, "which migration it is");
        session.close();
    }
}

/// A destination that demands encryption hears nothing of a source that knows of no such thing.
#[test]
fn a_plain_channel_is_refused_where_encryption_is_demanded() {
    let source = memory(Backing::Memfd);
    let (host, _) = beta(required(&["10.9.9.9".parse().unwrap()]));
    let (sender, _events) = unbounded();
    let error = SourceSession::open(options(&source, &host, 1, TransferMode::Tcp), sender).unwrap_err();
    let SessionError::NoChannel { first, .. } = error else { panic!("{error:?}") };
    assert!(matches!(*first, SessionError::Refused { code: RefusalCode::Untrusted, .. }), "{first:?}");
    let said = first.to_string();
    assert!(said.contains("demands encryption, and this data channel is plain"), "{said}");
    eventually("it is counted", || host.listener.stats().refused == 1);
    assert!(host.session.stats().channels.is_empty());
}

#[test]
fn an_isolated_network_carries_pages_in_plain() {
    let source = memory(Backing::Memfd);
    let (host, in_beta) = beta(required(&[LOOPBACK]));
    let encryption = policy(&in_beta, required(&[LOOPBACK]), required(&[LOOPBACK]));
    let (sender, events) = unbounded();
    let options = SourceOptions { encryption, ..options(&source, &host, 2, TransferMode::Tcp) };
    let session = SourceSession::open(options, sender).unwrap();
    session.place(RoundId(0), PageSet::full(8192));
    placed(&events);
    assert_eq!(carriers(&session), [Carrier::Tcp, Carrier::Tcp]);
}

/// What cannot be encrypted is not sent.
#[test]
fn a_source_that_cannot_encrypt_sends_nothing() {
    let source = memory(Backing::Memfd);
    let (host, in_beta) = beta(Encryption::default());
    let nobody = PeerTrust { trust: Trust::Insecure, name: None };
    for (trust, theirs_can, why) in [
        (nobody, true, "this host has no certificates"),
        (in_beta, false, "the destination has no certificates, or is of a release"),
    ] {
        let encryption =
            EncryptionPolicy { theirs_can, ..policy(&trust, required(&[]), Encryption::default()) };
        let (sender, _events) = unbounded();
        let options = SourceOptions { encryption, ..options(&source, &host, 2, TransferMode::Tcp) };
        let error = SourceSession::open(options, sender).unwrap_err();
        let SessionError::NoChannel { first, .. } = error else { panic!("{error:?}") };
        assert!(first.to_string().contains(why), "{first}");
    }
    assert!(host.session.stats().channels.is_empty());
}

/// TLS says which host is there, not that it knows the migration.
#[test]
fn an_encrypted_channel_proves_the_secret_too() {
    let (host, in_beta) = beta(required(&[]));
    let wrong = Preamble::new(Purpose::Data { channel: 0 }, MIGRATION, Secret([1; 32]));
    let error = handshake::dial(&path_to(&host.listener), &wrong, &in_beta, PATIENCE).unwrap_err();
    assert!(matches!(error, SessionError::Refused { code: RefusalCode::WrongSecret, .. }), "{error}");
    let rdma = Preamble::new(Purpose::RdmaData { channel: 0 }, MIGRATION, SECRET);
    let error = handshake::dial(&path_to(&host.listener), &rdma, &in_beta, PATIENCE).unwrap_err();
    assert!(matches!(error, SessionError::Refused { code: RefusalCode::NotNow, .. }), "{error}");
    // And a number once.
    let right = Preamble::new(Purpose::Data { channel: 0 }, MIGRATION, SECRET);
    let _first = handshake::dial(&path_to(&host.listener), &right, &in_beta, PATIENCE).unwrap();
    let error = handshake::dial(&path_to(&host.listener), &right, &in_beta, PATIENCE).unwrap_err();
    assert!(error.to_string().contains("of this number already"), "{error}");
    assert_eq!(host.session.stats().channels[0].id, ChannelId(0));
}

/// Frames that break the protocol end the migration under TLS as without.
#[test]
fn a_lie_within_tls_is_a_violation() {
    let (host, in_beta) = beta(required(&[]));
    let preamble = Preamble::new(Purpose::Data { channel: 0 }, MIGRATION, SECRET);
    let (stream, _) = handshake::dial(&path_to(&host.listener), &preamble, &in_beta, PATIENCE).unwrap();
    std::io::Write::write_all(&mut &stream, &[0x55; 4096]).unwrap();
    loop {
        match next(&host.events) {
            DestinationEvent::ChannelAttached { .. } => {}
            DestinationEvent::Violation { channel: ChannelId(0), .. } => break,
            other => panic!("{other:?} instead of a violation"),
        }
    }
}

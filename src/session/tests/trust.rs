//! Hosts that prove who they are, and hosts that do not.

use std::net::TcpStream;
use std::time::Instant;

use super::certificates::{Authority, in_host, trust};
use super::*;
use crate::session::stream::tls::TlsStream;
use crate::session::trust::{TlsError, Trust};
use crate::wire::preamble::{Preamble, Purpose, RefusalCode};

fn taking(trust: Trust) -> ListenerOptions {
    ListenerOptions { trust, ..ListenerOptions::default() }
}

fn showing(trust: PeerTrust) -> Opening {
    Opening { trust, ..Opening::default() }
}

/// A destination `beta`, and a source `alpha` that looks for it, of one authority.
fn two_hosts(memory: GuestMemory) -> (Host, PeerTrust) {
    let authority = Authority::new("the lab's");
    let in_beta = in_host(&authority.host("alpha"), "beta");
    (host_with(memory, taking(authority.host("beta")), showing(in_beta.clone())), in_beta)
}

/// Why a migration does not begin, and that the other side has heard of none and goes on to take others.
fn refused(listener: &Listener, incoming: &Receiver<ListenerEvent>, trust: PeerTrust) -> SessionError {
    let (sender, _events) = unbounded();
    let path = path_to(listener);
    let error = ControlLink::dial(&[path], MIGRATION, &showing(trust), ControlOptions::default(), sender)
        .expect_err("a host that is not trusted is refused");
    let stats = || listener.stats().refused + listener.stats().dropped;
    eventually("the refusal is counted", || stats() > 0);
    assert!(incoming.try_recv().is_err(), "nobody hears of a migration");
    error
}

fn assert_untrusted(error: &SessionError, words: &str) {
    assert!(matches!(error, SessionError::Untrusted { .. }), "{error:?}");
    assert!(error.to_string().contains(words), "{error}");
}

#[test]
fn messages_go_both_ways_at_once() {
    let (host, _) = two_hosts(memory(Backing::Memfd));
    // More than both sockets hold, in pieces of all sizes around those of a record.
    let expected = |number: u32| number.to_le_bytes().repeat(1 + (number as usize * 7919) % 65_536);
    let count = 400;
    std::thread::scope(|scope| {
        let Links { source, source_events, destination, destination_events } = &host.links;
        for (link, events) in [(source, source_events), (destination, destination_events)] {
            scope.spawn(move || (0..count).for_each(|number| link.send(expected(number))));
            scope.spawn(move || {
                for number in 0..count {
                    match next(events) {
                        LinkEvent::Message(message) => {
                            assert!(message == expected(number), "message {number} is another");
                        }
                        other => panic!("{other:?} instead of message {number}"),
                    }
                }
            });
        }
    });
}

#[test]
fn a_link_goes_on_after_cuts() {
    let (host, _) = two_hosts(memory(Backing::Memfd));
    let Links { source, source_events, destination, destination_events } = &host.links;
    let message = |number: u32| number.to_be_bytes().repeat(5000);
    let receive = |events: &Receiver<LinkEvent>| {
        let (mut messages, mut resumed) = (0, 0);
        while messages < 200 {
            match next(events) {
                LinkEvent::Message(bytes) => {
                    assert!(bytes == message(messages), "message {messages} is another");
                    messages += 1;
                }
                LinkEvent::Interrupted { .. } => {}
                LinkEvent::Resumed { .. } => resumed += 1,
                LinkEvent::Lost { cause } => panic!("the link was lost: {cause}"),
            }
        }
        assert!(resumed >= 1, "the cuts were noticed");
    };
    std::thread::scope(|scope| {
        scope.spawn(|| receive(source_events));
        scope.spawn(|| receive(destination_events));
        for number in 0..200 {
            source.send(message(number));
            destination.send(message(number));
            match number {
                50 | 150 => source.cut(),
                100 => destination.cut(),
                _ => {}
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    });
}

#[test]
fn pages_travel_beside_a_link_under_tls() {
    let source = memory(Backing::Memfd);
    let (host, _) = two_hosts(memory(Backing::Memfd));
    let mut seed = 11;
    (0..8192).for_each(|page| write_page(&source, page, &mut seed, false));
    let (sender, events) = unbounded();
    let session = SourceSession::open(options(&source, &host, 2, TransferMode::Tcp), sender).unwrap();
    session.place(RoundId(0), PageSet::full(8192));
    placed(&events);
    assert_equal(&source, &host.memory);
    assert_eq!(host.listener.stats(), ListenerStats::default());
}

#[test]
fn a_question_is_answered_among_hosts_that_trust_each_other_only() {
    let authority = Authority::new("the lab's");
    let (listener, incoming) = listener_with(taking(authority.host("beta")));
    let path = path_to(&listener);
    let in_beta = in_host(&authority.host("alpha"), "beta");
    let asker = std::thread::spawn(move || query(&[path], MIGRATION, b"who runs it?", &in_beta, PATIENCE));
    let ListenerEvent::Query { connection, .. } = next(&incoming) else { panic!("a question") };
    assert_eq!(connection.request(), b"who runs it?");
    connection.answer(&[9; 60_000]).unwrap();
    assert_eq!(asker.join().unwrap().unwrap(), [9; 60_000]);

    let error = query(&[path], MIGRATION, b"who?", &PeerTrust::default(), PATIENCE).unwrap_err();
    assert!(matches!(error, SessionError::Refused { code: RefusalCode::Untrusted, .. }), "{error}");
    assert!(incoming.try_recv().is_err());
}

#[test]
fn a_host_of_another_authority_is_refused_by_both_sides() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let (listener, incoming) = listener_with(taking(ours.host("beta")));
    let strange = theirs.host("alpha");
    let error = refused(&listener, &incoming, in_host(&strange, "beta"));
    assert_untrusted(&error, "its certificate is of a CA that this host does not trust");

    // One that trusts ours, and is trusted by nobody here.
    let mut files = theirs.issue("alpha", 3600);
    files.ca = theirs.file("both.pem", &format!("{}{}", ours.pem(), theirs.pem()));
    let (listener, incoming) = listener_with(taking(ours.host("beta")));
    let error = refused(&listener, &incoming, in_host(&trust(&files).unwrap(), "beta"));
    assert_untrusted(&error, "it does not trust the CA of this host's certificate");
}

#[test]
fn a_certificate_that_ends_meanwhile_is_refused_by_both_sides() {
    let authority = Authority::new("the lab's");
    let brief = |host| trust(&authority.issue(host, 2)).unwrap();
    let (brief_alpha, brief_beta) = (brief("alpha"), brief("beta"));
    std::thread::sleep(Duration::from_millis(3100));

    let (listener, incoming) = listener_with(taking(brief_beta));
    let error = refused(&listener, &incoming, in_host(&authority.host("alpha"), "beta"));
    assert_untrusted(&error, "its certificate has expired");

    let (listener, incoming) = listener_with(taking(authority.host("beta")));
    let error = refused(&listener, &incoming, in_host(&brief_alpha, "beta"));
    assert_untrusted(&error, "it finds this host's certificate expired");
}

#[test]
fn a_host_of_another_name_is_refused() {
    let authority = Authority::new("the lab's");
    let alpha = authority.host("alpha");
    let (listener, incoming) = listener_with(taking(authority.host("beta")));
    let error = refused(&listener, &incoming, in_host(&alpha, "gamma"));
    assert_untrusted(&error, "not for gamma; another host answers there");
    let nameless = PeerTrust { trust: alpha.clone(), name: None };
    assert_untrusted(&refused(&listener, &incoming, nameless), "it is not known by what name");
    let strange = refused(&listener, &incoming, in_host(&alpha, "two words"));
    assert_untrusted(&strange, "the name to look for in its certificate is none");
}

#[test]
fn a_host_without_a_certificate_is_refused() {
    let authority = Authority::new("the lab's");
    let (listener, incoming) = listener_with(taking(authority.host("beta")));
    let mut roots = rustls::RootCertStore::empty();
    let pem = rustls::pki_types::pem::PemObject::from_pem_slice(authority.pem().as_bytes()).unwrap();
    roots.add(pem).unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let anonymous = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let socket = TcpStream::connect(listener.local_addresses()[0]).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let beta = "beta".try_into().unwrap();
    let stream = TlsStream::connect(socket, std::sync::Arc::new(anonymous), beta, deadline).unwrap();
    let stream = stream::Stream::Tls(std::sync::Arc::new(stream));
    // With TLS 1.3 this side is done before the other has looked at its certificate.
    let mut answer = Vec::new();
    let error = std::io::Read::read_to_end(&mut &stream, &mut answer).unwrap_err();
    assert!(answer.is_empty());
    let why = handshake::explain(&error);
    assert!(why.contains("wants this host to show a certificate"), "{why}");
    eventually("the refusal is counted", || listener.stats().dropped == 1);
    assert!(incoming.try_recv().is_err());
}

#[test]
fn a_host_that_does_without_tls_is_refused_by_one_that_does_not() {
    let authority = Authority::new("the lab's");
    let (listener, incoming) = listener_with(taking(authority.host("beta")));
    let error = refused(&listener, &incoming, PeerTrust::default());
    assert!(matches!(error, SessionError::Refused { code: RefusalCode::Untrusted, .. }), "{error:?}");
    assert!(error.to_string().contains("takes only hosts that prove who they are"), "{error}");

    let (listener, incoming) = super::listener();
    let error = refused(&listener, &incoming, in_host(&authority.host("alpha"), "beta"));
    assert_untrusted(&error, "does that host have certificates?");
}

/// Nor is a link that somebody without a certificate takes up where another has begun it.
#[test]
fn a_link_is_not_resumed_without_tls() {
    let (host, _) = two_hosts(memory(Backing::Memfd));
    let preamble = Preamble::new(Purpose::ResumeControl { attempt: 1, received: 0 }, MIGRATION, SECRET);
    let error = handshake::dial_plain(&path_to(&host.listener), &preamble, PATIENCE).unwrap_err();
    assert!(matches!(error, SessionError::Refused { code: RefusalCode::Untrusted, .. }), "{error}");
    assert!(host.links.destination_events.try_recv().is_err());
}

#[test]
fn files_that_prove_nothing_are_named() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let good = ours.issue("alpha", 3600);
    assert!(trust(&good).is_ok());
    let expired = trust(&ours.issue("old", -60)).unwrap_err();
    assert!(matches!(expired, TlsError::Time { .. }), "{expired}");
    assert!(expired.to_string().contains("old.pem expired on"), "{expired}");

    let mut foreign = theirs.issue("alpha", 3600);
    foreign.ca.clone_from(&good.ca);
    let foreign = trust(&foreign).unwrap_err();
    assert!(matches!(foreign, TlsError::Foreign { .. }), "{foreign}");

    let mut unfit = good.clone();
    unfit.key = ours.issue("other", 3600).key;
    let unfit = trust(&unfit).unwrap_err();
    assert!(matches!(unfit, TlsError::Pair { .. }), "{unfit}");
    assert!(
        unfit.to_string().contains("alpha.pem") && unfit.to_string().contains("other-key.pem"),
        "{unfit}"
    );

    for (what, wanted) in [("ca", "certificate"), ("certificate", "certificate"), ("key", "private key")] {
        let mut files = good.clone();
        let file = match what {
            "ca" => &mut files.ca,
            "certificate" => &mut files.certificate,
            _ => &mut files.key,
        };
        *file = ours.file("empty.pem", "nothing\n");
        let empty = trust(&files).unwrap_err().to_string();
        assert!(empty.contains("empty.pem") && empty.contains(wanted), "{what}: {empty}");
        std::fs::remove_file(ours.file("empty.pem", "")).unwrap();
        let gone = trust(&files).unwrap_err().to_string();
        assert!(gone.contains("No such file"), "{what}: {gone}");
    }
}

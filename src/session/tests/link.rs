//! Control links that are cut, refused and closed, and queries.

use super::*;
use crate::wire::preamble::RefusalCode;

fn message(events: &Receiver<LinkEvent>) -> Vec<u8> {
    loop {
        match next(events) {
            LinkEvent::Message(message) => return message,
            LinkEvent::Interrupted { .. } | LinkEvent::Resumed { .. } => {}
            LinkEvent::Lost { cause } => panic!("the link was lost: {cause}"),
        }
    }
}

#[test]
fn messages_survive_cuts_without_loss_or_duplicates() {
    let host = host(memory(Backing::Memfd));
    let links = &host.links;
    for number in 0..200u32 {
        links.source.send(number.to_le_bytes().to_vec());
        links.destination.send(number.to_be_bytes().repeat(5000));
        match number {
            50 | 150 => links.source.cut(),
            51 | 100 => links.destination.cut(),
            _ => {}
        }
        if number.is_multiple_of(10) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    for number in 0..200u32 {
        assert_eq!(message(&links.destination_events), number.to_le_bytes());
        assert_eq!(message(&links.source_events), number.to_be_bytes().repeat(5000));
    }
}

#[test]
fn a_cut_is_told_on_both_sides() {
    let host = host(memory(Backing::Memfd));
    host.links.source.cut();
    for events in [&host.links.source_events, &host.links.destination_events] {
        assert!(matches!(next(events), LinkEvent::Interrupted { .. }));
        let LinkEvent::Resumed { path } = next(events) else { panic!("a link that is back") };
        assert_eq!(path, path_to(&host.listener));
    }
}

#[test]
fn without_a_secret_a_cut_is_the_end() {
    let (listener, incoming) = listener();
    let links = links(&listener, &incoming, ControlOptions::default());
    links.source.cut();
    for events in [&links.source_events, &links.destination_events] {
        let LinkEvent::Lost { cause } = next(events) else { panic!("a lost link") };
        assert!(matches!(cause, SessionError::NotResumable(_)), "{cause}");
    }
}

#[test]
fn a_link_that_does_not_come_back_is_given_up() {
    let (listener, incoming) = listener();
    let options =
        ControlOptions { give_up_after: Duration::from_millis(300), link_timeout: Duration::from_secs(5) };
    let links = links(&listener, &incoming, options);
    links.source.set_secret(SECRET);
    drop(listener);
    links.source.cut();
    assert!(matches!(next(&links.source_events), LinkEvent::Interrupted { .. }));
    let LinkEvent::Lost { cause } = next(&links.source_events) else { panic!("a lost link") };
    assert!(matches!(cause, SessionError::GaveUp { .. }), "{cause}");
}

#[test]
fn a_host_that_forgot_the_migration_refuses_at_once() {
    let host = host(memory(Backing::Memfd));
    host.listener.unregister(MIGRATION);
    host.links.source.cut();
    assert!(matches!(next(&host.links.source_events), LinkEvent::Interrupted { .. }));
    let LinkEvent::Lost { cause } = next(&host.links.source_events) else { panic!("a lost link") };
    assert!(matches!(cause, SessionError::Refused { code: RefusalCode::UnknownMigration, .. }), "{cause}");
}

#[test]
fn closing_sends_everything_first_and_says_goodbye() {
    let (listener, incoming) = listener();
    let links = links(&listener, &incoming, ControlOptions::default());
    for number in 0..100u8 {
        links.source.send(vec![number; 100_000]);
    }
    std::thread::scope(|scope| {
        let closing = scope.spawn(|| links.source.flush_and_close(PATIENCE));
        for number in 0..100u8 {
            assert_eq!(message(&links.destination_events), vec![number; 100_000]);
        }
        assert!(closing.join().unwrap());
    });
    let LinkEvent::Lost { cause } = next(&links.destination_events) else { panic!("the end") };
    assert!(matches!(cause, SessionError::ClosedByPeer), "{cause}");
    assert!(links.source_events.try_recv().is_err(), "closing one's own end tells nothing");
}

/// A peer that is connected and says nothing, which a kernel's keepalive cannot tell from a healthy one.
#[test]
fn silence_is_noticed() {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let path = Path::to(socket.local_addr().unwrap());
    let silent = std::thread::spawn(move || {
        let (mut stream, _) = socket.accept().unwrap();
        let mut preamble = [0; crate::wire::preamble::PREAMBLE_BYTES];
        std::io::Read::read_exact(&mut stream, &mut preamble).unwrap();
        std::io::Write::write_all(&mut stream, &crate::wire::preamble::Reply::accepted(0).encode()).unwrap();
        stream
    });
    let options = ControlOptions { link_timeout: Duration::from_secs(1), ..ControlOptions::default() };
    let (sender, events) = unbounded();
    let link = ControlLink::dial(&[path], MIGRATION, &Opening::default(), options, sender).unwrap();
    let stream = silent.join().unwrap();
    let LinkEvent::Lost { cause } = next(&events) else { panic!("a lost link") };
    let SessionError::NotResumable(cause) = cause else { panic!("{cause}") };
    assert!(matches!(*cause, SessionError::LinkSilent { seconds: 1 }), "{cause}");
    drop((stream, link));
}

#[test]
fn heartbeats_keep_an_idle_link() {
    let (listener, incoming) = listener();
    let options = ControlOptions { link_timeout: Duration::from_secs(2), ..ControlOptions::default() };
    let links = links(&listener, &incoming, options);
    std::thread::sleep(Duration::from_millis(3500));
    let event = links.source_events.try_recv();
    assert!(event.is_err(), "{event:?}");
    links.source.send(vec![1]);
    assert_eq!(message(&links.destination_events), [1]);
}

#[test]
fn a_refusal_comes_in_the_hosts_words() {
    let (listener, incoming) = listener();
    let path = path_to(&listener);
    for words in ["no memory for 12 GiB", ""] {
        let (sender, _events) = unbounded();
        let dialler = std::thread::spawn(move || {
            ControlLink::dial(&[path], MIGRATION, &Opening::default(), ControlOptions::default(), sender)
        });
        let ListenerEvent::NewMigration { link, .. } = next(&incoming) else { panic!("a migration") };
        if words.is_empty() {
            drop(link);
        } else {
            link.refuse(words);
        }
        let error = dialler.join().unwrap().unwrap_err();
        assert!(matches!(error, SessionError::Refused { code: RefusalCode::Declined, .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[test]
fn a_question_is_answered() {
    let (listener, incoming) = listener();
    let paths = [Path::to("127.0.0.1:1".parse().unwrap()), path_to(&listener)];
    let asker = std::thread::spawn(move || {
        query(&paths, MIGRATION, b"who runs it?", &PeerTrust::default(), PATIENCE)
    });
    let ListenerEvent::Query { migration, connection } = next(&incoming) else { panic!("a query") };
    assert_eq!((migration, connection.request()), (MIGRATION, &b"who runs it?"[..]));
    connection.answer(&vec![9; 60_000]).unwrap();
    assert_eq!(asker.join().unwrap().unwrap(), vec![9; 60_000]);
    let too_long = query(&[path_to(&listener)], MIGRATION, &vec![0; 70_000], &PeerTrust::default(), PATIENCE)
        .unwrap_err();
    assert!(matches!(too_long, SessionError::Query { .. }), "{too_long}");
}

#[test]
fn a_taken_address_is_named() {
    let (listener, _incoming) = listener();
    let address = listener.local_addresses()[0];
    let (sender, _events) = unbounded();
    let error = Listener::bind(&[address], ListenerOptions::default(), sender).unwrap_err();
    assert!(error.to_string().contains(&address.to_string()), "{error}");
}

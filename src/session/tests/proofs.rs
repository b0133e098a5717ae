//! What opens a data channel or takes up a control link, shown by somebody who overheard it or guesses.

use std::io::{Read, Write};
use std::net::TcpStream;

use super::gate::Gate;
use super::*;
use crate::wire::data::ChannelId;
use crate::wire::preamble::{
    Answer, PREAMBLE_BYTES, Preamble, Purpose, REPLY_BYTES, RefusalCode, Reply, ReplyHeader,
};

/// Sends bytes that may be a preamble; answers what the listener says.
fn show(listener: &Listener, preamble: &[u8; PREAMBLE_BYTES]) -> (RefusalCode, String) {
    let mut stream = TcpStream::connect(listener.local_addresses()[0]).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(preamble).unwrap();
    let mut head = [0; REPLY_BYTES];
    stream.read_exact(&mut head).unwrap();
    let header = ReplyHeader::decode(&head).unwrap();
    let mut text = vec![0; header.text_bytes()];
    stream.read_exact(&mut text).unwrap();
    match header.with_text(&text).unwrap() {
        Reply { answer: Answer::Refused { code, text }, .. } => (code, text),
        Reply { answer: Answer::Accepted { .. }, .. } => panic!("it was let in"),
    }
}

fn counted(listener: &Listener, refused: u64) {
    eventually("every refusal is counted", || listener.stats().refused == refused);
}

#[test]
fn a_data_channels_first_bytes_open_nothing_a_second_time() {
    let source = memory(Backing::Memfd);
    let host = host(memory(Backing::Memfd));
    let gate = Gate::before(host.listener.local_addresses()[0]);
    let mut through = options(&source, &host, 1, TransferMode::Tcp);
    through.paths = vec![gate.path()];
    let (sender, events) = unbounded();
    let session = SourceSession::open(through, sender).unwrap();
    let overheard = gate.preambles()[0];
    assert_eq!(Preamble::decode(&overheard).unwrap().purpose, Purpose::Data { channel: 0 });
    assert!(!overheard.windows(32).any(|bytes| bytes == SECRET.0), "the secret itself does not travel");
    assert!(matches!(next(&host.events), DestinationEvent::ChannelAttached { .. }));

    let (code, text) = show(&host.listener, &overheard);
    assert_eq!(code, RefusalCode::NotNow);
    assert!(text.contains("of this number already"), "{text}");
    counted(&host.listener, 1);
    // The channel that is there is not harmed.
    let mut seed = 3;
    (0..64).for_each(|page| write_page(&source, page, &mut seed, false));
    session.place(RoundId(0), set(&source, &[Run::new(0, 64)]));
    placed(&events);
    assert_equal(&source, &host.memory);

    // Nor is it of use once that is gone.
    session.close();
    assert!(matches!(next(&host.events), DestinationEvent::ChannelLost { channel: ChannelId(0), .. }));
    assert_eq!(show(&host.listener, &overheard).0, RefusalCode::NotNow);
    counted(&host.listener, 2);
    assert!(host.events.try_recv().is_err(), "no channel was attached");
}

#[test]
fn a_proof_that_is_guessed_or_for_something_else_is_refused() {
    let host = host(memory(Backing::Memfd));
    let good = Preamble::new(Purpose::Data { channel: 4 }, MIGRATION, SECRET);
    let mut tried = 0;
    let mut refused = |preamble: &[u8; PREAMBLE_BYTES]| {
        assert_eq!(show(&host.listener, preamble).0, RefusalCode::WrongSecret);
        tried += 1;
        counted(&host.listener, tried);
    };
    // For another channel, another purpose, another migration.
    refused(&Preamble { purpose: Purpose::Data { channel: 5 }, ..good }.encode());
    let resume = Purpose::ResumeControl { attempt: 1, received: 4 };
    refused(&Preamble { purpose: resume, ..good }.encode());
    let elsewhere = Preamble::new(good.purpose, MigrationId([9; 16]), SECRET);
    refused(&Preamble { migration: MIGRATION, ..elsewhere }.encode());
    let further = Preamble::new(Purpose::ResumeControl { attempt: 2, received: 0 }, MIGRATION, SECRET);
    refused(&Preamble { purpose: Purpose::ResumeControl { attempt: 3, received: 0 }, ..further }.encode());
    // The secret's own bytes, nothing, and each byte wrong once.
    let mut bytes = good.encode();
    bytes[40..].copy_from_slice(&SECRET.0);
    refused(&bytes);
    bytes[40..].fill(0);
    refused(&bytes);
    for at in 40..PREAMBLE_BYTES {
        let mut bytes = good.encode();
        bytes[at] ^= 0x10;
        refused(&bytes);
    }
    assert!(host.events.try_recv().is_err(), "no channel was attached");
    assert!(host.links.destination_events.try_recv().is_err(), "the link was not touched");
    // What was refused so often is still good for the one that it is for.
    handshake::dial_plain(&path_to(&host.listener), &good, PATIENCE).unwrap();
    assert!(matches!(next(&host.events), DestinationEvent::ChannelAttached { channel: ChannelId(4), .. }));
}

#[test]
fn an_attempt_to_resume_is_taken_once() {
    let (listener, incoming) = listener();
    let gate = Gate::before(listener.local_addresses()[0]);
    let links = links_over(gate.path(), &incoming, Opening::default(), ControlOptions::default());
    let (sender, _events) = unbounded();
    let session = DestinationSession::new(memory(Backing::Memfd), MIGRATION, sender);
    links.source.set_secret(SECRET);
    links.destination.set_secret(SECRET);
    listener.register(MIGRATION, SECRET, &session, &links.destination);

    for attempt in 1..=2 {
        gate.cut();
        for events in [&links.source_events, &links.destination_events] {
            assert!(matches!(next(events), LinkEvent::Interrupted { .. }));
            assert!(matches!(next(events), LinkEvent::Resumed { .. }));
        }
        let overheard = *gate.preambles().last().unwrap();
        let Purpose::ResumeControl { attempt: made, .. } = Preamble::decode(&overheard).unwrap().purpose
        else {
            panic!("an attempt to resume")
        };
        assert!(made >= attempt);
        let (code, text) = show(&listener, &overheard);
        assert_eq!(code, RefusalCode::WrongSecret);
        assert!(text.contains("made already"), "{text}");
        counted(&listener, u64::from(attempt));
    }
    // The link is where it was.
    links.source.send(vec![1, 2, 3]);
    assert!(matches!(next(&links.destination_events), LinkEvent::Message(bytes) if bytes == [1, 2, 3]));
}

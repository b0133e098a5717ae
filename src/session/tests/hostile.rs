//! Peers that send garbage, lie, stop or guess.

use super::*;
use crate::channel::ChannelError;
use crate::wire::data::{BarrierId, ChannelId, FrameKind, HEADER_BYTES, encode_barrier, encode_pages};
use crate::wire::preamble::{PREAMBLE_BYTES, Preamble, PreambleError, Purpose, RefusalCode, Versions};
use std::io::{Read, Write};
use std::net::TcpStream;

fn connect(listener: &Listener) -> TcpStream {
    let stream = TcpStream::connect(listener.local_addresses()[0]).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// A data channel by hand.
fn channel(host: &Host, id: u32) -> TcpStream {
    let preamble = Preamble::new(Purpose::Data { channel: id }, MIGRATION, SECRET);
    let stream = handshake::dial_plain(&path_to(&host.listener), &preamble, PATIENCE).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(matches!(next(&host.events), DestinationEvent::ChannelAttached { .. }));
    stream
}

fn refusal(host: &Host, preamble: &Preamble) -> (RefusalCode, String) {
    match handshake::dial_plain(&path_to(&host.listener), preamble, PATIENCE).unwrap_err() {
        SessionError::Refused { code, text, .. } => (code, text),
        other => panic!("{other}"),
    }
}

fn frame(kind: FrameKind, sequence: u64, runs: &[Run], payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_pages(kind, RoundId(0), sequence, runs, payload.len() as u32, &mut bytes);
    bytes.extend(payload);
    bytes
}

/// A whole round over an honest session still works, and the destination holds nothing else.
fn others_go_on(host: &Host, first_channel: usize) {
    let source = memory(Backing::Memfd);
    let mut seed = 4;
    (100..200).for_each(|page| write_page(&source, page, &mut seed, false));
    let preamble = Preamble::new(Purpose::Data { channel: first_channel as u32 }, MIGRATION, SECRET);
    let mut stream = handshake::dial_plain(&path_to(&host.listener), &preamble, PATIENCE).unwrap();
    let mut pages = Vec::new();
    source.read_run(Run::new(100, 100), &mut pages);
    stream.write_all(&frame(FrameKind::Raw, 1, &[Run::new(100, 100)], &pages)).unwrap();
    stream.write_all(&encode_barrier(BarrierId(1), RoundId(0), 2, &[])).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut receipt = [0; 16];
    stream.read_exact(&mut receipt).unwrap();
    assert_equal(&source, &host.memory);
}

fn violation(host: &Host, id: u32, bytes: &[u8]) -> String {
    let mut stream = channel(host, id);
    stream.write_all(bytes).unwrap();
    let cause = loop {
        match next(&host.events) {
            DestinationEvent::Violation { channel, cause } => {
                assert_eq!(channel, ChannelId(id));
                break cause;
            }
            DestinationEvent::ChannelLost { channel, .. } if channel != ChannelId(id) => {}
            other => panic!("{other:?}"),
        }
    };
    // The peer is told, too, if it still listens.
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let error = match &cause {
        SessionError::ChannelLost { cause, .. } => match &**cause {
            ChannelError::Frame(error) => error.to_string(),
            other => other.to_string(),
        },
        SessionError::Codec(error) => error.to_string(),
        other => other.to_string(),
    };
    if !answer.is_empty() {
        assert!(String::from_utf8_lossy(&answer).contains(&error), "{error}: {answer:?}");
    }
    error
}

#[test]
fn lies_on_a_data_channel_are_named_and_write_nothing() {
    let host = host(memory(Backing::Memfd));
    let page = vec![0xee; 4096];
    let one = Run::new(5, 1);
    let mut lying_length = frame(FrameKind::Raw, 1, &[one], &page);
    lying_length[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut too_many = frame(FrameKind::Raw, 1, &[one], &page);
    too_many[6..8].copy_from_slice(&u16::MAX.to_le_bytes());
    let mut unknown = frame(FrameKind::Raw, 1, &[one], &page);
    unknown[4] = 99;
    let outside = Run::new(8191, 2);
    let over_border = Run::new(2047, 2);
    let cases = [
        (b"GET / HTTP/1.1\r\nHost: pageferry\r\n\r\n".to_vec(), "magic"),
        (lying_length, "payload of 4294967295 bytes"),
        (too_many, "65535 table entries"),
        (unknown, "kind 99"),
        (frame(FrameKind::Raw, 1, &[outside], &page.repeat(2)), "2 pages from page 8191"),
        (frame(FrameKind::Raw, 1, &[over_border], &page.repeat(2)), "2 pages from page 2047"),
        (frame(FrameKind::Zero, 1, &[Run::new(u64::MAX, 1)], &[]), "1 pages from page 18446744073709551615"),
        (frame(FrameKind::Raw, 1, &[one, one], &page.repeat(2)), "overlap"),
        (frame(FrameKind::Raw, 2, &[one], &page), "frame 2 arrived where 1 was due"),
        (frame(FrameKind::Zstd, 1, &[one], b"no zstd frame"), "cannot be taken apart"),
        (encode_barrier(BarrierId(1), RoundId(0), 1, &[ChannelId(11)]), "says of itself"),
    ];
    for (id, (bytes, words)) in cases.into_iter().enumerate() {
        let error = violation(&host, id as u32 + 1, &bytes);
        assert!(error.contains(words), "{error} instead of {words}");
    }
    others_go_on(&host, 90);
    host.session.close();
}

/// A zstd frame that would unpack to more than the pages that it says it is for.
#[test]
fn a_batch_that_swells_writes_nothing() {
    let host = host(memory(Backing::Memfd));
    let mut compressor = crate::codec::Compressor::new().unwrap();
    let bomb = compressor.compress(&vec![0xee; 64 << 20], 1).unwrap().to_vec();
    assert!(bomb.len() < 4096 * 8);
    let error = violation(&host, 1, &frame(FrameKind::Zstd, 1, &[Run::new(0, 8)], &bomb));
    assert!(error.contains("cannot be taken apart"), "{error}");
    others_go_on(&host, 2);
}

#[test]
fn a_peer_that_stops_within_a_frame_is_lost_and_its_pages_can_be_placed_by_another() {
    let host = host(memory(Backing::Memfd));
    let whole = frame(FrameKind::Raw, 1, &[Run::new(100, 100)], &vec![1; 100 * 4096]);
    for (id, length) in [(1, 7), (2, HEADER_BYTES + 3), (3, whole.len() - 5000)] {
        let mut stalling = channel(&host, id);
        stalling.write_all(&whole[..length]).unwrap();
        let DestinationEvent::ChannelLost { cause: SessionError::ChannelLost { cause, .. }, .. } =
            next(&host.events)
        else {
            panic!("a lost channel")
        };
        assert!(matches!(*cause, ChannelError::Stalled { seconds: 2, .. }), "{cause}");
        let mut closing = channel(&host, id + 10);
        closing.write_all(&whole[..length]).unwrap();
        drop(closing);
        let DestinationEvent::ChannelLost { cause: SessionError::ChannelLost { cause, .. }, .. } =
            next(&host.events)
        else {
            panic!("a lost channel")
        };
        assert!(matches!(*cause, ChannelError::CutShort { .. }), "{cause}");
    }
    others_go_on(&host, 90);
}

/// Pages that a lost channel wrote in part must not count as untouched when zeros are placed over them.
#[test]
fn zeros_over_a_page_that_was_written_in_part_are_written() {
    let host = host(memory(Backing::Memfd));
    let mut broken = channel(&host, 1);
    let whole = frame(FrameKind::Raw, 1, &[Run::new(100, 100)], &vec![1; 100 * 4096]);
    broken.write_all(&whole[..whole.len() - 100]).unwrap();
    drop(broken);
    assert!(matches!(next(&host.events), DestinationEvent::ChannelLost { .. }));
    assert!(!host.memory.is_zero_page(PageIndex(100)));
    let mut good = channel(&host, 2);
    good.write_all(&frame(FrameKind::Zero, 1, &[Run::new(90, 120)], &[])).unwrap();
    good.write_all(&encode_barrier(BarrierId(1), RoundId(0), 2, &[ChannelId(1)])).unwrap();
    good.read_exact(&mut [0; 16]).unwrap();
    assert!((0..8192).all(|page| host.memory.is_zero_page(PageIndex(page))));
}

#[test]
fn a_barrier_closes_the_channels_that_it_names_for_good() {
    let host = host(memory(Backing::Memfd));
    let mut stale = channel(&host, 1);
    let mut good = channel(&host, 2);
    let whole = frame(FrameKind::Raw, 1, &[Run::new(0, 100)], &vec![1; 100 * 4096]);
    stale.write_all(&whole[..100]).unwrap();
    good.write_all(&encode_barrier(BarrierId(5), RoundId(0), 1, &[ChannelId(1), ChannelId(77)])).unwrap();
    let mut receipt = [0; 16];
    good.read_exact(&mut receipt).unwrap();
    assert_eq!((receipt[4], receipt[8]), (2, 5));
    // What still arrives of the stale channel goes nowhere.
    let _ = stale.write_all(&whole[100..]);
    assert!(matches!(next(&host.events), DestinationEvent::ChannelLost { channel: ChannelId(1), .. }));
    host.session.close();
    assert!(host.memory.is_zero_page(PageIndex(99)));

    let preamble = |channel| Preamble::new(Purpose::Data { channel }, MIGRATION, SECRET);
    let path = path_to(&host.listener);
    let error = handshake::dial_plain(&path, &preamble(77), PATIENCE).unwrap_err();
    assert!(matches!(error, SessionError::Refused { code: RefusalCode::NotNow, .. }), "{error}");
}

/// Two channels whose barriers each name the other: neither may wait for the other for ever.
#[test]
fn channels_that_fence_each_other_do_not_hang() {
    let host = host(memory(Backing::Memfd));
    for pair in 0..20 {
        let (one, other) = (pair * 2 + 1, pair * 2 + 2);
        let (mut a, mut b) = (channel(&host, one), channel(&host, other));
        let _ = a.write_all(&encode_barrier(BarrierId(1), RoundId(0), 1, &[ChannelId(other)]));
        let _ = b.write_all(&encode_barrier(BarrierId(1), RoundId(0), 1, &[ChannelId(one)]));
        drop((a, b));
        for _ in 0..2 {
            assert!(matches!(next(&host.events), DestinationEvent::ChannelLost { .. }));
        }
    }
    host.session.close();
}

#[test]
fn whoever_has_not_the_secret_is_refused_and_counted() {
    let host = host(memory(Backing::Memfd));
    let data = Purpose::Data { channel: 1 };
    let resume = Purpose::ResumeControl { attempt: 1, received: 0 };
    for purpose in [data, resume] {
        let mut wrong = SECRET;
        wrong.0[31] ^= 1;
        for secret in [wrong, Secret::NONE] {
            let (code, _) = refusal(&host, &Preamble::new(purpose, MIGRATION, secret));
            assert_eq!(code, RefusalCode::WrongSecret);
        }
        let (code, _) = refusal(&host, &Preamble::new(purpose, MigrationId([8; 16]), SECRET));
        assert_eq!(code, RefusalCode::UnknownMigration);
    }
    assert_eq!(host.listener.stats().refused, 6);
    others_go_on(&host, 1);
    let (code, text) = refusal(&host, &Preamble::new(data, MIGRATION, SECRET));
    assert_eq!(code, RefusalCode::NotNow);
    assert!(text.contains("of this number"), "{text}");
}

#[test]
fn another_version_is_refused_in_words_that_name_both() {
    let host = host(memory(Backing::Memfd));
    let mut newer = Preamble::new(Purpose::NewMigration, MIGRATION, Secret::NONE);
    newer.versions = Versions { oldest: 3, newest: 4 };
    let (code, text) = refusal(&host, &newer);
    assert_eq!(code, RefusalCode::Version);
    assert!(text.contains("version 3 to 4") && text.contains("speaks 1"), "{text}");
}

#[test]
fn something_else_that_listens_is_named() {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let path = Path::to(socket.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        let (mut stream, _) = socket.accept().unwrap();
        stream.read_exact(&mut [0; PREAMBLE_BYTES]).unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
    });
    let (sender, _events) = unbounded();
    let error = ControlLink::dial(&[path], MIGRATION, &Opening::default(), ControlOptions::default(), sender)
        .unwrap_err();
    server.join().unwrap();
    let SessionError::Preamble { cause: PreambleError::Magic(magic), .. } = error else { panic!("{error}") };
    assert_eq!(&magic, b"HTTP/1.1");
}

/// More silent connections than may wait, and garbage, while an honest peer comes and goes.
#[test]
fn garbage_and_silence_do_not_block_others() {
    let host = host(memory(Backing::Memfd));
    let silent: Vec<TcpStream> = (0..100).map(|_| connect(&host.listener)).collect();
    for _ in 0..20 {
        let mut garbage = connect(&host.listener);
        garbage.write_all(&[0xaa; 5000]).unwrap();
    }
    let mut trickling = connect(&host.listener);
    trickling.write_all(b"PGF").unwrap();
    others_go_on(&host, 1);
    drop((silent, trickling));
}

#[test]
fn garbage_is_answered_with_a_refusal() {
    let host = host(memory(Backing::Memfd));
    let mut garbage = connect(&host.listener);
    garbage.write_all(&[b'A'; PREAMBLE_BYTES]).unwrap();
    let mut answer = Vec::new();
    garbage.read_to_end(&mut answer).unwrap();
    assert!(String::from_utf8_lossy(&answer).contains("its first bytes are AAAAAAAA"));
    assert_eq!(host.listener.stats().refused, 1);
}

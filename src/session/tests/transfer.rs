//! Memory that moves, in rounds, with and without losses.

use super::*;
use crate::session::caps::RateCaps;
use crate::wire::data::ChannelId;

/// Three rounds over `channels`: everything touched, scattered changes with zeroed pages among them, nothing.
fn move_memory(backing: Backing, channels: usize, mode: TransferMode, compressible: bool) -> SessionStats {
    let source = memory(backing);
    let host = host(memory(backing));
    let mut seed = 1 + channels as u64;
    let mut first = set(&source, &[Run::new(10, 1000), Run::new(1900, 300), Run::new(4000, 3000)]);
    for page in first.clone().runs().flat_map(|run| run.start.0..run.end()) {
        if !page.is_multiple_of(7) {
            write_page(&source, page, &mut seed, compressible);
        }
    }
    first.insert(PageIndex(8191));

    let (sender, events) = unbounded();
    let session = SourceSession::open(options(&source, &host, channels, mode), sender).unwrap();
    session.place(RoundId(0), first.clone());
    let (round, stats) = placed(&events);
    assert_eq!((round, stats.pages), (RoundId(0), first.len()));
    let zeros = first.runs().flat_map(|run| run.start.0..run.end()).filter(|page| page.is_multiple_of(7));
    assert_eq!(stats.zero_pages, zeros.count() as u64 + 1);
    assert_eq!(stats.payload_bytes, (stats.pages - stats.zero_pages) * PAGE_SIZE);
    assert_equal(&source, &host.memory);

    let mut second = PageSet::empty(8192);
    for _ in 0..700 {
        let page = random(&mut seed) % 8192;
        second.insert(PageIndex(page));
        if page.is_multiple_of(3) {
            source.zero_run(Run::new(page, 1));
        } else {
            write_page(&source, page, &mut seed, compressible);
        }
    }
    session.place(RoundId(1), second.clone());
    assert_eq!(placed(&events).1.pages, second.len());
    assert_equal(&source, &host.memory);

    session.place(RoundId(2), PageSet::empty(8192));
    assert_eq!(
        placed(&events),
        (RoundId(2), RoundStats { wire_bytes: 32 * channels as u64, ..RoundStats::default() })
    );

    let stats = session.stats();
    assert_eq!((stats.remaining_pages, stats.placed_pages), (0, first.len() + second.len()));
    assert_eq!(stats.channels.len(), channels);
    assert!(stats.channels.iter().all(|channel| channel.alive && channel.interface.as_deref() == Some("lo")));
    assert_eq!(stats.channels.iter().map(|channel| channel.bytes).sum::<u64>(), stats.wire_bytes);
    let theirs = host.session.stats();
    assert_eq!(theirs.wire_bytes, stats.wire_bytes);
    assert_eq!(theirs.placed_pages + theirs.zero_pages, stats.placed_pages);
    session.close();
    host.session.close();
    assert!(events.try_recv().is_err(), "closing tells nothing");
    stats
}

#[test]
fn memory_arrives_over_one_to_four_channels() {
    for (channels, backing) in
        [(1, Backing::Anonymous), (2, Backing::Memfd), (3, Backing::Anonymous), (4, Backing::Memfd)]
    {
        move_memory(backing, channels, TransferMode::Tcp, false);
    }
}

#[test]
fn memory_arrives_compressed() {
    for (channels, compressible) in [(1, true), (3, false), (3, true)] {
        move_memory(Backing::Memfd, channels, TransferMode::Compression, compressible);
    }
}

/// A cap makes the wire slow, so that compression pays.
#[test]
fn a_slow_wire_gets_compressed_pages() {
    let source = memory(Backing::Anonymous);
    let host = host(memory(Backing::Memfd));
    let mut seed = 5;
    (0..6000).for_each(|page| write_page(&source, page, &mut seed, true));
    let (sender, events) = unbounded();
    let mut slow = options(&source, &host, 1, TransferMode::Compression);
    slow.rate_caps = RateCaps::new(Some(8 << 20));
    let session = SourceSession::open(slow, sender).unwrap();
    session.place(RoundId(0), set(&source, &[Run::new(0, 6000)]));
    let (_, stats) = placed(&events);
    assert_equal(&source, &host.memory);
    assert!(stats.wire_bytes < stats.payload_bytes * 8 / 10, "{stats:?}");
}

/// What Linux leaves of its initial RAM disk. Over any wire, since it takes no compressor.
#[test]
fn pages_that_repeat_a_byte_take_next_to_nothing() {
    let source = memory(Backing::Memfd);
    let host = host(memory(Backing::Memfd));
    let mut seed = 6;
    for page in 0..2048 {
        match page % 5 {
            0 => write_page(&source, page, &mut seed, false),
            1 => source.write_run(Run::new(page, 1), &[0xff; PAGE_SIZE as usize]),
            2 | 3 => source.write_run(Run::new(page, 1), &[0xcc; PAGE_SIZE as usize]),
            _ => {}
        }
    }
    let (sender, events) = unbounded();
    let compressing = options(&source, &host, 2, TransferMode::Compression);
    let session = SourceSession::open(compressing, sender).unwrap();
    session.place(RoundId(0), set(&source, &[Run::new(0, 2048)]));
    let (_, stats) = placed(&events);
    assert_equal(&source, &host.memory);
    assert_eq!(stats.zero_pages, 409);
    assert!(stats.wire_bytes < 410 * PAGE_SIZE + 2048 * 20, "{stats:?}");
}

#[test]
fn a_rate_cap_is_kept() {
    let source = memory(Backing::Memfd);
    let host = host(memory(Backing::Memfd));
    let mut seed = 5;
    (0..2048).for_each(|page| write_page(&source, page, &mut seed, false));
    let (sender, events) = unbounded();
    let mut slow = options(&source, &host, 3, TransferMode::Tcp);
    slow.rate_caps = RateCaps::new(Some(16 << 20));
    let session = SourceSession::open(slow, sender).unwrap();
    let begin = std::time::Instant::now();
    session.place(RoundId(0), set(&source, &[Run::new(0, 2048)]));
    placed(&events);
    // 8 MiB at 16 MiB/s are 500 ms; the last batch of each channel is not waited for.
    assert!(begin.elapsed() > Duration::from_millis(250), "{:?}", begin.elapsed());
    assert_equal(&source, &host.memory);
}

#[test]
fn a_channel_cut_within_a_round_leaves_its_pages_to_the_others() {
    for mode in [TransferMode::Tcp, TransferMode::Compression] {
        let source = memory(Backing::Memfd);
        let host = host(memory(Backing::Anonymous));
        let mut seed = 3;
        (0..8192).for_each(|page| write_page(&source, page, &mut seed, true));
        let (sender, events) = unbounded();
        let mut cutting = options(&source, &host, 3, mode);
        cutting.cut = Some((1, 1 << 20));
        // Slow enough that every channel gets something before the round is over.
        cutting.rate_caps = RateCaps::new(Some(100 << 20));
        let session = SourceSession::open(cutting, sender).unwrap();
        session.place(RoundId(0), PageSet::full(8192));
        match next(&events) {
            SessionEvent::ChannelLost {
                channel: ChannelId(1),
                cause: SessionError::ChannelLost { .. },
                ..
            } => {}
            other => panic!("{other:?}"),
        }
        assert_eq!(placed(&events).0, RoundId(0));
        assert_equal(&source, &host.memory);
        let alive: Vec<bool> = session.stats().channels.iter().map(|channel| channel.alive).collect();
        assert_eq!(alive, [true, false, true]);

        let added = session.add_channel(path_to(&host.listener)).unwrap();
        assert_eq!(added, ChannelId(3));
        (0..8192).step_by(5).for_each(|page| write_page(&source, page, &mut seed, true));
        session.place(RoundId(1), PageSet::full(8192));
        placed(&events);
        assert_equal(&source, &host.memory);
        assert!(session.stats().channels[3].bytes > 0);
    }
}

#[test]
fn with_the_last_channel_the_round_fails_and_says_what_is_owed() {
    let source = memory(Backing::Memfd);
    let host = host(memory(Backing::Memfd));
    let mut seed = 3;
    (0..8192).for_each(|page| write_page(&source, page, &mut seed, false));
    let (sender, events) = unbounded();
    let mut cutting = options(&source, &host, 1, TransferMode::Tcp);
    cutting.cut = Some((0, 10 << 20));
    let session = SourceSession::open(cutting, sender).unwrap();
    session.place(RoundId(0), PageSet::full(8192));
    assert!(matches!(next(&events), SessionEvent::ChannelLost { .. }));
    let SessionEvent::Failed { cause, owed } = next(&events) else { panic!("a failed round") };
    assert!(matches!(cause, SessionError::AllChannelsLost { last: Some(_) }), "{cause}");
    let stats = session.stats();
    assert_eq!(owed.len(), 8192 - stats.placed_pages);
    assert!(owed.len() >= 8192 - (10 << 20) / PAGE_SIZE - 256, "{} pages owed", owed.len());
    // What is not owed is there.
    let (mut a, mut b) = (vec![0; 4096], vec![0; 4096]);
    for page in (0..8192).map(PageIndex).filter(|page| !owed.contains(*page)) {
        source.read_page(page, &mut a);
        host.memory.read_page(page, &mut b);
        assert!(a == b, "page {} was confirmed and differs", page.0);
    }
    // Another channel takes it up again.
    session.add_channel(path_to(&host.listener)).unwrap();
    session.place(RoundId(1), owed);
    placed(&events);
    assert_equal(&source, &host.memory);
}

#[test]
fn without_channels_a_round_fails_at_once() {
    let source = memory(Backing::Memfd);
    let host = host(memory(Backing::Memfd));
    let (sender, events) = unbounded();
    let mut cutting = options(&source, &host, 2, TransferMode::Tcp);
    cutting.cut = Some((0, 0));
    let session = SourceSession::open(cutting, sender).unwrap();
    session.place(RoundId(0), PageSet::empty(8192));
    placed(&events);
    host.session.close();
    let lost = || matches!(next(&events), SessionEvent::ChannelLost { .. });
    assert!(lost());
    session.place(RoundId(1), set(&source, &[Run::new(3, 4)]));
    let owed = std::iter::repeat_with(|| next(&events)).take(3).find_map(|event| match event {
        SessionEvent::Failed { owed, .. } => Some(owed),
        _ => None,
    });
    assert_eq!(owed, Some(set(&source, &[Run::new(3, 4)])));
}

#[test]
fn an_aborted_round_is_owed_and_ends_the_session() {
    let source = memory(Backing::Memfd);
    let host = host(memory(Backing::Memfd));
    let mut seed = 3;
    (0..8192).for_each(|page| write_page(&source, page, &mut seed, false));
    let (sender, events) = unbounded();
    let mut slow = options(&source, &host, 2, TransferMode::Tcp);
    slow.rate_caps = RateCaps::new(Some(4 << 20));
    let session = SourceSession::open(slow, sender).unwrap();
    session.place(RoundId(0), PageSet::full(8192));
    std::thread::sleep(Duration::from_millis(100));
    let owed = session.abort();
    assert_eq!(owed.len(), 8192 - session.stats().placed_pages);
    assert!(owed.len() > 4096);
    session.place(RoundId(1), owed.clone());
    let SessionEvent::Failed { cause: SessionError::Ended, owed: again } = next(&events) else {
        panic!("a session that was ended")
    };
    assert_eq!(owed, again);
    assert!(matches!(session.add_channel(path_to(&host.listener)), Err(SessionError::Ended)));
}

#[test]
fn paths_that_do_not_open_are_told_and_the_others_are_used() {
    let source = memory(Backing::Memfd);
    let host = host(memory(Backing::Memfd));
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let dead = Path::to(nobody);
    let (sender, events) = unbounded();
    let mut mixed = options(&source, &host, 2, TransferMode::Tcp);
    mixed.paths.push(dead);
    let session = SourceSession::open(mixed.clone(), sender.clone()).unwrap();
    match next(&events) {
        SessionEvent::ChannelLost { path, cause, .. } => {
            assert_eq!(path, dead);
            assert!(cause.to_string().contains(&nobody.to_string()), "{cause}");
        }
        other => panic!("{other:?}"),
    }
    session.close();
    mixed.paths = vec![dead];
    let error = SourceSession::open(mixed, sender).unwrap_err();
    assert!(matches!(error, SessionError::NoChannel { tried: 2, .. }), "{error}");
}

/// A guest that writes while it is sent: every page that the tracker would tell is sent again, and the end is equal.
#[test]
fn pages_that_change_while_they_are_sent_are_right_after_the_next_round() {
    let source = memory(Backing::Memfd);
    let host = host(memory(Backing::Memfd));
    let mut seed = 9;
    (0..8192).for_each(|page| write_page(&source, page, &mut seed, true));
    let (sender, events) = unbounded();
    let session = SourceSession::open(options(&source, &host, 2, TransferMode::Compression), sender).unwrap();
    let mut pages = PageSet::full(8192);
    for round in 0..6 {
        session.place(RoundId(round), pages);
        pages = PageSet::empty(8192);
        if round < 5 {
            for _ in 0..300 {
                let page = random(&mut seed) % 8192;
                pages.insert(PageIndex(page));
                write_page(&source, page, &mut seed, true);
            }
        }
        placed(&events);
    }
    assert_equal(&source, &host.memory);
}

/// What a kernel that refuses to reference the memory gets.
#[test]
fn copied_pages_arrive_as_well() {
    use crate::channel::tcp::{self, TcpOptions};
    use crate::wire::data::{BarrierId, Receipt};
    use crate::wire::preamble::{Preamble, Purpose};

    let source = memory(Backing::Anonymous);
    let host = host(memory(Backing::Memfd));
    let mut seed = 8;
    (0..8192).for_each(|page| write_page(&source, page, &mut seed, false));
    let preamble = Preamble::new(Purpose::Data { channel: 0 }, MIGRATION, SECRET);
    let stream = handshake::dial_plain(&path_to(&host.listener), &preamble, PATIENCE).unwrap();
    let copying = TcpOptions { zero_copy: false, ..TcpOptions::default() };
    let mut open = tcp::open(stream, source.clone(), copying).unwrap();
    for run in (0..8192).step_by(1024).map(|start| Run::new(start, 1024)) {
        let runs: Vec<Run> = source.layout().pieces(run).map(|(_, piece)| piece).collect();
        open.source.push_pages(RoundId(0), &runs).unwrap();
    }
    open.source.push_barrier(BarrierId(1), RoundId(0), &[]).unwrap();
    while open.receipts.next().unwrap() != Receipt::Barrier(BarrierId(1)) {}
    assert_equal(&source, &host.memory);
}

use super::*;
use crate::layout::RamRegion;
use crate::units::GuestAddress;
use proptest::prelude::*;

/// Two regions of 300 and 5000 pages.
fn layout() -> RamLayout {
    let region = |start, pages| RamRegion { start: GuestAddress(start), bytes: pages * PAGE_SIZE };
    RamLayout::new(vec![region(0, 300), region(1 << 32, 5000)]).unwrap()
}

/// Runs as a session cuts them: rising, apart or adjacent, each in one region.
fn runs() -> impl Strategy<Value = Vec<Run>> {
    prop::collection::vec((0..6u64, 1..9u64), 1..40).prop_map(|steps| {
        let (layout, mut at) = (layout(), 0);
        let mut runs = Vec::new();
        for (gap, pages) in steps {
            let run = Run::new(at + gap, pages);
            at = run.end();
            runs.extend(layout.pieces(run).map(|(_, piece)| piece));
        }
        runs
    })
}

fn decode(bytes: &[u8]) -> Option<Result<(Header, Vec<Run>), FrameError>> {
    let (header, rest) = bytes.split_first_chunk()?;
    let header = match Header::decode(header) {
        Ok(header) => header,
        Err(error) => return Some(Err(error)),
    };
    let table = rest.get(..header.table_bytes())?;
    if matches!(header.kind, FrameKind::Barrier(_)) {
        let _ = header.decode_fenced(table);
        return Some(Ok((header, Vec::new())));
    }
    let mut runs = Vec::new();
    Some(header.decode_runs(table, &layout(), &mut runs).map(|_| (header, runs)))
}

fn frame(kind: FrameKind, runs: &[Run], payload_bytes: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_pages(kind, RoundId(3), 9, runs, payload_bytes, &mut bytes);
    bytes
}

fn error_of(bytes: &[u8]) -> FrameError {
    decode(bytes).expect("a whole frame").expect_err("a wrong frame")
}

proptest! {
    #[test]
    fn frames_survive_and_damage_is_an_error_or_a_valid_frame(
        runs in runs(), kind in 0..3, share in 1..=100u64, bit in any::<prop::sample::Index>(),
    ) {
        let pages: u64 = runs.iter().map(|run| run.pages).sum();
        let (kind, payload) = match kind {
            0 => (FrameKind::Raw, pages * PAGE_SIZE),
            1 => (FrameKind::Zstd, pages * PAGE_SIZE * share / 100),
            _ => (FrameKind::Zero, 0),
        };
        let bytes = frame(kind, &runs, payload as u32);
        let (header, decoded) = decode(&bytes).unwrap().unwrap();
        prop_assert_eq!((header.kind, header.round, header.sequence), (kind, RoundId(3), 9));
        prop_assert_eq!(&decoded, &runs);
        for length in 0..bytes.len() {
            prop_assert_eq!(decode(&bytes[..length]), None);
        }
        let (mut flipped, bit) = (bytes.clone(), bit.index(bytes.len() * 8));
        flipped[bit / 8] ^= 1 << (bit % 8);
        if let Some(Ok((_, decoded))) = decode(&flipped) {
            prop_assert!(decoded.iter().all(|run| layout().contains(*run)));
            prop_assert!(decoded.windows(2).all(|pair| pair[0].end() <= pair[1].start.0));
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), magic in any::<bool>()) {
        let mut bytes = bytes;
        if magic && bytes.len() >= 4 {
            bytes[..4].copy_from_slice(&FRAME_MAGIC);
        }
        let _ = decode(&bytes);
        if let Some((header, rest)) = bytes.split_first_chunk()
            && let Ok(header) = ReceiptHeader::decode(header)
            && let Some(text) = rest.get(..header.text_bytes())
        {
            let _ = header.with_text(text);
        }
    }

    #[test]
    fn barriers_survive(id in any::<u64>(), fenced in prop::collection::vec(any::<u32>(), 0..50)) {
        let fenced: Vec<_> = fenced.into_iter().map(ChannelId).collect();
        let bytes = encode_barrier(BarrierId(id), RoundId(1), 2, &fenced);
        let (header, table) = bytes.split_first_chunk().unwrap();
        let header = Header::decode(header).unwrap();
        prop_assert_eq!(header.kind, FrameKind::Barrier(BarrierId(id)));
        prop_assert_eq!(header.decode_fenced(table), fenced);
    }

    #[test]
    fn receipts_survive(number in any::<u64>(), text in "[ -~äö]{0,200}", kind in 0..3) {
        let sent = match kind {
            0 => Receipt::Placed(number),
            1 => Receipt::Barrier(BarrierId(number)),
            _ => Receipt::Error(text),
        };
        let bytes = sent.encode();
        let (header, text) = bytes.split_first_chunk().unwrap();
        let header = ReceiptHeader::decode(header).unwrap();
        prop_assert_eq!(header.text_bytes(), text.len());
        prop_assert_eq!(header.with_text(text), sent);
    }
}

#[test]
fn lies_are_named() {
    let one = [Run::new(0, 1)];
    let page = PAGE_SIZE as u32;
    let outside = FrameError::Run { start: 5299, pages: 2 };
    assert_eq!(error_of(&frame(FrameKind::Raw, &[Run::new(5299, 2)], 2 * page)), outside);
    let wrapping = FrameError::Run { start: u64::MAX, pages: 2 };
    assert_eq!(error_of(&frame(FrameKind::Zero, &[Run::new(u64::MAX, 2)], 0)), wrapping);
    let crossing = FrameError::Run { start: 299, pages: 2 };
    assert_eq!(error_of(&frame(FrameKind::Raw, &[Run::new(299, 2)], 2 * page)), crossing);
    let empty = FrameError::Run { start: 4, pages: 0 };
    assert_eq!(error_of(&frame(FrameKind::Zero, &[Run::new(4, 0)], 0)), empty);
    let disorder = [Run::new(4, 2), Run::new(5, 1)];
    assert_eq!(error_of(&frame(FrameKind::Zero, &disorder, 0)), FrameError::Order(5));
    let short = FrameError::Payload { got: page - 1, limit: PAGE_SIZE };
    assert_eq!(error_of(&frame(FrameKind::Raw, &one, page - 1)), short);
    let swollen = FrameError::Payload { got: page + 1, limit: PAGE_SIZE };
    assert_eq!(error_of(&frame(FrameKind::Zstd, &one, page + 1)), swollen);
    assert!(matches!(error_of(&frame(FrameKind::Zstd, &one, 0)), FrameError::Payload { got: 0, .. }));
    assert!(matches!(error_of(&frame(FrameKind::Raw, &one, u32::MAX)), FrameError::Payload { .. }));
    assert!(matches!(error_of(&frame(FrameKind::Zero, &one, page)), FrameError::Payload { limit: 0, .. }));
    let batch = [Run::new(300, MAX_BATCH_PAGES + 1)];
    assert_eq!(error_of(&frame(FrameKind::Zstd, &batch, page)), FrameError::Pages(1025));
    let mut many = frame(FrameKind::Zero, &one, 0);
    many[6..8].copy_from_slice(&1025u16.to_le_bytes());
    assert_eq!(error_of(&many), FrameError::Entries(1025));
    many[6..8].copy_from_slice(&0u16.to_le_bytes());
    assert_eq!(error_of(&many), FrameError::Entries(0));
}

#[test]
fn zero_runs_may_be_as_long_as_a_region() {
    let runs = [Run::new(0, 300), Run::new(300, 5000)];
    assert_eq!(decode(&frame(FrameKind::Zero, &runs, 0)).unwrap().unwrap().1, runs);
}

//! Every decoder of the network's bytes, and of what a hypervisor sends, with what must hold of its answer. The fuzz targets and the test
//! `tests/fuzz_corpus.rs` run the same functions; each takes any bytes and panics only where the decoder is wrong.

use pageferry::guest::qemu::multifd::{
    self, Head, INIT_BYTES, Init, MAX_PAGES, MAX_PAYLOAD_BYTES, MAX_STATE_BYTES, PACKET_BYTES, PagesPacket,
};
use pageferry::layout::{RamLayout, RamRegion};
use pageferry::units::GuestAddress;
use pageferry::wire::control::Message;
use pageferry::wire::data::{
    FrameKind, HEADER_BYTES, Header, MAX_BATCH_PAGES, MAX_ERROR_BYTES, MAX_TABLE_BYTES, RECEIPT_BYTES,
    Receipt, ReceiptHeader, encode_barrier, encode_pages,
};
use pageferry::wire::link::LinkHeader;
use pageferry::wire::preamble::{Answer, MAX_REFUSAL_BYTES, Preamble, Reply, ReplyHeader};
use pageferry::wire::rdma::{
    self, AnswerHeader, FromDestination, FromDestinationHeader, MAX_PIECES, OfferHeader, Want,
};
use pageferry::wire::relay::RelayMessage;

/// Looks at bytes from the network.
pub(crate) type Decoder = fn(&[u8]);

/// Name and function of each.
pub(crate) const DECODERS: [(&str, Decoder); 10] = [
    ("preamble", preamble),
    ("reply", reply),
    ("frame", frame),
    ("receipt", receipt),
    ("link", link),
    ("control", control),
    ("rdma_opening", rdma_opening),
    ("rdma_talk", rdma_talk),
    ("relay", relay),
    ("multifd", multifd),
];

/// What a frame's runs are checked against: two regions with a hole between them, like a machine's.
pub(crate) fn layout() -> RamLayout {
    let region = |start, bytes| RamRegion { start: GuestAddress(start), bytes };
    RamLayout::new(vec![region(0, 640 << 10), region(1 << 20, 64 << 20)]).expect("a machine's layout")
}

/// The first bytes of a connection: what is accepted is the encoding of what was understood.
pub(crate) fn preamble(bytes: &[u8]) {
    let Some((head, _)) = bytes.split_first_chunk() else { return };
    if let Ok(preamble) = Preamble::decode(head) {
        assert_eq!(preamble.encode(), *head);
    }
}

/// The answer to them: its text is bounded and cannot steer a terminal.
pub(crate) fn reply(bytes: &[u8]) {
    let Some((head, rest)) = bytes.split_first_chunk() else { return };
    let Ok(header) = ReplyHeader::decode(head) else { return };
    assert!(header.text_bytes() <= MAX_REFUSAL_BYTES);
    let Some(text) = rest.get(..header.text_bytes()) else { return };
    if let Ok(Reply { answer: Answer::Refused { text, .. }, .. }) = header.with_text(text) {
        assert!(!text.chars().any(char::is_control));
    }
}

/// A data frame up to its payload: its runs lie in the guest's memory and need no larger payload than is allowed.
pub(crate) fn frame(bytes: &[u8]) {
    let Some((head, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else { return };
    let Ok(header) = Header::decode(head) else { return };
    assert_eq!(header.encode(), *head);
    assert!(header.table_bytes() <= MAX_TABLE_BYTES);
    let Some(table) = rest.get(..header.table_bytes()) else { return };
    if let FrameKind::Barrier(barrier) = header.kind {
        let fenced = header.decode_fenced(table);
        let again = encode_barrier(barrier, header.round, header.sequence, &fenced);
        assert_eq!(again, bytes[..again.len()]);
        return;
    }
    if header.kind == FrameKind::Written {
        let payload = u64::from(header.payload_bytes);
        assert!(table.is_empty() && payload.is_multiple_of(4096) && payload <= MAX_BATCH_PAGES * 4096);
        return;
    }
    let (layout, mut runs) = (layout(), Vec::new());
    let Ok(pages) = header.decode_runs(table, &layout, &mut runs) else { return };
    assert_eq!(runs.iter().map(|run| run.pages).sum::<u64>(), pages);
    assert!(header.kind == FrameKind::Zero || pages <= MAX_BATCH_PAGES);
    assert!(pages <= layout.total_pages() && runs.iter().all(|&run| layout.contains(run)));
    let mut again = Vec::new();
    encode_pages(header.kind, header.round, header.sequence, &runs, header.payload_bytes, &mut again);
    assert_eq!(again, bytes[..again.len()]);
}

/// What comes back on a data channel.
pub(crate) fn receipt(bytes: &[u8]) {
    let Some((head, rest)) = bytes.split_first_chunk::<RECEIPT_BYTES>() else { return };
    let Ok(header) = ReceiptHeader::decode(head) else { return };
    assert!(header.text_bytes() <= MAX_ERROR_BYTES);
    let Some(text) = rest.get(..header.text_bytes()) else { return };
    match header.with_text(text) {
        Receipt::Error(text) => assert!(!text.chars().any(char::is_control)),
        placed => assert_eq!(placed.encode(), head),
    }
}

/// The header of a control link's frame.
pub(crate) fn link(bytes: &[u8]) {
    let Some((head, _)) = bytes.split_first_chunk() else { return };
    if let Ok(header) = LinkHeader::decode(head) {
        assert_eq!(header.encode(), *head);
    }
}

/// A control message: what was understood survives being sent on.
pub(crate) fn control(bytes: &[u8]) {
    if let Ok(message) = Message::decode(bytes) {
        assert_eq!(Message::decode(&message.encode()), Ok(message));
    }
}

/// What both ends of an RDMA channel begin with: lengths are bounded, and what was understood survives being sent on.
pub(crate) fn rdma_opening(bytes: &[u8]) {
    if let Some((head, rest)) = bytes.split_first_chunk()
        && let Ok(header) = OfferHeader::decode(head)
    {
        assert!(header.map_bytes() <= MAX_PIECES as usize / 8);
        if let Some(map) = rest.get(..header.map_bytes()) {
            let again = header.with_map(map.to_vec()).encode();
            assert_eq!(again, bytes[..again.len()]);
        }
    }
    let Some((head, rest)) = bytes.split_first_chunk() else { return };
    let Ok(header) = AnswerHeader::decode(head) else { return };
    assert!(header.text_bytes() <= MAX_ERROR_BYTES);
    let Some(text) = rest.get(..header.text_bytes()) else { return };
    match header.with_text(text) {
        rdma::Answer::Refused(text) => assert!(!text.chars().any(char::is_control)),
        taken @ rdma::Answer::Taken { .. } => assert_eq!(taken.encode(), head),
    }
}

/// What they say then: pieces that there are, and texts that are bounded.
pub(crate) fn rdma_talk(bytes: &[u8]) {
    const PIECES: u32 = 40;
    if let Some((head, _)) = bytes.split_first_chunk()
        && let Ok(want) = Want::decode(head, PIECES)
    {
        assert!(want.0 < PIECES && want.encode() == *head);
    }
    let Some((head, rest)) = bytes.split_first_chunk::<RECEIPT_BYTES>() else { return };
    let Ok(header) = FromDestinationHeader::decode(head, PIECES) else { return };
    assert!(header.rest_bytes() <= MAX_ERROR_BYTES);
    let Some(rest) = rest.get(..header.rest_bytes()) else { return };
    match header.with_rest(rest) {
        FromDestination::Key { piece, .. } => assert!(piece < PIECES),
        FromDestination::NoKey { piece, text } => {
            assert!(piece < PIECES && !text.chars().any(char::is_control));
        }
        FromDestination::Receipt(_) => {}
    }
}

/// A relay's message: what was understood survives being sent on.
pub(crate) fn relay(bytes: &[u8]) {
    if let Ok(message) = RelayMessage::decode(bytes) {
        assert_eq!(RelayMessage::decode(&message.encode()), Ok(message));
    }
}

/// What QEMU sends on a multifd channel: no packet has more pages, or is longer, than there is room for; an emptied one has none.
pub(crate) fn multifd(bytes: &[u8]) {
    if let Some((init, _)) = bytes.split_first_chunk::<INIT_BYTES>() {
        let _ = Init::decode(init);
    }
    let Some(Ok(head)) = bytes.first_chunk().map(Head::decode) else { return };
    if head == Head::DeviceState {
        let state = bytes.first_chunk().map(multifd::state_bytes);
        assert!(state.is_none_or(|state| !state.is_ok_and(|bytes| bytes > MAX_STATE_BYTES)));
        return;
    }
    let Some(header) = bytes.first_chunk::<PACKET_BYTES>() else { return };
    let Ok(packet) = PagesPacket::decode(header) else { return };
    assert!(
        packet.normal.len() + packet.zero.len() <= MAX_PAGES && packet.payload_bytes() <= MAX_PAYLOAD_BYTES
    );
    let layout = layout();
    for offsets in [&packet.normal, &packet.zero] {
        if let Some(runs) = multifd::runs_at(offsets, 0, layout.total_pages()) {
            assert!(runs.iter().all(|run| layout.contains(*run)));
            assert_eq!(runs.iter().map(|run| run.pages).sum::<u64>(), offsets.len() as u64);
        }
    }
    let mut emptied = *header;
    multifd::empty(&mut emptied);
    let emptied = PagesPacket::decode(&emptied).expect("a packet without pages");
    assert!(emptied.sync == packet.sync && emptied.normal.is_empty() && emptied.zero.is_empty());
}

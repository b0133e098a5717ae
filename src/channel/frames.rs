//! What channels over a stream of bytes share: frames and receipts as they come in, whatever the stream is.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{Arrival, Arrived, ChannelError, ChannelReceipts};
use crate::memory::GuestMemory;
use crate::units::{PAGE_SIZE, Run};
use crate::wire::data::{FrameError, FrameKind, HEADER_BYTES, Header, RECEIPT_BYTES, Receipt, ReceiptHeader};

/// Bytes that are copied at once: 16 pages, four records of TLS.
pub(super) const PIECE_BYTES: u64 = 64 << 10;

/// The pages of these runs in pieces of at most [`PIECE_BYTES`].
pub(super) fn pieces(runs: &[Run]) -> impl Iterator<Item = Run> {
    const PAGES: u64 = PIECE_BYTES / PAGE_SIZE;
    runs.iter().flat_map(|run| {
        let starts = (run.start.0..run.end()).step_by(PAGES as usize);
        starts.map(|start| Run::new(start, PAGES.min(run.end() - start)))
    })
}

/// A connection that frames come from.
pub(super) trait FrameLink: Send + Sync {
    /// Fills `into`. Where a frame may begin (`between_frames`) the peer may be silent for as long as its machine lives, and
    /// may close.
    fn read(&self, into: &mut [u8], between_frames: bool) -> Result<(), ChannelError>;
}

/// [`FrameLink::read`] by a function that reads what has come, and fails with `WouldBlock` after `timeout` without anything.
pub(super) fn fill(
    mut read: impl FnMut(&mut [u8]) -> io::Result<usize>,
    into: &mut [u8],
    between_frames: bool,
    timeout: Duration,
) -> Result<(), ChannelError> {
    let expected = into.len() as u64;
    let mut got = 0;
    while got < into.len() {
        match read(&mut into[got..]) {
            Ok(0) if got == 0 && between_frames => return Err(ChannelError::Closed),
            Ok(0) => return Err(ChannelError::CutShort { got: got as u64, expected }),
            Ok(bytes) => got += bytes,
            Err(error) if got == 0 && between_frames && is_timeout(&error) => {}
            Err(error) => judge(error, got as u64, expected, timeout)?,
        }
    }
    Ok(())
}

/// Whether to try again after an error within a frame.
pub(super) fn judge(
    error: io::Error,
    got: u64,
    expected: u64,
    timeout: Duration,
) -> Result<(), ChannelError> {
    if error.kind() == io::ErrorKind::Interrupted {
        return Ok(());
    }
    if is_timeout(&error) {
        return Err(ChannelError::Stalled { got, expected, seconds: timeout.as_secs() });
    }
    Err(ChannelError::Receive(error))
}

fn is_timeout(error: &io::Error) -> bool {
    // What SO_RCVTIMEO gives, see socket(7).
    error.kind() == io::ErrorKind::WouldBlock
}

/// The frames of one channel, each read whole but for the pages of a raw one.
#[derive(Default)]
pub(super) struct Frames {
    /// The number of the last frame.
    sequence: u64,
    table: Vec<u8>,
    runs: Vec<Run>,
    packed: Vec<u8>,
}

impl Frames {
    /// Reads the next one. `about_to_place` is told of pages before the first byte of them is written; `place` puts so many raw
    /// ones into memory and answers how long that took.
    pub(super) fn next(
        &mut self,
        link: &dyn FrameLink,
        memory: &GuestMemory,
        about_to_place: &mut dyn FnMut(&[Run]),
        place: impl FnOnce(&[Run], u64) -> Result<Duration, ChannelError>,
    ) -> Result<Arrived<'_>, ChannelError> {
        let header = self.read_header(link)?;
        if header.kind == FrameKind::Written {
            return Err(ChannelError::Frame(FrameError::Misplaced));
        }
        self.read_table(link, &header)?;
        let head_bytes = (HEADER_BYTES + self.table.len()) as u64;
        let wire_bytes = head_bytes + u64::from(header.payload_bytes);
        let arrived = |placing, what| Ok(Arrived { sequence: header.sequence, wire_bytes, placing, what });
        if let FrameKind::Barrier(barrier) = header.kind {
            let fenced = header.decode_fenced(&self.table);
            return arrived(Duration::ZERO, Arrival::Barrier { barrier, fenced });
        }
        let pages =
            header.decode_runs(&self.table, memory.layout(), &mut self.runs).map_err(ChannelError::Frame)?;
        match header.kind {
            FrameKind::Zero => return arrived(Duration::ZERO, Arrival::Zeros { runs: &self.runs, pages }),
            FrameKind::Zstd => {
                self.packed.resize(header.payload_bytes as usize, 0);
                link.read(&mut self.packed, false)?;
                about_to_place(&self.runs);
                let what = Arrival::Packed { runs: &self.runs, pages, packed: &self.packed };
                return arrived(Duration::ZERO, what);
            }
            FrameKind::Raw | FrameKind::Barrier(_) | FrameKind::Written => {}
        }
        about_to_place(&self.runs);
        let placing = place(&self.runs, pages)?;
        arrived(placing, Arrival::Placed { pages })
    }

    fn read_header(&mut self, link: &dyn FrameLink) -> Result<Header, ChannelError> {
        let mut bytes = [0; HEADER_BYTES];
        link.read(&mut bytes, true)?;
        let header = Header::decode(&bytes).map_err(ChannelError::Frame)?;
        let expected = self.sequence + 1;
        if header.sequence != expected {
            let wrong = FrameError::Sequence { got: header.sequence, expected };
            return Err(ChannelError::Frame(wrong));
        }
        self.sequence = expected;
        Ok(header)
    }

    /// Reads the table that a header announces: at most 12 KiB, which the header's decoding has seen to.
    fn read_table(&mut self, link: &dyn FrameLink, header: &Header) -> Result<(), ChannelError> {
        self.table.resize(header.table_bytes(), 0);
        link.read(&mut self.table, false)
    }
}

/// What the destination confirms.
pub(super) struct Receipts<L> {
    link: Arc<L>,
    /// The number of the last frame that was sent.
    sent: Arc<AtomicU64>,
}

impl<L: FrameLink> Receipts<L> {
    pub(super) fn new(link: Arc<L>, sent: Arc<AtomicU64>) -> Self {
        Self { link, sent }
    }
}

impl<L: FrameLink> ChannelReceipts for Receipts<L> {
    fn next(&mut self) -> Result<Receipt, ChannelError> {
        let mut head = [0; RECEIPT_BYTES];
        self.link.read(&mut head, true)?;
        let header = ReceiptHeader::decode(&head).map_err(ChannelError::Frame)?;
        let mut text = vec![0; header.text_bytes()];
        self.link.read(&mut text, false)?;
        match header.with_text(&text) {
            Receipt::Error(text) => Err(ChannelError::Peer(text)),
            Receipt::Placed(got) if got > self.sent.load(Ordering::Relaxed) => {
                Err(ChannelError::ConfirmsTooMuch { got, sent: self.sent.load(Ordering::Relaxed) })
            }
            receipt => Ok(receipt),
        }
    }
}

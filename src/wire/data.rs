//! Data frames: batches of pages on their way into the destination's memory, and what comes back.
//!
//! Source to destination, little-endian: a header of [`HEADER_BYTES`], a table of runs, a payload. The table comes before
//! the payload, so that the payload can be received straight into the pages that it is for.
//!
//! | offset | header |
//! |---|---|
//! | 0 | magic `PGFD` |
//! | 4 | kind (u8): 1 raw, 2 zstd, 3 zero, 4 barrier, 5 written; a zero byte |
//! | 6 | entries of the table (u16) |
//! | 8 | round (u32) |
//! | 12 | bytes of payload (u32) |
//! | 16 | sequence number of the frame on its channel (u64), from 1 on |
//! | 24 | barrier: its number (u64); else 0 |
//!
//! A table entry of a page frame is a run ([`RUN_BYTES`]: first page u64, pages u32); of a barrier it is the number (u32)
//! of a channel that the source has given up. Runs rise, do not overlap, and none crosses a border between RAM regions: a
//! run is one range of addresses on every wire.
//!
//! Destination to source: [`Receipt`]s.

use super::{Fields, cut_text, shown_text};
use crate::layout::RamLayout;
use crate::units::{PAGE_SIZE, RoundId, Run};

/// Length of an encoded [`Header`].
pub const HEADER_BYTES: usize = 32;
/// Length of an encoded run.
pub const RUN_BYTES: usize = 12;
/// Length of the number of a given-up channel in a barrier.
pub const FENCED_BYTES: usize = 4;
/// The most runs in a frame: as many pieces as one `readv(2)` or `vmsplice(2)` takes (`UIO_MAXIOV`).
pub const MAX_RUNS: usize = 1024;
/// The most pages in a frame with a payload: 1024 x 4 KiB = 4 MiB, what a destination buffers at most per channel.
pub const MAX_BATCH_PAGES: u64 = 1024;
/// The longest table: 1024 runs x 12 bytes = 12 KiB.
pub const MAX_TABLE_BYTES: usize = MAX_RUNS * RUN_BYTES;
/// The most channels that a migration may ever have had, lost ones included. Fits a barrier's table.
pub const MAX_CHANNELS: usize = MAX_RUNS;
/// Length of an encoded [`Receipt`] without its text.
pub const RECEIPT_BYTES: usize = 16;
/// The longest text of a [`Receipt::Error`].
pub const MAX_ERROR_BYTES: usize = 512;

const FRAME_MAGIC: [u8; 4] = *b"PGFD";
const RECEIPT_MAGIC: [u8; 4] = *b"PGFA";

/// The number of a barrier, rising within a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct BarrierId(pub u64);

/// The number of a data channel. Never used twice in a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChannelId(pub u32);

impl std::fmt::Display for ChannelId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// The pages of its runs, one after the other.
    Raw,
    /// The same, as one zstd frame.
    Zstd,
    /// Nothing: the pages of its runs hold zero bytes.
    Zero,
    /// Nothing: everything before it on this channel comes before everything that follows its confirmation on any.
    Barrier(BarrierId),
    /// Nothing: as many bytes as its header says were written by RDMA before it, page by page. It has no table.
    Written,
}

/// The fixed part of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame carries.
    pub kind: FrameKind,
    /// Runs, or given-up channels, in its table. At most [`MAX_RUNS`].
    pub entries: u16,
    /// The round that it belongs to.
    pub round: RoundId,
    /// Bytes after the table; for pages at most [`MAX_BATCH_PAGES`] x 4 KiB.
    pub payload_bytes: u32,
    /// Its number on its channel: 1, 2, 3 and so on.
    pub sequence: u64,
}

/// Why bytes are not a frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not the magic: the stream is out of step, or another protocol.
    #[error("a data frame begins with {} instead of its magic", .0.escape_ascii())]
    Magic([u8; 4]),
    /// A kind that this version does not know.
    #[error("a data frame of kind {0} is unknown to this version")]
    Kind(u8),
    /// A kind that this channel does not carry.
    #[error("a data frame has come over a channel that carries no frames of its kind")]
    Misplaced,
    /// A bit set that this version keeps 0.
    #[error("a reserved field of a data frame is not zero")]
    Reserved,
    /// A table that is too long, or empty where it must not be.
    #[error(
        "a data frame has {0} table entries; 1 to {MAX_RUNS} are allowed, and none where RDMA has written"
    )]
    Entries(u16),
    /// A payload that does not fit the kind or the runs.
    #[error("a data frame has a payload of {got} bytes; {limit} are allowed")]
    Payload {
        /// What the header says.
        got: u32,
        /// What it may say at most (zstd) or exactly (all others).
        limit: u64,
    },
    /// A run outside the guest's memory, empty, or over a border between regions.
    #[error("{pages} pages from page {start} on are not inside one RAM region of this guest")]
    Run {
        /// First page.
        start: u64,
        /// Number of pages.
        pages: u32,
    },
    /// A run that starts before the end of the one before it.
    #[error("the runs of a data frame overlap or are out of order at page {0}")]
    Order(u64),
    /// More pages than a frame with payload may have.
    #[error("a data frame has {0} pages; {MAX_BATCH_PAGES} is the limit")]
    Pages(u64),
    /// A number that is not the one after the last frame's.
    #[error("data frame {got} arrived where {expected} was due")]
    Sequence {
        /// What the header says.
        got: u64,
        /// What was due.
        expected: u64,
    },
    /// An error text longer than [`MAX_ERROR_BYTES`].
    #[error("the peer announces an error text of {0} bytes; {MAX_ERROR_BYTES} is the limit")]
    TextLength(u16),
}

impl Header {
    /// The bytes that travel.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let (kind, barrier) = match self.kind {
            FrameKind::Raw => (1, 0),
            FrameKind::Zstd => (2, 0),
            FrameKind::Zero => (3, 0),
            FrameKind::Barrier(barrier) => (4, barrier.0),
            FrameKind::Written => (5, 0),
        };
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&FRAME_MAGIC);
        bytes[4] = kind;
        bytes[6..8].copy_from_slice(&self.entries.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.round.0.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.payload_bytes.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..].copy_from_slice(&barrier.to_le_bytes());
        bytes
    }

    /// Reads what the peer sent. Everything that needs no table is checked here.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let mut fields = Fields(bytes);
        let magic = fields.take();
        if magic != FRAME_MAGIC {
            return Err(FrameError::Magic(magic));
        }
        let (kind, reserved, entries) = (fields.u8(), fields.u8(), fields.u16());
        let (round, payload_bytes) = (RoundId(fields.u32()), fields.u32());
        let (sequence, barrier) = (fields.u64(), fields.u64());
        let kind = match kind {
            1 => FrameKind::Raw,
            2 => FrameKind::Zstd,
            3 => FrameKind::Zero,
            4 => FrameKind::Barrier(BarrierId(barrier)),
            5 => FrameKind::Written,
            other => return Err(FrameError::Kind(other)),
        };
        let is_barrier = matches!(kind, FrameKind::Barrier(_));
        if reserved != 0 || (!is_barrier && barrier != 0) {
            return Err(FrameError::Reserved);
        }
        let fits = match kind {
            FrameKind::Written => entries == 0,
            FrameKind::Barrier(_) => usize::from(entries) <= MAX_RUNS,
            FrameKind::Raw | FrameKind::Zstd | FrameKind::Zero => {
                (1..=MAX_RUNS).contains(&usize::from(entries))
            }
        };
        if !fits {
            return Err(FrameError::Entries(entries));
        }
        let limit = match kind {
            FrameKind::Raw | FrameKind::Zstd | FrameKind::Written => MAX_BATCH_PAGES * PAGE_SIZE,
            FrameKind::Zero | FrameKind::Barrier(_) => 0,
        };
        let whole_pages = kind != FrameKind::Written || u64::from(payload_bytes).is_multiple_of(PAGE_SIZE);
        if u64::from(payload_bytes) > limit || !whole_pages {
            return Err(FrameError::Payload { got: payload_bytes, limit });
        }
        Ok(Self { kind, entries, round, payload_bytes, sequence })
    }

    /// Bytes of table that follow; at most [`MAX_TABLE_BYTES`].
    #[must_use]
    pub fn table_bytes(&self) -> usize {
        let entry = if matches!(self.kind, FrameKind::Barrier(_)) { FENCED_BYTES } else { RUN_BYTES };
        usize::from(self.entries) * entry
    }

    /// Reads the runs of a page frame into `runs` (cleared first) and checks them against the guest's memory and the
    /// payload; answers how many pages they have.
    ///
    /// # Errors
    /// The first run that is wrong, or a payload that does not fit; nothing may be touched then.
    ///
    /// # Panics
    /// If `table` is not [`Header::table_bytes`] long.
    pub fn decode_runs(
        &self,
        table: &[u8],
        layout: &RamLayout,
        runs: &mut Vec<Run>,
    ) -> Result<u64, FrameError> {
        assert_eq!(table.len(), self.table_bytes(), "the table as the header announces it");
        runs.clear();
        let (mut fields, mut pages, mut previous_end) = (Fields(table), 0, 0);
        for _ in 0..self.entries {
            let (start, length) = (fields.u64(), fields.u32());
            let run = Run::new(start, u64::from(length));
            if length == 0 || !layout.contains(run) || layout.pieces(run).count() != 1 {
                return Err(FrameError::Run { start, pages: length });
            }
            if start < previous_end {
                return Err(FrameError::Order(start));
            }
            previous_end = run.end();
            pages += run.pages;
            runs.push(run);
        }
        self.check_payload(pages)?;
        Ok(pages)
    }

    fn check_payload(&self, pages: u64) -> Result<(), FrameError> {
        let bytes = u64::from(self.payload_bytes);
        let fits = match self.kind {
            FrameKind::Raw => bytes == pages * PAGE_SIZE,
            FrameKind::Zstd => bytes > 0 && bytes <= pages * PAGE_SIZE,
            // `decode` has seen that there is none.
            FrameKind::Zero | FrameKind::Barrier(_) | FrameKind::Written => return Ok(()),
        };
        if pages > MAX_BATCH_PAGES {
            return Err(FrameError::Pages(pages));
        }
        if !fits {
            return Err(FrameError::Payload { got: self.payload_bytes, limit: pages * PAGE_SIZE });
        }
        Ok(())
    }

    /// Reads the given-up channels of a barrier.
    ///
    /// # Panics
    /// If `table` is not [`Header::table_bytes`] long.
    #[must_use]
    pub fn decode_fenced(&self, table: &[u8]) -> Vec<ChannelId> {
        assert_eq!(table.len(), self.table_bytes(), "the table as the header announces it");
        let mut fields = Fields(table);
        (0..self.entries).map(|_| ChannelId(fields.u32())).collect()
    }
}

/// Appends a frame of pages, up to where its payload begins, to `into`.
///
/// # Panics
/// If there are no runs or more than [`MAX_RUNS`], or a run is longer than a u32 counts: batches are cut before.
pub fn encode_pages(
    kind: FrameKind,
    round: RoundId,
    sequence: u64,
    runs: &[Run],
    payload_bytes: u32,
    into: &mut Vec<u8>,
) {
    assert!(!runs.is_empty() && runs.len() <= MAX_RUNS, "a frame has 1 to {MAX_RUNS} runs");
    let header = Header { kind, entries: runs.len() as u16, round, payload_bytes, sequence };
    into.extend(header.encode());
    for run in runs {
        let pages = u32::try_from(run.pages).expect("a run of a frame is cut to its length");
        into.extend(run.start.0.to_le_bytes());
        into.extend(pages.to_le_bytes());
    }
}

/// A barrier frame.
///
/// # Panics
/// If more than [`MAX_CHANNELS`] channels were given up: no session opens so many.
#[must_use]
pub fn encode_barrier(barrier: BarrierId, round: RoundId, sequence: u64, fenced: &[ChannelId]) -> Vec<u8> {
    assert!(fenced.len() <= MAX_CHANNELS, "a migration has at most {MAX_CHANNELS} channels");
    let kind = FrameKind::Barrier(barrier);
    let header = Header { kind, entries: fenced.len() as u16, round, payload_bytes: 0, sequence };
    let mut bytes = header.encode().to_vec();
    bytes.extend(fenced.iter().flat_map(|channel| channel.0.to_le_bytes()));
    bytes
}

/// The frame that follows so many pages which were written by RDMA; at most [`MAX_BATCH_PAGES`].
#[must_use]
pub fn encode_written(pages: u64, round: RoundId, sequence: u64) -> [u8; HEADER_BYTES] {
    let payload_bytes = (pages * PAGE_SIZE) as u32;
    Header { kind: FrameKind::Written, entries: 0, round, payload_bytes, sequence }.encode()
}

/// What the destination says on a data channel.
///
/// 16 bytes: magic `PGFA`, kind (u8): 1 placed, 2 barrier, 3 error; a zero byte, length of the text (u16), number (u64).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Receipt {
    /// Every frame of this channel up to this sequence number is in memory.
    Placed(u64),
    /// The barrier was reached: every frame of this channel before it is in memory, and no byte of the channels that its
    /// frame named will be written any more.
    Barrier(BarrierId),
    /// The destination refuses what it got, and closes the channel.
    Error(String),
}

impl Receipt {
    /// The bytes that travel.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (kind, number, text) = match self {
            Self::Placed(sequence) => (1, *sequence, ""),
            Self::Barrier(barrier) => (2, barrier.0, ""),
            Self::Error(text) => (3, 0, cut_text(text, MAX_ERROR_BYTES)),
        };
        let mut bytes = Vec::with_capacity(RECEIPT_BYTES + text.len());
        bytes.extend(RECEIPT_MAGIC);
        bytes.extend([kind, 0]);
        bytes.extend((text.len() as u16).to_le_bytes());
        bytes.extend(number.to_le_bytes());
        bytes.extend(text.as_bytes());
        bytes
    }
}

/// The fixed part of a [`Receipt`], which tells how much text follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReceiptHeader {
    kind: u8,
    text_bytes: u16,
    number: u64,
}

impl ReceiptHeader {
    /// Reads the fixed part of what the peer sent.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn decode(bytes: &[u8; RECEIPT_BYTES]) -> Result<Self, FrameError> {
        let mut fields = Fields(bytes);
        let magic = fields.take();
        if magic != RECEIPT_MAGIC {
            return Err(FrameError::Magic(magic));
        }
        let (kind, reserved, text_bytes, number) = (fields.u8(), fields.u8(), fields.u16(), fields.u64());
        if !(1..=3).contains(&kind) {
            return Err(FrameError::Kind(kind));
        }
        if usize::from(text_bytes) > MAX_ERROR_BYTES {
            return Err(FrameError::TextLength(text_bytes));
        }
        if reserved != 0 || (kind != 3 && text_bytes != 0) || (kind == 3 && number != 0) {
            return Err(FrameError::Reserved);
        }
        Ok(Self { kind, text_bytes, number })
    }

    /// How many bytes of text follow; at most [`MAX_ERROR_BYTES`].
    #[must_use]
    pub fn text_bytes(&self) -> usize {
        usize::from(self.text_bytes)
    }

    /// The whole receipt.
    #[must_use]
    pub fn with_text(self, text: &[u8]) -> Receipt {
        match self.kind {
            1 => Receipt::Placed(self.number),
            2 => Receipt::Barrier(BarrierId(self.number)),
            _ => Receipt::Error(shown_text(text)),
        }
    }
}

#[cfg(test)]
mod tests;

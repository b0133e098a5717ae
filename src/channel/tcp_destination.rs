//! The destination's end of a TCP channel: headers into a bounded buffer, pages straight into the guest's memory.

use std::cell::Cell;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::tcp::TcpLink;
use super::{Arrival, Arrived, ChannelError, ChannelReceiver};
use crate::memory::GuestMemory;
use crate::sys::scatter::{self, MemorySlice};
use crate::sys::socket::set_receive_low_water;
use crate::units::{PAGE_SIZE, Run};
use crate::wire::data::{FrameError, FrameKind, HEADER_BYTES, Header, Receipt};

/// Within a payload the thread is woken for this much at a time, not for each segment. On a loopback that saves a third of the
/// source's CPU time, since there the sender does the waking, and some of the destination's; four times as much stalls at times.
const WAKE_BYTES: u64 = 256 << 10;

pub(super) struct TcpReceiver {
    link: Arc<TcpLink>,
    memory: GuestMemory,
    /// The number of the last frame.
    sequence: u64,
    table: Vec<u8>,
    runs: Vec<Run>,
    packed: Vec<u8>,
    /// What the socket's low water mark is.
    wake_at: Cell<u64>,
}

impl TcpReceiver {
    pub(super) fn new(link: Arc<TcpLink>, memory: GuestMemory) -> Self {
        Self {
            link,
            memory,
            sequence: 0,
            table: Vec::new(),
            runs: Vec::new(),
            packed: Vec::new(),
            wake_at: Cell::new(1),
        }
    }

    fn read_header(&mut self) -> Result<Header, ChannelError> {
        let mut bytes = [0; HEADER_BYTES];
        self.link.read(&mut bytes, true)?;
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
    fn read_table(&mut self, header: &Header) -> Result<(), ChannelError> {
        self.table.resize(header.table_bytes(), 0);
        self.link.read(&mut self.table, false)
    }

    /// Lets the kernel wake this thread for that many bytes. Only a matter of speed, so a refusal is no error.
    fn wake_at(&self, bytes: u64) {
        if self.wake_at.replace(bytes) != bytes {
            let _ = set_receive_low_water(&self.link.stream, bytes as u32);
        }
    }

    /// Answers how long it took to put them into memory.
    fn receive_pages(&self, pages: u64) -> Result<Duration, ChannelError> {
        let expected = pages * PAGE_SIZE;
        let mut slices: Vec<MemorySlice<'_>> =
            self.runs.iter().flat_map(|run| self.memory.memory_slices(*run)).collect();
        let (mut got, mut placing) = (0, Duration::ZERO);
        while !slices.is_empty() {
            self.wake_at((expected - got).min(WAKE_BYTES));
            // Waits here and not in `readv`, which would go on waiting for the whole low water mark after it has copied a part
            // of it, and so for more than the source has to send.
            self.link.wait_readable(got, expected)?;
            let began = Instant::now();
            let came = scatter::readv(&self.link.stream, &slices);
            placing += began.elapsed();
            match came {
                Ok(0) => return Err(ChannelError::CutShort { got, expected }),
                Ok(bytes) => {
                    got += bytes as u64;
                    scatter::advance(&mut slices, bytes as u64);
                }
                Err(error) => self.link.judge(error, got, expected)?,
            }
        }
        self.wake_at(1);
        Ok(placing)
    }
}

impl ChannelReceiver for TcpReceiver {
    fn next(&mut self, about_to_place: &mut dyn FnMut(&[Run])) -> Result<Arrived<'_>, ChannelError> {
        let header = self.read_header()?;
        if header.kind == FrameKind::Written {
            return Err(ChannelError::Frame(FrameError::Misplaced));
        }
        self.read_table(&header)?;
        let head_bytes = (HEADER_BYTES + self.table.len()) as u64;
        let wire_bytes = head_bytes + u64::from(header.payload_bytes);
        let mut placing = Duration::ZERO;
        let arrived = |placing, what| Ok(Arrived { sequence: header.sequence, wire_bytes, placing, what });
        if let FrameKind::Barrier(barrier) = header.kind {
            return arrived(placing, Arrival::Barrier { barrier, fenced: header.decode_fenced(&self.table) });
        }
        let pages = header
            .decode_runs(&self.table, self.memory.layout(), &mut self.runs)
            .map_err(ChannelError::Frame)?;
        match header.kind {
            FrameKind::Zero => return arrived(placing, Arrival::Zeros { runs: &self.runs, pages }),
            FrameKind::Zstd => {
                self.packed.resize(header.payload_bytes as usize, 0);
                self.link.read(&mut self.packed, false)?;
                about_to_place(&self.runs);
                return arrived(placing, Arrival::Packed { runs: &self.runs, pages, packed: &self.packed });
            }
            FrameKind::Raw | FrameKind::Barrier(_) | FrameKind::Written => {}
        }
        about_to_place(&self.runs);
        placing = self.receive_pages(pages)?;
        arrived(placing, Arrival::Placed { pages })
    }

    fn confirm(&mut self, receipt: &Receipt) -> Result<(), ChannelError> {
        let bytes = receipt.encode();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            match (&self.link.stream).write(rest) {
                Ok(0) => return Err(ChannelError::Send(io::ErrorKind::WriteZero.into())),
                Ok(written) => rest = &rest[written..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ChannelError::Send(error)),
            }
        }
        Ok(())
    }
}

//! The destination's end of a TCP channel: headers into a bounded buffer, pages straight into the guest's memory.

use std::io::{self, Write};
use std::sync::Arc;

use super::tcp::TcpLink;
use super::{Arrival, Arrived, ChannelError, ChannelReceiver};
use crate::memory::GuestMemory;
use crate::sys::scatter::{self, MemorySlice};
use crate::units::Run;
use crate::wire::data::{FrameError, FrameKind, HEADER_BYTES, Header, Receipt};

pub(super) struct TcpReceiver {
    link: Arc<TcpLink>,
    memory: GuestMemory,
    /// The number of the last frame.
    sequence: u64,
    table: Vec<u8>,
    runs: Vec<Run>,
    packed: Vec<u8>,
}

impl TcpReceiver {
    pub(super) fn new(link: Arc<TcpLink>, memory: GuestMemory) -> Self {
        Self { link, memory, sequence: 0, table: Vec::new(), runs: Vec::new(), packed: Vec::new() }
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

    fn receive_pages(&self, pages: u64) -> Result<(), ChannelError> {
        let expected = pages * crate::units::PAGE_SIZE;
        let mut slices: Vec<MemorySlice<'_>> =
            self.runs.iter().flat_map(|run| self.memory.memory_slices(*run)).collect();
        let mut got = 0;
        while !slices.is_empty() {
            match scatter::readv(&self.link.stream, &slices) {
                Ok(0) => return Err(ChannelError::CutShort { got, expected }),
                Ok(bytes) => {
                    got += bytes as u64;
                    scatter::advance(&mut slices, bytes as u64);
                }
                Err(error) => self.link.judge(error, got, expected)?,
            }
        }
        Ok(())
    }
}

impl ChannelReceiver for TcpReceiver {
    fn next(&mut self, about_to_place: &mut dyn FnMut(&[Run])) -> Result<Arrived<'_>, ChannelError> {
        let header = self.read_header()?;
        self.read_table(&header)?;
        let head_bytes = (HEADER_BYTES + self.table.len()) as u64;
        let wire_bytes = head_bytes + u64::from(header.payload_bytes);
        let arrived = |what| Ok(Arrived { sequence: header.sequence, wire_bytes, what });
        if let FrameKind::Barrier(barrier) = header.kind {
            return arrived(Arrival::Barrier { barrier, fenced: header.decode_fenced(&self.table) });
        }
        let pages = header
            .decode_runs(&self.table, self.memory.layout(), &mut self.runs)
            .map_err(ChannelError::Frame)?;
        match header.kind {
            FrameKind::Zero => return arrived(Arrival::Zeros { runs: &self.runs, pages }),
            FrameKind::Zstd => {
                self.packed.resize(header.payload_bytes as usize, 0);
                self.link.read(&mut self.packed, false)?;
                about_to_place(&self.runs);
                return arrived(Arrival::Packed { runs: &self.runs, pages, packed: &self.packed });
            }
            FrameKind::Raw | FrameKind::Barrier(_) => {}
        }
        about_to_place(&self.runs);
        self.receive_pages(pages)?;
        arrived(Arrival::Placed { pages })
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

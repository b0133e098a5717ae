//! The destination's end of a TCP channel: headers into a bounded buffer, pages straight into the guest's memory.

use std::cell::Cell;
use std::io::{self, Read as _, Write as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::frames::{Frames, pieces};
use super::tcp::TcpLink;
use super::{Arrived, ChannelError, ChannelReceiver};
use crate::memory::GuestMemory;
use crate::sys::scatter::{self, MemorySlice};
use crate::sys::socket::set_receive_low_water;
use crate::units::{PAGE_SIZE, Run};
use crate::wire::data::Receipt;

/// Within a payload the thread is woken for this much at a time, not for each segment. On a loopback that saves a third of the
/// source's CPU time, since there the sender does the waking, and some of the destination's; four times as much stalls at times.
const WAKE_BYTES: u64 = 256 << 10;

pub(super) struct TcpReceiver {
    placer: Placer,
    frames: Frames,
    /// Pages that have come and go into memory through its file.
    piece: Vec<u8>,
}

/// Puts the pages of raw frames into memory.
struct Placer {
    link: Arc<TcpLink>,
    memory: GuestMemory,
    /// What the socket's low water mark is.
    wake_at: Cell<u64>,
}

impl TcpReceiver {
    pub(super) fn new(link: Arc<TcpLink>, memory: GuestMemory) -> Self {
        Self {
            placer: Placer { link, memory, wake_at: Cell::new(1) },
            frames: Frames::default(),
            piece: Vec::new(),
        }
    }
}

impl Placer {
    /// Lets the kernel wake this thread for that many bytes. Only a matter of speed, so a refusal is no error.
    fn wake_at(&self, bytes: u64) {
        if self.wake_at.replace(bytes) != bytes {
            let _ = set_receive_low_water(&self.link.stream, bytes as u32);
        }
    }

    /// Answers how long it took to put them into memory.
    fn receive_pages(&self, runs: &[Run], pages: u64, piece: &mut Vec<u8>) -> Result<Duration, ChannelError> {
        // Pages that come for the first time mostly come together.
        if runs.first().is_some_and(|run| self.memory.is_missing(run.start)) {
            self.receive_missing(runs, piece)
        } else {
            self.receive_present(runs, pages * PAGE_SIZE)
        }
    }

    /// Into a buffer that stays in the cache, and from there to the memory's file: a copy more, and much less than a fault for
    /// each page, in which the kernel zeroes it.
    fn receive_missing(&self, runs: &[Run], piece: &mut Vec<u8>) -> Result<Duration, ChannelError> {
        let mut placing = Duration::ZERO;
        let pieces: Vec<Run> = pieces(runs).collect();
        let mut left = &pieces[..];
        while !left.is_empty() {
            let mut bytes = 0;
            let fitting = left.iter().take_while(|run| {
                let fits = bytes + run.bytes() <= WAKE_BYTES;
                bytes += if fits { run.bytes() } else { 0 };
                fits
            });
            // One always fits.
            let (pieces, later) = left.split_at(fitting.count());
            left = later;
            piece.resize(bytes as usize, 0);
            placing += self.receive(bytes, |got| (&self.link.stream).read(&mut piece[got as usize..]))?;
            let began = Instant::now();
            let mut rest = &piece[..];
            for run in pieces {
                let (head, tail) = rest.split_at(run.bytes() as usize);
                self.memory.fill_run(*run, head);
                rest = tail;
            }
            placing += began.elapsed();
        }
        self.wake_at(1);
        Ok(placing)
    }

    /// Straight into memory.
    fn receive_present(&self, runs: &[Run], expected: u64) -> Result<Duration, ChannelError> {
        let mut slices: Vec<MemorySlice<'_>> =
            runs.iter().flat_map(|run| self.memory.memory_slices(*run)).collect();
        let placing = self.receive(expected, |_| {
            let bytes = scatter::readv(&self.link.stream, &slices)?;
            scatter::advance(&mut slices, bytes as u64);
            Ok(bytes)
        })?;
        self.wake_at(1);
        Ok(placing)
    }

    /// Reads until so many bytes have come, by a function that is told how many have. Answers how long it took to read them.
    fn receive(
        &self,
        expected: u64,
        mut read: impl FnMut(u64) -> io::Result<usize>,
    ) -> Result<Duration, ChannelError> {
        let (mut got, mut reading) = (0, Duration::ZERO);
        while got < expected {
            self.wake_at((expected - got).min(WAKE_BYTES));
            // Waits here and not in `read`, which would go on waiting for the whole low water mark after it has copied a part
            // of it, and so for more than the source has to send.
            self.link.wait_readable(got, expected)?;
            let began = Instant::now();
            let came = read(got);
            reading += began.elapsed();
            match came {
                Ok(0) => return Err(ChannelError::CutShort { got, expected }),
                Ok(bytes) => got += bytes as u64,
                Err(error) => self.link.judge(error, got, expected)?,
            }
        }
        Ok(reading)
    }
}

impl ChannelReceiver for TcpReceiver {
    fn next(&mut self, about_to_place: &mut dyn FnMut(&[Run])) -> Result<Arrived<'_>, ChannelError> {
        let Self { placer, frames, piece } = self;
        frames.next(&*placer.link, &placer.memory, about_to_place, |runs, pages| {
            placer.receive_pages(runs, pages, piece)
        })
    }

    fn confirm(&mut self, receipt: &Receipt) -> Result<(), ChannelError> {
        let bytes = receipt.encode();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            match (&self.placer.link.stream).write(rest) {
                Ok(0) => return Err(ChannelError::Send(io::ErrorKind::WriteZero.into())),
                Ok(written) => rest = &rest[written..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ChannelError::Send(error)),
            }
        }
        Ok(())
    }
}

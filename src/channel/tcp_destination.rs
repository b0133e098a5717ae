//! The destination's end of a TCP channel: headers into a bounded buffer, pages straight into the guest's memory.

use std::cell::Cell;
use std::io::{self, Write as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, recv};

use super::frames::{Frames, pieces};
use super::tcp::TcpLink;
use super::{Arrived, ChannelError, ChannelReceiver};
use crate::memory::GuestMemory;
use crate::sys::scatter::{self, MemorySlice};
use crate::sys::socket::set_receive_low_water;
use crate::units::{PAGE_SIZE, Run};
use crate::wire::data::Receipt;

/// Within a payload the thread is woken for this much at a time, not for each segment. On a loopback that saves a third of the
/// source's CPU time, since there the sender does the waking, and some of the destination's.
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
            placing += self.receive(bytes, |got| {
                let (read, _) = recv(&self.link.stream, &mut piece[got as usize..], RecvFlags::DONTWAIT)?;
                Ok(read)
            })?;
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
            let bytes = scatter::receive(&self.link.stream, &slices)?;
            scatter::advance(&mut slices, bytes as u64);
            Ok(bytes)
        })?;
        self.wake_at(1);
        Ok(placing)
    }

    /// Reads until so many bytes have come, by a function that is told how many have and does not wait. Answers how long it took to
    /// read them.
    fn receive(
        &self,
        expected: u64,
        mut read: impl FnMut(u64) -> io::Result<usize>,
    ) -> Result<Duration, ChannelError> {
        let (mut got, mut reading) = (0, Duration::ZERO);
        while got < expected {
            self.wake_at((expected - got).min(WAKE_BYTES));
            // Waits here and not in `read`. The kernel wakes us below the low water mark when the window is full or its buffer
            // is; a read that waits would copy that and go on to the mark, not to be woken for less, of which the source may have
            // no more to send.
            self.link.wait_readable(got, expected)?;
            let began = Instant::now();
            let came = read(got);
            reading += began.elapsed();
            match came {
                Ok(0) => return Err(ChannelError::CutShort { got, expected }),
                Ok(bytes) => got += bytes as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
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

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use crossbeam_channel::unbounded;

    use super::*;
    use crate::channel::tcp::{TcpOptions, receive};
    use crate::layout::RamLayout;
    use crate::memory::{Backing, HugePages};
    use crate::units::{PageIndex, RoundId};
    use crate::wire::data::{FrameKind, encode_pages};

    /// The window of a new connection is full before the low water mark is reached, and the kernel wakes the reader for that. A read
    /// that waits goes on to the mark then, and is not woken for less, of which the frame may have no more.
    #[test]
    fn a_frame_that_comes_in_parts_is_read_to_its_end() {
        const PAGES: u64 = 75;
        let layout = RamLayout::flat(PAGES * PAGE_SIZE).unwrap();
        let memory = GuestMemory::allocate(layout, Backing::Memfd, HugePages::No).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut source = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        source.set_nodelay(true).unwrap();
        let options = TcpOptions { link_timeout: Duration::from_secs(600), ..TcpOptions::default() };
        let mut channel = receive(listener.accept().unwrap().0, memory.clone(), options).unwrap();
        let (sender, frames) = unbounded();
        let reader = std::thread::spawn(move || {
            while channel.receiver.next(&mut |_| {}).is_ok() {
                sender.send(()).unwrap();
            }
        });
        // First into pages that are missing, then into the same ones.
        for (sequence, value) in [(1, 1), (2, 2)] {
            let (mut frame, run) = (Vec::new(), Run::new(0, PAGES));
            let bytes = run.bytes() as u32;
            encode_pages(FrameKind::Raw, RoundId(0), sequence, &[run], bytes, &mut frame);
            frame.resize(frame.len() + run.bytes() as usize, value);
            for part in frame.chunks(100_000) {
                source.write_all(part).unwrap();
                std::thread::sleep(Duration::from_millis(20));
            }
            frames.recv_timeout(Duration::from_secs(20)).expect("the frame, long before the link times out");
            let mut page = [0; PAGE_SIZE as usize];
            memory.read_page(PageIndex(PAGES - 1), &mut page);
            assert_eq!(page, [value; PAGE_SIZE as usize]);
        }
        drop(source);
        reader.join().unwrap();
    }
}

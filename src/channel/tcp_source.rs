//! The source's end of a TCP channel.
//!
//! A frame of raw pages is a header in the socket, then references to guest RAM: `vmsplice` puts them into a pipe, `splice`
//! moves them to the socket, and no byte is copied on this host. Where the memory cannot be referenced (a device's, or a
//! kernel that refuses) it is written, which copies.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

use super::tcp::TcpLink;
use super::{ChannelError, ChannelSource, Pushed};
use crate::memory::GuestMemory;
use crate::sys::scatter::{self, MemorySlice};
use crate::sys::socket::unacknowledged_bytes;
use crate::units::{PAGE_SIZE, RoundId, Run};
use crate::wire::data::{BarrierId, ChannelId, FrameKind, MAX_BATCH_PAGES, encode_barrier, encode_pages};

/// The largest pipe that is of use: a whole frame's payload, 4 MiB.
const PIPE_BYTES: usize = (MAX_BATCH_PAGES * PAGE_SIZE) as usize;

pub(super) struct TcpSource {
    link: Arc<TcpLink>,
    memory: GuestMemory,
    /// `None` where referencing memory is not possible or not wanted.
    pipe: Option<Pipe>,
    head: Vec<u8>,
    /// The number of the last frame. Stored before the frame goes out, so that no confirmation is ahead of it.
    sent: Arc<AtomicU64>,
}

struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        let allowed = std::fs::read_to_string("/proc/sys/fs/pipe-max-size").ok();
        let allowed = allowed.and_then(|text| text.trim().parse().ok()).unwrap_or(PIPE_BYTES);
        // Refused when this user's pipes are large enough together already (pipe(7)); a small one works too.
        let _ = fcntl_setpipe_size(&write, PIPE_BYTES.min(allowed));
        Ok(Self { read, write })
    }
}

impl TcpSource {
    pub(super) fn new(
        link: Arc<TcpLink>,
        memory: GuestMemory,
        sent: Arc<AtomicU64>,
        zero_copy: bool,
    ) -> Self {
        let pipe = zero_copy.then(Pipe::new).and_then(|made| {
            made.inspect_err(
                |error| tracing::warn!(%error, "no pipe for zero copy; guest memory is copied instead"),
            )
            .ok()
        });
        Self { link, memory, pipe, head: Vec::new(), sent }
    }

    fn next_sequence(&mut self) -> u64 {
        self.sent.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Fills `head` with a frame of pages up to its payload.
    fn begin(&mut self, kind: FrameKind, round: RoundId, runs: &[Run], payload: usize) -> Pushed {
        let sequence = self.next_sequence();
        self.head.clear();
        encode_pages(kind, round, sequence, runs, payload as u32, &mut self.head);
        Pushed { sequence, wire_bytes: (self.head.len() + payload) as u64 }
    }

    fn send(&self, mut bytes: &[u8], flags: SendFlags) -> Result<(), ChannelError> {
        while !bytes.is_empty() {
            match send(&self.link.stream, bytes, flags | SendFlags::NOSIGNAL) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(Errno::INTR) => {}
                Err(errno) => return Err(ChannelError::Send(errno.into())),
            }
        }
        Ok(())
    }

    fn send_memory(&mut self, mut slices: Vec<MemorySlice<'_>>) -> Result<(), ChannelError> {
        while !slices.is_empty() {
            let Some(pipe) = &self.pipe else { return self.copy_memory(slices) };
            match scatter::vmsplice(&pipe.write, &slices) {
                Ok(bytes) => {
                    scatter::advance(&mut slices, bytes as u64);
                    self.drain(pipe, bytes, !slices.is_empty())?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::warn!(%error, "guest memory cannot be referenced by a pipe; it is copied instead");
                    self.pipe = None;
                }
            }
        }
        Ok(())
    }

    /// Moves what is in the pipe to the socket.
    fn drain(&self, pipe: &Pipe, mut bytes: usize, more: bool) -> Result<(), ChannelError> {
        let flags = if more { SpliceFlags::MOVE | SpliceFlags::MORE } else { SpliceFlags::MOVE };
        while bytes > 0 {
            match splice(&pipe.read, None, &self.link.stream, None, bytes, flags) {
                Ok(0) => return Err(ChannelError::Send(io::ErrorKind::WriteZero.into())),
                Ok(moved) => bytes -= moved,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(ChannelError::Send(errno.into())),
            }
        }
        Ok(())
    }

    fn copy_memory(&self, mut slices: Vec<MemorySlice<'_>>) -> Result<(), ChannelError> {
        while !slices.is_empty() {
            match scatter::writev(&self.link.stream, &slices) {
                Ok(bytes) => scatter::advance(&mut slices, bytes as u64),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ChannelError::Send(error)),
            }
        }
        Ok(())
    }
}

impl ChannelSource for TcpSource {
    fn push_pages(&mut self, round: RoundId, runs: &[Run]) -> Result<Pushed, ChannelError> {
        let bytes: u64 = runs.iter().map(|run| run.bytes()).sum();
        let pushed = self.begin(FrameKind::Raw, round, runs, bytes as usize);
        self.send(&self.head, SendFlags::MORE)?;
        let memory = self.memory.clone();
        self.send_memory(runs.iter().flat_map(|run| memory.memory_slices(*run)).collect())?;
        Ok(pushed)
    }

    fn push_packed(&mut self, round: RoundId, runs: &[Run], packed: &[u8]) -> Result<Pushed, ChannelError> {
        let pushed = self.begin(FrameKind::Zstd, round, runs, packed.len());
        self.send(&self.head, SendFlags::MORE)?;
        self.send(packed, SendFlags::empty())?;
        Ok(pushed)
    }

    fn push_zeros(&mut self, round: RoundId, runs: &[Run]) -> Result<Pushed, ChannelError> {
        let pushed = self.begin(FrameKind::Zero, round, runs, 0);
        self.send(&self.head, SendFlags::empty())?;
        Ok(pushed)
    }

    fn push_barrier(
        &mut self,
        barrier: BarrierId,
        round: RoundId,
        fenced: &[ChannelId],
    ) -> Result<Pushed, ChannelError> {
        let sequence = self.next_sequence();
        let bytes = encode_barrier(barrier, round, sequence, fenced);
        self.send(&bytes, SendFlags::empty())?;
        Ok(Pushed { sequence, wire_bytes: bytes.len() as u64 })
    }

    fn backlog(&self) -> Option<u64> {
        unacknowledged_bytes(&self.link.stream).ok()
    }
}

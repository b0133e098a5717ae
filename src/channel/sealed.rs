//! The TCP channel under encryption: the frames of the TCP channel, over a connection that encrypts them.
//!
//! Guest RAM is copied, since what encrypts needs the bytes: in pieces of a fixed size, from the guest's pages into a private
//! buffer at the source and from one at the destination. Who is at the other end was proved before a channel is made.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::frames::{FrameLink, Frames, PIECE_BYTES, Receipts, fill, pieces};
use super::tcp::tune;
use super::{
    AcceptedChannel, Arrived, Carrier, ChannelError, ChannelLink, ChannelReceiver, ChannelSource,
    OpenChannel, Pushed,
};
use crate::memory::GuestMemory;
use crate::sys::socket::unacknowledged_bytes;
use crate::units::{RoundId, Run};
use crate::wire::data::{BarrierId, ChannelId, FrameKind, Receipt, encode_barrier, encode_pages};

/// A connection of bytes that are encrypted on their way, read by one thread and written by another.
pub trait SealedStream: Send + Sync + fmt::Debug {
    /// The socket below: for its options, addresses and end, not for bytes.
    fn socket(&self) -> &TcpStream;

    /// As [`io::Read::read`]. Where the socket has a read timeout, `WouldBlock` when it is over; it can be tried again.
    ///
    /// # Errors
    /// What the kernel answers, or what is wrong with the bytes that came.
    fn read(&self, into: &mut [u8]) -> io::Result<usize>;

    /// As [`io::Write::write`]. It is of no use any more after an error.
    ///
    /// # Errors
    /// What the kernel answers.
    fn write(&self, from: &[u8]) -> io::Result<usize>;
}

/// Makes a connection that the destination has accepted into a channel.
///
/// # Errors
/// [`ChannelError::SetUp`].
pub fn open(
    stream: Arc<dyn SealedStream>,
    memory: GuestMemory,
    link_timeout: Duration,
) -> Result<OpenChannel, ChannelError> {
    let link = Arc::new(SealedLink::new(stream, link_timeout)?);
    let sent = Arc::new(AtomicU64::new(0));
    let source = SealedSource { link: link.clone(), memory, buffer: Vec::new(), sent: sent.clone() };
    let receipts = Receipts::new(link.clone(), sent);
    Ok(OpenChannel { source: Box::new(source), receipts: Box::new(receipts), link })
}

/// Makes a connection that was accepted at the destination into the receiving end of a channel.
///
/// # Errors
/// [`ChannelError::SetUp`].
pub fn receive(
    stream: Arc<dyn SealedStream>,
    memory: GuestMemory,
    link_timeout: Duration,
) -> Result<AcceptedChannel, ChannelError> {
    let link = Arc::new(SealedLink::new(stream, link_timeout)?);
    let receiver =
        SealedReceiver { link: link.clone(), memory, frames: Frames::default(), piece: Vec::new() };
    Ok(AcceptedChannel { receiver: Box::new(receiver), link })
}

/// A connection, shared by everyone who has to do with the channel.
#[derive(Debug)]
struct SealedLink {
    stream: Arc<dyn SealedStream>,
    local: SocketAddr,
    remote: SocketAddr,
    timeout: Duration,
}

impl SealedLink {
    fn new(stream: Arc<dyn SealedStream>, timeout: Duration) -> Result<Self, ChannelError> {
        let socket = stream.socket();
        tune(socket, timeout).map_err(ChannelError::SetUp)?;
        let local = socket.local_addr().map_err(ChannelError::SetUp)?;
        let remote = socket.peer_addr().map_err(ChannelError::SetUp)?;
        Ok(Self { stream, local, remote, timeout })
    }

    fn write(&self, mut bytes: &[u8]) -> Result<(), ChannelError> {
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(0) => return Err(ChannelError::Send(io::ErrorKind::WriteZero.into())),
                Ok(written) => bytes = &bytes[written..],
                Err(error) => return Err(ChannelError::Send(error)),
            }
        }
        Ok(())
    }
}

impl FrameLink for SealedLink {
    fn read(&self, into: &mut [u8], between_frames: bool) -> Result<(), ChannelError> {
        fill(|into| self.stream.read(into), into, between_frames, self.timeout)
    }
}

impl ChannelLink for SealedLink {
    fn local(&self) -> SocketAddr {
        self.local
    }

    fn remote(&self) -> SocketAddr {
        self.remote
    }

    fn carrier(&self) -> Carrier {
        Carrier::Sealed
    }

    fn shut(&self) {
        // Fails only when it is shut already.
        let _ = self.stream.socket().shutdown(std::net::Shutdown::Both);
    }
}

struct SealedSource {
    link: Arc<SealedLink>,
    memory: GuestMemory,
    /// What goes out next: a frame's head, and pages as far as they were copied.
    buffer: Vec<u8>,
    /// The number of the last frame. Stored before the frame goes out, so that no confirmation is ahead of it.
    sent: Arc<AtomicU64>,
}

impl SealedSource {
    fn next_sequence(&mut self) -> u64 {
        self.sent.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Fills the buffer with a frame of pages up to its payload.
    fn begin(&mut self, kind: FrameKind, round: RoundId, runs: &[Run], payload: usize) -> Pushed {
        let sequence = self.next_sequence();
        self.buffer.clear();
        encode_pages(kind, round, sequence, runs, payload as u32, &mut self.buffer);
        Pushed { sequence, wire_bytes: (self.buffer.len() + payload) as u64 }
    }

    fn flush(&mut self) -> Result<(), ChannelError> {
        let sent = self.link.write(&self.buffer);
        self.buffer.clear();
        sent
    }
}

impl ChannelSource for SealedSource {
    fn push_pages(&mut self, round: RoundId, runs: &[Run]) -> Result<Pushed, ChannelError> {
        let bytes: u64 = runs.iter().map(|run| run.bytes()).sum();
        let pushed = self.begin(FrameKind::Raw, round, runs, bytes as usize);
        for piece in pieces(runs) {
            self.memory.read_run(piece, &mut self.buffer);
            // Short runs go together.
            if self.buffer.len() as u64 >= PIECE_BYTES {
                self.flush()?;
            }
        }
        self.flush()?;
        Ok(pushed)
    }

    fn push_packed(&mut self, round: RoundId, runs: &[Run], packed: &[u8]) -> Result<Pushed, ChannelError> {
        let pushed = self.begin(FrameKind::Zstd, round, runs, packed.len());
        self.flush()?;
        self.link.write(packed)?;
        Ok(pushed)
    }

    fn push_zeros(&mut self, round: RoundId, runs: &[Run]) -> Result<Pushed, ChannelError> {
        let pushed = self.begin(FrameKind::Zero, round, runs, 0);
        self.flush()?;
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
        self.link.write(&bytes)?;
        Ok(Pushed { sequence, wire_bytes: bytes.len() as u64 })
    }

    fn backlog(&self) -> Option<u64> {
        // With what encryption adds, which is a thousandth.
        unacknowledged_bytes(self.link.stream.socket()).ok()
    }
}

struct SealedReceiver {
    link: Arc<SealedLink>,
    memory: GuestMemory,
    frames: Frames,
    /// Pages that have come and are not in memory yet.
    piece: Vec<u8>,
}

impl ChannelReceiver for SealedReceiver {
    fn next(&mut self, about_to_place: &mut dyn FnMut(&[Run])) -> Result<Arrived<'_>, ChannelError> {
        let Self { link, memory, frames, piece } = self;
        frames.next(&**link, memory, about_to_place, |runs, _| {
            let mut placing = Duration::ZERO;
            for run in pieces(runs) {
                piece.resize(run.bytes() as usize, 0);
                link.read(piece, false)?;
                let began = Instant::now();
                memory.fill_run(run, piece);
                placing += began.elapsed();
            }
            Ok(placing)
        })
    }

    fn confirm(&mut self, receipt: &Receipt) -> Result<(), ChannelError> {
        self.link.write(&receipt.encode())
    }
}

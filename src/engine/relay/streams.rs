//! The connections of a hypervisor at one end: what comes from the network is written to them, in order, by a thread each; what
//! comes from them goes to the network within a window.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::{RelayError, lock, spawn};
use crate::guest::qemu::multifd;
use crate::memory::GuestMemory;
use crate::session::ControlLink;
use crate::sys::scatter::{self, MemorySlice};
use crate::units::PAGE_SIZE;
use crate::wire::relay::{MAX_STREAM_BYTES, RelayMessage, STREAM_WINDOW};

/// Something that happened on one of an end's own threads, for the thread that decides.
#[derive(Debug)]
pub(super) enum Event {
    /// The other end decides something.
    Message(RelayMessage),
    /// It cannot go on.
    Failed(RelayError),
    /// QEMU took no more bytes of a connection: what that means, QEMU's state tells.
    Broken(RelayError),
    /// For people.
    Warning(String),
}

/// How many bytes of a stream may be under way.
#[derive(Debug)]
pub(super) struct Window {
    state: Mutex<(u64, bool)>,
    changed: Condvar,
}

impl Window {
    fn new() -> Self {
        Self { state: Mutex::new((STREAM_WINDOW, false)), changed: Condvar::new() }
    }

    /// Waits until so many bytes fit; `false` when all is over.
    pub(super) fn take(&self, bytes: u64) -> bool {
        let mut state = lock(&self.state);
        loop {
            let (free, over) = *state;
            if over {
                return false;
            }
            if free >= bytes {
                state.0 -= bytes;
                return true;
            }
            state = self.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    fn give(&self, bytes: u64) -> Result<(), RelayError> {
        let mut state = lock(&self.state);
        state.0 = state.0.saturating_add(bytes);
        if state.0 > STREAM_WINDOW {
            return Err(RelayError::Violation("it has passed on more of a stream than it was sent"));
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    fn end(&self) {
        lock(&self.state).1 = true;
        self.changed.notify_all();
    }
}

/// Something for a connection.
#[derive(Debug)]
enum Piece {
    Bytes(Vec<u8>),
    Packet { header: Vec<u8>, page: u32, bytes: u32 },
    End,
}

/// A connection of the hypervisor.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) id: u32,
    /// Whether it is known to be a multifd channel.
    multifd: bool,
    pub(super) socket: UnixStream,
    pub(super) window: Window,
    queue: Sender<Piece>,
    /// Bytes that came for it and are not written yet.
    waiting: Arc<AtomicU64>,
}

/// All connections of one end.
#[derive(Debug)]
pub(super) struct Streams {
    link: Arc<ControlLink>,
    memory: GuestMemory,
    events: Sender<Event>,
    /// Whether connections are cut when it cannot go on; they are finished otherwise, by [`Streams::finish`].
    cuts: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    streams: BTreeMap<u32, Arc<Stream>>,
    threads: Vec<JoinHandle<()>>,
    over: bool,
}

impl Streams {
    pub(super) fn new(
        link: Arc<ControlLink>,
        memory: GuestMemory,
        events: Sender<Event>,
        cuts: bool,
    ) -> Self {
        Self { link, memory, events, cuts, state: Mutex::default() }
    }

    /// The staging memory's mapping is the last.
    pub(super) fn staging(&self) -> &crate::memory::Mapping {
        let mappings = self.memory.mappings();
        &mappings[mappings.len() - 1]
    }

    pub(super) fn say(&self, message: &RelayMessage) {
        self.link.send(message.encode());
    }

    /// Tells whoever decides. When it cannot go on, QEMU's connections end at once and not when that thread comes to it: it may be
    /// waiting for an answer of QEMU, which answers nobody while it waits for its connections with the guest stopped.
    pub(super) fn tell(&self, event: Event) {
        let cuts = self.cuts && matches!(event, Event::Failed(_) | Event::Message(RelayMessage::Abort(_)));
        // Before QEMU says that it failed. Whoever decides may have decided.
        let _ = self.events.send(event);
        if cuts {
            self.shut();
        }
    }

    /// Takes a connection in, and starts the thread that writes to it.
    pub(super) fn add(
        self: &Arc<Self>,
        id: u32,
        multifd: bool,
        socket: UnixStream,
    ) -> Result<Arc<Stream>, RelayError> {
        let writes = socket.try_clone().map_err(RelayError::Stream)?;
        let (queue, pieces) = unbounded();
        let waiting = Arc::new(AtomicU64::new(0));
        let stream =
            Arc::new(Stream { id, multifd, socket, window: Window::new(), queue, waiting: waiting.clone() });
        let mut state = lock(&self.state);
        if state.over {
            return Err(RelayError::Cancelled);
        }
        // It does not hold the stream, with which its queue would never end.
        let streams = self.clone();
        let thread = spawn("pf-relay-out", move || streams.write((id, &waiting), writes, &pieces))?;
        state.threads.push(thread);
        state.streams.insert(id, stream.clone());
        Ok(stream)
    }

    pub(super) fn get(&self, id: u32) -> Option<Arc<Stream>> {
        lock(&self.state).streams.get(&id).cloned()
    }

    /// Leads what the other end sent for a connection to it. Other messages are answered.
    pub(super) fn deliver(&self, message: RelayMessage) -> Result<Option<RelayMessage>, RelayError> {
        let (stream, piece, bytes) = match message {
            RelayMessage::Bytes { stream, bytes } => {
                let length = bytes.len() as u64;
                (stream, Piece::Bytes(bytes), length)
            }
            RelayMessage::Packet { stream, header, page, bytes } => {
                if u64::from(page) * PAGE_SIZE + u64::from(bytes) > self.staging().bytes() {
                    return Err(RelayError::Violation("a packet lies outside the memory for packets"));
                }
                let length = header.len() as u64;
                (stream, Piece::Packet { header, page, bytes }, length)
            }
            RelayMessage::End { stream } => (stream, Piece::End, 0),
            RelayMessage::Passed { stream, bytes } => {
                let stream = self.get(stream).ok_or(RelayError::Violation("there is no such stream"))?;
                stream.window.give(bytes)?;
                return Ok(None);
            }
            other => return Ok(Some(other)),
        };
        let stream = self.get(stream).ok_or(RelayError::Violation("there is no such stream"))?;
        if stream.waiting.fetch_add(bytes, Ordering::Relaxed) + bytes > STREAM_WINDOW {
            return Err(RelayError::Violation("it sends more of a stream than its window holds"));
        }
        // The thread lives as long as the queue.
        let _ = stream.queue.send(piece);
        Ok(None)
    }

    /// The thread that writes to a connection. When that breaks, it goes on taking what comes, so that nobody waits for it.
    fn write(&self, (id, waiting): (u32, &AtomicU64), mut socket: UnixStream, pieces: &Receiver<Piece>) {
        let mut broken = false;
        for piece in pieces {
            let written = match &piece {
                _ if broken => Ok(()),
                Piece::Bytes(bytes) => socket.write_all(bytes),
                Piece::Packet { header, page, bytes } => {
                    socket.write_all(header).and_then(|()| self.write_packet(&socket, *page, *bytes))
                }
                Piece::End => {
                    // QEMU may have closed its end first.
                    let _ = socket.shutdown(Shutdown::Write);
                    Ok(())
                }
            };
            if let Err(cause) = written {
                broken = true;
                self.tell(Event::Broken(RelayError::Stream(cause)));
            }
            let passed = |bytes: &[u8]| {
                let bytes = bytes.len() as u64;
                waiting.fetch_sub(bytes, Ordering::Relaxed);
                self.say(&RelayMessage::Passed { stream: id, bytes });
            };
            match piece {
                Piece::Bytes(bytes) => passed(&bytes),
                Piece::Packet { header, page, .. } => {
                    passed(&header);
                    self.say(&RelayMessage::Free { page });
                }
                Piece::End => {}
            }
        }
    }

    fn write_packet(&self, socket: &UnixStream, page: u32, bytes: u32) -> std::io::Result<()> {
        let mut left = vec![MemorySlice::new(self.staging(), u64::from(page) * PAGE_SIZE, u64::from(bytes))];
        while left.first().is_some_and(|slice| slice.bytes() > 0) {
            match scatter::writev(socket, &left) {
                Ok(bytes) => scatter::advance(&mut left, bytes as u64),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends what comes from a connection as it is, `first` before it, until the connection ends.
    pub(super) fn carry(&self, stream: &Stream, first: Vec<u8>) {
        let mut bytes = first;
        let mut socket = &stream.socket;
        loop {
            if !bytes.is_empty() {
                if !stream.window.take(bytes.len() as u64) {
                    return;
                }
                self.say(&RelayMessage::Bytes { stream: stream.id, bytes });
            }
            bytes = vec![0; MAX_STREAM_BYTES];
            let got = match socket.read(&mut bytes) {
                Ok(got) => got,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                // A QEMU that has died; its QMP socket says so as well.
                Err(_) => 0,
            };
            if got == 0 {
                return self.say(&RelayMessage::End { stream: stream.id });
            }
            bytes.truncate(got);
        }
    }

    /// Lets a QEMU that waits for pages find out that none come any more. Its thread that answers QMP waits until every multifd channel
    /// has sent a SYNC packet, and waits for ever when one has ended instead (QEMU 10.0). So each sends one and ends, and the main
    /// channel ends in the middle, by which the load fails.
    pub(super) fn finish(&self) {
        for stream in lock(&self.state).streams.values() {
            if stream.multifd {
                stream.waiting.fetch_add(multifd::PACKET_BYTES as u64, Ordering::Relaxed);
                let _ = stream.queue.send(Piece::Bytes(multifd::sync_packet().to_vec()));
            }
            let _ = stream.queue.send(Piece::End);
        }
    }

    /// Closes every connection, and takes none any more: QEMU sees its migration fail if it was not over.
    pub(super) fn shut(&self) {
        let mut state = lock(&self.state);
        state.over = true;
        for stream in state.streams.values() {
            let _ = stream.socket.shutdown(Shutdown::Both);
            stream.window.end();
        }
    }

    /// Waits for the threads, after [`Streams::shut`].
    pub(super) fn join(&self) {
        let (streams, threads) = {
            let mut state = lock(&self.state);
            (std::mem::take(&mut state.streams), std::mem::take(&mut state.threads))
        };
        // With the last handle on a stream its queue ends.
        drop(streams);
        for thread in threads {
            // A thread that panicked has ended as well.
            let _ = thread.join();
        }
    }
}

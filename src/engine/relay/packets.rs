//! The source QEMU's multifd channels: packets taken apart, their pages handed to the session.

use std::io::{self, Read as _};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::batch::{Batch, Next};
use super::discard::Discard;
use super::staging::Staging;
use super::streams::{Event, Stream, Streams};
use super::{RelayError, lock, pages_of};
use crate::guest::qemu::multifd::{
    self, DEVICE_STATE_BYTES, HEAD_BYTES, Head, INIT_BYTES, Init, MAIN_MAGIC, PACKET_BYTES, PagesPacket,
};
use crate::session::SourceSession;
use crate::sys::scatter::{self, MemorySlice};
use crate::units::{PAGE_SIZE, RoundId, Run};
use crate::wire::relay::{MAX_STREAMS, RelayMessage};

/// How long a reader waits for room before it looks whether all is over.
const LOOK: Duration = Duration::from_millis(100);

/// A block whose pages are placed.
#[derive(Clone, Debug)]
pub(super) struct PlacedBlock {
    pub(super) name: String,
    /// Its first page in the session's memory, and how many it has.
    pub(super) pages: Run,
}

/// What the threads of a source share that read QEMU's connections.
#[derive(Debug)]
pub(super) struct Carrier {
    pub(super) streams: Arc<Streams>,
    session: SourceSession,
    placed: Vec<PlacedBlock>,
    /// The first page of the staging memory in the session's memory.
    staging_first: u64,
    pub(super) staging: Staging,
    batch: Mutex<Batch<RelayMessage>>,
    room: Condvar,
    /// Whether QEMU encrypts its channels: then there is nothing to be seen in them.
    opaque: bool,
    next_stream: AtomicU32,
    began: Instant,
    over: AtomicBool,
}

impl Carrier {
    pub(super) fn new(
        streams: Arc<Streams>,
        session: SourceSession,
        placed: Vec<PlacedBlock>,
        memory_pages: u64,
        opaque: bool,
    ) -> Self {
        let staging_pages = pages_of(streams.staging().bytes());
        Self {
            streams,
            session,
            placed,
            staging_first: memory_pages - staging_pages,
            staging: Staging::new(staging_pages),
            batch: Mutex::new(Batch::new(memory_pages)),
            room: Condvar::new(),
            opaque,
            next_stream: AtomicU32::new(0),
            began: Instant::now(),
            over: AtomicBool::new(false),
        }
    }

    pub(super) fn session(&self) -> &SourceSession {
        &self.session
    }

    /// Ends every wait, and every connection of QEMU.
    pub(super) fn shut(&self) {
        self.over.store(true, Ordering::Relaxed);
        self.staging.end();
        self.streams.shut();
        self.room.notify_all();
    }

    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// A round of the session is placed.
    pub(super) fn placed(&self, round: RoundId) {
        let mut batch = lock(&self.batch);
        for message in batch.placed(round, self.began.elapsed()) {
            self.streams.say(&message);
        }
        self.advance(batch);
    }

    /// Begins the next round, or sends what waits for none. Under the lock, so that the order stays.
    fn advance(&self, mut batch: MutexGuard<'_, Batch<RelayMessage>>) {
        match batch.next(self.began.elapsed()) {
            Next::Nothing => {}
            Next::Send(messages) => messages.iter().for_each(|message| self.streams.say(message)),
            Next::Round(round, pages) => self.session.place(round, pages),
        }
        drop(batch);
        self.room.notify_all();
    }

    /// Hands pages over, and a message that follows them, once there is room.
    fn hand_over(&self, runs: impl IntoIterator<Item = Run>, message: Option<RelayMessage>) {
        let mut batch = lock(&self.batch);
        while !batch.has_room() && !self.is_over() {
            batch = self.room.wait_timeout(batch, LOOK).unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
        let mut runs = runs.into_iter().peekable();
        if runs.peek().is_some() {
            batch.add(runs);
        }
        message.into_iter().for_each(|message| batch.add_message(message));
        self.advance(batch);
    }

    /// The thread of a connection of QEMU.
    pub(super) fn read(&self, socket: UnixStream) {
        if let Err(error) = self.read_stream(socket)
            && !self.is_over()
        {
            self.streams.tell(Event::Failed(error));
        }
    }

    fn read_stream(&self, mut socket: UnixStream) -> Result<(), RelayError> {
        // The destination connects for it when there is something to say: its QEMU looks at the first bytes.
        let mut first = [0; 4];
        match fill(&mut socket, &mut first) {
            Ok(true) => {}
            // QEMU tried a connection and left it.
            Ok(false) => return Ok(()),
            Err(cause) => return Err(RelayError::Stream(cause)),
        }
        let id = self.next_stream.fetch_add(1, Ordering::Relaxed);
        if id >= MAX_STREAMS {
            return Err(RelayError::Violation("QEMU makes more connections than multifd has channels"));
        }
        let magic = u32::from_be_bytes(first);
        let multifd = !self.opaque && magic == multifd::MAGIC;
        let stream = self.streams.add(id, multifd, socket)?;
        if self.opaque || magic == MAIN_MAGIC {
            self.streams.carry(&stream, first.to_vec());
            return Ok(());
        }
        self.read_packets(&stream, first)
    }

    fn read_packets(&self, stream: &Stream, first: [u8; 4]) -> Result<(), RelayError> {
        let mut socket = &stream.socket;
        let mut init = [0; INIT_BYTES];
        init[..4].copy_from_slice(&first);
        socket.read_exact(&mut init[4..]).map_err(RelayError::Stream)?;
        Init::decode(&init)?;
        self.forward(stream, init.to_vec());
        let discard = Discard::new().map_err(RelayError::Stream)?;
        loop {
            let mut head = [0; HEAD_BYTES];
            if !fill(&mut socket, &mut head).map_err(RelayError::Stream)? {
                self.hand_over([], Some(RelayMessage::End { stream: stream.id }));
                return Ok(());
            }
            match Head::decode(&head)? {
                Head::Pages => self.read_pages(stream, head, &discard)?,
                Head::DeviceState => {
                    let mut header = [0; DEVICE_STATE_BYTES];
                    header[..HEAD_BYTES].copy_from_slice(&head);
                    socket.read_exact(&mut header[HEAD_BYTES..]).map_err(RelayError::Stream)?;
                    let bytes = multifd::state_bytes(&header)?;
                    self.carry_packet(stream, header.to_vec(), bytes)?;
                }
            }
        }
    }

    fn read_pages(
        &self,
        stream: &Stream,
        head: [u8; HEAD_BYTES],
        discard: &Discard,
    ) -> Result<(), RelayError> {
        let mut socket = &stream.socket;
        let mut header = [0; PACKET_BYTES];
        header[..HEAD_BYTES].copy_from_slice(&head);
        socket.read_exact(&mut header[HEAD_BYTES..]).map_err(RelayError::Stream)?;
        let packet = PagesPacket::decode(&header)?;
        let block = self.placed.iter().find(|block| block.name == packet.block);
        let Some(block) = block.filter(|_| packet.normal.len() + packet.zero.len() > 0) else {
            return self.carry_packet(stream, header.to_vec(), packet.payload_bytes() as u32);
        };
        let runs = |offsets: &[u64]| {
            multifd::runs_at(offsets, block.pages.start.0, block.pages.pages)
                .ok_or_else(|| RelayError::Outside(packet.block.clone()))
        };
        // What the memory holds from now on is at least as new as what follows in the connection: QEMU cleared the pages' dirty bits
        // before it read them, so a page that is written from here on comes again.
        let message = packet.sync.then(|| {
            multifd::empty(&mut header);
            RelayMessage::Bytes { stream: stream.id, bytes: header.to_vec() }
        });
        if message.is_some() && !stream.window.take(PACKET_BYTES as u64) {
            return Ok(());
        }
        self.hand_over(runs(&packet.normal)?.into_iter().chain(runs(&packet.zero)?), message);
        discard.skip(socket, packet.payload_bytes()).map_err(RelayError::Stream)
    }

    /// A header that goes on after everything before it.
    fn forward(&self, stream: &Stream, bytes: Vec<u8>) {
        if stream.window.take(bytes.len() as u64) {
            self.hand_over([], Some(RelayMessage::Bytes { stream: stream.id, bytes }));
        }
    }

    /// A packet that goes on as it is, its content through the staging memory.
    fn carry_packet(&self, stream: &Stream, header: Vec<u8>, bytes: u32) -> Result<(), RelayError> {
        if bytes == 0 {
            self.forward(stream, header);
            return Ok(());
        }
        let pages = pages_of(u64::from(bytes));
        let Some(page) = self.staging.take(pages) else { return Ok(()) };
        let offset = u64::from(page) * PAGE_SIZE;
        let mut left = vec![MemorySlice::new(self.streams.staging(), offset, u64::from(bytes))];
        while left.first().is_some_and(|slice| slice.bytes() > 0) {
            match scatter::readv(&stream.socket, &left) {
                Ok(0) => return Err(RelayError::Stream(io::ErrorKind::UnexpectedEof.into())),
                Ok(got) => scatter::advance(&mut left, got as u64),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(RelayError::Stream(error)),
            }
        }
        if !stream.window.take(header.len() as u64) {
            return Ok(());
        }
        let message = RelayMessage::Packet { stream: stream.id, header, page, bytes };
        self.hand_over([Run::new(self.staging_first + u64::from(page), pages)], Some(message));
        Ok(())
    }
}

/// Fills `into`; `false` when the connection ends before its first byte.
fn fill(socket: &mut (impl io::Read + ?Sized), into: &mut [u8]) -> io::Result<bool> {
    let mut got = 0;
    while got < into.len() {
        match socket.read(&mut into[got..]) {
            Ok(0) if got == 0 => return Ok(false),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(bytes) => got += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

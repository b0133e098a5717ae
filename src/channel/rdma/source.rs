//! The source's end of an RDMA channel.
//!
//! The pushing thread posts writes and waits for room, credits and keys; the thread that waits for confirmations also reads
//! completions and keys, and tells it. Both share [`Shared`].

use std::net::TcpStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::fabric::{
    Access, Completion, Completions, Connection, Depths, Port, Region, Remote, Request, SendOperation,
};
use super::link::{RdmaLink, Slots, connection, try_out, wait};
use super::pieces::Pieces;
use super::posting::Posting;
use super::registered::{RdmaMemory, Registered};
use super::{FRAMES, RdmaError, RdmaOptions};
use crate::channel::{ChannelError, ChannelLink, ChannelReceipts, ChannelSource, OpenChannel, Pushed};
use crate::sys::verbs::Status;
use crate::units::{PAGE_SIZE, RoundId, Run};
use crate::wire::data::{
    BarrierId, ChannelId, FrameKind, HEADER_BYTES, RECEIPT_BYTES, Receipt, encode_barrier, encode_pages,
    encode_written,
};
use crate::wire::rdma::{
    ANSWER_BYTES, Answer, AnswerHeader, End, FromDestination, FromDestinationHeader, Offer, Want,
};

/// How long a piece may take to be registered at either end, while others are.
const REGISTERED_WITHIN: Duration = Duration::from_secs(30);
/// How often a wait looks whether the channel still lives.
const LOOK: Duration = Duration::from_millis(200);
/// How long a queue pair may take to fail after the destination closed its connection.
const A_MOMENT: Duration = Duration::from_millis(200);
/// Requests that are posted together at most.
const POST_AT_ONCE: usize = 64;

/// Makes a connection, which the destination has accepted for RDMA, into a channel. `wanted` are the pages that are going
/// to be sent, as far as that is known.
///
/// # Errors
/// [`ChannelError::Rdma`] when it is not to be had, on either side, or what broke.
pub fn open(
    stream: TcpStream,
    memory: &RdmaMemory,
    wanted: &crate::pageset::PageSet,
    options: &RdmaOptions,
) -> Result<OpenChannel, ChannelError> {
    let local = stream.local_addr().map_err(ChannelError::SetUp)?.ip();
    let port = memory.fabric().port_at(local.to_canonical()).map_err(RdmaError::Absent)?;
    let opened = open_on(stream, memory, wanted, options, &port);
    if let Err(ChannelError::Rdma(RdmaError::Device { device, .. })) = &opened {
        memory.forget(device);
    }
    opened
}

fn open_on(
    stream: TcpStream,
    memory: &RdmaMemory,
    wanted: &crate::pageset::PageSet,
    options: &RdmaOptions,
    port: &Port,
) -> Result<OpenChannel, ChannelError> {
    let pieces = Pieces::of(memory.memory().layout());
    let wanted = pieces.with_pages(wanted);
    let registered = memory.on(&port.device, &pieces, &wanted)?;
    let depth = options.queue_depth.min(port.queue_depth).max(1);
    let depths = Depths { send: depth, receive: 1, segments: 1 };
    let made = registered.domain.queue_pair(depths).map_err(RdmaError::device(&port.device))?;
    let Connection { queue_pair, sent, .. } = made;
    let packet = first_packet()?;
    let link = RdmaLink::new(stream, queue_pair, port.clone(), options.link_timeout)?;
    let end = End {
        queue_pair: link.with_queue_pair(|queue_pair| Ok(queue_pair.number()))?,
        packet,
        mtu: options.mtu.min(port.mtu),
        gid: port.gid,
    };
    let offer = Offer { end, frames: FRAMES, piece_bytes: pieces.piece_bytes(), map: pieces.to_map(&wanted) };
    link.write(&offer.encode())?;
    let (theirs, frames) = read_answer(&link)?;
    let remote = Remote {
        queue_pair: theirs.queue_pair,
        packet: theirs.packet,
        gid: theirs.gid,
        local_gid_index: port.gid_index,
        mtu: theirs.mtu.min(end.mtu),
        traffic_class: 0,
    };
    let retries = options.retries();
    link.with_queue_pair(|queue_pair| {
        queue_pair.receive_from(port.number, &remote, &retries, false)?;
        queue_pair.send_from(packet, &retries)
    })?;
    try_out(&link, &*sent)?;
    let frames = frames.min(FRAMES);
    let slots = Slots::new(&*registered.domain, frames, Access::LocalRead)?;
    tracing::info!(
        device = port.device, port = port.number, gid = %std::net::Ipv6Addr::from(port.gid), mtu = remote.mtu, depth,
        peer = %link.remote(), "an RDMA queue pair is connected"
    );
    let shared = Shared {
        link: Arc::new(link),
        sent,
        state: Mutex::new(State {
            posting: Posting::new(depth, frames),
            keys: vec![Key::Unknown; pieces.count() as usize],
            completions: Vec::new(),
            failed: None,
        }),
        pieces: pieces.count(),
        changed: Condvar::new(),
    };
    shared.sent.arm().map_err(|cause| shared.link.device_error(cause))?;
    let mut state = shared.lock();
    for piece in wanted {
        state.keys[piece as usize] = Key::Asked;
    }
    drop(state);
    let shared = Arc::new(shared);
    let source = RdmaSource {
        shared: shared.clone(),
        registered: registered.clone(),
        slots,
        local: vec![None; pieces.count() as usize],
        pieces,
        requests: Vec::new(),
        depth: u64::from(depth),
        head: Vec::new(),
    };
    let link = shared.link.clone();
    Ok(OpenChannel {
        source: Box::new(source),
        receipts: Box::new(RdmaReceipts { shared, registered }),
        link,
    })
}

/// Where packets begin to be numbered: at random, so that what is left of an earlier connection does not fit.
pub(super) fn first_packet() -> Result<u32, ChannelError> {
    let mut random = [0; 4];
    getrandom::fill(&mut random).map_err(|error| ChannelError::SetUp(std::io::Error::other(error)))?;
    Ok(u32::from_le_bytes(random) & 0xff_ffff)
}

fn read_answer(link: &RdmaLink) -> Result<(End, u32), ChannelError> {
    let mut head = [0; ANSWER_BYTES];
    link.read(&mut head)?;
    let header = AnswerHeader::decode(&head).map_err(RdmaError::Frame)?;
    let mut text = vec![0; header.text_bytes()];
    link.read(&mut text)?;
    match header.with_text(&text) {
        Answer::Taken { end, frames } => Ok((end, frames)),
        Answer::Refused(text) => Err(RdmaError::Refused(text).into()),
    }
}

/// What the source knows of a piece at the destination.
#[derive(Clone, Debug)]
enum Key {
    Unknown,
    /// It was asked for.
    Asked,
    Known {
        key: u32,
        address: u64,
    },
    Refused(String),
}

#[derive(Debug)]
struct State {
    posting: Posting,
    keys: Vec<Key>,
    /// Kept for its room.
    completions: Vec<Completion>,
    failed: Option<RdmaError>,
}

#[derive(Debug)]
struct Shared {
    link: Arc<RdmaLink>,
    sent: Arc<dyn Completions>,
    state: Mutex<State>,
    pieces: u32,
    /// Room, credits, keys, or the end.
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the completions that are there.
    fn reap(&self, state: &mut State) -> Result<(), ChannelError> {
        let mut completions = std::mem::take(&mut state.completions);
        completions.clear();
        let polled = self.sent.poll(&mut completions);
        for completion in &completions {
            if completion.status != Status::SUCCESS {
                // The first failure is the cause; all after it are flushed.
                state.failed.get_or_insert(RdmaError::Work(completion.status));
            } else if state.posting.completed(completion.id).is_err() {
                state.failed.get_or_insert(RdmaError::Work(Status::LOCAL_FAULT));
            }
        }
        state.completions = completions;
        polled.map_err(|cause| self.link.device_error(cause))?;
        match &state.failed {
            Some(failed) => Err(failed.clone().into()),
            None => Ok(()),
        }
    }

    /// Waits until `ready` answers something, at most for `patience` if there is one.
    fn wait<T>(
        &self,
        patience: Option<(Duration, &'static str)>,
        mut ready: impl FnMut(&mut State) -> Option<Result<T, RdmaError>>,
    ) -> Result<T, ChannelError> {
        let begin = Instant::now();
        let mut state = self.lock();
        loop {
            self.reap(&mut state)?;
            if let Some(answer) = ready(&mut state) {
                return Ok(answer?);
            }
            if self.link.is_shut() {
                return Err(ChannelError::Closed);
            }
            if let Some((patience, what)) = patience.filter(|(patience, _)| begin.elapsed() > *patience) {
                return Err(RdmaError::Late { what, seconds: patience.as_secs() }.into());
            }
            state = self.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Takes in a key of the destination.
    fn learn(&self, piece: u32, key: Key) {
        self.lock().keys[piece as usize] = key;
        self.changed.notify_all();
    }

    fn confirmed(&self, receipt: &Receipt) -> Result<(), ChannelError> {
        let mut state = self.lock();
        match receipt {
            Receipt::Placed(frame) => {
                let sent = state.posting.sent();
                let known = state.posting.confirmed(*frame);
                known.map_err(|_| ChannelError::ConfirmsTooMuch { got: *frame, sent })?;
            }
            Receipt::Barrier(barrier) => state.posting.reached(barrier.0),
            Receipt::Error(_) => {}
        }
        self.changed.notify_all();
        Ok(())
    }
}

struct RdmaSource {
    shared: Arc<Shared>,
    registered: Arc<Registered>,
    slots: Slots,
    pieces: Pieces,
    /// This end's pieces, as far as they were used. Held for as long as the queue pair may read them.
    local: Vec<Option<Arc<dyn Region>>>,
    requests: Vec<Request>,
    depth: u64,
    head: Vec<u8>,
}

impl Drop for RdmaSource {
    fn drop(&mut self) {
        // Before the memory is: the device lets go of it.
        self.shared.link.shut();
    }
}

impl RdmaSource {
    /// Waits for a buffer at the destination, and takes it.
    fn begin_frame(&self, barrier: Option<BarrierId>) -> Result<u64, ChannelError> {
        self.shared.wait(None, |state| {
            state.posting.has_credit().then(|| {
                Ok(match barrier {
                    Some(barrier) => state.posting.begin_barrier(barrier.0),
                    None => state.posting.begin_frame(),
                })
            })
        })
    }

    /// Adds the writes of a run.
    fn write(&mut self, run: Run) -> Result<(), ChannelError> {
        let parts: Vec<_> = self.pieces.parts(run).collect();
        for part in parts {
            let (key, address) = self.key(part.piece)?;
            let segment = self.local(part.piece)?.segment(part.offset, part.bytes as u32);
            let segment = segment.map_err(|cause| self.shared.link.device_error(cause))?;
            let operation = SendOperation::Write { address: address + part.offset, key, immediate: None };
            self.requests.push(Request { id: 0, operation, segment: Some(segment), signalled: false });
            if self.requests.len() >= POST_AT_ONCE.min(self.depth as usize) {
                self.post()?;
            }
        }
        Ok(())
    }

    /// The destination's key of a piece, and where it begins there.
    fn key(&self, piece: u32) -> Result<(u32, u64), ChannelError> {
        let at = piece as usize;
        {
            let mut state = self.shared.lock();
            match &state.keys[at] {
                Key::Known { key, address } => return Ok((*key, *address)),
                Key::Unknown => {
                    state.keys[at] = Key::Asked;
                    drop(state);
                    self.shared.link.write(&Want(piece).encode())?;
                }
                Key::Asked | Key::Refused(_) => {}
            }
        }
        self.shared.wait(Some((REGISTERED_WITHIN, "a key of the destination's memory")), |state| match &state
            .keys[at]
        {
            Key::Known { key, address } => Some(Ok((*key, *address))),
            Key::Refused(text) => Some(Err(RdmaError::NoKey(text.clone()))),
            Key::Unknown | Key::Asked => None,
        })
    }

    /// A piece of this end, registered.
    fn local(&mut self, piece: u32) -> Result<&Arc<dyn Region>, ChannelError> {
        let shared = &self.shared;
        let slot = &mut self.local[piece as usize];
        match slot {
            Some(region) => Ok(region),
            None => {
                let region = self.registered.wait(piece, REGISTERED_WITHIN, &|| !shared.link.is_shut())?;
                Ok(slot.insert(region))
            }
        }
    }

    /// Sends the header and table that are in `head` behind the writes.
    fn send_head(&mut self, frame: u64) -> Result<(), ChannelError> {
        let segment = self.slots.write(frame, &self.head);
        let segment = segment.map_err(|cause| self.shared.link.device_error(cause))?;
        let operation = SendOperation::Send { immediate: None };
        self.requests.push(Request { id: 0, operation, segment: Some(segment), signalled: false });
        self.post()
    }

    /// Posts what was added, all together, when the queue has room.
    fn post(&mut self) -> Result<(), ChannelError> {
        let requests = &mut self.requests;
        let count = requests.len();
        self.shared.wait(None, |state| {
            (state.posting.room() >= count as u64).then(|| {
                for (index, request) in requests.iter_mut().enumerate() {
                    (request.id, request.signalled) = state.posting.next_request(index + 1 == count);
                }
                Ok(())
            })
        })?;
        self.shared.link.post_send(requests)?;
        requests.clear();
        Ok(())
    }
}

impl ChannelSource for RdmaSource {
    fn push_pages(&mut self, round: RoundId, runs: &[Run]) -> Result<Pushed, ChannelError> {
        let sequence = self.begin_frame(None)?;
        for run in runs {
            self.write(*run)?;
        }
        let pages: u64 = runs.iter().map(|run| run.pages).sum();
        self.head.clear();
        self.head.extend(encode_written(pages, round, sequence));
        self.send_head(sequence)?;
        Ok(Pushed { sequence, wire_bytes: HEADER_BYTES as u64 + pages * PAGE_SIZE })
    }

    /// A wire that writes memory cannot take pages apart: they go as they are.
    fn push_packed(&mut self, round: RoundId, runs: &[Run], _packed: &[u8]) -> Result<Pushed, ChannelError> {
        self.push_pages(round, runs)
    }

    fn push_zeros(&mut self, round: RoundId, runs: &[Run]) -> Result<Pushed, ChannelError> {
        let sequence = self.begin_frame(None)?;
        self.head.clear();
        encode_pages(FrameKind::Zero, round, sequence, runs, 0, &mut self.head);
        self.send_head(sequence)?;
        Ok(Pushed { sequence, wire_bytes: self.head.len() as u64 })
    }

    fn push_barrier(
        &mut self,
        barrier: BarrierId,
        round: RoundId,
        fenced: &[ChannelId],
    ) -> Result<Pushed, ChannelError> {
        let sequence = self.begin_frame(Some(barrier))?;
        self.head = encode_barrier(barrier, round, sequence, fenced);
        self.send_head(sequence)?;
        Ok(Pushed { sequence, wire_bytes: self.head.len() as u64 })
    }

    fn backlog(&self) -> Option<u64> {
        None
    }
}

struct RdmaReceipts {
    shared: Arc<Shared>,
    registered: Arc<Registered>,
}

impl Drop for RdmaReceipts {
    fn drop(&mut self) {
        // The other thread waits for what nobody reads any more.
        self.shared.link.shut();
        self.shared.changed.notify_all();
    }
}

impl RdmaReceipts {
    fn read(&self) -> Result<FromDestination, ChannelError> {
        let link = &self.shared.link;
        let mut head = [0; RECEIPT_BYTES];
        link.read(&mut head)?;
        let header = FromDestinationHeader::decode(&head, self.shared.pieces).map_err(RdmaError::Frame)?;
        let mut rest = vec![0; header.rest_bytes()];
        link.read(&mut rest)?;
        Ok(header.with_rest(&rest))
    }

    /// Why the connection is closed: a queue pair that fails is closed by the destination at once, and how it failed is known here
    /// a moment later.
    fn closed(&self, error: ChannelError) -> ChannelError {
        if !matches!(error, ChannelError::Closed) || self.shared.link.is_shut() {
            return error;
        }
        let _ = wait([self.shared.sent.event_descriptor()], A_MOMENT);
        self.complete().err().unwrap_or(error)
    }

    /// Takes what has completed, and asks to be told of more.
    fn complete(&self) -> Result<(), ChannelError> {
        let failed = |cause| self.shared.link.device_error(cause);
        self.shared.sent.take_events().map_err(failed)?;
        self.shared.sent.arm().map_err(failed)?;
        let mut state = self.shared.lock();
        let reaped = self.shared.reap(&mut state);
        drop(state);
        self.shared.changed.notify_all();
        reaped
    }
}

impl ChannelReceipts for RdmaReceipts {
    fn next(&mut self) -> Result<Receipt, ChannelError> {
        loop {
            let link = &self.shared.link;
            let [event, gone] = self.registered.domain.watched();
            let watched = [connection(link), self.shared.sent.event_descriptor(), event, gone];
            let [told, completed, event, gone] = wait(watched, link.timeout)?;
            if event || gone {
                self.registered.check_device()?;
            }
            // What the destination says explains more than how the queue pair fails.
            if told {
                match self.read().map_err(|error| self.closed(error))? {
                    FromDestination::Receipt(Receipt::Error(text)) => return Err(ChannelError::Peer(text)),
                    FromDestination::Receipt(receipt) => {
                        self.shared.confirmed(&receipt)?;
                        return Ok(receipt);
                    }
                    FromDestination::Key { piece, key, address } => {
                        self.shared.learn(piece, Key::Known { key, address });
                    }
                    FromDestination::NoKey { piece, text } => self.shared.learn(piece, Key::Refused(text)),
                }
            } else if completed {
                self.complete()?;
            }
        }
    }
}

//! The source's end of an RDMA channel.
//!
//! The pushing thread posts writes and waits for room, credits and keys; the thread that waits for confirmations also reads
//! completions and keys, and tells it. Both share [`Shared`].

use std::net::TcpStream;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::fabric::{Access, Connection, Depths, Port, Region, Remote, Request, SendOperation};
use super::link::{RdmaLink, Slots, try_out};
use super::pieces::Pieces;
use super::posting::Posting;
use super::registered::{RdmaMemory, Registered};
use super::shared::{Key, RdmaReceipts, Shared, State};
use super::{FRAMES, RdmaError, RdmaOptions};
use crate::channel::{ChannelError, ChannelLink, ChannelSource, OpenChannel, Pushed};
use crate::units::{PAGE_SIZE, RoundId, Run};
use crate::wire::data::{
    BarrierId, ChannelId, FrameKind, HEADER_BYTES, MAX_BATCH_PAGES, encode_barrier, encode_pages,
    encode_written,
};
use crate::wire::rdma::{ANSWER_BYTES, Answer, AnswerHeader, End, Offer, Want};

/// How long a piece may take to be registered at either end, while others are.
const REGISTERED_WITHIN: Duration = Duration::from_secs(30);
/// Requests that are posted together at most.
const POST_AT_ONCE: usize = 64;
/// Bytes of pages behind which their header is sent, or
const FRAME_BYTES: u64 = 512 << 10;
/// this many pushes: a header takes a thread of the destination from its sleep.
const FRAME_PUSHES: u32 = 8;

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
        timeout = retries.timeout, retries = retries.retries,
        peer = %link.remote(), "an RDMA queue pair is connected"
    );
    let posting = Posting::new(depth, frames);
    let at_once = POST_AT_ONCE.min(posting.at_once() as usize);
    let shared = Shared {
        link: Arc::new(link),
        sent,
        state: Mutex::new(State {
            posting,
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
        frame: None,
        at_once,
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

struct RdmaSource {
    shared: Arc<Shared>,
    registered: Arc<Registered>,
    slots: Slots,
    pieces: Pieces,
    /// This end's pieces, as far as they were used. Held for as long as the queue pair may read them.
    local: Vec<Option<Arc<dyn Region>>>,
    requests: Vec<Request>,
    /// Pages whose header is not sent yet.
    frame: Option<Frame>,
    /// Requests that are posted together at most.
    at_once: usize,
    head: Vec<u8>,
}

/// Pages that were pushed, and share a header.
#[derive(Clone, Copy, Debug)]
struct Frame {
    round: RoundId,
    sequence: u64,
    pages: u64,
    pushes: u32,
}

impl Drop for RdmaSource {
    fn drop(&mut self) {
        // Before the memory is: the device lets go of it.
        self.shared.link.shut();
    }
}

impl RdmaSource {
    /// Waits for a buffer at the destination, and takes it, and until so many bytes may go.
    fn begin_frame(&self, bytes: u64, barrier: Option<BarrierId>) -> Result<u64, ChannelError> {
        self.shared.wait(None, |state| {
            (state.posting.has_credit() && state.posting.has_room_for(bytes)).then(|| {
                Ok(match barrier {
                    Some(barrier) => state.posting.begin_barrier(barrier.0),
                    None => state.posting.begin_frame(),
                })
            })
        })
    }

    /// The frame that so many pages go with, when they may go.
    fn frame_for(&mut self, round: RoundId, pages: u64) -> Result<Frame, ChannelError> {
        let bytes = pages * PAGE_SIZE;
        match self.frame.take() {
            Some(frame) if frame.round == round && frame.pages + pages <= MAX_BATCH_PAGES => {
                self.shared.wait(None, |state| state.posting.has_room_for(bytes).then_some(Ok(())))?;
                return Ok(frame);
            }
            other => self.frame = other,
        }
        self.end_frame()?;
        let sequence = self.begin_frame(bytes, None)?;
        Ok(Frame { round, sequence, pages: 0, pushes: 0 })
    }

    /// Sends the header of the pages that wait for one.
    fn end_frame(&mut self) -> Result<(), ChannelError> {
        let Some(Frame { round, sequence, pages, .. }) = self.frame.take() else { return Ok(()) };
        self.head.clear();
        self.head.extend(encode_written(pages, round, sequence));
        self.send_head(sequence, false)
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
            if self.requests.len() >= self.at_once {
                self.post(false)?;
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
    fn send_head(&mut self, frame: u64, signal: bool) -> Result<(), ChannelError> {
        let segment = self.slots.write(frame, &self.head);
        let segment = segment.map_err(|cause| self.shared.link.device_error(cause))?;
        let operation = SendOperation::Send { immediate: None };
        self.requests.push(Request { id: 0, operation, segment: Some(segment), signalled: false });
        self.post(signal)
    }

    /// Posts what was added, all together, when the queue has room; the last of it can be told to be signalled.
    fn post(&mut self, signal: bool) -> Result<(), ChannelError> {
        let requests = &mut self.requests;
        let count = requests.len();
        self.shared.wait(None, |state| {
            (state.posting.room() >= count as u64).then(|| {
                for (index, request) in requests.iter_mut().enumerate() {
                    let bytes = request.segment.map_or(0, |segment| u64::from(segment.bytes));
                    let signal = signal && index + 1 == count;
                    (request.id, request.signalled) = state.posting.next_request(bytes, signal);
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
    /// The header of few pages waits for more. The barrier that ends every round sends it at the latest.
    fn push_pages(&mut self, round: RoundId, runs: &[Run]) -> Result<Pushed, ChannelError> {
        let pages: u64 = runs.iter().map(|run| run.pages).sum();
        let mut frame = self.frame_for(round, pages)?;
        for run in runs {
            self.write(*run)?;
        }
        // The header counts with the first of its pages, whatever sends it.
        let header = if frame.pushes == 0 { HEADER_BYTES as u64 } else { 0 };
        frame.pages += pages;
        frame.pushes += 1;
        self.frame = Some(frame);
        if frame.pages * PAGE_SIZE >= FRAME_BYTES || frame.pushes >= FRAME_PUSHES {
            self.end_frame()?;
        } else {
            self.post(false)?;
        }
        Ok(Pushed { sequence: frame.sequence, wire_bytes: header + pages * PAGE_SIZE })
    }

    /// A wire that writes memory cannot take pages apart: they go as they are.
    fn push_packed(&mut self, round: RoundId, runs: &[Run], _packed: &[u8]) -> Result<Pushed, ChannelError> {
        self.push_pages(round, runs)
    }

    fn push_zeros(&mut self, round: RoundId, runs: &[Run]) -> Result<Pushed, ChannelError> {
        self.end_frame()?;
        let sequence = self.begin_frame(0, None)?;
        self.head.clear();
        encode_pages(FrameKind::Zero, round, sequence, runs, 0, &mut self.head);
        self.send_head(sequence, false)?;
        Ok(Pushed { sequence, wire_bytes: self.head.len() as u64 })
    }

    fn push_barrier(
        &mut self,
        barrier: BarrierId,
        round: RoundId,
        fenced: &[ChannelId],
    ) -> Result<Pushed, ChannelError> {
        self.end_frame()?;
        let sequence = self.begin_frame(0, Some(barrier))?;
        self.head = encode_barrier(barrier, round, sequence, fenced);
        self.send_head(sequence, true)?;
        Ok(Pushed { sequence, wire_bytes: self.head.len() as u64 })
    }

    fn backlog(&self) -> Option<u64> {
        None
    }
}

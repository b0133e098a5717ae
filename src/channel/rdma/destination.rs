//! The destination's end of an RDMA channel: pages come without its doing; frame headers come into buffers that wait.

use std::collections::VecDeque;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use super::fabric::{Access, Completion, Completions, Connection, Depths, Port, Remote};
use super::link::{RdmaLink, Slots, connection, wait};
use super::pieces::Pieces;
use super::registered::{Followed, RdmaMemory, Registered};
use super::source::first_packet;
use super::{FRAMES, RdmaError, RdmaOptions};
use crate::channel::{AcceptedChannel, Arrival, Arrived, ChannelError, ChannelLink, ChannelReceiver, chain};
use crate::memory::GuestMemory;
use crate::sys::verbs::Status;
use crate::units::{PAGE_SIZE, Run};
use crate::wire::data::{FrameError, FrameKind, HEADER_BYTES, Header, Receipt};
use crate::wire::rdma::{Answer, End, FromDestination, OFFER_BYTES, Offer, OfferHeader, WANT_BYTES, Want};

/// A channel whose source has not heard yet that it is taken.
pub struct Accepting {
    channel: AcceptedChannel,
    link: Arc<RdmaLink>,
    end: End,
    frames: u32,
}

impl Accepting {
    /// The channel, of which the source knows nothing yet.
    #[must_use]
    pub fn link(&self) -> &Arc<dyn ChannelLink> {
        &self.channel.link
    }

    /// Tells the source that it is taken. From here on it writes.
    ///
    /// # Errors
    /// [`ChannelError::Send`].
    pub fn take(self) -> Result<AcceptedChannel, ChannelError> {
        self.link.write(&Answer::Taken { end: self.end, frames: self.frames }.encode())?;
        Ok(self.channel)
    }
}

/// Tells the source why an RDMA channel is not to be had; it may come again with TCP.
fn refuse(stream: &TcpStream, why: &str) {
    use std::io::Write;
    let mut stream = stream;
    // The source that does not read it finds the connection closed.
    let _ = stream.write_all(&Answer::Refused(why.to_owned()).encode());
}

/// Hears what the source offers on a connection that was accepted for RDMA, and makes the receiving end of a channel of it.
/// Nothing is written before [`Accepting::take`]. A source that cannot be served has been told why.
///
/// # Errors
/// [`ChannelError::Rdma`] when this host has no RDMA on that path, or what broke.
pub fn accept(
    stream: TcpStream,
    memory: &RdmaMemory,
    options: &RdmaOptions,
) -> Result<Accepting, ChannelError> {
    let answer = stream.try_clone().map_err(ChannelError::SetUp)?;
    let accepted = accept_or_say_why(stream, memory, options);
    if let Err(error) = &accepted {
        if let ChannelError::Rdma(RdmaError::Device { device, .. }) = error {
            memory.forget(device);
        }
        refuse(&answer, &in_one_line(error));
    }
    accepted
}

fn in_one_line(error: &ChannelError) -> String {
    match error {
        // Said of this host by another, so without "this host".
        ChannelError::Rdma(RdmaError::Absent(reason)) => reason.to_string(),
        other => chain(other),
    }
}

fn accept_or_say_why(
    stream: TcpStream,
    memory: &RdmaMemory,
    options: &RdmaOptions,
) -> Result<Accepting, ChannelError> {
    let offer = read_offer(&stream)?;
    let local = stream.local_addr().map_err(ChannelError::SetUp)?.ip();
    let port = memory.fabric().port_at(local.to_canonical()).map_err(RdmaError::Absent)?;
    let layout = memory.memory().layout();
    let pieces =
        Pieces::with_piece_bytes(layout, offer.piece_bytes).ok_or(RdmaError::Pieces(offer.piece_bytes))?;
    let wanted = pieces.in_map(&offer.map).ok_or(RdmaError::Pieces(offer.piece_bytes))?;
    let registered = memory.on(&port.device, &pieces, &wanted)?;
    let frames = offer.frames.min(FRAMES);
    let depths = Depths { send: 1, receive: frames, segments: 1 };
    let made = registered.domain.queue_pair(depths).map_err(RdmaError::device(&port.device))?;
    let Connection { queue_pair, received, .. } = made;
    let slots = Slots::new(&*registered.domain, frames, Access::LocalWrite)?;
    let link = Arc::new(RdmaLink::new(stream, queue_pair, port.clone(), options.link_timeout)?);
    let end = connect(&link, &port, &offer, options)?;
    let buffers: Result<Vec<_>, _> = (0..slots.count()).map(|slot| Ok((slot, slots.whole(slot)?))).collect();
    link.post_receive(&buffers.map_err(|cause| link.device_error(cause))?)?;
    let followed = registered.follow().map_err(ChannelError::SetUp)?;
    let receiver = RdmaReceiver {
        link: link.clone(),
        memory: memory.memory().clone(),
        registered,
        followed,
        received,
        slots,
        arrived: VecDeque::new(),
        completions: Vec::new(),
        sequence: 0,
        closed: false,
        frame: Vec::new(),
        runs: Vec::new(),
    };
    let channel = AcceptedChannel { receiver: Box::new(receiver), link: link.clone() };
    Ok(Accepting { channel, link, end, frames })
}

fn read_offer(mut stream: &TcpStream) -> Result<Offer, ChannelError> {
    use std::io::Read;
    let mut head = [0; OFFER_BYTES];
    stream.read_exact(&mut head).map_err(ChannelError::Receive)?;
    let header = OfferHeader::decode(&head).map_err(RdmaError::Frame)?;
    let mut map = vec![0; header.map_bytes()];
    stream.read_exact(&mut map).map_err(ChannelError::Receive)?;
    Ok(header.with_map(map))
}

fn connect(link: &RdmaLink, port: &Port, offer: &Offer, options: &RdmaOptions) -> Result<End, ChannelError> {
    let mtu = options.mtu.min(port.mtu);
    let remote = Remote {
        queue_pair: offer.end.queue_pair,
        packet: offer.end.packet,
        gid: offer.end.gid,
        local_gid_index: port.gid_index,
        mtu: offer.end.mtu.min(mtu),
        traffic_class: 0,
    };
    let packet = first_packet()?;
    let queue_pair = link.with_queue_pair(|queue_pair| {
        queue_pair.receive_from(port.number, &remote, &options.retries(), true)?;
        Ok(queue_pair.number())
    })?;
    Ok(End { queue_pair, packet, mtu, gid: port.gid })
}

struct RdmaReceiver {
    link: Arc<RdmaLink>,
    memory: GuestMemory,
    registered: Arc<Registered>,
    followed: Arc<Followed>,
    received: Arc<dyn Completions>,
    slots: Slots,
    /// Messages that came and were not looked at: slot and length.
    arrived: VecDeque<(u64, u64)>,
    /// Kept for its room.
    completions: Vec<Completion>,
    /// The number of the last frame.
    sequence: u64,
    /// The source has closed the connection; what came before is still looked at.
    closed: bool,
    frame: Vec<u8>,
    runs: Vec<Run>,
}

impl Drop for RdmaReceiver {
    fn drop(&mut self) {
        // Before the buffers are: the device lets go of them.
        self.link.shut();
    }
}

impl RdmaReceiver {
    /// Waits for a message, and meanwhile tells the source of keys and hears what it wants.
    fn wait_for_message(&mut self) -> Result<(u64, u64), ChannelError> {
        loop {
            self.poll()?;
            if let Some(message) = self.arrived.pop_front() {
                return Ok(message);
            }
            if self.closed {
                return Err(ChannelError::Closed);
            }
            // What completed before it was armed makes no event.
            self.received.arm().map_err(|cause| self.link.device_error(cause))?;
            self.poll()?;
            if self.arrived.is_empty() {
                self.wait()?;
            }
        }
    }

    fn wait(&mut self) -> Result<(), ChannelError> {
        use std::os::fd::AsFd;
        let link = self.link.clone();
        let [event, gone] = self.registered.domain.watched();
        let (received, followed) = (self.received.event_descriptor(), self.followed.event.as_fd());
        let watched = [connection(&link), received, followed, event, gone];
        let [told, completed, registered, event, gone] = wait(watched, link.timeout)?;
        if event || gone {
            self.registered.check_device()?;
        }
        if registered {
            self.tell_keys()?;
        }
        if completed {
            self.received.take_events().map_err(|cause| self.link.device_error(cause))?;
        }
        if told {
            let mut bytes = [0; WANT_BYTES];
            match self.link.read(&mut bytes) {
                Ok(()) => {
                    let pieces = self.registered.pieces.count();
                    let Want(piece) = Want::decode(&bytes, pieces).map_err(RdmaError::Frame)?;
                    self.registered.want(&[piece]);
                }
                // The last messages may be under way on the queue pair.
                Err(ChannelError::Closed) if !self.link.is_shut() => self.closed = true,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn poll(&mut self) -> Result<(), ChannelError> {
        self.completions.clear();
        self.received.poll(&mut self.completions).map_err(|cause| self.link.device_error(cause))?;
        for completion in &self.completions {
            if completion.status != Status::SUCCESS {
                return Err(RdmaError::Work(completion.status).into());
            }
            self.arrived.push_back((completion.id, u64::from(completion.bytes)));
        }
        Ok(())
    }

    fn tell_keys(&self) -> Result<(), ChannelError> {
        let mut bytes = Vec::new();
        for (piece, done) in self.followed.take() {
            let told = match done {
                Ok(region) => {
                    FromDestination::Key { piece, key: region.remote_key(), address: region.address() }
                }
                Err(error) => {
                    FromDestination::NoKey { piece, text: in_one_line(&RdmaError::Register(error).into()) }
                }
            };
            bytes.extend(told.encode());
        }
        self.link.write(&bytes)
    }

    /// The header of a frame, whose table is what follows it in `frame`.
    fn header(&mut self) -> Result<Header, ChannelError> {
        let Some((head, table)) = self.frame.split_first_chunk::<HEADER_BYTES>() else {
            return Err(ChannelError::CutShort {
                got: self.frame.len() as u64,
                expected: HEADER_BYTES as u64,
            });
        };
        let header = Header::decode(head).map_err(ChannelError::Frame)?;
        let expected = self.sequence + 1;
        if header.sequence != expected {
            let wrong = FrameError::Sequence { got: header.sequence, expected };
            return Err(ChannelError::Frame(wrong));
        }
        if matches!(header.kind, FrameKind::Raw | FrameKind::Zstd) {
            return Err(ChannelError::Frame(FrameError::Misplaced));
        }
        if table.len() != header.table_bytes() {
            let (got, expected) = (table.len() as u64, header.table_bytes() as u64);
            return Err(ChannelError::CutShort { got, expected });
        }
        self.sequence = expected;
        Ok(header)
    }
}

impl ChannelReceiver for RdmaReceiver {
    fn next(&mut self, _: &mut dyn FnMut(&[Run])) -> Result<Arrived<'_>, ChannelError> {
        let (slot, bytes) = self.wait_for_message()?;
        self.slots.read(slot, bytes, &mut self.frame);
        // Free before the frame is confirmed, for that is what gives the source its credit back.
        let segment = self.slots.whole(slot).map_err(|cause| self.link.device_error(cause))?;
        self.link.post_receive(&[(slot, segment)])?;
        let header = self.header()?;
        let table = &self.frame[HEADER_BYTES..];
        let wire_bytes = self.frame.len() as u64 + u64::from(header.payload_bytes);
        let what = match header.kind {
            FrameKind::Barrier(barrier) => Arrival::Barrier { barrier, fenced: header.decode_fenced(table) },
            FrameKind::Zero => {
                let layout = self.memory.layout();
                let pages = header.decode_runs(table, layout, &mut self.runs).map_err(ChannelError::Frame)?;
                Arrival::Zeros { runs: &self.runs, pages }
            }
            // Of what was written nothing is known but how much: all that can be written counts as written.
            FrameKind::Written | FrameKind::Raw | FrameKind::Zstd => {
                Arrival::Placed { pages: u64::from(header.payload_bytes) / PAGE_SIZE }
            }
        };
        Ok(Arrived { sequence: header.sequence, wire_bytes, placing: Duration::ZERO, what })
    }

    fn confirm(&mut self, receipt: &Receipt) -> Result<(), ChannelError> {
        self.link.write(&FromDestination::Receipt(receipt.clone()).encode())
    }
}

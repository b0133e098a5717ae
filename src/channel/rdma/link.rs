//! What both ends have: the queue pair, the connection beside it, and slots of registered memory for headers.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::fabric::{
    Access, Completions, Domain, Port, QueuePair, Region, Request, Segment, SendOperation, VerbsError,
};
use super::{RdmaError, SLOT_BYTES};
use crate::channel::tcp::tune;
use crate::channel::{Carrier, ChannelError, ChannelLink};
use crate::memory::{HugePages, Mapping};
use crate::sys::verbs::Status;

/// How long the first packet of a queue pair may take, there and back.
const ANSWERED_WITHIN: Duration = Duration::from_secs(3);

/// A channel's queue pair and connection.
#[derive(Debug)]
pub(super) struct RdmaLink {
    pub(super) stream: TcpStream,
    local: SocketAddr,
    remote: SocketAddr,
    pub(super) timeout: Duration,
    port: Port,
    /// `None` once it was cut off.
    queue_pair: RwLock<Option<Box<dyn QueuePair>>>,
}

impl RdmaLink {
    pub(super) fn new(
        stream: TcpStream,
        queue_pair: Box<dyn QueuePair>,
        port: Port,
        timeout: Duration,
    ) -> Result<Self, ChannelError> {
        tune(&stream, timeout).map_err(ChannelError::SetUp)?;
        let local = stream.local_addr().map_err(ChannelError::SetUp)?;
        let remote = stream.peer_addr().map_err(ChannelError::SetUp)?;
        Ok(Self { stream, local, remote, timeout, port, queue_pair: RwLock::new(Some(queue_pair)) })
    }

    /// Does something with the queue pair, unless it was cut off.
    pub(super) fn with_queue_pair<T>(
        &self,
        act: impl FnOnce(&dyn QueuePair) -> Result<T, VerbsError>,
    ) -> Result<T, ChannelError> {
        let queue_pair = self.queue_pair.read().unwrap_or_else(PoisonError::into_inner);
        let queue_pair = queue_pair.as_deref().ok_or(ChannelError::Closed)?;
        Ok(act(queue_pair).map_err(RdmaError::device(&self.port.device))?)
    }

    pub(super) fn post_send(&self, requests: &[Request]) -> Result<(), ChannelError> {
        self.with_queue_pair(|queue_pair| queue_pair.post_send(requests))
    }

    pub(super) fn post_receive(&self, buffers: &[(u64, Segment)]) -> Result<(), ChannelError> {
        self.with_queue_pair(|queue_pair| queue_pair.post_receive(buffers))
    }

    pub(super) fn device_error(&self, cause: VerbsError) -> ChannelError {
        RdmaError::device(&self.port.device)(cause).into()
    }

    /// Whether it was cut off.
    pub(super) fn is_shut(&self) -> bool {
        self.queue_pair.read().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// Fills `into`; the peer may be silent before the first byte for as long as its machine lives.
    pub(super) fn read(&self, into: &mut [u8]) -> Result<(), ChannelError> {
        let expected = into.len() as u64;
        let mut got = 0;
        while got < into.len() {
            match (&self.stream).read(&mut into[got..]) {
                Ok(0) if got == 0 => return Err(ChannelError::Closed),
                Ok(0) => return Err(ChannelError::CutShort { got: got as u64, expected }),
                Ok(bytes) => got += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let seconds = self.timeout.as_secs();
                    return Err(ChannelError::Stalled { got: got as u64, expected, seconds });
                }
                Err(error) => return Err(ChannelError::Receive(error)),
            }
        }
        Ok(())
    }

    pub(super) fn write(&self, bytes: &[u8]) -> Result<(), ChannelError> {
        (&self.stream).write_all(bytes).map_err(ChannelError::Send)
    }
}

impl ChannelLink for RdmaLink {
    fn local(&self) -> SocketAddr {
        self.local
    }

    fn remote(&self) -> SocketAddr {
        self.remote
    }

    fn carrier(&self) -> Carrier {
        Carrier::Rdma { device: self.port.device.clone(), port: self.port.number, gid: self.port.gid.into() }
    }

    /// When it returns, the device neither writes nor reads guest RAM through the queue pair any more: it is destroyed.
    fn shut(&self) {
        // Fails only when it is shut already.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        let queue_pair = self.queue_pair.write().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(queue_pair) = queue_pair {
            queue_pair.give_up();
        }
    }
}

/// Registered memory for headers: as many slots as frames may be under way.
#[derive(Debug)]
pub(super) struct Slots {
    mappings: Arc<[Mapping]>,
    region: Arc<dyn Region>,
    count: u64,
}

impl Slots {
    pub(super) fn new(domain: &dyn Domain, count: u32, access: Access) -> Result<Self, ChannelError> {
        let bytes = u64::from(count) * SLOT_BYTES;
        let mapping = Mapping::anonymous(bytes, HugePages::No).map_err(ChannelError::SetUp)?;
        let mappings: Arc<[Mapping]> = [mapping].into();
        let region = domain.register(&mappings, 0, 0, bytes, access);
        let region = region.map_err(|cause| RdmaError::Register(Arc::new(cause)))?;
        Ok(Self { mappings, region, count: u64::from(count) })
    }

    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Fills the slot of a frame.
    pub(super) fn write(&self, frame: u64, bytes: &[u8]) -> Result<Segment, VerbsError> {
        let at = frame % self.count * SLOT_BYTES;
        self.mappings[0].write(at, bytes);
        self.region.segment(at, bytes.len() as u32)
    }

    /// The whole slot, to receive into.
    pub(super) fn whole(&self, slot: u64) -> Result<Segment, VerbsError> {
        self.region.segment(slot % self.count * SLOT_BYTES, SLOT_BYTES as u32)
    }

    /// What came into a slot.
    pub(super) fn read(&self, slot: u64, bytes: u64, into: &mut Vec<u8>) {
        into.resize(bytes.min(SLOT_BYTES) as usize, 0);
        self.mappings[0].read(slot % self.count * SLOT_BYTES, into);
    }
}

/// Waits until one of the descriptors has something, or the time is over; says which have.
pub(super) fn wait<const N: usize>(
    descriptors: [BorrowedFd<'_>; N],
    at_most: Duration,
) -> Result<[bool; N], ChannelError> {
    let deadline = Instant::now() + at_most;
    let mut polled = descriptors.map(|descriptor| PollFd::from_borrowed_fd(descriptor, PollFlags::IN));
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut polled, Some(&left)) {
            Ok(_) => return Ok(polled.each_ref().map(|polled| !polled.revents().is_empty())),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(ChannelError::Receive(errno.into())),
        }
    }
}

/// Has a packet go to the peer and be answered, which writes nothing. Queue pairs connect without a packet, so that otherwise the
/// first round would find out that the network drops them.
pub(super) fn try_out(link: &RdmaLink, sent: &dyn Completions) -> Result<(), ChannelError> {
    let failed = |cause| link.device_error(cause);
    let nothing = SendOperation::Write { address: 0, key: 0, immediate: None };
    link.post_send(&[Request { id: 0, operation: nothing, segment: None, signalled: true }])?;
    let deadline = Instant::now() + ANSWERED_WITHIN;
    let mut completions = Vec::new();
    loop {
        // What completed before it was armed makes no event.
        sent.arm().map_err(failed)?;
        sent.poll(&mut completions).map_err(failed)?;
        let left = deadline.saturating_duration_since(Instant::now());
        match completions.first().map(|done| done.status) {
            Some(Status::SUCCESS) => return Ok(()),
            Some(status) => return Err(RdmaError::Work(status).into()),
            None if left.is_zero() => {
                return Err(RdmaError::Silent { seconds: ANSWERED_WITHIN.as_secs() }.into());
            }
            None => {}
        }
        wait([sent.event_descriptor()], left)?;
        sent.take_events().map_err(failed)?;
    }
}

/// The connection's descriptor.
pub(super) fn connection(link: &RdmaLink) -> BorrowedFd<'_> {
    link.stream.as_fd()
}

//! The RDMA devices of this host, as [`Fabric`] has them.

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use super::Reason;
use super::devices::{MemoryLock, RdmaDevices};
use super::fabric::{
    Access, Completion, Completions, Connection, Depths, Domain, Fabric, Port, QueuePair, Region, Remote,
    Request, Retries, Segment, VerbsError,
};
use crate::memory::Mapping;
use crate::sys::verbs::{
    self, AsyncEvent, CompletionQueue, Context, MemoryRegion, ProtectionDomain, ReceiveBatch, Residence,
    SendBatch,
};

/// The devices that libibverbs lists.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostDevices;

impl Fabric for HostDevices {
    fn reason(&self) -> Option<Reason> {
        RdmaDevices::of_this_host().reason
    }

    fn port_at(&self, address: IpAddr) -> Result<Port, Reason> {
        let devices = RdmaDevices::of_this_host();
        let Some((device, port, gid)) = devices.at(address) else {
            return Err(devices.reason_at(address));
        };
        Ok(Port {
            device: device.name.clone(),
            number: port.number,
            gid: gid.gid.octets(),
            // The library's own type for it; a table has fewer entries.
            gid_index: u8::try_from(gid.index).unwrap_or(u8::MAX),
            mtu: port.active_mtu,
            queue_depth: device
                .limits
                .as_ref()
                .map_or(0, |limits| limits.work_requests.min(limits.completions)),
            bits_per_second: port.bits_per_second,
        })
    }

    fn domain(&self, device: &str) -> Result<Arc<dyn Domain>, VerbsError> {
        let devices = verbs::devices()?;
        let found = devices.iter().find(|found| found.name() == device);
        let context = found.ok_or_else(|| VerbsError::Vanished { device: device.to_owned() })?.open()?;
        let domain = ProtectionDomain::new(&context)?;
        let on_demand = context.limits()?.on_demand_paging;
        let residence = if on_demand { Residence::OnDemand } else { Residence::Locked };
        let told = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| VerbsError::Event(errno.into()))?;
        Ok(Arc::new(DeviceDomain { context, domain, residence, gone: AtomicBool::new(false), told }))
    }

    fn reason_against_locking(&self, device: &str, bytes: u64) -> Option<Reason> {
        let reason = MemoryLock::of_this_process().reason_against(bytes)?;
        let devices = RdmaDevices::of_this_host().devices;
        let limits = devices.into_iter().find(|found| found.name == device)?.limits?;
        (!limits.on_demand_paging).then_some(reason)
    }
}

#[derive(Debug)]
struct DeviceDomain {
    context: Arc<Context>,
    domain: Arc<ProtectionDomain>,
    /// Of guest RAM.
    residence: Residence,
    gone: AtomicBool,
    /// The device tells an event once, and all channels are to know.
    told: OwnedFd,
}

impl Domain for DeviceDomain {
    fn register(
        &self,
        mappings: &Arc<[Mapping]>,
        which: usize,
        offset: u64,
        bytes: u64,
        access: Access,
    ) -> Result<Arc<dyn Region>, VerbsError> {
        // Receive buffers would need one more ability of the device, and are small.
        let residence = if access == Access::LocalWrite { Residence::Locked } else { self.residence };
        Ok(Arc::new(self.domain.register(mappings, which, offset, bytes, access, residence)?))
    }

    fn queue_pair(&self, depths: Depths) -> Result<Connection, VerbsError> {
        let sent = CompletionQueue::new(&self.context, depths.send.max(1))?;
        let received = CompletionQueue::new(&self.context, depths.receive.max(1))?;
        let raw = verbs::QueuePair::new(&self.domain, &sent, &received, depths)?;
        let queue_pair =
            Box::new(DeviceQueuePair { raw, batch: Mutex::default(), buffers: Mutex::default() });
        Ok(Connection { queue_pair, sent, received })
    }

    fn watched(&self) -> [BorrowedFd<'_>; 2] {
        [self.context.as_fd(), self.told.as_fd()]
    }

    fn is_gone(&self) -> bool {
        while let Ok(Some(event)) = self.context.next_event() {
            tracing::debug!(?event, "an RDMA device");
            if event == AsyncEvent::DeviceFatal {
                self.gone.store(true, Ordering::Release);
                // Full only when it was told 2^64 times.
                let _ = rustix::io::write(&self.told, &1u64.to_ne_bytes());
            }
        }
        self.gone.load(Ordering::Acquire)
    }
}

impl Region for MemoryRegion {
    fn address(&self) -> u64 {
        self.address()
    }

    fn remote_key(&self) -> u32 {
        self.remote_key()
    }

    fn segment(&self, offset: u64, bytes: u32) -> Result<Segment, VerbsError> {
        self.segment(offset, bytes)
    }
}

struct DeviceQueuePair {
    raw: verbs::QueuePair,
    /// Kept for their room.
    batch: Mutex<SendBatch>,
    buffers: Mutex<ReceiveBatch>,
}

impl std::fmt::Debug for DeviceQueuePair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.raw.fmt(f)
    }
}

impl QueuePair for DeviceQueuePair {
    fn number(&self) -> u32 {
        self.raw.number()
    }

    fn receive_from(
        &self,
        port: u8,
        remote: &Remote,
        retries: &Retries,
        writes: bool,
    ) -> Result<(), VerbsError> {
        self.raw.initialise(port, writes)?;
        self.raw.ready_to_receive(port, remote, retries)
    }

    fn send_from(&self, packet: u32, retries: &Retries) -> Result<(), VerbsError> {
        self.raw.ready_to_send(packet, retries)
    }

    fn post_send(&self, requests: &[Request]) -> Result<(), VerbsError> {
        let mut batch = self.batch.lock().unwrap_or_else(PoisonError::into_inner);
        batch.clear();
        for request in requests {
            batch.push(request.id, request.operation, request.segment.as_slice(), request.signalled);
        }
        self.raw.post_send(&mut batch)
    }

    fn post_receive(&self, buffers: &[(u64, Segment)]) -> Result<(), VerbsError> {
        let mut batch = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        batch.clear();
        for (id, segment) in buffers {
            batch.push(*id, Some(*segment));
        }
        self.raw.post_receive(&mut batch)
    }

    fn give_up(&self) {
        // Fails only where it has failed before.
        let _ = self.raw.give_up();
    }
}

/// How many completions are taken at once: more than a queue holds at any time are taken by the next call.
const AT_ONCE: usize = 1024;

impl Completions for CompletionQueue {
    fn arm(&self) -> Result<(), VerbsError> {
        self.arm()
    }

    fn take_events(&self) -> Result<(), VerbsError> {
        while self.take_event()? {}
        Ok(())
    }

    fn poll(&self, completions: &mut Vec<Completion>) -> Result<(), VerbsError> {
        self.poll(AT_ONCE, completions).map(drop)
    }

    fn event_descriptor(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }
}

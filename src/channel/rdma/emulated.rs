//! RDMA without a device, for tests: hosts whose devices write each other's memory in this process.
//!
//! It keeps the rules that real devices keep: a key is good for its memory and its domain only, a queue pair that fails
//! flushes what follows, the peer of one that fails hears nothing, and one that is destroyed writes no more. And it can fail at
//! every call.

mod objects;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::event::{EventfdFlags, eventfd};

use super::Reason;
use super::fabric::{
    Access, Completion, Connection, Depths, Domain, Fabric, Port, Region, Request, Retries, Segment,
    SendOperation, VerbsError,
};
use crate::memory::Mapping;
use crate::sys::verbs::{Status, Work};
use objects::{EmulatedPair, EmulatedRegion, Queue};

/// The wires between all hosts of a test, and their devices.
#[derive(Clone, Default)]
pub(crate) struct Network(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    next: u32,
    queue_pairs: HashMap<u32, Pair>,
    memory: HashMap<u32, Registration>,
    /// Addresses that carry nothing.
    cut: Vec<IpAddr>,
    /// Requests of queue pairs at these addresses wait until they are released.
    held: Vec<IpAddr>,
    /// What destroyed queue pairs had written and was kept: packets need no sender once they are sent.
    on_the_wire: Vec<Written>,
    calls: u64,
    fail_at: Option<u64>,
    /// Bytes written by RDMA.
    written: u64,
    /// What a peer tells instead of its keys.
    lie: Lie,
}

/// What registered memory says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Lie {
    #[default]
    Nothing,
    /// A key that was never given.
    Key,
    /// Memory that is shorter than it was asked for.
    Short,
}

struct Written {
    to: u32,
    key: u32,
    address: u64,
    bytes: Vec<u8>,
}

struct Registration {
    domain: u64,
    mappings: Arc<[Mapping]>,
    which: usize,
    offset: u64,
    bytes: u64,
    access: Access,
}

struct Pair {
    address: IpAddr,
    domain: u64,
    depths: Depths,
    sent: Arc<Queue>,
    received: Arc<Queue>,
    peer: Option<u32>,
    peer_address: Option<IpAddr>,
    /// What it was connected with.
    mtu: u32,
    retries: Option<Retries>,
    writes: bool,
    sends: bool,
    failed: bool,
    buffers: VecDeque<(u64, Segment)>,
    waiting: VecDeque<Request>,
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an emulated network")
    }
}

fn failure() -> io::Error {
    io::Error::other("the emulation was told to fail here")
}

impl Network {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The devices of a host that has these addresses, one device for each.
    pub(crate) fn host(&self, addresses: &[IpAddr]) -> Arc<Host> {
        let devices = addresses.iter().enumerate().map(|(index, address)| (format!("emu{index}"), *address));
        Arc::new(Host {
            network: self.clone(),
            devices: devices.collect(),
            down: Mutex::default(),
            lock_limit: Mutex::default(),
            open: Mutex::default(),
        })
    }

    /// Counts every call to a device from now on, and has the one of this number fail.
    pub(crate) fn fail_at(&self, call: Option<u64>) {
        let mut inner = self.lock();
        inner.calls = 0;
        inner.fail_at = call;
    }

    pub(crate) fn calls(&self) -> u64 {
        self.lock().calls
    }

    pub(crate) fn written(&self) -> u64 {
        self.lock().written
    }

    pub(crate) fn lie(&self, lie: Lie) {
        self.lock().lie = lie;
    }

    /// What is registered and connected now: regions and queue pairs.
    pub(crate) fn held(&self) -> (usize, usize) {
        let inner = self.lock();
        (inner.memory.len(), inner.queue_pairs.len())
    }

    /// Unplugs an address: what is posted to or from it fails.
    pub(crate) fn cut(&self, address: IpAddr) {
        self.lock().cut.push(address);
    }

    pub(crate) fn mend(&self, address: IpAddr) {
        self.lock().cut.retain(|cut| *cut != address);
    }

    /// Keeps what queue pairs at this address post, as a wire with a long queue does.
    pub(crate) fn hold(&self, address: IpAddr) {
        self.lock().held.push(address);
    }

    /// Lets what was kept go on its way, if it still can.
    pub(crate) fn release(&self, address: IpAddr) {
        let mut inner = self.lock();
        inner.held.retain(|held| *held != address);
        let numbers: Vec<u32> = inner.queue_pairs.keys().copied().collect();
        numbers.into_iter().for_each(|number| inner.carry(number));
        for Written { to, key, address, bytes } in std::mem::take(&mut inner.on_the_wire) {
            if let Some(pair) = inner.queue_pairs.get(&to).filter(|pair| !pair.failed && pair.writes) {
                inner.write(pair.domain, key, address, &bytes);
            }
        }
    }

    /// How the queue pairs that send are made: requests that they hold, payload of a packet, and when the peer counts as lost.
    pub(crate) fn senders(&self) -> Vec<(u32, u32, Option<Retries>)> {
        let inner = self.lock();
        let senders = inner.queue_pairs.values().filter(|pair| pair.sends);
        senders.map(|pair| (pair.depths.send, pair.mtu, pair.retries)).collect()
    }

    pub(crate) fn on_the_wire(&self) -> usize {
        self.lock().on_the_wire.len()
    }
}

impl Inner {
    /// Counts a call to a device; whether it is the one that is to fail.
    fn fails(&mut self) -> bool {
        self.calls += 1;
        self.fail_at == Some(self.calls)
    }

    fn number(&mut self) -> u32 {
        self.next += 1;
        self.next
    }

    /// Does what a queue pair has to do.
    fn carry(&mut self, number: u32) {
        loop {
            let Some(pair) = self.queue_pairs.get_mut(&number) else { return };
            if self.held.contains(&pair.address) && !pair.failed {
                return;
            }
            let Some(request) = pair.waiting.pop_front() else { return };
            let (sent, failed) = (pair.sent.clone(), pair.failed);
            let status = if failed { Status::FLUSHED } else { self.execute(number, &request) };
            if status != Status::SUCCESS
                && let Some(pair) = self.queue_pairs.get_mut(&number)
            {
                pair.failed = true;
            }
            if status != Status::SUCCESS || request.signalled {
                let work = match request.operation {
                    SendOperation::Write { .. } => Work::Write,
                    SendOperation::Send { .. } => Work::Send,
                };
                let completion = Completion {
                    id: request.id,
                    status,
                    queue_pair: number,
                    work,
                    bytes: 0,
                    immediate: None,
                };
                sent.complete(completion);
            }
        }
    }

    /// A queue pair is destroyed: what a wire keeps of its writes stays under way.
    fn destroy(&mut self, number: u32) {
        let Some(pair) = self.queue_pairs.remove(&number) else { return };
        let Some(to) = pair.peer.filter(|_| self.held.contains(&pair.address)) else { return };
        for request in pair.waiting {
            let SendOperation::Write { address, key, .. } = request.operation else { continue };
            let Some(segment) = request.segment else { continue };
            let mut bytes = vec![0; segment.bytes as usize];
            if self.read(pair.domain, segment, &mut bytes) {
                self.on_the_wire.push(Written { to, key, address, bytes });
            }
        }
    }

    fn execute(&mut self, number: u32, request: &Request) -> Status {
        let (peer, from, to, domain) = {
            let pair = &self.queue_pairs[&number];
            (pair.peer, pair.address, pair.peer_address, pair.domain)
        };
        if self.cut.contains(&from) || to.is_some_and(|to| self.cut.contains(&to)) {
            return Status::NO_ANSWER;
        }
        let Some(peer) = peer.filter(|peer| self.queue_pairs.get(peer).is_some_and(|peer| !peer.failed))
        else {
            return Status::NO_ANSWER;
        };
        let mut bytes = vec![0; request.segment.map_or(0, |segment| segment.bytes as usize)];
        if request.segment.is_some_and(|segment| !self.read(domain, segment, &mut bytes)) {
            return Status::LOCAL_FAULT;
        }
        match request.operation {
            SendOperation::Write { address, key, .. } => {
                let (domain, writes) = (self.queue_pairs[&peer].domain, self.queue_pairs[&peer].writes);
                // Of a write of no bytes neither key nor address are looked at.
                if !writes || !(bytes.is_empty() || self.write(domain, key, address, &bytes)) {
                    return Status::REMOTE_ACCESS;
                }
                self.written += bytes.len() as u64;
            }
            SendOperation::Send { .. } => {
                let Some(pair) = self.queue_pairs.get_mut(&peer) else { return Status::NO_ANSWER };
                let Some((id, buffer)) = pair.buffers.pop_front() else { return Status::NOT_READY };
                let (received, domain) = (pair.received.clone(), pair.domain);
                if (buffer.bytes as usize) < bytes.len() || !self.fill(domain, buffer, &bytes) {
                    return Status::REMOTE_ACCESS;
                }
                let bytes = bytes.len() as u32;
                let status = Status::SUCCESS;
                received.complete(Completion {
                    id,
                    status,
                    queue_pair: peer,
                    work: Work::Receive,
                    bytes,
                    immediate: None,
                });
            }
        }
        Status::SUCCESS
    }

    /// The registration of a key, and where an address lies in its mapping.
    fn find(&self, domain: u64, key: u32, address: u64, bytes: u64) -> Option<(&Registration, u64)> {
        let found = self.memory.get(&key).filter(|found| found.domain == domain)?;
        let at = address.checked_sub(found.mappings[found.which].address() + found.offset)?;
        (at.checked_add(bytes)? <= found.bytes).then_some((found, found.offset + at))
    }

    fn read(&self, domain: u64, from: Segment, into: &mut [u8]) -> bool {
        let found = self.find(domain, from.key, from.address, u64::from(from.bytes));
        found.is_some_and(|(found, at)| {
            found.mappings[found.which].read(at, into);
            true
        })
    }

    fn write(&self, domain: u64, key: u32, address: u64, bytes: &[u8]) -> bool {
        let found = self.find(domain, key, address, bytes.len() as u64);
        found.filter(|(found, _)| found.access == Access::RemoteWrite).is_some_and(|(found, at)| {
            found.mappings[found.which].write(at, bytes);
            true
        })
    }

    fn fill(&self, domain: u64, into: Segment, bytes: &[u8]) -> bool {
        let found = self.find(domain, into.key, into.address, bytes.len() as u64);
        found.filter(|(found, _)| found.access != Access::LocalRead).is_some_and(|(found, at)| {
            found.mappings[found.which].write(at, bytes);
            true
        })
    }
}

/// The devices of one host.
#[derive(Debug)]
pub(crate) struct Host {
    network: Network,
    devices: Vec<(String, IpAddr)>,
    down: Mutex<Vec<IpAddr>>,
    lock_limit: Mutex<Option<u64>>,
    open: Mutex<Vec<(IpAddr, Weak<Gone>)>>,
}

/// Whether a device is gone, for one who has it open.
#[derive(Debug)]
struct Gone {
    is: AtomicBool,
    told: OwnedFd,
}

impl Host {
    /// Takes a port down, or up again, as this host sees it.
    pub(crate) fn set_down(&self, address: IpAddr, down: bool) {
        let mut all = self.down.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|other| *other != address);
        if down {
            all.push(address);
        }
    }

    /// Takes a device away, as unloading its driver does. Who has it open is told.
    pub(crate) fn take_away(&self, address: IpAddr) {
        self.set_down(address, true);
        for (_, gone) in self.open.lock().unwrap().iter().filter(|(of, _)| *of == address) {
            let Some(gone) = gone.upgrade() else { continue };
            gone.is.store(true, Ordering::SeqCst);
            rustix::io::write(&gone.told, &1u64.to_ne_bytes()).expect("an event");
        }
    }

    /// How often devices are open.
    pub(crate) fn opened(&self) -> usize {
        self.open.lock().unwrap().iter().filter(|(_, gone)| gone.strong_count() > 0).count()
    }

    /// Has this host allow no more registered memory.
    pub(crate) fn limit_locking(&self, bytes: u64) {
        *self.lock_limit.lock().unwrap_or_else(PoisonError::into_inner) = Some(bytes);
    }
}

impl Fabric for Host {
    fn reason(&self) -> Option<Reason> {
        self.devices.is_empty().then_some(Reason::NoDevice)
    }

    fn port_at(&self, address: IpAddr) -> Result<Port, Reason> {
        if self.down.lock().unwrap_or_else(PoisonError::into_inner).contains(&address) {
            return Err(Reason::PortNotActive("down"));
        }
        let found = self.devices.iter().find(|(_, own)| *own == address);
        let (device, _) = found.ok_or(Reason::NotAtAddress(address))?;
        let gid = match address {
            IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
            IpAddr::V6(address) => address.octets(),
        };
        Ok(Port {
            device: device.clone(),
            number: 1,
            gid,
            gid_index: 1,
            mtu: 1024,
            queue_depth: 40,
            bits_per_second: None,
        })
    }

    fn domain(&self, device: &str) -> Result<Arc<dyn Domain>, VerbsError> {
        let mut inner = self.network.lock();
        let found = self.devices.iter().find(|(name, _)| name == device);
        let (_, address) = found.ok_or_else(|| VerbsError::Vanished { device: device.to_owned() })?;
        if inner.fails() {
            return Err(VerbsError::ProtectionDomain(failure()));
        }
        let number = u64::from(inner.number());
        drop(inner);
        let told = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an event");
        let gone = Arc::new(Gone { is: AtomicBool::new(false), told });
        self.open.lock().unwrap().push((*address, Arc::downgrade(&gone)));
        Ok(Arc::new(EmulatedDomain { network: self.network.clone(), number, address: *address, gone }))
    }

    fn reason_against_locking(&self, _: &str, needed: u64) -> Option<Reason> {
        let limit = (*self.lock_limit.lock().unwrap_or_else(PoisonError::into_inner))?;
        (needed > limit).then_some(Reason::MemlockTooSmall { limit, needed })
    }
}

#[derive(Debug)]
struct EmulatedDomain {
    network: Network,
    number: u64,
    address: IpAddr,
    gone: Arc<Gone>,
}

impl Domain for EmulatedDomain {
    fn register(
        &self,
        mappings: &Arc<[Mapping]>,
        which: usize,
        offset: u64,
        bytes: u64,
        access: Access,
    ) -> Result<Arc<dyn Region>, VerbsError> {
        let of = mappings[which].bytes();
        if offset.checked_add(bytes).is_none_or(|end| end > of) {
            return Err(VerbsError::OutOfRange { offset, bytes, of });
        }
        let mut inner = self.network.lock();
        if inner.fails() {
            return Err(VerbsError::Register { bytes, source: failure() });
        }
        let remote = access == Access::RemoteWrite;
        let kept = if remote && inner.lie == Lie::Short { bytes / 2 } else { bytes };
        let told = if remote && inner.lie == Lie::Key { u32::MAX } else { 0 };
        let key = inner.number();
        let registration = Registration {
            domain: self.number,
            mappings: mappings.clone(),
            which,
            offset,
            bytes: kept,
            access,
        };
        inner.memory.insert(key, registration);
        let address = mappings[which].address() + offset;
        drop(inner);
        Ok(Arc::new(EmulatedRegion { network: self.network.clone(), key, told: key ^ told, address, bytes }))
    }

    fn queue_pair(&self, depths: Depths) -> Result<Connection, VerbsError> {
        let mut inner = self.network.lock();
        if inner.fails() {
            return Err(VerbsError::QueuePair(failure()));
        }
        let (sent, received) = (Queue::new(&self.network)?, Queue::new(&self.network)?);
        let number = inner.number();
        let pair = Pair {
            address: self.address,
            domain: self.number,
            depths,
            sent: sent.clone(),
            received: received.clone(),
            peer: None,
            peer_address: None,
            mtu: 0,
            retries: None,
            writes: false,
            sends: false,
            failed: false,
            buffers: VecDeque::new(),
            waiting: VecDeque::new(),
        };
        inner.queue_pairs.insert(number, pair);
        let queue_pair = Box::new(EmulatedPair { network: self.network.clone(), number });
        Ok(Connection { queue_pair, sent, received })
    }

    fn watched(&self) -> [BorrowedFd<'_>; 2] {
        [self.gone.told.as_fd(); 2]
    }

    fn is_gone(&self) -> bool {
        self.gone.is.load(Ordering::SeqCst)
    }
}

//! Guest RAM as a device has it registered: piece by piece, by threads of its own, while pages already move.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::RdmaError;
use super::fabric::{Access, Domain, Fabric, Region, VerbsError};
use super::pieces::Pieces;
use crate::memory::GuestMemory;
use crate::units::Run;

/// How many pieces of one device are registered at the same time: the kernel zeroes and pins each on one processor.
const AT_ONCE: usize = 4;
/// How often a wait looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(100);

/// What came of a piece.
pub(super) type Piece = Result<Arc<dyn Region>, Arc<VerbsError>>;

/// Told the pages that a peer can write from now on, before it can.
pub type AboutToExpose = Arc<dyn Fn(Run) + Send + Sync>;

/// Guest RAM for the RDMA channels of one session, device by device.
pub struct RdmaMemory {
    fabric: Arc<dyn Fabric>,
    memory: GuestMemory,
    access: Access,
    about_to_expose: Option<AboutToExpose>,
    devices: Arc<Mutex<Devices>>,
}

#[derive(Default)]
struct Devices {
    ended: bool,
    by_name: BTreeMap<String, Arc<Registered>>,
}

impl fmt::Debug for RdmaMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guest memory for {:?} of {:?}", self.access, self.fabric)
    }
}

impl RdmaMemory {
    /// Memory that channels send from: nobody reaches it from afar.
    #[must_use]
    pub fn to_read(fabric: Arc<dyn Fabric>, memory: GuestMemory) -> Self {
        Self { fabric, memory, access: Access::LocalRead, about_to_expose: None, devices: Arc::default() }
    }

    /// Memory that the source writes.
    #[must_use]
    pub fn to_write(fabric: Arc<dyn Fabric>, memory: GuestMemory, about_to_expose: AboutToExpose) -> Self {
        let about_to_expose = Some(about_to_expose);
        Self { fabric, memory, access: Access::RemoteWrite, about_to_expose, devices: Arc::default() }
    }

    /// The devices that it is for.
    #[must_use]
    pub fn fabric(&self) -> &Arc<dyn Fabric> {
        &self.fabric
    }

    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The memory on a device, with these pieces about to be registered if they are not. Fails where the process may not lock
    /// so much: each device locks it anew.
    pub(super) fn on(
        &self,
        device: &str,
        pieces: &Pieces,
        wanted: &[u32],
    ) -> Result<Arc<Registered>, RdmaError> {
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        if devices.ended {
            return Err(RdmaError::Ended);
        }
        let registered = match devices.by_name.get(device) {
            Some(registered) if registered.pieces == *pieces => registered.clone(),
            Some(_) => return Err(RdmaError::Pieces(pieces.piece_bytes())),
            None => {
                let needed = pieces.bytes_of(wanted) * (devices.by_name.len() as u64 + 1);
                if let Some(reason) = self.fabric.reason_against_locking(device, needed) {
                    return Err(RdmaError::Absent(reason));
                }
                let domain = self.fabric.domain(device).map_err(RdmaError::device(device))?;
                let registered = Registered {
                    device: device.to_owned(),
                    among: Arc::downgrade(&self.devices),
                    domain,
                    pieces: pieces.clone(),
                    memory: self.memory.clone(),
                    access: self.access,
                    about_to_expose: self.about_to_expose.clone(),
                    state: Mutex::new(State::new(pieces.count())),
                    changed: Condvar::new(),
                };
                let registered = Arc::new(registered);
                devices.by_name.insert(device.to_owned(), registered.clone());
                registered
            }
        };
        registered.want(wanted);
        Ok(registered)
    }

    /// Forgets a device that no channel uses, so that it is opened anew the next time: it may have gone and come back.
    pub(super) fn forget(&self, device: &str) {
        let forgotten = {
            let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
            let unused = devices.by_name.get(device).is_some_and(|known| Arc::strong_count(known) == 1);
            unused.then(|| devices.by_name.remove(device)).flatten()
        };
        drop(forgotten);
    }

    /// How many bytes are registered now, over all devices.
    #[must_use]
    pub fn registered_bytes(&self) -> u64 {
        let devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        devices.by_name.values().map(|registered| registered.bytes()).sum()
    }

    /// Takes the memory from all devices: no key is good any more when it returns.
    pub fn end(&self) {
        let devices = {
            let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
            devices.ended = true;
            std::mem::take(&mut devices.by_name)
        };
        for registered in devices.into_values() {
            registered.stop();
            registered.lock().slots.clear();
        }
    }
}

impl Drop for RdmaMemory {
    fn drop(&mut self) {
        self.end();
    }
}

/// The memory on one device.
pub(super) struct Registered {
    device: String,
    /// Where it is, for as long as it is wanted.
    among: Weak<Mutex<Devices>>,
    pub(super) domain: Arc<dyn Domain>,
    pub(super) pieces: Pieces,
    memory: GuestMemory,
    access: Access,
    about_to_expose: Option<AboutToExpose>,
    state: Mutex<State>,
    changed: Condvar,
}

impl fmt::Debug for Registered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "memory of {:?}", self.domain)
    }
}

struct State {
    slots: Vec<Slot>,
    queue: VecDeque<u32>,
    followers: Vec<Arc<Followed>>,
    /// Threads that take from the queue.
    workers: usize,
    threads: Vec<JoinHandle<()>>,
    ended: bool,
}

#[derive(Clone)]
enum Slot {
    /// Nobody wants it.
    Free,
    Queued,
    Done(Piece),
}

impl State {
    fn new(pieces: u32) -> Self {
        Self {
            slots: vec![Slot::Free; pieces as usize],
            queue: VecDeque::new(),
            followers: Vec::new(),
            workers: 0,
            threads: Vec::new(),
            ended: false,
        }
    }
}

impl Registered {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has pieces registered soon, in this order. Those that are, or are about to be, are left out.
    pub(super) fn want(self: &Arc<Self>, pieces: &[u32]) {
        let mut state = self.lock();
        if state.ended {
            return;
        }
        for &piece in pieces {
            if let Some(slot @ Slot::Free) = state.slots.get_mut(piece as usize) {
                *slot = Slot::Queued;
                state.queue.push_back(piece);
            }
        }
        let wanted = state.queue.len().min(AT_ONCE);
        while state.workers < wanted {
            let worker = self.clone();
            let thread =
                std::thread::Builder::new().name("pf-register".to_owned()).spawn(move || worker.work());
            match thread {
                Ok(thread) => {
                    state.workers += 1;
                    state.threads.retain(|thread| !thread.is_finished());
                    state.threads.push(thread);
                }
                // Whoever waits for a piece gives up in time; one worker is as good, only slower.
                Err(error) => {
                    tracing::warn!(%error, "no thread to register guest memory");
                    break;
                }
            }
        }
    }

    /// Registers what is queued, then ends.
    fn work(&self) {
        loop {
            let piece = {
                let mut state = self.lock();
                match state.queue.pop_front() {
                    Some(piece) if !state.ended => piece,
                    _ => {
                        state.workers -= 1;
                        return;
                    }
                }
            };
            let range = self.pieces.range(piece);
            if let Some(about_to_expose) = &self.about_to_expose {
                about_to_expose(self.pieces.run(piece));
            }
            let mappings = self.memory.shared_mappings();
            let made = self.domain.register(mappings, range.region, range.offset, range.bytes, self.access);
            let made = made.map_err(Arc::new);
            let mut state = self.lock();
            // Not kept when it ended meanwhile: the last one who holds it takes it from the device.
            if !state.ended {
                state.followers.iter().for_each(|follower| follower.tell(piece, made.clone()));
                state.slots[piece as usize] = Slot::Done(made);
            }
            drop(state);
            self.changed.notify_all();
        }
    }

    /// A piece that is wanted; `None` when it is not there yet.
    fn piece(state: &State, piece: u32) -> Option<Piece> {
        match state.slots.get(piece as usize) {
            Some(Slot::Done(done)) => Some(done.clone()),
            _ => None,
        }
    }

    /// Waits for a piece, which is wanted from now on, as long as `goes_on` says.
    pub(super) fn wait(
        self: &Arc<Self>,
        piece: u32,
        patience: Duration,
        goes_on: &dyn Fn() -> bool,
    ) -> Result<Arc<dyn Region>, RdmaError> {
        self.want(&[piece]);
        let begin = Instant::now();
        let mut state = self.lock();
        loop {
            if let Some(done) = Self::piece(&state, piece) {
                return done.map_err(RdmaError::Register);
            }
            if state.ended || !goes_on() {
                return Err(RdmaError::Ended);
            }
            if begin.elapsed() > patience {
                let seconds = patience.as_secs();
                return Err(RdmaError::Late { what: "the registration of a piece of guest memory", seconds });
            }
            state = self.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Tells of every piece that is registered, those that are already first.
    pub(super) fn follow(&self) -> Result<Arc<Followed>, std::io::Error> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let followed = Arc::new(Followed { event, told: Mutex::default() });
        let mut state = self.lock();
        for piece in 0..self.pieces.count() {
            if let Some(done) = Self::piece(&state, piece) {
                followed.tell(piece, done);
            }
        }
        state.followers.retain(|follower| Arc::strong_count(follower) > 1);
        state.followers.push(followed.clone());
        Ok(followed)
    }

    /// Whether the device is being taken away; then nothing is kept of it but what channels have.
    pub(super) fn check_device(self: &Arc<Self>) -> Result<(), RdmaError> {
        if !self.domain.is_gone() {
            return Ok(());
        }
        if let Some(devices) = self.among.upgrade() {
            let mut devices = devices.lock().unwrap_or_else(PoisonError::into_inner);
            if devices.by_name.get(&self.device).is_some_and(|found| Arc::ptr_eq(found, self)) {
                devices.by_name.remove(&self.device);
            }
        }
        self.stop();
        self.lock().slots.clear();
        Err(RdmaError::Gone(self.device.clone()))
    }

    fn bytes(&self) -> u64 {
        let state = self.lock();
        let done = |piece: &u32| matches!(state.slots.get(*piece as usize), Some(Slot::Done(Ok(_))));
        (0..self.pieces.count()).filter(done).map(|piece| self.pieces.range(piece).bytes).sum()
    }

    /// Registers nothing more; when it returns nothing is being registered either.
    fn stop(&self) {
        let threads = {
            let mut state = self.lock();
            state.ended = true;
            state.queue.clear();
            state.followers.clear();
            std::mem::take(&mut state.threads)
        };
        self.changed.notify_all();
        for thread in threads {
            // A thread that panicked has ended as well.
            let _ = thread.join();
        }
    }
}

/// What was registered, for one who waits for a descriptor.
pub(super) struct Followed {
    pub(super) event: rustix::fd::OwnedFd,
    told: Mutex<Vec<(u32, Piece)>>,
}

impl Followed {
    fn tell(&self, piece: u32, done: Piece) {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).push((piece, done));
        // Full only when it was told 2^64 times.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// What was told since the last call.
    pub(super) fn take(&self) -> Vec<(u32, Piece)> {
        let _ = rustix::io::read(&self.event, &mut [0u8; 8]);
        std::mem::take(&mut *self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

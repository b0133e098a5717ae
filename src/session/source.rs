//! The source's end of a session: rounds of pages, spread over channels.
//!
//! Two threads per channel: one takes work from the queue ([`super::striping`]) and pushes it, one waits for what the
//! destination confirms. They share one lock, which is held for a queue operation, never for I/O. One more thread opens lost
//! channels again ([`opening`]).

mod carrying;
mod loss;
mod opening;
mod rdma_side;
pub mod timing;

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use super::caps::RateCaps;
use super::encryption::EncryptionPolicy;
use super::error::SessionError;
use super::lock;
use super::mode::TransferMode;
use super::pace::Paces;
use super::path::Path;
use super::rdma::RdmaSupport;
use super::report::{ChannelStats, RoundStats, SessionEvent, SessionStats};
use super::striping::{Striping, Work};
use super::worker::Batched;
use crate::channel::{Carrier, ChannelError, ChannelLink, ChannelReceipts};
use crate::codec::level::Findings;
use crate::memory::GuestMemory;
use crate::pageset::PageSet;
use crate::units::{PAGE_SIZE, RoundId};
use crate::wire::data::{BarrierId, ChannelId, FENCED_BYTES, HEADER_BYTES, MAX_CHANNELS, Receipt};
use crate::wire::preamble::{MigrationId, Secret};
use carrying::Carrying;
use opening::Missing;
use rdma_side::RdmaSide;
use timing::Clocks;

/// How long a channel that waits for a cap goes without looking whether it was raised.
const LOOK_AT_CAPS: Duration = Duration::from_millis(100);

/// How a source session is opened.
#[derive(Clone, Debug)]
pub struct SourceOptions {
    /// The migration that the channels belong to.
    pub migration: MigrationId,
    /// What the destination wants to see of each.
    pub secret: Secret,
    /// The ways to the destination.
    pub paths: Vec<Path>,
    /// How many channels in all; they are dealt to the paths in turn.
    pub channels: usize,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// [`TransferMode::Compression`] compresses where that is faster. [`TransferMode::Rdma`] has pages written by RDMA on the paths
    /// that have it, and goes over to TCP when none has, or none any more. Every other mode sends pages as they are.
    pub mode: TransferMode,
    /// The devices for [`TransferMode::Rdma`].
    pub rdma: RdmaSupport,
    /// On which paths payload has to be encrypted, and with what.
    pub encryption: EncryptionPolicy,
    /// Bytes a second that the channels may send.
    pub rate_caps: RateCaps,
    /// How long a silent link takes to count as lost, and a connection may take to come about.
    pub link_timeout: Duration,
    /// How long a round waits for one of its channels to come back when none lives; lost channels are opened again meanwhile, and
    /// all along. `None` is not at all: a round fails with its last channel.
    pub reopen: Option<Duration>,
    /// Failure injection: the channel of this number is cut after it has sent so many bytes.
    pub cut: Option<(usize, u64)>,
}

/// Places pages of a guest in the destination's memory, in rounds. Dropping it ends it, as [`SourceSession::close`] does.
#[derive(Debug)]
pub struct SourceSession {
    shared: Arc<SourceShared>,
}

/// What the threads of a session share.
#[derive(Debug)]
pub(super) struct SourceShared {
    pub(super) options: SourceOptions,
    /// Guest RAM on this host's devices, where RDMA is to be used.
    rdma: Option<RdmaSide>,
    events: Sender<SessionEvent>,
    pub(super) begin: Instant,
    state: Mutex<State>,
    wake: Condvar,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug)]
struct State {
    striping: Striping,
    lanes: Vec<Lane>,
    next_channel: u32,
    paces: Paces,
    /// What channels find out of compression, by their interface.
    findings: BTreeMap<Option<String>, Findings>,
    round: RoundStats,
    /// Pages of rounds that are over.
    placed_before: u64,
    /// Pages of the round under way, when it began.
    round_pages: u64,
    wire_bytes: u64,
    clocks: Clocks,
    last_loss: Option<Arc<ChannelError>>,
    /// Paths that lack a channel, to be opened again.
    missing: Missing,
    carrying: Carrying,
    /// Since when not one channel lives.
    none_since: Option<Duration>,
    /// No round comes any more: the destination may close its ends.
    resting: bool,
    ended: bool,
}

#[derive(Debug)]
struct Lane {
    id: ChannelId,
    path: Path,
    link: Arc<dyn ChannelLink>,
    interface: Option<String>,
    bytes: u64,
    alive: bool,
}

impl SourceSession {
    /// Opens all channels, at the same time.
    ///
    /// # Errors
    /// [`SessionError::NoPath`], or [`SessionError::NoChannel`] when not one opens. When some open, the others are told as
    /// [`SessionEvent::ChannelLost`].
    pub fn open(options: SourceOptions, events: Sender<SessionEvent>) -> Result<Self, SessionError> {
        let wanted = options.channels.max(1);
        if wanted > MAX_CHANNELS {
            return Err(SessionError::TooManyChannels);
        }
        if options.paths.is_empty() {
            return Err(SessionError::NoPath);
        }
        let paths = opening::dealt(&options);
        let session = Self::new(options, events);
        let mut opened = session.shared.dial_all(&paths);
        if opened.iter().all(|(_, _, dialled)| dialled.is_err()) && session.shared.is_carried_by_rdma() {
            session.shared.do_without_rdma(&opened);
            opened = session.shared.dial_all(&paths);
        }
        let mut failures = Vec::new();
        for (id, path, dialled) in opened {
            if let Err(cause) = dialled.and_then(|open| session.shared.attach(id, path, open)) {
                failures.push((id, path, cause));
            }
        }
        if failures.len() == wanted {
            let first = Box::new(failures.swap_remove(0).2);
            return Err(SessionError::NoChannel { tried: wanted, first });
        }
        for (channel, path, cause) in failures {
            session.shared.did_not_open(channel, path, cause);
        }
        session.shared.keep_channels_up()?;
        Ok(session)
    }

    fn new(options: SourceOptions, events: Sender<SessionEvent>) -> Self {
        let rdma = RdmaSide::of(&options);
        let state = State {
            striping: Striping::new(options.memory.layout().clone()),
            lanes: Vec::new(),
            next_channel: 0,
            paces: Paces::new(&options.rate_caps),
            findings: BTreeMap::new(),
            round: RoundStats::default(),
            placed_before: 0,
            round_pages: 0,
            wire_bytes: 0,
            clocks: Clocks::new(),
            last_loss: None,
            missing: Missing::default(),
            carrying: Carrying::new(options.mode, rdma.is_some()),
            none_since: None,
            resting: false,
            ended: false,
        };
        let shared = SourceShared {
            options,
            rdma,
            events,
            begin: Instant::now(),
            state: Mutex::new(state),
            wake: Condvar::new(),
            threads: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Opens one more channel, which takes part at once.
    ///
    /// # Errors
    /// Why it did not open.
    pub fn add_channel(&self, path: Path) -> Result<ChannelId, SessionError> {
        self.shared.add_channel(path)
    }

    /// Begins a round; its end is told by [`SessionEvent::Placed`] or [`SessionEvent::Failed`].
    ///
    /// # Panics
    /// If a round is under way, or the pages are of another guest.
    pub fn place(&self, round: RoundId, pages: PageSet) {
        self.shared.come_back();
        let mut state = self.shared.lock();
        if state.ended {
            drop(state);
            self.shared.tell(SessionEvent::Failed { cause: SessionError::Ended, owed: pages });
            return;
        }
        if state.striping.live_channels() == 0 && self.shared.options.reopen.is_none() {
            let cause = SessionError::AllChannelsLost { last: state.last_loss.clone() };
            drop(state);
            self.shared.tell(SessionEvent::Failed { cause, owed: pages });
            return;
        }
        state.round = RoundStats::default();
        state.striping.begin(round, pages);
        state.round_pages = state.striping.remaining_pages();
        drop(state);
        self.shared.wake.notify_all();
    }

    /// Ends the session at once. Answers the pages of the round under way that the destination has not confirmed; no event
    /// follows.
    pub fn abort(&self) -> PageSet {
        self.shared.end()
    }

    /// How it stands. Cheap enough for every progress line.
    #[must_use]
    pub fn stats(&self) -> SessionStats {
        let state = self.shared.lock();
        let remaining_pages = state.striping.remaining_pages();
        let carried_by = |carrier: &Carrier| match carrier {
            Carrier::Rdma { .. } => TransferMode::Rdma,
            Carrier::Tcp | Carrier::Sealed => state.carrying.over_tcp(),
        };
        let channel = |lane: &Lane| ChannelStats {
            id: lane.id,
            local: lane.link.local(),
            remote: lane.link.remote(),
            interface: lane.interface.clone(),
            path: lane.path,
            bytes: lane.bytes,
            alive: lane.alive,
            mode: carried_by(&lane.link.carrier()),
            carrier: lane.link.carrier(),
        };
        SessionStats {
            channels: state.lanes.iter().map(channel).collect(),
            placed_pages: state.placed_before + state.round_pages - remaining_pages,
            remaining_pages,
            wire_bytes: state.wire_bytes,
            mode: state.carrying.mode(),
            mode_reason: state.carrying.reason(),
            none_for: state.none_since.map(|since| self.shared.now().saturating_sub(since)),
        }
    }

    /// The last round is over: from now on a channel that ends is not lost, and none is opened again.
    pub fn rest(&self) {
        self.shared.lock().resting = true;
    }

    /// The guest is about to pause: what carries the pages stays, unless it is lost.
    pub fn settle(&self) {
        self.shared.lock().carrying.settle();
    }

    /// Gives up the channels of an interface that has gone down, which TCP would notice only after the link timeout.
    pub fn interface_is_down(&self, interface: &str) {
        let state = self.shared.lock();
        for lane in
            state.lanes.iter().filter(|lane| lane.alive && lane.interface.as_deref() == Some(interface))
        {
            // Its threads notice, and tell.
            lane.link.shut();
        }
    }

    /// Closes all channels and waits for their threads.
    pub fn close(self) {
        drop(self);
    }
}

impl Drop for SourceSession {
    fn drop(&mut self) {
        self.shared.end();
        for thread in std::mem::take(&mut *lock(&self.shared.threads)) {
            // A thread that panicked has ended as well.
            let _ = thread.join();
        }
        if let Some(rdma) = &self.shared.rdma {
            rdma.end();
        }
    }
}

/// What a channel is to do.
pub(super) struct Next {
    pub(super) work: Work,
    /// Whether there was nothing to do for a while, the wait for a cap not counted.
    pub(super) idle: bool,
    /// How long a cap holds the channel back.
    pub(super) held: Duration,
    /// How many channels use its interface.
    pub(super) sharing: usize,
}

impl SourceShared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn tell(&self, event: SessionEvent) {
        // Nobody listens any more: the session's owner has gone.
        let _ = self.events.send(event);
    }

    fn now(&self) -> Duration {
        self.begin.elapsed()
    }

    /// Waits for work. `None` when the channel is of no use any more. Work is handed out so much before the caps on the rate
    /// let it go, for the channel needs that long before it sends.
    pub(super) fn next_work(&self, id: ChannelId, lead: Duration) -> Option<Next> {
        let mut state = self.lock();
        let (mut idle, mut held) = (false, Duration::ZERO);
        state.clocks.waits(id, self.now());
        loop {
            if state.ended || !state.is_alive(id) {
                return None;
            }
            let unpaid = state.unpaid(id, &self.options.rate_caps, self.now());
            held = held.max(unpaid);
            if unpaid > lead {
                // Caps may be raised meanwhile.
                state = self.wait(state, (unpaid - lead).min(LOOK_AT_CAPS));
                continue;
            }
            match state.striping.take(id) {
                Work::Wait => {
                    idle = true;
                    state = self.wake.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
                }
                work => {
                    state.clocks.works(id, self.now(), matches!(work, Work::Barrier { .. }));
                    // Counted before it is sent: its confirmation ends the round, and may be faster than this thread.
                    if let Work::Barrier { fenced, .. } = &work {
                        state.count(id, (HEADER_BYTES + fenced.len() * FENCED_BYTES) as u64);
                    }
                    return Some(Next { work, idle, held, sharing: state.sharing(id) });
                }
            }
        }
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, at_most: Duration) -> MutexGuard<'a, State> {
        self.wake.wait_timeout(state, at_most).unwrap_or_else(std::sync::PoisonError::into_inner).0
    }

    /// A channel has sent what it took; answers how many bytes it has sent in all.
    pub(super) fn sent(&self, id: ChannelId, batch: &Batched) -> u64 {
        let now = self.now();
        let mut state = self.lock();
        state.charge(id, now, batch.wire_bytes);
        state.clocks.sent(id, batch, now);
        if state.striping.round().is_some() {
            state.round.pages += batch.pages;
            state.round.zero_pages += batch.zero_pages;
            state.round.payload_bytes += (batch.pages - batch.zero_pages) * PAGE_SIZE;
        }
        if batch.pages > 0 {
            state.striping.posted(id, batch.sequence);
        }
        state.count(id, batch.wire_bytes)
    }

    /// The thread that waits for what the destination confirms on a channel.
    fn receive(&self, id: ChannelId, mut receipts: Box<dyn ChannelReceipts>) {
        loop {
            match receipts.next() {
                Ok(Receipt::Placed(sequence)) => self.confirmed(id, sequence),
                Ok(Receipt::Barrier(barrier)) => {
                    if let Err(cause) = self.reached(id, barrier) {
                        return self.lost(id, cause);
                    }
                }
                Ok(Receipt::Error(text)) => return self.lost(id, ChannelError::Peer(text)),
                Err(cause) => return self.lost(id, cause),
            }
            self.wake.notify_all();
        }
    }

    fn reached(&self, id: ChannelId, barrier: BarrierId) -> Result<(), ChannelError> {
        let mut state = self.lock();
        if !state.striping.knows_barrier(id, barrier) {
            return Err(ChannelError::ConfirmsBarrier { got: barrier.0 });
        }
        state.clocks.barrier_reached(id, self.now());
        if let Some(round) = state.striping.barrier_reached(id, barrier) {
            state.placed_before += std::mem::take(&mut state.round_pages);
            let stats = state.round;
            drop(state);
            self.tell(SessionEvent::Placed { round, stats });
        }
        Ok(())
    }

    fn end(&self) -> PageSet {
        let mut state = self.lock();
        state.ended = true;
        let owed = state.abort_round();
        for lane in &mut state.lanes {
            lane.alive = false;
            lane.link.shut();
        }
        let standby = state.carrying.take_standby();
        drop(state);
        drop(standby);
        self.wake.notify_all();
        owed
    }
}

impl State {
    /// How long a channel has to wait until what was sent so far is within the caps.
    fn unpaid(&mut self, id: ChannelId, caps: &RateCaps, now: Duration) -> Duration {
        self.paces.follow(caps);
        let interface =
            self.lanes.iter().find(|lane| lane.id == id).and_then(|lane| lane.interface.as_deref());
        self.paces.wait(interface, now)
    }

    fn charge(&mut self, id: ChannelId, now: Duration, bytes: u64) {
        let interface =
            self.lanes.iter().find(|lane| lane.id == id).and_then(|lane| lane.interface.as_deref());
        self.paces.charge(interface, now, bytes);
    }

    /// What the channels of an interface find out of compression together.
    fn findings(&mut self, interface: Option<String>) -> Findings {
        let others = self.findings.values().next().map(Findings::of_another_wire).unwrap_or_default();
        self.findings.entry(interface).or_insert(others).clone()
    }

    fn sharing(&self, id: ChannelId) -> usize {
        let Some(own) = self.lanes.iter().find(|lane| lane.id == id) else { return 1 };
        self.lanes.iter().filter(|lane| lane.alive && lane.interface == own.interface).count()
    }

    fn is_alive(&self, id: ChannelId) -> bool {
        self.lanes.iter().any(|lane| lane.id == id && lane.alive)
    }

    /// Counts bytes that a channel sends; answers how many it has sent in all.
    fn count(&mut self, id: ChannelId, bytes: u64) -> u64 {
        self.wire_bytes += bytes;
        if self.striping.round().is_some() {
            self.round.wire_bytes += bytes;
        }
        let Some(lane) = self.lanes.iter_mut().find(|lane| lane.id == id) else { return 0 };
        lane.bytes += bytes;
        lane.bytes
    }

    fn abort_round(&mut self) -> PageSet {
        let confirmed = self.round_pages - self.striping.remaining_pages();
        self.placed_before += confirmed;
        self.round_pages = 0;
        self.striping.abort()
    }
}

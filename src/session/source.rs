//! The source's end of a session: rounds of pages, spread over channels.
//!
//! Two threads per channel: one takes work from the queue ([`super::striping`]) and pushes it, one waits for what the
//! destination confirms. They share one lock, which is held for a queue operation, never for I/O.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use super::error::SessionError;
use super::handshake::dial;
use super::mode::TransferMode;
use super::pace::Pace;
use super::path::{Path, interface_of};
use super::report::{ChannelStats, RoundStats, SessionEvent, SessionStats};
use super::striping::{Striping, Work};
use super::worker::{Batched, Worker};
use super::{lock, spawn};
use crate::channel::tcp::{self, TcpOptions};
use crate::channel::{ChannelError, ChannelLink, ChannelReceipts, OpenChannel};
use crate::memory::GuestMemory;
use crate::pageset::PageSet;
use crate::units::{PAGE_SIZE, RoundId};
use crate::wire::data::{BarrierId, ChannelId, FENCED_BYTES, HEADER_BYTES, MAX_CHANNELS, Receipt};
use crate::wire::preamble::{MigrationId, Preamble, Purpose, Secret};

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
    /// [`TransferMode::Compression`] compresses where that is faster; every other mode sends pages as they are.
    pub mode: TransferMode,
    /// Bytes a second that all channels together may send.
    pub rate_cap: Option<u64>,
    /// How long a silent link takes to count as lost, and a connection may take to come about.
    pub link_timeout: Duration,
    /// Failure injection: the channel of this number is cut after it has sent so many bytes.
    pub cut: Option<(usize, u64)>,
}

/// Places pages of a guest in the destination's memory, in rounds. Dropping it ends it, as [`SourceSession::close`] does.
#[derive(Debug)]
pub struct SourceSession {
    shared: Arc<SourceShared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What the threads of a session share.
#[derive(Debug)]
pub(super) struct SourceShared {
    pub(super) options: SourceOptions,
    events: Sender<SessionEvent>,
    begin: Instant,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug)]
struct State {
    striping: Striping,
    lanes: Vec<Lane>,
    next_channel: u32,
    pace: Option<Pace>,
    round: RoundStats,
    /// Pages of rounds that are over.
    placed_before: u64,
    /// Pages of the round under way, when it began.
    round_pages: u64,
    wire_bytes: u64,
    last_loss: Option<Arc<ChannelError>>,
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
        let paths: Vec<Path> = options.paths.iter().copied().cycle().take(wanted).collect();
        let dialled = dial_all(&options, &paths);
        let session = Self::new(options, wanted as u32, events);
        let mut failures = Vec::new();
        for (index, (path, dialled)) in paths.into_iter().zip(dialled).enumerate() {
            let id = ChannelId(index as u32);
            let attached = dialled.and_then(|open| session.attach(id, path, open));
            if let Err(cause) = attached {
                failures.push((id, path, cause));
            }
        }
        if failures.len() == wanted {
            let first = Box::new(failures.swap_remove(0).2);
            return Err(SessionError::NoChannel { tried: wanted, first });
        }
        for (channel, path, cause) in failures {
            session.shared.tell(SessionEvent::ChannelLost { channel, path, cause });
        }
        Ok(session)
    }

    fn new(options: SourceOptions, next_channel: u32, events: Sender<SessionEvent>) -> Self {
        let state = State {
            striping: Striping::new(options.memory.layout().clone()),
            lanes: Vec::new(),
            next_channel,
            pace: options.rate_cap.map(Pace::new),
            round: RoundStats::default(),
            placed_before: 0,
            round_pages: 0,
            wire_bytes: 0,
            last_loss: None,
            ended: false,
        };
        let shared = SourceShared {
            options,
            events,
            begin: Instant::now(),
            state: Mutex::new(state),
            wake: Condvar::new(),
        };
        Self { shared: Arc::new(shared), threads: Mutex::default() }
    }

    /// Opens one more channel, which takes part at once.
    ///
    /// # Errors
    /// Why it did not open.
    pub fn add_channel(&self, path: Path) -> Result<ChannelId, SessionError> {
        let id = {
            let mut state = self.shared.lock();
            if state.ended {
                return Err(SessionError::Ended);
            }
            if state.next_channel as usize >= MAX_CHANNELS {
                return Err(SessionError::TooManyChannels);
            }
            state.next_channel += 1;
            ChannelId(state.next_channel - 1)
        };
        let open = dial_channel(&self.shared.options, id, &path)?;
        self.attach(id, path, open)?;
        Ok(id)
    }

    /// Starts the threads of a channel.
    fn attach(&self, id: ChannelId, path: Path, open: OpenChannel) -> Result<(), SessionError> {
        let OpenChannel { source, receipts, link } = open;
        let interface = interface_of(link.local().ip()).ok().flatten();
        let lane = Lane { id, path, link: link.clone(), interface, bytes: 0, alive: true };
        {
            let mut state = self.shared.lock();
            if state.ended {
                return Err(SessionError::Ended);
            }
            state.lanes.push(lane);
            state.striping.add_channel(id);
        }
        let worker = Worker::new(self.shared.clone(), id, source, link);
        let shared = self.shared.clone();
        let started =
            spawn(&format!("pf-acks-{id}"), move || shared.receive(id, receipts)).and_then(|receiver| {
                lock(&self.threads).push(receiver);
                spawn(&format!("pf-push-{id}"), move || worker.run())
            });
        match started {
            Ok(thread) => lock(&self.threads).push(thread),
            Err(cause) => {
                self.shared.forget(id);
                return Err(cause);
            }
        }
        Ok(())
    }

    /// Begins a round; its end is told by [`SessionEvent::Placed`] or [`SessionEvent::Failed`].
    ///
    /// # Panics
    /// If a round is under way, or the pages are of another guest.
    pub fn place(&self, round: RoundId, pages: PageSet) {
        let mut state = self.shared.lock();
        if state.ended {
            drop(state);
            self.shared.tell(SessionEvent::Failed { cause: SessionError::Ended, owed: pages });
            return;
        }
        if state.striping.live_channels() == 0 {
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
        let mode = match self.shared.options.mode {
            TransferMode::Compression => TransferMode::Compression,
            _ => TransferMode::Tcp,
        };
        let channel = |lane: &Lane| ChannelStats {
            id: lane.id,
            local: lane.link.local(),
            remote: lane.link.remote(),
            interface: lane.interface.clone(),
            bytes: lane.bytes,
            alive: lane.alive,
            mode,
        };
        SessionStats {
            channels: state.lanes.iter().map(channel).collect(),
            placed_pages: state.placed_before + state.round_pages - remaining_pages,
            remaining_pages,
            wire_bytes: state.wire_bytes,
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
        for thread in std::mem::take(&mut *lock(&self.threads)) {
            // A thread that panicked has ended as well.
            let _ = thread.join();
        }
    }
}

fn dial_all(options: &SourceOptions, paths: &[Path]) -> Vec<Result<OpenChannel, SessionError>> {
    std::thread::scope(|scope| {
        let dialling: Vec<_> = paths
            .iter()
            .enumerate()
            .map(|(index, path)| {
                let id = ChannelId(index as u32);
                let name = format!("pf-dial-{id}");
                std::thread::Builder::new()
                    .name(name.clone())
                    .spawn_scoped(scope, move || dial_channel(options, id, path))
                    .map_err(|cause| SessionError::Thread { what: name, cause })
            })
            .collect();
        dialling
            .into_iter()
            .map(|thread| thread?.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

fn dial_channel(options: &SourceOptions, id: ChannelId, path: &Path) -> Result<OpenChannel, SessionError> {
    let purpose = Purpose::Data { channel: id.0 };
    let preamble = Preamble::new(purpose, options.migration, options.secret);
    let (stream, _) = dial(path, &preamble, options.link_timeout)?;
    let tcp_options = TcpOptions { link_timeout: options.link_timeout, ..TcpOptions::default() };
    tcp::open(stream, options.memory.clone(), tcp_options)
        .map_err(|cause| SessionError::Channel { remote: path.destination, cause })
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

    /// Waits for work. `None` when the channel is of no use any more. Also answers whether there was nothing to do for a
    /// while, the wait for the rate cap not counted.
    pub(super) fn next_work(&self, id: ChannelId) -> Option<(Work, bool)> {
        let mut state = self.lock();
        let mut idle = false;
        loop {
            if state.ended || !state.is_alive(id) {
                return None;
            }
            let unpaid = state.pace.map_or(Duration::ZERO, |pace| pace.wait(self.now()));
            if !unpaid.is_zero() {
                state = self.wait(state, unpaid);
                continue;
            }
            match state.striping.take(id) {
                Work::Wait => {
                    idle = true;
                    state = self.wake.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
                }
                work => {
                    // Counted before it is sent: its confirmation ends the round, and may be faster than this thread.
                    if let Work::Barrier { fenced, .. } = &work {
                        state.count(id, (HEADER_BYTES + fenced.len() * FENCED_BYTES) as u64);
                    }
                    return Some((work, idle));
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
        if let Some(pace) = &mut state.pace {
            pace.charge(now, batch.wire_bytes);
        }
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
                Ok(Receipt::Placed(sequence)) => self.lock().striping.confirm(id, sequence),
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
        if let Some(round) = state.striping.barrier_reached(id, barrier) {
            state.placed_before += std::mem::take(&mut state.round_pages);
            let stats = state.round;
            drop(state);
            self.tell(SessionEvent::Placed { round, stats });
        }
        Ok(())
    }

    /// The pushing thread of a channel failed. What the destination said before it closed the channel explains more than that
    /// the socket is closed, so the receiving thread goes first if it has something.
    pub(super) fn push_failed(&self, id: ChannelId, cause: ChannelError) {
        const A_MOMENT: Duration = Duration::from_millis(50);
        let deadline = Instant::now() + A_MOMENT;
        let mut state = self.lock();
        while state.is_alive(id) && Instant::now() < deadline {
            state = self.wait(state, A_MOMENT);
        }
        drop(state);
        self.lost(id, cause);
    }

    fn lost(&self, id: ChannelId, cause: ChannelError) {
        let mut state = self.lock();
        let ended = state.ended;
        let Some(lane) = state.lanes.iter_mut().find(|lane| lane.id == id && lane.alive) else { return };
        lane.alive = false;
        lane.link.shut();
        if ended {
            return;
        }
        let (path, remote, cause) = (lane.path, lane.link.remote(), Arc::new(cause));
        state.last_loss = Some(cause.clone());
        let in_round = state.striping.round().is_some();
        state.striping.channel_lost(id);
        // A peer that lies on one channel is not to be believed on another.
        let refused = cause.is_violation();
        if refused {
            state.lose_all();
        }
        let owed = (in_round && state.striping.live_channels() == 0).then(|| state.abort_round());
        // Under the lock, so that the loss of another channel cannot be told in between.
        let lost = SessionError::ChannelLost { remote, cause: cause.clone() };
        self.tell(SessionEvent::ChannelLost { channel: id, path, cause: lost });
        if let Some(owed) = owed {
            let all_lost = || SessionError::AllChannelsLost { last: Some(cause.clone()) };
            let cause = refused.then(|| SessionError::NotPlaceable { remote, cause: cause.clone() });
            self.tell(SessionEvent::Failed { cause: cause.unwrap_or_else(all_lost), owed });
        }
        drop(state);
        self.wake.notify_all();
    }

    /// A channel whose threads did not start.
    fn forget(&self, id: ChannelId) {
        let mut state = self.lock();
        if let Some(at) = state.lanes.iter().position(|lane| lane.id == id) {
            state.lanes.remove(at).link.shut();
        }
        state.striping.channel_lost(id);
    }

    fn end(&self) -> PageSet {
        let mut state = self.lock();
        state.ended = true;
        let owed = state.abort_round();
        for lane in &mut state.lanes {
            lane.alive = false;
            lane.link.shut();
        }
        drop(state);
        self.wake.notify_all();
        owed
    }
}

impl State {
    fn is_alive(&self, id: ChannelId) -> bool {
        self.lanes.iter().any(|lane| lane.id == id && lane.alive)
    }

    fn lose_all(&mut self) {
        for lane in self.lanes.iter_mut().filter(|lane| lane.alive) {
            lane.alive = false;
            lane.link.shut();
            self.striping.channel_lost(lane.id);
        }
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

//! The destination's end of a session: channels that write into a guest's memory, and barriers between them.
//!
//! One thread per channel. The listener attaches channels as they come in; the source gives them their numbers. A number
//! that was given up (fenced) never attaches again.

mod attaching;
mod placing;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use super::encryption::Encryption;
use super::error::SessionError;
use super::lock;
use super::mode::TransferMode;
use super::path::Path;
use super::rdma::RdmaSupport;
use super::report::ChannelStats;
use super::written::WrittenPages;
use crate::channel::tcp::TcpOptions;
use crate::channel::{Arrival, Carrier, ChannelError, ChannelLink, ChannelReceiver, chain};
use crate::codec::Decompressor;
use crate::memory::GuestMemory;
use crate::memory::huge::HugeFiller;
use crate::pageset::PageSet;
use crate::units::{PAGE_SIZE, Run};
use crate::wire::data::{BarrierId, ChannelId, MAX_CHANNELS, Receipt};
use crate::wire::preamble::MigrationId;
use attaching::Exposed;
use placing::{Counted, unpack};

/// A confirmation is sent after this many frames, or
const CONFIRM_FRAMES: u64 = 8;
/// after this many bytes of pages: 1/16 of what a source has unconfirmed at most.
const CONFIRM_BYTES: u64 = 4 << 20;

/// What happens in a destination session.
#[derive(Debug)]
pub enum DestinationEvent {
    /// A channel came in.
    ChannelAttached {
        /// Its number.
        channel: ChannelId,
        /// Its statistics, with the addresses and the interface.
        stats: ChannelStats,
    },
    /// A channel is gone. Its unconfirmed pages come again over another.
    ChannelLost {
        /// Its number.
        channel: ChannelId,
        /// Why; [`ChannelError::Closed`] below it is the orderly end.
        cause: SessionError,
    },
    /// The source broke the protocol; the migration must end.
    Violation {
        /// The channel on which it did.
        channel: ChannelId,
        /// How.
        cause: SessionError,
    },
}

/// What a destination session has received so far.
#[derive(Clone, Debug, Default)]
pub struct DestinationStats {
    /// Each channel that ever was.
    pub channels: Vec<ChannelStats>,
    /// Pages written, those that came again counted again.
    pub placed_pages: u64,
    /// Pages that came as zero.
    pub zero_pages: u64,
    /// Bytes that came over all channels, headers included.
    pub wire_bytes: u64,
    /// How long its threads took to put pages into memory, all together, the wait for the bytes not counted.
    pub placing: Duration,
    /// How much of that was taking compressed pages apart.
    pub unpacking: Duration,
}

/// Takes the pages of one migration. Dropping it ends it, as [`DestinationSession::close`] does.
#[derive(Debug)]
pub struct DestinationSession {
    shared: Arc<DestinationShared>,
}

/// The part of a session that its threads and the listener share.
#[derive(Debug)]
pub(super) struct DestinationShared {
    memory: GuestMemory,
    migration: MigrationId,
    options: TcpOptions,
    events: Sender<DestinationEvent>,
    /// Pages that something other than zero was, or may have been, written to.
    written: Arc<WrittenPages>,
    filler: HugeFiller,
    /// Memory that RDMA may write.
    rdma: Exposed,
    /// What this host demands of the payload.
    encryption: Encryption,
    state: Mutex<State>,
    /// A channel finished, or is waiting at a barrier.
    quiet: Condvar,
}

#[derive(Debug, Default)]
struct State {
    channels: BTreeMap<ChannelId, Attached>,
    fenced: BTreeSet<ChannelId>,
    ended: bool,
    threads: Vec<JoinHandle<()>>,
    counted: Counted,
}

#[derive(Debug)]
struct Attached {
    link: Arc<dyn ChannelLink>,
    interface: Option<String>,
    bytes: u64,
    /// It will never touch the memory again.
    finished: bool,
    /// It waits at a barrier, and touches no memory unless it is still wanted afterwards.
    parked: bool,
}

impl Attached {
    fn stats(&self, id: ChannelId) -> ChannelStats {
        ChannelStats {
            id,
            local: self.link.local(),
            remote: self.link.remote(),
            interface: self.interface.clone(),
            path: Path { source: Some(self.link.remote().ip()), ..Path::to(self.link.local()) },
            bytes: self.bytes,
            alive: !self.finished,
            mode: match self.link.carrier() {
                Carrier::Tcp | Carrier::Sealed => TransferMode::Tcp,
                Carrier::Rdma { .. } => TransferMode::Rdma,
            },
            carrier: self.link.carrier(),
        }
    }
}

impl DestinationSession {
    /// A session without channels, and without RDMA. The memory is fresh: pages that the source says are zero are left alone
    /// unless this session wrote to them.
    #[must_use]
    pub fn new(memory: GuestMemory, migration: MigrationId, events: Sender<DestinationEvent>) -> Self {
        let rdma = RdmaSupport::off("this session takes none");
        let (timeout, plain) = (TcpOptions::default().link_timeout, Encryption::default());
        Self::with(memory, migration, timeout, &rdma, plain, events)
    }

    /// As [`DestinationSession::new`], with another time after which a silent channel counts as lost, RDMA where there is, and
    /// payload in plain only where it may be.
    #[must_use]
    pub fn with(
        memory: GuestMemory,
        migration: MigrationId,
        link_timeout: Duration,
        rdma: &RdmaSupport,
        encryption: Encryption,
        events: Sender<DestinationEvent>,
    ) -> Self {
        let written = Arc::new(WrittenPages::new(memory.layout().total_pages()));
        let shared = DestinationShared {
            rdma: Exposed::of(&memory, rdma, link_timeout, &written),
            encryption,
            written,
            filler: HugeFiller::default(),
            memory,
            migration,
            options: TcpOptions { link_timeout, ..TcpOptions::default() },
            events,
            state: Mutex::default(),
            quiet: Condvar::new(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// These pages of the memory hold something already: where the source says that one is zero, it is made so.
    pub fn used_before(&self, pages: &PageSet) {
        let runs: Vec<Run> = pages.runs().collect();
        self.shared.written.insert(&runs);
    }

    /// What came so far.
    #[must_use]
    pub fn stats(&self) -> DestinationStats {
        let state = self.shared.lock();
        DestinationStats {
            channels: state.channels.iter().map(|(id, channel)| channel.stats(*id)).collect(),
            placed_pages: state.counted.placed_pages,
            zero_pages: state.counted.zero_pages,
            wire_bytes: state.counted.wire_bytes,
            placing: state.counted.placing + state.counted.unpacking,
            unpacking: state.counted.unpacking,
        }
    }

    /// Closes every channel. When it returns nothing of this session touches the memory any more.
    pub fn close(self) {
        drop(self);
    }

    pub(super) fn shared(&self) -> Arc<DestinationShared> {
        self.shared.clone()
    }
}

impl Drop for DestinationSession {
    fn drop(&mut self) {
        let threads = {
            let mut state = self.shared.lock();
            state.ended = true;
            for channel in state.channels.values() {
                channel.link.shut();
            }
            self.shared.quiet.notify_all();
            // A channel that is just being attached has no thread to join yet, but is not finished either.
            while state.channels.values().any(|channel| !channel.finished) {
                state = self.shared.quiet.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
            }
            std::mem::take(&mut state.threads)
        };
        for thread in threads {
            // A thread that panicked touches nothing either.
            let _ = thread.join();
        }
        self.shared.rdma.end();
    }
}

impl DestinationShared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn tell(&self, event: DestinationEvent) {
        // Nobody listens any more: the session's owner has gone.
        let _ = self.events.send(event);
    }

    fn lose(&self, id: ChannelId, cause: SessionError) {
        self.finish(id);
        self.tell(DestinationEvent::ChannelLost { channel: id, cause });
    }

    /// The channel will never touch the memory again.
    fn finish(&self, id: ChannelId) {
        if let Some(channel) = self.lock().channels.get_mut(&id) {
            channel.finished = true;
            channel.link.shut();
        }
        self.quiet.notify_all();
    }

    /// A channel's thread.
    fn run(&self, id: ChannelId, receiver: Box<dyn ChannelReceiver>) {
        let lane = Lane { shared: self, id, receiver, decompressor: None, unconfirmed: (0, 0) };
        // Finished also when the thread panics: a barrier must not wait for it for ever.
        let finish = FinishOnDrop { shared: self, id };
        let mut lane = lane;
        let (cause, violation) = match lane.receive() {
            Gone::Channel(cause) => {
                let text = cause.is_violation().then(|| chain(&cause));
                let remote = self.lock().channels.get(&id).map(|channel| channel.link.remote());
                let Some(remote) = remote else { return };
                (SessionError::ChannelLost { remote, cause: Arc::new(cause) }, text)
            }
            Gone::Violation(cause) => {
                let text = chain(&cause);
                (cause, Some(text))
            }
            Gone::Fenced => (SessionError::Fenced, None),
        };
        if let Some(text) = &violation {
            let _ = lane.receiver.confirm(&Receipt::Error(text.clone()));
        }
        drop(lane);
        drop(finish);
        if violation.is_some() {
            self.tell(DestinationEvent::Violation { channel: id, cause });
        } else {
            self.tell(DestinationEvent::ChannelLost { channel: id, cause });
        }
    }

    /// Closes the channels that the source gave up, and waits until they touch the memory no more. Answers whether the
    /// channel that asks is itself still wanted.
    fn fence(&self, own: ChannelId, fenced: &[ChannelId]) -> Result<bool, SessionError> {
        let mut state = self.lock();
        state.fenced.extend(fenced);
        if fenced.contains(&own) {
            return Err(SessionError::FencesItself { channel: own });
        }
        if state.fenced.len() > MAX_CHANNELS {
            return Err(SessionError::TooManyChannels);
        }
        for id in fenced {
            if let Some(channel) = state.channels.get(id) {
                channel.link.shut();
            }
        }
        // Two channels that fence each other, which only a lying source makes, must not wait for each other.
        state.park(own, true);
        self.quiet.notify_all();
        while !state.ended && fenced.iter().any(|id| state.is_busy(*id)) {
            state = self.quiet.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        state.park(own, false);
        Ok(!state.ended && !state.fenced.contains(&own))
    }
}

impl State {
    fn park(&mut self, id: ChannelId, parked: bool) {
        if let Some(channel) = self.channels.get_mut(&id) {
            channel.parked = parked;
        }
    }

    fn is_busy(&self, id: ChannelId) -> bool {
        self.channels.get(&id).is_some_and(|channel| !channel.finished && !channel.parked)
    }
}

struct FinishOnDrop<'a> {
    shared: &'a DestinationShared,
    id: ChannelId,
}

impl Drop for FinishOnDrop<'_> {
    fn drop(&mut self) {
        self.shared.finish(self.id);
    }
}

/// Why a channel's thread ends.
enum Gone {
    Channel(ChannelError),
    Violation(SessionError),
    Fenced,
}

impl From<ChannelError> for Gone {
    fn from(cause: ChannelError) -> Self {
        Self::Channel(cause)
    }
}

/// A channel as its thread sees it.
struct Lane<'a> {
    shared: &'a DestinationShared,
    id: ChannelId,
    receiver: Box<dyn ChannelReceiver>,
    decompressor: Option<Decompressor>,
    /// Frames and bytes of pages since the last confirmation.
    unconfirmed: (u64, u64),
}

impl Lane<'_> {
    fn receive(&mut self) -> Gone {
        loop {
            if let Err(gone) = self.receive_one() {
                return gone;
            }
        }
    }

    fn receive_one(&mut self) -> Result<(), Gone> {
        let shared = self.shared;
        let mut preparing = Duration::ZERO;
        let mut about_to_place = |runs: &[Run]| preparing += shared.about_to_place(runs);
        let arrived = self.receiver.next(&mut about_to_place)?;
        let (sequence, began) = (arrived.sequence, Instant::now());
        let (mut placed, mut barrier) = (0, None);
        let mut frame = Counted {
            wire_bytes: arrived.wire_bytes,
            placing: arrived.placing + preparing,
            ..Counted::default()
        };
        match arrived.what {
            Arrival::Placed { pages } => placed = pages,
            Arrival::Packed { runs, pages, packed } => {
                let memory = &shared.memory;
                unpack(&mut self.decompressor, memory, runs, pages, packed).map_err(Gone::Violation)?;
                placed = pages;
                frame.unpacking = began.elapsed();
            }
            Arrival::Zeros { runs, pages } => {
                shared.zero(runs);
                frame.zero_pages = pages;
                frame.placing = began.elapsed();
            }
            Arrival::Barrier { barrier: id, fenced } => barrier = Some((id, fenced)),
        }
        frame.placed_pages = placed;
        self.count(&frame);
        match barrier {
            Some((id, fenced)) => self.reach(id, &fenced),
            None => self.confirm(sequence, placed),
        }
    }

    fn count(&self, frame: &Counted) {
        let mut state = self.shared.lock();
        state.counted += *frame;
        if let Some(channel) = state.channels.get_mut(&self.id) {
            channel.bytes += frame.wire_bytes;
        }
    }

    fn confirm(&mut self, sequence: u64, pages: u64) -> Result<(), Gone> {
        let (frames, bytes) = (self.unconfirmed.0 + 1, self.unconfirmed.1 + pages * PAGE_SIZE);
        if frames < CONFIRM_FRAMES && bytes < CONFIRM_BYTES {
            self.unconfirmed = (frames, bytes);
            return Ok(());
        }
        self.unconfirmed = (0, 0);
        Ok(self.receiver.confirm(&Receipt::Placed(sequence))?)
    }

    fn reach(&mut self, barrier: BarrierId, fenced: &[ChannelId]) -> Result<(), Gone> {
        if !self.shared.fence(self.id, fenced).map_err(Gone::Violation)? {
            return Err(Gone::Fenced);
        }
        self.unconfirmed = (0, 0);
        Ok(self.receiver.confirm(&Receipt::Barrier(barrier))?)
    }
}

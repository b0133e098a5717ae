//! Which channel sends which pages of a round, and when a round is over. No I/O, no clock.
//!
//! Channels take batches from one queue, so a faster one takes more. A batch is owed until its channel has confirmed it;
//! what a lost channel had not confirmed goes back to the queue for the others.
//!
//! A round ends with a barrier. A lost channel may still have bytes under way to the destination, which must not arrive
//! after a later round's, so a barrier names the channels that were given up, and the destination confirms it only when it has
//! closed them. A barrier is void when another channel is lost before all have confirmed it: then the lost pages are sent
//! first, and another barrier with a longer list follows.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use crate::layout::RamLayout;
use crate::pageset::PageSet;
use crate::units::{PAGE_SIZE, PageIndex, RoundId, Run};
pub use crate::wire::data::MAX_BATCH_PAGES;
use crate::wire::data::{BarrierId, ChannelId};

/// Pages in a batch in the middle of a round: 256 x 4 KiB = 1 MiB, what a pipe takes at once.
pub const BATCH_PAGES: u64 = 256;
/// Pages in a batch at the end of a round, where channels should finish together: 64 KiB.
const LAST_BATCH_PAGES: u64 = 16;
/// Pages that a channel may have sent without confirmation: 64 MiB, 50 ms of a 10 Gbit/s wire.
pub const WINDOW_PAGES: u64 = (64 << 20) / PAGE_SIZE;

/// What a channel is to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// Send these pages, then tell [`Striping::posted`].
    Batch {
        /// The round that they belong to.
        round: RoundId,
        /// Rising, apart, each within one region; [`Striping::set_batch_pages`] at most.
        runs: Arc<[Run]>,
    },
    /// Send this barrier.
    Barrier {
        /// The round that it ends.
        round: RoundId,
        /// Its number.
        barrier: BarrierId,
        /// The channels that it closes.
        fenced: Vec<ChannelId>,
    },
    /// Nothing: wait until something changes.
    Wait,
}

/// Pages that a channel took.
#[derive(Debug)]
struct Flight {
    runs: Arc<[Run]>,
    pages: u64,
    /// The number of the last frame they went out with; `None` while the channel still sends them.
    last: Option<u64>,
}

#[derive(Debug, Default)]
struct Lane {
    flights: VecDeque<Flight>,
    pages: u64,
    confirmed: u64,
    barrier_sent: Option<BarrierId>,
    barrier_confirmed: Option<BarrierId>,
}

#[derive(Debug)]
struct Round {
    id: RoundId,
    pages: PageSet,
    /// Where the walk over `pages` is: the rest of a run, and what follows it.
    rest: Option<Run>,
    next: PageIndex,
    /// Pages that no channel has taken, without those that came back.
    untaken: u64,
    /// Batches of lost channels.
    returned: Vec<Arc<[Run]>>,
    /// The barrier that ends the round unless a channel is lost before.
    barrier: Option<BarrierId>,
}

/// The queue of a session. Ask [`Striping::take`] for work; tell what was sent, confirmed and lost.
#[derive(Debug)]
pub struct Striping {
    layout: RamLayout,
    lanes: BTreeMap<ChannelId, Lane>,
    /// Lost channels that no completed barrier has named yet.
    unfenced: BTreeSet<ChannelId>,
    round: Option<Round>,
    barriers: u64,
    /// Pages of the round that are not confirmed.
    remaining: u64,
    /// Pages in a batch in the middle of a round.
    batch_pages: u64,
}

impl Striping {
    /// A queue without channels or pages.
    #[must_use]
    pub fn new(layout: RamLayout) -> Self {
        Self {
            layout,
            lanes: BTreeMap::new(),
            unfenced: BTreeSet::new(),
            round: None,
            barriers: 0,
            remaining: 0,
            batch_pages: BATCH_PAGES,
        }
    }

    /// Other batches than of [`BATCH_PAGES`] from now on; 1 to [`MAX_BATCH_PAGES`].
    pub fn set_batch_pages(&mut self, pages: u64) {
        self.batch_pages = pages.clamp(1, MAX_BATCH_PAGES);
    }

    /// A channel that takes part from now on. Its number must never have been used before.
    pub fn add_channel(&mut self, channel: ChannelId) {
        self.lanes.insert(channel, Lane::default());
    }

    /// How many channels take part.
    #[must_use]
    pub fn live_channels(&self) -> usize {
        self.lanes.len()
    }

    /// The round under way.
    #[must_use]
    pub fn round(&self) -> Option<RoundId> {
        self.round.as_ref().map(|round| round.id)
    }

    /// Pages of the round under way that are not confirmed.
    #[must_use]
    pub fn remaining_pages(&self) -> u64 {
        self.remaining
    }

    /// Begins a round.
    ///
    /// # Panics
    /// If one is under way: its pages would overtake each other. Or if the set is of another guest.
    pub fn begin(&mut self, id: RoundId, pages: PageSet) {
        assert!(self.round.is_none(), "a round begins after the one before it has ended");
        assert_eq!(pages.capacity(), self.layout.total_pages(), "pages of this guest");
        self.remaining = pages.len();
        self.round = Some(Round {
            id,
            untaken: self.remaining,
            pages,
            rest: None,
            next: PageIndex(0),
            returned: Vec::new(),
            barrier: None,
        });
    }

    /// What a channel is to do next.
    pub fn take(&mut self, channel: ChannelId) -> Work {
        let live = self.lanes.len() as u64;
        let (Some(lane), Some(round)) = (self.lanes.get_mut(&channel), &mut self.round) else {
            return Work::Wait;
        };
        if lane.pages >= WINDOW_PAGES {
            return Work::Wait;
        }
        if let Some(runs) = round.returned.pop().or_else(|| round.cut(&self.layout, live, self.batch_pages)) {
            let pages = runs.iter().map(|run| run.pages).sum();
            lane.pages += pages;
            lane.flights.push_back(Flight { runs: runs.clone(), pages, last: None });
            return Work::Batch { round: round.id, runs };
        }
        let barrier = *round.barrier.get_or_insert_with(|| {
            self.barriers += 1;
            BarrierId(self.barriers)
        });
        if lane.barrier_sent == Some(barrier) {
            return Work::Wait;
        }
        lane.barrier_sent = Some(barrier);
        Work::Barrier { round: round.id, barrier, fenced: self.unfenced.iter().copied().collect() }
    }

    /// The channel has sent the batch that it took last, and its last frame has number `last`.
    pub fn posted(&mut self, channel: ChannelId, last: u64) {
        let Some(lane) = self.lanes.get_mut(&channel) else { return };
        if let Some(flight) = lane.flights.back_mut() {
            flight.last = Some(last);
        }
        // The confirmation may have been faster.
        let confirmed = lane.confirmed;
        self.confirm(channel, confirmed);
    }

    /// The destination has every frame of the channel up to number `up_to`.
    pub fn confirm(&mut self, channel: ChannelId, up_to: u64) {
        let Some(lane) = self.lanes.get_mut(&channel) else { return };
        lane.confirmed = lane.confirmed.max(up_to);
        while lane.flights.front().and_then(|flight| flight.last).is_some_and(|last| last <= lane.confirmed) {
            let Some(flight) = lane.flights.pop_front() else { break };
            lane.pages -= flight.pages;
            self.remaining -= flight.pages;
        }
    }

    /// Whether the channel was given this barrier, or a later one. True of a channel that is gone: its word counts no more.
    #[must_use]
    pub fn knows_barrier(&self, channel: ChannelId, barrier: BarrierId) -> bool {
        self.lanes.get(&channel).is_none_or(|lane| lane.barrier_sent >= Some(barrier))
    }

    /// The destination has reached a barrier on the channel. Answers the round when that ends it.
    pub fn barrier_reached(&mut self, channel: ChannelId, barrier: BarrierId) -> Option<RoundId> {
        let round = self.round.as_ref()?;
        let lane = self.lanes.get_mut(&channel)?;
        if lane.barrier_sent != Some(barrier) {
            return None;
        }
        lane.barrier_confirmed = Some(barrier);
        let before_it = lane.flights.back().and_then(|flight| flight.last);
        if let Some(last) = before_it.filter(|_| round.barrier == Some(barrier)) {
            self.confirm(channel, last);
        }
        self.finish()
    }

    fn finish(&mut self) -> Option<RoundId> {
        let round = self.round.as_ref()?;
        let barrier = round.barrier?;
        let everywhere = self.lanes.values().all(|lane| lane.barrier_confirmed == Some(barrier));
        if !everywhere || self.lanes.is_empty() {
            return None;
        }
        debug_assert_eq!(self.remaining, 0, "a barrier follows every batch of its channel");
        self.unfenced.clear();
        self.round.take().map(|round| round.id)
    }

    /// A channel is gone; answers how many are left. What it had not confirmed goes back to the queue.
    pub fn channel_lost(&mut self, channel: ChannelId) -> usize {
        if let Some(lane) = self.lanes.remove(&channel) {
            self.unfenced.insert(channel);
            if let Some(round) = &mut self.round {
                round.returned.extend(lane.flights.into_iter().map(|flight| flight.runs));
                round.barrier = None;
            }
        }
        self.lanes.len()
    }

    /// Ends the round, if one is under way: answers every page of it that is not confirmed.
    pub fn abort(&mut self) -> PageSet {
        let mut owed = PageSet::empty(self.layout.total_pages());
        let Some(round) = self.round.take() else { return owed };
        owed.extend(round.rest);
        owed.extend(round.pages.runs_from(round.next));
        owed.extend(round.returned.iter().flat_map(|runs| runs.iter().copied()));
        for lane in self.lanes.values_mut() {
            owed.extend(lane.flights.drain(..).flat_map(|flight| flight.runs.to_vec()));
            lane.pages = 0;
        }
        self.remaining = 0;
        owed
    }
}

impl Round {
    /// Cuts the next batch from the pages that nobody has taken.
    fn cut(&mut self, layout: &RamLayout, live: u64, at_most: u64) -> Option<Arc<[Run]>> {
        let size = (self.untaken / (live * 4)).clamp(LAST_BATCH_PAGES.min(at_most), at_most);
        let (mut runs, mut room) = (Vec::new(), size);
        while room > 0 {
            let Some(run) = self.rest.take().or_else(|| self.next_run()) else { break };
            let taken = Run { pages: run.pages.min(room), ..run };
            runs.extend(layout.pieces(taken).map(|(_, piece)| piece));
            room -= taken.pages;
            self.rest = (taken.pages < run.pages).then(|| Run::new(taken.end(), run.pages - taken.pages));
        }
        self.untaken -= size - room;
        (!runs.is_empty()).then(|| runs.into())
    }

    fn next_run(&mut self) -> Option<Run> {
        let run = self.pages.runs_from(self.next).next()?;
        self.next = PageIndex(run.end());
        Some(run)
    }
}

#[cfg(test)]
mod tests;

//! Where the time of a source session goes: what its pushing threads do, and how long the destination takes to confirm.
//!
//! Counted once a batch, under the lock that the session takes then anyway; no clock is read for a page.

use std::collections::{BTreeMap, VecDeque};
use std::ops::AddAssign;
use std::time::Duration;

use hdrhistogram::Histogram;

use super::{SourceSession, SourceShared};
use crate::session::worker::Batched;
use crate::wire::data::ChannelId;

/// What pushing threads did, added up over all channels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimeSplit {
    /// Looking which pages hold only zeros.
    pub scan: Duration,
    /// Compressing, samples of what would shrink included.
    pub compress: Duration,
    /// Handing bytes to the wire, and waiting until it takes them.
    pub send: Duration,
    /// Waiting for work: for a confirmation when too much is under way, for the other channels at a barrier, for a rate cap.
    pub wait: Duration,
}

impl AddAssign for TimeSplit {
    fn add_assign(&mut self, other: Self) {
        self.scan += other.scan;
        self.compress += other.compress;
        self.send += other.send;
        self.wait += other.wait;
    }
}

/// How often something took how long: 1 us to an hour, to within 1 %.
#[derive(Clone, Debug)]
pub struct Latencies(Histogram<u64>);

impl Latencies {
    const LONGEST: u64 = 3_600_000_000;

    /// None yet.
    ///
    /// # Panics
    /// Never: the bounds are such as the histogram takes.
    #[must_use]
    pub fn new() -> Self {
        Self(Histogram::new_with_bounds(1, Self::LONGEST, 2).expect("1 us to an hour, at two digits"))
    }

    /// One more. What is longer than an hour counts as an hour.
    pub fn record(&mut self, took: Duration) {
        self.0.saturating_record(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
    }

    /// Those of another as well.
    pub fn add(&mut self, other: &Self) {
        // Fails only for values out of bounds, and both have the same.
        let _ = self.0.add(&other.0);
    }

    /// How many.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// What this part of them, from 0 to 1, took at most, in microseconds; 0 of none.
    #[must_use]
    pub fn quantile_us(&self, part: f64) -> u64 {
        self.0.value_at_quantile(part).min(self.max_us())
    }

    /// The longest, in microseconds; 0 of none.
    #[must_use]
    pub fn max_us(&self) -> u64 {
        self.0.max()
    }
}

impl Default for Latencies {
    fn default() -> Self {
        Self::new()
    }
}

/// Where the time of a session went so far.
#[derive(Clone, Debug, Default)]
pub struct SourceTimes {
    /// What the pushing threads did.
    pub split: TimeSplit,
    /// From taking a batch to the receipt that covers it. The destination writes one for some batches together.
    pub placement: Latencies,
    /// From taking a barrier to its receipt, on each channel: how long the last of a round takes to arrive.
    pub barrier: Latencies,
}

/// The clocks of all channels, and what they showed.
#[derive(Debug)]
pub(super) struct Clocks {
    lanes: BTreeMap<ChannelId, LaneClock>,
    times: SourceTimes,
}

#[derive(Debug, Default)]
struct LaneClock {
    waits_since: Option<Duration>,
    /// When the batch in hand was taken.
    taken: Duration,
    /// Batches without a receipt: the number of the last frame, and when they were taken.
    unconfirmed: VecDeque<(u64, Duration)>,
    confirmed: u64,
    barrier: Option<Duration>,
}

impl Clocks {
    pub(super) fn new() -> Self {
        Self { lanes: BTreeMap::new(), times: SourceTimes::default() }
    }

    /// A pushing thread has nothing in hand.
    pub(super) fn waits(&mut self, id: ChannelId, now: Duration) {
        self.lanes.entry(id).or_default().waits_since = Some(now);
    }

    /// A pushing thread has something to push.
    pub(super) fn works(&mut self, id: ChannelId, now: Duration, barrier: bool) {
        let lane = self.lanes.entry(id).or_default();
        if let Some(since) = lane.waits_since.take() {
            self.times.split.wait += now.saturating_sub(since);
        }
        if barrier {
            lane.barrier = Some(now);
        } else {
            lane.taken = now;
        }
    }

    /// It has pushed it.
    pub(super) fn sent(&mut self, id: ChannelId, batch: &Batched, now: Duration) {
        self.times.split += batch.split;
        let lane = self.lanes.entry(id).or_default();
        if batch.pages == 0 {
            return;
        }
        if batch.sequence <= lane.confirmed {
            // The receipt was faster than this thread.
            self.times.placement.record(now.saturating_sub(lane.taken));
        } else {
            lane.unconfirmed.push_back((batch.sequence, lane.taken));
        }
    }

    /// The destination has every frame up to this one.
    fn confirmed(&mut self, id: ChannelId, up_to: u64, now: Duration) {
        let lane = self.lanes.entry(id).or_default();
        lane.confirmed = lane.confirmed.max(up_to);
        while let Some((_, taken)) = lane.unconfirmed.front().copied().filter(|(last, _)| *last <= up_to) {
            lane.unconfirmed.pop_front();
            self.times.placement.record(now.saturating_sub(taken));
        }
    }

    /// The destination has reached the barrier of a channel, and so has all before it.
    pub(super) fn barrier_reached(&mut self, id: ChannelId, now: Duration) {
        let lane = self.lanes.entry(id).or_default();
        for (_, taken) in lane.unconfirmed.drain(..) {
            self.times.placement.record(now.saturating_sub(taken));
        }
        if let Some(taken) = lane.barrier.take() {
            self.times.barrier.record(now.saturating_sub(taken));
        }
    }

    /// So far, with waits that last.
    fn times(&self, now: Duration) -> SourceTimes {
        let mut times = self.times.clone();
        for since in self.lanes.values().filter_map(|lane| lane.waits_since) {
            times.split.wait += now.saturating_sub(since);
        }
        times
    }
}

impl SourceSession {
    /// Where the time went so far.
    #[must_use]
    pub fn times(&self) -> SourceTimes {
        self.shared.lock().clocks.times(self.shared.now())
    }

    /// Sends batches of that many pages from now on, in place of [`crate::session::striping::BATCH_PAGES`]: fewer spread more
    /// evenly, more cost less. Out of bounds, the nearest that can be.
    pub fn set_batch_pages(&self, pages: u64) {
        self.shared.lock().striping.set_batch_pages(pages);
    }
}

impl SourceShared {
    pub(super) fn confirmed(&self, id: ChannelId, up_to: u64) {
        let mut state = self.lock();
        state.striping.confirm(id, up_to);
        state.clocks.confirmed(id, up_to, self.now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn batch(sequence: u64) -> Batched {
        let split = TimeSplit { scan: ms(1), send: ms(2), ..TimeSplit::default() };
        Batched { sequence, pages: 1, split, ..Batched::default() }
    }

    #[test]
    fn a_batch_takes_until_its_receipt_and_a_barrier_covers_the_rest() {
        let (mut clocks, id) = (Clocks::new(), ChannelId(0));
        clocks.waits(id, ms(0));
        for (sequence, now) in [(1, 10), (2, 20), (3, 30)] {
            clocks.works(id, ms(now), false);
            clocks.sent(id, &batch(sequence), ms(now + 5));
            clocks.waits(id, ms(now + 5));
        }
        clocks.confirmed(id, 2, ms(110));
        assert_eq!(clocks.times.placement.count(), 2);
        clocks.works(id, ms(120), true);
        clocks.barrier_reached(id, ms(160));
        let times = clocks.times(ms(200));
        assert_eq!((times.placement.count(), times.barrier.count()), (3, 1));
        // 100, 90 and 130 ms, to within 1 %.
        assert!((99_000..=101_000).contains(&times.placement.quantile_us(0.5)));
        assert!((129_000..=131_500).contains(&times.placement.max_us()));
        assert!((39_000..=41_000).contains(&times.barrier.max_us()));
        assert_eq!(
            times.split,
            TimeSplit { scan: ms(3), send: ms(6), wait: ms(105), ..TimeSplit::default() }
        );
    }

    #[test]
    fn a_receipt_that_is_faster_than_the_thread_counts() {
        let (mut clocks, id) = (Clocks::new(), ChannelId(4));
        clocks.works(id, ms(10), false);
        clocks.confirmed(id, 7, ms(11));
        clocks.sent(id, &batch(7), ms(12));
        assert_eq!(clocks.times(ms(12)).placement.count(), 1);
    }

    #[test]
    fn latencies_are_added_up_and_none_is_too_long() {
        let (mut some, mut more) = (Latencies::new(), Latencies::new());
        assert_eq!((some.quantile_us(0.99), some.max_us()), (0, 0));
        (1..=99).for_each(|_| some.record(ms(1)));
        more.record(Duration::MAX);
        some.add(&more);
        assert_eq!(some.count(), 100);
        assert!((990..=1010).contains(&some.quantile_us(0.9)));
        assert!(some.max_us() >= Latencies::LONGEST * 99 / 100);
    }
}

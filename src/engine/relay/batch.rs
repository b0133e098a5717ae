//! Which pages go out in which round, and what has to wait for them. No I/O; time is an argument.
//!
//! A session has one round under way at a time. What QEMU hands out meanwhile gathers for the next one. A message that must not
//! be ahead of pages gathers with them, and goes out when their round is placed.

use std::time::Duration;

use crate::pageset::PageSet;
use crate::units::{PAGE_SIZE, RoundId, Run};

/// How much may gather, in time of the wire: QEMU judges the wire by how fast its bytes are taken, and what waits here is downtime
/// that it does not see. Between two rounds the wire stands still until the word of the first one's placing has come: hence not less.
const GATHER: Duration = Duration::from_millis(100);
/// The least that may gather, in pages: 4 MiB, which keeps every channel busy for a round trip.
const LEAST: u64 = (4 << 20) / PAGE_SIZE;
/// The most: 64 MiB.
const MOST: u64 = (64 << 20) / PAGE_SIZE;

/// What is to be done next.
#[derive(Debug)]
pub(super) enum Next<M> {
    /// Nothing: a round is under way, or nothing has come.
    Nothing,
    /// These messages may go: there are no pages that they have to wait for.
    Send(Vec<M>),
    /// Begin this round.
    Round(RoundId, PageSet),
}

/// The gathering.
#[derive(Debug)]
pub(super) struct Batch<M> {
    /// Pages of the whole memory.
    capacity: u64,
    gathered: Option<PageSet>,
    pages: u64,
    messages: Vec<M>,
    flight: Option<Flight<M>>,
    next_round: RoundId,
    most: u64,
}

#[derive(Debug)]
struct Flight<M> {
    round: RoundId,
    pages: u64,
    messages: Vec<M>,
    began: Duration,
}

impl<M> Batch<M> {
    /// Nothing, of a memory of so many pages.
    pub(super) fn new(capacity: u64) -> Self {
        let (next_round, most) = (RoundId(0), LEAST);
        Self { capacity, gathered: None, pages: 0, messages: Vec::new(), flight: None, next_round, most }
    }

    /// Whether more may be added now.
    pub(super) fn has_room(&self) -> bool {
        self.pages < self.most
    }

    /// Whether nothing waits and nothing is under way.
    #[cfg(test)]
    fn is_idle(&self) -> bool {
        self.flight.is_none() && self.gathered.is_none() && self.messages.is_empty()
    }

    /// Adds pages.
    pub(super) fn add(&mut self, runs: impl IntoIterator<Item = Run>) {
        let gathered = self.gathered.get_or_insert_with(|| PageSet::empty(self.capacity));
        for run in runs {
            gathered.insert_run(run);
            // One that is there already counts again: what is counted only has to be bounded.
            self.pages += run.pages;
        }
    }

    /// Adds a message that must not be ahead of what was added before.
    pub(super) fn add_message(&mut self, message: M) {
        self.messages.push(message);
    }

    /// What is to be done next.
    pub(super) fn next(&mut self, now: Duration) -> Next<M> {
        if self.flight.is_some() {
            return Next::Nothing;
        }
        let messages = std::mem::take(&mut self.messages);
        let Some(gathered) = self.gathered.take() else {
            return if messages.is_empty() { Next::Nothing } else { Next::Send(messages) };
        };
        let (round, pages) = (self.next_round, std::mem::take(&mut self.pages));
        self.next_round = round.next();
        self.flight = Some(Flight { round, pages, messages, began: now });
        Next::Round(round, gathered)
    }

    /// A round is placed: answers the messages that waited for it.
    pub(super) fn placed(&mut self, round: RoundId, now: Duration) -> Vec<M> {
        let Some(flight) = self.flight.take_if(|flight| flight.round == round) else { return Vec::new() };
        let took = now.saturating_sub(flight.began).max(Duration::from_micros(1));
        let fits = flight.pages as f64 * (GATHER.as_secs_f64() / took.as_secs_f64());
        // A short round says little about the wire: the limit moves half-way to what it says.
        self.most = (self.most.midpoint(fits as u64)).clamp(LEAST, MOST);
        flight.messages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn round<M: std::fmt::Debug>(next: Next<M>) -> (u32, Vec<Run>) {
        match next {
            Next::Round(round, pages) => (round.0, pages.runs().collect()),
            other => panic!("{other:?} is no round"),
        }
    }

    #[test]
    fn a_message_waits_for_the_pages_before_it_and_for_no_others() {
        let mut batch = Batch::new(100);
        batch.add_message("first");
        assert!(matches!(batch.next(MS), Next::Send(messages) if messages == ["first"]));
        batch.add([Run::new(0, 2)]);
        batch.add_message("second");
        assert_eq!(round(batch.next(MS)), (0, vec![Run::new(0, 2)]));
        // Gathers behind the round that is under way.
        batch.add_message("third");
        assert!(matches!(batch.next(MS), Next::Nothing) && !batch.is_idle());
        assert_eq!(batch.placed(RoundId(0), MS * 2), ["second"]);
        assert!(matches!(batch.next(MS), Next::Send(messages) if messages == ["third"]));
        assert!(batch.is_idle());
    }

    #[test]
    fn a_page_that_comes_again_is_in_the_next_round_as_well() {
        let mut batch = Batch::<()>::new(100);
        batch.add([Run::new(5, 1)]);
        assert_eq!(round(batch.next(MS)), (0, vec![Run::new(5, 1)]));
        batch.add([Run::new(5, 1), Run::new(5, 2)]);
        batch.placed(RoundId(0), MS);
        assert_eq!(round(batch.next(MS)), (1, vec![Run::new(5, 2)]));
        assert!(batch.placed(RoundId(7), MS).is_empty(), "a round that is not under way");
    }

    #[test]
    fn what_may_gather_follows_the_wire() {
        let mut batch = Batch::<()>::new(1 << 20);
        assert!(batch.has_room());
        batch.add([Run::new(0, LEAST)]);
        assert!(!batch.has_room());
        // 1 GiB/s: 100 ms are 26,214 pages, and the limit goes half-way there, to no more than the most.
        batch.next(Duration::ZERO);
        batch.placed(RoundId(0), MS * 4);
        batch.add([Run::new(0, LEAST)]);
        assert!(batch.has_room());
        batch.next(Duration::ZERO);
        // A wire that has become slow.
        batch.placed(RoundId(1), MS * 10_000);
        batch.next(MS);
        batch.add([Run::new(0, MOST)]);
        assert!(!batch.has_room());
    }
}

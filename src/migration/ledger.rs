//! Which pages the destination still lacks: what was drained from a tracker is owed until its placement is confirmed.

use crate::pageset::PageSet;
use crate::units::RoundId;

/// Every page is pending (dirty here, to be sent), posted (handed to the session in this round) or clean (confirmed).
///
/// A page can be pending *and* posted: it was dirtied again while its round was under way, and the next round sends it
/// again. A page is never posted twice, because a round begins only when the one before it is confirmed or given back.
#[derive(Clone, Debug)]
pub struct PageLedger {
    pending: PageSet,
    posted: Option<(RoundId, PageSet)>,
}

impl PageLedger {
    /// Nothing owed, of a guest that has `pages`.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        Self { pending: PageSet::empty(pages), posted: None }
    }

    /// Adds what a tracker told; it is owed from now on.
    ///
    /// # Panics
    /// If the set is of a guest of another size.
    pub fn owe(&mut self, dirty: &PageSet) {
        self.pending.union(dirty);
    }

    /// Begins a round: everything pending becomes posted. Answers the round's pages.
    ///
    /// # Panics
    /// If a round is under way: one page would be in flight twice.
    pub fn post(&mut self, round: RoundId) -> PageSet {
        assert!(self.posted.is_none(), "a round is under way");
        let none = PageSet::empty(self.pending.capacity());
        let pages = std::mem::replace(&mut self.pending, none);
        self.posted = Some((round, pages.clone()));
        pages
    }

    /// The round's barrier came back: its pages are clean unless they were dirtied since. Answers whether it was the round
    /// under way; a late answer for another round changes nothing.
    #[must_use]
    pub fn confirm(&mut self, round: RoundId) -> bool {
        let current = self.posted.as_ref().is_some_and(|(posted, _)| *posted == round);
        if current {
            self.posted = None;
        }
        current
    }

    /// The round failed: its pages are pending again.
    pub fn give_back(&mut self) {
        if let Some((_, pages)) = self.posted.take() {
            self.pending.union(&pages);
        }
    }

    /// How many pages are pending.
    #[must_use]
    pub fn pending_pages(&self) -> u64 {
        self.pending.len()
    }

    /// Every page that the destination may lack.
    #[must_use]
    pub fn owed(&self) -> PageSet {
        let mut owed = self.pending.clone();
        if let Some((_, pages)) = &self.posted {
            owed.union(pages);
        }
        owed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{PageIndex, Run};
    use proptest::prelude::*;

    const PAGES: u64 = 70;

    #[derive(Clone, Debug)]
    enum Step {
        Dirty(u64),
        Post,
        Confirm,
        GiveBack,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..PAGES).prop_map(Step::Dirty),
            1 => Just(Step::Post),
            1 => Just(Step::Confirm),
            1 => Just(Step::GiveBack),
        ]
    }

    proptest! {
        /// The oracle copies page by page: a page is owed while the destination's copy is older than the source's.
        #[test]
        fn owes_exactly_what_the_destination_lacks(steps in prop::collection::vec(step(), 0..60)) {
            let mut ledger = PageLedger::new(PAGES);
            let (mut source, mut destination) = ([0u32; PAGES as usize], [0u32; PAGES as usize]);
            let mut flight: Option<(RoundId, Vec<(usize, u32)>)> = None;
            let mut round = RoundId(0);
            for step in steps {
                match step {
                    Step::Dirty(page) => {
                        source[page as usize] += 1;
                        let mut dirty = PageSet::empty(PAGES);
                        dirty.insert(PageIndex(page));
                        ledger.owe(&dirty);
                    }
                    Step::Post if flight.is_none() => {
                        let pages = ledger.post(round);
                        let numbers = pages.runs().flat_map(|r| r.start.0..r.end()).map(|p| p as usize);
                        flight = Some((round, numbers.map(|p| (p, source[p])).collect()));
                        round = round.next();
                    }
                    Step::Confirm => if let Some((round, copies)) = flight.take() {
                        prop_assert!(!ledger.confirm(round.next()), "another round's answer is ignored");
                        prop_assert!(ledger.confirm(round));
                        for (page, version) in copies { destination[page] = version; }
                    },
                    Step::GiveBack => { flight = None; ledger.give_back(); }
                    Step::Post => {}
                }
                let owed = ledger.owed();
                for page in 0..PAGES as usize {
                    let lacks = source[page] != destination[page];
                    prop_assert_eq!(owed.contains(PageIndex(page as u64)), lacks, "page {}", page);
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "a round is under way")]
    fn two_rounds_at_once_are_a_mistake() {
        let mut ledger = PageLedger::new(1);
        let mut dirty = PageSet::empty(1);
        dirty.insert_run(Run::new(0, 1));
        ledger.owe(&dirty);
        ledger.post(RoundId(0));
        ledger.post(RoundId(1));
    }
}

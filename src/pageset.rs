//! A set of pages as a bitmap, walked run by run.

use crate::units::{PageIndex, Run};

/// Which of a guest's pages: one bit each, in the order of [`PageIndex`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// No page of a guest that has `pages`.
    #[must_use]
    pub fn empty(pages: u64) -> Self {
        Self { words: vec![0; pages.div_ceil(64) as usize], pages }
    }

    /// Every page of a guest that has `pages`.
    #[must_use]
    pub fn full(pages: u64) -> Self {
        let mut set = Self::empty(pages);
        set.insert_run(Run::new(0, pages));
        set
    }

    /// How many pages the guest has: the size of the universe, not of the set.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.pages
    }

    /// How many pages are in the set.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether no page is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// Whether the page is in the set; a page past the end never is.
    #[must_use]
    pub fn contains(&self, page: PageIndex) -> bool {
        page.0 < self.pages && self.words[(page.0 / 64) as usize] >> (page.0 % 64) & 1 == 1
    }

    /// Adds one page; a page past the end is ignored.
    pub fn insert(&mut self, page: PageIndex) {
        self.insert_run(Run { start: page, pages: 1 });
    }

    /// Adds a run; what lies past the end is ignored.
    pub fn insert_run(&mut self, run: Run) {
        self.for_words(run, |word, mask| *word |= mask);
    }

    /// Takes a run out.
    pub fn remove_run(&mut self, run: Run) {
        self.for_words(run, |word, mask| *word &= !mask);
    }

    fn for_words(&mut self, run: Run, mut apply: impl FnMut(&mut u64, u64)) {
        let (mut at, end) = (run.start.0, run.end().min(self.pages));
        while at < end {
            let bit = at % 64;
            let count = (64 - bit).min(end - at);
            let mask = (u64::MAX >> (64 - count)) << bit;
            apply(&mut self.words[(at / 64) as usize], mask);
            at += count;
        }
    }

    /// Adds the pages of a bitmap in KVM's format: bit `n` of the slice is page `first + n`.
    pub fn insert_bitmap(&mut self, first: PageIndex, bitmap: &[u64]) {
        for (index, &word) in bitmap.iter().enumerate().filter(|(_, word)| **word != 0) {
            let at = first.0 + index as u64 * 64;
            let (slot, shift) = ((at / 64) as usize, at % 64);
            if let Some(low) = self.words.get_mut(slot) {
                *low |= word << shift;
            }
            if shift != 0
                && let Some(high) = self.words.get_mut(slot + 1)
            {
                *high |= word >> (64 - shift);
            }
        }
        self.clear_past_end();
    }

    fn clear_past_end(&mut self) {
        if !self.pages.is_multiple_of(64)
            && let Some(last) = self.words.last_mut()
        {
            *last &= u64::MAX >> (64 - self.pages % 64);
        }
    }

    /// Adds every page of the other set.
    ///
    /// # Panics
    /// If the sets are of guests of different sizes.
    pub fn union(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "page sets of different guests");
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
    }

    /// Takes out every page of the other set.
    ///
    /// # Panics
    /// If the sets are of guests of different sizes.
    pub fn subtract(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "page sets of different guests");
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine &= !theirs;
        }
    }

    /// Takes every page out and keeps the memory.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// The set's runs in rising order, each as long as it can be.
    #[must_use]
    pub fn runs(&self) -> Runs<'_> {
        self.runs_from(PageIndex(0))
    }

    /// As [`PageSet::runs`], of the pages from `first` on.
    #[must_use]
    pub fn runs_from(&self, first: PageIndex) -> Runs<'_> {
        Runs { set: self, next: first.0 }
    }

    /// The first page at or after `from` that is (or, with `present` false, is not) in the set; else the capacity.
    fn seek(&self, from: u64, present: bool) -> u64 {
        let flip = if present { 0 } else { u64::MAX };
        let mut slot = (from / 64) as usize;
        let mut mask = u64::MAX << (from % 64);
        while let Some(&word) = self.words.get(slot) {
            let found = (word ^ flip) & mask;
            if found != 0 {
                return (slot as u64 * 64 + u64::from(found.trailing_zeros())).min(self.pages);
            }
            mask = u64::MAX;
            slot += 1;
        }
        self.pages
    }
}

/// The runs of a [`PageSet`].
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    set: &'a PageSet,
    next: u64,
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        let start = self.set.seek(self.next, true);
        if start >= self.set.pages {
            return None;
        }
        self.next = self.set.seek(start, false);
        Some(Run::new(start, self.next - start))
    }
}

impl Extend<Run> for PageSet {
    fn extend<I: IntoIterator<Item = Run>>(&mut self, runs: I) {
        for run in runs {
            self.insert_run(run);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const PAGES: u64 = 300;

    #[derive(Clone, Debug)]
    enum Step {
        Insert(Run),
        Remove(Run),
        Bitmap(u64, Vec<u64>),
        Union(Run),
        Subtract(Run),
    }

    fn step() -> impl Strategy<Value = Step> {
        let run = (0..PAGES + 20, 0..150u64).prop_map(|(start, pages)| Run::new(start, pages));
        prop_oneof![
            run.clone().prop_map(Step::Insert),
            run.clone().prop_map(Step::Remove),
            (0..PAGES, prop::collection::vec(any::<u64>(), 1..4))
                .prop_map(|(first, map)| Step::Bitmap(first, map)),
            run.clone().prop_map(Step::Union),
            run.prop_map(Step::Subtract),
        ]
    }

    fn single(run: Run) -> PageSet {
        let mut set = PageSet::empty(PAGES);
        set.insert_run(run);
        set
    }

    proptest! {
        #[test]
        fn behaves_as_a_set_of_numbers(steps in prop::collection::vec(step(), 0..20)) {
            let (mut set, mut oracle) = (PageSet::empty(PAGES), BTreeSet::new());
            for step in steps {
                match step {
                    Step::Insert(run) => { set.insert_run(run); oracle.extend((run.start.0..run.end()).filter(|p| *p < PAGES)); }
                    Step::Remove(run) => { set.remove_run(run); oracle.retain(|p| !(run.start.0..run.end()).contains(p)); }
                    Step::Union(run) => { set.union(&single(run)); oracle.extend((run.start.0..run.end()).filter(|p| *p < PAGES)); }
                    Step::Subtract(run) => { set.subtract(&single(run)); oracle.retain(|p| !(run.start.0..run.end()).contains(p)); }
                    Step::Bitmap(first, map) => {
                        set.insert_bitmap(PageIndex(first), &map);
                        oracle.extend((0..map.len() as u64 * 64).filter(|n| map[(n / 64) as usize] >> (n % 64) & 1 == 1).map(|n| first + n).filter(|p| *p < PAGES));
                    }
                }
                prop_assert_eq!(set.len(), oracle.len() as u64);
                prop_assert_eq!(set.is_empty(), oracle.is_empty());
                prop_assert!((0..PAGES + 70).all(|p| set.contains(PageIndex(p)) == oracle.contains(&p)));
                let walked: Vec<u64> = set.runs().flat_map(|run| run.start.0..run.end()).collect();
                prop_assert_eq!(walked, oracle.iter().copied().collect::<Vec<_>>());
                let runs: Vec<Run> = set.runs().collect();
                prop_assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].start.0), "runs are as long as they can be");
            }
        }
    }

    #[test]
    fn a_full_set_is_one_run() {
        for pages in [1, 63, 64, 65, 128, 1000] {
            assert_eq!(PageSet::full(pages).runs().collect::<Vec<_>>(), [Run::new(0, pages)]);
        }
    }
}

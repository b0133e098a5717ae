//! Which pages of a destination something was written to.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::units::Run;

/// A bitmap that all channels write to.
#[derive(Debug)]
pub(super) struct WrittenPages(Box<[AtomicU64]>);

impl WrittenPages {
    pub(super) fn new(pages: u64) -> Self {
        Self((0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    // Relaxed: within a round no page is on two channels but stale ones, whose pages come again after a barrier, and a
    // barrier orders everything by the session's lock.
    pub(super) fn insert(&self, runs: &[Run]) {
        for run in runs {
            let (mut at, end) = (run.start.0, run.end());
            while at < end {
                let bit = at % 64;
                let count = (64 - bit).min(end - at);
                let mask = (u64::MAX >> (64 - count)) << bit;
                self.0[(at / 64) as usize].fetch_or(mask, Ordering::Relaxed);
                at += count;
            }
        }
    }

    pub(super) fn contains(&self, page: u64) -> bool {
        self.0[(page / 64) as usize].load(Ordering::Relaxed) >> (page % 64) & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pageset::PageSet;
    use crate::units::PageIndex;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn holds_what_a_page_set_holds(runs in prop::collection::vec((0..300u64, 1..200u64), 0..8)) {
            let runs: Vec<Run> = runs.into_iter().map(|(start, pages)| Run::new(start, pages.min(300 - start))).collect();
            let (written, mut set) = (WrittenPages::new(300), PageSet::empty(300));
            written.insert(&runs);
            set.extend(runs);
            prop_assert!((0..300).all(|page| written.contains(page) == set.contains(PageIndex(page))));
        }
    }
}

//! Which pages of a destination something was written to.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::units::Run;

/// Pages in a part of the bitmap: 1 GiB of guest RAM in 32 KiB.
const PART_PAGES: u64 = 1 << 18;

/// A bitmap that all channels write to. It takes memory for the parts of the guest that are written, whatever size the source
/// says that the guest has: 24 bytes a GiB for the rest.
#[derive(Debug)]
pub(super) struct WrittenPages(Box<[OnceLock<Box<[AtomicU64]>>]>);

impl WrittenPages {
    pub(super) fn new(pages: u64) -> Self {
        Self((0..pages.div_ceil(PART_PAGES)).map(|_| OnceLock::new()).collect())
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
                let part = self.0[(at / PART_PAGES) as usize].get_or_init(empty_part);
                part[(at % PART_PAGES / 64) as usize].fetch_or(mask, Ordering::Relaxed);
                at += count;
            }
        }
    }

    /// Whether nothing was written to any page of a run. Says no as well where something was written close by: it looks at
    /// whole words.
    pub(super) fn is_clear(&self, run: Run) -> bool {
        let is_zero = |page: u64| {
            let part = self.0[(page / PART_PAGES) as usize].get();
            part.is_none_or(|part| part[(page % PART_PAGES / 64) as usize].load(Ordering::Relaxed) == 0)
        };
        (run.start.0..run.end()).step_by(64).chain(run.end().checked_sub(1)).all(is_zero)
    }

    pub(super) fn contains(&self, page: u64) -> bool {
        let part = self.0[(page / PART_PAGES) as usize].get();
        let word = part.map(|part| part[(page % PART_PAGES / 64) as usize].load(Ordering::Relaxed));
        word.is_some_and(|word| word >> (page % 64) & 1 == 1)
    }
}

fn empty_part() -> Box<[AtomicU64]> {
    (0..PART_PAGES / 64).map(|_| AtomicU64::new(0)).collect()
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
            // Over the border between two parts.
            let (first, total) = (PART_PAGES - 150, PART_PAGES + 150);
            let runs: Vec<Run> =
                runs.into_iter().map(|(start, pages)| Run::new(first + start, pages.min(300 - start))).collect();
            let (written, mut set) = (WrittenPages::new(total), PageSet::empty(total));
            written.insert(&runs);
            set.extend(runs);
            for start in (first..total - 70).step_by(7) {
                let clear = (start..start + 70).all(|page| !set.contains(PageIndex(page)));
                prop_assert!(clear || !written.is_clear(Run::new(start, 70)));
            }
            prop_assert!(written.is_clear(Run::new(0, first - 64)));
            prop_assert!((first..total).all(|page| written.contains(page) == set.contains(PageIndex(page))));
        }
    }
}

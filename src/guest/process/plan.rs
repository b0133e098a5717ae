//! Where in guest RAM the program keeps what: status, then the table of expected sequences, then the pages it writes.
//!
//! Status and table are in guest RAM so that they migrate with the pages that they speak of. The table has one word a
//! page that is written, and lies below `touch_bytes` with it: it never reaches further than the memory in use.

use std::ops::Range;

use crate::guest::GuestError;
use crate::units::{Bytes, PAGE_SIZE, PageIndex};

/// Sequences in a page of the table.
const WORDS: u64 = PAGE_SIZE / 8;
/// What a thread has in the status page.
const STATUS_BYTES: u64 = 64;

/// The areas, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    table_pages: u64,
    data_pages: u64,
    threads: u64,
}

impl Plan {
    /// Divides the lowest `touch_bytes` (or all) of the RAM among the threads.
    pub(super) fn new(bytes: u64, touch_bytes: Option<u64>, threads: u32) -> Result<Self, GuestError> {
        let touch = touch_bytes.unwrap_or(bytes);
        if touch > bytes {
            return Err(GuestError::new(format!(
                "the program is to use {} of a guest that has {}; give the guest more memory or the program less",
                Bytes(touch),
                Bytes(bytes)
            )));
        }
        // After the status page, each page of the table describes 512 others.
        let rest = (touch / PAGE_SIZE).saturating_sub(1);
        let data_pages = (u128::from(rest) * u128::from(WORDS) / u128::from(WORDS + 1)) as u64;
        let threads = u64::from(threads);
        if data_pages < threads {
            return Err(GuestError::new(format!(
                "{} of memory are too little for a program with {threads} threads: it needs at least {}",
                Bytes(touch),
                Bytes((threads + 2) * PAGE_SIZE)
            )));
        }
        Ok(Self { table_pages: data_pages.div_ceil(WORDS), data_pages, threads })
    }

    /// The pages of one thread, as numbers among all that are written.
    pub(super) fn share(&self, thread: u64) -> Range<u64> {
        let border = |n| (u128::from(self.data_pages) * u128::from(n) / u128::from(self.threads)) as u64;
        border(thread)..border(thread + 1)
    }

    /// The page of guest RAM that a number among the written pages stands for.
    pub(super) fn page(&self, data: u64) -> PageIndex {
        PageIndex(1 + self.table_pages + data)
    }

    /// Where the table has the sequence of a written page.
    pub(super) fn entry(data: u64) -> u64 {
        PAGE_SIZE + data * 8
    }

    /// Where a thread has its status.
    pub(super) fn status(thread: u64) -> u64 {
        thread * STATUS_BYTES
    }

    /// How much memory the program uses.
    pub(super) fn used_bytes(&self) -> u64 {
        (1 + self.table_pages + self.data_pages) * PAGE_SIZE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_areas_fill_the_memory_and_do_not_overlap() {
        for pages in (3..3000).chain([1 << 24, 1 << 34]) {
            let plan = Plan::new(pages * PAGE_SIZE, None, 1).unwrap();
            let used = plan.used_bytes() / PAGE_SIZE;
            assert!(used <= pages && pages - used <= 1, "{plan:?} of {pages}");
            assert!(Plan::entry(plan.data_pages - 1) + 8 <= plan.page(0).0 * PAGE_SIZE);
            assert_eq!(plan.page(plan.data_pages - 1).0 + 1, used);
        }
    }

    #[test]
    fn the_shares_are_all_pages_once() {
        for threads in 1..=4 {
            for pages in [6, 7, 100, 515, 10_001] {
                let plan = Plan::new(pages * PAGE_SIZE, None, threads).unwrap();
                let shares: Vec<_> = (0..u64::from(threads)).map(|thread| plan.share(thread)).collect();
                assert!(shares.iter().all(|share| !share.is_empty()));
                assert!(shares.windows(2).all(|pair| pair[0].end == pair[1].start));
                assert_eq!((shares[0].start, shares[shares.len() - 1].end), (0, plan.data_pages));
            }
        }
    }

    #[test]
    fn memory_that_does_not_do_is_named() {
        let error = Plan::new(1 << 20, Some(1 << 21), 1).unwrap_err().to_string();
        assert!(error.contains("2 MiB of a guest that has 1 MiB"), "{error}");
        let error = Plan::new(1 << 20, Some(16384), 4).unwrap_err().to_string();
        assert!(error.contains("at least 24 KiB"), "{error}");
        assert!(Plan::new(1 << 20, Some(24 << 10), 4).is_ok());
        assert!(Plan::new(0, None, 1).is_err());
    }
}

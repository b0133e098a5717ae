//! Huge pages for guest RAM that is about to be filled: a fault for each 2 MiB instead of one for each 4 KiB.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::{GuestMemory, HugePages};
use crate::sys::huge::HUGE_PAGE;
use crate::units::{PAGE_SIZE, Run};

/// Pages of a huge page that have to come at once to be worth it: half. So a guest's memory grows to twice what it was in the
/// worst case, which is a guest that uses every other MiB.
pub const WORTH_PAGES: u64 = HUGE_PAGE / PAGE_SIZE / 2;

/// Longer than this for a huge page to be waited for, its making not counted, is more than it saves (512 faults of 2 us). The
/// kernel has every processor put its new pages on the lists first (`lru_add_drain_all`), and where processors are all busy
/// that takes until a kernel thread had its turn on each: 75 ms were seen.
const MOST_WAITED: Duration = Duration::from_millis(1);

/// The most huge pages to let pass after the kernel had none to give, or not soon enough; it doubles up to there, from 1.
const MOST_PASSED: u32 = 1 << 16;

/// Makes huge pages of memory that is fresh, where enough of each is about to be written. Shared by the threads that write.
#[derive(Debug, Default)]
pub struct HugeFiller {
    /// How many huge pages to let pass before the next is tried.
    pass: AtomicU32,
    /// How many to let pass after the next failure.
    backoff: AtomicU32,
}

impl HugeFiller {
    /// `runs` are about to be written: makes huge pages for them where the memory wants some
    /// ([`HugePages::Transparent`] over a file in memory) and `is_fresh` says of all the pages of one that nobody wrote to
    /// them. Changes no content; where the kernel refuses, pages come to be one by one as ever.
    ///
    /// # Panics
    /// If a page of the runs does not exist.
    pub fn prepare(&self, memory: &GuestMemory, runs: &[Run], is_fresh: impl Fn(Run) -> bool) {
        // The pages of one huge page follow each other, as the runs rise.
        let mut last: Option<(usize, u64, u64)> = None;
        for run in runs {
            for (place, piece) in memory.layout().pieces(*run) {
                let mapping = &memory.mappings()[place.region];
                if mapping.huge_pages() != HugePages::Transparent || mapping.file().is_none() {
                    continue;
                }
                let (mut offset, end) = (place.offset, place.offset + piece.bytes());
                while offset < end {
                    let Some(start) = mapping.huge_page_at(offset) else {
                        offset = (offset + 1).next_multiple_of(HUGE_PAGE);
                        continue;
                    };
                    let until = (start + HUGE_PAGE).min(end);
                    let pages = (until - offset) / PAGE_SIZE;
                    last = match last {
                        Some((region, at, before)) if (region, at) == (place.region, start) => {
                            Some((region, at, before + pages))
                        }
                        _ => Some((place.region, start, pages)),
                    };
                    if let Some((region, at, pages)) = last
                        && pages >= WORTH_PAGES
                    {
                        self.make(memory, region, at, &is_fresh);
                        // Not again for the rest of it.
                        last = Some((region, at, 0));
                    }
                    offset = until;
                }
            }
        }
    }

    fn make(&self, memory: &GuestMemory, region: usize, offset: u64, is_fresh: &impl Fn(Run) -> bool) {
        let first = memory.layout().region_run(region).start.0 + offset / PAGE_SIZE;
        if !is_fresh(Run::new(first, HUGE_PAGE / PAGE_SIZE)) {
            return;
        }
        // Relaxed: what threads see late costs a try.
        let passed = self.pass.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |pass| pass.checked_sub(1));
        if passed.is_ok() {
            return;
        }
        let mapping = &memory.mappings()[region];
        // What is there already would have to be copied, which costs more than it saves.
        if mapping.is_resident(offset, HUGE_PAGE).unwrap_or(true) {
            return;
        }
        let (began, worked) = (Instant::now(), thread_time());
        let made = mapping.make_huge(offset);
        let waited = began.elapsed().saturating_sub(thread_time().saturating_sub(worked));
        if made.is_ok() && waited <= MOST_WAITED {
            self.backoff.store(0, Ordering::Relaxed);
            return;
        }
        let pass = (self.backoff.load(Ordering::Relaxed) * 2).clamp(1, MOST_PASSED);
        self.backoff.store(pass, Ordering::Relaxed);
        self.pass.store(pass, Ordering::Relaxed);
        let error = made.err();
        tracing::debug!(?error, ?waited, pass, "no huge page in time; guest memory is filled page by page");
    }
}

/// Processor time of this thread.
fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{RamLayout, RamRegion};
    use crate::memory::Backing;
    use crate::units::{Bytes, GuestAddress};

    fn regions(bytes: &[u64], backing: Backing, huge: HugePages) -> GuestMemory {
        let mut start = 0;
        let mut region = |&bytes| {
            let region = RamRegion { start: GuestAddress(start), bytes };
            start += bytes + (1 << 30);
            region
        };
        let layout = RamLayout::new(bytes.iter().map(&mut region).collect()).unwrap();
        GuestMemory::allocate(layout, backing, huge).unwrap()
    }

    /// Which of the huge pages of the first region are in memory.
    fn made(memory: &GuestMemory, region: usize) -> Vec<bool> {
        let mapping = &memory.mappings()[region];
        (0..mapping.bytes() / HUGE_PAGE)
            .map(|index| mapping.is_resident(index * HUGE_PAGE, HUGE_PAGE).unwrap())
            .collect()
    }

    fn kernel_has_them() -> bool {
        let memory = regions(&[HUGE_PAGE], Backing::Memfd, HugePages::Transparent);
        let has = memory.mappings()[0].make_huge(0).is_ok();
        if !has {
            eprintln!("SKIP: the kernel has no huge page of {} to give", Bytes(HUGE_PAGE));
        }
        has
    }

    #[test]
    fn what_comes_in_one_piece_gets_huge_pages_and_nothing_else_does() {
        if !kernel_has_them() {
            return;
        }
        let memory =
            regions(&[4 * HUGE_PAGE, 2 * HUGE_PAGE - PAGE_SIZE], Backing::Memfd, HugePages::Transparent);
        let filler = HugeFiller::default();
        // Half of the first in two runs, less than half of the second, half of the third but not fresh, and the first page of
        // the fourth with the second region's first.
        let runs =
            [Run::new(0, 200), Run::new(300, 56), Run::new(600, 255), Run::new(1024, 256), Run::new(1536, 1)];
        let in_second_region = Run::new(2048, 512);
        filler.prepare(&memory, &runs, |run| run.start.0 != 1024);
        filler.prepare(&memory, &[in_second_region, Run::new(2560, 511)], |_| true);
        assert_eq!(made(&memory, 0), [true, false, false, false]);
        assert_eq!(made(&memory, 1), [true]);
    }

    #[test]
    fn memory_that_is_there_already_or_wants_none_is_left_alone() {
        for (backing, huge) in [(Backing::Memfd, HugePages::No), (Backing::Anonymous, HugePages::Transparent)]
        {
            let memory = regions(&[HUGE_PAGE], backing, huge);
            HugeFiller::default().prepare(&memory, &[Run::new(0, 512)], |_| true);
            assert_eq!(made(&memory, 0), [false]);
        }
        let memory = regions(&[HUGE_PAGE], Backing::Memfd, HugePages::Transparent);
        memory.write_run(Run::new(3, 1), &[1; PAGE_SIZE as usize]);
        HugeFiller::default().prepare(&memory, &[Run::new(0, 512)], |_| true);
        assert!(!memory.mappings()[0].is_resident(0, 3 * PAGE_SIZE).unwrap());
    }
}

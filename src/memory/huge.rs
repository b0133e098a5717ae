//! Huge pages for guest RAM that is about to be filled: a fault for each 2 MiB instead of one for each 4 KiB.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::{GuestMemory, HugePages};
use crate::sys::huge::{HUGE_PAGE, MadeBy};
use crate::units::{PAGE_SIZE, Run};

/// Pages of a huge page that have to come at once to be worth it: a quarter, and half of those between the first and the last that
/// come, since some of what is sent together is zero and comes otherwise. So a guest's memory grows to four times what it was in the
/// worst case, which is a guest that uses half a MiB of every 2 MiB.
const WORTH_PAGES: u64 = HUGE_PAGE / PAGE_SIZE / 4;

/// Longer than this for a huge page to be waited for, its making not counted, is more than it saves (512 faults of 2 us). The
/// kernel has every processor put its new pages on the lists first (`lru_add_drain_all`), and where processors are all busy
/// that takes until a kernel thread had its turn on each: 75 ms were seen.
const MOST_WAITED: Duration = Duration::from_millis(1);

/// The most huge pages to let pass after the kernel had none to give, or not soon enough; it doubles up to there, from 1.
const MOST_PASSED: u32 = 1 << 16;

/// Huge pages that are made at once at most, 64 MiB, where memory is filled from its beginning to its end and making them means to
/// wait, which is once for all of them. Never more than were filled before, so that a guest's memory does not grow by more.
const MOST_AHEAD: u64 = 32;

/// How far from the furthest one a huge page may lie to be of the same stretch: channels do not come in order, nor does all of the
/// memory.
const NEAR: u64 = 16 * HUGE_PAGE;

/// Makes huge pages of memory that is fresh, where enough of each is about to be written. Shared by the threads that write.
#[derive(Debug, Default)]
pub struct HugeFiller {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// How many huge pages to let pass before the next is tried.
    pass: u32,
    /// How many to let pass after the next failure.
    backoff: u32,
    /// Whether making the last one meant to wait.
    waits: bool,
    /// The region and the furthest huge page of the stretch that is being filled.
    furthest: (usize, u64),
    /// Pages that have come in it.
    stretch: u64,
}

impl State {
    /// So many pages of a huge page are about to be written.
    fn follow(&mut self, region: usize, offset: u64, pages: u64) {
        let (last_region, furthest) = self.furthest;
        if region == last_region && offset.abs_diff(furthest) <= NEAR {
            self.furthest.1 = furthest.max(offset);
            self.stretch += pages;
        } else {
            (self.furthest, self.stretch) = ((region, offset), pages);
        }
    }

    /// How many huge pages may be made now, which can be none.
    fn at_once(&mut self) -> u64 {
        if self.pass > 0 {
            self.pass -= 1;
            return 0;
        }
        if self.waits { (self.stretch * PAGE_SIZE / HUGE_PAGE).clamp(1, MOST_AHEAD) } else { 1 }
    }

    /// So many were made at once, after waiting for so long; or the kernel refused. Answers whether that was no success.
    fn made(&mut self, by: Option<MadeBy>, count: u64, waited: Duration) -> bool {
        self.waits = by != Some(MadeBy::Fault);
        let failed = by.is_none() || waited > MOST_WAITED * count as u32;
        self.backoff = if failed { (self.backoff * 2).clamp(1, MOST_PASSED) } else { 0 };
        self.pass = self.backoff;
        failed
    }
}

/// What is about to be written of a huge page.
#[derive(Debug)]
struct Coming {
    region: usize,
    start: u64,
    /// The offset of the first of the pages.
    first: u64,
    pages: u64,
    /// Whether it was enough already.
    told: bool,
}

impl Coming {
    /// Whether that is enough, when the last of the pages ends there.
    fn is_worth_it(&self, end: u64) -> bool {
        self.pages >= WORTH_PAGES && self.pages * 2 >= (end - self.first) / PAGE_SIZE
    }
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
        let mut last: Option<Coming> = None;
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
                    let coming = match &mut last {
                        Some(coming) if (coming.region, coming.start) == (place.region, start) => coming,
                        _ => last.insert(Coming {
                            region: place.region,
                            start,
                            first: offset,
                            pages: 0,
                            told: false,
                        }),
                    };
                    coming.pages += (until - offset) / PAGE_SIZE;
                    if !coming.told && coming.is_worth_it(until) {
                        coming.told = true;
                        self.make(memory, coming, &is_fresh);
                    }
                    offset = until;
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a huge page of which enough is about to be written, and some that follow.
    fn make(
        &self,
        memory: &GuestMemory,
        &Coming { region, start: offset, pages, .. }: &Coming,
        is_fresh: &impl Fn(Run) -> bool,
    ) {
        let (mapping, first) = (&memory.mappings()[region], memory.layout().region_run(region).start.0);
        let is_to_be_made = |offset: u64| {
            is_fresh(Run::new(first + offset / PAGE_SIZE, HUGE_PAGE / PAGE_SIZE))
                // What is there already would have to be copied, which costs more than it saves.
                && !mapping.is_resident(offset, HUGE_PAGE).unwrap_or(true)
        };
        let mut state = self.lock();
        state.follow(region, offset, pages);
        if !is_to_be_made(offset) {
            return;
        }
        let most = state.at_once().min((mapping.bytes() - offset) / HUGE_PAGE);
        let places = (0..most).map(|index| offset + index * HUGE_PAGE);
        let count = places.take_while(|place| *place == offset || is_to_be_made(*place)).count() as u64;
        if count == 0 {
            return;
        }
        // Whoever writes to what is made ahead waits for it; threads that make one page each do not wait for each other.
        let held = state.waits.then_some(state);
        let (began, worked) = (Instant::now(), thread_time());
        let made = mapping.make_huge(offset, count);
        let waited = began.elapsed().saturating_sub(thread_time().saturating_sub(worked));
        let mut state = held.unwrap_or_else(|| self.lock());
        if state.made(made.as_ref().ok().copied(), count, waited) {
            let (error, pass) = (made.err(), state.pass);
            tracing::debug!(
                ?error,
                ?waited,
                count,
                pass,
                "no huge page in time; memory is filled page by page"
            );
        }
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
    use crate::memory::{Backing, Mapping};
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
        let has = memory.mappings()[0].make_huge(0, 1).is_ok();
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
        // A quarter of the first in two runs, less of the second, a quarter of the third but not fresh, and the first page of the
        // fourth with the second region's first.
        let runs =
            [Run::new(0, 100), Run::new(110, 28), Run::new(600, 127), Run::new(1024, 256), Run::new(1536, 1)];
        let in_second_region = Run::new(2048, 512);
        filler.prepare(&memory, &runs, |run| run.start.0 != 1024);
        // A quarter of the fourth, but far apart.
        let apart: Vec<Run> = (0..128).map(|index| Run::new(1537 + index * 3, 1)).collect();
        filler.prepare(&memory, &apart, |_| true);
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

    #[test]
    fn more_are_made_at_once_the_more_has_come_in_order_and_only_where_that_means_to_wait() {
        const SOON: Duration = Duration::from_micros(900);
        let mut state = State::default();
        let next = |state: &mut State, index: u64| {
            state.follow(0, index * HUGE_PAGE, 512);
            state.at_once()
        };
        assert_eq!((next(&mut state, 0), state.made(Some(MadeBy::Fault), 1, SOON)), (1, false));
        assert_eq!((next(&mut state, 1), state.made(Some(MadeBy::Collapse), 1, SOON)), (1, false));
        assert_eq!(next(&mut state, 2), 3);
        // The wait is shared, and so is what it may come to.
        assert!(!state.made(Some(MadeBy::Collapse), 3, 3 * SOON));
        let all = (3..60).map(|index| next(&mut state, index)).last();
        assert_eq!(all, Some(MOST_AHEAD));
        // Too late, or none at all: the next ones pass.
        assert!(state.made(Some(MadeBy::Collapse), 2, 3 * SOON));
        assert_eq!((next(&mut state, 60), next(&mut state, 59)), (0, MOST_AHEAD), "a channel that is behind");
        assert!(state.made(None, 2, SOON));
        assert_eq!([61, 62, 63].map(|index| next(&mut state, index)), [0, 0, MOST_AHEAD]);
        // Somewhere else it begins anew.
        assert_eq!(next(&mut state, 100), 1);
        state.follow(1, 100 * HUGE_PAGE, 1024);
        assert_eq!(state.at_once(), 2);
    }

    /// The memory of others, where each call waits.
    #[test]
    fn what_is_made_ahead_is_no_more_than_what_came() {
        let bytes = 16 * HUGE_PAGE;
        let file = rustix::fs::memfd_create("huge", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, bytes).unwrap();
        let mapping = Mapping::shared_file(file, 0, bytes).unwrap();
        let memory = GuestMemory::new(RamLayout::flat(bytes).unwrap(), vec![mapping]).unwrap();
        let filler = HugeFiller::default();
        for index in 0..8 {
            filler.prepare(&memory, &[Run::new(index * 512, 512)], |_| true);
            let made = made(&memory, 0).into_iter().filter(|made| *made).count() as u64;
            assert!(made <= 2 * (index + 1), "{made} huge pages, of {} that came", index + 1);
        }
        assert!(memory.mappings()[0].is_zero(0, bytes));
    }
}

//! When a thread may write, and how much: pure arithmetic, time is an argument.

use std::time::Duration;

use crate::units::PAGE_SIZE;

/// The heartbeat of a thread, and the longest that it sleeps while it is not throttled.
pub(super) const TICK: Duration = Duration::from_millis(1);
/// What throttling cuts off from: of each 100 ms, as many as there are percents are slept. So 99 % still leaves a tick
/// every 100 ms.
const SLICE: Duration = Duration::from_millis(100);
/// A thread that the host kept from running catches up on this much and no more, as a timer that lost ticks does.
const MOST_DEBT: Duration = Duration::from_millis(100);

/// What a thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// It runs, and may write so many pages.
    Run {
        /// How many.
        pages: u64,
    },
    /// It is throttled until then.
    Throttled {
        /// On the clock that the calls are given.
        until: Duration,
    },
}

/// The pace of one thread.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    bytes_per_second: u64,
    /// Until when time has been counted.
    counted: Duration,
    /// What has been earned and not yet spent, in bytes x nanoseconds per second.
    credit: u128,
}

const PAGE_COST: u128 = PAGE_SIZE as u128 * 1_000_000_000;

impl Pace {
    /// The share of thread `index` of `threads` in a rate.
    pub(super) fn new(bytes_per_second: u64, index: u32, threads: u32) -> Self {
        let (index, threads) = (u64::from(index), u64::from(threads));
        let share = bytes_per_second / threads + u64::from(index < bytes_per_second % threads);
        Self { bytes_per_second: share, counted: Duration::ZERO, credit: 0 }
    }

    /// Forgets the time until `now`: nothing is earned while the thread is paused.
    pub(super) fn restart(&mut self, now: Duration) {
        self.counted = now;
        self.credit = 0;
    }

    /// What may be done at `now`, of which `percent` is cut off.
    pub(super) fn turn(&mut self, now: Duration, percent: u8) -> Turn {
        let slice = SLICE.as_nanos() as u64;
        let into = now.as_nanos() as u64 % slice;
        let run = slice / 100 * u64::from(100 - percent.min(99));
        if into >= run {
            let until = now + Duration::from_nanos(slice - into);
            self.counted = until;
            return Turn::Throttled { until };
        }
        let elapsed = now.saturating_sub(self.counted).min(MOST_DEBT);
        self.counted = self.counted.max(now);
        self.credit += elapsed.as_nanos() * u128::from(self.bytes_per_second);
        // What cannot be caught up with is forgotten too, or a thread that is too slow would never rest again.
        self.credit = self.credit.min(MOST_DEBT.as_nanos() * u128::from(self.bytes_per_second) + PAGE_COST);
        Turn::Run { pages: (self.credit / PAGE_COST) as u64 }
    }

    /// Pages were written.
    pub(super) fn spend(&mut self, pages: u64) {
        self.credit = self.credit.saturating_sub(u128::from(pages) * PAGE_COST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pages that `threads` threads write in `ticks` ticks.
    fn budget(rate: u64, threads: u32, ticks: u64, percent: u8) -> u64 {
        (0..threads)
            .map(|index| {
                let mut pace = Pace::new(rate, index, threads);
                pace.restart(Duration::from_secs(7));
                let (mut now, end) = (Duration::from_secs(7), Duration::from_secs(7) + TICK * ticks as u32);
                let mut written = 0;
                while now < end {
                    now = match pace.turn(now, percent) {
                        Turn::Run { pages } => {
                            written += pages;
                            pace.spend(pages);
                            now + TICK
                        }
                        Turn::Throttled { until } => until,
                    };
                }
                written
            })
            .sum()
    }

    #[test]
    fn the_threads_together_keep_the_rate() {
        for (rate, threads) in [(100 << 20, 1), (100 << 20, 3), (1 << 30, 4), (4096 * 7, 2), (4095, 1)] {
            let pages = budget(rate, threads, 10_000, 0);
            let wanted = rate * 10 / 4096;
            // The last tick is not counted, and each thread may hold back less than a page.
            assert!(
                pages <= wanted && wanted - pages <= u64::from(threads) * 2 + rate / 4096 / 1000,
                "{pages} pages at {rate} bytes/s by {threads} threads, not {wanted}"
            );
        }
        assert_eq!(budget(0, 2, 10_000, 0), 0);
    }

    #[test]
    fn throttling_cuts_its_share_off() {
        let full = budget(100 << 20, 2, 10_000, 0);
        for percent in [20, 50, 90, 99] {
            let pages = budget(100 << 20, 2, 10_000, percent);
            let share = pages as f64 / full as f64;
            let wanted = f64::from(100 - percent) / 100.0;
            // A slice's last tick is cut off with it.
            assert!((wanted - 0.011..=wanted).contains(&share), "{share} is left of it at {percent} %");
        }
        assert!(budget(100 << 20, 2, 10_000, 90) > 0);
    }

    #[test]
    fn a_long_absence_is_not_caught_up_with() {
        let mut pace = Pace::new(4096 * 1000, 0, 1);
        pace.restart(Duration::ZERO);
        assert_eq!(pace.turn(Duration::from_secs(3600), 0), Turn::Run { pages: 100 });
        // One that writes nothing does not heap up credit either.
        assert_eq!(pace.turn(Duration::from_secs(7200), 0), Turn::Run { pages: 101 });
        pace.spend(101);
        assert_eq!(pace.turn(Duration::from_secs(7200), 0), Turn::Run { pages: 0 });
        assert_eq!(pace.turn(Duration::from_secs(1), 0), Turn::Run { pages: 0 }, "a clock that went back");
    }
}

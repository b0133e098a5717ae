//! Which page a program writes next: a function of the number of the write, so that the program's whole position is one
//! number.

use crate::guest::process::stamp::mix;
use crate::guest::program::Program;

/// The choices of one thread among its own pages.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    program: Program,
    /// How many pages the thread has; not 0.
    pages: u64,
    seed: u64,
    /// The pass over all pages that `start` and `step` are of.
    pass: u64,
    start: u64,
    step: u64,
}

impl Pattern {
    pub(super) fn new(program: Program, pages: u64, seed: u64) -> Self {
        let mut pattern = Self { program, pages, seed, pass: 0, start: 0, step: 0 };
        pattern.begin_pass(0);
        pattern
    }

    /// The page of write number `write`, counted from 0 after the warm-up. `None` for a program that writes none.
    pub(super) fn page(&mut self, write: u64) -> Option<u64> {
        match self.program {
            Program::Idle => None,
            Program::Stream => Some(write % self.pages),
            Program::Uniform => Some(self.scattered(write)),
            Program::Hotset => Some(self.hot_or_cold(write)),
        }
    }

    /// Each pass goes over every page once, in steps of a length that has no divisor in common with their number; start
    /// and step differ from pass to pass.
    fn scattered(&mut self, write: u64) -> u64 {
        let pass = write / self.pages;
        if pass != self.pass {
            self.begin_pass(pass);
        }
        let position = u128::from(write % self.pages) * u128::from(self.step) + u128::from(self.start);
        (position % u128::from(self.pages)) as u64
    }

    fn begin_pass(&mut self, pass: u64) {
        self.pass = pass;
        self.start = mix(self.seed, pass.wrapping_mul(2)) % self.pages;
        // From a quarter of the pages on, so that neighbours in time are none in memory.
        let drawn = mix(self.seed, pass.wrapping_mul(2).wrapping_add(1)) % (self.pages / 2 + 1);
        self.step = (self.pages / 4 + drawn..).find(|&step| coprime(step, self.pages)).unwrap_or(1);
    }

    /// Nine writes of ten go to the first tenth of the pages.
    fn hot_or_cold(&self, write: u64) -> u64 {
        let hot_pages = self.pages.div_ceil(10);
        let cold_pages = self.pages - hot_pages;
        let (kind, which) =
            (mix(self.seed, write.wrapping_mul(2)), mix(self.seed, write.wrapping_mul(2).wrapping_add(1)));
        if kind % 10 < 9 || cold_pages == 0 { which % hot_pages } else { hot_pages + which % cold_pages }
    }
}

fn coprime(mut a: u64, mut b: u64) -> bool {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a == 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn uniform_reaches_every_page_in_each_pass_and_scatters() {
        for pages in [1u64, 2, 3, 4, 6, 10, 97, 100, 512, 1000, 4096] {
            let mut pattern = Pattern::new(Program::Uniform, pages, 5);
            let order: Vec<u64> = (0..3 * pages).map(|write| pattern.page(write).unwrap()).collect();
            for pass in order.chunks(pages as usize) {
                assert_eq!(
                    pass.iter().copied().collect::<BTreeSet<_>>(),
                    (0..pages).collect(),
                    "{pages} pages"
                );
            }
            if pages >= 97 {
                let near = order.windows(2).filter(|pair| pair[0].abs_diff(pair[1]) <= 1).count();
                assert!(near <= 3, "{near} of {} steps go to a neighbour", order.len());
                assert_ne!(order[..pages as usize], order[pages as usize..2 * pages as usize]);
            }
        }
    }

    #[test]
    fn the_largest_guest_and_the_last_write_do_not_overflow() {
        let pages = crate::layout::MAX_BYTES / 4096;
        for program in Program::ALL {
            let mut pattern = Pattern::new(program, pages, u64::MAX);
            for write in [0, pages - 1, pages, u64::MAX] {
                assert!(pattern.page(write).is_none_or(|page| page < pages));
            }
        }
    }

    #[test]
    fn hotset_sends_nine_writes_of_ten_to_a_tenth_of_the_pages() {
        let mut pattern = Pattern::new(Program::Hotset, 10_000, 5);
        let mut counts = vec![0u32; 10_000];
        for write in 0..200_000 {
            counts[pattern.page(write).unwrap() as usize] += 1;
        }
        let hot: u32 = counts[..1000].iter().sum();
        // The standard deviation is sqrt(200,000 * 0.9 * 0.1) = 134; seeded, so this does not flicker.
        assert!(hot.abs_diff(180_000) < 600, "{hot} of 200000 writes are hot");
        assert!(counts[..1000].iter().all(|&count| count > 100), "every hot page is often written");
        let cold = counts[1000..].iter().filter(|&&count| count > 0).count();
        // 20,000 writes on 9,000 pages leave e^-2.2 = 11 % of them untouched.
        assert!((7800..8200).contains(&cold), "{cold} cold pages were written");
        assert_eq!(Pattern::new(Program::Hotset, 1, 5).page(3), Some(0));
    }

    #[test]
    fn stream_goes_page_after_page_and_idle_nowhere() {
        let mut stream = Pattern::new(Program::Stream, 3, 5);
        assert_eq!((0..5).filter_map(|write| stream.page(write)).collect::<Vec<_>>(), [0, 1, 2, 0, 1]);
        assert_eq!(Pattern::new(Program::Idle, 3, 5).page(0), None);
    }
}

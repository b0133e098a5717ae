//! A thread that writes the memory while it is sent, as a guest would.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::BenchError;
use super::fill::Random;
use crate::dirty::DirtyTracker;
use crate::dirty::synthetic::{Marker, SyntheticTracker};
use crate::engine::cpu::GUEST_THREAD_PREFIX;
use crate::memory::GuestMemory;
use crate::pageset::PageSet;
use crate::units::{PAGE_SIZE, PageIndex, Run};

/// How often it looks how far behind its rate it is.
const TICK: Duration = Duration::from_millis(1);

const WRITES: u8 = 0;
const STOPS: u8 = 1;
const STANDS: u8 = 2;
const ENDS: u8 = 3;

/// Writes random pages of those in use at a rate, and knows which.
pub(super) struct Writer {
    tracker: SyntheticTracker,
    pages: u64,
    state: Arc<AtomicU8>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Begins to write. Its thread counts as the guest's, so its time is not the migration's.
    ///
    /// # Errors
    /// [`BenchError::Writer`].
    pub(super) fn start(
        memory: &GuestMemory,
        in_use: &PageSet,
        bytes_per_second: u64,
    ) -> Result<Self, BenchError> {
        let pages = memory.layout().total_pages();
        let (mut tracker, marker) = SyntheticTracker::new(pages);
        tracker.start().map_err(BenchError::Writer)?;
        let state = Arc::new(AtomicU8::new(WRITES));
        let writes = Writes {
            memory: memory.clone(),
            runs: in_use.runs().collect(),
            rate: bytes_per_second as f64 / PAGE_SIZE as f64,
            marker,
            state: state.clone(),
        };
        let thread = std::thread::Builder::new()
            .name(format!("{GUEST_THREAD_PREFIX}writer"))
            .spawn(move || writes.run())
            .map_err(BenchError::Writer)?;
        Ok(Self { tracker, pages, state, thread: Some(thread) })
    }

    /// What was written since the last time.
    ///
    /// # Errors
    /// [`BenchError::Writer`].
    pub(super) fn drain(&mut self) -> Result<PageSet, BenchError> {
        let mut dirty = PageSet::empty(self.pages);
        self.tracker.drain(&mut dirty).map_err(BenchError::Writer)?;
        Ok(dirty)
    }

    /// Has it stand still, and waits until it does. It stays, so that its time can be told from the migration's.
    pub(super) fn pause(&self) {
        self.state.store(STOPS, Ordering::Release);
        while self.state.load(Ordering::Acquire) == STOPS
            && self.thread.as_ref().is_some_and(|t| !t.is_finished())
        {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.state.store(ENDS, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // One that panicked writes nothing any more either.
            let _ = thread.join();
        }
    }
}

struct Writes {
    memory: GuestMemory,
    runs: Vec<Run>,
    /// Pages a second.
    rate: f64,
    marker: Marker,
    state: Arc<AtomicU8>,
}

impl Writes {
    fn run(self) {
        let (began, mut written, mut random) = (Instant::now(), 0u64, Random::new(7));
        loop {
            match self.state.load(Ordering::Acquire) {
                WRITES => {}
                ENDS => return,
                _ => {
                    // Not over the end that may have been asked for meanwhile.
                    let _ = self.state.compare_exchange(STOPS, STANDS, Ordering::AcqRel, Ordering::Acquire);
                    std::thread::sleep(TICK);
                    continue;
                }
            }
            let due = (began.elapsed().as_secs_f64() * self.rate) as u64;
            // Stops are looked for in between, also by a thread that cannot keep up.
            for _ in 0..due.saturating_sub(written).min(1000) {
                self.write_one(&mut random);
                written += 1;
            }
            if due <= written {
                std::thread::sleep(TICK);
            }
        }
    }

    fn write_one(&self, random: &mut Random) {
        if self.runs.is_empty() {
            return;
        }
        let run = self.runs[(random.next() % self.runs.len() as u64) as usize];
        let page = run.start.0 + random.next() % run.pages;
        let Some(place) = self.memory.layout().place(PageIndex(page)) else { return };
        let offset = place.offset + random.next() % (PAGE_SIZE / 8) * 8;
        self.memory.mappings()[place.region].store(offset, random.next());
        // After the write: see the marker.
        self.marker.mark(Run::new(page, 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::RamLayout;
    use crate::memory::{Backing, HugePages};

    #[test]
    fn tells_every_page_that_it_wrote_and_stands_still_when_told() {
        let pages = 64;
        let layout = RamLayout::flat(pages * PAGE_SIZE).unwrap();
        let memory = GuestMemory::allocate(layout, Backing::Memfd, HugePages::No).unwrap();
        let mut in_use = PageSet::empty(pages);
        in_use.extend([Run::new(3, 5), Run::new(40, 1)]);
        let mut writer = Writer::start(&memory, &in_use, 40 << 20).unwrap();
        let mut told = PageSet::empty(pages);
        while told.len() < 6 {
            told.union(&writer.drain().unwrap());
        }
        writer.pause();
        told.union(&writer.drain().unwrap());
        assert_eq!(told, in_use);
        std::thread::sleep(TICK * 5);
        assert!(writer.drain().unwrap().is_empty());
        for page in 0..pages {
            assert_eq!(
                memory.is_zero_page(PageIndex(page)),
                !in_use.contains(PageIndex(page)),
                "page {page}"
            );
        }
    }
}

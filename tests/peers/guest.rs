//! A guest without devices: a thread that stamps pages and remembers, outside guest RAM, what each must hold.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pageferry::dirty::DirtyTracker;
use pageferry::dirty::synthetic::{Marker, SyntheticTracker};
use pageferry::guest::{Guest, GuestError};
use pageferry::layout::{RamLayout, RamRegion};
use pageferry::memory::{Backing, GuestMemory, HugePages};
use pageferry::pageset::PageSet;
use pageferry::units::{GuestAddress, PageIndex, Run};
use pageferry::wire::control::Setup;

pub(crate) const KIND: &str = "stamping";
pub(crate) const CONFIG: &[u8] = b"a guest that stamps its pages";
/// Two regions of 2 MiB with a hole between them.
pub(crate) const PAGES: u64 = 1024;
/// What it has written when it is made.
const TOUCHED: u64 = 600;

pub(crate) fn layout() -> RamLayout {
    let region = |start| RamRegion { start: GuestAddress(start), bytes: 2 << 20 };
    RamLayout::new(vec![region(0), region(1 << 32)]).unwrap()
}

/// How many guests exist, as their host would count them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Census(Arc<AtomicUsize>);

impl Census {
    pub(crate) fn guests(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

#[derive(Debug)]
pub(crate) struct StampingGuest {
    memory: GuestMemory,
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
    census: Census,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct State {
    running: bool,
    over: bool,
    /// The stamp that each page must have; 0 where nothing was written.
    stamps: Vec<u64>,
    writes: u64,
    pauses: u32,
    resumes: u32,
    marker: Option<Marker>,
}

/// What a page with a stamp holds: 512 words, each its own.
pub(crate) fn stamped(page: u64, stamp: u64) -> Vec<u8> {
    let word = |at: u64| (page << 40 ^ stamp << 10 ^ at).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..512).flat_map(|at| word(at).to_le_bytes()).collect()
}

/// The state of a guest that wrote stamp 1 to its first `written` pages, as [`Guest::save_state`] gives it.
pub(crate) fn state_with(written: u64) -> Vec<u8> {
    (0..PAGES).flat_map(|page| u64::from(page < written).to_le_bytes()).collect()
}

impl StampingGuest {
    /// A guest with some pages written, running.
    pub(crate) fn running() -> Self {
        let mut guest = Self::empty(layout(), &Census::default()).unwrap();
        {
            let mut state = guest.shared.lock();
            for page in 0..TOUCHED {
                guest.memory.write_run(Run::new(page, 1), &stamped(page, 1));
                state.stamps[page as usize] = 1;
            }
        }
        guest.resume().unwrap();
        guest.shared.lock().resumes = 0;
        guest
    }

    /// What an adapter does at a destination: takes the source's word for the layout, as the engine has to do.
    pub(crate) fn skeleton(setup: &Setup, census: &Census) -> Result<Self, GuestError> {
        if setup.guest != KIND {
            return Err(GuestError::new(format!("this host has no adapter for a {:?} guest", setup.guest)));
        }
        if setup.config != CONFIG {
            return Err(GuestError::new("the configuration of the guest cannot be read"));
        }
        Self::empty(layout(), census)
    }

    pub(crate) fn empty(layout: RamLayout, census: &Census) -> Result<Self, GuestError> {
        let memory = GuestMemory::allocate(layout, Backing::Memfd, HugePages::No)?;
        let shared = Arc::new(Shared::default());
        shared.lock().stamps = vec![0; PAGES as usize];
        census.0.fetch_add(1, Ordering::SeqCst);
        let mut guest = Self { memory, shared, writer: None, census: census.clone() };
        let (memory, shared) = (guest.memory.clone(), Arc::clone(&guest.shared));
        guest.writer = Some(std::thread::spawn(move || shared.write(&memory)));
        Ok(guest)
    }

    /// How often it was paused and resumed since it first ran.
    pub(crate) fn pauses_and_resumes(&self) -> (u32, u32) {
        let state = self.shared.lock();
        (state.pauses, state.resumes)
    }

    /// It runs, goes on writing, and every page is what it wrote.
    pub(crate) fn assert_runs(&self, what: &str) {
        let before = self.shared.lock().writes;
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.shared.lock().writes < before + 20 {
            assert!(self.shared.lock().running, "{what}: the guest does not run");
            assert!(Instant::now() < deadline, "{what}: the guest runs and writes nothing");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.assert_whole(what);
    }

    /// It does not run, and every page is what it wrote.
    pub(crate) fn assert_stopped(&self, what: &str) {
        assert!(!self.shared.lock().running, "{what}: the guest runs");
        self.assert_whole(what);
    }

    fn assert_whole(&self, what: &str) {
        let state = self.shared.lock();
        let mut page_bytes = vec![0; 4096];
        for page in 0..PAGES {
            let stamp = state.stamps[page as usize];
            self.memory.read_page(PageIndex(page), &mut page_bytes);
            let expected = if stamp == 0 { vec![0; 4096] } else { stamped(page, stamp) };
            assert!(page_bytes == expected, "{what}: page {page} is not what the guest wrote");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest's one vCPU.
    fn write(&self, memory: &GuestMemory) {
        let mut random = 12345u64;
        loop {
            let mut state = self.lock();
            while !state.running && !state.over {
                state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.over {
                return;
            }
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let page = (random >> 33) % PAGES;
            let stamp = state.stamps[page as usize] + 1;
            memory.write_run(Run::new(page, 1), &stamped(page, stamp));
            state.stamps[page as usize] = stamp;
            state.writes += 1;
            if let Some(marker) = &state.marker {
                marker.mark(Run::new(page, 1));
            }
            drop(state);
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

impl Drop for StampingGuest {
    fn drop(&mut self) {
        self.shared.lock().over = true;
        self.shared.wake.notify_all();
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
        self.census.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Guest for StampingGuest {
    fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }

    fn dirty_tracker(&mut self) -> Result<Box<dyn DirtyTracker>, GuestError> {
        let (tracker, marker) = SyntheticTracker::new(PAGES);
        self.shared.lock().marker = Some(marker);
        Ok(Box::new(tracker))
    }

    fn config(&self) -> Result<Vec<u8>, GuestError> {
        Ok(CONFIG.to_vec())
    }

    fn touched(&self) -> Result<PageSet, GuestError> {
        let mut touched = PageSet::empty(PAGES);
        let state = self.shared.lock();
        let written = (0..PAGES).filter(|page| state.stamps[*page as usize] > 0);
        written.for_each(|page| touched.insert(PageIndex(page)));
        Ok(touched)
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        let mut state = self.shared.lock();
        state.running = false;
        state.pauses += 1;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        let mut state = self.shared.lock();
        state.running = true;
        state.resumes += 1;
        self.shared.wake.notify_all();
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<u8>, GuestError> {
        Ok(self.shared.lock().stamps.iter().flat_map(|stamp| stamp.to_le_bytes()).collect())
    }

    fn load_state(&mut self, bytes: &[u8], _stopped_for: Duration) -> Result<(), GuestError> {
        let (stamps, rest) = bytes.as_chunks::<8>();
        if stamps.len() != PAGES as usize || !rest.is_empty() {
            return Err(GuestError::new(format!("a state of {} bytes is not of this guest", bytes.len())));
        }
        self.shared.lock().stamps = stamps.iter().map(|stamp| u64::from_le_bytes(*stamp)).collect();
        Ok(())
    }

    fn throttle(&mut self, _percent: u8) -> Result<(), GuestError> {
        Ok(())
    }
}

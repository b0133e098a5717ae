//! The memory that whole packets are carried through: which of it is in use.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex};

use super::lock;

/// The unit in which it is given out: the content of an ordinary packet, 512 KiB.
const SLOT_PAGES: u32 = 128;

/// Gives out pieces of the staging memory, and waits where none is free.
#[derive(Debug)]
pub(super) struct Staging {
    state: Mutex<State>,
    freed: Condvar,
}

#[derive(Debug)]
struct State {
    used: Vec<bool>,
    /// The first page of each piece that is in use, and how many slots it has.
    pieces: BTreeMap<u32, usize>,
    over: bool,
}

impl Staging {
    pub(super) fn new(pages: u64) -> Self {
        let slots = (pages / u64::from(SLOT_PAGES)) as usize;
        let state = State { used: vec![false; slots], pieces: BTreeMap::new(), over: false };
        Self { state: Mutex::new(state), freed: Condvar::new() }
    }

    /// The first page of a piece of so many pages, once it is free. `None` when all is over, or when it never could be.
    pub(super) fn take(&self, pages: u64) -> Option<u32> {
        let slots = pages.div_ceil(u64::from(SLOT_PAGES)) as usize;
        let mut state = lock(&self.state);
        loop {
            if state.over || slots == 0 || slots > state.used.len() {
                return None;
            }
            let place = state.used.windows(slots).position(|window| window.iter().all(|used| !used));
            if let Some(at) = place {
                state.used[at..at + slots].fill(true);
                let page = at as u32 * SLOT_PAGES;
                state.pieces.insert(page, slots);
                return Some(page);
            }
            state = self.freed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// Takes a piece back; `false` when it was not given out.
    pub(super) fn free(&self, page: u32) -> bool {
        let mut state = lock(&self.state);
        let Some(slots) = state.pieces.remove(&page) else { return false };
        let at = (page / SLOT_PAGES) as usize;
        state.used[at..at + slots].fill(false);
        drop(state);
        self.freed.notify_all();
        true
    }

    /// Whoever waits need not wait any more.
    pub(super) fn end(&self) {
        lock(&self.state).over = true;
        self.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn pieces_do_not_overlap_and_come_back() {
        let staging = Staging::new(512);
        assert_eq!(staging.take(1), Some(0));
        assert_eq!(staging.take(129), Some(128));
        assert_eq!(staging.take(128), Some(384));
        assert!(staging.free(128) && !staging.free(128) && !staging.free(1));
        assert_eq!(staging.take(2 * 128), Some(128));
        assert_eq!(staging.take(5 * 128), None, "more than there is");
    }

    #[test]
    fn who_waits_is_woken_by_what_is_freed_and_by_the_end() {
        let staging = Arc::new(Staging::new(128));
        assert_eq!(staging.take(1), Some(0));
        let waits = staging.clone();
        let thread = std::thread::spawn(move || (waits.take(1), waits.take(1)));
        assert!(staging.free(0));
        std::thread::sleep(std::time::Duration::from_millis(20));
        staging.end();
        assert_eq!(thread.join().unwrap(), (Some(0), None));
    }
}

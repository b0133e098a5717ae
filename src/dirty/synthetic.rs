//! Dirty pages told by a program that knows what it wrote: a device's backend, an emulator, a test.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{DirtyTracker, TrackerKind};
use crate::pageset::PageSet;
use crate::units::Run;

/// Tells what was marked by its [`Marker`]s.
#[derive(Debug)]
pub struct SyntheticTracker {
    marked: Arc<Mutex<Marked>>,
}

/// The handle by which a writer tells what it wrote. A clone tells the same tracker.
#[derive(Clone, Debug)]
pub struct Marker {
    marked: Arc<Mutex<Marked>>,
}

#[derive(Debug)]
struct Marked {
    pages: PageSet,
    started: bool,
}

/// Nothing that the lock guards is ever left half done, so a writer that panicked spoils nothing.
fn lock(marked: &Mutex<Marked>) -> MutexGuard<'_, Marked> {
    marked.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SyntheticTracker {
    /// A tracker for a guest that has `pages` pages, and the handle that marks them.
    #[must_use]
    pub fn new(pages: u64) -> (Self, Marker) {
        let marked = Arc::new(Mutex::new(Marked { pages: PageSet::empty(pages), started: false }));
        (Self { marked: Arc::clone(&marked) }, Marker { marked })
    }
}

impl Marker {
    /// Tells that the pages of a run were written; what lies past the guest's end is ignored. Without effect while tracking
    /// is off.
    ///
    /// Mark *after* the write. A mark before it could be drained, and the page read, before the write.
    pub fn mark(&self, run: Run) {
        let mut marked = lock(&self.marked);
        if marked.started {
            marked.pages.insert_run(run);
        }
    }

    /// Whether anyone wants to know.
    #[must_use]
    pub fn is_tracking(&self) -> bool {
        lock(&self.marked).started
    }
}

impl DirtyTracker for SyntheticTracker {
    fn start(&mut self) -> io::Result<()> {
        let mut marked = lock(&self.marked);
        marked.pages.clear();
        marked.started = true;
        Ok(())
    }

    fn drain(&mut self, dirty: &mut PageSet) -> io::Result<()> {
        let mut marked = lock(&self.marked);
        if !marked.started {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "dirty tracking was not started"));
        }
        dirty.union(&marked.pages);
        marked.pages.clear();
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        let mut marked = lock(&self.marked);
        marked.started = false;
        marked.pages.clear();
        Ok(())
    }

    fn kind(&self) -> TrackerKind {
        TrackerKind::Synthetic
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const PAGES: u64 = 200;

    proptest! {
        #[test]
        fn tells_once_what_was_marked(rounds in prop::collection::vec(prop::collection::vec((0..PAGES + 10, 1..20u64), 0..10), 1..6)) {
            let (mut tracker, marker) = SyntheticTracker::new(PAGES);
            marker.mark(Run::new(0, PAGES));
            tracker.start().unwrap();
            for round in rounds {
                let mut oracle = BTreeSet::new();
                for (start, pages) in round {
                    marker.clone().mark(Run::new(start, pages));
                    oracle.extend((start..start + pages).filter(|page| *page < PAGES));
                }
                let mut dirty = PageSet::empty(PAGES);
                tracker.drain(&mut dirty).unwrap();
                let told: BTreeSet<u64> = dirty.runs().flat_map(|run| run.start.0..run.end()).collect();
                prop_assert_eq!(told, oracle);
            }
            tracker.stop().unwrap();
            prop_assert!(!marker.is_tracking() && tracker.drain(&mut PageSet::empty(PAGES)).is_err());
        }
    }
}

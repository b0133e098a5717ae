//! Dirty pages of any process's memory: the kernel write-protects it asynchronously and notes each first write.

use std::io;

use super::{DirtyTracker, TrackerKind};
use crate::memory::GuestMemory;
use crate::memory::origin::{Origin, Piece, pieces};
use crate::memory::touched::pages;
use crate::pageset::PageSet;
use crate::sys::pagemap::{Found, Pagemap, PagemapError, Query, Traits};
use crate::sys::scatter::MemorySlice;
use crate::sys::userfaultfd::{Features, Stops, Userfaultfd};

/// Pages that exist and were written. Kernels differ in whether a page that does not exist and is not protected counts as
/// written; told without `any`, a guest would be dirty, and protected by page tables of its full size, wherever it was
/// never touched.
const WRITTEN: Query = Query {
    all: Traits::WRITTEN,
    none: Traits::NONE,
    any: Traits::PRESENT.and(Traits::SWAPPED),
    told: Traits::NONE,
    protect: true,
};

/// Pages that this process's page tables know nothing of, not even that they are protected.
const UNMAPPED: Query = Query {
    all: Traits::NONE,
    none: Traits::PRESENT.and(Traits::SWAPPED),
    any: Traits::NONE,
    told: Traits::NONE,
    protect: true,
};

/// Tracks writes to guest memory by `PAGEMAP_SCAN` over a userfaultfd in asynchronous write-protect mode (Linux 6.7).
///
/// It needs no privilege, and no help from the hypervisor: writes by threads of this process, by its system calls and by
/// KVM for its vCPUs are all told. A clean scan costs about 1 ms per GiB in use, and nothing for memory that is not.
///
/// What it tells:
/// - every page that was written, also one that was populated first by that write;
/// - once, a page that was only read when it had no page of its own before;
/// - the whole huge page around a write, where private memory or memory of the hugetlb pool is mapped by huge pages.
///
/// What it does not tell:
/// - a page that was discarded (`MADV_DONTNEED`, a hole punched with `fallocate`) and not touched since. A guest's balloon
///   discards pages whose content nobody will ask for; whoever discards others tells them by another tracker;
/// - writes that do not pass through this process's page tables: of other processes that map the same file, of
///   `write(2)` to that file, of devices into pinned pages.
///
/// One memory has one userfaultfd: [`start`](DirtyTracker::start) is an error (`ResourceBusy`) while a
/// [`Snapshot`](crate::memory::snapshot::Snapshot) runs or the hypervisor uses a userfaultfd of its own.
#[derive(Debug)]
pub struct PagemapTracker {
    memory: GuestMemory,
    pagemap: Pagemap,
    uffd: Userfaultfd,
    /// Where the content of each region lives, while tracking.
    tracked: Option<Vec<Vec<Piece>>>,
}

impl PagemapTracker {
    /// A tracker for the memory, not started.
    ///
    /// # Errors
    /// `Unsupported`, naming what the kernel lacks; otherwise why a userfaultfd or the page map does not open.
    pub fn new(memory: &GuestMemory) -> io::Result<Self> {
        let features = Features::ASYNC.and(Features::UNPOPULATED).and(Features::SHARED_AND_HUGETLB);
        Ok(Self {
            memory: memory.clone(),
            pagemap: Pagemap::open()?,
            uffd: Userfaultfd::open(Stops::UserSpace, features)?,
            tracked: None,
        })
    }

    fn register(&self) -> io::Result<()> {
        for (index, mapping) in self.memory.mappings().iter().enumerate() {
            if let Err(error) = self.uffd.register(mapping) {
                for registered in &self.memory.mappings()[..index] {
                    // The first error is the one to tell; memory that stays registered costs time, not correctness.
                    let _ = self.uffd.unregister(registered);
                }
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Has shared memory that is mapped by huge pages mapped by small ones from now on: a scan would protect a huge page as
    /// one, and tell all of it after one write. Here the kernel protects page by page, and so maps page by page.
    fn split_huge_pages(&self, tracked: &[Vec<Piece>]) -> io::Result<()> {
        let huge = Query { all: Traits::PRESENT.and(Traits::HUGE), ..Query::default() };
        for (mapping, pieces) in self.memory.mappings().iter().zip(tracked) {
            let shared = |piece: &&Piece| {
                matches!(piece.origin, Origin::Shared(_) | Origin::Opaque) && !piece.origin.is_hugetlb()
            };
            for piece in pieces.iter().filter(shared) {
                let slice = |offset, bytes| MemorySlice::new(mapping, piece.offset + offset, bytes);
                let mut ranges = Vec::new();
                let found = |found: Found| ranges.push((found.offset, found.bytes));
                self.pagemap.scan(slice(0, piece.bytes), huge, found)?;
                ranges.into_iter().try_for_each(|(offset, bytes)| self.uffd.protect(slice(offset, bytes)))?;
            }
        }
        Ok(())
    }

    /// Adds the pages of a region that were written, and protects them anew. Pages that are not in the page tables are
    /// looked for where `unmapped` says so.
    fn scan_region(
        &self,
        region: usize,
        pieces: &[Piece],
        unmapped: impl Fn(&Origin) -> bool,
        dirty: &mut PageSet,
    ) -> io::Result<()> {
        self.scan(region, 0, self.memory.mappings()[region].bytes(), WRITTEN, dirty)?;
        pieces
            .iter()
            .filter(|piece| unmapped(&piece.origin))
            .try_for_each(|piece| self.scan_unmapped(region, piece, dirty))
    }

    /// Scans a range of a region and adds what it finds; after an error, everything that it may have found.
    fn scan(
        &self,
        region: usize,
        offset: u64,
        bytes: u64,
        query: Query,
        dirty: &mut PageSet,
    ) -> io::Result<()> {
        let mapping = &self.memory.mappings()[region];
        let first = self.memory.layout().region_run(region).start.0;
        let scanned = self.pagemap.scan(MemorySlice::new(mapping, offset, bytes), query, |found| {
            dirty.insert_run(pages(first, offset + found.offset, found.bytes));
        });
        if let Err(PagemapError::Scan { address, bytes, .. }) = &scanned {
            dirty.insert_run(pages(first, address - mapping.address(), *bytes));
        }
        Ok(scanned?)
    }

    /// Adds, and protects, pages that hold something and are not in the page tables.
    ///
    /// When tracking begins, that is memory that was filled through its file. Later, the kernel may have taken a page out
    /// of the page tables after it was written: it notes there that a page was protected, but not that it no longer was.
    fn scan_unmapped(&self, region: usize, piece: &Piece, dirty: &mut PageSet) -> io::Result<()> {
        let mut result = Ok(());
        let mut scan = |offset, bytes| {
            if result.is_ok() {
                result = self.scan(region, piece.offset + offset, bytes, UNMAPPED, dirty);
            }
        };
        match &piece.origin {
            Origin::Private { .. } => {}
            Origin::Shared(_) if piece.origin.is_hugetlb() => {}
            Origin::Shared(file) => file.data(piece.bytes, scan)?,
            Origin::Opaque => scan(0, piece.bytes),
        }
        result
    }
}

impl DirtyTracker for PagemapTracker {
    fn start(&mut self) -> io::Result<()> {
        let tracked = self.memory.mappings().iter().map(pieces).collect::<io::Result<Vec<_>>>()?;
        if self.tracked.is_none() {
            self.register()?;
        }
        if let Err(error) = self.split_huge_pages(&tracked) {
            self.tracked = Some(tracked);
            // The first error is the one to tell.
            let _ = self.stop();
            return Err(error);
        }
        // What is written already is protected like any drained page, and told to nobody.
        let mut before = PageSet::empty(self.memory.layout().total_pages());
        let cleaned = tracked
            .iter()
            .enumerate()
            .try_for_each(|(region, pieces)| self.scan_region(region, pieces, |_| true, &mut before));
        self.tracked = Some(tracked);
        cleaned.inspect_err(|_| {
            // The first error is the one to tell.
            let _ = self.stop();
        })
    }

    fn drain(&mut self, dirty: &mut PageSet) -> io::Result<()> {
        let Some(tracked) = &self.tracked else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "dirty tracking by pagemap was not started",
            ));
        };
        tracked
            .iter()
            .enumerate()
            .try_for_each(|(region, pieces)| self.scan_region(region, pieces, Origin::is_evictable, dirty))
    }

    fn stop(&mut self) -> io::Result<()> {
        if self.tracked.is_none() {
            return Ok(());
        }
        for mapping in self.memory.mappings() {
            self.uffd.unregister(mapping)?;
        }
        self.tracked = None;
        Ok(())
    }

    fn kind(&self) -> TrackerKind {
        TrackerKind::Pagemap
    }
}

#[cfg(test)]
mod tests;

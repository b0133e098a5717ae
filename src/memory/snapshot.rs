//! A digest of guest RAM as it is at one instant, taken while the guest goes on running.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::GuestMemory;
use super::origin::{Origin, pieces};
use super::touched::pages;
use crate::pageset::PageSet;
use crate::sys::pagemap::{Pagemap, Query, Traits};
use crate::sys::scatter::MemorySlice;
use crate::sys::userfaultfd::{Features, Stops, Userfaultfd, UserfaultfdError};
use crate::units::{PAGE_SIZE, PageIndex, Run};

/// Pages in a huge page of 2 MiB, which keeps its size only if it is protected and let go as a whole.
const HUGE_PAGES: u64 = 512;
/// Pages that are hashed between two looks at whether the guest waits: 64 KiB, about 10 us.
const CHUNK_PAGES: u64 = 16;
/// Pages that are hashed before they are let go together: 2 MiB. Lifting protection costs a lock and a TLB flush whatever
/// its size, so not for each chunk; and a write to what is hashed already should not fault for long.
const RELEASE_PAGES: u64 = 512;

/// What guest RAM held, in a form that two hosts can compare.
///
/// Pages that hold only zero bytes do not count, so that it makes no difference which of them were ever touched. Every
/// other page adds its xxh3 (128 bits, seeded with its [`PageIndex`]) to the digest, so that the order in which pages are
/// hashed makes none either. It finds mistakes; it is no defence against a peer that wants a collision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryDigest {
    /// The sum of the pages' hashes, modulo 2^128.
    pub digest: u128,
    /// How many pages hold something other than zero.
    pub nonzero_pages: u64,
}

impl MemoryDigest {
    /// The digest of the memory of a guest that is paused; of one that runs, it is the digest of nothing in particular.
    ///
    /// # Errors
    /// As [`GuestMemory::touched`].
    pub fn of_paused(memory: &GuestMemory) -> io::Result<Self> {
        let touched = memory.touched()?;
        let mut hasher = Hasher::new(memory);
        touched.runs().flat_map(|run| run.start.0..run.end()).for_each(|page| hasher.add(PageIndex(page)));
        Ok(hasher.sum)
    }
}

/// Sums up pages.
struct Hasher<'a> {
    memory: &'a GuestMemory,
    sum: MemoryDigest,
    page: Vec<u8>,
}

impl<'a> Hasher<'a> {
    fn new(memory: &'a GuestMemory) -> Self {
        Self { memory, sum: MemoryDigest::default(), page: vec![0; PAGE_SIZE as usize] }
    }

    fn add(&mut self, page: PageIndex) {
        if !self.memory.is_zero_page(page) {
            self.memory.read_page(page, &mut self.page);
            self.sum.digest = self.sum.digest.wrapping_add(xxh3_128_with_seed(&self.page, page.0));
            self.sum.nonzero_pages += 1;
        }
    }
}

/// Hashes guest RAM as it was when [`Snapshot::begin`] was called, while the guest runs.
///
/// The memory is write-protected by userfaultfd. A thread hashes it page by page and lifts the protection; a vCPU that
/// writes a page first waits until that page is hashed: some 10 us, or 300 us where memory is mapped by huge pages, which
/// stay whole. Dropping it lets the guest go at once.
///
/// One memory has one userfaultfd: not together with a [`PagemapTracker`](crate::dirty::pagemap::PagemapTracker) that is
/// started, nor over memory that a hypervisor watches itself (`begin` is then an error, `ResourceBusy`). KVM's dirty log and
/// rings go together with it.
///
/// Only writes through this process's page tables are held up: while it runs, nothing else may change the memory, neither
/// another process that maps the same file, nor `write(2)` to it, nor a device, nor a balloon that discards pages.
#[derive(Debug)]
pub struct Snapshot {
    cancel: Arc<AtomicBool>,
    /// Taken when joined.
    thread: Option<JoinHandle<io::Result<MemoryDigest>>>,
}

impl Snapshot {
    /// Protects the memory of a guest that is paused. The guest can be resumed as soon as this returns, which takes about
    /// 60 ms for each GiB in use that is mapped by 4 KiB pages, and 2 ms by huge pages.
    ///
    /// # Errors
    /// `PermissionDenied` when this user may not hold up writes by the kernel, such as KVM's (it takes `CAP_SYS_PTRACE`,
    /// access to `/dev/userfaultfd`, or `vm.unprivileged_userfaultfd`): hash the paused guest then
    /// ([`MemoryDigest::of_paused`]). `ResourceBusy` when the memory has a userfaultfd already. Otherwise what the kernel
    /// answers; the memory is as it was.
    pub fn begin(memory: &GuestMemory) -> io::Result<Self> {
        let features = Features::WRITE_PROTECT.and(Features::SHARED_AND_HUGETLB);
        // Dropped on any error from here on, which lifts all protection.
        let uffd = Userfaultfd::open(Stops::Everyone, features)?;
        let mut sweep = Sweep {
            memory: memory.clone(),
            uffd,
            left: memory.touched()?,
            huge: PageSet::empty(memory.layout().total_pages()),
        };
        sweep.protect()?;
        let cancel = Arc::new(AtomicBool::new(false));
        let cancelled = Arc::clone(&cancel);
        // Should the thread panic, its userfaultfd is closed all the same, and the guest is let go.
        let thread = std::thread::Builder::new()
            .name("memory-digest".to_owned())
            .spawn(move || sweep.run(&cancelled))?;
        Ok(Self { cancel, thread: Some(thread) })
    }

    /// Whether [`Snapshot::finish`] would answer at once.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for the digest: about 0.3 s for each GiB in use, more while the guest writes all over it.
    ///
    /// # Errors
    /// What the kernel answered in the meantime; the guest was let go then.
    pub fn finish(mut self) -> io::Result<MemoryDigest> {
        let thread = self.thread.take().expect("only finish takes the thread, and it consumes the snapshot");
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread that hashes guest memory panicked")))
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        self.cancel.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Nobody wants to know any more; waiting keeps the memory free for the next userfaultfd.
            let _ = thread.join();
        }
    }
}

/// The memory on its way from protected to hashed.
struct Sweep {
    memory: GuestMemory,
    uffd: Userfaultfd,
    /// Touched pages that are not hashed yet; all of them are protected.
    left: PageSet,
    /// Pages mapped by huge pages when it began.
    huge: PageSet,
}

impl Sweep {
    fn protect(&mut self) -> io::Result<()> {
        let pagemap = Pagemap::open()?;
        for (region, mapping) in self.memory.mappings().iter().enumerate() {
            self.uffd.register(mapping)?;
            let first = self.memory.layout().region_run(region).start.0;
            let whole = MemorySlice::new(mapping, 0, mapping.bytes());
            let query = Query { all: Traits::PRESENT.and(Traits::HUGE), ..Query::default() };
            let huge = &mut self.huge;
            pagemap.scan(whole, query, |found| {
                huge.insert_run(pages(first, found.offset, found.bytes));
            })?;
            for piece in pieces(mapping)? {
                if piece.origin.is_hugetlb() {
                    self.huge.insert_run(pages(first, piece.offset, piece.bytes));
                }
                match &piece.origin {
                    // The kernel skips what is not populated, so one call does.
                    Origin::Private { .. } => {
                        self.uffd.protect(MemorySlice::new(mapping, piece.offset, piece.bytes))?;
                    }
                    // Here it would make page tables for it.
                    Origin::Shared(_) | Origin::Opaque => {
                        let run = pages(first, piece.offset, piece.bytes);
                        for touched in self.left.runs_from(run.start) {
                            if touched.start.0 >= run.end() {
                                break;
                            }
                            let end = touched.end().min(run.end());
                            self.protect_run(Run::new(touched.start.0, end - touched.start.0))?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn protect_run(&self, run: Run) -> Result<(), UserfaultfdError> {
        self.memory.memory_slices(run).try_for_each(|slice| self.uffd.protect(slice))
    }

    fn run(mut self, cancel: &AtomicBool) -> io::Result<MemoryDigest> {
        let memory = self.memory.clone();
        let mut hasher = Hasher::new(&memory);
        // A copy to walk: pages that the guest waits for leave `left` out of order.
        let touched = self.left.clone();
        // Pages from `held` to `next` are hashed, and protected still.
        let (mut held, mut next, mut hashed) = (0, 0, 0);
        for run in touched.runs() {
            next = next.max(run.start.0);
            while next < run.end() {
                if cancel.load(Ordering::Relaxed) {
                    return Err(io::Error::new(io::ErrorKind::Interrupted, "the snapshot was dropped"));
                }
                self.serve(&mut hasher)?;
                let pages = self.huge_page(next).unwrap_or_else(|| self.chunk(next, run.end()));
                self.hash(pages, &mut hasher);
                (next, hashed) = (pages.end(), hashed + pages.pages);
                if hashed >= RELEASE_PAGES {
                    self.release(Run::new(held, next - held))?;
                    (held, hashed) = (next, 0);
                }
            }
        }
        // Dropping the userfaultfd lets go of the rest.
        Ok(hasher.sum)
    }

    /// Hashes the pages that the guest waits for, and lets it go on.
    fn serve(&mut self, hasher: &mut Hasher<'_>) -> io::Result<()> {
        let mut waiting = Vec::new();
        loop {
            self.uffd.read_faults(&mut waiting)?;
            if waiting.is_empty() {
                return Ok(());
            }
            for address in waiting.drain(..) {
                // A page of ours, since only our mappings are registered.
                if let Some(page) = self.page_at(address) {
                    let pages = self.huge_page(page).unwrap_or(Run::new(page, 1));
                    self.hash(pages, hasher);
                    self.release(pages)?;
                }
            }
        }
    }

    /// Hashes what is left of a run.
    fn hash(&mut self, run: Run, hasher: &mut Hasher<'_>) {
        (run.start.0..run.end())
            .filter(|page| self.left.contains(PageIndex(*page)))
            .for_each(|page| hasher.add(PageIndex(page)));
        self.left.remove_run(run);
    }

    /// Lifts the protection of a run that is hashed, and lets go on whoever waits there.
    fn release(&self, run: Run) -> Result<(), UserfaultfdError> {
        self.memory.memory_slices(run).try_for_each(|slice| self.uffd.unprotect(slice))
    }

    /// The huge page around a page, if it was in one, as far as it lies in the same region.
    fn huge_page(&self, page: u64) -> Option<Run> {
        let place =
            self.memory.layout().place(PageIndex(page)).filter(|_| self.huge.contains(PageIndex(page)))?;
        let region = self.memory.layout().region_run(place.region);
        // Huge pages are aligned in the address space, which a region need not be.
        let lead = self.memory.mappings()[place.region].address() / PAGE_SIZE;
        let at = page - region.start.0;
        let within = (lead + at) % HUGE_PAGES;
        let (start, end) = (at.saturating_sub(within), (at + HUGE_PAGES - within).min(region.pages));
        Some(Run::new(region.start.0 + start, end - start))
    }

    /// Some pages from one outside any huge page on, up to the next huge page.
    fn chunk(&self, start: u64, end: u64) -> Run {
        let end = end.min(start + CHUNK_PAGES);
        let end = (start..end).find(|page| self.huge.contains(PageIndex(*page))).unwrap_or(end);
        Run::new(start, end - start)
    }

    fn page_at(&self, address: u64) -> Option<u64> {
        let mappings = self.memory.mappings().iter().enumerate();
        mappings
            .filter_map(|(region, mapping)| {
                let offset =
                    address.checked_sub(mapping.address()).filter(|offset| *offset < mapping.bytes())?;
                Some(self.memory.layout().region_run(region).start.0 + offset / PAGE_SIZE)
            })
            .next()
    }
}

#[cfg(test)]
mod tests;

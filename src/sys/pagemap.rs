//! What the kernel knows of this process's pages: which exist, and which were written since they were last protected.
//!
//! Source: the kernel's `Documentation/admin-guide/mm/pagemap.rst` (the `PAGEMAP_SCAN` ioctl, Linux 6.7) and
//! `include/uapi/linux/fs.h`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::scatter::MemorySlice;

/// What is true of a page. A bit set of `PAGE_IS_*`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traits(u64);

impl Traits {
    /// None of them.
    pub const NONE: Self = Self(0);
    /// It is not write-protected: written since it was protected last, or never protected. Whether a page that does not
    /// exist can be so depends on the kernel; ask for [`Traits::PRESENT`] or [`Traits::SWAPPED`] too.
    pub const WRITTEN: Self = Self(1 << 1);
    /// It is mapped.
    pub const PRESENT: Self = Self(1 << 3);
    /// It is in swap; a protected page that does not exist yet counts too.
    pub const SWAPPED: Self = Self(1 << 4);
    /// It is the shared page of zeros, which the kernel maps for reads of private memory that was never written.
    pub const ZERO: Self = Self(1 << 5);
    /// It is mapped as a part of a huge page.
    pub const HUGE: Self = Self(1 << 6);

    /// Both sets.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` is in this set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Which pages a scan tells, and what else it does with them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Query {
    /// A page has all of these ...
    pub all: Traits,
    /// ... none of these ...
    pub none: Traits,
    /// ... and, unless this is empty, one of these.
    pub any: Traits,
    /// What of each page is told; adjacent pages that differ in nothing else come as one range.
    pub told: Traits,
    /// Write-protects each page that is told, in the same step: a write comes either before, and is told now, or after,
    /// and is told by the next scan.
    pub protect: bool,
}

/// Pages that a scan found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where they start, from the start of the slice that was scanned, in bytes.
    pub offset: u64,
    /// How long they are, in bytes.
    pub bytes: u64,
    /// What is true of them, out of what was asked for.
    pub traits: Traits,
}

/// Why this process's pages could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum PagemapError {
    /// No pagemap.
    #[error(
        "cannot open /proc/self/pagemap: the kernel needs CONFIG_PROC_PAGE_MONITOR, and /proc must be mounted"
    )]
    Open(#[source] io::Error),
    /// The kernel is too old.
    #[error("the kernel has no PAGEMAP_SCAN; run Linux 6.7 or newer")]
    Missing(#[source] io::Error),
    /// A scan failed.
    #[error("cannot scan {bytes} bytes of guest RAM at {address:#x} by PAGEMAP_SCAN")]
    Scan {
        /// From where on it is unknown what was found, in this process.
        address: u64,
        /// How much from there on was still to be scanned.
        bytes: u64,
        /// What the kernel answered; `EPERM` when the memory is not registered for asynchronous write protection.
        source: io::Error,
    },
}

impl From<PagemapError> for io::Error {
    fn from(error: PagemapError) -> Self {
        let kind = match &error {
            PagemapError::Missing(_) => io::ErrorKind::Unsupported,
            PagemapError::Open(source) | PagemapError::Scan { source, .. } => source.kind(),
        };
        Self::new(kind, error)
    }
}

const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// `struct pm_scan_arg`.
#[repr(C)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const PAGEMAP_SCAN: libc::Ioctl = libc::_IOWR::<PmScanArg>(b'f' as u32, 16);

/// Ranges that one call can tell: 24 KiB of them. A scan of more goes on where the call stopped.
const RANGES: usize = 1024;

/// This process's page map.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
}

impl Pagemap {
    /// Opens it.
    ///
    /// # Errors
    /// [`PagemapError::Open`].
    pub fn open() -> Result<Self, PagemapError> {
        File::open("/proc/self/pagemap").map(|file| Self { file }).map_err(PagemapError::Open)
    }

    /// Finds pages of a range of guest RAM and hands them to `found`, in rising order.
    ///
    /// The cost follows the page tables, not the range: where none are populated it skips 2 MiB or more at a step, unless
    /// the query asks for pages by what they are *not*.
    ///
    /// # Errors
    /// [`PagemapError::Scan`] names from where on pages may have been protected without being told.
    pub fn scan(
        &self,
        slice: MemorySlice<'_>,
        query: Query,
        mut found: impl FnMut(Found),
    ) -> Result<(), PagemapError> {
        let (start, end) = (slice.address(), slice.address() + slice.bytes());
        let mut ranges = [PageRegion::default(); RANGES];
        let mut at = start;
        while at < end {
            let failed = |source| PagemapError::Scan { address: at, bytes: end - at, source };
            let (count, walked) =
                self.step(at, end, query, &mut ranges).map_err(|source| match source.raw_os_error() {
                    Some(libc::ENOTTY) => PagemapError::Missing(source),
                    _ => failed(source),
                })?;
            for range in &ranges[..count] {
                found(Found {
                    offset: range.start - start,
                    bytes: range.end - range.start,
                    traits: Traits(range.categories),
                });
            }
            // A call that had room for more walked to the end; `walk_end` may be that of an earlier lap inside the call.
            let Some(last) = ranges.get(count.wrapping_sub(1)).filter(|_| count == RANGES) else { break };
            if walked.max(last.end) <= at {
                return Err(failed(io::Error::other("the kernel stopped without an error")));
            }
            at = walked.max(last.end);
        }
        Ok(())
    }

    /// One call: answers how many ranges it found and where it stopped.
    fn step(
        &self,
        start: u64,
        end: u64,
        query: Query,
        ranges: &mut [PageRegion],
    ) -> io::Result<(usize, u64)> {
        let mut argument = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            flags: if query.protect { PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC } else { 0 },
            start,
            end,
            walk_end: start,
            vec: ranges.as_mut_ptr() as u64,
            vec_len: ranges.len() as u64,
            max_pages: 0,
            category_inverted: query.none.0,
            category_mask: query.all.0 | query.none.0,
            category_anyof_mask: query.any.0,
            return_mask: query.told.0,
        };
        // SAFETY: the kernel writes the structure and at most `vec_len` ranges, both alive over the call; protecting pages
        // changes nothing of what they hold, and is refused outside memory registered for it.
        let count =
            unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, std::ptr::from_mut(&mut argument)) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        Ok((count.min(ranges.len()), argument.walk_end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::mapping::{HugePages, Mapping};
    use crate::testing::{Need, require};

    #[test]
    fn finds_what_is_populated_past_one_call() {
        if !require(&[Need::Uffd]) {
            return;
        }
        let pages = 4 * RANGES as u64;
        let mapping = Mapping::anonymous(pages * 4096, HugePages::No).unwrap();
        for page in (1..pages).step_by(2) {
            mapping.store(page * 4096, 1);
        }
        let _ = mapping.load(0);
        let query = Query {
            none: Traits::ZERO,
            any: Traits::PRESENT.and(Traits::SWAPPED),
            told: Traits::PRESENT,
            ..Query::default()
        };
        let mut offsets = Vec::new();
        let slice = MemorySlice::new(&mapping, 4096, pages * 4096 - 4096);
        Pagemap::open()
            .unwrap()
            .scan(slice, query, |found| {
                assert_eq!((found.bytes, found.traits), (4096, Traits::PRESENT));
                offsets.push(found.offset);
            })
            .unwrap();
        let expected: Vec<u64> = (0..pages - 1).step_by(2).map(|page| page * 4096).collect();
        assert!(offsets == expected, "{} ranges, expected {}", offsets.len(), expected.len());
    }

    #[test]
    fn protecting_memory_that_is_not_registered_is_an_error() {
        if !require(&[Need::Uffd]) {
            return;
        }
        let mapping = Mapping::anonymous(1 << 16, HugePages::No).unwrap();
        mapping.store(0, 1);
        let query = Query { all: Traits::WRITTEN, told: Traits::WRITTEN, protect: true, ..Query::default() };
        let slice = MemorySlice::new(&mapping, 0, 1 << 16);
        let error = Pagemap::open().unwrap().scan(slice, query, |_| {}).unwrap_err();
        assert!(matches!(error, PagemapError::Scan { .. }), "{error}");
    }
}

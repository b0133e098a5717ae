//! Transparent huge pages made on demand: a range of shared memory becomes one huge page before it is filled.
//!
//! A page that is filled for the first time costs a fault, in which the kernel zeroes it: about 1 CPU second a GiB. One huge
//! page costs a tenth of that, see `docs/performance.md`. For memory in a memfd the kernel makes none by itself unless the
//! administrator has set `/sys/kernel/mm/transparent_hugepage/shmem_enabled`. Two ways lead to them all the same:
//!
//! - a file in a tmpfs of our own with `huge=advise` (`tmpfs(5)`), which takes the right to mount: a fault in a mapping with
//!   `MADV_HUGEPAGE` makes a huge page of it. Only a second mapping is advised so, since any fault in it, for a byte, makes one.
//! - `MADV_COLLAPSE` (Linux 6.1, `madvise(2)`) of any memfd, whatever is set there. It waits for each processor
//!   (`lru_add_drain_all`), which takes long where all of them are busy, but once for all that it is told to make.

use std::io;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mm::{Advice, madvise, munmap};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};

use super::mapping::{Mapping, map_aligned};
use crate::units::PAGE_SIZE;

/// The size of a huge page, and what its address is a multiple of: 2 MiB with pages of 4 KiB on x86-64 and aarch64.
pub const HUGE_PAGE: u64 = 2 << 20;

/// `MADV_COLLAPSE` of `linux/mman.h`, which rustix lacks.
const MADV_COLLAPSE: libc::c_int = 25;

/// How a huge page came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MadeBy {
    /// By a fault: each costs as much as it costs.
    Fault,
    /// By `MADV_COLLAPSE`: those of one call wait once.
    Collapse,
}

/// An empty file in memory that has huge pages where a mapping of it is advised to. Its file system is mounted nowhere, and is
/// gone with the file.
///
/// # Errors
/// `EPERM` without the right to mount; what `fsopen(2)` and the calls that follow it answer.
pub(super) fn file() -> io::Result<OwnedFd> {
    let system = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&system, "huge", "advise")?;
    // Not half of this machine's memory, which is the limit unless set. A memfd has none either.
    fsconfig_set_string(&system, "size", "0")?;
    fsconfig_create(&system)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOEXEC | MountAttrFlags::MOUNT_ATTR_NOSUID;
    let mount = fsmount(&system, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    Ok(openat(&mount, ".", flags, Mode::RUSR | Mode::WUSR)?)
}

/// A second mapping of guest RAM, in which each fault makes a huge page if its file can have them.
#[derive(Debug)]
pub(super) struct Advised {
    start: NonNull<u8>,
    bytes: usize,
}

impl Advised {
    fn new(mapping: &Mapping) -> Option<Self> {
        let (file, offset) = mapping.file()?;
        // This one begins at a border of huge pages; in a first one that does not, offsets mean something else.
        if !mapping.address().is_multiple_of(HUGE_PAGE) {
            return None;
        }
        let bytes = mapping.bytes() as usize;
        let start = map_aligned(file, offset, bytes).ok()?;
        let advised = Self { start: NonNull::new(start.cast())?, bytes };
        // SAFETY: the range is ours, and the advice drops no content.
        unsafe { madvise(advised.start.as_ptr().cast(), bytes, Advice::LinuxHugepage) }.ok()?;
        Some(advised)
    }

    /// Has the page at the offset of a huge page come to be, and with it the huge page.
    ///
    /// # Panics
    /// If the huge page is outside the mapping.
    fn touch(&self, offset: usize) {
        assert!(offset + HUGE_PAGE as usize <= self.bytes, "a huge page outside the mapping");
        // SAFETY: the huge page is within the mapping, which is only read; dropping it from this mapping keeps it in the file.
        unsafe {
            let page = self.start.as_ptr().add(offset);
            page.read_volatile();
            // Or the memory would count twice as ours.
            let _ = madvise(page.cast(), HUGE_PAGE as usize, Advice::LinuxDontNeed);
        }
    }
}

impl Drop for Advised {
    fn drop(&mut self) {
        // SAFETY: mapped by us, and only `touch` uses it.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping");
    }
}

// SAFETY: an address range that is only read, volatile, and advised.
unsafe impl Send for Advised {}
// SAFETY: as above.
unsafe impl Sync for Advised {}

impl Mapping {
    /// The huge page around an offset, as an offset; `None` where the mapping holds a part of it only.
    #[must_use]
    pub fn huge_page_at(&self, offset: u64) -> Option<u64> {
        let start = (self.address() + offset) / HUGE_PAGE * HUGE_PAGE;
        let start = start.checked_sub(self.address())?;
        (start + HUGE_PAGE <= self.bytes()).then_some(start)
    }

    /// Whether any page of a range is in memory already, as far as this process can see. Whole pages.
    ///
    /// # Errors
    /// What `mincore(2)` answers.
    ///
    /// # Panics
    /// If the range is outside the mapping, or is more than a huge page.
    pub fn is_resident(&self, offset: u64, bytes: u64) -> io::Result<bool> {
        let start = self.range(offset, bytes);
        let mut pages = [0_u8; (HUGE_PAGE / PAGE_SIZE) as usize];
        let pages = &mut pages[..bytes.div_ceil(PAGE_SIZE) as usize];
        // SAFETY: the range is inside the mapping, and `pages` has a byte for each of its pages.
        let answer = unsafe { libc::mincore(start.cast(), bytes as usize, pages.as_mut_ptr()) };
        if answer != 0 {
            return Err(io::Error::last_os_error());
        }
        // The other bits mean nothing.
        Ok(pages.iter().any(|page| page & 1 != 0))
    }

    /// Turns the range of so many huge pages into huge pages. What it holds stays as it is, also while others write to it.
    ///
    /// # Errors
    /// What `madvise(2)` answers: `EINVAL` where this memory cannot have huge pages, `ENOMEM` or `EAGAIN` where the kernel has
    /// none to give now.
    ///
    /// # Panics
    /// If the range is outside the mapping.
    pub fn make_huge(&self, offset: u64, count: u64) -> io::Result<MadeBy> {
        let bytes = count * HUGE_PAGE;
        let start = self.range(offset, bytes);
        if !(start as u64).is_multiple_of(HUGE_PAGE) {
            return Err(Errno::INVAL.into());
        }
        let offsets = || (0..count).map(|index| offset + index * HUGE_PAGE);
        // Where this makes no huge page, it makes the first page at least: MADV_COLLAPSE answers EINVAL where nothing is.
        match self.advised.get_or_init(|| Advised::new(self)) {
            Some(advised) => offsets().for_each(|offset| advised.touch(offset as usize)),
            None => offsets().for_each(|offset| {
                let _ = self.load(offset);
            }),
        }
        // Pages that nobody else has made meanwhile came with the first one.
        if self.is_resident(offset + bytes - PAGE_SIZE, PAGE_SIZE)? {
            return Ok(MadeBy::Fault);
        }
        // SAFETY: the range is inside the mapping, and MADV_COLLAPSE keeps its content.
        let answer = unsafe { libc::madvise(start.cast(), bytes as usize, MADV_COLLAPSE) };
        if answer == 0 { Ok(MadeBy::Collapse) } else { Err(io::Error::last_os_error()) }
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;
    use crate::sys::mapping::HugePages;

    /// Kibibytes of the mapping at an address that are mapped by huge pages, as `/proc/self/smaps` says.
    fn huge_kib(mapping: &Mapping) -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let begin = format!("{:x}-", mapping.address());
        let of_it = smaps.lines().skip_while(|line| !line.starts_with(&begin));
        let line = of_it.into_iter().find(|line| line.starts_with("ShmemPmdMapped:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    #[test]
    fn a_huge_page_is_made_of_an_empty_range_and_keeps_what_a_range_holds() {
        let mapping = Mapping::memfd("huge", 2 * HUGE_PAGE, HugePages::Transparent).unwrap();
        assert!(mapping.address().is_multiple_of(HUGE_PAGE));
        mapping.store(HUGE_PAGE + 8 * PAGE_SIZE, 77);
        assert!(
            !mapping.is_resident(0, HUGE_PAGE).unwrap() && mapping.is_resident(HUGE_PAGE, HUGE_PAGE).unwrap()
        );
        for offset in [0, HUGE_PAGE] {
            match mapping.make_huge(offset, 1) {
                Ok(_) => {}
                Err(error) => {
                    // A kernel without, or with nothing to give.
                    assert!(
                        matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOMEM | libc::EAGAIN)),
                        "{error}"
                    );
                    return;
                }
            }
        }
        assert!(mapping.is_resident(0, HUGE_PAGE).unwrap());
        assert_eq!(mapping.load(HUGE_PAGE + 8 * PAGE_SIZE), 77);
        assert!(mapping.is_zero(0, HUGE_PAGE));
        assert_eq!(huge_kib(&mapping), (2 * HUGE_PAGE) >> 10);
    }

    /// The memory of others, for which there is only `MADV_COLLAPSE`.
    #[test]
    fn huge_pages_are_made_of_a_memfd_too() {
        let file = memfd_create("huge", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 2 * HUGE_PAGE).unwrap();
        let mapping = Mapping::shared_file(file, 0, 2 * HUGE_PAGE).unwrap();
        match mapping.make_huge(0, 2) {
            Ok(_) => assert!((0..1024).all(|page| !mapping.is_missing(page * PAGE_SIZE))),
            Err(error) => {
                let code = error.raw_os_error();
                assert!(matches!(code, Some(libc::EINVAL | libc::ENOMEM | libc::EAGAIN)), "{error}");
            }
        }
    }

    #[test]
    fn a_file_of_huge_pages_has_none_until_one_is_asked_for() {
        let Ok(file) = file() else {
            eprintln!("SKIP: this process may not mount");
            return;
        };
        ftruncate(&file, 2 * HUGE_PAGE).unwrap();
        let mapping = Mapping::shared_file(file, 0, 2 * HUGE_PAGE).unwrap();
        mapping.store(HUGE_PAGE, 1);
        assert!(mapping.is_missing(HUGE_PAGE + PAGE_SIZE), "a page that is written is one page");
        assert_eq!(mapping.make_huge(0, 1).unwrap(), MadeBy::Fault);
        assert!((0..512).all(|page| !mapping.is_missing(page * PAGE_SIZE)));
    }

    #[test]
    fn a_huge_page_lies_whole_within_the_mapping() {
        let mapping = Mapping::memfd("huge", 2 * HUGE_PAGE - PAGE_SIZE, HugePages::Transparent).unwrap();
        assert_eq!(mapping.huge_page_at(0), Some(0));
        assert_eq!(mapping.huge_page_at(HUGE_PAGE - 1), Some(0));
        assert_eq!(mapping.huge_page_at(HUGE_PAGE), None);
        let error = mapping.make_huge(PAGE_SIZE, 1).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
}

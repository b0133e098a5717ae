//! Transparent huge pages made on demand: a range of shared memory becomes one huge page before it is filled.
//!
//! A page that is filled for the first time costs a fault, in which the kernel zeroes it: about 1 CPU second a GiB. One huge
//! page costs a tenth of that, see `docs/performance.md`. For memory in a memfd the kernel makes none by itself unless the
//! administrator has set `/sys/kernel/mm/transparent_hugepage/shmem_enabled`; `MADV_COLLAPSE` (Linux 6.1, `madvise(2)`) makes
//! one where a program says that it is worth it, whatever is set there.

use std::io;

use rustix::io::Errno;

use super::mapping::Mapping;
use crate::units::PAGE_SIZE;

/// The size of a huge page, and what its address is a multiple of: 2 MiB with pages of 4 KiB on x86-64 and aarch64.
pub const HUGE_PAGE: u64 = 2 << 20;

/// `MADV_COLLAPSE` of `linux/mman.h`, which rustix lacks.
const MADV_COLLAPSE: libc::c_int = 25;

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

    /// Turns the range of a huge page into one. What it holds stays as it is, also while others write to it.
    ///
    /// # Errors
    /// What `madvise(2)` answers: `EINVAL` where this memory cannot have huge pages, `ENOMEM` or `EAGAIN` where the kernel has
    /// none to give now.
    ///
    /// # Panics
    /// If the range is outside the mapping.
    pub fn make_huge(&self, offset: u64) -> io::Result<()> {
        let start = self.range(offset, HUGE_PAGE);
        if !(start as u64).is_multiple_of(HUGE_PAGE) {
            return Err(Errno::INVAL.into());
        }
        // The kernel collapses what is there, and answers EINVAL where nothing is: reading makes the first page, if it is missing.
        let _ = self.load(offset);
        // SAFETY: the range is inside the mapping, and MADV_COLLAPSE keeps its content.
        let answer = unsafe { libc::madvise(start.cast(), HUGE_PAGE as usize, MADV_COLLAPSE) };
        if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

#[cfg(test)]
mod tests {
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
            match mapping.make_huge(offset) {
                Ok(()) => {}
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

    #[test]
    fn a_huge_page_lies_whole_within_the_mapping() {
        let mapping = Mapping::memfd("huge", 2 * HUGE_PAGE - PAGE_SIZE, HugePages::Transparent).unwrap();
        assert_eq!(mapping.huge_page_at(0), Some(0));
        assert_eq!(mapping.huge_page_at(HUGE_PAGE - 1), Some(0));
        assert_eq!(mapping.huge_page_at(HUGE_PAGE), None);
        let error = mapping.make_huge(PAGE_SIZE).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
}

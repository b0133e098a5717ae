//! Which pages were ever touched: the cost of a move follows the memory in use, not the memory configured.

use std::io;

use super::origin::{Origin, Piece, SharedFile, pieces};
use super::{GuestMemory, Mapping};
use crate::pageset::PageSet;
use crate::sys::pagemap::{Pagemap, Query, Traits};
use crate::sys::scatter::MemorySlice;
use crate::units::{PAGE_SIZE, Run};

impl GuestMemory {
    /// The pages that may hold something other than zero. Every other page reads as zero, and reading it would only
    /// populate it.
    ///
    /// For memory in a file these are the file's data (`SEEK_DATA`), whoever wrote it; for private memory what this
    /// process's page tables or swap hold, without the shared page of zeros. Of memory that does not tell (a shared
    /// mapping made by somebody else whose file this user may not open, a private mapping of a file) all pages are.
    /// A page that is written while this runs may be missing: start dirty tracking first.
    ///
    /// Takes milliseconds for 64 GiB of which little is in use.
    ///
    /// # Errors
    /// When the kernel lacks `PAGEMAP_SCAN` (Linux 6.7), or `/proc` is not mounted, or the memory is no longer mapped.
    pub fn touched(&self) -> io::Result<PageSet> {
        let mut touched = PageSet::empty(self.layout().total_pages());
        let pagemap = Pagemap::open()?;
        for (region, mapping) in self.mappings().iter().enumerate() {
            let first = self.layout().region_run(region).start.0;
            for piece in pieces(mapping)? {
                touched_in(&pagemap, mapping, &piece, |offset, bytes| {
                    touched.insert_run(pages(first, piece.offset + offset, bytes));
                })?;
            }
        }
        Ok(touched)
    }
}

/// The pages that a range of a region lies in, whose first page is `first`.
pub(crate) fn pages(first: u64, offset: u64, bytes: u64) -> Run {
    let (start, end) = (offset / PAGE_SIZE, (offset + bytes).div_ceil(PAGE_SIZE));
    Run::new(first + start, end - start)
}

/// Hands over the ranges of a piece that hold something: offset in the piece, and length.
fn touched_in(
    pagemap: &Pagemap,
    mapping: &Mapping,
    piece: &Piece,
    mut found: impl FnMut(u64, u64),
) -> io::Result<()> {
    let slice = MemorySlice::new(mapping, piece.offset, piece.bytes);
    match &piece.origin {
        Origin::Private { .. } => {
            let query = Query {
                none: Traits::ZERO,
                any: Traits::PRESENT.and(Traits::SWAPPED),
                told: Traits::NONE,
                ..Query::default()
            };
            Ok(pagemap.scan(slice, query, |range| found(range.offset, range.bytes))?)
        }
        Origin::Shared(file) if piece.origin.is_hugetlb() => hugetlb(pagemap, slice, file, found),
        Origin::Shared(file) => file.data(piece.bytes, found),
        Origin::Opaque => {
            found(0, piece.bytes);
            Ok(())
        }
    }
}

/// hugetlbfs does not say where its data is, but it says how much: when this process maps as much, that is all of it.
fn hugetlb(
    pagemap: &Pagemap,
    slice: MemorySlice<'_>,
    file: &SharedFile,
    mut found: impl FnMut(u64, u64),
) -> io::Result<()> {
    let allocated = file.allocated_bytes()?;
    let mut ranges = Vec::new();
    let query = Query { all: Traits::PRESENT, ..Query::default() };
    pagemap.scan(slice, query, |range| ranges.push((range.offset, range.bytes)))?;
    if ranges.iter().map(|(_, bytes)| bytes).sum::<u64>() < allocated {
        ranges = vec![(0, slice.bytes())];
    }
    for (offset, bytes) in ranges {
        found(offset, bytes);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{RamLayout, RamRegion};
    use crate::memory::{Backing, HugePages};
    use crate::testing::{Need, require};
    use crate::units::{GuestAddress, PageIndex};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const REGION: u64 = 600;

    fn memory(backing: Backing) -> GuestMemory {
        let region = |start| RamRegion { start: GuestAddress(start), bytes: REGION * PAGE_SIZE };
        let layout = RamLayout::new(vec![region(0), region(1 << 32)]).unwrap();
        GuestMemory::allocate(layout, backing, HugePages::No).unwrap()
    }

    fn numbers(set: &PageSet) -> BTreeSet<u64> {
        set.runs().flat_map(|run| run.start.0..run.end()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn what_was_written_is_touched(written in prop::collection::btree_set(0..2 * REGION, 0..80)) {
            if !require(&[Need::Uffd]) {
                return Ok(());
            }
            for backing in [Backing::Anonymous, Backing::Memfd] {
                let memory = memory(backing);
                for &page in &written {
                    memory.write_run(Run::new(page, 1), &[1; PAGE_SIZE as usize]);
                }
                prop_assert_eq!(&numbers(&memory.touched().unwrap()), &written);
            }
        }
    }

    #[test]
    fn reading_private_memory_does_not_touch_it() {
        if !require(&[Need::Uffd]) {
            return;
        }
        let memory = memory(Backing::Anonymous);
        memory.zero_run(Run::new(7, 1));
        assert!((0..2 * REGION).all(|page| memory.is_zero_page(PageIndex(page))));
        assert_eq!(numbers(&memory.touched().unwrap()), [7].into());
    }

    #[test]
    fn a_file_is_looked_at_from_its_offset_on() {
        if !require(&[Need::Uffd]) {
            return;
        }
        let whole = Mapping::memfd("whole", 16 * PAGE_SIZE, HugePages::No).unwrap();
        for page in [0, 9, 11] {
            whole.store(page * PAGE_SIZE, 1);
        }
        let (file, _) = whole.file().unwrap();
        let file = file.try_clone_to_owned().unwrap();
        let part = Mapping::shared_file(file, 8 * PAGE_SIZE, 4 * PAGE_SIZE).unwrap();
        let memory = GuestMemory::new(RamLayout::flat(4 * PAGE_SIZE).unwrap(), vec![part]).unwrap();
        assert_eq!(numbers(&memory.touched().unwrap()), [1, 3].into());
    }

    #[test]
    fn memory_that_somebody_else_mapped_is_recognised() {
        if !require(&[Need::Uffd]) {
            return;
        }
        let bytes = 64 * PAGE_SIZE;
        let memfd = Mapping::memfd("lent", bytes, HugePages::No).unwrap();
        for page in [3, 40] {
            memfd.store(page * PAGE_SIZE, 1);
        }
        // Mapped anew, so that this mapping's page tables know nothing of the content.
        let file = memfd.file().unwrap().0.try_clone_to_owned().unwrap();
        let shared = Mapping::shared_file(file, PAGE_SIZE, bytes - PAGE_SIZE).unwrap();
        let lent = |mapping: Mapping| {
            let layout = RamLayout::flat(mapping.bytes()).unwrap();
            GuestMemory::new(layout, vec![Mapping::lent(mapping.into())]).unwrap()
        };
        let touched = numbers(&lent(shared).touched().unwrap());
        let opaque = (0..63).collect();
        assert!(touched == [2, 39].into() || touched == opaque, "root may look at the file: {touched:?}");
        let private = Mapping::anonymous(bytes, HugePages::No).unwrap();
        private.store(5 * PAGE_SIZE, 1);
        assert_eq!(numbers(&lent(private).touched().unwrap()), [5].into());
    }

    #[test]
    fn a_large_sparse_guest_is_looked_at_where_it_is_in_use() {
        if !require(&[Need::Uffd]) {
            return;
        }
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let layout = RamLayout::flat(64 << 30).unwrap();
            let memory = GuestMemory::allocate(layout, backing, HugePages::No).unwrap();
            let mut written = PageSet::empty(memory.layout().total_pages());
            for page in (0..16 << 20).step_by(100_003) {
                written.insert(PageIndex(page));
                memory.write_run(Run::new(page, 1), &[1; PAGE_SIZE as usize]);
            }
            assert!(memory.touched().unwrap() == written);
        }
    }
}

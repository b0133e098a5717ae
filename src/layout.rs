//! The validated list of a guest's RAM regions, the same on both hosts.

use crate::units::{Bytes, GuestAddress, PAGE_SIZE, PageIndex, Run};

/// More regions than any machine type has; a peer that names more is refused before anything is allocated.
pub const MAX_REGIONS: usize = 64;
/// 64 TiB, the largest guest that current hypervisors offer. At one bit a page, its page set takes 2 GiB.
pub const MAX_BYTES: u64 = 64 << 40;

/// One contiguous piece of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// Where the guest sees it.
    pub start: GuestAddress,
    /// Length in bytes; a multiple of [`PAGE_SIZE`], not 0.
    pub bytes: u64,
}

impl RamRegion {
    /// Length in pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.bytes / PAGE_SIZE
    }
}

/// Why a list of regions is not a layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// No regions.
    #[error("a guest needs at least one RAM region")]
    Empty,
    /// More than [`MAX_REGIONS`].
    #[error("{0} RAM regions are more than the {MAX_REGIONS} that are supported")]
    TooManyRegions(usize),
    /// A start or a length that is no multiple of the page size.
    #[error("RAM region {0} (start {1:#x}, {2} bytes) is not a whole number of 4 KiB pages")]
    Unaligned(usize, u64, u64),
    /// A region of length 0.
    #[error("RAM region {0} is empty")]
    EmptyRegion(usize),
    /// Regions that overlap or are not sorted by address.
    #[error("RAM region {0} starts before the end of the one before it")]
    Overlap(usize),
    /// More than [`MAX_BYTES`] in all, or an address past the end of the address space.
    #[error("RAM regions that end at {0:#x} are more than the {max} that are supported", max = Bytes(MAX_BYTES))]
    TooLarge(u64),
}

/// Where a page lies: which region, and how far into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index into [`RamLayout::regions`].
    pub region: usize,
    /// Offset in that region, in bytes.
    pub offset: u64,
}

/// The RAM regions of a guest: sorted, aligned, without overlap, and bounded in number and size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamLayout {
    regions: Vec<RamRegion>,
    /// The dense number of each region's first page, and the total as the last element.
    first_pages: Vec<u64>,
}

impl RamLayout {
    /// Checks the regions and numbers their pages.
    ///
    /// # Errors
    /// The first rule that the list breaks.
    pub fn new(regions: Vec<RamRegion>) -> Result<Self, LayoutError> {
        if regions.is_empty() {
            return Err(LayoutError::Empty);
        }
        if regions.len() > MAX_REGIONS {
            return Err(LayoutError::TooManyRegions(regions.len()));
        }
        let mut first_pages = Vec::with_capacity(regions.len() + 1);
        let (mut pages, mut previous_end) = (0u64, 0u64);
        for (index, region) in regions.iter().enumerate() {
            if region.bytes == 0 {
                return Err(LayoutError::EmptyRegion(index));
            }
            if !region.start.0.is_multiple_of(PAGE_SIZE) || !region.bytes.is_multiple_of(PAGE_SIZE) {
                return Err(LayoutError::Unaligned(index, region.start.0, region.bytes));
            }
            if region.start.0 < previous_end {
                return Err(LayoutError::Overlap(index));
            }
            previous_end = region.start.0.checked_add(region.bytes).ok_or(LayoutError::TooLarge(u64::MAX))?;
            first_pages.push(pages);
            pages += region.pages();
            if pages > MAX_BYTES / PAGE_SIZE {
                return Err(LayoutError::TooLarge(previous_end));
            }
        }
        first_pages.push(pages);
        Ok(Self { regions, first_pages })
    }

    /// One region from guest address 0 on: what memory that is not a machine's has.
    ///
    /// # Errors
    /// As [`RamLayout::new`].
    pub fn flat(bytes: u64) -> Result<Self, LayoutError> {
        Self::new(vec![RamRegion { start: GuestAddress(0), bytes }])
    }

    /// The regions, sorted by address.
    #[must_use]
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Pages in all regions together; page indices are below this.
    #[must_use]
    pub fn total_pages(&self) -> u64 {
        self.first_pages[self.regions.len()]
    }

    /// Bytes in all regions together.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.total_pages() * PAGE_SIZE
    }

    /// The dense numbers of a region's pages.
    ///
    /// # Panics
    /// If there is no such region.
    #[must_use]
    pub fn region_run(&self, region: usize) -> Run {
        Run::new(self.first_pages[region], self.regions[region].pages())
    }

    /// Whether every page of the run exists.
    #[must_use]
    pub fn contains(&self, run: Run) -> bool {
        run.end() <= self.total_pages() && run.pages <= self.total_pages()
    }

    /// Where a page lies, or `None` past the end.
    #[must_use]
    pub fn place(&self, page: PageIndex) -> Option<Place> {
        if page.0 >= self.total_pages() {
            return None;
        }
        let region = self.first_pages.partition_point(|&first| first <= page.0) - 1;
        Some(Place { region, offset: (page.0 - self.first_pages[region]) * PAGE_SIZE })
    }

    /// The page at a guest address, or `None` in a hole.
    #[must_use]
    pub fn page_at(&self, address: GuestAddress) -> Option<PageIndex> {
        let region = self.regions.partition_point(|r| r.start <= address).checked_sub(1)?;
        let offset = address.0 - self.regions[region].start.0;
        (offset < self.regions[region].bytes)
            .then(|| PageIndex(self.first_pages[region] + offset / PAGE_SIZE))
    }

    /// Where the guest sees a page, or `None` past the end.
    #[must_use]
    pub fn address(&self, page: PageIndex) -> Option<GuestAddress> {
        let place = self.place(page)?;
        Some(GuestAddress(self.regions[place.region].start.0 + place.offset))
    }

    /// Cuts a run at region borders: each piece with the place of its first page. Pages past the end are left out.
    pub fn pieces(&self, run: Run) -> impl Iterator<Item = (Place, Run)> + '_ {
        let (mut next, end) = (run.start.0, run.end().min(self.total_pages()));
        std::iter::from_fn(move || {
            if next >= end {
                return None;
            }
            let place = self.place(PageIndex(next))?;
            let piece = Run::new(next, end.min(self.first_pages[place.region + 1]) - next);
            next = piece.end();
            Some((place, piece))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(start: u64, bytes: u64) -> RamRegion {
        RamRegion { start: GuestAddress(start), bytes }
    }

    #[test]
    fn pages_are_numbered_over_holes() {
        let layout = RamLayout::new(vec![region(0, 0x3000), region(0x10_0000, 0x2000)]).unwrap();
        assert_eq!(layout.total_pages(), 5);
        assert_eq!(layout.place(PageIndex(3)), Some(Place { region: 1, offset: 0 }));
        assert_eq!(layout.place(PageIndex(5)), None);
        assert_eq!(layout.page_at(GuestAddress(0x10_1fff)), Some(PageIndex(4)));
        assert_eq!(layout.page_at(GuestAddress(0x3000)), None);
        assert_eq!(layout.address(PageIndex(4)), Some(GuestAddress(0x10_1000)));
        let pieces: Vec<_> = layout.pieces(Run::new(1, 100)).map(|(_, run)| run).collect();
        assert_eq!(pieces, [Run::new(1, 2), Run::new(3, 2)]);
    }

    #[test]
    fn wrong_lists_are_named() {
        use LayoutError::*;
        let cases = [
            (vec![], Empty),
            (vec![region(0, 0)], EmptyRegion(0)),
            (vec![region(1, 0x1000)], Unaligned(0, 1, 0x1000)),
            (vec![region(0, 0x1001)], Unaligned(0, 0, 0x1001)),
            (vec![region(0, 0x2000), region(0x1000, 0x1000)], Overlap(1)),
            (vec![region(0, MAX_BYTES + PAGE_SIZE)], TooLarge(MAX_BYTES + PAGE_SIZE)),
            (vec![region(u64::MAX - 0xfff, 0x1000)], TooLarge(u64::MAX)),
            (vec![region(0, 0x1000); MAX_REGIONS + 1], TooManyRegions(MAX_REGIONS + 1)),
        ];
        for (regions, error) in cases {
            assert_eq!(RamLayout::new(regions), Err(error));
        }
    }
}

//! The pieces in which guest RAM is registered, numbered alike at both ends. No I/O.
//!
//! Registered memory is resident and locked, so that only what is used is registered; and a device has only so many
//! regions, so that the pieces of a large guest are larger.

use std::ops::Range;

use crate::layout::RamLayout;
use crate::pageset::PageSet;
use crate::units::{PAGE_SIZE, PageIndex, Run};
use crate::wire::rdma::MAX_PIECES;

/// The smallest piece: what the kernel backs with one huge page where it may.
const LEAST_BYTES: u64 = 2 << 20;

/// Guest RAM cut into pieces of one length, each region from its beginning; the last piece of a region may be shorter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pieces {
    layout: RamLayout,
    piece_bytes: u64,
    /// The number of each region's first piece, and the count of all as the last element.
    first: Vec<u32>,
}

/// A part of a run that lies in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) piece: u32,
    /// Where it begins in the piece, in bytes.
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

/// Where a piece lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PieceRange {
    pub(super) region: usize,
    /// Where it begins in the region, in bytes.
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

impl Pieces {
    /// The smallest pieces of which there are not too many: 2 MiB for guests of up to 32 GiB.
    pub(super) fn of(layout: &RamLayout) -> Self {
        let mut piece_bytes = LEAST_BYTES;
        loop {
            // Ends at the latest with one piece for each region, of which there are at most 64.
            if let Some(pieces) = Self::with_piece_bytes(layout, piece_bytes) {
                return pieces;
            }
            piece_bytes *= 2;
        }
    }

    /// Pieces of this length; `None` when it is no whole number of pages, or when there would be more than [`MAX_PIECES`].
    pub(super) fn with_piece_bytes(layout: &RamLayout, piece_bytes: u64) -> Option<Self> {
        if piece_bytes == 0 || !piece_bytes.is_multiple_of(PAGE_SIZE) {
            return None;
        }
        let mut first = vec![0];
        let mut count = 0;
        for region in layout.regions() {
            count += region.bytes.div_ceil(piece_bytes);
            if count > u64::from(MAX_PIECES) {
                return None;
            }
            first.push(count as u32);
        }
        Some(Self { layout: layout.clone(), piece_bytes, first })
    }

    pub(super) fn piece_bytes(&self) -> u64 {
        self.piece_bytes
    }

    /// How many there are; at most [`MAX_PIECES`].
    pub(super) fn count(&self) -> u32 {
        self.first[self.first.len() - 1]
    }

    /// Where a piece lies.
    ///
    /// # Panics
    /// If there is no such piece.
    pub(super) fn range(&self, piece: u32) -> PieceRange {
        let region = self.first.partition_point(|first| *first <= piece) - 1;
        let offset = u64::from(piece - self.first[region]) * self.piece_bytes;
        let bytes = (self.layout.regions()[region].bytes - offset).min(self.piece_bytes);
        PieceRange { region, offset, bytes }
    }

    /// The pages of a piece.
    ///
    /// # Panics
    /// If there is no such piece.
    pub(super) fn run(&self, piece: u32) -> Run {
        let range = self.range(piece);
        let region = self.layout.region_run(range.region);
        Run::new(region.start.0 + range.offset / PAGE_SIZE, range.bytes / PAGE_SIZE)
    }

    /// Cuts a run at the borders between pieces. Pages past the end are left out.
    pub(super) fn parts(&self, run: Run) -> impl Iterator<Item = Part> + '_ {
        self.layout.pieces(run).flat_map(move |(place, within)| {
            let Range { start, end } = place.offset..place.offset + within.bytes();
            let (first, mut next) = (self.first[place.region], start);
            std::iter::from_fn(move || {
                let number = next / self.piece_bytes;
                let offset = next % self.piece_bytes;
                let bytes = (end - next).min(self.piece_bytes - offset);
                next += bytes;
                (bytes > 0).then_some(Part { piece: first + number as u32, offset, bytes })
            })
        })
    }

    /// The pieces that have one of the pages, rising.
    pub(super) fn with_pages(&self, pages: &PageSet) -> Vec<u32> {
        let (mut found, mut next) = (Vec::new(), 0);
        while let Some(run) = pages.runs_from(PageIndex(next)).next() {
            for part in self.parts(run) {
                if found.last() != Some(&part.piece) {
                    found.push(part.piece);
                }
            }
            next = run.end();
        }
        found
    }

    /// One bit for each piece.
    pub(super) fn to_map(&self, pieces: &[u32]) -> Vec<u8> {
        let mut map = vec![0; self.count().div_ceil(8) as usize];
        for piece in pieces {
            map[*piece as usize / 8] |= 1 << (piece % 8);
        }
        map
    }

    /// The pieces whose bits are set; `None` when there is none of such a number.
    pub(super) fn in_map(&self, map: &[u8]) -> Option<Vec<u32>> {
        let set = |bit: &u32| map[*bit as usize / 8] >> (bit % 8) & 1 == 1;
        let found: Vec<u32> = (0..map.len() as u32 * 8).filter(set).collect();
        found.last().is_none_or(|last| *last < self.count()).then_some(found)
    }

    /// Bytes of these pieces together.
    pub(super) fn bytes_of(&self, pieces: &[u32]) -> u64 {
        pieces.iter().map(|piece| self.range(*piece).bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::RamRegion;
    use crate::units::GuestAddress;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn layout(pages: &[u64]) -> RamLayout {
        let mut start = 0;
        let regions = pages.iter().map(|pages| {
            let region = RamRegion { start: GuestAddress(start), bytes: pages * PAGE_SIZE };
            start += region.bytes + (1 << 20);
            region
        });
        RamLayout::new(regions.collect()).unwrap()
    }

    proptest! {
        #[test]
        fn parts_cover_a_run_page_by_page(
            regions in prop::collection::vec(1..40u64, 1..4), piece_pages in 1..10u64,
            start in 0..100u64, length in 1..60u64, touched in prop::collection::btree_set(0..120u64, 0..20),
        ) {
            let layout = layout(&regions);
            let pieces = Pieces::with_piece_bytes(&layout, piece_pages * PAGE_SIZE).unwrap();
            // The oracle: the piece of each page, counted one by one.
            let mut of_page = Vec::new();
            let mut count = 0;
            for pages in &regions {
                (0..*pages).for_each(|page| of_page.push((count + page / piece_pages, page % piece_pages)));
                count += pages.div_ceil(piece_pages);
            }
            prop_assert_eq!(u64::from(pieces.count()), count);
            let mut covered = Vec::new();
            for part in pieces.parts(Run::new(start, length)) {
                for page in 0..part.bytes / PAGE_SIZE {
                    covered.push((u64::from(part.piece), part.offset / PAGE_SIZE + page));
                }
            }
            let run = (start..start + length).filter_map(|page| of_page.get(page as usize).copied());
            prop_assert_eq!(covered, run.collect::<Vec<_>>());
            for piece in 0..pieces.count() {
                let run = pieces.run(piece);
                prop_assert!((run.start.0..run.end()).all(|page| of_page[page as usize].0 == u64::from(piece)));
                prop_assert_eq!(run.bytes(), pieces.range(piece).bytes);
            }
            let mut pages = PageSet::empty(layout.total_pages());
            let touched: BTreeSet<u64> = touched.into_iter().filter(|page| *page < layout.total_pages()).collect();
            touched.iter().for_each(|page| { pages.insert(PageIndex(*page)); });
            let with: BTreeSet<u32> = touched.iter().map(|page| of_page[*page as usize].0 as u32).collect();
            let found = pieces.with_pages(&pages);
            prop_assert_eq!(&found, &with.into_iter().collect::<Vec<_>>());
            prop_assert_eq!(pieces.in_map(&pieces.to_map(&found)), Some(found));
        }
    }

    #[test]
    fn large_guests_have_larger_pieces() {
        let gib = |gib: u64| RamLayout::flat(gib << 30).unwrap();
        assert_eq!(Pieces::of(&gib(32)).piece_bytes(), 2 << 20);
        assert_eq!(Pieces::of(&gib(33)).piece_bytes(), 4 << 20);
        assert_eq!(Pieces::of(&gib(1 << 16)).piece_bytes(), 4 << 30);
        assert!(Pieces::with_piece_bytes(&gib(1), 4097).is_none());
        assert!(Pieces::with_piece_bytes(&gib(1), 0).is_none());
    }

    #[test]
    fn a_map_that_names_what_is_not_there_is_refused() {
        let pieces = Pieces::with_piece_bytes(&layout(&[9]), PAGE_SIZE).unwrap();
        assert_eq!(pieces.in_map(&[0, 1]), Some(vec![8]));
        assert_eq!(pieces.in_map(&[0, 2]), None);
        assert_eq!(pieces.in_map(&[0, 0, 1]), None);
        assert_eq!(pieces.in_map(&[]), Some(vec![]));
    }
}

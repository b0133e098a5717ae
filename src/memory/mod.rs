//! Guest RAM: one mapping a region, addressed by page.

pub mod huge;
pub(crate) mod origin;
pub mod snapshot;
pub(crate) mod touched;

use std::io;
use std::sync::Arc;

use crate::layout::{Place, RamLayout};
pub use crate::sys::mapping::{HugePages, Mapping};
use crate::sys::scatter::MemorySlice;
use crate::units::{PAGE_SIZE, PageIndex, Run};

/// What guest RAM is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A memfd per region: can be sent by file, and mapped by others.
    Memfd,
    /// Private anonymous memory.
    Anonymous,
}

/// All RAM of a guest. A clone is another handle to the same memory.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    layout: Arc<RamLayout>,
    mappings: Arc<[Mapping]>,
}

impl GuestMemory {
    /// Maps fresh memory for every region of the layout. Nothing of it is populated.
    ///
    /// # Errors
    /// What the kernel answers when it has not enough address space or huge pages.
    pub fn allocate(layout: RamLayout, backing: Backing, huge: HugePages) -> io::Result<Self> {
        let mappings = layout
            .regions()
            .iter()
            .map(|region| match backing {
                Backing::Memfd => Mapping::memfd("pageferry-ram", region.bytes, huge),
                Backing::Anonymous => Mapping::anonymous(region.bytes, huge),
            })
            .collect::<io::Result<Vec<_>>>()?;
        Self::new(layout, mappings)
    }

    /// Memory that is mapped already: one mapping a region, in the layout's order.
    ///
    /// # Errors
    /// `InvalidInput` when number or lengths differ from the layout's.
    pub fn new(layout: RamLayout, mappings: Vec<Mapping>) -> io::Result<Self> {
        let fits = mappings.len() == layout.regions().len()
            && layout
                .regions()
                .iter()
                .zip(&mappings)
                .all(|(region, mapping)| region.bytes == mapping.bytes());
        if !fits {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the mappings differ from the RAM layout",
            ));
        }
        Ok(Self { layout: Arc::new(layout), mappings: mappings.into() })
    }

    /// The regions of this memory.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// The mapping of each region, in the layout's order.
    #[must_use]
    pub fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// The mappings as whoever keeps them mapped holds them, such as a virtual machine.
    #[must_use]
    pub fn shared_mappings(&self) -> &Arc<[Mapping]> {
        &self.mappings
    }

    fn locate(&self, page: PageIndex) -> (&Mapping, u64) {
        let Place { region, offset } = self.layout.place(page).expect("a page of this guest");
        (&self.mappings[region], offset)
    }

    /// Copies a page out.
    ///
    /// # Panics
    /// If there is no such page, or `into` is not one page long.
    pub fn read_page(&self, page: PageIndex, into: &mut [u8]) {
        assert_eq!(into.len() as u64, PAGE_SIZE, "a page");
        let (mapping, offset) = self.locate(page);
        mapping.read(offset, into);
    }

    /// Copies a run out, appending to `into`.
    ///
    /// # Panics
    /// If a page of the run does not exist.
    pub fn read_run(&self, run: Run, into: &mut Vec<u8>) {
        for slice in self.slices(run) {
            let at = into.len();
            into.resize(at + slice.bytes as usize, 0);
            slice.mapping.read(slice.offset, &mut into[at..]);
        }
    }

    /// Copies into a run.
    ///
    /// # Panics
    /// If a page of the run does not exist, or `bytes` has another length than the run.
    pub fn write_run(&self, run: Run, mut bytes: &[u8]) {
        assert_eq!(bytes.len() as u64, run.bytes(), "as many bytes as the run has");
        for slice in self.slices(run) {
            let (head, rest) = bytes.split_at(slice.bytes as usize);
            slice.mapping.write(slice.offset, head);
            bytes = rest;
        }
    }

    /// [`GuestMemory::write_run`] where pages may be missing, which then come to be at half the cost.
    ///
    /// # Panics
    /// As that.
    pub fn fill_run(&self, run: Run, mut bytes: &[u8]) {
        assert_eq!(bytes.len() as u64, run.bytes(), "as many bytes as the run has");
        for slice in self.slices(run) {
            let (head, rest) = bytes.split_at(slice.bytes as usize);
            if slice.mapping.is_missing(slice.offset) {
                slice.mapping.fill(slice.offset, head);
            } else {
                slice.mapping.write(slice.offset, head);
            }
            bytes = rest;
        }
    }

    /// Whether a page is missing in a file's memory: as far as this process can see, nobody has ever written to it.
    ///
    /// # Panics
    /// If there is no such page.
    #[must_use]
    pub fn is_missing(&self, page: PageIndex) -> bool {
        let (mapping, offset) = self.locate(page);
        mapping.is_missing(offset)
    }

    /// Overwrites a run with zero bytes.
    ///
    /// # Panics
    /// If a page of the run does not exist.
    pub fn zero_run(&self, run: Run) {
        for slice in self.slices(run) {
            slice.mapping.zero(slice.offset, slice.bytes);
        }
    }

    /// Whether a page holds only zero bytes, read without populating huge ranges: stops at the first that is not.
    ///
    /// # Panics
    /// If there is no such page.
    #[must_use]
    pub fn is_zero_page(&self, page: PageIndex) -> bool {
        let (mapping, offset) = self.locate(page);
        mapping.is_zero(offset, PAGE_SIZE)
    }

    /// The byte that a page holds only, if there is one; 0 for a page of zeros. Reads as [`GuestMemory::is_zero_page`] does.
    ///
    /// # Panics
    /// If there is no such page.
    #[must_use]
    pub fn repeated_byte(&self, page: PageIndex) -> Option<u8> {
        let (mapping, offset) = self.locate(page);
        mapping.repeated_byte(offset, PAGE_SIZE)
    }

    /// Brings the beginnings of a run's pages closer to the processor: what [`GuestMemory::is_zero_page`] reads first, and
    /// all that it reads of most pages. One page after the other would wait for memory each time.
    ///
    /// # Panics
    /// If a page of the run does not exist.
    pub fn prefetch(&self, run: Run) {
        for slice in self.slices(run) {
            (0..slice.bytes / PAGE_SIZE)
                .for_each(|page| slice.mapping.prefetch(slice.offset + page * PAGE_SIZE));
        }
    }

    fn slices(&self, run: Run) -> impl Iterator<Item = Slice<'_>> {
        assert!(self.layout.contains(run), "{run:?} is outside this guest's memory");
        self.layout.pieces(run).map(|(place, piece)| Slice {
            mapping: &self.mappings[place.region],
            offset: place.offset,
            bytes: piece.bytes(),
        })
    }

    /// The pieces of the mappings that a run lies in, for the calls of [`crate::sys::scatter`].
    ///
    /// # Panics
    /// If a page of the run does not exist.
    pub fn memory_slices(&self, run: Run) -> impl Iterator<Item = MemorySlice<'_>> {
        self.slices(run).map(|slice| MemorySlice::new(slice.mapping, slice.offset, slice.bytes))
    }
}

struct Slice<'a> {
    mapping: &'a Mapping,
    offset: u64,
    bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::RamRegion;
    use crate::units::GuestAddress;

    #[test]
    fn a_run_over_a_region_border_is_written_and_read() {
        let region = |start, bytes| RamRegion { start: GuestAddress(start), bytes };
        let layout = RamLayout::new(vec![region(0, 8192), region(1 << 32, 8192)]).unwrap();
        let memory = GuestMemory::allocate(layout, Backing::Memfd, HugePages::No).unwrap();
        let bytes: Vec<u8> = (0..8192u32).map(|n| (n % 251) as u8).collect();
        memory.write_run(Run::new(1, 2), &bytes);
        let mut back = Vec::new();
        memory.read_run(Run::new(1, 2), &mut back);
        assert_eq!(back, bytes);
        assert!(memory.is_zero_page(PageIndex(0)) && !memory.is_zero_page(PageIndex(2)));
        memory.zero_run(Run::new(2, 1));
        assert!(memory.is_zero_page(PageIndex(2)) && !memory.is_zero_page(PageIndex(1)));
        assert_eq!(memory.memory_slices(Run::new(1, 2)).count(), 2);
    }
}

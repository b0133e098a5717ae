//! A guest as numbers: the version of each page, and a CPU that counts its writes.

use pageferry::pageset::PageSet;
use pageferry::units::{PageIndex, Run};

/// Enough for several batches a round.
pub(crate) const PAGES: u64 = 80;

/// Pages and CPU state as they were at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Image {
    pub(crate) pages: [u64; PAGES as usize],
    pub(crate) writes: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct ModelGuest {
    pub(crate) image: Image,
    pub(crate) running: bool,
    /// The tracker: `None` when it does not track.
    pub(crate) dirty: Option<PageSet>,
}

impl ModelGuest {
    /// Some pages touched, running.
    pub(crate) fn running() -> Self {
        let mut guest = Self::skeleton();
        guest.running = true;
        for page in 0..PAGES - 20 {
            guest.write(page);
        }
        guest
    }

    /// Nothing in it yet.
    pub(crate) fn skeleton() -> Self {
        Self { image: Image { pages: [0; PAGES as usize], writes: 0 }, running: false, dirty: None }
    }

    pub(crate) fn write(&mut self, page: u64) {
        self.image.writes += 1;
        self.image.pages[page as usize] = self.image.writes;
        if let Some(dirty) = &mut self.dirty {
            dirty.insert(PageIndex(page));
        }
    }

    pub(crate) fn touched(&self) -> PageSet {
        let mut touched = PageSet::empty(PAGES);
        touched.extend((0..PAGES).filter(|p| self.image.pages[*p as usize] != 0).map(|p| Run::new(p, 1)));
        touched
    }

    /// CPU state as bytes.
    pub(crate) fn state(&self) -> Vec<u8> {
        self.image.writes.to_le_bytes().to_vec()
    }

    pub(crate) fn load(&mut self, state: &[u8]) {
        self.image.writes = u64::from_le_bytes(state.try_into().expect("the state arrives whole"));
    }
}

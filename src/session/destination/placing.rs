//! How pages get into memory, and what a session counts of each frame.

use std::ops::AddAssign;
use std::time::{Duration, Instant};

use super::DestinationShared;
use crate::codec::Decompressor;
use crate::memory::GuestMemory;
use crate::session::error::SessionError;
use crate::units::{PageIndex, Run};

/// What came with a frame, or with many.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counted {
    pub(super) placed_pages: u64,
    pub(super) zero_pages: u64,
    pub(super) wire_bytes: u64,
    /// Putting pages into memory that were not compressed.
    pub(super) placing: Duration,
    /// Taking compressed ones apart, into memory.
    pub(super) unpacking: Duration,
}

impl AddAssign for Counted {
    fn add_assign(&mut self, more: Self) {
        self.placed_pages += more.placed_pages;
        self.zero_pages += more.zero_pages;
        self.wire_bytes += more.wire_bytes;
        self.placing += more.placing;
        self.unpacking += more.unpacking;
    }
}

impl DestinationShared {
    /// Pages of the guest will be written now. Answers how long it took to make them ready.
    pub(super) fn about_to_place(&self, runs: &[Run]) -> Duration {
        let began = Instant::now();
        self.filler.prepare(&self.memory, runs, |run| self.written.is_clear(run));
        self.written.insert(runs);
        began.elapsed()
    }

    /// Overwrites with zeros what was written to before; the rest is zero already.
    pub(super) fn zero(&self, runs: &[Run]) {
        for run in runs {
            for page in run.start.0..run.end() {
                // Memory that RDMA may write counts as written, and most of it is zero still.
                if self.written.contains(page) && !self.memory.is_zero_page(PageIndex(page)) {
                    self.memory.zero_run(Run::new(page, 1));
                }
            }
        }
    }
}

/// Takes pages apart that were compressed together, into memory.
pub(super) fn unpack(
    decompressor: &mut Option<Decompressor>,
    memory: &GuestMemory,
    runs: &[Run],
    pages: u64,
    packed: &[u8],
) -> Result<(), SessionError> {
    let decompressor = match decompressor {
        Some(decompressor) => decompressor,
        none => none.insert(Decompressor::new()?),
    };
    let mut bytes = decompressor.decompress(packed, pages)?;
    for run in runs {
        let (head, rest) = bytes.split_at(run.bytes() as usize);
        memory.fill_run(*run, head);
        bytes = rest;
    }
    Ok(())
}

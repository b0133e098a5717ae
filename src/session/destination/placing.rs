//! How compressed pages get into memory, and what a session counts of each frame.

use std::ops::AddAssign;
use std::time::Duration;

use crate::codec::Decompressor;
use crate::memory::GuestMemory;
use crate::session::error::SessionError;
use crate::units::Run;

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
        memory.write_run(*run, head);
        bytes = rest;
    }
    Ok(())
}

//! Dirty pages from KVM's bitmap, which is read whole and cleared in slices.

use std::io;
use std::sync::Arc;

use super::{DirtyTracker, TrackerKind};
use crate::layout::RamLayout;
use crate::pageset::PageSet;
use crate::sys::kvm::{DirtyMode, VirtualMachine};

/// Pages that are cleared by one call, 256 MiB of guest RAM. Clearing holds KVM's MMU lock, which every page fault of the
/// guest needs: write-protecting 64 Ki pages takes 1 to 2 ms on current processors, a stall that a guest may notice but does
/// not suffer from.
const SLICE_PAGES: u64 = 64 << 10;

/// Tracks writes of a virtual machine's vCPUs by KVM's dirty log (`Documentation/virt/kvm/api.rst` 4.8, 4.117, 7.18).
///
/// It tells exactly the pages that vCPUs, and KVM on their behalf, have written. It does not tell what this process or a
/// device writes into guest RAM.
#[derive(Debug)]
pub struct KvmLogTracker {
    machine: Arc<VirtualMachine>,
    layout: RamLayout,
    /// A slot's bitmap, kept from drain to drain.
    bitmap: Vec<u64>,
}

impl KvmLogTracker {
    /// A tracker for a machine whose memory slot `n` is region `n` of the layout, not started.
    ///
    /// # Errors
    /// `InvalidInput` when the machine was not made with [`DirtyMode::Log`], or its slots are not the layout's regions.
    pub fn new(machine: &Arc<VirtualMachine>, layout: &RamLayout) -> io::Result<Self> {
        check_slots(machine, layout)?;
        if !matches!(machine.dirty_mode(), DirtyMode::Log { .. }) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the virtual machine was made without a dirty log; make it with one, or track its memory by pagemap",
            ));
        }
        Ok(Self { machine: Arc::clone(machine), layout: layout.clone(), bitmap: Vec::new() })
    }

    fn drain_region(&mut self, region: usize, dirty: &mut PageSet) -> io::Result<()> {
        let (slot, run) = (region as u32, self.layout.region_run(region));
        self.machine.dirty_log(slot, &mut self.bitmap)?;
        // Before they are cleared: a failure from here on tells pages twice, but loses none.
        dirty.insert_bitmap(run.start, &self.bitmap);
        if !self.machine.dirty_log_features().manual_clear {
            return Ok(());
        }
        for first in (0..run.pages).step_by(SLICE_PAGES as usize) {
            let pages = SLICE_PAGES.min(run.pages - first);
            let slice = &self.bitmap[(first / 64) as usize..(first + pages).div_ceil(64) as usize];
            if slice.iter().any(|&word| word != 0) {
                self.machine.clear_dirty_log(slot, first, pages as u32, slice)?;
            }
        }
        Ok(())
    }
}

/// Checks that slot `n` can be region `n`.
pub(super) fn check_slots(machine: &VirtualMachine, layout: &RamLayout) -> io::Result<()> {
    let wrong = layout
        .regions()
        .iter()
        .enumerate()
        .find(|(slot, region)| machine.slot_pages(*slot as u32) != Some(region.pages()));
    match wrong {
        None => Ok(()),
        Some((slot, region)) => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("KVM memory slot {slot} is not RAM region {slot}, which has {} pages", region.pages()),
        )),
    }
}

impl DirtyTracker for KvmLogTracker {
    fn start(&mut self) -> io::Result<()> {
        self.machine.set_dirty_logging(true)?;
        // The log may begin with every page in it (KVM_DIRTY_LOG_INITIALLY_SET), or have been on for somebody else.
        self.drain(&mut PageSet::empty(self.layout.total_pages()))
    }

    fn drain(&mut self, dirty: &mut PageSet) -> io::Result<()> {
        (0..self.layout.regions().len()).try_for_each(|region| self.drain_region(region, dirty))
    }

    fn stop(&mut self) -> io::Result<()> {
        self.machine.set_dirty_logging(false)
    }

    fn kind(&self) -> TrackerKind {
        TrackerKind::Log
    }
}

#[cfg(test)]
mod tests;

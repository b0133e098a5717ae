//! Dirty pages from the ring of each vCPU: the cost follows the pages written, not the size of the guest.

use std::io;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::kvm_log::check_slots;
use super::{DirtyTracker, TrackerKind};
use crate::layout::RamLayout;
use crate::pageset::PageSet;
use crate::sys::kvm::{DirtyMode, DirtyRing, VirtualMachine};
use crate::units::{PageIndex, Run};

/// The low half of an entry's slot number is the slot; the high half is the address space, which system management mode
/// may have its own of (`Documentation/virt/kvm/api.rst` 4.35).
const SLOT_MASK: u32 = 0xffff;

/// How often the rings are looked at while tracking. A full ring stops its vCPU, which no guest has to suffer: the fastest
/// guests write some million pages a second, so half a ring of 64 Ki entries takes longer to fill than this.
///
/// KVM without hardware virtualisation (pvm) interprets the guest in long batches and stops a vCPU only between them, when
/// its ring may have overrun; there this is what keeps the ring usable.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Empties the rings of a machine into one set of pages. A clone empties the same rings.
///
/// A vCPU leaves the guest when its ring is full and stays out until somebody has emptied it: its thread calls
/// [`RingHarvester::ring_full`] on the exit reason `KVM_EXIT_DIRTY_RING_FULL` and runs the vCPU again.
#[derive(Clone, Debug)]
pub struct RingHarvester {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    machine: Arc<VirtualMachine>,
    layout: RamLayout,
    harvest: Mutex<Harvest>,
}

#[derive(Debug)]
struct Harvest {
    rings: Vec<Ring>,
    pages: PageSet,
    /// A ring held more than it has room for: pages are lost that it cannot name.
    overrun: bool,
}

#[derive(Debug)]
struct Ring {
    entries: DirtyRing,
    /// Its vCPU left because of it, and there was nothing in it; nor has there been since.
    blocked: bool,
}

impl Harvest {
    fn forget(&mut self) {
        self.pages.clear();
        self.overrun = false;
    }
}

impl RingHarvester {
    /// A harvester for a machine whose memory slot `n` is region `n` of the layout. Ring `n` is that of vCPU `n`; give it the
    /// rings of all vCPUs.
    ///
    /// # Errors
    /// `InvalidInput` when the machine was not made with [`DirtyMode::Ring`], or its slots are not the layout's regions.
    pub fn new(machine: &Arc<VirtualMachine>, layout: &RamLayout, rings: Vec<DirtyRing>) -> io::Result<Self> {
        check_slots(machine, layout)?;
        if !matches!(machine.dirty_mode(), DirtyMode::Ring { .. }) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the virtual machine was made without dirty rings; make it with them, or track it by log or pagemap",
            ));
        }
        let rings = rings.into_iter().map(|entries| Ring { entries, blocked: false }).collect();
        let pages = PageSet::empty(layout.total_pages());
        let harvest = Mutex::new(Harvest { rings, pages, overrun: false });
        let shared = Shared { machine: Arc::clone(machine), layout: layout.clone(), harvest };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Takes what the rings hold, write-protects those pages anew and gives the entries back to the vCPUs. The pages are
    /// told by the next drain.
    ///
    /// # Errors
    /// What `KVM_RESET_DIRTY_RINGS` answers; the pages are taken, and the entries are given back by the next call.
    pub fn harvest(&self) -> io::Result<()> {
        self.harvested().map(drop)
    }

    /// As [`RingHarvester::harvest`], for the thread of a vCPU that left the guest because its ring is full. The vCPU can run
    /// again, even if the ring had overrun; in that case it may leave some more times before it gets on.
    ///
    /// # Errors
    /// As [`RingHarvester::harvest`].
    pub fn ring_full(&self, vcpu: usize) -> io::Result<()> {
        let mut harvest = self.lock();
        let found = self.collect(&mut harvest);
        if let Some(ring) = harvest.rings.get_mut(vcpu).filter(|_| found.get(vcpu) == Some(&0)) {
            // The first time, another thread may just have emptied it. The second, nobody ever will.
            if ring.blocked {
                ring.entries.skip();
                harvest.overrun = true;
            } else {
                ring.blocked = true;
            }
        }
        self.shared.machine.reset_dirty_rings().map(drop)
    }

    fn harvested(&self) -> io::Result<MutexGuard<'_, Harvest>> {
        let mut harvest = self.lock();
        self.collect(&mut harvest);
        self.shared.machine.reset_dirty_rings()?;
        Ok(harvest)
    }

    /// Nothing under the lock is ever left half done.
    fn lock(&self) -> MutexGuard<'_, Harvest> {
        self.shared.harvest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers how many entries each ring had.
    fn collect(&self, Harvest { rings, pages, overrun }: &mut Harvest) -> Vec<u32> {
        let layout = &self.shared.layout;
        let mut collect = |ring: &mut Ring| {
            let found = ring.entries.harvest(|slot, page| {
                let region = (slot & SLOT_MASK) as usize;
                // Slots after the layout's regions are not RAM that moves.
                if region < layout.regions().len() {
                    pages.insert(PageIndex(layout.region_run(region).start.0 + page));
                }
            });
            *overrun |= found == ring.entries.entries();
            ring.blocked &= found == 0;
            found
        };
        rings.iter_mut().map(&mut collect).collect()
    }

    /// Harvests whenever a ring is half full, until the other end of the channel is dropped.
    fn keep_empty(&self, until: &std::sync::mpsc::Receiver<()>) {
        while until.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
            let half_full = self.lock().rings.iter().any(|ring| ring.entries.is_half_full());
            if half_full && let Err(error) = self.harvest() {
                // A vCPU that then finds its ring full tries again and reports it.
                tracing::warn!(%error, "the dirty rings could not be reset");
            }
        }
    }
}

/// Tracks writes of a virtual machine's vCPUs by KVM's dirty rings (`Documentation/virt/kvm/api.rst` 8.29).
///
/// It tells the pages that vCPUs, and KVM on their behalf, have written; a processor that logs writes by itself (Intel's
/// PML) may tell a page only when its vCPU next leaves the guest. It does not tell what this process or a device writes
/// into guest RAM. While it tracks, a thread of its own empties rings that are half full.
///
/// A ring that overruns loses pages. Every drain from then on adds all pages and is an error, until tracking starts again;
/// rings of 65536 entries make that as unlikely as it can be.
#[derive(Debug)]
pub struct KvmRingTracker {
    harvester: RingHarvester,
    watcher: Option<Watcher>,
}

/// The thread that empties rings, and what ends it when dropped.
#[derive(Debug)]
struct Watcher {
    until: Sender<()>,
    thread: JoinHandle<()>,
}

impl KvmRingTracker {
    /// A tracker that tells what the harvester takes, not started. Use one at a time.
    #[must_use]
    pub fn new(harvester: RingHarvester) -> Self {
        Self { harvester, watcher: None }
    }

    fn watch(&mut self) -> io::Result<()> {
        if self.watcher.is_none() {
            let harvester = self.harvester.clone();
            let (until, receiver) = channel();
            let thread = std::thread::Builder::new()
                .name("dirty-rings".to_owned())
                .spawn(move || harvester.keep_empty(&receiver))?;
            self.watcher = Some(Watcher { until, thread });
        }
        Ok(())
    }

    pub(super) fn unwatch(&mut self) {
        if let Some(Watcher { until, thread }) = self.watcher.take() {
            drop(until);
            // It cannot fail but by a panic, which has been reported.
            let _ = thread.join();
        }
    }
}

impl Drop for KvmRingTracker {
    fn drop(&mut self) {
        self.unwatch();
    }
}

impl DirtyTracker for KvmRingTracker {
    fn start(&mut self) -> io::Result<()> {
        self.harvester.shared.machine.set_dirty_logging(true)?;
        self.watch()?;
        self.harvester.harvested()?.forget();
        Ok(())
    }

    fn drain(&mut self, dirty: &mut PageSet) -> io::Result<()> {
        let mut harvest = self.harvester.harvested()?;
        if harvest.overrun {
            dirty.insert_run(Run::new(0, self.harvester.shared.layout.total_pages()));
            return Err(io::Error::other(
                "a dirty ring overran and lost pages; make larger rings, or track this guest by log or pagemap",
            ));
        }
        dirty.union(&harvest.pages);
        harvest.pages.clear();
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        self.unwatch();
        self.harvester.shared.machine.set_dirty_logging(false)?;
        // A ring that was full when logging ended still has to be emptied before its vCPU runs.
        self.harvester.harvested()?.forget();
        Ok(())
    }

    fn kind(&self) -> TrackerKind {
        TrackerKind::Ring
    }
}

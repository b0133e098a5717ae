//! A vCPU's ring of dirty pages, shared with the kernel.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::units::PAGE_SIZE;

/// The kernel's mark on an entry that it filled, and ours on one that was read (api.rst 8.29).
const DIRTY: u32 = 1 << 0;
const RESET: u32 = 1 << 1;

/// The ring of one vCPU, with our place in it.
#[derive(Debug)]
pub struct DirtyRing {
    entries: NonNull<kvm_dirty_gfn>,
    count: u32,
    next: u32,
}

// SAFETY: the ring is an address range of our own; taking entries needs `&mut self`, so one thread at a time walks it, and
// the kernel's side is synchronised by the acquire and release on `flags`.
unsafe impl Send for DirtyRing {}

impl DirtyRing {
    /// Maps the ring of the vCPU that `vcpu` is the descriptor of. The mapping holds the vCPU's file by itself.
    pub(super) fn map(vcpu: BorrowedFd<'_>, count: u32) -> io::Result<Self> {
        let bytes = count as usize * size_of::<kvm_dirty_gfn>();
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe { mmap(std::ptr::null_mut(), bytes, access, MapFlags::SHARED, vcpu, offset) }?;
        let entries = NonNull::new(start.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Self { entries, count, next: 0 })
    }

    /// Takes every entry that the kernel has filled, oldest first, and calls `found(slot, page)` for each: `page` counts
    /// from the slot's start. Answers how many. The kernel reuses them, and tells those pages again, only after
    /// [`super::VirtualMachine::reset_dirty_rings`].
    ///
    /// One call takes at most one round of the ring, so it ends even while the guest runs.
    pub fn harvest(&mut self, mut found: impl FnMut(u32, u64)) -> u32 {
        for taken in 0..self.count {
            let at = (self.next % self.count) as usize;
            // SAFETY: `at` is below the number of entries mapped.
            let entry = unsafe { self.entries.add(at) }.as_ptr();
            // SAFETY: `flags` lies in the mapping, is aligned, and both sides access it atomically.
            let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
            if flags.load(Ordering::Acquire) != DIRTY {
                return taken;
            }
            // SAFETY: DIRTY, read with acquire, means that the kernel has written the entry and will not until its reset.
            let (slot, page) = unsafe { ((*entry).slot, (*entry).offset) };
            found(slot, page);
            flags.store(RESET, Ordering::Release);
            self.next = self.next.wrapping_add(1);
        }
        self.count
    }
}

impl Drop for DirtyRing {
    fn drop(&mut self) {
        let bytes = self.count as usize * size_of::<kvm_dirty_gfn>();
        // SAFETY: mapped by us, and no reference into it outlives `harvest`.
        let unmapped = unsafe { munmap(self.entries.as_ptr().cast(), bytes) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping");
    }
}

//! KVM, fenced: a virtual machine that owns the memory registered with it, and the calls that kvm-ioctls lacks.
//!
//! The `VmFd` of kvm-ioctls never leaves this module. Its `create_vcpu` is a safe function, and a vCPU made by it would go
//! on writing to guest RAM after the mapping is gone; a [`Vcpu`] of ours holds the machine, which holds the mappings.
//! Sources: `Documentation/virt/kvm/api.rst` of the kernel, sections named at each call.

pub mod program;
mod ring;
mod vcpu;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_clock_data, kvm_dirty_gfn, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_irqchip, kvm_pit_config, kvm_pit_state2,
    kvm_reinject_control, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VmFd};
use request::{KVM_CLEAR_DIRTY_LOG, KVM_GET_DIRTY_LOG, KVM_REINJECT_CONTROL, KVM_RESET_DIRTY_RINGS};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref};

pub use ring::DirtyRing;
pub use vcpu::{Kicker, Vcpu};

use super::mapping::Mapping;
use crate::units::{GuestAddress, PAGE_SIZE};

/// The numbers of the calls made here (`include/uapi/linux/kvm.h`); the macros make public functions.
mod request {
    use kvm_bindings::{KVMIO, kvm_clear_dirty_log, kvm_dirty_log, kvm_xsave};
    use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

    ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
    ioctl_ior_nr!(KVM_GET_XSAVE, KVMIO, 0xa4, kvm_xsave);
    ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);
    ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
    ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
    ioctl_io_nr!(KVM_REINJECT_CONTROL, KVMIO, 0x71);
    ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
}

/// How a virtual machine can tell its dirty pages; chosen when it is made, because a ring has to be there before vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirtyMode {
    /// Not at all (somebody else tracks the memory).
    None,
    /// A bitmap per slot, cleared by hand where the kernel offers `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
    Log {
        /// Ask for `KVM_DIRTY_LOG_INITIALLY_SET`: every page counts as dirty when logging begins and is write-protected
        /// only when it is first cleared. That spreads the cost of write-protecting a large guest over its clears.
        initially_set: bool,
    },
    /// A ring of dirty pages per vCPU.
    Ring {
        /// How many; a power of two, at least 256 (one page of the kernel's entries).
        entries: u32,
    },
}

/// What the kernel agreed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyLogFeatures {
    /// The log is cleared by [`VirtualMachine::clear_dirty_log`]; without it, reading the log clears it.
    pub manual_clear: bool,
    /// Every page is in the log when logging begins.
    pub initially_set: bool,
}

/// A virtual machine and the memory registered with it.
#[derive(Debug)]
pub struct VirtualMachine {
    fd: VmFd,
    dirty: DirtyMode,
    features: DirtyLogFeatures,
    slots: Mutex<Slots>,
}

#[derive(Debug, Default)]
struct Slots {
    slots: Vec<Slot>,
    logging: bool,
}

#[derive(Debug)]
struct Slot {
    guest: GuestAddress,
    memory: Arc<[Mapping]>,
    index: usize,
}

impl Slot {
    fn mapping(&self) -> &Mapping {
        &self.memory[self.index]
    }

    fn pages(&self) -> u64 {
        self.mapping().bytes() / PAGE_SIZE
    }
}

impl VirtualMachine {
    /// Makes an empty virtual machine.
    ///
    /// # Errors
    /// What `KVM_CREATE_VM` or `KVM_ENABLE_CAP` answers; `Unsupported` when the kernel has no dirty ring.
    pub fn create(kvm: &Kvm, dirty: DirtyMode) -> io::Result<Self> {
        let fd = kvm.create_vm()?;
        let mut features = DirtyLogFeatures { manual_clear: false, initially_set: false };
        match dirty {
            DirtyMode::None => {}
            DirtyMode::Log { initially_set } => features = enable_manual_clear(&fd, initially_set)?,
            DirtyMode::Ring { entries } => enable_ring(&fd, entries)?,
        }
        Ok(Self { fd, dirty, features, slots: Mutex::default() })
    }

    /// How this machine tells its dirty pages.
    #[must_use]
    pub fn dirty_mode(&self) -> DirtyMode {
        self.dirty
    }

    /// What the kernel agreed to of [`DirtyMode::Log`].
    #[must_use]
    pub fn dirty_log_features(&self) -> DirtyLogFeatures {
        self.features
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        // Nothing in the critical sections panics half way through a change.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the guest mapping `index` of `memory` at a guest-physical address, and answers the slot's number: 0 for the
    /// first, then rising by one. The machine keeps the memory mapped (api.rst 4.35).
    ///
    /// # Errors
    /// What the kernel answers: `EEXIST` for an overlap, `EINVAL` for an address that is no multiple of the page size.
    ///
    /// # Panics
    /// If there is no such mapping.
    pub fn add_memory(&self, guest: GuestAddress, memory: &Arc<[Mapping]>, index: usize) -> io::Result<u32> {
        assert!(index < memory.len(), "mapping {index} of {}", memory.len());
        let mut slots = self.slots();
        let number = slots.slots.len() as u32;
        let slot = Slot { guest, memory: Arc::clone(memory), index };
        self.register(number, &slot, slots.logging)?;
        slots.slots.push(slot);
        Ok(number)
    }

    fn register(&self, number: u32, slot: &Slot, logging: bool) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: number,
            flags: if logging { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: slot.guest.0,
            memory_size: slot.mapping().bytes(),
            userspace_addr: slot.mapping().address(),
        };
        // SAFETY: the range is a Mapping's, which is guest RAM that no reference points into; the slot is never deleted
        // and the machine holds the mapping until after the last vCPU (each holds the machine) is gone.
        Ok(unsafe { self.fd.set_user_memory_region(region) }?)
    }

    /// The number of memory slots.
    #[must_use]
    pub fn slot_count(&self) -> u32 {
        self.slots().slots.len() as u32
    }

    /// The pages of a slot, or `None` when there is no such slot.
    #[must_use]
    pub fn slot_pages(&self, slot: u32) -> Option<u64> {
        self.slots().slots.get(slot as usize).map(Slot::pages)
    }

    /// Switches dirty logging of every slot on or off. Idempotent.
    ///
    /// # Errors
    /// What the kernel answers; slots before the failing one are switched, and a second call tries all again.
    pub fn set_dirty_logging(&self, on: bool) -> io::Result<()> {
        let mut slots = self.slots();
        for (number, slot) in slots.slots.iter().enumerate() {
            self.register(number as u32, slot, on)?;
        }
        slots.logging = on;
        Ok(())
    }

    /// Reads a slot's dirty bitmap: bit `n` is the slot's page `n`. With manual clear the bits stay set until they are
    /// cleared; without, they are cleared by this call (api.rst 4.8). `bitmap` is resized to the slot.
    ///
    /// # Errors
    /// `ENOENT` when logging is off or there is no such slot; otherwise what the kernel answers.
    pub fn dirty_log(&self, slot: u32, bitmap: &mut Vec<u64>) -> io::Result<()> {
        let pages = self.slot_pages(slot).ok_or(rustix::io::Errno::NOENT)?;
        bitmap.clear();
        bitmap.resize(pages.div_ceil(64) as usize, 0);
        let request = kvm_dirty_log {
            slot,
            padding1: 0,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.as_mut_ptr().cast() },
        };
        // SAFETY: the kernel writes one bit per page of the slot, rounded up to 64 bits; the buffer was sized from the slot
        // as we registered it, and a slot never changes its size.
        answered(unsafe { ioctl_with_ref(&self.fd, KVM_GET_DIRTY_LOG(), &request) })
    }

    /// Clears the bits that are set in `bitmap` (bit `n` is page `first_page + n`) from a slot's dirty log and
    /// write-protects those pages anew (api.rst 4.117). `first_page` is a multiple of 64, and so is `pages` unless it
    /// reaches the slot's end.
    ///
    /// # Errors
    /// `EINVAL` when the range is not so aligned or outside the slot, or `bitmap` is shorter than `pages`; otherwise what
    /// the kernel answers.
    pub fn clear_dirty_log(&self, slot: u32, first_page: u64, pages: u32, bitmap: &[u64]) -> io::Result<()> {
        let total = self.slot_pages(slot).ok_or(rustix::io::Errno::NOENT)?;
        let end = first_page.checked_add(u64::from(pages)).filter(|end| *end <= total);
        let aligned =
            first_page.is_multiple_of(64) && end.is_some_and(|end| end == total || pages.is_multiple_of(64));
        if !aligned || (bitmap.len() as u64) * 64 < u64::from(pages) {
            return Err(rustix::io::Errno::INVAL.into());
        }
        let request = kvm_clear_dirty_log {
            slot,
            num_pages: pages,
            first_page,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: bitmap.as_ptr().cast_mut().cast(),
            },
        };
        // SAFETY: the kernel reads `pages` bits rounded up to 64, and `bitmap` was checked to have them; it writes nothing.
        answered(unsafe { ioctl_with_ref(&self.fd, KVM_CLEAR_DIRTY_LOG(), &request) })
    }

    /// Write-protects anew what was harvested from the vCPUs' rings, and gives the entries back to the kernel; answers how
    /// many (api.rst 8.29).
    ///
    /// # Errors
    /// `EINVAL` when the machine has no rings.
    pub fn reset_dirty_rings(&self) -> io::Result<u32> {
        // SAFETY: the call takes no argument.
        let count = unsafe { ioctl(&self.fd, KVM_RESET_DIRTY_RINGS()) };
        u32::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// Makes the in-kernel PIC, IOAPIC and, with each vCPU, LAPIC (api.rst 4.24); before any vCPU.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn create_irqchip(&self) -> io::Result<()> {
        Ok(self.fd.create_irq_chip()?)
    }

    /// Makes the in-kernel timer (api.rst 4.71), after the irqchip, with ticks that the guest misses left out: a guest that
    /// was paused or throttled must not work off the ticks of that time at once (`KVM_REINJECT_CONTROL`).
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn create_pit2(&self) -> io::Result<()> {
        self.fd.create_pit2(kvm_pit_config::default())?;
        let control = kvm_reinject_control { pit_reinject: 0, ..Default::default() };
        // SAFETY: the kernel reads one structure of this type.
        answered(unsafe { ioctl_with_ref(&self.fd, KVM_REINJECT_CONTROL(), &control) })
    }

    /// Where KVM may put the three pages that Intel processors need for real mode: a hole of the guest's memory map
    /// (api.rst 4.36).
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn set_tss_address(&self, address: GuestAddress) -> io::Result<()> {
        Ok(self.fd.set_tss_address(address.0 as usize)?)
    }

    /// Reads the state of interrupt chip `id`: 0 and 1 are the PICs, 2 is the IOAPIC (api.rst 4.26).
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn irqchip(&self, id: u32) -> io::Result<kvm_irqchip> {
        let mut chip = kvm_irqchip { chip_id: id, ..Default::default() };
        self.fd.get_irqchip(&mut chip)?;
        Ok(chip)
    }

    /// Writes the state of the interrupt chip that it names (api.rst 4.27).
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn set_irqchip(&self, chip: &kvm_irqchip) -> io::Result<()> {
        Ok(self.fd.set_irqchip(chip)?)
    }

    /// Reads the timer's state (api.rst 4.72).
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn pit2(&self) -> io::Result<kvm_pit_state2> {
        Ok(self.fd.get_pit2()?)
    }

    /// Writes the timer's state and starts its counters (api.rst 4.73).
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn set_pit2(&self, state: &kvm_pit_state2) -> io::Result<()> {
        Ok(self.fd.set_pit2(state)?)
    }

    /// Reads the paravirtual clock (api.rst 4.29).
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn clock(&self) -> io::Result<kvm_clock_data> {
        Ok(self.fd.get_clock()?)
    }

    /// Sets the paravirtual clock (api.rst 4.30).
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn set_clock(&self, clock: &kvm_clock_data) -> io::Result<()> {
        Ok(self.fd.set_clock(clock)?)
    }

    /// Raises or lowers an interrupt line of the irqchip (api.rst 4.25).
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn set_irq_line(&self, line: u32, high: bool) -> io::Result<()> {
        Ok(self.fd.set_irq_line(line, high)?)
    }

    /// Bytes of a vCPU's xsave area (`KVM_CAP_XSAVE2`); 4096 on kernels that do not tell.
    fn xsave_bytes(&self) -> usize {
        usize::try_from(self.fd.check_extension_int(kvm_ioctls::Cap::Xsave2)).unwrap_or(0).max(4096)
    }
}

fn answered(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn enable_manual_clear(fd: &VmFd, initially_set: bool) -> io::Result<DirtyLogFeatures> {
    let offered = fd.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
    let mut wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
    if initially_set {
        wanted |= KVM_DIRTY_LOG_INITIALLY_SET;
    }
    // Older kernels answer 1: manual clear alone. INITIALLY_SET is only valid together with it.
    let flags = u32::try_from(offered).unwrap_or(0) & wanted;
    if flags & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE == 0 {
        return Ok(DirtyLogFeatures { manual_clear: false, initially_set: false });
    }
    enable(fd, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, u64::from(flags))?;
    Ok(DirtyLogFeatures { manual_clear: true, initially_set: flags & KVM_DIRTY_LOG_INITIALLY_SET != 0 })
}

fn enable_ring(fd: &VmFd, entries: u32) -> io::Result<()> {
    let bytes = u64::from(entries) * size_of::<kvm_dirty_gfn>() as u64;
    let most = u64::try_from(fd.check_extension_raw(KVM_CAP_DIRTY_LOG_RING_ACQ_REL.into())).unwrap_or(0);
    if most == 0 {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel has no KVM dirty ring"));
    }
    if !entries.is_power_of_two() || bytes < PAGE_SIZE || bytes > most {
        let most = most / size_of::<kvm_dirty_gfn>() as u64;
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a dirty ring has a power of two of entries from 256 to {most}, not {entries}"),
        ));
    }
    enable(fd, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, bytes)
}

fn enable(fd: &VmFd, capability: u32, argument: u64) -> io::Result<()> {
    let mut request = kvm_enable_cap { cap: capability, ..Default::default() };
    request.args[0] = argument;
    Ok(fd.enable_cap(&request)?)
}

/// The descriptor, for `Debug` and for tests that look at `/proc`; it is not to be closed.
impl AsRawFd for VirtualMachine {
    fn as_raw_fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests;

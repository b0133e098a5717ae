//! One virtual CPU, and the way to get its thread out of the guest.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{kvm_run, kvm_xsave};
use kvm_ioctls::{VcpuExit, VcpuFd};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_ptr};

use super::request::{KVM_GET_XSAVE, KVM_GET_XSAVE2, KVM_SET_XSAVE};
use super::{DirtyMode, DirtyRing, VirtualMachine, answered};
use crate::units::PAGE_SIZE;

/// A virtual CPU. It holds its machine, so guest RAM stays mapped as long as the guest can run.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    machine: Arc<VirtualMachine>,
}

impl VirtualMachine {
    /// Makes vCPU number `id` (api.rst 4.7).
    ///
    /// # Errors
    /// What the kernel answers: `EEXIST` for a number that is taken.
    pub fn create_vcpu(self: &Arc<Self>, id: u64) -> io::Result<Vcpu> {
        Ok(Vcpu { fd: self.fd.create_vcpu(id)?, machine: Arc::clone(self) })
    }
}

impl Vcpu {
    /// Reads and writes of its state, as kvm-ioctls has them.
    #[must_use]
    pub fn state(&self) -> &VcpuFd {
        &self.fd
    }

    /// Runs the guest until it needs something, or until it is kicked: then `EINTR` (api.rst 4.10).
    ///
    /// # Errors
    /// What `KVM_RUN` answers.
    pub fn run(&mut self) -> io::Result<VcpuExit<'_>> {
        Ok(self.fd.run()?)
    }

    /// The way to get this vCPU's thread out of [`Vcpu::run`].
    ///
    /// # Errors
    /// What `mmap(2)` answers.
    pub fn kicker(&self) -> io::Result<Kicker> {
        Kicker::map(borrowed(&self.fd))
    }

    /// The ring of dirty pages of this vCPU; take it once, since each has its own place in it.
    ///
    /// # Errors
    /// `Unsupported` when the machine was made without rings; otherwise what `mmap(2)` answers.
    pub fn dirty_ring(&self) -> io::Result<DirtyRing> {
        match self.machine.dirty_mode() {
            DirtyMode::Ring { entries } => DirtyRing::map(borrowed(&self.fd), entries),
            DirtyMode::None | DirtyMode::Log { .. } => {
                Err(io::Error::new(io::ErrorKind::Unsupported, "the machine was made without dirty rings"))
            }
        }
    }

    /// Reads the xsave area; its length is the machine's, 4 KiB or more (api.rst 4.42, 4.134).
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn xsave(&self) -> io::Result<Vec<u8>> {
        let mut area = vec![0u8; self.machine.xsave_bytes()];
        let request = if area.len() > size_of::<kvm_xsave>() { KVM_GET_XSAVE2() } else { KVM_GET_XSAVE() };
        // SAFETY: KVM_GET_XSAVE writes sizeof(kvm_xsave) = 4096 bytes, KVM_GET_XSAVE2 as many as KVM_CAP_XSAVE2 tells; the
        // buffer has that many, and bytes need no alignment since the kernel copies.
        answered(unsafe { ioctl_with_mut_ptr(&self.fd, request, area.as_mut_ptr()) })?;
        Ok(area)
    }

    /// Writes the xsave area (api.rst 4.43).
    ///
    /// # Errors
    /// `InvalidInput` when it is not as long as this host's; otherwise what the kernel answers.
    pub fn set_xsave(&self, area: &[u8]) -> io::Result<()> {
        let expected = self.machine.xsave_bytes();
        if area.len() != expected {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("an xsave area of {} bytes, where this host's has {expected}", area.len()),
            ));
        }
        // SAFETY: the kernel reads as many bytes as KVM_CAP_XSAVE2 tells (4096 without it), checked just above.
        answered(unsafe { ioctl_with_ptr(&self.fd, KVM_SET_XSAVE(), area.as_ptr()) })
    }
}

fn borrowed(fd: &VcpuFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as the VcpuFd that the result borrows.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

/// Sets a vCPU's `immediate_exit` from another thread.
///
/// The order that leaves no gap: `set(true)`, then a signal to the vCPU's thread. A thread that has not entered the guest
/// yet leaves at once because of the flag; one that has is interrupted by the signal (api.rst 5, `immediate_exit`).
#[derive(Debug)]
pub struct Kicker {
    /// A mapping of our own of the vCPU's shared page, so that it may outlive the vCPU.
    page: NonNull<kvm_run>,
}

// SAFETY: the only access through it is one atomic byte.
unsafe impl Send for Kicker {}
// SAFETY: as above.
unsafe impl Sync for Kicker {}

impl Kicker {
    fn map(vcpu: BorrowedFd<'_>) -> io::Result<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let page =
            unsafe { mmap(std::ptr::null_mut(), PAGE_SIZE as usize, access, MapFlags::SHARED, vcpu, 0) }?;
        Ok(Self { page: NonNull::new(page.cast()).ok_or(rustix::io::Errno::NOMEM)? })
    }

    /// While set, [`Vcpu::run`] finishes what is pending and answers `EINTR` without running the guest.
    pub fn set(&self, exit: bool) {
        // SAFETY: `immediate_exit` is the second byte of the page that is mapped while `self` lives; the kernel only reads it.
        let flag = unsafe { AtomicU8::from_ptr(&raw mut (*self.page.as_ptr()).immediate_exit) };
        flag.store(u8::from(exit), Ordering::SeqCst);
    }
}

impl Drop for Kicker {
    fn drop(&mut self) {
        // SAFETY: mapped by us, and no reference into it outlives `set`.
        let unmapped = unsafe { munmap(self.page.as_ptr().cast(), PAGE_SIZE as usize) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping");
    }
}

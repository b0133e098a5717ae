//! Memory that a device may read or write.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use super::abi;
use super::device::Context;
use super::error::VerbsError;
use super::work::Segment;
use crate::sys::mapping::Mapping;

/// What belongs together: a queue pair reaches only memory of its own domain. A remote key dies with it.
pub struct ProtectionDomain {
    pub(super) context: Arc<Context>,
    pub(super) raw: NonNull<abi::Pd>,
}

// SAFETY: libibverbs may be called from any thread, and locks where it has to.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as above.
unsafe impl Sync for ProtectionDomain {}

impl std::fmt::Debug for ProtectionDomain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "protection domain of {:?}", self.context)
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: what was made in it held it, and is gone. Should the device refuse, closing it ends the domain.
        unsafe { (self.context.library.dealloc_pd)(self.raw.as_ptr()) };
    }
}

/// Who may do what with registered memory. Nobody reads it from afar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The device reads it, to send it.
    LocalRead,
    /// The device writes it too, to receive into it.
    LocalWrite,
    /// Whoever has its key writes it, through a queue pair of the domain.
    RemoteWrite,
}

impl Access {
    /// `enum ibv_access_flags`; remote write needs local write (ibv_reg_mr(3)).
    fn flags(self) -> u32 {
        match self {
            Self::LocalRead => 0,
            Self::LocalWrite => abi::IBV_ACCESS_LOCAL_WRITE,
            Self::RemoteWrite => abi::IBV_ACCESS_LOCAL_WRITE | abi::IBV_ACCESS_REMOTE_WRITE,
        }
    }
}

/// Where registered memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residence {
    /// In memory, locked.
    Locked,
    /// Where the kernel likes; the device faults it in. For devices that can ([`super::DeviceLimits::on_demand_paging`]).
    OnDemand,
}

impl Residence {
    fn flag(self) -> u32 {
        match self {
            Self::Locked => 0,
            Self::OnDemand => abi::IBV_ACCESS_ON_DEMAND,
        }
    }
}

impl ProtectionDomain {
    /// A new domain of a device: ibv_alloc_pd(3).
    ///
    /// # Errors
    /// [`VerbsError::ProtectionDomain`].
    pub fn new(context: &Arc<Context>) -> Result<Arc<Self>, VerbsError> {
        // SAFETY: the context is open.
        let raw = NonNull::new(unsafe { (context.library.alloc_pd)(context.raw.as_ptr()) })
            .ok_or_else(|| VerbsError::ProtectionDomain(io::Error::last_os_error()))?;
        Ok(Arc::new(Self { context: Arc::clone(context), raw }))
    }

    /// Registers a range of guest RAM, which lies in one of the mappings: ibv_reg_mr(3). Locked, it becomes resident and stays so until the region is dropped; where it
    /// was not, that takes as long as touching it.
    ///
    /// # Errors
    /// [`VerbsError::OutOfRange`] or [`VerbsError::Register`].
    ///
    /// # Panics
    /// If there is no such mapping.
    pub fn register(
        self: &Arc<Self>,
        mappings: &Arc<[Mapping]>,
        which: usize,
        offset: u64,
        bytes: u64,
        access: Access,
        residence: Residence,
    ) -> Result<MemoryRegion, VerbsError> {
        let mapping = &mappings[which];
        if offset.checked_add(bytes).is_none_or(|end| end > mapping.bytes()) {
            return Err(VerbsError::OutOfRange { offset, bytes, of: mapping.bytes() });
        }
        let start = mapping.range(offset, bytes);
        let length = usize::try_from(bytes).map_err(|_| VerbsError::OutOfRange {
            offset,
            bytes,
            of: mapping.bytes(),
        })?;
        // SAFETY: the range is mapped, and stays so: the region keeps the mapping until it is deregistered. The device's
        // accesses are like the guest's, to memory that has no Rust reference.
        let raw = unsafe {
            (self.context.library.reg_mr)(
                self.raw.as_ptr(),
                start.cast(),
                length,
                (access.flags() | residence.flag()) as i32,
            )
        };
        let raw = NonNull::new(raw)
            .ok_or_else(|| VerbsError::Register { bytes, source: io::Error::last_os_error() })?;
        let address = mapping.address() + offset;
        Ok(MemoryRegion { domain: Arc::clone(self), mappings: Arc::clone(mappings), raw, address, bytes })
    }
}

/// A registered range of a mapping. Dropping it takes it from the device; work on it that is under way fails.
pub struct MemoryRegion {
    domain: Arc<ProtectionDomain>,
    /// Kept mapped.
    mappings: Arc<[Mapping]>,
    raw: NonNull<abi::Mr>,
    address: u64,
    bytes: u64,
}

// SAFETY: libibverbs may be called from any thread, and locks where it has to.
unsafe impl Send for MemoryRegion {}
// SAFETY: as above.
unsafe impl Sync for MemoryRegion {}

impl std::fmt::Debug for MemoryRegion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x} bytes at {:#x} of {:?}", self.bytes, self.address(), self.domain)
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        // SAFETY: it is registered, and this is the only time that it is taken away.
        let answer = unsafe { (self.domain.context.library.dereg_mr)(self.raw.as_ptr()) };
        if answer != 0 {
            // The device still has it: the memory must stay for as long as the process lives.
            std::mem::forget(Arc::clone(&self.mappings));
        }
    }
}

impl MemoryRegion {
    /// The address of its first byte, by which a peer names it.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The key by which a peer may write it, if it was registered so.
    #[must_use]
    pub fn remote_key(&self) -> u32 {
        // SAFETY: the library keeps the structure until the region is deregistered.
        unsafe { (*self.raw.as_ptr()).rkey }
    }

    /// A part of it, for a work request.
    ///
    /// # Errors
    /// [`VerbsError::OutOfRange`].
    pub fn segment(&self, offset: u64, bytes: u32) -> Result<Segment, VerbsError> {
        let (length, of) = (u64::from(bytes), self.bytes);
        if offset.checked_add(length).is_none_or(|end| end > of) {
            return Err(VerbsError::OutOfRange { offset, bytes: length, of });
        }
        // SAFETY: as above.
        let key = unsafe { (*self.raw.as_ptr()).lkey };
        Ok(Segment { address: self.address + offset, bytes, key })
    }
}

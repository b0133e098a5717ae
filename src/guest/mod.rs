//! What a migration needs of a hypervisor, and the adapters that give it. A new hypervisor is one file or folder here.

#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
pub mod kvm;
pub mod process;
pub mod program;
pub mod qemu;

use std::io;
use std::time::Duration;

use crate::dirty::DirtyTracker;
use crate::memory::GuestMemory;

/// A guest that can be migrated: the interface between pageferry and a VMM.
///
/// Threads that run the guest are to have names that begin with `guest-`: their CPU time is not the migration's
/// ([`crate::engine::cpu::GUEST_THREAD_PREFIX`]). Every method is called from one thread at a time. None has a default body: a hypervisor that forgets one does not
/// compile.
pub trait Guest: Send {
    /// The guest's RAM. Called once per migration; the handle keeps the memory mapped.
    fn memory(&self) -> GuestMemory;

    /// A tracker for that RAM, not started.
    ///
    /// # Errors
    /// [`GuestError`] naming why dirty pages cannot be tracked here.
    fn dirty_tracker(&mut self) -> Result<Box<dyn DirtyTracker>, GuestError>;

    /// What the destination needs in order to make a skeleton of this guest before any page arrives: machine
    /// configuration, CPUID. At most [`MAX_CONFIG_BYTES`].
    ///
    /// # Errors
    /// [`GuestError`] when it cannot be read.
    fn config(&self) -> Result<Vec<u8>, GuestError>;

    /// Which pages may hold something other than zero: every other page is neither read nor sent.
    ///
    /// # Errors
    /// [`GuestError`] when the kernel does not tell.
    fn touched(&self) -> Result<crate::pageset::PageSet, GuestError>;

    /// Stops every vCPU; when it returns none executes another instruction, and the memory no longer changes.
    ///
    /// # Errors
    /// [`GuestError`]; the guest is then in the state that it was in.
    fn pause(&mut self) -> Result<(), GuestError>;

    /// Lets every vCPU run. A guest that runs already is left alone.
    ///
    /// # Errors
    /// [`GuestError`]; no vCPU runs then.
    fn resume(&mut self) -> Result<(), GuestError>;

    /// CPU and device state of the paused guest, versioned. At most [`MAX_STATE_BYTES`].
    ///
    /// # Errors
    /// [`GuestError`]; the guest stays paused and whole.
    fn save_state(&mut self) -> Result<Vec<u8>, GuestError>;

    /// Puts CPU and device state into a paused guest whose memory is in place. `stopped_for` is how long the guest has not
    /// run, by both hosts' clocks as far as they can be trusted: what its wall clock has to be moved on by.
    ///
    /// # Errors
    /// [`GuestError`] naming the part that does not fit.
    fn load_state(&mut self, state: &[u8], stopped_for: Duration) -> Result<(), GuestError>;

    /// Takes `percent` (0 to 99) of the vCPUs' time from the guest, so that it dirties less. 0 gives all back.
    ///
    /// # Errors
    /// [`GuestError`] when the vCPUs cannot be throttled.
    fn throttle(&mut self, percent: u8) -> Result<(), GuestError>;
}

impl<G: Guest + ?Sized> Guest for Box<G> {
    fn memory(&self) -> GuestMemory {
        (**self).memory()
    }

    fn dirty_tracker(&mut self) -> Result<Box<dyn DirtyTracker>, GuestError> {
        (**self).dirty_tracker()
    }

    fn config(&self) -> Result<Vec<u8>, GuestError> {
        (**self).config()
    }

    fn touched(&self) -> Result<crate::pageset::PageSet, GuestError> {
        (**self).touched()
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        (**self).pause()
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        (**self).resume()
    }

    fn save_state(&mut self) -> Result<Vec<u8>, GuestError> {
        (**self).save_state()
    }

    fn load_state(&mut self, state: &[u8], stopped_for: Duration) -> Result<(), GuestError> {
        (**self).load_state(state, stopped_for)
    }

    fn throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        (**self).throttle(percent)
    }
}

/// The largest guest configuration, in bytes: several times the largest CPUID table with every memory slot named.
pub const MAX_CONFIG_BYTES: usize = 1 << 20;
/// The largest CPU and device state, in bytes. A vCPU's is below 32 KiB (xsave with AMX tiles is the largest part).
pub const MAX_STATE_BYTES: usize = 64 << 20;

/// The version of what the adapters here say of a guest, configuration and state alike: what this program writes.
pub const STATE_VERSION: u32 = 1;
/// The oldest version that they read.
pub const OLDEST_STATE_VERSION: u32 = 1;

/// Why a guest that was started elsewhere cannot run on this host's processor.
#[derive(Debug, thiserror::Error)]
pub enum ProcessorError {
    /// What is said of the guest cannot be understood or believed.
    #[error(transparent)]
    Config(GuestError),
    /// This host's processor cannot be asked.
    #[error(transparent)]
    Host(GuestError),
    /// It is of another vendor, or lacks features, each of them named.
    #[error(transparent)]
    Unfit(GuestError),
}

/// Why a guest could not do what was asked: the operation in words, and the cause.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct GuestError {
    /// What was tried, and what to do about it where that is known.
    pub what: String,
    /// What the kernel or a library answered.
    #[source]
    pub cause: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl GuestError {
    /// An error that has no cause below it.
    #[must_use]
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), cause: None }
    }

    /// An error with what lies below it.
    #[must_use]
    pub fn caused(
        what: impl Into<String>,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { what: what.into(), cause: Some(cause.into()) }
    }
}

impl From<io::Error> for GuestError {
    fn from(cause: io::Error) -> Self {
        Self::caused("a system call for the guest failed", cause)
    }
}

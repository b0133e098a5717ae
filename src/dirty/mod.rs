//! Where dirty pages come from. A new source is one file here and one line in [`TrackerKind`].

#[cfg(feature = "kvm")]
pub mod kvm_log;
#[cfg(feature = "kvm")]
pub mod kvm_ring;
pub mod pagemap;
pub mod synthetic;

use std::io;

use crate::pageset::PageSet;

/// Tells which pages the guest wrote since it was last asked.
///
/// The order that makes pre-copy right: `start`, then for each round `drain` *before* the round's pages are read. A page
/// that is written after the drain is told by the next one, so a torn or stale copy is always sent again.
pub trait DirtyTracker: Send {
    /// Begins to track. Pages written before this call are not told.
    ///
    /// # Errors
    /// What the kernel answers.
    fn start(&mut self) -> io::Result<()>;

    /// Adds every page written since `start` or the last drain to `dirty`, and tracks it anew. What was drained is owed
    /// by the caller: it is told only once. On an error pages may have been added already; none is lost.
    ///
    /// # Errors
    /// What the kernel answers.
    fn drain(&mut self, dirty: &mut PageSet) -> io::Result<()>;

    /// Ends tracking and its cost to the guest. Idempotent.
    ///
    /// # Errors
    /// What the kernel answers.
    fn stop(&mut self) -> io::Result<()>;

    /// Which source it is.
    fn kind(&self) -> TrackerKind;
}

/// The sources of dirty pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrackerKind {
    /// KVM's dirty bitmap, cleared by hand (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`).
    Log,
    /// KVM's dirty ring (`KVM_CAP_DIRTY_LOG_RING`).
    Ring,
    /// `PAGEMAP_SCAN` over memory that userfaultfd write-protects asynchronously.
    Pagemap,
    /// Told by a program, for tests.
    Synthetic,
}

impl TrackerKind {
    /// The word for it on the command line, in JSON and in the host file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Log => "log",
            Self::Ring => "ring",
            Self::Pagemap => "pagemap",
            Self::Synthetic => "synthetic",
        }
    }
}

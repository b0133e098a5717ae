//! Asking a migration to stop, from another thread; or telling it what it would find out by waiting.

use crossbeam_channel::{Receiver, Sender, bounded, never};

/// Cancels; any number of times, from any thread.
#[derive(Clone, Debug)]
pub struct CancelHandle(Sender<()>);

/// The migration's end of it.
#[derive(Clone, Debug)]
pub struct CancelSignal(pub(super) Receiver<()>);

/// A handle and the signal that goes into the options of one migration.
#[must_use]
pub fn cancel_pair() -> (CancelHandle, CancelSignal) {
    let (sender, receiver) = bounded(1);
    (CancelHandle(sender), CancelSignal(receiver))
}

impl CancelHandle {
    /// Asks the migration to stop. It has no effect once the guest may run at the destination.
    pub fn cancel(&self) {
        // A full channel has been asked already; a closed one has ended.
        let _ = self.0.try_send(());
    }
}

impl CancelSignal {
    /// What to wait on, beside other things.
    #[must_use]
    pub fn receiver(&self) -> &Receiver<()> {
        &self.0
    }
}

/// Tells a source that the destination's process has ended; from any thread.
#[derive(Clone, Debug)]
pub struct PeerGoneHandle(Sender<String>);

/// The source's end of it.
#[derive(Clone, Debug)]
pub struct PeerGoneSignal(pub(super) Receiver<String>);

/// A handle and the signal that goes into the options of one migration.
#[must_use]
pub fn peer_gone_pair() -> (PeerGoneHandle, PeerGoneSignal) {
    let (sender, receiver) = bounded(1);
    (PeerGoneHandle(sender), PeerGoneSignal(receiver))
}

impl PeerGoneHandle {
    /// The connection counts as lost from now on: before the commit the guest goes on here, after it the journal there is asked.
    pub fn tell(&self, why: &str) {
        // Once is enough.
        let _ = self.0.try_send(why.to_owned());
    }
}

impl Default for PeerGoneSignal {
    /// A signal that never comes.
    fn default() -> Self {
        Self(never())
    }
}

impl Default for CancelSignal {
    /// A signal that never comes.
    fn default() -> Self {
        Self(never())
    }
}

//! Many channels as one: pages placed in rounds, barriers, loss of a channel, and a control link beside them.
//!
//! At the source, [`source::SourceSession`] opens data channels over the given paths and places rounds of pages, and
//! [`control::ControlLink`] carries messages. At the destination, [`listener::Listener`] takes connections and leads each
//! to the [`destination::DestinationSession`] or the control link that it belongs to. What decides is in modules without
//! I/O ([`striping`], [`control_state`], [`pace`], [`mode`]); the others own sockets and threads.

pub mod caps;
pub mod control;
pub mod control_state;
pub mod destination;
pub mod encryption;
mod error;
pub mod handshake;
pub mod listener;
pub mod mode;
pub mod pace;
pub mod path;
pub mod rdma;
pub mod report;
pub mod source;
mod stream;
pub mod striping;
pub mod trust;
mod worker;
mod written;

pub use control::{ControlLink, ControlOptions, LinkEvent, Opening};
pub use destination::{DestinationEvent, DestinationSession, DestinationStats};
pub use encryption::{Encryption, EncryptionPolicy};
pub use error::SessionError;
pub use handshake::query;
pub use listener::{
    Listener, ListenerEvent, ListenerOptions, ListenerStats, PendingLink, QueryConnection, admits,
};
pub use mode::{Capabilities, Resolved, TransferMode};
pub use path::Path;
pub use rdma::{RdmaSupport, RdmaTuning};
pub use report::{Carrier, ChannelStats, RoundStats, SessionEvent, SessionStats};
pub use source::timing::{Latencies, SourceTimes, TimeSplit};
pub use source::{SourceOptions, SourceSession};

pub use crate::channel::chain;
pub use crate::wire::{OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION};

/// Starts a named thread.
fn spawn(
    name: &str,
    run: impl FnOnce() + Send + 'static,
) -> Result<std::thread::JoinHandle<()>, SessionError> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(run)
        .map_err(|cause| SessionError::Thread { what: name.to_owned(), cause })
}

/// Locks; a thread that panicked while it had the lock left counters and queues whole, for none of them is changed in steps
/// that could panic.
fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests;

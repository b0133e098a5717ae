//! What can go wrong on an RDMA channel.

use std::sync::Arc;

use super::Reason;
use crate::sys::verbs::{Status, VerbsError};
use crate::wire::rdma::RdmaFrameError;

/// Why RDMA carries nothing here, or not any more. TCP may.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RdmaError {
    /// This host has none on that path.
    #[error("this host: {0}")]
    Absent(Reason),
    /// The destination does not take it.
    #[error("the destination: {0}")]
    Refused(String),
    /// A device does not do what it should.
    #[error("the RDMA device {device} cannot be used")]
    Device {
        /// Its name.
        device: String,
        /// What it says.
        #[source]
        cause: Arc<VerbsError>,
    },
    /// The device is being taken away.
    #[error("the RDMA device {0} was taken away")]
    Gone(String),
    /// A request failed, and with it the queue pair.
    #[error("the RDMA queue pair failed: {0}")]
    Work(Status),
    /// The queue pair connects, and nothing comes back over it.
    #[error(
        "no packet of RDMA was answered within {seconds} s; between the hosts UDP port 4791 has to be open, which is RoCE's"
    )]
    Silent {
        /// How long was waited.
        seconds: u64,
    },
    /// Guest RAM of this host cannot be registered.
    #[error("guest memory cannot be registered here")]
    Register(#[source] Arc<VerbsError>),
    /// Guest RAM of the destination cannot be registered.
    #[error("guest memory cannot be registered at the destination: {0}")]
    NoKey(String),
    /// Registering takes too long.
    #[error("{what} did not come within {seconds} s")]
    Late {
        /// What was waited for.
        what: &'static str,
        /// How long.
        seconds: u64,
    },
    /// The peer said what cannot be.
    #[error("the peer's message about RDMA is wrong")]
    Frame(#[from] RdmaFrameError),
    /// The peer cuts the guest's memory as this side cannot.
    #[error("the peer registers guest memory in pieces of {0} bytes, which do not fit this guest")]
    Pieces(u64),
    /// The session ended meanwhile.
    #[error("the session has ended")]
    Ended,
}

impl RdmaError {
    /// Whether the peer broke the protocol.
    #[must_use]
    pub fn is_violation(&self) -> bool {
        matches!(self, Self::Frame(_) | Self::Pieces(_))
    }

    pub(super) fn device(device: &str) -> impl FnOnce(VerbsError) -> Self {
        let device = device.to_owned();
        move |cause| Self::Device { device, cause: Arc::new(cause) }
    }
}

//! How a move or an arrival ended, as the process tells it.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::GuestSeen;
use crate::host::api::migration::RdmaPort;
use crate::session::mode::TransferMode;

/// RAM at the pause.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ram {
    /// Digest of every page that is not zero.
    pub digest: String,
    /// Whether the guest stood still for it.
    pub in_the_pause: bool,
}

/// One channel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MovedChannel {
    /// This end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// The interface here.
    pub interface: Option<String>,
    /// The RDMA port that carried its pages, if one did.
    #[serde(default)]
    pub rdma: Option<RdmaPort>,
    /// Whether its pages were encrypted on their way.
    #[serde(default)]
    pub encrypted: bool,
    /// Bytes carried.
    pub bytes: u64,
    /// Whether it was lost on the way.
    #[serde(default)]
    pub lost: bool,
}

/// One round.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MovedRound {
    /// Pages placed.
    pub pages: u64,
    /// Bytes of guest memory that travelled.
    pub bytes: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// How long it took.
    pub seconds: f64,
    /// Pages dirtied meanwhile.
    pub dirtied: u64,
}

/// How a move ended at the source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Moved {
    /// `completed`, `rolled_back` or `in_doubt`.
    pub outcome: String,
    /// Why it did not complete.
    pub cause: Option<String>,
    /// The mode that was used.
    pub mode_used: TransferMode,
    /// Why.
    pub mode_reason: String,
    /// Every channel.
    pub channels: Vec<MovedChannel>,
    /// Every round.
    pub rounds: Vec<MovedRound>,
    /// All RAM.
    pub memory_bytes: u64,
    /// RAM in use.
    pub touched_bytes: u64,
    /// From begin to end, in seconds.
    pub total_seconds: f64,
    /// From the pause on, in seconds; 0 without a pause.
    pub paused_seconds: f64,
    /// What the pause went into, in order: what was done, and the seconds.
    #[serde(default)]
    pub downtime_parts: Vec<(String, f64)>,
    /// How much vCPU time was taken from the guest at most, in percent.
    #[serde(default)]
    pub throttle: u8,
    /// CPU seconds of the migration here.
    pub cpu_seconds: f64,
    /// RAM at the pause.
    pub ram: Option<Ram>,
    /// What the guest had seen when the move began.
    pub guest_before: GuestSeen,
    /// What it had seen at the end here.
    pub guest_after: GuestSeen,
    /// What an operator should know.
    pub warnings: Vec<String>,
}

/// How a move ended at the destination.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Arrived {
    /// Whether the guest runs here.
    pub running: bool,
    /// Why not.
    pub cause: Option<String>,
    /// Whether that is not known: it is complete here and was given to nobody as far as this end has heard. Only of a QEMU's guest.
    #[serde(default)]
    pub in_doubt: bool,
    /// From the guest's last instruction there to its first here, in seconds.
    pub downtime_seconds: f64,
    /// CPU seconds of the migration here.
    pub cpu_seconds: f64,
    /// RAM at the pause.
    pub ram: Option<Ram>,
    /// What an operator should know.
    pub warnings: Vec<String>,
}

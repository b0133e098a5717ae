//! What an engine tells while it runs and when it has ended.

use std::net::SocketAddr;
use std::time::Duration;

use crate::memory::snapshot::MemoryDigest;
use crate::migration::convergence::RoundRecord;
use crate::migration::handover::{Arrival, Outcome};
use crate::migration::source::PhaseName;
use crate::session::Carrier;
use crate::session::mode::TransferMode;
use crate::units::RoundId;
use crate::wire::preamble::MigrationId;

/// Where a migration stands, for a progress line.
#[derive(Clone, Debug)]
pub struct Progress {
    /// Which phase.
    pub phase: PhaseName,
    /// How memory travels.
    pub mode: TransferMode,
    /// Interfaces of the live channels, each once.
    pub interfaces: Vec<String>,
    /// Each path, in the order of the options.
    pub links: Vec<LinkSeen>,
    /// Rounds that are over.
    pub rounds: Vec<RoundRecord>,
    /// The round under way.
    pub round: RoundId,
    /// Guest memory placed per second, lately.
    pub bytes_per_second: u64,
    /// Guest memory of this round that is not placed yet.
    pub remaining_bytes: u64,
    /// How long the guest would be stopped if it were stopped now.
    pub expected_downtime: Option<Duration>,
    /// What is not as it should be: a lost channel, no convergence, throttling.
    pub note: Option<String>,
}

/// How a path takes part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkSeen {
    /// The interface at this end.
    pub interface: Option<String>,
    /// Where the destination listens on it.
    pub destination: SocketAddr,
    /// Channels over it that live.
    pub channels: u32,
    /// Bytes over it so far, headers included.
    pub bytes: u64,
    /// Bytes over it per second, lately.
    pub bytes_per_second: u64,
    /// Whether it is of use.
    pub state: LinkState,
}

/// Whether a path is of use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkState {
    /// It is.
    Up,
    /// The interface has no carrier, or was taken down.
    Down,
    /// Its channels are lost, and are being tried again.
    Lost,
}

impl LinkState {
    /// The word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
            Self::Lost => "lost",
        }
    }
}

/// One connection of a migration.
#[derive(Clone, Debug)]
pub struct ChannelRecord {
    /// This end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// The interface at this end.
    pub interface: Option<String>,
    /// What carried its pages.
    pub carrier: Carrier,
    /// Bytes that it carried.
    pub bytes: u64,
    /// Whether it was lost on the way.
    pub lost: bool,
}

/// RAM at the pause, as one end saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamDigest {
    /// The digest.
    pub digest: MemoryDigest,
    /// Whether the guest had to stay paused for it, which is then part of the downtime.
    pub in_the_pause: bool,
}

/// How a migration went, as the source saw it.
#[derive(Clone, Debug)]
pub struct SourceReport {
    /// Which migration.
    pub migration: MigrationId,
    /// How it ended.
    pub outcome: Outcome,
    /// The mode that was asked for.
    pub mode_requested: TransferMode,
    /// The mode that was used.
    pub mode_used: TransferMode,
    /// Why that one.
    pub mode_reason: String,
    /// Every channel that there was.
    pub channels: Vec<ChannelRecord>,
    /// Every round, the last one with the guest stopped.
    pub rounds: Vec<RoundRecord>,
    /// All guest RAM, in bytes.
    pub memory_bytes: u64,
    /// What of it may hold something other than zero.
    pub touched_bytes: u64,
    /// From the first connection to the end.
    pub total: Duration,
    /// From the pause to the end of the handover, by this host's clock. Zero when the guest was not paused.
    pub paused: Duration,
    /// What that time went into, in order.
    pub downtime_parts: Vec<(&'static str, Duration)>,
    /// CPU time of the migration at this end, without the guest's.
    pub cpu: Duration,
    /// How much vCPU time was taken from the guest at most, in percent.
    pub throttle: u8,
    /// RAM at the pause, when it was asked for and the guest has moved.
    pub ram: Option<RamDigest>,
    /// What an operator should know.
    pub warnings: Vec<String>,
}

/// How a migration went, as the destination saw it.
#[derive(Clone, Debug)]
pub struct DestinationReport {
    /// Which migration.
    pub migration: MigrationId,
    /// What the guest is called.
    pub name: String,
    /// How it ended.
    pub arrival: Arrival,
    /// From the guest's last instruction at the source to its first here, by both hosts' clocks.
    pub downtime: Duration,
    /// CPU time of the migration at this end, without the guest's.
    pub cpu: Duration,
    /// RAM at the pause, when it was asked for and the guest has arrived.
    pub ram: Option<RamDigest>,
    /// What an operator should know.
    pub warnings: Vec<String>,
}

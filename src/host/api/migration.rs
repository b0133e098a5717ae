//! Migrations: asked for, under way, and as the history keeps them.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::check::{Check, PathInfo};
use crate::migration::convergence::OnNoConvergence;
use crate::session::Carrier;
use crate::session::mode::TransferMode;

/// A migration to be done. What is not said here is taken from the host file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// The destination: a name of the host file's `peers`, a host name, or an address; with or without a port.
    pub to: String,
    /// `tcp`, `compression`, `rdma` or `auto`.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub mode: Option<TransferMode>,
    /// Connections per path.
    #[serde(default)]
    pub channels_per_path: Option<u16>,
    /// The longest downtime aimed at, in milliseconds.
    #[serde(default)]
    pub downtime_limit_ms: Option<u64>,
    /// The most rounds.
    #[serde(default)]
    pub max_rounds: Option<u32>,
    /// What happens when the guest does not converge: `cancel`, `switch` or `throttle`.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub on_no_convergence: Option<OnNoConvergence>,
    /// The most that this migration may send, in bytes a second.
    #[serde(default)]
    pub bandwidth_cap: Option<u64>,
    /// Whether to wait for a free slot on both hosts; without it the request is refused when there is none.
    #[serde(default)]
    pub wait: bool,
    /// Whether RAM at the pause is compared with the destination's; it costs some milliseconds of downtime.
    #[serde(default)]
    pub verify: bool,
    /// The QEMU that waits at the destination, for a guest that a QEMU has here: `qemu:` and the path of its QMP socket there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incoming: Option<String>,
    /// What is to go wrong in the process at the source, for tests; refused unless the daemon was started for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_fault: Option<String>,
    /// The same at the destination.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_fault: Option<String>,
}

/// Which way a guest moves, seen from this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Away from here.
    Outgoing,
    /// To here.
    Incoming,
}

impl Direction {
    /// The word for it in JSON and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Outgoing => "outgoing",
            Self::Incoming => "incoming",
        }
    }
}

/// How far a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MigrationState {
    /// For a slot on this host or the other.
    Waiting,
    /// Before anything moves.
    Checking,
    /// Under way; the progress says more.
    Running,
    /// The guest runs at the destination.
    Completed,
    /// The guest did not move: it runs at the source.
    RolledBack,
    /// It is not known where the guest may run; the destination is being asked.
    InDoubt,
    /// The guest is at neither host: the process that held it was killed at the wrong moment, or its host went down.
    Lost,
}

impl MigrationState {
    /// Whether nothing more happens.
    #[must_use]
    pub fn is_over(self) -> bool {
        matches!(self, Self::Completed | Self::RolledBack | Self::Lost)
    }

    /// The word for it in JSON and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Checking => "checking",
            Self::Running => "running",
            Self::Completed => "completed",
            Self::RolledBack => "rolled_back",
            Self::InDoubt => "in_doubt",
            Self::Lost => "lost",
        }
    }
}

/// How one interface takes part.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LinkProgress {
    /// Its name at this host; empty where the address belongs to none.
    pub interface: String,
    /// Connections over it that live.
    pub channels: u32,
    /// Bytes on the wire a second, lately.
    pub bytes_per_second: u64,
    /// Bytes on the wire so far.
    pub bytes: u64,
    /// `up`, `down`, or `lost` (its connections are lost and are being tried again).
    pub state: String,
}

/// Where a migration stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MigrationProgress {
    /// `set-up`, `pre-copy`, `stop-and-copy`, `handover`, `in-doubt`, `roll-back`, `finished`.
    pub phase: String,
    /// Each interface that was used.
    pub links: Vec<LinkProgress>,
    /// The round under way.
    pub round: u32,
    /// Guest memory placed a second, lately.
    pub bytes_per_second: u64,
    /// Guest memory of this round that is not placed yet.
    pub remaining_bytes: u64,
    /// How long the guest would stand still if it were stopped now.
    pub expected_downtime_seconds: Option<f64>,
    /// What is waited for, why it does not converge, what was lost.
    pub note: Option<String>,
}

/// A sample of a migration's course, for plots: ten in a second at first, fewer the longer it takes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Sample {
    /// Seconds since the migration began.
    pub at: f64,
    /// The phase.
    pub phase: String,
    /// Guest memory of the round that was left.
    pub remaining_bytes: u64,
    /// Bytes on the wire a second, by interface.
    pub rates: BTreeMap<String, u64>,
}

/// One round.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RoundInfo {
    /// Pages placed.
    pub pages: u64,
    /// Guest memory that travelled, zero pages not counted.
    pub bytes: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// How long it took.
    pub seconds: f64,
    /// Pages that the guest dirtied meanwhile.
    pub dirtied: u64,
}

/// What an RDMA channel uses at the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RdmaPort {
    /// The device, such as `mlx5_0`.
    pub device: String,
    /// Its port, from 1.
    pub port: u8,
    /// The address that it uses.
    #[schema(value_type = String)]
    pub gid: Ipv6Addr,
}

impl RdmaPort {
    /// What carries a channel, where that is RDMA.
    #[must_use]
    pub fn of(carrier: &Carrier) -> Option<Self> {
        match carrier {
            Carrier::Tcp | Carrier::Sealed => None,
            Carrier::Rdma { device, port, gid } => {
                Some(Self { device: device.clone(), port: *port, gid: *gid })
            }
        }
    }
}

/// One connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ChannelInfo {
    /// This end.
    pub local: String,
    /// The other end.
    pub remote: String,
    /// The interface at this end.
    pub interface: Option<String>,
    /// The RDMA port that carried its pages; nothing where TCP did.
    #[serde(default)]
    pub rdma: Option<RdmaPort>,
    /// Whether its pages were encrypted on their way.
    #[serde(default)]
    pub encrypted: bool,
    /// Bytes that it carried.
    pub bytes: u64,
    /// Whether it was lost on the way.
    pub lost: bool,
}

/// A part of the time in which the guest stood still.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DowntimePart {
    /// What was done.
    pub name: String,
    /// How long it took.
    pub seconds: f64,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LogLine {
    /// When.
    pub at: f64,
    /// What, as a sentence.
    pub text: String,
}

/// One migration, as this host saw it: the answer to a status request, and the history's record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Migration {
    /// 32 hexadecimal digits, the same at both hosts.
    pub id: String,
    /// The guest's name; of a QEMU's guest `qemu:` and the path of the QMP socket at this host.
    pub guest: String,
    /// `kvm`, `process` or `qemu`.
    pub guest_kind: String,
    /// Which way.
    pub direction: Direction,
    /// The other host's name.
    pub peer: String,
    /// Where the other host's daemon was reached.
    #[serde(default)]
    pub peer_address: Option<String>,
    /// How far it is.
    pub state: MigrationState,
    /// Why it did not complete.
    pub cause: Option<String>,
    /// When it was asked for.
    pub requested_at: f64,
    /// When it left the queue.
    pub started_at: Option<f64>,
    /// When it was over.
    pub ended_at: Option<f64>,
    /// The mode that was asked for.
    #[schema(value_type = String)]
    pub mode_requested: TransferMode,
    /// Where that came from: `request` or `host file` or `default`.
    pub mode_origin: String,
    /// The mode that is used, once it is known.
    #[schema(value_type = Option<String>)]
    pub mode_used: Option<TransferMode>,
    /// Why that one.
    pub mode_reason: Option<String>,
    /// Whether the hosts did not prove who they are (`allow_insecure`).
    pub insecure: bool,
    /// The paths that it uses.
    pub paths: Vec<PathInfo>,
    /// What the checks found that a person should know.
    pub notes: Vec<Check>,
    /// Where it stands.
    pub progress: Option<MigrationProgress>,
    /// Rounds so far; all of them once it is over. Only at the source.
    pub rounds: Vec<RoundInfo>,
    /// Every connection, once it is over. Only at the source.
    pub channels: Vec<ChannelInfo>,
    /// Its course. Only at the source.
    pub samples: Vec<Sample>,
    /// From the guest's last instruction at the source to its first at the destination, by both clocks.
    pub downtime_seconds: Option<f64>,
    /// What was aimed at.
    pub downtime_limit_seconds: f64,
    /// What the downtime went into. Only at the source.
    pub downtime_parts: Vec<DowntimePart>,
    /// From its start to its end.
    pub total_seconds: Option<f64>,
    /// CPU time of the migration at this host, without the guest's.
    pub cpu_seconds: Option<f64>,
    /// All guest RAM.
    pub memory_bytes: u64,
    /// What of it was in use at the beginning.
    pub touched_bytes: Option<u64>,
    /// How much vCPU time was taken from the guest at most, in percent.
    pub throttle_percent: u8,
    /// Digest of RAM at the pause, when it was asked for.
    pub ram_digest: Option<String>,
    /// Whether the destination's RAM at the pause was the same, when that was asked for. Only at the source.
    #[serde(default)]
    pub ram_equal: Option<bool>,
    /// What an operator should know.
    pub warnings: Vec<String>,
    /// What happened, in order.
    pub log: Vec<LogLine>,
}

//! What a process that holds a guest is told and tells: one JSON object a line, commands on its stdin, events on its stdout.
//!
//! Whoever supervises guests speaks it; today that is `pageferry demo`, and it is no stable interface.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::dirty::TrackerKind;
use crate::guest::program::{Program, SelfReport};
use crate::host::demo_options::GuestKind;
use crate::migration::convergence::OnNoConvergence;
use crate::session::mode::TransferMode;

/// What a guest is to be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestSpec {
    /// Which adapter.
    pub kind: GuestKind,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// How much of it the program uses; all, where nothing is said.
    pub touch_bytes: Option<u64>,
    /// vCPUs, or threads of a process guest.
    pub vcpus: u8,
    /// What it does.
    pub program: Program,
    /// How much it dirties, in bytes per second.
    pub dirty_bytes_per_second: u64,
    /// What its choices are drawn from.
    pub seed: u64,
    /// Where dirty pages are learnt from.
    pub tracker: TrackerKind,
}

/// How a guest is to be moved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MoveSpec {
    /// Address pairs; the destination's with its port.
    pub paths: Vec<(Option<IpAddr>, SocketAddr)>,
    /// How many channels.
    pub channels: usize,
    /// The mode that is asked for.
    pub mode: TransferMode,
    /// The longest downtime aimed at, in milliseconds.
    pub downtime_limit_ms: u64,
    /// The most rounds.
    pub max_rounds: u32,
    /// What happens when it does not converge.
    pub on_no_convergence: OnNoConvergence,
    /// How long to ask when in doubt, in milliseconds.
    pub doubt_ms: u64,
}

/// What the process is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Command {
    /// Make this guest and start it.
    Start(GuestSpec),
    /// Wait for a guest, and track its dirty pages with this when it moves on.
    Receive {
        /// `None` is what fits the guest best.
        tracker: Option<TrackerKind>,
    },
    /// Move the guest.
    Move(MoveSpec),
    /// Stop moving or receiving.
    Cancel,
    /// Say what the guest has seen of itself.
    Report,
    /// Have the guest look at every page that it wrote.
    Verify,
    /// Have the guest forget its longest gap.
    ResetGap,
}

/// What the process tells.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// First of all: where it listens.
    Listening {
        /// In the order of the command line.
        addresses: Vec<SocketAddr>,
    },
    /// What became of migrations that an earlier process here left unfinished.
    Recovered {
        /// In words.
        what: String,
        /// Whether the guest runs at its destination.
        completed: bool,
    },
    /// The guest runs and has written everything once.
    Started {
        /// Its memory in use, in bytes.
        touched_bytes: u64,
    },
    /// It waits for a guest.
    Receiving,
    /// Where the move stands.
    Progress(MoveProgress),
    /// The move has ended, as the source sees it.
    Moved(Box<Moved>),
    /// A move that had ended in doubt is settled.
    Settled {
        /// Whether the guest runs here again; else it runs at the destination.
        here: bool,
    },
    /// A guest has arrived, or its arrival has failed.
    Arrived(Box<Arrived>),
    /// Answers [`Command::Report`] and [`Command::Verify`].
    Guest(GuestSeen),
    /// Answers [`Command::ResetGap`].
    GapReset,
    /// A command could not be done.
    Failed {
        /// Why.
        why: String,
    },
}

/// A line of progress.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MoveProgress {
    /// The phase's word.
    pub phase: String,
    /// The mode's word.
    pub mode: String,
    /// Interfaces in use.
    pub interfaces: Vec<String>,
    /// Which round.
    pub round: u32,
    /// Bytes of guest memory per second.
    pub bytes_per_second: u64,
    /// Bytes of this round that are left.
    pub remaining_bytes: u64,
    /// Expected downtime in seconds.
    pub expected_downtime: Option<f64>,
    /// What is not as it should be.
    pub note: Option<String>,
}

/// What a guest has seen of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GuestSeen {
    /// Heartbeats so far.
    pub heartbeats: u64,
    /// Pages written so far.
    pub writes: u64,
    /// Pages found right so far.
    pub verified: u64,
    /// Pages found wrong so far.
    pub corrupt: u64,
    /// The longest time between two looks at the clock, in seconds.
    pub longest_gap: f64,
    /// The wall clock at this report, in seconds since 1970.
    pub at: f64,
}

impl GuestSeen {
    /// A report, stamped with the time.
    #[must_use]
    pub fn now(report: SelfReport) -> Self {
        Self {
            heartbeats: report.heartbeats,
            writes: report.writes,
            verified: report.verified,
            corrupt: report.corrupt,
            longest_gap: report.longest_gap.as_secs_f64(),
            at: crate::engine::wall_clock() as f64 / 1e9,
        }
    }
}

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
    /// Bytes carried.
    pub bytes: u64,
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
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Arrived {
    /// Whether the guest runs here.
    pub running: bool,
    /// Why not.
    pub cause: Option<String>,
    /// From the guest's last instruction there to its first here, in seconds.
    pub downtime_seconds: f64,
    /// CPU seconds of the migration here.
    pub cpu_seconds: f64,
    /// RAM at the pause.
    pub ram: Option<Ram>,
    /// What an operator should know.
    pub warnings: Vec<String>,
}

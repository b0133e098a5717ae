//! What a migration says of itself at its end: one object for programs, one page for people.
//!
//! The fields are described in `docs/json.md`. They are stable: new ones may come, none goes or changes its meaning.

mod text;

use serde::{Serialize, Serializer};

use crate::dirty::TrackerKind;
pub use crate::host::api::migration::RoundInfo as RoundReport;
use crate::host::api::migration::{ChannelInfo, RdmaPort};
use crate::host::demo_options::GuestKind;
use crate::host::exit::Exit;
use crate::session::mode::TransferMode;

/// How a migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ReportedOutcome {
    /// The guest runs at the destination.
    Completed,
    /// The guest runs at the source, or never started.
    RolledBack,
    /// It is not known which host has the right to run the guest.
    InDoubt,
}

/// What the guest found when it verified every page that it ever wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestCheck {
    /// Every page was as the guest left it.
    Ok,
    /// A page was lost, stale or damaged, or the guest was not the one that left.
    Corrupt,
}

/// One connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ChannelReport {
    /// Address and port at the source.
    pub local: String,
    /// Address and port at the destination.
    pub remote: String,
    /// The network interface at the source, where it is known.
    pub interface: Option<String>,
    /// The RDMA port at the source that carried its pages; `null` where TCP did.
    pub rdma: Option<RdmaPort>,
    /// Whether its pages were encrypted on their way.
    pub encrypted: bool,
    /// Bytes that the channel carried, headers included.
    pub bytes: u64,
}

impl ChannelReport {
    fn info(&self) -> ChannelInfo {
        ChannelInfo {
            local: self.local.clone(),
            remote: self.remote.clone(),
            interface: self.interface.clone(),
            rdma: self.rdma.clone(),
            encrypted: self.encrypted,
            bytes: self.bytes,
            lost: false,
        }
    }
}

/// Everything that is told at the end. What is not known, because the migration did not get that far, is `None`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// How it ended.
    pub outcome: ReportedOutcome,
    /// Why it did not complete, with the causes below.
    pub cause: Option<String>,
    /// What moved.
    #[serde(serialize_with = "named")]
    pub guest: GuestKind,
    /// Why it is not a KVM guest, where nobody asked for another.
    pub guest_why: Option<String>,
    /// Where dirty pages were learnt from.
    #[serde(serialize_with = "maybe_named")]
    pub dirty_tracker: Option<TrackerKind>,
    /// The mode that was asked for.
    #[serde(serialize_with = "named")]
    pub mode_requested: TransferMode,
    /// The mode that was used.
    #[serde(serialize_with = "maybe_named")]
    pub mode_used: Option<TransferMode>,
    /// Why it is that one, as a sentence.
    pub mode_reason: Option<String>,
    /// The connections, lost ones included.
    pub channels: Vec<ChannelReport>,
    /// The rounds in order, that with the guest paused last.
    pub rounds: Vec<RoundReport>,
    /// The guest's configured memory.
    pub memory_bytes: u64,
    /// How much of it may have held something other than zero when the migration began.
    pub touched_bytes: u64,
    /// Everything that crossed the network for its memory, over all rounds and channels.
    pub wire_bytes: u64,
    /// From the request to the outcome.
    pub total_seconds: f64,
    /// How long the guest stood still, measured by the guest.
    pub downtime_seconds: Option<f64>,
    /// The same as the hosts saw it: from the pause at the source to the resume at the destination.
    pub downtime_host_seconds: Option<f64>,
    /// How long it was allowed to stand still.
    pub downtime_limit_seconds: f64,
    /// What the placed pages held, divided by the time of the rounds.
    pub throughput_bytes_per_second: f64,
    /// Processor time of the source host process during the migration, without the guest's vCPUs.
    pub source_cpu_seconds: f64,
    /// Processor time of the destination host process.
    pub destination_cpu_seconds: f64,
    /// What the guest found at the destination.
    pub guest_check: Option<GuestCheck>,
    /// Whether both memories were the same, byte for byte, while the guest was paused.
    pub ram_equal: Option<bool>,
    /// How they were compared.
    pub ram_check: Option<String>,
    /// The share of its pace that the guest lost while its memory was copied: 0 is none, 1 is all.
    pub guest_slowdown: Option<f64>,
    /// How often the guest moved; the figures are those of the last move.
    pub moves: u32,
    /// What went wrong without stopping it: a lost channel, an error after the guest ran at the destination.
    pub warnings: Vec<String>,
}

impl Report {
    /// The report as one JSON object on one line.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a report has only string keys and writes to memory")
    }

    /// The code that the process ends with.
    #[must_use]
    pub fn exit(&self) -> Exit {
        let damaged = self.guest_check == Some(GuestCheck::Corrupt) || self.ram_equal == Some(false);
        match self.outcome {
            ReportedOutcome::InDoubt => Exit::InDoubt,
            _ if damaged => Exit::Damaged,
            ReportedOutcome::Completed => Exit::Completed,
            ReportedOutcome::RolledBack => Exit::Failed,
        }
    }
}

/// A value whose word in JSON is its word on the command line.
trait Named {
    fn word(&self) -> &'static str;
}

impl Named for GuestKind {
    fn word(&self) -> &'static str {
        self.name()
    }
}

impl Named for TrackerKind {
    fn word(&self) -> &'static str {
        self.name()
    }
}

impl Named for TransferMode {
    fn word(&self) -> &'static str {
        self.name()
    }
}

fn named<S: Serializer>(value: &impl Named, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(value.word())
}

fn maybe_named<S: Serializer>(value: &Option<impl Named>, serializer: S) -> Result<S::Ok, S::Error> {
    value.as_ref().map(Named::word).serialize(serializer)
}

#[cfg(test)]
mod tests;

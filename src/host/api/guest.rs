//! Guests, as a host knows them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::dirty::TrackerKind;
use crate::guest::program::Program;
use crate::host::demo_options::GuestKind;
use crate::host::holder::protocol::GuestSeen;

/// A guest to be started.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartGuest {
    /// What people call it: letters, digits, `-`, `_` and `.`, at most 64, beginning with a letter or digit.
    pub name: String,
    /// `kvm` or `process`; without it KVM where it opens.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub kind: Option<GuestKind>,
    /// RAM.
    pub memory_bytes: u64,
    /// How much of it the program uses; all, where nothing is said.
    #[serde(default)]
    pub touch_bytes: Option<u64>,
    /// vCPUs, or threads of a process guest.
    pub vcpus: u8,
    /// What it does: `idle`, `uniform`, `hotset` or `stream`.
    #[schema(value_type = String)]
    pub program: Program,
    /// How much it dirties.
    pub dirty_bytes_per_second: u64,
    /// What its choices are drawn from.
    pub seed: u64,
    /// Where dirty pages are learnt from: `log`, `ring`, `pagemap`; without it what fits best.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub tracker: Option<TrackerKind>,
}

/// What a guest is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GuestState {
    /// It is being made, and writes its memory for the first time.
    Starting,
    /// It runs here.
    Running,
    /// It is being moved away; it runs here but for the last instant.
    Moving,
    /// It is on its way here.
    Arriving,
    /// It stands still here, because the destination may run it; the destination is being asked.
    InDoubt,
    /// Its process ended and its memory with it; the note says how.
    Lost,
}

impl GuestState {
    /// The word for it in JSON and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Moving => "moving",
            Self::Arriving => "arriving",
            Self::InDoubt => "in_doubt",
            Self::Lost => "lost",
        }
    }
}

/// A guest of this host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GuestInfo {
    /// What people call it.
    pub name: String,
    /// `kvm`, `process` or `qemu`.
    pub kind: String,
    /// What it is doing.
    pub state: GuestState,
    /// RAM.
    pub memory_bytes: u64,
    /// The process that holds it.
    pub pid: Option<u32>,
    /// When it was started here or arrived.
    pub since: f64,
    /// The host that it came from.
    pub arrived_from: Option<String>,
    /// The migration under way, or that brought or lost it.
    pub migration: Option<String>,
    /// What it has seen of itself, when it was asked and could answer.
    #[schema(value_type = Option<Object>)]
    pub seen: Option<GuestSeen>,
    /// What a person should know.
    pub note: Option<String>,
}

impl GuestInfo {
    /// One of which no more is known yet; `since` in seconds since 1970.
    #[must_use]
    pub fn new(name: &str, kind: &str, state: GuestState, since: f64) -> Self {
        Self {
            name: name.to_owned(),
            kind: kind.to_owned(),
            state,
            memory_bytes: 0,
            pid: None,
            since,
            arrived_from: None,
            migration: None,
            seen: None,
            note: None,
        }
    }
}

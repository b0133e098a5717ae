//! The requests and answers between daemons. Fields are only added, each with a default, so that versions can differ.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::host::api::check::Check;
use crate::host::api::migration::MigrationState;
use crate::host::preflight::{GuestFacts, HostFacts, Versions};
use crate::session::mode::TransferMode;

/// May this guest come?
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckRequest {
    /// The name of the host that asks.
    pub source: String,
    /// What it speaks.
    pub versions: Versions,
    /// The guest.
    pub guest: GuestFacts,
    /// The mode that is asked for.
    pub mode: TransferMode,
}

/// What the destination says to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckAnswer {
    /// What it is.
    pub facts: HostFacts,
    /// What it has checked.
    pub checks: Vec<Check>,
    /// Where it echoes datagrams for some seconds, so that paths can be tried.
    #[serde(default)]
    pub echo: Vec<SocketAddr>,
    /// What those datagrams begin with, 32 hexadecimal digits.
    #[serde(default)]
    pub echo_token: String,
}

/// Take this guest in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdmitRequest {
    /// The migration, 32 hexadecimal digits.
    pub migration: String,
    /// The check that goes before, done once more.
    #[serde(flatten)]
    pub check: CheckRequest,
    /// The destination's addresses that the source will connect to.
    pub listen: Vec<IpAddr>,
    /// Where the source's daemon listens for others.
    #[serde(default)]
    pub port: u16,
    /// Whether RAM at the pause is compared.
    #[serde(default)]
    pub verify: bool,
    /// The downtime that is aimed at, in milliseconds.
    #[serde(default)]
    pub downtime_limit_ms: u64,
    /// What is to go wrong, in tests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
}

/// Whether it is taken in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum AdmitAnswer {
    /// It may come.
    Admitted {
        /// The one-time secret that it begins with, 64 hexadecimal digits.
        secret: String,
        /// Where its process listens.
        addresses: Vec<SocketAddr>,
        /// Where the daemon answers what became of it, when that process has gone.
        answering: Vec<SocketAddr>,
    },
    /// Not now: every slot is taken.
    Busy {
        /// In words.
        why: String,
    },
    /// Not at all.
    Refused {
        /// The checks that failed.
        checks: Vec<Check>,
    },
}

/// The other end of a migration is not to be waited for any more: it gave up before it began, or its process has ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gone {
    /// Whether the guest was in that process, and is lost with it.
    #[serde(default)]
    pub lost: bool,
    /// Why, in words that follow "because".
    #[serde(default)]
    pub cause: String,
}

/// What a host knows of a migration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MigrationAnswer {
    /// How far it is; nothing where this host has never heard of it.
    pub state: Option<MigrationState>,
    /// Why it did not complete.
    #[serde(default)]
    pub cause: Option<String>,
    /// Digest of RAM at the pause, where it was asked for.
    #[serde(default)]
    pub ram_digest: Option<String>,
}

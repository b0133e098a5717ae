//! The outcome of the checks before a migration.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CheckStatus {
    /// Nothing stands in the way.
    Passed,
    /// The migration would not work, or not as it should.
    Failed,
    /// It works; a person should know something all the same.
    Note,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Check {
    /// Its stable name, such as `memory` or `mtu`.
    pub name: String,
    /// How it came out.
    pub status: CheckStatus,
    /// What was found, as a sentence.
    pub finding: String,
    /// What to do about it; with every failed check.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

/// One way from the source to the destination that a migration would use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PathInfo {
    /// The interface at the source.
    pub interface: String,
    /// Its address.
    #[schema(value_type = String)]
    pub source: IpAddr,
    /// The interface at the destination.
    pub peer_interface: String,
    /// Its address.
    #[schema(value_type = String)]
    pub destination: IpAddr,
    /// The slower end's speed in bits a second, where a driver says it.
    pub speed_bits_per_second: Option<u64>,
    /// The smaller MTU of the two ends, in bytes.
    pub mtu: u32,
    /// The cap that the source's host file sets for this network, in bytes a second.
    pub bandwidth_cap: Option<u64>,
    /// Whether the source's host file says that nobody else is on its network.
    #[serde(default)]
    pub isolated: bool,
    /// Whether the destination's does.
    #[serde(default)]
    pub peer_isolated: bool,
}

/// All checks of one migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CheckReport {
    /// Whether no check failed.
    pub ok: bool,
    /// The destination, by the name in its host file; the address that was asked where it did not answer.
    pub destination: String,
    /// Every check, the failed ones too.
    pub checks: Vec<Check>,
    /// The paths that would be used, the preferred first.
    pub paths: Vec<PathInfo>,
}

impl CheckReport {
    /// A report of these checks.
    #[must_use]
    pub fn new(destination: String, checks: Vec<Check>, paths: Vec<PathInfo>) -> Self {
        let ok = checks.iter().all(|check| check.status != CheckStatus::Failed);
        Self { ok, destination, checks, paths }
    }

    /// The checks that failed.
    pub fn failed(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| check.status == CheckStatus::Failed)
    }
}

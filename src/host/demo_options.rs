//! What `pageferry demo` was asked to do, as plain data.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::dirty::TrackerKind;
use crate::guest::program::Program;
use crate::host::quantity::QuantityError;
use crate::migration::convergence::OnNoConvergence;
use crate::session::mode::TransferMode;

/// What moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestKind {
    /// A microVM on `/dev/kvm`.
    Kvm,
    /// The memory of a process.
    Process,
}

impl GuestKind {
    /// The word for it on the command line and in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Process => "process",
        }
    }
}

/// An address at each end that channels connect between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressPair {
    /// The address that the source binds.
    pub source: IpAddr,
    /// The address that the destination listens at.
    pub destination: IpAddr,
}

impl FromStr for AddressPair {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let pair = text.split_once('-').and_then(|(source, destination)| {
            Some(Self { source: source.trim().parse().ok()?, destination: destination.trim().parse().ok()? })
        });
        match pair {
            Some(pair) if pair.source.is_ipv4() == pair.destination.is_ipv4() => Ok(pair),
            _ => Err(QuantityError::Path(text.to_owned())),
        }
    }
}

impl fmt::Display for AddressPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.source, self.destination)
    }
}

/// One demonstration: a guest, and how to move it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DemoOptions {
    /// What moves. `None` is KVM where it opens, else a process.
    pub guest: Option<GuestKind>,
    /// What the guest does.
    pub program: Program,
    /// The guest's memory in bytes: whole pages, not 0.
    pub memory_bytes: u64,
    /// How much of it the program uses; `None` is all.
    pub touch_bytes: Option<u64>,
    /// The guest's vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// How much the guest dirties, in bytes per second.
    pub dirty_bytes_per_second: u64,
    /// How its memory travels.
    pub mode: TransferMode,
    /// How many channels, over all paths together, 1 to [`MAX_CHANNELS`].
    pub channels: usize,
    /// The paths; none means loopback.
    pub paths: Vec<AddressPair>,
    /// How long the guest may stand still.
    pub downtime_limit: Duration,
    /// Where dirty pages are learnt from. `None` is what fits the guest best.
    pub dirty_tracker: Option<TrackerKind>,
    /// What happens when it does not converge.
    pub on_no_convergence: OnNoConvergence,
    /// After how many rounds it counts as not converging.
    pub max_rounds: u32,
    /// How often it moves; odd numbers end at the destination.
    pub moves: u32,
    /// What the guest's choices are drawn from.
    pub seed: u64,
    /// Where the journals are kept. `None` is a directory that goes away with the demonstration.
    pub state_dir: Option<PathBuf>,
    /// What is to go wrong in the process at the source, for tests; see [`crate::engine::fault`].
    pub source_fault: Option<String>,
    /// What is to go wrong in the process at the destination.
    pub destination_fault: Option<String>,
    /// Whether the report goes out as JSON.
    pub json: bool,
    /// Whether more of what happens is logged.
    pub verbose: bool,
}

/// The most vCPUs that the reference microVM has.
pub const MAX_VCPUS: u8 = 4;
/// The most channels of one migration: past a few per path they only cost threads.
pub const MAX_CHANNELS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_pairs_of_both_families() {
        for text in ["127.0.0.1-127.0.0.2", "fe80::1-fe80::2", "::1-::1"] {
            let pair: AddressPair = text.parse().unwrap();
            assert_eq!(pair.to_string(), text);
        }
    }

    #[test]
    fn what_is_no_pair_is_named() {
        for text in
            ["", "-", "127.0.0.1", "127.0.0.1-", "127.0.0.1-::1", "a-b", "127.0.0.1:80-127.0.0.1:81", "1-2-3"]
        {
            let message = text.parse::<AddressPair>().unwrap_err().to_string();
            assert!(message.contains(&format!("{text:?}")), "{message}");
        }
    }
}

//! The checks before anything moves: what a host knows of itself, and what follows from both hosts' facts.

pub mod checks;
pub mod facts;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::host::network::Offer;

/// The versions that a daemon speaks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Versions {
    /// The program's, for people.
    pub program: String,
    /// The oldest version of the migration protocol.
    pub oldest_protocol: u16,
    /// The newest.
    pub newest_protocol: u16,
    /// The version of the guest state that this host writes.
    pub guest_state: u32,
    /// The oldest that it can read.
    pub oldest_guest_state: u32,
}

/// The memory of a host, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemoryFacts {
    /// What the kernel can give without swapping (`MemAvailable`).
    pub available: u64,
    /// What the control group leaves, where one limits the daemon.
    #[serde(default)]
    pub cgroup_left: Option<u64>,
    /// What may be locked (`RLIMIT_MEMLOCK`); nothing where there is no limit or `CAP_IPC_LOCK` lifts it.
    #[serde(default)]
    pub memlock: Option<u64>,
    /// What was promised to guests on their way here and is not in use yet.
    #[serde(default)]
    pub promised: u64,
}

/// What a daemon says of its host when another one asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HostFacts {
    /// Its name.
    pub name: String,
    /// What it speaks.
    pub versions: Versions,
    /// The addresses that its host file allows, the preferred first.
    pub offers: Vec<Offer>,
    /// Its memory.
    pub memory: MemoryFacts,
    /// Why there can be no KVM guest; nothing where there can.
    #[serde(default)]
    pub why_no_kvm: Option<String>,
    /// Why RDMA cannot be used; nothing where it can. Empty where the host does not say.
    #[serde(default = "not_said")]
    pub no_rdma: Option<String>,
    /// The processor's vendor and model, for people.
    pub processor: String,
    /// Slots for incoming migrations that are free, and how many there are.
    pub free_incoming: u32,
    /// The same: how many there are.
    pub max_incoming: u32,
    /// The wall clock when this was written, in seconds since 1970.
    pub clock: f64,
    /// Whether this host does without proof of who asks.
    pub insecure: bool,
    /// Whether its host file demands that memory is encrypted on its way.
    #[serde(default)]
    pub requires_encryption: bool,
    /// Whether it takes memory that is encrypted: it has certificates, and a release that knows how.
    #[serde(default)]
    pub takes_encrypted: bool,
    /// Whether it takes guests of QEMU in.
    #[serde(default)]
    pub takes_qemu: bool,
}

/// What hosts of a release without RDMA say of it.
#[expect(clippy::unnecessary_wraps, reason = "the field's type")]
fn not_said() -> Option<String> {
    Some(String::new())
}

/// What a guest needs that is to move.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GuestFacts {
    /// Its name.
    pub name: String,
    /// `kvm`, `process` or `qemu`.
    pub kind: String,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// What of it is in use, in bytes.
    pub touched_bytes: u64,
    /// Its configuration as the destination's adapter reads it, in hexadecimal digits.
    pub config: String,
    /// The QEMU that has it, for a guest of kind `qemu`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub qemu: Option<crate::host::qemu::QemuFacts>,
}

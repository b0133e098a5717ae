//! The host file: what an administrator chooses once for a host, and every migration from it follows.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;

use crate::memory::HugePages;
use crate::migration::convergence::OnNoConvergence;
use crate::session::mode::TransferMode;
use crate::session::path::InterfaceName;
use crate::session::trust::TlsFiles;

/// Where the host file is looked for when nobody says.
pub const DEFAULT_PATH: &str = "/etc/pageferry/host.toml";

/// Everything that a host file sets, with the defaults for what it does not say.
#[derive(Clone, Debug, PartialEq)]
pub struct HostConfig {
    /// The host's name: what other hosts call it, and the name in its certificate. Without one in the file, the kernel's.
    pub name: String,
    /// How memory travels from this host.
    pub performance_option: TransferMode,
    /// What migrations may use, in both directions.
    pub networks: Networks,
    /// The most migrations at a time, for each direction.
    pub max_migrations: u32,
    /// The most storage migrations at a time, for each direction.
    pub max_storage_migrations: u32,
    /// The most that all migrations from this host send together, in bytes a second.
    pub bandwidth_cap: Option<u64>,
    /// Connections per path; `None` leaves it to pageferry.
    pub channels_per_path: Option<u16>,
    /// The longest downtime that is aimed at.
    pub downtime_limit: Duration,
    /// After how many rounds a guest counts as not converging.
    pub max_rounds: u32,
    /// What happens then.
    pub on_no_convergence: OnNoConvergence,
    /// Where the daemons of other hosts reach this one's (TCP).
    pub port: u16,
    /// The ports at which guests come in, the first and the last. The first is the daemon's own: it answers questions about
    /// guests whose process has gone.
    pub migration_ports: (u16, u16),
    /// The pages that the RAM of guests is made of.
    pub huge_pages: HugePages,
    /// Where the daemon keeps its journal, its records and its guests' sockets.
    pub state_dir: PathBuf,
    /// The unix socket of the HTTP API.
    pub socket: PathBuf,
    /// How the host proves which host it is.
    pub tls: Option<TlsFiles>,
    /// Whether hosts may do without proof on networks other than loopback.
    pub allow_insecure: bool,
    /// Other hosts, by name, and where their daemons are reached; a port that is not said is this host's own `port`.
    pub peers: BTreeMap<String, Vec<PeerAddress>>,
}

/// Where another host's daemon is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerAddress {
    /// At this address, and at the port that this host uses.
    Host(std::net::IpAddr),
    /// At this address and port.
    HostAndPort(SocketAddr),
}

/// What migrations may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Networks {
    /// Every interface that is up, loopback only when the other host is reached by nothing else.
    Any,
    /// These, the preferred first, and nothing else.
    Listed(Vec<Network>),
}

/// A network that migrations may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// Which one.
    pub what: NetworkMatch,
    /// The most that all migrations from this host send by it together, in bytes a second.
    pub bandwidth_cap: Option<u64>,
}

/// What belongs to a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetworkMatch {
    /// Every local address within this subnet.
    Subnet(IpNet),
    /// Every address of this interface.
    Interface(InterfaceName),
}

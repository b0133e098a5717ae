//! The host file: what an administrator chooses once for a host, and every migration from it follows.
//!
//! `docs/host-file.md` describes it for administrators.

#[cfg(test)]
mod bad_files;
mod commands;
mod file;
mod identity;
mod network;
mod problem;
mod read;
mod resolve;
mod show;
#[cfg(test)]
mod tests;
mod value;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;

pub use commands::{check, init, schema, show};
pub use file::json_schema;
pub use problem::{HostFileError, Problem};
pub(crate) use value::check_host_name;

use crate::memory::HugePages;
use crate::migration::convergence::{Limits, OnNoConvergence};
use crate::session::RdmaTuning;
use crate::session::mode::TransferMode;
use crate::session::path::{DEFAULT_PORT, InterfaceName};
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
    /// Whether memory is encrypted on its way, except on networks that are isolated.
    pub requires_encryption: bool,
    /// How RDMA is used.
    pub rdma: RdmaTuning,
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
    /// Whether nobody else is on it, so that memory may go over it in plain.
    pub isolated: bool,
}

/// What belongs to a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetworkMatch {
    /// Every local address within this subnet.
    Subnet(IpNet),
    /// Every address of this interface.
    Interface(InterfaceName),
}

impl HostConfig {
    /// The configuration of a host that has this name and no host file.
    #[must_use]
    pub fn new(name: String) -> Self {
        let limits = Limits::default();
        Self {
            name,
            performance_option: TransferMode::Compression,
            networks: Networks::Any,
            max_migrations: 2,
            max_storage_migrations: 2,
            bandwidth_cap: None,
            channels_per_path: None,
            downtime_limit: limits.downtime,
            max_rounds: limits.rounds,
            on_no_convergence: limits.on_no_convergence,
            port: DEFAULT_PORT,
            migration_ports: (7434, 7533),
            huge_pages: HugePages::Transparent,
            state_dir: PathBuf::from("/var/lib/pageferry"),
            socket: PathBuf::from("/run/pageferry/api.sock"),
            tls: None,
            allow_insecure: false,
            requires_encryption: false,
            rdma: RdmaTuning::default(),
            peers: BTreeMap::new(),
        }
    }

    /// The keys that differ between the configuration of a running daemon and a newer one, and that a daemon takes up only when
    /// it starts: what it listens at, where it keeps its state, and who it is.
    #[must_use]
    pub fn restart_needed(&self, newer: &Self) -> Vec<&'static str> {
        let proven = |config: &Self| config.tls.is_some();
        let differs = [
            ("name", self.name != newer.name),
            ("port", self.port != newer.port),
            ("migration_ports", self.migration_ports != newer.migration_ports),
            ("state_dir", self.state_dir != newer.state_dir),
            ("socket", self.socket != newer.socket),
            ("allow_insecure", self.allow_insecure != newer.allow_insecure),
            ("tls", proven(self) != proven(newer)),
        ];
        differs.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key).collect()
    }
}

/// Where a value came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The file does not say.
    Default,
    /// From the host file.
    File {
        /// The key's line, from 1 on.
        line: usize,
    },
}

/// A host's configuration, and where it is from.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// The configuration.
    pub config: HostConfig,
    /// The file that was read, if there is one.
    pub path: Option<PathBuf>,
    /// Where each value is from, by its key; `tls.ca` and `peers.NAME` are keys too.
    pub origins: BTreeMap<String, Origin>,
    /// What can be, and yet is hardly meant.
    pub warnings: Vec<Problem>,
}

impl Loaded {
    /// Where the value of a key is from, in words: `host file` or `default`.
    #[must_use]
    pub fn origin_of(&self, key: &str) -> &'static str {
        match self.origins.get(key) {
            Some(Origin::File { .. }) => "host file",
            Some(Origin::Default) | None => "default",
        }
    }

    fn line_of(&self, key: &str) -> Option<usize> {
        match self.origins.get(key) {
            Some(Origin::File { line }) => Some(*line),
            Some(Origin::Default) | None => None,
        }
    }
}

/// Reads a host file. Without a name it is the one at [`DEFAULT_PATH`], and if that is not there, the defaults apply.
///
/// # Errors
/// [`HostFileError`] with everything that is wrong with it.
pub fn load(path: Option<&Path>) -> Result<Loaded, HostFileError> {
    load_or_default(path, Path::new(DEFAULT_PATH))
}

fn load_or_default(named: Option<&Path>, default: &Path) -> Result<Loaded, HostFileError> {
    let path = named.unwrap_or(default);
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return match named {
                Some(path) => Err(HostFileError::Missing(path.to_owned())),
                None => Ok(Loaded { path: None, ..parse("", default)? }),
            };
        }
        Err(error) => return Err(HostFileError::Read { path: path.to_owned(), error }),
    };
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        let line = 1 + bytes[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
        let what = "it is not text in UTF-8; save the file in that encoding".to_owned();
        HostFileError::Bad { path: path.to_owned(), problems: vec![Problem { line: Some(line), what }] }
    })?;
    parse(text, path)
}

/// The configuration that a text makes; `path` is where it is from, for messages and for files that it names.
///
/// # Errors
/// [`HostFileError::Bad`] with everything that is wrong with it.
pub fn parse(text: &str, path: &Path) -> Result<Loaded, HostFileError> {
    resolve::resolve(text, path, &kernel_name())
}

fn kernel_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

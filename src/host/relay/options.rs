//! What `pageferry relay` was asked to do, as plain data.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::session::Path;
use crate::session::mode::TransferMode;
use crate::session::trust::TlsFiles;

/// The port that the destination listens at, unless told otherwise.
pub const RELAY_PORT: u16 = 7431;

/// What both ends have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Common {
    /// The QMP socket.
    pub qmp: PathBuf,
    /// Where QEMU and pageferry meet.
    pub socket: Option<PathBuf>,
    /// Carry whole packets even where pages could be placed.
    pub whole_packets: bool,
    /// A file with the secret that both ends know.
    pub secret_file: Option<PathBuf>,
    /// This host's certificates.
    pub tls: Option<TlsFiles>,
    /// The result as JSON.
    pub json: bool,
    /// More logs.
    pub verbose: bool,
}

/// The end that has the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceOptions {
    /// What both have.
    pub common: Common,
    /// Ways to the destination.
    pub paths: Vec<Path>,
    /// The name in the destination's certificate.
    pub peer_name: Option<String>,
    /// Data channels; as many as paths at least.
    pub channels: usize,
    /// How memory travels.
    pub mode: TransferMode,
    /// Bytes a second on the wire.
    pub max_bandwidth: Option<u64>,
    /// What QEMU aims at.
    pub downtime_limit: Duration,
    /// QEMU's own channels.
    pub multifd_channels: u8,
    /// Whether the destination QEMU answers.
    pub return_path: bool,
}

/// The end that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DestinationOptions {
    /// What both have.
    pub common: Common,
    /// Where to listen.
    pub listen: Vec<SocketAddr>,
}

/// Which end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RelayRequest {
    /// The one that has the guest.
    Source(Box<SourceOptions>),
    /// The one that waits.
    Destination(Box<DestinationOptions>),
}

//! Carries the migration of a stock hypervisor: its own protocol at both ends, pageferry's sessions between them.
//!
//! QEMU decides what is sent and when the guest stops; pageferry carries it. [`source`] takes the connections of the source QEMU,
//! [`destination`] makes those of the destination QEMU. Pages are *placed* where both hosts can map the guest's RAM: the source
//! reads them there, the destination writes them there, and QEMU copies nothing. Other packets are carried whole through a
//! piece of *staging* memory, whose pages travel by the same session. Everything else (the main channel, heads of packets) goes
//! over the control link.
//!
//! What has to arrive after pages (a SYNC packet, a packet's head) is held back until the round with those pages is placed
//! ([`batch`]). Who may run the guest, and when: `docs/decisions/0028-a-relayed-guest-is-resumed-by-pageferry.md`.

mod batch;
pub mod destination;
mod discard;
mod packets;
pub mod source;
mod staging;
mod streams;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::engine::observe::LinkSeen;
use crate::guest::qemu::multifd::MultifdError;
use crate::guest::qemu::qmp::QmpError;
use crate::guest::qemu::ram::RamBlock;
use crate::guest::qemu::settings::SettingsError;
use crate::layout::{LayoutError, RamLayout, RamRegion};
use crate::memory::{GuestMemory, HugePages, Mapping};
use crate::session::{ChannelStats, SessionError, TransferMode};
use crate::units::{Bytes, GuestAddress, PAGE_SIZE};
use crate::wire::control::DecodeError;

/// Length of the memory that packets are carried through: 128 packets of 512 KiB, of which as many are under way at most.
pub const STAGING_BYTES: u64 = 64 << 20;

/// Why a relay failed.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// QEMU does not do what it is told, or has gone.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// QEMU cannot be prepared.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// Between the two pageferries.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// What the other pageferry says cannot be read.
    #[error("the other end is no pageferry relay, or a damaged one")]
    Message(#[from] DecodeError),
    /// It is something that has no place here.
    #[error("the other end says {0} out of turn")]
    OutOfTurn(&'static str),
    /// It breaks a limit.
    #[error("the other end breaks the rules of a relay: {0}")]
    Violation(&'static str),
    /// It does not answer.
    #[error("the other end has not said what it is for {} s", .0.as_secs())]
    Silent(Duration),
    /// It gives up.
    #[error("the other end gives up: {0}")]
    Peer(String),
    /// QEMU's own stream is wrong.
    #[error("the source QEMU's multifd stream cannot be carried")]
    Multifd(#[from] MultifdError),
    /// A page outside its RAM block.
    #[error("QEMU sends a page outside its RAM block {0}")]
    Outside(String),
    /// A connection of QEMU broke.
    #[error("a connection of QEMU broke")]
    Stream(#[source] io::Error),
    /// A socket for QEMU.
    #[error("the socket {} for QEMU cannot be used; --socket names another place", path.display())]
    Socket {
        /// Where.
        path: PathBuf,
        /// What the kernel answers.
        #[source]
        cause: io::Error,
    },
    /// RAM of QEMU, or the staging memory.
    #[error("{0} cannot be mapped")]
    Map(String, #[source] io::Error),
    /// RAM blocks that make no layout.
    #[error("QEMU's RAM blocks cannot be placed")]
    Layout(#[from] LayoutError),
    /// The kernel does not say which of the memory is in use.
    #[error("which of QEMU's memory is in use cannot be told; it takes Linux 6.7 or newer")]
    Touched(#[source] io::Error),
    /// No random numbers.
    #[error("the kernel gives no random bytes")]
    Random(#[source] io::Error),
    /// A thread.
    #[error("the thread {0} cannot be started")]
    Thread(&'static str, #[source] io::Error),
    /// RAM that is not the same.
    #[error("RAM block {name} has {} at the source and {} at the destination; give both QEMUs the same memory", Bytes(*source_bytes), Bytes(*destination_bytes))]
    Size {
        /// Which.
        name: String,
        /// Here.
        source_bytes: u64,
        /// There.
        destination_bytes: u64,
    },
    /// RAM that is not there.
    #[error(
        "the destination QEMU has no RAM block {0}; start it with the same -machine, -m and -object options"
    )]
    Missing(String),
    /// TLS at one end.
    #[error(
        "TLS is set in QEMU (tls-creds) at the {0} only; set it at both, or at neither and let pageferry encrypt"
    )]
    TlsOnOneSide(&'static str),
    /// QEMU failed.
    #[error("QEMU's migration ended as {status}{}", error.as_ref().map(|text| format!(": {text}")).unwrap_or_default())]
    Qemu {
        /// Its word for it.
        status: String,
        /// Why.
        error: Option<String>,
    },
    /// A person ended it.
    #[error("the migration was cancelled")]
    Cancelled,
}

/// Where the guest is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RelayOutcome {
    /// At the destination.
    Completed,
    /// At the source, as it was.
    RolledBack {
        /// Why.
        cause: String,
    },
    /// Complete at both, and run by neither, since each might think that the other does.
    InDoubt {
        /// Why, and what to do.
        cause: String,
    },
}

/// How a relay went, as either end knows it.
#[derive(Clone, Debug)]
pub struct RelayReport {
    /// Where the guest is.
    pub outcome: RelayOutcome,
    /// The mode that was asked for, by the source.
    pub mode_requested: TransferMode,
    /// The mode that the pages travelled by.
    pub mode_used: TransferMode,
    /// Why it was that one.
    pub mode_reason: String,
    /// Blocks whose pages were placed.
    pub placed_blocks: Vec<String>,
    /// Why the guest's RAM was carried in whole packets, where it was.
    pub relay_because: Option<String>,
    /// Each data channel.
    pub channels: Vec<ChannelStats>,
    /// Bytes over all of them.
    pub wire_bytes: u64,
    /// Pages that the sessions placed, those of whole packets among them.
    pub placed_pages: u64,
    /// The last that the source QEMU said.
    pub qemu: crate::guest::qemu::settings::Migration,
    /// From the beginning to the outcome.
    pub total: Duration,
    /// From the moment that the source QEMU stopped the guest to the moment that this side knew that it runs again.
    pub downtime: Option<Duration>,
    /// Processor time of this process meanwhile.
    pub cpu: Duration,
    /// Whether the guest runs here, and QEMU's word for its state; `None` if QEMU does not say.
    pub guest_here: Option<(bool, String)>,
    /// Whether QEMU was told to send, or to listen.
    pub began: bool,
    /// What went wrong without ending it.
    pub warnings: Vec<String>,
}

impl RelayReport {
    pub(crate) fn new(mode: TransferMode) -> Self {
        Self {
            outcome: RelayOutcome::RolledBack { cause: String::new() },
            mode_requested: mode,
            mode_used: TransferMode::Tcp,
            mode_reason: String::new(),
            placed_blocks: Vec::new(),
            relay_because: None,
            channels: Vec::new(),
            wire_bytes: 0,
            placed_pages: 0,
            qemu: crate::guest::qemu::settings::Migration::default(),
            total: Duration::ZERO,
            downtime: None,
            cpu: Duration::ZERO,
            guest_here: None,
            began: false,
            warnings: Vec::new(),
        }
    }
}

/// How a relay stands.
#[derive(Clone, Debug)]
pub struct RelayProgress {
    /// How the source QEMU stands.
    pub qemu: crate::guest::qemu::settings::Migration,
    /// How pages travel.
    pub mode: TransferMode,
    /// Each path, in the order of the options.
    pub links: Vec<LinkSeen>,
    /// Bytes sent over all channels.
    pub wire_bytes: u64,
    /// Pages placed.
    pub placed_pages: u64,
    /// Since when.
    pub elapsed: Duration,
    /// For how long no data channel has lived.
    pub none_for: Option<Duration>,
}

/// The layout of a session: the placed blocks one after the other, the staging memory at the end.
fn layout(blocks: impl Iterator<Item = u64>, staging: u64) -> Result<RamLayout, LayoutError> {
    let mut start = 0u64;
    let mut region = |bytes: u64| {
        let region = RamRegion { start: GuestAddress(start), bytes };
        start = start.saturating_add(bytes);
        region
    };
    let mut regions: Vec<RamRegion> = blocks.map(&mut region).collect();
    regions.push(region(staging));
    RamLayout::new(regions)
}

/// The memory of a session: the mappings of the placed blocks, and fresh memory for staging.
fn memory(layout: RamLayout, mut blocks: Vec<Mapping>, staging: u64) -> Result<GuestMemory, RelayError> {
    let failed = |cause| RelayError::Map(format!("{} of memory for packets", Bytes(staging)), cause);
    blocks.push(Mapping::memfd("pageferry-packets", staging, HugePages::No).map_err(failed)?);
    GuestMemory::new(layout, blocks).map_err(failed)
}

fn map(block: &RamBlock) -> Result<Option<Mapping>, RelayError> {
    block.map().map_err(|cause| RelayError::Map(format!("RAM block {}", block.name), cause))
}

/// Where QEMU and pageferry meet when nobody says: beside the QMP socket, where QEMU has shown that it may make sockets.
fn meeting_place(qmp: &Path, given: Option<&PathBuf>, role: &str) -> Result<PathBuf, RelayError> {
    /// `sun_path` of unix(7), less the byte at its end.
    const LONGEST: usize = 107;
    let path = given.cloned().unwrap_or_else(|| {
        let mut name = qmp.as_os_str().to_owned();
        name.push(role);
        PathBuf::from(name)
    });
    // QEMU takes it as text after a colon, and knows no quoting but for commas.
    let text = path.to_str().filter(|text| text.len() <= LONGEST && !text.contains(','));
    if text.is_none() {
        let cause = io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a socket's path has at most {LONGEST} bytes, no comma, and is valid text"),
        );
        return Err(RelayError::Socket { path, cause });
    }
    // QEMU may have another directory.
    let failed = |cause| RelayError::Socket { path: path.clone(), cause };
    std::path::absolute(&path).map_err(failed)
}

/// Removes a socket's file at the end.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // QEMU may have removed it already.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn spawn(
    name: &'static str,
    run: impl FnOnce() + Send + 'static,
) -> Result<std::thread::JoinHandle<()>, RelayError> {
    std::thread::Builder::new().name(name.into()).spawn(run).map_err(|cause| RelayError::Thread(name, cause))
}

fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Whatever these hold is changed in single steps that cannot panic half-way.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// How many pages a length takes.
fn pages_of(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE_SIZE)
}

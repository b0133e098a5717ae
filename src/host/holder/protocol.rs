//! What a process that holds a guest is told and tells: one JSON object a line, commands in, events out, on stdin and stdout
//! (`pageferry demo`) or on a unix socket (the daemon).
//!
//! A daemon and the processes that it finds after an upgrade may be of different versions: fields are only added, each with a default.

mod ended;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use ended::{Arrived, Moved, MovedChannel, MovedRound, Ram};

use crate::dirty::TrackerKind;
use crate::guest::program::{Program, SelfReport};
use crate::host::demo_options::GuestKind;
use crate::memory::HugePages;
use crate::migration::convergence::OnNoConvergence;
use crate::session::RdmaTuning;
use crate::session::mode::TransferMode;
use crate::session::trust::TlsFiles;

/// What a guest is to be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestSpec {
    /// Which adapter.
    pub kind: GuestKind,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// How much of it the program uses; all, where nothing is said.
    pub touch_bytes: Option<u64>,
    /// vCPUs, or threads of a process guest.
    pub vcpus: u8,
    /// What it does.
    pub program: Program,
    /// How much it dirties, in bytes per second.
    pub dirty_bytes_per_second: u64,
    /// What its choices are drawn from.
    pub seed: u64,
    /// Where dirty pages are learnt from.
    pub tracker: TrackerKind,
    /// The pages that its RAM is made of.
    #[serde(default)]
    pub huge_pages: HugePages,
}

/// A way to the destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovePath {
    /// The address to come from.
    pub source: Option<IpAddr>,
    /// Where the destination listens.
    pub destination: SocketAddr,
    /// The interface that carries it, and no other.
    #[serde(default)]
    pub interface: Option<String>,
    /// Whether memory may go over it in plain whatever the host file demands.
    #[serde(default)]
    pub isolated: bool,
}

/// The most that a migration may send, in bytes a second.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caps {
    /// Over all interfaces together.
    #[serde(default)]
    pub total: Option<u64>,
    /// Over single ones.
    #[serde(default)]
    pub interfaces: BTreeMap<String, u64>,
}

/// What a migration between two hosts needs beyond one on a single machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreed {
    /// The migration's name, 32 hexadecimal digits.
    pub migration: String,
    /// The one-time secret that it begins with, 64 hexadecimal digits.
    pub admission: String,
    /// How hosts prove who they are; nothing where they do not.
    #[serde(default)]
    pub trust: Option<TlsFiles>,
    /// The name that the other host's certificate must hold.
    #[serde(default)]
    pub peer_name: Option<String>,
}

/// How a guest is to be moved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MoveSpec {
    /// What people call the guest.
    #[serde(default)]
    pub name: String,
    /// Ways to the destination, the preferred first.
    pub paths: Vec<MovePath>,
    /// Where to ask what became of the guest when the destination's process is gone.
    #[serde(default)]
    pub answering: Vec<SocketAddr>,
    /// How many channels, over all paths together.
    pub channels: usize,
    /// The mode that is asked for.
    pub mode: TransferMode,
    /// The longest downtime aimed at, in milliseconds.
    pub downtime_limit_ms: u64,
    /// The most rounds.
    pub max_rounds: u32,
    /// What happens when it does not converge.
    pub on_no_convergence: OnNoConvergence,
    /// How long to ask when in doubt before it counts as that, in milliseconds.
    pub doubt_ms: u64,
    /// What two daemons agreed on.
    #[serde(default)]
    pub agreed: Option<Agreed>,
    /// The most that may be sent.
    #[serde(default)]
    pub caps: Caps,
    /// Whether memory is encrypted on its way.
    #[serde(default)]
    pub requires_encryption: bool,
    /// What was chosen about RDMA.
    #[serde(default)]
    pub rdma: RdmaTuning,
    /// Whether RAM at the pause is digested.
    #[serde(default)]
    pub digest_ram: bool,
    /// What is to go wrong, for tests.
    #[serde(default)]
    pub fault: Option<String>,
    /// The QEMU that has the guest; the process' own guest otherwise.
    #[serde(default)]
    pub qemu: Option<QemuEnd>,
}

/// A QEMU that takes part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuEnd {
    /// Its QMP socket.
    pub qmp: PathBuf,
}

/// How a guest is to be received.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ReceiveSpec {
    /// Track its dirty pages with this when it moves on; `None` is what fits the guest best.
    #[serde(default)]
    pub tracker: Option<TrackerKind>,
    /// The pages that its RAM is made of here.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// Where to listen; nothing where the process listens already.
    #[serde(default)]
    pub listen: Vec<ListenAt>,
    /// The ports to choose from, the first and the last; the same one on every address.
    #[serde(default)]
    pub ports: (u16, u16),
    /// What two daemons agreed on: only this migration is taken in.
    #[serde(default)]
    pub agreed: Option<Agreed>,
    /// Whether memory is encrypted on its way.
    #[serde(default)]
    pub requires_encryption: bool,
    /// What was chosen about RDMA.
    #[serde(default)]
    pub rdma: RdmaTuning,
    /// Whether RAM at the pause is digested.
    #[serde(default)]
    pub digest_ram: bool,
    /// What is to go wrong, for tests.
    #[serde(default)]
    pub fault: Option<String>,
    /// The QEMU that waits for the guest; a guest of the process' own is made otherwise.
    #[serde(default)]
    pub qemu: Option<QemuEnd>,
}

/// An address to listen at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenAt {
    /// The address.
    pub address: IpAddr,
    /// The interface that it is taken from, and no other.
    #[serde(default)]
    pub interface: Option<String>,
    /// Whether memory may come over it in plain whatever the host file demands.
    #[serde(default)]
    pub isolated: bool,
}

/// What the process is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Command {
    /// Make this guest and start it.
    Start(GuestSpec),
    /// Wait for a guest.
    Receive(ReceiveSpec),
    /// Move the guest.
    Move(MoveSpec),
    /// Stop moving or receiving.
    Cancel,
    /// The destination's process has ended, as its host says: do not wait for it.
    PeerGone {
        /// In words.
        cause: String,
    },
    /// Send no more than this, from now on.
    SetCaps(Caps),
    /// Say what the guest has seen of itself.
    Report,
    /// Say what the guest needs of a host.
    Facts,
    /// Say what came out of the guest's serial port since the last time.
    Console,
    /// Have the guest look at every page that it wrote.
    Verify,
    /// Have the guest forget its longest gap.
    ResetGap,
    /// The ends of migrations that were told are known now, and need not be told again.
    Acknowledge,
    /// End, and the guest with it.
    Stop,
}

/// A command, and the number that its answer carries.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by whoever asks; without it there is no telling the answer from other events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// What to do.
    #[serde(flatten)]
    pub command: Command,
}

/// An event, and the request that it answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Told {
    /// The request's number; none of what nobody asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply: Option<u64>,
    /// What is told.
    #[serde(flatten)]
    pub event: Event,
}

/// What a process is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Doing {
    /// It has no guest.
    #[default]
    Nothing,
    /// It makes one.
    Starting,
    /// Its guest runs.
    Running,
    /// It waits for one, or takes one in.
    Receiving,
    /// It moves its guest away.
    Moving,
    /// It asks what became of the guest that stands still here.
    InDoubt,
}

/// How a process stands: the first that it tells whoever connects to it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HolderState {
    /// Its process number.
    pub pid: u32,
    /// What it is doing.
    pub doing: Doing,
    /// The migration that it does, or did last, where two daemons agreed on one.
    pub migration: Option<String>,
    /// Whether the source of the guest that it takes in has connected.
    #[serde(default)]
    pub begun: bool,
    /// Where the move stands.
    pub progress: Option<MoveProgress>,
    /// The end of a move that nobody has acknowledged.
    pub moved: Option<Box<Moved>>,
    /// How a doubt was settled that nobody has acknowledged.
    pub settled: Option<bool>,
    /// The end of an arrival that nobody has acknowledged.
    pub arrived: Option<Box<Arrived>>,
    /// Whether it knows how to encrypt memory on its way.
    #[serde(default)]
    pub encrypts: bool,
}

/// What a guest needs of a host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GuestNeeds {
    /// `kvm` or `process`.
    pub kind: String,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// What of it may hold something other than zero.
    pub touched_bytes: u64,
    /// Its configuration, as the destination gets it, in hexadecimal digits: the processor features that it uses are in it.
    pub config: String,
}

/// What the process tells.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// First of all, on a socket: how it stands.
    Hello(HolderState),
    /// The command was done, and there is nothing more to say.
    Done,
    /// First of all, on stdout: where it listens.
    Listening {
        /// In the order of the command line.
        addresses: Vec<SocketAddr>,
    },
    /// What became of migrations that an earlier process here left unfinished.
    Recovered {
        /// In words.
        what: String,
        /// Whether the guest runs at its destination.
        completed: bool,
    },
    /// The guest runs and has written everything once.
    Started {
        /// Its memory in use, in bytes.
        touched_bytes: u64,
    },
    /// It waits for a guest.
    Receiving {
        /// Where it listens.
        addresses: Vec<SocketAddr>,
    },
    /// A source has connected, and its guest is being taken in.
    Begun,
    /// Where the move stands.
    Progress(MoveProgress),
    /// The move has ended, as the source sees it.
    Moved(Box<Moved>),
    /// A move that had ended in doubt is settled.
    Settled {
        /// Whether the guest runs here again; else it runs at the destination.
        here: bool,
    },
    /// A guest has arrived, or its arrival has failed.
    Arrived(Box<Arrived>),
    /// Answers [`Command::Report`] and [`Command::Verify`].
    Guest(GuestSeen),
    /// Answers [`Command::Console`].
    Console {
        /// What came out.
        text: String,
    },
    /// Answers [`Command::Facts`].
    Needs(GuestNeeds),
    /// Answers [`Command::ResetGap`].
    GapReset,
    /// A command could not be done.
    Failed {
        /// Why.
        why: String,
    },
}

/// How a path takes part.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MoveLink {
    /// The interface here.
    pub interface: Option<String>,
    /// Connections over it that live.
    pub channels: u32,
    /// Bytes over it so far.
    pub bytes: u64,
    /// Bytes over it a second, lately.
    pub bytes_per_second: u64,
    /// `up`, `down`, `lost` or `silent`.
    pub state: String,
}

/// A line of progress.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MoveProgress {
    /// The phase's word.
    pub phase: String,
    /// The mode's word.
    pub mode: String,
    /// Interfaces in use.
    pub interfaces: Vec<String>,
    /// Each path that was used.
    #[serde(default)]
    pub links: Vec<MoveLink>,
    /// Which round.
    pub round: u32,
    /// Bytes of guest memory per second.
    pub bytes_per_second: u64,
    /// Bytes of this round that are left.
    pub remaining_bytes: u64,
    /// Expected downtime in seconds.
    pub expected_downtime: Option<f64>,
    /// Rounds that are over.
    #[serde(default)]
    pub rounds: Vec<MovedRound>,
    /// What is not as it should be.
    pub note: Option<String>,
}

/// What a guest has seen of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GuestSeen {
    /// Heartbeats so far.
    pub heartbeats: u64,
    /// Pages written so far.
    pub writes: u64,
    /// Pages found right so far.
    pub verified: u64,
    /// Pages found wrong so far.
    pub corrupt: u64,
    /// The longest time between two looks at the clock, in seconds.
    pub longest_gap: f64,
    /// The wall clock at this report, in seconds since 1970.
    pub at: f64,
}

impl GuestSeen {
    /// A report, stamped with the time.
    #[must_use]
    pub fn now(report: SelfReport) -> Self {
        Self {
            heartbeats: report.heartbeats,
            writes: report.writes,
            verified: report.verified,
            corrupt: report.corrupt,
            longest_gap: report.longest_gap.as_secs_f64(),
            at: crate::engine::wall_clock() as f64 / 1e9,
        }
    }
}

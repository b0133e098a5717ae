//! The flags of the commands that concern this host: its daemon, its guests, its host file, its certificates.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::{Request, fault};
use crate::dirty::TrackerKind;
use crate::guest::program::Program;
use crate::host::api::guest::StartGuest;
use crate::host::api::migration::MigrateRequest;
use crate::host::commands::{CommandOptions, HostCommand};
use crate::host::daemon::routes::CheckAsked;
use crate::host::daemon::run::ServeOptions;
use crate::host::demo_options::{GuestKind, MAX_CHANNELS, MAX_VCPUS};
use crate::host::quantity;
use crate::migration::convergence::OnNoConvergence;
use crate::session::mode::TransferMode;

/// Which daemon, and how its answer is wanted.
#[derive(Debug, Args)]
pub(super) struct Daemon {
    /// The host file that names the daemon's socket. Without it: /etc/pageferry/host.toml.
    #[arg(long, global = true, value_name = "FILE", env = "PAGEFERRY_CONFIG")]
    config: Option<PathBuf>,
    /// The daemon's socket, in place of what the host file says.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Print the answer as JSON on one line of stdout, and nothing else there.
    #[arg(long)]
    json: bool,
}

impl Daemon {
    fn request(self, command: HostCommand) -> Request {
        let Self { config, socket, json } = self;
        Request::Host(CommandOptions { config, socket, json }, Box::new(command))
    }
}

#[derive(Debug, Args)]
pub(super) struct Serve {
    /// The host file. Without it: /etc/pageferry/host.toml, and where that is not there, defaults.
    #[arg(long, value_name = "FILE", env = "PAGEFERRY_CONFIG")]
    config: Option<PathBuf>,
    /// Log as JSON, one object a line.
    #[arg(long)]
    log_json: bool,
    /// Log more of what happens.
    #[arg(long)]
    verbose: bool,
    /// Let migrations ask for faults. For tests.
    #[arg(long, hide = true)]
    allow_faults: bool,
    /// Say that only this version of the protocol is spoken here. For tests.
    #[arg(long, hide = true, value_name = "N")]
    claim_protocol: Option<u16>,
}

impl Serve {
    pub(super) fn request(self) -> Request {
        Request::Serve(ServeOptions {
            config: self.config,
            log_json: self.log_json,
            verbose: self.verbose,
            faults_allowed: self.allow_faults,
            claimed_protocol: self.claim_protocol,
        })
    }
}

#[derive(Debug, Subcommand)]
pub(super) enum Guest {
    /// Start a guest in a process of its own, which the daemon supervises.
    Start(Box<Start>),
    /// List the guests of this host.
    List(Daemon),
    /// Show one guest, and what it has seen of itself.
    Show(Named),
    /// Have a guest look at every page that it ever wrote.
    Verify(Named),
    /// End a guest. One that was lost is forgotten.
    Stop(Named),
    /// Print what came out of a guest's serial port.
    Console {
        #[command(flatten)]
        named: Named,
        /// Go on until interrupted.
        #[arg(long, short)]
        follow: bool,
    },
}

impl Guest {
    pub(super) fn request(self) -> Request {
        match self {
            Self::Start(start) => start.request(),
            Self::List(daemon) => daemon.request(HostCommand::GuestList),
            Self::Show(named) => named.request(HostCommand::GuestShow),
            Self::Verify(named) => named.request(HostCommand::GuestVerify),
            Self::Stop(named) => named.request(HostCommand::GuestStop),
            Self::Console { named, follow } => named.request(|name| HostCommand::GuestConsole(name, follow)),
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct Named {
    /// The guest's name.
    name: String,
    #[command(flatten)]
    daemon: Daemon,
}

impl Named {
    fn request(self, command: impl FnOnce(String) -> HostCommand) -> Request {
        self.daemon.request(command(self.name))
    }
}

#[derive(Debug, Args)]
pub(super) struct Start {
    /// What to call it: letters, digits, '-', '_' and '.'.
    #[arg(long)]
    name: String,
    /// What it is. Without it: a KVM guest where /dev/kvm opens, else a process.
    #[arg(long)]
    guest: Option<GuestKind>,
    /// What it does with its memory.
    #[arg(long, default_value = "uniform")]
    program: Program,
    /// Its memory.
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = quantity::memory)]
    memory: u64,
    /// How much of it the program uses, from the lowest page on. Without it: all.
    #[arg(long, value_name = "SIZE", value_parser = quantity::memory)]
    touch: Option<u64>,
    /// Its vCPUs, 1 to 4.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_VCPUS)))]
    vcpus: u8,
    /// How much memory it dirties per second, in bytes (100MiB) or bits (1Gbit).
    #[arg(long, value_name = "RATE", default_value = "20MiB", value_parser = quantity::rate)]
    dirty_rate: u64,
    /// What its choices are drawn from.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// How written pages are found. Without it: what fits the guest best.
    #[arg(long, value_name = "TRACKER")]
    dirty_tracker: Option<TrackerKind>,
    #[command(flatten)]
    daemon: Daemon,
}

impl Start {
    fn request(self) -> Request {
        self.daemon.request(HostCommand::GuestStart(StartGuest {
            name: self.name,
            kind: self.guest,
            memory_bytes: self.memory,
            touch_bytes: self.touch,
            vcpus: self.vcpus,
            program: self.program,
            dirty_bytes_per_second: self.dirty_rate,
            seed: self.seed,
            tracker: self.dirty_tracker,
        }))
    }
}

#[derive(Debug, Args)]
pub(super) struct Migrate {
    /// The guest's name; or qemu:PATH, with the QMP socket of a QEMU on this host.
    name: String,
    /// The destination: a host of [peers] in the host file, a host name, or an address; with or without a port.
    #[arg(long, value_name = "HOST")]
    to: String,
    /// For a guest of QEMU: the QMP socket of the QEMU that waits for it at the destination, started with -incoming defer.
    #[arg(long, value_name = "qemu:PATH")]
    incoming: Option<String>,
    /// How the memory travels. Without it: performance_option of the host file.
    #[arg(long)]
    mode: Option<TransferMode>,
    /// Connections per path. Without it: channels_per_path of the host file.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=MAX_CHANNELS as i64))]
    channels: Option<u16>,
    /// How long the guest may stand still. Without it: downtime_limit of the host file.
    #[arg(long, value_name = "DURATION", value_parser = quantity::duration)]
    downtime_limit: Option<Duration>,
    /// After how many rounds a guest counts as not converging. Without it: max_rounds of the host file.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_rounds: Option<u32>,
    /// What happens then. Without it: on_no_convergence of the host file.
    #[arg(long, value_name = "ACTION")]
    on_no_convergence: Option<OnNoConvergence>,
    /// The most that this migration sends a second, in bytes (100MiB) or bits (1Gbit).
    #[arg(long, value_name = "RATE", value_parser = quantity::rate)]
    bandwidth: Option<u64>,
    /// Wait for a free slot on both hosts, instead of being refused when there is none.
    #[arg(long)]
    wait: bool,
    /// Compare both memories as of the pause; costs some milliseconds of downtime.
    #[arg(long)]
    verify: bool,
    /// Return at once; the migration goes on.
    #[arg(long)]
    detach: bool,
    /// What is to go wrong at the source. For tests.
    #[arg(long, value_name = "FAULT", hide = true, value_parser = fault)]
    source_fault: Option<String>,
    /// What is to go wrong at the destination. For tests.
    #[arg(long, value_name = "FAULT", hide = true, value_parser = fault)]
    destination_fault: Option<String>,
    #[command(flatten)]
    daemon: Daemon,
}

impl Migrate {
    pub(super) fn request(self) -> Request {
        let request = MigrateRequest {
            to: self.to,
            mode: self.mode,
            channels_per_path: self.channels,
            downtime_limit_ms: self
                .downtime_limit
                .map(|limit| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)),
            max_rounds: self.max_rounds,
            on_no_convergence: self.on_no_convergence,
            bandwidth_cap: self.bandwidth,
            wait: self.wait,
            verify: self.verify,
            incoming: self.incoming,
            source_fault: self.source_fault,
            destination_fault: self.destination_fault,
        };
        self.daemon.request(HostCommand::Migrate(self.name, Box::new(request), self.detach))
    }
}

#[derive(Debug, Args)]
pub(super) struct Check {
    /// The guest's name; or qemu:PATH, as in `migrate`.
    name: String,
    /// The destination, as in `migrate`.
    #[arg(long, value_name = "HOST")]
    to: String,
    /// The QEMU that waits at the destination, as in `migrate`.
    #[arg(long, value_name = "qemu:PATH")]
    incoming: Option<String>,
    /// The mode, as in `migrate`.
    #[arg(long)]
    mode: Option<TransferMode>,
    #[command(flatten)]
    daemon: Daemon,
}

impl Check {
    pub(super) fn request(self) -> Request {
        let asked = CheckAsked { to: self.to, mode: self.mode, incoming: self.incoming };
        self.daemon.request(HostCommand::Check(self.name, asked))
    }
}

#[derive(Debug, Args)]
pub(super) struct Status {
    /// A migration (the beginning of its identifier is enough) or a guest that moves. Without it: all under way.
    id: Option<String>,
    /// Go on until it is over.
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    daemon: Daemon,
}

impl Status {
    pub(super) fn request(self) -> Request {
        self.daemon.request(HostCommand::Status(self.id, self.watch))
    }
}

#[derive(Debug, Args)]
pub(super) struct Cancel {
    /// A migration (the beginning of its identifier is enough) or the guest that moves.
    id: String,
    #[command(flatten)]
    daemon: Daemon,
}

impl Cancel {
    pub(super) fn request(self) -> Request {
        self.daemon.request(HostCommand::Cancel(self.id))
    }
}

#[derive(Debug, Args)]
pub(super) struct History {
    /// How many, the newest first.
    #[arg(long, value_name = "N", default_value_t = 20)]
    limit: usize,
    #[command(flatten)]
    daemon: Daemon,
}

impl History {
    pub(super) fn request(self) -> Request {
        self.daemon.request(HostCommand::History(self.limit))
    }
}

#[derive(Debug, Args)]
pub(super) struct Report {
    /// A migration (the beginning of its identifier is enough) or the guest that moved.
    id: String,
    /// The file to write. Without it: pageferry-GUEST-ID.html in this directory.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    daemon: Daemon,
}

impl Report {
    pub(super) fn request(self) -> Request {
        self.daemon.request(HostCommand::Report(self.id, self.output))
    }
}

#[derive(Debug, Args)]
pub(super) struct Host {
    #[command(flatten)]
    daemon: Daemon,
}

impl Host {
    pub(super) fn request(self) -> Request {
        self.daemon.request(HostCommand::Host)
    }
}

/// `pageferry config ...`, as plain data.
#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub enum Config {
    /// Read the host file, and say what is wrong with it.
    Check {
        /// The host file. Without it: /etc/pageferry/host.toml.
        #[arg(long, value_name = "FILE", env = "PAGEFERRY_CONFIG")]
        config: Option<PathBuf>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show every setting, with where it comes from.
    Show {
        /// The host file. Without it: /etc/pageferry/host.toml.
        #[arg(long, value_name = "FILE", env = "PAGEFERRY_CONFIG")]
        config: Option<PathBuf>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Write a host file with every setting explained.
    Init {
        /// Where. Without it: /etc/pageferry/host.toml.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Replace one that is there.
        #[arg(long)]
        force: bool,
    },
    /// Print the JSON schema of host files.
    Schema,
}

/// `pageferry pki ...`, as plain data.
#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub enum Pki {
    /// Make an authority that issues certificates for hosts.
    Init {
        /// Where its files go.
        #[arg(long, value_name = "DIR", default_value = "/etc/pageferry/pki")]
        dir: PathBuf,
        /// Replace one that is there.
        #[arg(long)]
        force: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Issue a certificate for a host.
    Issue {
        /// The host's name: `name` in its host file, and how others call it in [peers].
        host: String,
        /// An address by which others call it. Can be given several times.
        #[arg(long, value_name = "IP")]
        address: Vec<IpAddr>,
        /// Where the authority is.
        #[arg(long, value_name = "DIR", default_value = "/etc/pageferry/pki")]
        dir: PathBuf,
        /// Where the host's files go. Without it: beside the authority's.
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// How many days it holds.
        #[arg(long, value_name = "N", default_value_t = 825, value_parser = clap::value_parser!(u32).range(1..=36500))]
        days: u32,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

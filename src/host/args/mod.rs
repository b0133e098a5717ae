//! The command line: what each flag is called and what it takes. It ends in plain data and starts nothing.

mod bench;
mod host;
mod relay;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::PossibleValue;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use crate::dirty::TrackerKind;
use crate::engine::fault::{FaultPlan, FaultPlanError};
use crate::guest::program::Program;
use crate::host::bench::options::BenchRequest;
use crate::host::commands::{CommandOptions, HostCommand};
use crate::host::daemon::run::ServeOptions;
use crate::host::demo_options::{AddressPair, DemoOptions, GuestKind, MAX_CHANNELS, MAX_VCPUS};
use crate::host::holder::{HolderOptions, Supervisor};
use crate::host::quantity;
use crate::host::relay::options::RelayRequest;
use crate::migration::convergence::OnNoConvergence;
use crate::session::mode::TransferMode;

pub use host::{Config, Pki};

/// Moves the memory of a running virtual machine to another host.
#[derive(Debug, Parser)]
#[command(name = "pageferry", version, max_term_width = 100, after_help = EXIT_CODES)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 the guest moved; 1 it did not and runs at the source; 2 wrong usage; \
    3 in doubt where it may run; 4 its memory was damaged; 5 the guest is lost. Other commands: 0 done, 1 not done.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a source and a destination on this machine, move a running guest between them, and report.
    Demo(DemoArguments),
    /// Measure how fast memory moves, in each mode, at what cost, and what limits it.
    Bench(Box<bench::Bench>),
    /// Move the guest of a stock QEMU, one process at each host.
    #[command(subcommand)]
    Relay(relay::Relay),
    /// Run this host's daemon: it supervises guests, moves them to other hosts and takes them in.
    Serve(host::Serve),
    /// Start, list and stop guests of this host.
    #[command(subcommand)]
    Guest(host::Guest),
    /// Move a guest to another host.
    Migrate(Box<host::Migrate>),
    /// Check whether a guest could move to another host, and move nothing.
    Check(host::Check),
    /// Show the migrations under way.
    Status(host::Status),
    /// End a migration; the guest goes on at the source.
    Cancel(host::Cancel),
    /// List the migrations that are over.
    History(host::History),
    /// Write a page about a migration, with plots; it needs no network.
    Report(host::Report),
    /// Show this host: its networks, its limits, and what is not as it should be.
    Host(host::Host),
    /// Look at and write host files.
    #[command(subcommand)]
    Config(Config),
    /// Make certificates for hosts.
    #[command(subcommand)]
    Pki(Pki),
    /// Look at this host's RDMA devices.
    #[command(subcommand)]
    Rdma(Rdma),
    /// Print completions for a shell.
    Completions {
        /// Which.
        shell: clap_complete::Shell,
    },
    /// Write manual pages.
    Man {
        /// Where to.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
    /// Print the OpenAPI document of the daemon's API.
    Openapi,
    /// Hold a guest and obey a supervisor on stdin or a socket. Started by `demo` and `serve`; not for people.
    #[command(hide = true)]
    Holder(HolderArguments),
}

/// What can be asked about RDMA.
#[derive(Clone, Debug, PartialEq, Subcommand)]
pub enum Rdma {
    /// List the devices with their ports and addresses, and say of each whether a migration can use it or why not.
    Devices {
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
}

/// What the program was asked to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// `pageferry demo`.
    Demo(DemoOptions),
    /// `pageferry bench`.
    Bench(BenchRequest),
    /// `pageferry relay`.
    Relay(RelayRequest),
    /// `pageferry serve`.
    Serve(ServeOptions),
    /// What this host's daemon is to do.
    Host(CommandOptions, Box<HostCommand>),
    /// `pageferry config`.
    Config(Config),
    /// `pageferry pki`.
    Pki(Pki),
    /// `pageferry rdma`.
    Rdma(Rdma),
    /// `pageferry completions`.
    Completions(clap_complete::Shell),
    /// `pageferry man`.
    Man(PathBuf),
    /// `pageferry openapi`.
    Openapi,
    /// `pageferry holder`.
    Holder(HolderOptions),
}

/// The command line of this process.
///
/// # Errors
/// What is wrong with it, or the help that was asked for; `exit` of the error prints it and ends the process.
pub fn parse() -> Result<Request, clap::Error> {
    parse_from(std::env::args_os())
}

/// A command line from elsewhere, program name first.
///
/// # Errors
/// As [`parse`].
pub fn parse_from(
    arguments: impl IntoIterator<Item = impl Into<std::ffi::OsString> + Clone>,
) -> Result<Request, clap::Error> {
    match Arguments::try_parse_from(arguments)?.command {
        Command::Demo(demo) => demo.options().map(Request::Demo),
        Command::Bench(bench) => bench.request().map(Request::Bench),
        Command::Relay(relay) => relay.request().map(Request::Relay),
        Command::Serve(serve) => Ok(serve.request()),
        Command::Guest(guest) => Ok(guest.request()),
        Command::Migrate(migrate) => Ok(migrate.request()),
        Command::Check(check) => Ok(check.request()),
        Command::Status(status) => Ok(status.request()),
        Command::Cancel(cancel) => Ok(cancel.request()),
        Command::History(history) => Ok(history.request()),
        Command::Report(report) => Ok(report.request()),
        Command::Host(host) => Ok(host.request()),
        Command::Config(config) => Ok(Request::Config(config)),
        Command::Pki(pki) => Ok(Request::Pki(pki)),
        Command::Rdma(rdma) => Ok(Request::Rdma(rdma)),
        Command::Completions { shell } => Ok(Request::Completions(shell)),
        Command::Man { directory } => Ok(Request::Man(directory)),
        Command::Openapi => Ok(Request::Openapi),
        Command::Holder(holder) => Ok(Request::Holder(holder.options())),
    }
}

/// Prints completions for a shell on stdout.
pub fn print_completions(shell: clap_complete::Shell) {
    clap_complete::generate(shell, &mut Arguments::command(), "pageferry", &mut std::io::stdout());
}

/// Writes the manual page of each command into a directory.
///
/// # Errors
/// What the file system answers.
pub fn write_manual(directory: &std::path::Path) -> std::io::Result<()> {
    std::fs::create_dir_all(directory)?;
    clap_mangen::generate_to(Arguments::command(), directory)
}

#[derive(Debug, Args)]
struct DemoArguments {
    /// What moves. Without it: a KVM guest where /dev/kvm opens, else a process; the report says which and why.
    #[arg(long)]
    guest: Option<GuestKind>,
    /// What the guest does with its memory.
    #[arg(long, default_value = "uniform")]
    program: Program,
    /// The guest's memory.
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = quantity::memory)]
    memory: u64,
    /// How much of it the guest's program uses, from the lowest page on. Without it: all.
    #[arg(long, value_name = "SIZE", value_parser = quantity::memory)]
    touch: Option<u64>,
    /// The guest's vCPUs, 1 to 4.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_VCPUS)))]
    vcpus: u8,
    /// How much memory the guest dirties per second, in bytes (100MiB) or bits (1Gbit).
    #[arg(long, value_name = "RATE", default_value = "100MiB", value_parser = quantity::rate)]
    dirty_rate: u64,
    /// How the memory travels.
    #[arg(long, default_value = "auto")]
    mode: TransferMode,
    /// How many connections carry it, over all paths together.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=MAX_CHANNELS as i64))]
    channels: u16,
    /// A pair of addresses to connect between, like 127.0.0.1-127.0.0.2. Can be given several times.
    #[arg(long, value_name = "SRC-DST")]
    path: Vec<AddressPair>,
    /// How long the guest may stand still.
    #[arg(long, value_name = "DURATION", default_value = "300ms", value_parser = quantity::duration)]
    downtime_limit: Duration,
    /// How written pages are found: log and ring are KVM's. Without it: what fits the guest best.
    #[arg(long, value_name = "TRACKER")]
    dirty_tracker: Option<TrackerKind>,
    /// What happens when the guest writes faster than its memory can be sent.
    #[arg(long, value_name = "ACTION", default_value = "cancel")]
    on_no_convergence: OnNoConvergence,
    /// After how many rounds that counts as certain.
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    max_rounds: u32,
    /// How often the guest moves, back and forth.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    moves: u32,
    /// What the guest's choices are drawn from: the same seed gives the same writes.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Where the two hosts keep their journals. Without it: a directory that is removed at the end.
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// What is to go wrong in the process at the source: kill@ready, cut:0@1048576, ... For tests.
    #[arg(long, value_name = "FAULT", hide = true, value_parser = fault)]
    source_fault: Option<String>,
    /// What is to go wrong in the process at the destination. For tests.
    #[arg(long, value_name = "FAULT", hide = true, value_parser = fault)]
    destination_fault: Option<String>,
    /// Print the report as one JSON object on stdout, and nothing else there.
    #[arg(long)]
    json: bool,
    /// Log more of what happens, to stderr.
    #[arg(long)]
    verbose: bool,
}

#[derive(Debug, Args)]
struct HolderArguments {
    /// Where to listen for guests, when it obeys its stdin.
    #[arg(long, value_name = "ADDRESS:PORT", required_unless_present = "socket", conflicts_with = "socket")]
    listen: Vec<SocketAddr>,
    /// Obey whoever connects to this socket.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Where the journal is.
    #[arg(long, value_name = "DIR")]
    state_dir: PathBuf,
    /// What is to go wrong, for tests.
    #[arg(long, value_name = "FAULT")]
    fault: Option<FaultPlan>,
    /// Log more of what happens, to stderr.
    #[arg(long)]
    verbose: bool,
}

impl HolderArguments {
    fn options(self) -> HolderOptions {
        HolderOptions {
            supervisor: self.socket.map_or(Supervisor::Stdin(self.listen), Supervisor::Socket),
            state_dir: self.state_dir,
            faults: self.fault.unwrap_or_default(),
            verbose: self.verbose,
        }
    }
}

/// A fault as it was written, checked.
fn fault(text: &str) -> Result<String, FaultPlanError> {
    text.parse::<FaultPlan>().map(|_| text.to_owned())
}

impl DemoArguments {
    /// The same as plain data, with what no flag can check alone.
    fn options(self) -> Result<DemoOptions, clap::Error> {
        if let (Some(GuestKind::Process), Some(tracker @ (TrackerKind::Log | TrackerKind::Ring))) =
            (self.guest, self.dirty_tracker)
        {
            return Err(conflict(&format!(
                "--dirty-tracker {} is KVM's and cannot track a process; use --dirty-tracker pagemap or --guest kvm",
                tracker.name()
            )));
        }
        if self.path.len() > usize::from(self.channels) {
            return Err(conflict(&format!(
                "--channels {} leaves some of the {} paths without a connection; use --channels {} or more",
                self.channels,
                self.path.len(),
                self.path.len()
            )));
        }
        Ok(DemoOptions {
            guest: self.guest,
            program: self.program,
            memory_bytes: self.memory,
            touch_bytes: self.touch,
            vcpus: self.vcpus,
            dirty_bytes_per_second: self.dirty_rate,
            mode: self.mode,
            channels: usize::from(self.channels),
            paths: self.path,
            downtime_limit: self.downtime_limit,
            dirty_tracker: self.dirty_tracker,
            on_no_convergence: self.on_no_convergence,
            max_rounds: self.max_rounds,
            moves: self.moves,
            seed: self.seed,
            state_dir: self.state_dir,
            source_fault: self.source_fault,
            destination_fault: self.destination_fault,
            json: self.json,
            verbose: self.verbose,
        })
    }
}

fn conflict(message: &str) -> clap::Error {
    Arguments::command().error(ErrorKind::ArgumentConflict, message)
}

/// Lets clap list and read the values of a type that has names of its own.
macro_rules! named_values {
    ($type:ty, $values:expr) => {
        impl ValueEnum for $type {
            fn value_variants<'a>() -> &'a [Self] {
                &$values
            }

            fn to_possible_value(&self) -> Option<PossibleValue> {
                Some(PossibleValue::new(self.name()))
            }
        }
    };
}

named_values!(GuestKind, [Self::Kvm, Self::Process]);
named_values!(Program, Self::ALL);
named_values!(TransferMode, Self::ALL);
named_values!(OnNoConvergence, Self::ALL);
// The synthetic tracker is for tests only.
named_values!(TrackerKind, [Self::Log, Self::Ring, Self::Pagemap]);

#[cfg(test)]
mod tests {
    use super::*;

    fn demo(flags: &str) -> Result<DemoOptions, clap::Error> {
        let words = ["pageferry", "demo"].into_iter().chain(flags.split_whitespace());
        parse_from(words).map(|request| match request {
            Request::Demo(options) => options,
            other => panic!("demo was asked for, not {other:?}"),
        })
    }

    #[test]
    fn clap_finds_no_fault_with_the_definitions() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn without_flags_it_is_a_gibibyte_that_dirties_100_mebibytes_a_second() {
        let options = demo("").unwrap();
        assert_eq!((options.guest, options.memory_bytes, options.vcpus), (None, 1 << 30, 1));
        assert_eq!((options.program, options.dirty_bytes_per_second), (Program::Uniform, 100 << 20));
        assert_eq!((options.mode, options.channels, options.paths.len()), (TransferMode::Auto, 2, 0));
        assert_eq!(options.downtime_limit, Duration::from_millis(300));
        assert_eq!(options.on_no_convergence, OnNoConvergence::Cancel);
        assert_eq!((options.max_rounds, options.moves, options.json), (30, 1, false));
    }

    #[test]
    fn every_flag_arrives() {
        let options = demo(
            "--guest process --program hotset --memory 256MiB --touch 64MiB --vcpus 4 --dirty-rate 1Gbit/s --mode compression \
             --channels 3 --path 127.0.0.1-127.0.0.2 --path ::1-::1 --downtime-limit 50ms --dirty-tracker pagemap \
             --on-no-convergence throttle --max-rounds 7 --moves 10 --seed 42 --state-dir /tmp/x --source-fault kill@ready --json --verbose",
        )
        .unwrap();
        let expected = DemoOptions {
            guest: Some(GuestKind::Process),
            program: Program::Hotset,
            memory_bytes: 256 << 20,
            touch_bytes: Some(64 << 20),
            vcpus: 4,
            dirty_bytes_per_second: 125_000_000,
            mode: TransferMode::Compression,
            channels: 3,
            paths: vec!["127.0.0.1-127.0.0.2".parse().unwrap(), "::1-::1".parse().unwrap()],
            downtime_limit: Duration::from_millis(50),
            dirty_tracker: Some(TrackerKind::Pagemap),
            on_no_convergence: OnNoConvergence::Throttle,
            max_rounds: 7,
            moves: 10,
            seed: 42,
            state_dir: Some(PathBuf::from("/tmp/x")),
            source_fault: Some("kill@ready".into()),
            destination_fault: None,
            json: true,
            verbose: true,
        };
        assert_eq!(options, expected);
    }

    #[test]
    fn what_is_wrong_is_named_and_ends_with_the_code_for_usage() {
        for (flags, words) in [
            ("--guest xen", "possible values: kvm, process"),
            ("--program busy", "possible values: idle, uniform, hotset, stream"),
            ("--mode ipoib", "possible values: tcp, compression, rdma, auto"),
            ("--dirty-tracker synthetic", "possible values: log, ring, pagemap"),
            ("--on-no-convergence hope", "possible values: cancel, switch, throttle"),
            ("--memory 0", "needs some memory"),
            ("--memory 1GB", "not a whole number of 4 KiB pages"),
            ("--vcpus 0", "1..=4"),
            ("--vcpus 5", "1..=4"),
            ("--dirty-rate 100Mb", "could mean bits or bytes"),
            ("--channels 0", "1..=64"),
            ("--path lo", "like 192.0.2.1-192.0.2.2"),
            ("--downtime-limit 300", "like 300ms"),
            ("--max-rounds 0", "0 is not in 1.."),
            ("--moves 0", "0 is not in 1.."),
            ("--guest process --dirty-tracker ring", "use --dirty-tracker pagemap"),
            ("--channels 1 --path ::1-::1 --path ::1-::1", "use --channels 2 or more"),
            ("--frobnicate", "unexpected argument '--frobnicate'"),
        ] {
            let error = demo(flags).expect_err(flags);
            let message = error.to_string();
            assert!(message.contains(words), "{flags}: {message}");
            assert_eq!(error.exit_code(), i32::from(crate::host::exit::Exit::Usage.code()), "{flags}");
        }
    }
}

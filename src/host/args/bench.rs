//! The flags of `pageferry bench`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use super::conflict;
use crate::host::bench::options::{BENCH_PORT, BenchOptions, BenchRequest, Fill, ServerOptions, Target};
use crate::host::bench::sweep::CHANNELS;
use crate::host::demo_options::{AddressPair, MAX_CHANNELS};
use crate::host::quantity;
use crate::session::mode::TransferMode;
use crate::session::striping::MAX_BATCH_PAGES;
use crate::units::{Bytes, PAGE_SIZE};

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Bench {
    #[command(subcommand)]
    role: Option<Role>,
    #[command(flatten)]
    measure: Measure,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Measure between two processes of this machine; this is what is done when nothing is said.
    Local(Box<Measure>),
    /// Receive what a client on another machine sends. It does not ask who comes: let only those reach it that may.
    Server(Server),
    /// Measure to a machine where `pageferry bench server` runs.
    Client(Box<Client>),
}

#[derive(Debug, Args)]
struct Server {
    /// Where to listen: an address, with a port if it is not 7432. Can be given several times. Without it: loopback.
    #[arg(long, value_name = "ADDRESS[:PORT]", value_parser = listen_address)]
    listen: Vec<SocketAddr>,
    /// End with the first client.
    #[arg(long)]
    once: bool,
    /// Say where it listens in JSON, and end with stdin.
    #[arg(long, hide = true)]
    supervised: bool,
    /// Log more of what happens, to stderr.
    #[arg(long)]
    verbose: bool,
}

#[derive(Debug, Args)]
struct Client {
    /// The other machine: a name or an address, with a port if it is not 7432.
    #[arg(value_name = "HOST")]
    host: String,
    #[command(flatten)]
    measure: Measure,
}

#[derive(Debug, Args)]
struct Measure {
    /// How the memory travels; several with commas between them.
    #[arg(long, value_name = "MODE", default_value = "all", value_delimiter = ',')]
    mode: Vec<Mode>,
    /// How much memory is sent. Without it: 1 GiB, or all of the file.
    #[arg(long, value_name = "SIZE", value_parser = quantity::memory)]
    memory: Option<u64>,
    /// What it holds: random, zero, text, sparse:5% (in use, random, the rest untouched), scattered (every other page) or file:PATH.
    #[arg(long, value_name = "FILL", default_value = "random")]
    fill: Fill,
    /// How many connections carry it, over all paths together; several numbers with commas between them.
    /// Without it: 1,2, and with --sweep 1,2,4,8.
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=MAX_CHANNELS as i64))]
    channels: Vec<u16>,
    /// A pair of addresses to connect between, like 192.0.2.1-192.0.2.2. Can be given several times.
    #[arg(long, value_name = "SRC-DST")]
    path: Vec<AddressPair>,
    /// How much of the memory a thread writes a second meanwhile, in bytes (100MiB) or bits (1Gbit); it is sent again in rounds.
    #[arg(long, value_name = "RATE", default_value = "0", value_parser = quantity::rate)]
    dirty_rate: u64,
    /// How long to go on after the memory was sent once: with what was written meanwhile, or else with all of it again.
    #[arg(long, value_name = "DURATION", value_parser = quantity::duration)]
    duration: Option<Duration>,
    /// Populate the destination's memory before, as that of a guest that arrives is not.
    #[arg(long)]
    warm: bool,
    /// How often everything is measured, in turns; the figures are medians.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// How much is sent at a time at most, 4KiB to 4MiB; several with commas between them. Without it: 1MiB, as a migration.
    #[arg(long, value_name = "SIZE", value_delimiter = ',', value_parser = batch_pages)]
    batch: Vec<u64>,
    /// Try other batch sizes and numbers of channels, and say which are best.
    #[arg(long)]
    sweep: bool,
    /// Compare with an earlier result of --json.
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// Write a page with plots, which needs no network.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Print the result as one JSON object on stdout, and nothing else there.
    #[arg(long)]
    json: bool,
    /// Log more of what happens, to stderr.
    #[arg(long)]
    verbose: bool,
}

/// A mode to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    Tcp,
    Compression,
    Rdma,
    All,
}

impl Mode {
    fn modes(self) -> &'static [TransferMode] {
        match self {
            Self::Tcp => &[TransferMode::Tcp],
            Self::Compression => &[TransferMode::Compression],
            Self::Rdma => &[TransferMode::Rdma],
            Self::All => &[TransferMode::Tcp, TransferMode::Compression, TransferMode::Rdma],
        }
    }
}

fn batch_pages(text: &str) -> Result<u64, String> {
    let pages = quantity::memory(text).map_err(|error| error.to_string())? / PAGE_SIZE;
    let most = MAX_BATCH_PAGES * PAGE_SIZE;
    if pages > MAX_BATCH_PAGES { Err(format!("{text:?} is more than {}", Bytes(most))) } else { Ok(pages) }
}

fn listen_address(text: &str) -> Result<SocketAddr, String> {
    let alone = || text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    text.parse().or_else(|_| alone().map(|address| SocketAddr::new(address, BENCH_PORT))).map_err(|_| {
        format!("{text:?} is no address to listen at; write it like 192.0.2.1, 0.0.0.0:{BENCH_PORT} or [::]:{BENCH_PORT}")
    })
}

impl Bench {
    pub(super) fn request(self) -> Result<BenchRequest, clap::Error> {
        match self.role {
            None => self.measure.options(Target::Local),
            Some(Role::Local(measure)) => measure.options(Target::Local),
            Some(Role::Client(client)) => client.measure.options(Target::Host(client.host)),
            Some(Role::Server(server)) => Ok(BenchRequest::Serve(server.options())),
        }
    }
}

impl Server {
    fn options(self) -> ServerOptions {
        let Self { mut listen, once, supervised, verbose } = self;
        if listen.is_empty() {
            listen.push(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), BENCH_PORT));
        }
        ServerOptions { listen, once, supervised, verbose }
    }
}

impl Measure {
    fn options(self, target: Target) -> Result<BenchRequest, clap::Error> {
        if self.dirty_rate > 0 && self.duration.is_none() {
            return Err(conflict("--dirty-rate needs to know for how long: add --duration 10s"));
        }
        let mut modes = Vec::new();
        for mode in self.mode.iter().flat_map(|mode| mode.modes()) {
            if !modes.contains(mode) {
                modes.push(*mode);
            }
        }
        let mut channels: Vec<usize> = Vec::new();
        for number in self.channels.into_iter().map(usize::from) {
            if !channels.contains(&number) {
                channels.push(number);
            }
        }
        if channels.is_empty() {
            let few = if self.sweep { &CHANNELS[..] } else { &[1, 2] };
            channels.extend(few.iter().map(|few| (*few).max(self.path.len())));
            channels.dedup();
        }
        if let Some(few) = channels.iter().find(|few| **few < self.path.len()) {
            return Err(conflict(&format!(
                "--channels {few} leaves some of the {} paths without a connection; use {} or more",
                self.path.len(),
                self.path.len()
            )));
        }
        Ok(BenchRequest::Measure(Box::new(BenchOptions {
            target,
            modes,
            memory_bytes: self.memory,
            fill: self.fill,
            channels,
            paths: self.path,
            dirty_bytes_per_second: self.dirty_rate,
            duration: self.duration,
            warm: self.warm,
            runs: self.runs,
            batches: self.batch,
            sweep: self.sweep,
            compare: self.compare,
            report: self.report,
            json: self.json,
            verbose: self.verbose,
        })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::args::{Request, parse_from};

    fn bench(flags: &str) -> Result<BenchRequest, clap::Error> {
        let words = ["pageferry", "bench"].into_iter().chain(flags.split_whitespace());
        parse_from(words).map(|request| match request {
            Request::Bench(request) => request,
            other => panic!("bench was asked for, not {other:?}"),
        })
    }

    fn measure(flags: &str) -> BenchOptions {
        match bench(flags) {
            Ok(BenchRequest::Measure(options)) => *options,
            other => panic!("{flags}: {other:?}"),
        }
    }

    #[test]
    fn without_flags_it_measures_everything_on_this_machine() {
        let options = measure("");
        assert_eq!(options, measure("local"));
        assert_eq!(options.target, Target::Local);
        assert_eq!(options.modes, [TransferMode::Tcp, TransferMode::Compression, TransferMode::Rdma]);
        assert_eq!((options.channels, options.fill, options.runs), (vec![1, 2], Fill::Random, 1));
        assert_eq!((options.memory_bytes, options.duration, options.warm), (None, None, false));
    }

    #[test]
    fn flags_before_and_after_the_other_end() {
        let options = measure(
            "client host-b:9 --mode compression,tcp --channels 4,1,4 --fill sparse:5% --memory 64MiB --runs 3 --warm \
             --path 127.0.0.2-127.0.0.3 --dirty-rate 10MiB --duration 2s --sweep --batch 64KiB,4MiB --json",
        );
        assert_eq!(options.target, Target::Host("host-b:9".to_owned()));
        assert_eq!(options.modes, [TransferMode::Compression, TransferMode::Tcp]);
        assert_eq!((options.channels, options.fill), (vec![4, 1], Fill::Sparse(0.05)));
        assert_eq!(options.duration, Some(Duration::from_secs(2)));
        assert_eq!(options.batches, [16, 1024]);
        assert!(options.warm && options.sweep && options.json && !options.verbose);
        let BenchRequest::Serve(server) = bench("server --listen ::1 --listen 0.0.0.0:9 --once").unwrap()
        else {
            panic!("a server")
        };
        assert_eq!(server.listen, ["[::1]:7432".parse().unwrap(), "0.0.0.0:9".parse().unwrap()]);
        assert!(server.once && !server.supervised);
        let BenchRequest::Serve(server) = bench("server").unwrap() else { panic!("a server") };
        assert_eq!(server.listen, ["127.0.0.1:7432".parse().unwrap()]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (flags, words) in [
            ("--mode auto", "possible values: tcp, compression, rdma, all"),
            ("--fill noise", "sparse:5%"),
            ("--memory 5", "not a whole number of 4 KiB pages"),
            ("--batch 5MiB", "more than 4 MiB"),
            ("--channels 0", "1..=64"),
            ("--channels 1,65", "1..=64"),
            ("--channels two", "two"),
            ("--path lo", "like 192.0.2.1-192.0.2.2"),
            ("--channels 1 --path ::1-::1 --path ::1-::1", "use 2 or more"),
            ("--dirty-rate 100MiB", "--duration"),
            ("--dirty-rate fast --duration 1s", "like 100MiB/s"),
            ("--duration 5", "like 300ms"),
            ("--runs 0", "1..=1000"),
            ("client", "HOST"),
            ("server --listen here", "[::]:7432"),
            ("server --memory 1GiB", "--memory"),
            ("--json server", "server"),
        ] {
            let error = bench(flags).expect_err(flags);
            let message = error.to_string();
            assert!(message.contains(words), "{flags}: {message}");
            assert_eq!(error.exit_code(), i32::from(crate::host::exit::Exit::Usage.code()), "{flags}");
        }
    }
}

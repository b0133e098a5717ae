//! `pageferry bench`: how fast memory moves between two machines, in which mode, at what cost, and what limits it. It is
//! measured with the very sessions of a migration.
//!
//! [`destination`] receives, [`source`] sends; they agree by [`message`]s over a control link. [`case`] is what comes of it,
//! [`verdict`] what it means.

pub mod case;
pub mod compare;
mod destination;
mod fill;
mod machine;
mod message;
pub mod options;
mod page;
mod process;
mod source;
pub mod sweep;
mod text;
pub mod verdict;
mod writer;

use std::net::ToSocketAddrs as _;
use std::path::PathBuf;

pub use self::destination::serve;
pub use self::machine::Machine;

use self::case::{BenchReport, Case, Skipped};
use self::options::{BENCH_PORT, BenchOptions, BenchRequest, Target};
use self::process::ServerProcess;
use self::source::{Client, Measured, Payload, Setting};
use crate::engine::chain;
use crate::host::exit::Exit;
use crate::host::logging;
use crate::host::preflight::facts::FactsError;
use crate::session::striping::BATCH_PAGES;
use crate::session::{Path, SessionError};
use crate::units::Bytes;

/// How long a silent link takes to count as lost.
const LINK_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// Why there is nothing to report.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The file whose content is to be sent.
    #[error("the memory image {} cannot be read", path.display())]
    Image {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// RDMA failed on the way: a figure for TCP under its name would mislead.
    #[error("{0}; measure tcp with --mode tcp")]
    NoRdma(String),
    /// No room to map the memory.
    #[error("{} of memory cannot be mapped; use a smaller --memory", Bytes(*bytes))]
    Memory {
        /// How much.
        bytes: u64,
        /// What the kernel answers.
        #[source]
        cause: std::io::Error,
    },
    /// More memory than this machine has left.
    #[error("{} of memory would be in use here and {} are left; use a smaller --memory", Bytes(*needed), Bytes(*left))]
    NoRoom {
        /// How much is needed.
        needed: u64,
        /// How much there is.
        left: u64,
    },
    /// The kernel does not say how much memory there is.
    #[error(transparent)]
    Facts(#[from] FactsError),
    /// The kernel does not say which pages are in use.
    #[error("which memory is in use cannot be told; it takes Linux 6.7 or newer")]
    Touched(#[source] std::io::Error),
    /// The memory cannot be hashed.
    #[error("the memory cannot be hashed to compare it")]
    Digest(#[source] std::io::Error),
    /// The thread that writes the memory.
    #[error("the memory cannot be written meanwhile")]
    Writer(#[source] std::io::Error),
    /// The kernel's random source.
    #[error("the kernel gives no random bytes")]
    Random(#[source] std::io::Error),
    /// The name of the other machine.
    #[error("{host:?} leads to no address; write a name or an address, and a port if it is not {BENCH_PORT}")]
    Host {
        /// As it was given.
        host: String,
        /// What the resolver says.
        #[source]
        cause: std::io::Error,
    },
    /// The process of the receiving end.
    #[error("the receiving process cannot be started")]
    Server(#[source] std::io::Error),
    /// It started and did not listen.
    #[error("the receiving process does not listen; what it says is above")]
    NoServer,
    /// Something in the session.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A message from the other end.
    #[error("the other end is no pageferry bench, or a damaged one")]
    Message(#[from] MessageError),
    /// The other end is another release.
    #[error(
        "the other end speaks version {theirs} of the measurement's messages and this one {ours}; use the same release"
    )]
    Version {
        /// The other end's.
        theirs: u32,
        /// This one's.
        ours: u32,
    },
    /// A message that has no place here.
    #[error("the other end said something out of turn")]
    OutOfTurn,
    /// The other end says no.
    #[error("the other end refuses: {0}")]
    Refused(String),
    /// The other end says nothing.
    #[error("the other end has gone")]
    Gone,
    /// The other end lied about the memory.
    #[error("more memory came than the {0} that were announced")]
    MoreThanAnnounced(Bytes),
    /// Every mode was left out.
    #[error("nothing can be measured: {0}")]
    NothingToMeasure(String),
    /// An earlier result.
    #[error("{} is no result of pageferry bench --json", path.display())]
    Baseline {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// Writing the page.
    #[error("the page {} cannot be written", path.display())]
    Page {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// Writing a result.
    #[error("the result cannot be written")]
    Output(#[source] std::io::Error),
}

/// A message that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct MessageError(message::MessageError);

impl From<message::MessageError> for BenchError {
    fn from(error: message::MessageError) -> Self {
        Self::Message(MessageError(error))
    }
}

/// Measures, or is measured against.
#[must_use]
pub fn run(request: &BenchRequest) -> Exit {
    let options = match request {
        BenchRequest::Serve(options) => return serve(options),
        BenchRequest::Measure(options) => options,
    };
    logging::start(if options.verbose { "info" } else { "warn" });
    match measure(options).and_then(|report| tell(options, &report)) {
        Ok(exit) => exit,
        Err(error) => {
            eprintln!("pageferry: {}", chain(&error));
            Exit::Failed
        }
    }
}

/// Gives the result out, and answers how the program ends.
fn tell(options: &BenchOptions, report: &BenchReport) -> Result<Exit, BenchError> {
    if options.json {
        let json = serde_json::to_string(report).map_err(|error| BenchError::Output(error.into()))?;
        println!("{json}");
    } else {
        print!("{}", text::of(report));
    }
    if let Some(path) = &options.report {
        let failed = |cause| BenchError::Page { path: path.clone(), cause };
        std::fs::write(path, page::page(report)).map_err(failed)?;
        say(options, &format!("the page is {}", path.display()));
    }
    Ok(if report.cases.iter().all(|case| case.verified) { Exit::Completed } else { Exit::Damaged })
}

fn measure(options: &BenchOptions) -> Result<BenchReport, BenchError> {
    // First, so that a wrong name is not noticed at the end.
    let baseline = options.compare.as_deref().map(compare::baseline).transpose()?;
    let (memory_bytes, in_use_bytes) = fill::sizes(&options.fill, options.memory_bytes)?;
    let left = machine::memory_left()?;
    let needed = in_use_bytes.saturating_add(machine::bookkeeping(memory_bytes));
    if needed > left {
        return Err(BenchError::NoRoom { needed, left });
    }
    let (server, paths) = match &options.target {
        Target::Local => {
            let server = ServerProcess::start(options)?;
            let paths = server.paths.clone();
            (Some(server), paths)
        }
        Target::Host(host) => (None, paths_to(host, options)?),
    };
    let client = Client::connect(&paths)?;
    let (settings, skipped) = settings(options, &client)?;
    say(options, &format!("filling {} of memory ({})", Bytes(memory_bytes), options.fill));
    let mut payload = Payload::new(fill::memory(&options.fill, memory_bytes)?)?;
    let mut measured: Vec<Vec<Measured>> = vec![Vec::new(); settings.len()];
    for run in 1..=options.runs {
        for (setting, measured) in settings.iter().zip(&mut measured) {
            let taken = client.transfer(&mut payload, *setting, options)?;
            say(options, &progress(*setting, run, options.runs, &taken));
            measured.push(taken);
        }
    }
    let (here, there) = (Machine::this(), client.machine.clone());
    client.close();
    let one_machine = server.is_some();
    drop(server);
    let facts = case::Facts { options, payload: &payload, source: &here, destination: &there, one_machine };
    let cases: Vec<Case> =
        settings.iter().zip(&measured).map(|(setting, runs)| Case::of(*setting, runs, &facts)).collect();
    let mut report = BenchReport::new(&facts, cases, skipped);
    report.comparison =
        baseline.map_or_else(Vec::new, |before| compare::compare(&report.cases, &before.cases));
    report.best = options.sweep.then(|| sweep::best(&report.cases, options.paths.len())).flatten();
    Ok(report)
}

/// Every combination that is measured, and the modes that cannot be.
fn settings(options: &BenchOptions, client: &Client) -> Result<(Vec<Setting>, Vec<Skipped>), BenchError> {
    let (mut settings, mut skipped) = (Vec::new(), Vec::new());
    for &mode in &options.modes {
        let resolved = client.resolve(mode);
        if resolved.used != mode {
            skipped.push(Skipped { mode, reason: resolved.reason });
            continue;
        }
        let batches = match &options.batches[..] {
            [] if options.sweep => &sweep::BATCHES[..],
            [] => &[BATCH_PAGES],
            given => given,
        };
        for &channels in &options.channels {
            settings.extend(batches.iter().map(|&batch_pages| Setting { mode, channels, batch_pages }));
        }
    }
    if settings.is_empty() {
        let reasons: Vec<&str> = skipped.iter().map(|skipped| skipped.reason.as_str()).collect();
        return Err(BenchError::NothingToMeasure(reasons.join("; ")));
    }
    Ok((settings, skipped))
}

/// The ways to a host: those that were given, at the port of the host; or the one that the routing table chooses.
fn paths_to(host: &str, options: &BenchOptions) -> Result<Vec<Path>, BenchError> {
    let failed = |cause| BenchError::Host { host: host.to_owned(), cause };
    let with_port = host.to_socket_addrs();
    let mut addresses = match with_port {
        Ok(addresses) => addresses,
        Err(_) => (host.trim_start_matches('[').trim_end_matches(']'), BENCH_PORT)
            .to_socket_addrs()
            .map_err(failed)?,
    };
    let nothing = || failed(std::io::ErrorKind::NotFound.into());
    let first = addresses.next().ok_or_else(nothing)?;
    if options.paths.is_empty() {
        return Ok(vec![Path::to(first)]);
    }
    let path = |pair: &crate::host::demo_options::AddressPair| {
        let destination = std::net::SocketAddr::new(pair.destination, first.port());
        Path { source: Some(pair.source), ..Path::to(destination) }
    };
    Ok(options.paths.iter().map(path).collect())
}

/// A line for whoever waits.
fn say(options: &BenchOptions, what: &str) {
    if !options.json || options.verbose {
        eprintln!("{what}");
    }
}

fn progress(setting: Setting, run: u32, runs: u32, measured: &Measured) -> String {
    let rate = crate::host::view::table::per_second(measured.bytes, measured.seconds);
    let of = if runs > 1 { format!(" ({run} of {runs})") } else { String::new() };
    let unlike = if measured.verified { "" } else { ", AND WHAT CAME IS NOT WHAT WAS SENT" };
    let channels =
        if setting.channels == 1 { "1 channel" } else { &format!("{} channels", setting.channels) };
    let batch = match setting.batch_pages {
        BATCH_PAGES => String::new(),
        pages => format!(", batches of {}", Bytes(pages * crate::units::PAGE_SIZE)),
    };
    format!("{}, {channels}{batch}{of}: {rate}{unlike}", setting.mode)
}

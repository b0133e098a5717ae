//! `pageferry demo`: two host processes on this machine, a guest in one of them, and its move to the other.

mod account;
mod watch;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::engine::chain;
use crate::host::demo_options::{AddressPair, DemoOptions, GuestKind};
use crate::host::exit::Exit;
use crate::host::guests;
use crate::host::holder::protocol::{
    Caps, Command, Event, GuestSeen, GuestSpec, MovePath, MoveSpec, ReceiveSpec,
};
use crate::host::progress::{Progress, ProgressState};
use crate::host::report::Report;
use crate::host::supervise::{HolderProcess, SuperviseError};
use crate::memory::HugePages;
use crate::session::RdmaTuning;
use crate::units::Bytes;
use account::Account;

/// A guest of many GiB takes minutes to write all of it once where vCPUs are emulated.
const START_LIMIT: Duration = Duration::from_secs(900);
/// How long an answer about the guest may take. Verifying walks all memory that it uses.
const ANSWER_LIMIT: Duration = Duration::from_secs(300);
/// How long the guest's pace is watched before the move.
const PACE_WATCH: Duration = Duration::from_millis(300);
/// How long the guest runs after the move before it is asked: some heartbeats.
const SETTLE: Duration = Duration::from_millis(150);
/// How long the source asks when in doubt. A person waits for the demonstration.
const DOUBT: Duration = Duration::from_secs(20);

/// Moves a guest between two host processes of this machine, and reports on stdout.
#[must_use]
pub fn run(options: &DemoOptions) -> Exit {
    match demonstrate(options) {
        Ok(report) => {
            if options.json {
                println!("{}", report.to_json());
            } else {
                print!("{report}");
            }
            report.exit()
        }
        Err(error) => {
            eprintln!("pageferry: {}", chain(&error));
            Exit::Failed
        }
    }
}

/// Why there is nothing to report.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// Neither process can be given a place for its journal.
    #[error("no directory for the journals; give one with --state-dir")]
    StateDir(#[source] std::io::Error),
    /// A process failed before the guest began to move.
    #[error(transparent)]
    Process(#[from] SuperviseError),
}

fn demonstrate(options: &DemoOptions) -> Result<Report, DemoError> {
    let (kind, guest_why) = choose_guest(options);
    let state = StateDir::make(options.state_dir.as_deref())?;
    let mut progress = Progress::on_stderr(options.json, options.verbose);
    let listen: Vec<SocketAddr> =
        paths(options).iter().map(|pair| SocketAddr::new(pair.destination, 0)).collect();
    let back: Vec<SocketAddr> = paths(options).iter().map(|pair| SocketAddr::new(pair.source, 0)).collect();
    let [source_fault, destination_fault] =
        [&options.source_fault, &options.destination_fault].map(Option::as_deref);
    let mut hosts = [
        HolderProcess::start("source", &back, &state.path().join("source"), source_fault, options.verbose)?,
        HolderProcess::start(
            "destination",
            &listen,
            &state.path().join("destination"),
            destination_fault,
            options.verbose,
        )?,
    ];
    progress.update(&ProgressState {
        phase: format!("starting a {} guest with {}", kind.name(), Bytes(options.memory_bytes)),
        ..ProgressState::default()
    });
    let spec = guest_spec(options, kind);
    hosts[0].ask(&Command::Start(spec.clone()), START_LIMIT, |event| {
        matches!(event, Event::Started { .. }).then_some(())
    })?;
    let mut account = Account::new(options, kind, guest_why, spec.tracker);
    for number in 0..options.moves {
        let [first, second] = &mut hosts;
        let (from, to) = if number % 2 == 0 { (first, second) } else { (second, first) };
        if !one_move(options, from, to, &mut progress, &mut account)? {
            break;
        }
    }
    progress.finish();
    Ok(account.report())
}

/// Moves the guest once. Answers whether it arrived.
fn one_move(
    options: &DemoOptions,
    from: &mut HolderProcess,
    to: &mut HolderProcess,
    progress: &mut Progress,
    account: &mut Account,
) -> Result<bool, DemoError> {
    account.pace_before(seen(from)?);
    std::thread::sleep(PACE_WATCH);
    account.pace_after(seen(from)?);
    from.ask(&Command::ResetGap, ANSWER_LIMIT, |event| matches!(event, Event::GapReset).then_some(()))?;
    let tracker = options.dirty_tracker;
    let receive = ReceiveSpec { tracker, digest_ram: true, ..ReceiveSpec::default() };
    to.ask(&Command::Receive(receive), ANSWER_LIMIT, |event| {
        matches!(event, Event::Receiving { .. }).then_some(())
    })?;
    from.tell(&Command::Move(move_spec(options, to)))?;
    let ends = watch::until_both_end(from, to, progress);
    account.moved(&ends);
    let holder = if ends.runs_at_destination() { to } else { from };
    std::thread::sleep(SETTLE);
    if let Ok(settled) = seen(holder) {
        account.settled(settled);
        progress.update(&ProgressState {
            phase: "the guest verifies its memory".into(),
            ..ProgressState::default()
        });
        let verified = holder.ask(&Command::Verify, ANSWER_LIMIT, seen_in);
        account.verified(verified);
    }
    Ok(ends.runs_at_destination())
}

fn seen(holder: &mut HolderProcess) -> Result<GuestSeen, SuperviseError> {
    holder.ask(&Command::Report, ANSWER_LIMIT, seen_in)
}

#[expect(clippy::needless_pass_by_value, reason = "as `wait_for` hands events over")]
fn seen_in(event: Event) -> Option<GuestSeen> {
    match event {
        Event::Guest(seen) => Some(seen),
        _ => None,
    }
}

/// Which guest, and why when nobody chose.
fn choose_guest(options: &DemoOptions) -> (GuestKind, Option<String>) {
    match (options.guest, guests::why_no_kvm()) {
        (Some(kind), _) => (kind, None),
        (None, None) => (GuestKind::Kvm, None),
        (None, Some(why)) => (GuestKind::Process, Some(why)),
    }
}

fn guest_spec(options: &DemoOptions, kind: GuestKind) -> GuestSpec {
    GuestSpec {
        kind,
        memory_bytes: options.memory_bytes,
        touch_bytes: options.touch_bytes,
        vcpus: options.vcpus,
        program: options.program,
        dirty_bytes_per_second: options.dirty_bytes_per_second,
        seed: options.seed,
        tracker: options.dirty_tracker.unwrap_or(guests::best_tracker(kind)),
        huge_pages: HugePages::No,
    }
}

fn paths(options: &DemoOptions) -> Vec<AddressPair> {
    if options.paths.is_empty() {
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        return vec![AddressPair { source: loopback, destination: loopback }];
    }
    options.paths.clone()
}

/// From wherever the guest is to where `to` listens; the address at this end is the other one of each pair.
fn move_spec(options: &DemoOptions, to: &HolderProcess) -> MoveSpec {
    let pairs = paths(options);
    let forth = to.name() == "destination";
    let own = pairs.iter().map(|pair| if forth { pair.source } else { pair.destination });
    MoveSpec {
        qemu: None,
        name: "demo".into(),
        paths: own
            .zip(to.addresses())
            .map(|(source, to)| MovePath {
                source: Some(source),
                destination: *to,
                interface: None,
                isolated: false,
            })
            .collect(),
        answering: Vec::new(),
        channels: options.channels,
        mode: options.mode,
        downtime_limit_ms: u64::try_from(options.downtime_limit.as_millis()).unwrap_or(u64::MAX),
        max_rounds: options.max_rounds,
        on_no_convergence: options.on_no_convergence,
        doubt_ms: u64::try_from(DOUBT.as_millis()).unwrap_or(u64::MAX),
        agreed: None,
        caps: Caps::default(),
        requires_encryption: false,
        rdma: RdmaTuning::default(),
        digest_ram: true,
        fault: None,
    }
}

/// Where the journals are: the one that was given, or one that goes away.
struct StateDir {
    path: PathBuf,
    ours: bool,
}

impl StateDir {
    fn make(given: Option<&Path>) -> Result<Self, DemoError> {
        if let Some(path) = given {
            return Ok(Self { path: path.to_owned(), ours: false });
        }
        let unique: [u8; 8] = crate::engine::draw().map_err(DemoError::StateDir)?;
        let path = std::env::temp_dir().join(format!("pageferry-demo-{:016x}", u64::from_le_bytes(unique)));
        std::fs::create_dir(&path).map_err(DemoError::StateDir)?;
        Ok(Self { path, ours: true })
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        if self.ours {
            // What is left in the temporary directory then is two small files.
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

//! The process that holds a guest and its data path. A crash of it harms one guest; whoever supervises it only talks to it.

use std::io::{BufRead as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::engine::cancel::{CancelHandle, cancel_pair};
use crate::engine::destination::{ReceiveOptions, Setup, receive};
use crate::engine::endpoint::Endpoint;
use crate::engine::fault::FaultPlan;
use crate::engine::journal::{Journal, Unfinished};
use crate::engine::recovery::{Recovered, recover, resolve};
use crate::engine::source::{MigrateOptions, migrate};
use crate::engine::{chain, observe};
use crate::host::exit::Exit;
use crate::host::guests::{self, AnyGuest};
use crate::host::holder_convert::{arrived, move_progress, moved};
use crate::host::holder_protocol::{Command, Event, GuestSeen, GuestSpec, MoveSpec};
use crate::migration::convergence::Limits;
use crate::migration::handover::{Arrival, Outcome};
use crate::migration::source::Patience;
use crate::session::path::Path;
use crate::units::PAGE_SIZE;

/// A guest that has not written all its pages by then never will.
const WARM_UP_LIMIT: Duration = Duration::from_secs(600);
/// How long between two questions about a guest whose migration ended in doubt.
const SETTLE_PAUSE: Duration = Duration::from_secs(2);
/// How long a question after a restart may take.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(5);

/// How such a process is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HolderOptions {
    /// Where it listens.
    pub listen: Vec<SocketAddr>,
    /// Where its journal is.
    pub state_dir: PathBuf,
    /// What is to go wrong, in tests.
    pub faults: FaultPlan,
    /// Whether more is logged.
    pub verbose: bool,
}

/// Serves commands from stdin until it ends. The guest ends with it. What keeps it from starting is told as an event.
#[must_use]
pub fn run(options: &HolderOptions) -> Exit {
    match serve(options) {
        Ok(()) => Exit::Completed,
        Err(why) => {
            emit(&Event::Failed { why });
            Exit::Failed
        }
    }
}

fn serve(options: &HolderOptions) -> Result<(), String> {
    let journal = Journal::open(&options.state_dir).map_err(|error| chain(&error))?;
    // Listening first: two hosts that come back together ask each other.
    let endpoint = Endpoint::bind(&options.listen, journal.clone()).map_err(|error| chain(&error))?;
    let recovered = recover(&journal, RECOVERY_TIMEOUT).map_err(|error| chain(&error))?;
    emit(&Event::Listening { addresses: endpoint.local_addresses() });
    for (unfinished, what) in recovered {
        let completed = what == Recovered::Completed;
        emit(&Event::Recovered { what: format!("migration {}: {what:?}", unfinished.migration), completed });
    }
    let mut holder = Holder {
        endpoint: Arc::new(endpoint),
        journal,
        faults: options.faults.clone(),
        guest: Arc::default(),
        busy: None,
    };
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        match serde_json::from_str(&line) {
            Ok(command) => holder.obey(command),
            Err(error) => emit(&Event::Failed { why: format!("{line:?} is no command: {error}") }),
        }
    }
    Ok(())
}

fn emit(event: &Event) {
    let Ok(mut line) = serde_json::to_string(event) else { return };
    line.push('\n');
    // A supervisor that has gone reads nothing; the guest is not stopped for that.
    let _ = std::io::stdout().lock().write_all(line.as_bytes());
}

/// Asks until the destination answers what became of a guest that stands still here. Answers whether it runs here again.
fn settle(guest: &mut AnyGuest, unfinished: &Unfinished, journal: &Journal) -> bool {
    loop {
        match resolve(guest, unfinished, journal, RECOVERY_TIMEOUT) {
            Ok(Outcome::Completed { .. }) => return false,
            Ok(Outcome::RolledBack { .. }) => return true,
            Ok(Outcome::InDoubt { .. }) => {}
            Err(error) => tracing::warn!("the doubt cannot be settled now: {}", chain(&error)),
        }
        std::thread::sleep(SETTLE_PAUSE);
    }
}

type Slot = Arc<Mutex<Option<AnyGuest>>>;

struct Holder {
    endpoint: Arc<Endpoint>,
    journal: Journal,
    faults: FaultPlan,
    /// Empty while it moves, and when there is none.
    guest: Slot,
    /// The move or arrival under way.
    busy: Option<(CancelHandle, JoinHandle<()>)>,
}

fn held(slot: &Slot) -> MutexGuard<'_, Option<AnyGuest>> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Holder {
    fn obey(&mut self, command: Command) {
        let done = match command {
            Command::Start(spec) => self.start(&spec),
            Command::Receive { tracker } => self.receive(tracker),
            Command::Move(spec) => self.migrate(&spec),
            Command::Cancel => {
                if let Some((cancel, _)) = &self.busy {
                    cancel.cancel();
                }
                Ok(())
            }
            Command::Report => self.with_guest(|guest| Ok(Event::Guest(GuestSeen::now(guest.report())))),
            Command::Verify => self.with_guest(|guest| {
                let seen = guest.verify_all().map_err(|error| chain(&error))?;
                Ok(Event::Guest(GuestSeen::now(seen)))
            }),
            Command::ResetGap => self.with_guest(|guest| {
                guest.reset_gap();
                Ok(Event::GapReset)
            }),
        };
        if let Err(why) = done {
            emit(&Event::Failed { why });
        }
    }

    fn with_guest(
        &mut self,
        apply: impl FnOnce(&mut AnyGuest) -> Result<Event, String>,
    ) -> Result<(), String> {
        let mut slot = held(&self.guest);
        let guest = slot.as_mut().ok_or("there is no guest here, or it is being moved")?;
        emit(&apply(guest)?);
        Ok(())
    }

    fn start(&mut self, spec: &GuestSpec) -> Result<(), String> {
        if held(&self.guest).is_some() {
            return Err("there is a guest here already".into());
        }
        let mut guest = guests::make(spec).map_err(|error| chain(&error))?;
        guest.resume().map_err(|error| chain(&error))?;
        let began = Instant::now();
        while !guest.warmed_up() {
            if began.elapsed() > WARM_UP_LIMIT {
                return Err(format!("the guest has not written all its pages in {WARM_UP_LIMIT:?}"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let touched = guest.touched().map_err(|error| chain(&error))?.len();
        *held(&self.guest) = Some(guest);
        emit(&Event::Started { touched_bytes: touched * PAGE_SIZE });
        Ok(())
    }

    fn not_busy(&mut self) -> Result<(), String> {
        if let Some((_, thread)) = self.busy.take_if(|(_, thread)| thread.is_finished()) {
            let _ = thread.join();
        }
        if self.busy.is_some() { Err("a guest is being moved or awaited here".into()) } else { Ok(()) }
    }

    fn receive(&mut self, tracker: Option<crate::dirty::TrackerKind>) -> Result<(), String> {
        self.not_busy()?;
        let (cancel, signal) = cancel_pair();
        let options = ReceiveOptions {
            digest_ram: true,
            cancel: signal,
            faults: std::mem::take(&mut self.faults),
            ..ReceiveOptions::default()
        };
        let (endpoint, slot) = (Arc::clone(&self.endpoint), Arc::clone(&self.guest));
        self.spawn(cancel, move || {
            let mut make = |setup: &Setup| guests::skeleton(setup, tracker);
            let place = endpoint.expect();
            emit(&Event::Receiving);
            let Some(received) = receive(place, &options, &mut make) else { return };
            let running = matches!(received.report.arrival, Arrival::Running { .. });
            *held(&slot) = received.guest.filter(|_| running);
            emit(&Event::Arrived(Box::new(arrived(received.report))));
        })
    }

    fn migrate(&mut self, spec: &MoveSpec) -> Result<(), String> {
        self.not_busy()?;
        let mut guest = held(&self.guest).take().ok_or("there is no guest here")?;
        let (cancel, signal) = cancel_pair();
        let paths = spec
            .paths
            .iter()
            .map(|(source, destination)| Path { source: *source, destination: *destination });
        let options = MigrateOptions {
            channels: spec.channels,
            mode: spec.mode,
            limits: Limits {
                downtime: Duration::from_millis(spec.downtime_limit_ms),
                rounds: spec.max_rounds,
                on_no_convergence: spec.on_no_convergence,
                ..Limits::default()
            },
            patience: Patience { doubt: Duration::from_millis(spec.doubt_ms), ..Patience::default() },
            digest_ram: true,
            cancel: signal,
            faults: std::mem::take(&mut self.faults),
            ..MigrateOptions::new("demo", guest.kind_name(), paths.collect())
        };
        let (journal, slot) = (self.journal.clone(), Arc::clone(&self.guest));
        self.spawn(cancel, move || {
            guest.reset_gap();
            let before = GuestSeen::now(guest.report());
            let mut observer = |progress: &observe::Progress| emit(&Event::Progress(move_progress(progress)));
            let report = migrate(&mut guest, &options, &journal, &mut observer);
            let after = GuestSeen::now(guest.report());
            let (outcome, migration) = (report.outcome.clone(), report.migration);
            // A guest that has moved is dropped here.
            if matches!(outcome, Outcome::RolledBack { .. }) {
                *held(&slot) = Some(guest);
                return emit(&Event::Moved(Box::new(moved(report, before, after))));
            }
            emit(&Event::Moved(Box::new(moved(report, before, after))));
            if let Outcome::InDoubt { token } = outcome {
                let peers = options.paths.iter().map(|path| path.destination).collect();
                let unfinished = Unfinished { migration, token, peers };
                let here = settle(&mut guest, &unfinished, &journal);
                *held(&slot) = here.then_some(guest);
                emit(&Event::Settled { here });
            }
        })
    }

    fn spawn(&mut self, cancel: CancelHandle, work: impl FnOnce() + Send + 'static) -> Result<(), String> {
        let thread = std::thread::Builder::new()
            .name("pf-engine".into())
            .spawn(work)
            .map_err(|error| format!("no thread for the migration: {error}"))?;
        self.busy = Some((cancel, thread));
        Ok(())
    }
}

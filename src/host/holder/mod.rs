//! The process that holds a guest and its data path. A crash of it harms one guest; whoever supervises it only talks to it.

mod convert;
mod outlet;
pub mod protocol;
mod qemu;
mod work;

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::engine::cancel::{CancelHandle, PeerGoneHandle};
use crate::engine::chain;
use crate::engine::endpoint::Endpoint;
use crate::engine::fault::FaultPlan;
use crate::engine::journal::Journal;
use crate::engine::recovery::{Recovered, recover};
use crate::host::exit::Exit;
use crate::host::guests::AnyGuest;
use crate::session::caps::RateCaps;
use crate::session::trust::Trust;
use outlet::{Client, Outlet};
use protocol::{Command, Doing, Event, HolderState, Request};

/// How long a question after a restart may take.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(5);
/// A process that has no guest and hears from nobody for so long ends.
const ALONE: Duration = Duration::from_secs(60);
/// How often it looks whether it should end.
const LOOK: Duration = Duration::from_millis(100);

/// How such a process is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HolderOptions {
    /// Whom it obeys.
    pub supervisor: Supervisor,
    /// Where the host's journal is.
    pub state_dir: PathBuf,
    /// What is to go wrong, in tests.
    pub faults: FaultPlan,
    /// Whether more is logged.
    pub verbose: bool,
}

/// Whom a process that holds a guest obeys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Supervisor {
    /// Whoever writes to its stdin; the guest ends with that. It listens at these addresses from the start.
    Stdin(Vec<SocketAddr>),
    /// Whoever connects to this socket. The guest outlives them.
    Socket(PathBuf),
}

/// Obeys until it is told to end. What keeps it from starting is told as an event, or on stderr.
#[must_use]
pub fn run(options: &HolderOptions) -> Exit {
    let done = match &options.supervisor {
        Supervisor::Stdin(listen) => serve_stdin(options, listen),
        Supervisor::Socket(path) => serve_socket(options, path),
    };
    match done {
        Ok(()) => Exit::Completed,
        Err(why) => {
            tracing::error!("the process that holds a guest ends: {why}");
            Outlet::stdout().emit(Event::Failed { why });
            Exit::Failed
        }
    }
}

fn serve_stdin(options: &HolderOptions, listen: &[SocketAddr]) -> Result<(), String> {
    let journal = Journal::open(&options.state_dir).map_err(|error| chain(&error))?;
    // Listening first: two hosts that come back together ask each other.
    let endpoint = Endpoint::bind(listen, journal.clone()).map_err(|error| chain(&error))?;
    let recovered = recover(&journal, &Trust::Insecure, RECOVERY_TIMEOUT).map_err(|error| chain(&error))?;
    let outlet = Outlet::stdout();
    outlet.emit(Event::Listening { addresses: endpoint.local_addresses() });
    for (unfinished, what) in recovered {
        let completed = what == Recovered::Completed;
        outlet.emit(Event::Recovered {
            what: format!("migration {}: {what:?}", unfinished.migration),
            completed,
        });
    }
    let holder = Arc::new(Holder::new(outlet, journal, options.faults.clone()));
    *lock(&holder.endpoint) = Some(Arc::new(endpoint));
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        holder.hear(Client::STDOUT, &line);
        if holder.over.load(Ordering::Relaxed) {
            break;
        }
    }
    Ok(())
}

/// Of its own session: neither the daemon's end nor a terminal's takes the guest with it.
fn serve_socket(options: &HolderOptions, path: &Path) -> Result<(), String> {
    // It fails for the leader of a process group, which is as well apart from the daemon's.
    let _ = rustix::process::setsid();
    let journal = Journal::open(&options.state_dir).map_err(|error| chain(&error))?;
    let failed = |error: std::io::Error| format!("the socket {}: {error}", path.display());
    let listener = UnixListener::bind(path).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let holder = Arc::new(Holder::new(Outlet::default(), journal, options.faults.clone()));
    let mut heard = Instant::now();
    while !holder.over.load(Ordering::Relaxed) && heard.elapsed() < ALONE {
        match listener.accept() {
            Ok((stream, _)) => holder.greet(stream),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => std::thread::sleep(LOOK),
            Err(error) => {
                tracing::warn!("a supervisor could not be accepted: {error}");
                std::thread::sleep(LOOK);
            }
        }
        if holder.outlet.is_heard() || holder.state().doing != Doing::Nothing {
            heard = Instant::now();
        }
    }
    // Whoever looks for it must not find a socket that nobody answers.
    let _ = std::fs::remove_file(path);
    Ok(())
}

type Slot = Arc<Mutex<Option<AnyGuest>>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind these locks is replaced as a whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Holder {
    outlet: Outlet,
    journal: Journal,
    faults: Mutex<FaultPlan>,
    state: Mutex<HolderState>,
    /// Empty while it moves, and when there is none.
    guest: Slot,
    endpoint: Mutex<Option<Arc<Endpoint>>>,
    /// The move or arrival under way.
    busy: Mutex<Option<Busy>>,
    /// It was told to end, or has nothing more to do.
    over: AtomicBool,
}

struct Busy {
    handles: Handles,
    thread: JoinHandle<()>,
}

/// What a move or arrival is told by while it is under way.
struct Handles {
    cancel: CancelHandle,
    /// Only for a move: an arrival is cancelled.
    peer_gone: Option<PeerGoneHandle>,
    caps: RateCaps,
}

impl Holder {
    fn new(outlet: Outlet, journal: Journal, faults: FaultPlan) -> Self {
        let state = HolderState { pid: std::process::id(), encrypts: true, ..HolderState::default() };
        Self {
            outlet,
            journal,
            faults: Mutex::new(faults),
            state: Mutex::new(state),
            guest: Slot::default(),
            endpoint: Mutex::default(),
            busy: Mutex::default(),
            over: AtomicBool::new(false),
        }
    }

    fn state(&self) -> MutexGuard<'_, HolderState> {
        lock(&self.state)
    }

    /// Gives a supervisor a thread to be heard by.
    fn greet(self: &Arc<Self>, stream: UnixStream) {
        let heard = stream.set_nonblocking(false).and_then(|()| stream.try_clone()).and_then(|told| {
            let client = self.outlet.join(told, || Event::Hello(self.state().clone()))?;
            let holder = Arc::clone(self);
            std::thread::Builder::new().name("pf-supervisor".into()).spawn(move || {
                for line in BufReader::new(stream).lines() {
                    let Ok(line) = line else { break };
                    holder.hear(client, &line);
                }
                holder.outlet.leave(client);
            })
        });
        if let Err(error) = heard {
            tracing::warn!("a supervisor is not heard: {error}");
        }
    }

    fn hear(self: &Arc<Self>, client: Client, line: &str) {
        match serde_json::from_str::<Request>(line) {
            // These take long, and others are not to wait for them.
            Ok(request) if matches!(request.command, Command::Start(_) | Command::Verify) => {
                let holder = Arc::clone(self);
                let (id, command) = (request.id, request.command);
                let started = std::thread::Builder::new()
                    .name("pf-command".into())
                    .spawn(move || holder.obey(client, id, command));
                if let Err(error) = started {
                    self.outlet.answer(
                        client,
                        id,
                        Event::Failed { why: format!("no thread for it: {error}") },
                    );
                }
            }
            Ok(request) => self.obey(client, request.id, request.command),
            Err(error) => {
                let why = format!("{line:?} is no command: {error}");
                self.outlet.answer(client, None, Event::Failed { why });
            }
        }
    }

    fn obey(self: &Arc<Self>, client: Client, id: Option<u64>, command: Command) {
        let done = match command {
            Command::Start(spec) => self.start(&spec),
            Command::Receive(spec) => match &spec.qemu {
                None => self.receive(&spec),
                Some(qemu) => self.receive_qemu(&spec, qemu),
            },
            Command::Move(spec) => match &spec.qemu {
                None => self.migrate(&spec),
                Some(qemu) => self.migrate_qemu(&spec, qemu),
            },
            Command::Cancel => {
                if let Some(busy) = &*lock(&self.busy) {
                    busy.handles.cancel.cancel();
                }
                Ok(Event::Done)
            }
            Command::PeerGone { cause } => {
                if let Some(gone) = lock(&self.busy).as_ref().and_then(|busy| busy.handles.peer_gone.as_ref())
                {
                    gone.tell(&cause);
                }
                Ok(Event::Done)
            }
            Command::SetCaps(caps) => {
                if let Some(busy) = &*lock(&self.busy) {
                    work::set_caps(&busy.handles.caps, &caps);
                }
                Ok(Event::Done)
            }
            Command::Report => self.report(),
            Command::Facts => self.needs(),
            Command::Console => self.console(),
            Command::Verify => self.verify(),
            Command::ResetGap => self.reset_gap(),
            Command::Acknowledge => {
                self.acknowledge();
                Ok(Event::Done)
            }
            Command::Stop => self.stop(),
        };
        let event = done.unwrap_or_else(|why| Event::Failed { why });
        self.outlet.answer(client, id, event);
    }

    /// The ends that were told are known: nothing keeps a process without a guest then.
    fn acknowledge(&self) {
        let mut state = self.state();
        (state.moved, state.settled, state.arrived) = (None, None, None);
        if state.doing == Doing::Nothing {
            self.over.store(true, Ordering::Relaxed);
        }
    }

    fn stop(&self) -> Result<Event, String> {
        match self.state().doing {
            Doing::Moving | Doing::Receiving => {
                Err("its guest is on its way; cancel the migration first".into())
            }
            Doing::InDoubt => {
                Err("another host may run its guest, which is being asked; it cannot be stopped before"
                    .into())
            }
            Doing::Nothing | Doing::Starting | Doing::Running => {
                self.over.store(true, Ordering::Relaxed);
                Ok(Event::Done)
            }
        }
    }
}

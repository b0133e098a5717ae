//! A process that holds a guest, as the daemon sees it: started or found again, asked, listened to. Async.

use std::collections::HashMap;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex as AsyncMutex, broadcast, oneshot};
use tokio::time::timeout;

use crate::host::holder::protocol::{Command, Event, HolderState, Request, Told};

/// How long a process may take from its start to its first word.
const START_LIMIT: Duration = Duration::from_secs(20);
/// How often a socket that is not there yet is tried.
const LOOK: Duration = Duration::from_millis(20);
/// Events that a slow listener may be behind before it loses some.
const EVENTS: usize = 1024;

/// Why a process that holds a guest cannot be worked with.
#[derive(Clone, Debug, thiserror::Error)]
pub enum GuestProcessError {
    /// It cannot be started, or does not answer when it should have.
    #[error("the guest's process cannot be started: {0}")]
    Start(String),
    /// It has ended, or never was.
    #[error("the guest's process has ended")]
    Ended,
    /// It says that it cannot do what it was told.
    #[error("{0}")]
    Refused(String),
    /// It says nothing.
    #[error("the guest's process has not answered for {} s", .0.as_secs())]
    Silent(Duration),
}

/// How such a process is started.
#[derive(Clone, Debug)]
pub struct SpawnOptions {
    /// Where it is to listen for the daemon.
    pub socket: PathBuf,
    /// The host's journal.
    pub journal: PathBuf,
    /// Where its log goes.
    pub log: PathBuf,
}

/// A process that holds a guest, or waits for one. Dropping it leaves the process alone.
#[derive(Debug)]
pub struct GuestProcess {
    pid: u32,
    hello: HolderState,
    shared: Arc<Shared>,
    writer: AsyncMutex<OwnedWriteHalf>,
}

#[derive(Debug)]
struct Shared {
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Event>>>,
    /// Taken away when the connection is over, which ends those who listen.
    events: Mutex<Option<broadcast::Sender<Event>>>,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, oneshot::Sender<Event>>> {
        // Each change is one insertion or removal.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn events(&self) -> MutexGuard<'_, Option<broadcast::Sender<Event>>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection to a process that holds a guest, and what it tells from its first word on; closed when it has ended.
pub type Attached = (GuestProcess, broadcast::Receiver<Event>);

impl GuestProcess {
    /// Starts this program as a process that holds a guest. It outlives this one.
    ///
    /// # Errors
    /// [`GuestProcessError::Start`]; what the process itself says is in its log.
    pub async fn spawn(options: &SpawnOptions) -> Result<Attached, GuestProcessError> {
        let failed = |what: String| GuestProcessError::Start(what);
        let log = std::fs::File::create(&options.log)
            .map_err(|error| failed(format!("its log {}: {error}", options.log.display())))?;
        let errors = log.try_clone().map_err(|error| failed(error.to_string()))?;
        // This very program, also when its file was replaced by a newer one meanwhile.
        let mut command = std::process::Command::new("/proc/self/exe");
        command.arg0("pageferry").arg("holder").arg("--verbose").arg("--socket").arg(&options.socket);
        command.arg("--state-dir").arg(&options.journal);
        command.stdin(Stdio::null()).stdout(log).stderr(errors).process_group(0);
        let mut child = command.spawn().map_err(|error| failed(error.to_string()))?;
        let pid = child.id();
        let began = Instant::now();
        let attached = loop {
            match Self::attach(&options.socket).await {
                Ok(attached) => break attached,
                Err(error) => {
                    if let Ok(Some(status)) = child.try_wait() {
                        return Err(failed(format!(
                            "it ended at once ({status}); see {}",
                            options.log.display()
                        )));
                    }
                    if began.elapsed() > START_LIMIT {
                        let _ = child.kill();
                        return Err(error);
                    }
                    tokio::time::sleep(LOOK).await;
                }
            }
        };
        // A thread that does nothing but wait, so that no dead process is left over. The process is not killed with this one.
        let reaper = std::thread::Builder::new().name(format!("pf-reap-{pid}")).spawn(move || child.wait());
        reaper.map_err(|error| failed(error.to_string()))?;
        Ok(attached)
    }

    /// Connects to one that runs already.
    ///
    /// # Errors
    /// [`GuestProcessError`] when nobody answers there.
    pub async fn attach(socket: &Path) -> Result<Attached, GuestProcessError> {
        let stream = UnixStream::connect(socket).await.map_err(|_| GuestProcessError::Ended)?;
        let (reader, writer) = stream.into_split();
        let mut lines = BufReader::new(reader);
        let mut line = String::new();
        let first = timeout(START_LIMIT, lines.read_line(&mut line)).await;
        let hello = match first {
            Ok(Ok(bytes)) if bytes > 0 => serde_json::from_str::<Told>(&line),
            Ok(_) => return Err(GuestProcessError::Ended),
            Err(_) => return Err(GuestProcessError::Silent(START_LIMIT)),
        };
        let Ok(Told { event: Event::Hello(hello), .. }) = hello else {
            let what = format!("{} is no guest's socket: {line:?}", socket.display());
            return Err(GuestProcessError::Start(what));
        };
        let (events, heard) = broadcast::channel(EVENTS);
        let shared = Arc::new(Shared {
            next: AtomicU64::new(1),
            waiting: Mutex::default(),
            events: Mutex::new(Some(events)),
        });
        tokio::spawn(listen(lines, Arc::clone(&shared)));
        Ok((Self { pid: hello.pid, hello, shared, writer: AsyncMutex::new(writer) }, heard))
    }

    /// Its process number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How it stood when this connection was made.
    #[must_use]
    pub fn hello(&self) -> &HolderState {
        &self.hello
    }

    /// Whether the connection stands.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.shared.events().is_some()
    }

    /// Tells it what to do, and waits for the answer.
    ///
    /// # Errors
    /// [`GuestProcessError`].
    pub async fn request(&self, command: Command, within: Duration) -> Result<Event, GuestProcessError> {
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        self.shared.waiting().insert(id, answer);
        if !self.is_alive() {
            self.shared.waiting().remove(&id);
            return Err(GuestProcessError::Ended);
        }
        let mut line = serde_json::to_vec(&Request { id: Some(id), command }).unwrap_or_default();
        line.push(b'\n');
        let written = self.writer.lock().await.write_all(&line).await;
        if written.is_err() {
            return Err(GuestProcessError::Ended);
        }
        match timeout(within, answered).await {
            Ok(Ok(Event::Failed { why })) => Err(GuestProcessError::Refused(why)),
            Ok(Ok(event)) => Ok(event),
            Ok(Err(_)) => Err(GuestProcessError::Ended),
            Err(_) => {
                self.shared.waiting().remove(&id);
                Err(GuestProcessError::Silent(within))
            }
        }
    }
}

/// Hands on what a process tells until it ends.
async fn listen(mut lines: BufReader<OwnedReadHalf>, shared: Arc<Shared>) {
    let mut line = String::new();
    while let Ok(bytes) = lines.read_line(&mut line).await {
        if bytes == 0 {
            break;
        }
        match serde_json::from_str::<Told>(&line) {
            Ok(Told { reply: Some(id), event }) => {
                if let Some(waiting) = shared.waiting().remove(&id) {
                    // Whoever asked may have given up.
                    let _ = waiting.send(event);
                }
            }
            Ok(Told { reply: None, event }) => {
                if let Some(events) = &*shared.events() {
                    let _ = events.send(event);
                }
            }
            // A newer process may tell what this daemon does not know.
            Err(error) => tracing::debug!("an event of a guest's process is not understood: {error}"),
        }
        line.clear();
    }
    *shared.events() = None;
    // Dropping their senders answers those who wait.
    shared.waiting().clear();
}

//! A process that holds a guest, as its supervisor sees it: started, told, listened to, started again.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command as Process, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, unbounded};

use crate::host::holder::protocol::{Command, Event};

/// How long a process may take to start and listen.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Why a process that holds a guest cannot be worked with.
#[derive(Debug, thiserror::Error)]
pub enum SuperviseError {
    /// It cannot be started.
    #[error("the {name} process cannot be started")]
    Start {
        /// Which.
        name: &'static str,
        /// What the system answered.
        #[source]
        cause: std::io::Error,
    },
    /// It has ended.
    #[error("the {name} process has ended{how}")]
    Ended {
        /// Which.
        name: &'static str,
        /// How, as far as it is known.
        how: String,
    },
    /// It says that it cannot do what it was told.
    #[error("{why}")]
    Refused {
        /// In its own words.
        why: String,
    },
    /// It says nothing.
    #[error("the {name} process has not answered for {after:?}")]
    Silent {
        /// Which.
        name: &'static str,
        /// How long.
        after: Duration,
    },
}

/// A running process that holds a guest, or waits for one.
#[derive(Debug)]
pub struct HolderProcess {
    name: &'static str,
    child: Child,
    stdin: Option<ChildStdin>,
    events: Receiver<Event>,
    addresses: Vec<SocketAddr>,
    state_dir: PathBuf,
    verbose: bool,
    /// What it said of unfinished migrations when it started.
    recovered: Vec<(String, bool)>,
}

impl HolderProcess {
    /// Starts this program as a process that holds a guest. `fault` is what is to go wrong in it, `verbose` has it log more.
    ///
    /// # Errors
    /// [`SuperviseError`]; what the process itself says is on stderr too.
    pub fn start(
        name: &'static str,
        listen: &[SocketAddr],
        state_dir: &Path,
        fault: Option<&str>,
        verbose: bool,
    ) -> Result<Self, SuperviseError> {
        let failed = |cause| SuperviseError::Start { name, cause };
        let mut process = Process::new(std::env::current_exe().map_err(failed)?);
        process.arg("holder").arg("--state-dir").arg(state_dir);
        for address in listen {
            process.arg("--listen").arg(address.to_string());
        }
        if let Some(fault) = fault {
            process.arg("--fault").arg(fault);
        }
        if verbose {
            process.arg("--verbose");
        }
        let mut child = process.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed)?;
        let stdin = child.stdin.take();
        let (sender, events) = unbounded();
        if let Some(stdout) = child.stdout.take() {
            let lines = BufReader::new(stdout).lines();
            std::thread::Builder::new()
                .name(format!("pf-{name}"))
                .spawn(move || {
                    let events =
                        lines.map_while(Result::ok).filter_map(|line| serde_json::from_str(&line).ok());
                    for event in events {
                        if sender.send(event).is_err() {
                            break;
                        }
                    }
                })
                .map_err(failed)?;
        }
        let mut holder = Self {
            name,
            child,
            stdin,
            events,
            addresses: Vec::new(),
            state_dir: state_dir.to_owned(),
            verbose,
            recovered: Vec::new(),
        };
        holder.addresses = holder.wait_for(START_LIMIT, |event| match event {
            Event::Listening { addresses } => Some(addresses),
            _ => None,
        })?;
        Ok(holder)
    }

    /// Starts it again in the same place, after it has ended.
    ///
    /// # Errors
    /// As [`HolderProcess::start`].
    pub fn restart(&mut self) -> Result<(), SuperviseError> {
        let _ = self.child.wait();
        let (addresses, state_dir) = (self.addresses.clone(), self.state_dir.clone());
        *self = Self::start(self.name, &addresses, &state_dir, None, self.verbose)?;
        Ok(())
    }

    /// Where it listens.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Which process it is.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// What it has said of migrations that an earlier process left unfinished, and whether the guest runs elsewhere.
    #[must_use]
    pub fn recovered(&self) -> &[(String, bool)] {
        &self.recovered
    }

    /// Tells it what to do.
    ///
    /// # Errors
    /// [`SuperviseError::Ended`] when nobody reads.
    pub fn tell(&mut self, command: &Command) -> Result<(), SuperviseError> {
        let mut line = serde_json::to_string(command).unwrap_or_default();
        line.push('\n');
        let told =
            self.stdin.as_mut().map(|stdin| stdin.write_all(line.as_bytes()).and_then(|()| stdin.flush()));
        match told {
            Some(Ok(())) => Ok(()),
            _ => Err(self.ended()),
        }
    }

    /// What it says; disconnected when it has ended.
    #[must_use]
    pub fn events(&self) -> &Receiver<Event> {
        &self.events
    }

    /// Tells it what to do and waits for the event that answers.
    ///
    /// # Errors
    /// [`SuperviseError`]; `Refused` in its own words.
    pub fn ask<T>(
        &mut self,
        command: &Command,
        within: Duration,
        answer: impl FnMut(Event) -> Option<T>,
    ) -> Result<T, SuperviseError> {
        self.tell(command)?;
        self.wait_for(within, answer)
    }

    /// Waits for an event.
    ///
    /// # Errors
    /// [`SuperviseError`]; a [`Event::Failed`] ends the waiting.
    pub fn wait_for<T>(
        &mut self,
        within: Duration,
        mut wanted: impl FnMut(Event) -> Option<T>,
    ) -> Result<T, SuperviseError> {
        let deadline = Instant::now() + within;
        loop {
            let event = match self.events.recv_deadline(deadline) {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) => {
                    return Err(SuperviseError::Silent { name: self.name, after: within });
                }
                Err(RecvTimeoutError::Disconnected) => return Err(self.ended()),
            };
            match event {
                Event::Failed { why } => return Err(SuperviseError::Refused { why }),
                Event::Recovered { what, completed } => self.recovered.push((what, completed)),
                event => {
                    if let Some(answer) = wanted(event) {
                        return Ok(answer);
                    }
                }
            }
        }
    }

    /// That it has ended, and how.
    pub fn ended(&mut self) -> SuperviseError {
        let how = self.child.wait().map_or_else(|_| String::new(), describe);
        SuperviseError::Ended { name: self.name, how }
    }
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match status.signal() {
        Some(9) => ": it was killed (signal 9)".into(),
        Some(signal) => format!(": signal {signal}"),
        None => format!(" with exit code {}", status.code().unwrap_or(-1)),
    }
}

impl Drop for HolderProcess {
    fn drop(&mut self) {
        // It ends when its stdin does; one that does not is killed.
        self.stdin = None;
        let deadline = Instant::now() + Duration::from_secs(2);
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

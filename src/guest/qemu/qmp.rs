//! A client of QMP, QEMU's control protocol: one JSON object a line over a unix socket.
//!
//! It blocks, as everything on the data path does. A thread reads, so that events come when they happen and not with the next
//! answer.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use rustix::net::sockopt::socket_peercred;
use serde_json::{Map, Value, json};

use super::{OLDEST_QEMU, Version};

/// The longest line: lists of capabilities and RAM blocks have some KiB.
const MAX_LINE: u64 = 4 << 20;
/// How long QEMU may take to greet. It does so at once, unless another client has the socket.
const GREETING: Duration = Duration::from_secs(5);
/// How long an answer may take. QEMU answers between two pieces of work, the longest of which is loading a device's state.
const ANSWER: Duration = Duration::from_secs(60);
/// Events that wait to be taken; more than a migration has. Later ones are dropped, and asking tells the same.
const MAX_EVENTS: usize = 4096;

/// Why QEMU does not do what it is told.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nobody listens.
    #[error("no QEMU answers at {}; start it with -qmp unix:{},server=on,wait=off", path.display(), path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        cause: io::Error,
    },
    /// Somebody listens and says nothing.
    #[error(
        "QEMU does not greet at {} within {} s; a QMP socket serves one client at a time: end the other one, or give QEMU a \
         second -qmp socket", path.display(), GREETING.as_secs()
    )]
    NoGreeting {
        /// The socket.
        path: PathBuf,
    },
    /// What answers is something else.
    #[error("what answers at {} is no QMP of QEMU: {line}", path.display())]
    NotQmp {
        /// The socket.
        path: PathBuf,
        /// What it said.
        line: String,
    },
    /// Older than [`OLDEST_QEMU`].
    #[error("QEMU at {} is of version {found}, and moving it takes {OLDEST_QEMU} or newer", path.display())]
    TooOld {
        /// The socket.
        path: PathBuf,
        /// Its version.
        found: Version,
    },
    /// The socket is closed.
    #[error("QEMU has closed its QMP socket {}; it has ended, or is about to", path.display())]
    Closed {
        /// The socket.
        path: PathBuf,
    },
    /// No answer.
    #[error("QEMU has not answered {command} for {seconds} s")]
    Silent {
        /// What it was told.
        command: String,
        /// How long was waited.
        seconds: u64,
    },
    /// It says no.
    #[error("QEMU does not do {command}: {description}")]
    Refused {
        /// What it was told.
        command: String,
        /// Why, in its words.
        description: String,
    },
    /// An answer that lacks something.
    #[error("QEMU's answer to {command} has no {what}")]
    Incomplete {
        /// What it was told.
        command: String,
        /// What is missing.
        what: &'static str,
    },
    /// No thread.
    #[error("the thread that listens to QEMU cannot be started")]
    Thread(#[source] io::Error),
}

/// Something that QEMU tells without being asked.
#[derive(Clone, Debug, PartialEq)]
pub struct QmpEvent {
    /// Its name, such as `MIGRATION`.
    pub name: String,
    /// What it says.
    pub data: Value,
}

/// A connection to one QEMU.
#[derive(Debug)]
pub struct Qmp {
    path: PathBuf,
    stream: UnixStream,
    answers: Receiver<Value>,
    events: Receiver<QmpEvent>,
    version: Version,
    next: u64,
}

impl Qmp {
    /// Connects and greets.
    ///
    /// # Errors
    /// [`QmpError`]: nobody there, somebody else there, or one that is too old.
    pub fn connect(path: &Path) -> Result<Self, QmpError> {
        let failed = |cause| QmpError::Connect { path: path.to_owned(), cause };
        let stream = UnixStream::connect(path).map_err(failed)?;
        stream.set_write_timeout(Some(ANSWER)).map_err(failed)?;
        let reader = BufReader::new(stream.try_clone().map_err(failed)?);
        let (answered, answers) = bounded(1);
        let (told, events) = bounded(MAX_EVENTS);
        std::thread::Builder::new()
            .name("pf-qmp".into())
            .spawn(move || listen(reader, &answered, &told))
            .map_err(QmpError::Thread)?;
        let version = Version { major: 0, minor: 0, micro: 0 };
        let mut qmp = Self { path: path.to_owned(), stream, answers, events, version, next: 0 };
        qmp.version = qmp.greeting()?;
        if qmp.version < OLDEST_QEMU {
            return Err(QmpError::TooOld { path: qmp.path.clone(), found: qmp.version });
        }
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    fn greeting(&self) -> Result<Version, QmpError> {
        let greeting = match self.answers.recv_timeout(GREETING) {
            Ok(greeting) => greeting,
            Err(RecvTimeoutError::Timeout) => return Err(QmpError::NoGreeting { path: self.path.clone() }),
            Err(RecvTimeoutError::Disconnected) => return Err(self.closed()),
        };
        let numbers = &greeting["QMP"]["version"]["qemu"];
        let number = |name: &str| numbers[name].as_u64().and_then(|number| u32::try_from(number).ok());
        match (number("major"), number("minor"), number("micro")) {
            (Some(major), Some(minor), Some(micro)) => Ok(Version { major, minor, micro }),
            _ => Err(QmpError::NotQmp { path: self.path.clone(), line: shown(&greeting) }),
        }
    }

    /// Which QEMU it is.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// The process behind the socket, as the kernel knows it: whoever listened there, which is QEMU unless it was given the
    /// socket by another program.
    #[must_use]
    pub fn process(&self) -> Option<u32> {
        socket_peercred(&self.stream).ok().map(|credentials| credentials.pid.as_raw_nonzero().get() as u32)
    }

    /// The user behind the socket.
    #[must_use]
    pub fn user(&self) -> Option<u32> {
        socket_peercred(&self.stream).ok().map(|credentials| credentials.uid.as_raw())
    }

    /// What QEMU tells without being asked. It ends when the socket does.
    #[must_use]
    pub fn events(&self) -> Receiver<QmpEvent> {
        self.events.clone()
    }

    /// What is to be said when its events have ended.
    #[must_use]
    pub fn closed(&self) -> QmpError {
        QmpError::Closed { path: self.path.clone() }
    }

    /// Has a command done and waits for its answer.
    ///
    /// # Errors
    /// [`QmpError::Refused`] with QEMU's reason, or that it has gone or does not answer.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, ANSWER)
    }

    /// Waits until QEMU has closed the socket, which it does when it ends; `false` when it has not within that time.
    #[must_use]
    pub fn ends_within(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        loop {
            match self.events.recv_deadline(deadline) {
                Ok(_) => {}
                Err(error) => return error == RecvTimeoutError::Disconnected,
            }
        }
    }

    /// As [`Qmp::execute`], for a QEMU that may not answer.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn execute_within(
        &mut self,
        command: &str,
        arguments: &Value,
        time: Duration,
    ) -> Result<Value, QmpError> {
        let id = self.next;
        self.next += 1;
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        self.stream.write_all(line.as_bytes()).map_err(|_| self.closed())?;
        loop {
            match self.answers.recv_timeout(time) {
                Ok(Value::Object(answer)) if answer.get("id").and_then(Value::as_u64) == Some(id) => {
                    return self.judge(command, answer);
                }
                // The late answer to something that was given up.
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    return Err(QmpError::Silent { command: command.into(), seconds: time.as_secs() });
                }
                Err(RecvTimeoutError::Disconnected) => return Err(self.closed()),
            }
        }
    }

    fn judge(&self, command: &str, mut answer: Map<String, Value>) -> Result<Value, QmpError> {
        if let Some(value) = answer.remove("return") {
            return Ok(value);
        }
        let description = answer.get("error").map(|error| match error["desc"].as_str() {
            Some(text) => text.to_owned(),
            None => shown(error),
        });
        match description {
            Some(description) => Err(QmpError::Refused { command: command.into(), description }),
            None => Err(QmpError::NotQmp { path: self.path.clone(), line: shown(&Value::Object(answer)) }),
        }
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        // Ends the thread that listens.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

/// A text of QEMU for a message: short.
fn shown(value: &Value) -> String {
    value.to_string().chars().take(200).collect()
}

/// Leads what comes to who waits for it, until the socket ends.
fn listen(mut reader: BufReader<UnixStream>, answers: &Sender<Value>, events: &Sender<QmpEvent>) {
    loop {
        let mut line = Vec::new();
        match (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) if line.last() != Some(&b'\n') => return,
            Ok(_) => {}
        }
        let Ok(value) = serde_json::from_slice::<Value>(&line) else {
            // Whoever waits names it as what it is.
            let text = String::from_utf8_lossy(&line).chars().take(200).collect();
            let _ = answers.send(Value::String(text));
            return;
        };
        let Some(name) = value["event"].as_str() else {
            if answers.send(value).is_err() {
                return;
            }
            continue;
        };
        let event = QmpEvent { name: name.to_owned(), data: value["data"].clone() };
        // A full queue belongs to an owner that asks instead of listening.
        let _ = events.try_send(event);
    }
}

#[cfg(test)]
mod tests;

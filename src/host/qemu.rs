//! QEMUs that a host is told of by the path of their QMP socket: what they are before a migration, and where a guest is when the
//! process that moved it has ended.
//!
//! What is here blocks, for as long as QEMU takes to answer.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::engine::relay::RelayError;
use crate::guest::qemu::qmp::{Qmp, QmpError};
use crate::guest::qemu::ram;
use crate::guest::qemu::settings::{self, SettingsError};

/// What a QEMU is called: this, and the path of its QMP socket.
const SCHEME: &str = "qemu:";
/// The longest path of a socket: `sun_path` of `unix(7)`, less the byte at its end.
const LONGEST: usize = 107;
/// How long a QEMU may take over a question when its guest is looked for. One that loads a guest answers nobody.
const ANSWER: Duration = Duration::from_secs(5);

/// Whether a guest of this name is one that a QEMU has.
#[must_use]
pub fn is_qemu(name: &str) -> bool {
    name.starts_with(SCHEME)
}

/// The QMP socket of `qemu:PATH`.
///
/// # Errors
/// What is wrong with the name, in words.
pub fn socket(name: &str) -> Result<PathBuf, String> {
    let path = name.strip_prefix(SCHEME).unwrap_or(name);
    let fits = path.len() <= LONGEST && !path.chars().any(char::is_control);
    if is_qemu(name) && path.starts_with('/') && fits {
        return Ok(PathBuf::from(path));
    }
    Err(format!(
        "{name:?} names no QEMU: write qemu: and the absolute path of its QMP socket, such as qemu:/run/vm1.qmp, with at most \
         {LONGEST} bytes"
    ))
}

/// Guest RAM that a person gave a QEMU (`-object memory-backend-...`, `-m`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuRam {
    /// The name of the block.
    pub name: String,
    /// Its length.
    pub bytes: u64,
}

/// What a QEMU is, as far as the two of a migration have to agree. Fields are only added, each with a default: hosts tell it to
/// each other.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuFacts {
    /// Its version.
    #[serde(default)]
    pub version: String,
    /// Its machine, with its version, such as `pc-q35-10.0-machine`. Empty where it does not say.
    #[serde(default)]
    pub machine: String,
    /// Whether the guest runs.
    #[serde(default)]
    pub runs: bool,
    /// Whether it encrypts its channels itself.
    #[serde(default)]
    pub tls: bool,
    /// The guest's RAM.
    #[serde(default)]
    pub ram: Vec<QemuRam>,
}

impl QemuFacts {
    /// All RAM.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.ram.iter().fold(0, |all, ram| all.saturating_add(ram.bytes))
    }
}

/// Looks at a QEMU that has a guest to give.
///
/// # Errors
/// Why it cannot give it.
pub fn look_at_source(qmp: &Path) -> Result<QemuFacts, RelayError> {
    let (mut qmp, facts) = connect(qmp)?;
    if facts.status == "inmigrate" {
        return Err(SettingsError::NoGuest.into());
    }
    let migration = settings::migration(&mut qmp)?;
    if migration.is_under_way() {
        return Err(SettingsError::Busy(migration.status).into());
    }
    seen(&mut qmp, &facts)
}

/// Looks at a QEMU that waits for a guest.
///
/// # Errors
/// Why it cannot take one.
pub fn look_at_destination(qmp: &Path) -> Result<QemuFacts, RelayError> {
    let (mut qmp, facts) = connect(qmp)?;
    // One that listens by itself already cannot be told of multifd any more.
    if facts.status != "inmigrate" || settings::migration(&mut qmp)?.status != "none" {
        return Err(SettingsError::NotDeferred.into());
    }
    seen(&mut qmp, &facts)
}

fn connect(qmp: &Path) -> Result<(Qmp, settings::Facts), RelayError> {
    let mut qmp = Qmp::connect(qmp)?;
    let facts = settings::facts(&mut qmp)?;
    Ok((qmp, facts))
}

fn seen(qmp: &mut Qmp, facts: &settings::Facts) -> Result<QemuFacts, RelayError> {
    let ram = ram::blocks(qmp)?.into_iter().filter(|block| block.backend);
    let ram = ram.map(|block| QemuRam { name: block.name, bytes: block.bytes }).collect();
    // A QEMU that does not say it says so itself when the guest comes.
    let machine = qmp.execute("qom-get", &json!({ "path": "/machine", "property": "type" }));
    Ok(QemuFacts {
        version: qmp.version().to_string(),
        machine: machine.ok().and_then(|name| name.as_str().map(str::to_owned)).unwrap_or_default(),
        runs: facts.running,
        tls: facts.tls,
        ram,
    })
}

/// Where a QEMU stands once nobody moves its guest any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Its guest runs.
    Runs,
    /// Its guest stands still, as somebody wanted it; nothing was given away.
    Paused,
    /// It has given its guest up (source), which stands still.
    Given,
    /// It is still at it, and will find out that nobody carries its bytes.
    UnderWay,
    /// It waits for a guest, and nobody has told it anything.
    Untouched,
    /// It takes a guest in, and lacks some of it.
    Incomplete,
    /// It has taken a guest in, which stands still.
    Complete,
    /// There is no such QEMU any more.
    Gone,
    /// It does not say; with the reason.
    Silent(String),
}

/// Finds out where a QEMU stands. `incoming` for one that was to take a guest in.
#[must_use]
pub fn standing(qmp: &Path, incoming: bool) -> Standing {
    match asked(qmp, incoming) {
        Ok(standing) => standing,
        Err(QmpError::Connect { cause, .. })
            if matches!(
                cause.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused
            ) =>
        {
            Standing::Gone
        }
        Err(QmpError::Closed { .. }) => Standing::Gone,
        Err(error) => Standing::Silent(crate::engine::chain(&error)),
    }
}

fn asked(qmp: &Path, incoming: bool) -> Result<Standing, QmpError> {
    let mut qmp = Qmp::connect(qmp)?;
    let status = qmp.execute_within("query-status", &json!({}), ANSWER)?;
    let word = status["status"].as_str().unwrap_or_default().to_owned();
    let running = status["running"].as_bool() == Some(true);
    let migration = settings::migration(&mut qmp)?;
    Ok(if incoming {
        of_destination(running, &word, &migration)
    } else {
        of_source(running, &word, &migration)
    })
}

fn of_source(running: bool, word: &str, migration: &settings::Migration) -> Standing {
    match word {
        _ if migration.is_under_way() => Standing::UnderWay,
        _ if running => Standing::Runs,
        "postmigrate" => Standing::Given,
        _ => Standing::Paused,
    }
}

fn of_destination(running: bool, word: &str, migration: &settings::Migration) -> Standing {
    match (word, migration.status.as_str()) {
        _ if running => Standing::Runs,
        ("inmigrate", "none") => Standing::Untouched,
        ("inmigrate", _) => Standing::Incomplete,
        (_, "completed") => Standing::Complete,
        _ => Standing::Incomplete,
    }
}

/// Lets a guest go on.
///
/// # Errors
/// [`QmpError`]: disks whose locks somebody else has, for one.
pub fn resume(qmp: &Path) -> Result<(), QmpError> {
    settings::resume(&mut Qmp::connect(qmp)?)
}

/// Ends a migration that nobody carries any more; the guest goes on at the source.
///
/// # Errors
/// [`QmpError`].
pub fn cancel(qmp: &Path) -> Result<(), QmpError> {
    settings::cancel(&mut Qmp::connect(qmp)?)
}

/// Ends a QEMU whose copy of a guest must never run.
///
/// # Errors
/// [`QmpError`].
pub fn end(qmp: &Path) -> Result<(), QmpError> {
    match Qmp::connect(qmp)?.execute_within("quit", &json!({}), ANSWER) {
        // It closes its socket before or after the answer.
        Ok(_) | Err(QmpError::Closed { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qemu_is_named_by_the_absolute_path_of_its_socket() {
        assert_eq!(socket("qemu:/run/vm 1.qmp"), Ok(PathBuf::from("/run/vm 1.qmp")));
        for wrong in [
            "vm1",
            "/run/vm1.qmp",
            "qemu:",
            "qemu:vm1.qmp",
            "qemu:/a\nb",
            &format!("qemu:/{}", "a".repeat(200)),
        ] {
            let why = socket(wrong).unwrap_err();
            assert!(why.contains("qemu:/run/vm1.qmp"), "{why}");
        }
        assert!(is_qemu("qemu:vm1") && !is_qemu("qemu"));
    }

    #[test]
    fn who_may_run_the_guest_follows_from_both_words_of_a_qemu() {
        let migration = |status: &str| settings::Migration { status: status.into(), ..Default::default() };
        for (running, word, status, expected) in [
            (true, "running", "failed", Standing::Runs),
            (true, "running", "active", Standing::UnderWay),
            (false, "finish-migrate", "device", Standing::UnderWay),
            (false, "postmigrate", "completed", Standing::Given),
            (false, "paused", "cancelled", Standing::Paused),
            (false, "paused", "none", Standing::Paused),
        ] {
            assert_eq!(of_source(running, word, &migration(status)), expected, "{word} {status}");
        }
        for (running, word, status, expected) in [
            (true, "running", "completed", Standing::Runs),
            (false, "inmigrate", "none", Standing::Untouched),
            (false, "inmigrate", "active", Standing::Incomplete),
            (false, "inmigrate", "setup", Standing::Incomplete),
            (false, "paused", "completed", Standing::Complete),
            (false, "inmigrate", "failed", Standing::Incomplete),
        ] {
            assert_eq!(of_destination(running, word, &migration(status)), expected, "{word} {status}");
        }
    }

    #[test]
    fn a_socket_that_nobody_answers_at_is_a_qemu_that_has_gone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.qmp");
        assert_eq!(standing(&path, false), Standing::Gone);
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        drop(listener);
        assert_eq!(standing(&path, true), Standing::Gone);
    }

    #[test]
    fn facts_of_another_release_are_read() {
        let facts: QemuFacts = serde_json::from_str(r#"{"version":"9.0.0","later":1}"#).unwrap();
        assert_eq!((facts.version.as_str(), facts.memory_bytes()), ("9.0.0", 0));
    }
}

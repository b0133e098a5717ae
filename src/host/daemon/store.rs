//! The state directory: what a daemon has to know again after it was killed.
//!
//! | where | what |
//! |---|---|
//! | `daemon.lock`, `daemon.pid` | one daemon at a time |
//! | `journal/` | the right to run a guest ([`crate::engine::journal`]); shared with the processes that hold guests |
//! | `guests/NAME.json` | a guest of this host; `guests/qemu+INSTANCE.json` one of QEMU, while it moves |
//! | `migrations/ID.json` | a migration that is not over |
//! | `history/` | those that are |
//! | `run/INSTANCE.sock` | where the process that holds a guest obeys |
//! | `log/INSTANCE.log` | what that process logs |

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::host::api::guest::GuestInfo;
use crate::host::api::migration::Migration;
use crate::host::files;
use crate::host::peer::client::PeerTarget;
use crate::host::peer::messages::Gone;

/// How long the log of a process that has ended is kept.
const KEEP_LOGS: Duration = Duration::from_secs(7 * 24 * 3600);

/// Why a state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file or directory in it cannot be made, read or written.
    #[error("the state directory's {path} cannot be used")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system answered.
        #[source]
        cause: io::Error,
    },
    /// Another daemon uses it.
    #[error(
        "another daemon{pid} uses the state directory {path}; stop it, or give this one a state_dir of its own"
    )]
    Locked {
        /// Which.
        path: PathBuf,
        /// Its process number, in words.
        pid: String,
    },
}

/// A guest as it is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestRecord {
    /// What the files of its process are called: another one for each process.
    pub instance: String,
    /// What people see of it.
    pub info: GuestInfo,
    /// Memory in use that was promised to it while it is on its way here, in bytes.
    #[serde(default)]
    pub promised_bytes: u64,
    /// The QEMU that has it, or waits for it; nothing where the process itself holds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu: Option<QemuRecord>,
}

/// A QEMU that takes part in a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuRecord {
    /// Its QMP socket.
    pub qmp: PathBuf,
    /// Whether the guest ran when it was looked at before the migration.
    pub runs: bool,
}

/// A migration as it is kept while it is not over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrationRecord {
    /// What people see of it.
    pub migration: Migration,
    /// How the other host's daemon is reached, once that is known.
    pub peer: Option<PeerTarget>,
    /// What the other host said when its end was gone.
    #[serde(default)]
    pub peer_gone: Option<Gone>,
}

/// A state directory that this daemon has for itself.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    /// Locked as long as it is open.
    _lock: File,
}

impl Store {
    /// Takes a state directory, and makes what it lacks.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        for part in ["guests", "migrations", "history", "run", "log", "journal"] {
            let path = root.join(part);
            // Whoever could reach the guests' sockets could command them.
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.map_err(|cause| StoreError::File { path, cause })?;
        }
        let path = root.join("daemon.lock");
        let failed = |cause| StoreError::File { path: path.clone(), cause };
        let lock = File::options().create(true).append(true).open(&path).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                let pid = fs::read_to_string(root.join("daemon.pid")).unwrap_or_default();
                let pid = if pid.is_empty() { pid } else { format!(" (process {})", pid.trim()) };
                return Err(StoreError::Locked { path: root.to_owned(), pid });
            }
            Err(fs::TryLockError::Error(cause)) => return Err(failed(cause)),
        }
        let path = root.join("daemon.pid");
        File::create(&path)
            .and_then(|mut file| writeln!(file, "{}", std::process::id()))
            .map_err(|cause| StoreError::File { path, cause })?;
        Ok(Self { root: root.to_owned(), _lock: lock })
    }

    /// The journal's directory.
    #[must_use]
    pub fn journal(&self) -> PathBuf {
        self.root.join("journal")
    }

    /// The history's directory.
    #[must_use]
    pub fn history(&self) -> PathBuf {
        self.root.join("history")
    }

    /// The socket of the process that holds a guest.
    #[must_use]
    pub fn socket(&self, instance: &str) -> PathBuf {
        self.root.join("run").join(format!("{instance}.sock"))
    }

    /// The log of that process.
    #[must_use]
    pub fn log(&self, instance: &str) -> PathBuf {
        self.root.join("log").join(format!("{instance}.log"))
    }

    fn guest(&self, record: &GuestRecord) -> PathBuf {
        // A QEMU's guest has no name that a file could have. No other one has a plus sign in its name.
        let name = match record.qemu {
            None => record.info.name.clone(),
            Some(_) => format!("qemu+{}", record.instance),
        };
        self.root.join("guests").join(format!("{name}.json"))
    }

    fn migration(&self, id: &str) -> PathBuf {
        self.root.join("migrations").join(format!("{id}.json"))
    }

    /// Every guest.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn guests(&self) -> Result<Vec<GuestRecord>, StoreError> {
        self.all("guests")
    }

    /// Every migration that is not over.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn migrations(&self) -> Result<Vec<MigrationRecord>, StoreError> {
        self.all("migrations")
    }

    fn all<T: serde::de::DeserializeOwned>(&self, what: &str) -> Result<Vec<T>, StoreError> {
        let path = self.root.join(what);
        files::read_all(&path).map_err(|cause| StoreError::File { path, cause })
    }

    /// Keeps a guest.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn put_guest(&self, record: &GuestRecord) -> Result<(), StoreError> {
        put(self.guest(record), record)
    }

    /// Keeps a migration.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn put_migration(&self, record: &MigrationRecord) -> Result<(), StoreError> {
        put(self.migration(&record.migration.id), record)
    }

    /// Forgets a guest, and what its process left.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn remove_guest(&self, record: &GuestRecord) -> Result<(), StoreError> {
        // A process that was killed leaves its socket. Its log stays for whoever wants to know why it ended.
        let _ = fs::remove_file(self.socket(&record.instance));
        remove(self.guest(record))
    }

    /// Removes the logs of processes that are no guest's any more, once nobody will ask for them.
    pub fn prune_logs(&self, guests: &[GuestRecord]) {
        let Ok(entries) = fs::read_dir(self.root.join("log")) else { return };
        for path in entries.flatten().map(|entry| entry.path()) {
            let age =
                path.metadata().and_then(|data| data.modified()).ok().and_then(|time| time.elapsed().ok());
            let instance = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            let used = guests.iter().any(|guest| guest.instance == instance);
            if !used && age.is_some_and(|age| age > KEEP_LOGS) {
                let _ = fs::remove_file(path);
            }
        }
    }

    /// Forgets a migration.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn remove_migration(&self, id: &str) -> Result<(), StoreError> {
        remove(self.migration(id))
    }
}

fn put<T: Serialize>(path: PathBuf, value: &T) -> Result<(), StoreError> {
    files::write_json(&path, value).map_err(|cause| StoreError::File { path, cause })
}

fn remove(path: PathBuf) -> Result<(), StoreError> {
    files::remove(&path).map_err(|cause| StoreError::File { path, cause })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_daemon_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let second = Store::open(directory.path()).unwrap_err().to_string();
        assert!(second.contains(&format!("(process {})", std::process::id())), "{second}");
        drop(store);
        Store::open(directory.path()).unwrap();
    }
}

//! What became of every migration of this host: one JSON file each, the newest thousand.
//!
//! A file appears whole or not at all, and is on disk before the call returns. It holds a [`Migration`] as the daemon's API
//! shows it, so other programs may read the directory.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::host::api::migration::Migration;

/// How many records are kept. One takes some kilobytes, and 100 bytes for every second that the migration took.
const KEPT: usize = 1000;
/// Hexadecimal digits of a migration's number.
const ID_DIGITS: usize = 32;

/// Why the history could not be used.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// The directory cannot be made or read.
    #[error("the history's directory {path} cannot be used; make it readable and writable for the daemon")]
    Directory {
        /// Which.
        path: PathBuf,
        /// What the system answered.
        #[source]
        cause: io::Error,
    },
    /// A record cannot be written.
    #[error(
        "the history's record {path} cannot be written; see whether its file system is full or read-only"
    )]
    Write {
        /// Which.
        path: PathBuf,
        /// What the system answered.
        #[source]
        cause: io::Error,
    },
    /// A migration whose number cannot be a file's name.
    #[error("{0:?} is no number of a migration, which has {ID_DIGITS} hexadecimal digits")]
    NotAnId(String),
    /// No record's number begins so.
    #[error("the history (`pageferry history`) has no migration whose number begins with {0:?}")]
    NotFound(String),
    /// Several do.
    #[error("{given:?} could be any of {}; give more of its digits", candidates.join(", "))]
    Ambiguous {
        /// What was asked for.
        given: String,
        /// The first of those that begin with it.
        candidates: Vec<String>,
    },
    /// It was there when the history was opened, and is there no more or makes no sense.
    #[error("the history's record {path} cannot be read")]
    Read {
        /// Which.
        path: PathBuf,
        /// What was wrong.
        #[source]
        cause: io::Error,
    },
}

/// The history of one host, in its state directory.
#[derive(Debug)]
pub struct History {
    directory: PathBuf,
    kept: usize,
    /// By the name of its file without `.json`: when each migration ended.
    known: Mutex<BTreeMap<String, f64>>,
}

impl History {
    /// Opens the history, makes its directory where there is none, and looks at what is there. A file that makes no sense
    /// is left alone, with a warning in the log.
    ///
    /// # Errors
    /// [`HistoryError::Directory`].
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, HistoryError> {
        Self::open_keeping(directory.into(), KEPT)
    }

    fn open_keeping(directory: PathBuf, kept: usize) -> Result<Self, HistoryError> {
        let unusable = |cause| HistoryError::Directory { path: directory.clone(), cause };
        fs::create_dir_all(&directory).map_err(unusable)?;
        let mut known = BTreeMap::new();
        for entry in fs::read_dir(&directory).map_err(unusable)? {
            let path = entry.map_err(unusable)?.path();
            let Some(name) = record_name(&path) else { continue };
            if let Some(migration) = read_or_warn(&path) {
                known.insert(name.to_owned(), ended(&migration));
            }
        }
        Ok(Self { directory, kept, known: Mutex::new(known) })
    }

    /// Keeps a migration, in place of what was kept of it before, and forgets the oldest beyond a thousand.
    ///
    /// # Errors
    /// [`HistoryError::NotAnId`] or [`HistoryError::Write`].
    pub fn record(&self, migration: &Migration) -> Result<(), HistoryError> {
        if migration.id.len() != ID_DIGITS || !migration.id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(HistoryError::NotAnId(migration.id.clone()));
        }
        let name = format!("{}-{}", migration.id.to_ascii_lowercase(), migration.direction.name());
        // Held while the file is written: two writers of one record would share its temporary name.
        let mut known = self.known();
        let path = self.path(&name);
        write(&self.directory, &path, migration)
            .map_err(|cause| HistoryError::Write { path: path.clone(), cause })?;
        known.insert(name, ended(migration));
        self.prune(&mut known);
        Ok(())
    }

    /// The newest migrations by their end, at most `limit`. One that cannot be read is left out, with a warning in the log.
    #[must_use]
    pub fn list(&self, limit: usize) -> Vec<Migration> {
        let mut names: Vec<(String, f64)> = self.known().clone().into_iter().collect();
        names.sort_by(|(_, one), (_, other)| other.total_cmp(one));
        names.iter().filter_map(|(name, _)| read_or_warn(&self.path(name))).take(limit).collect()
    }

    /// The migration whose number is, or alone begins with, these digits. Where a host has seen both ends of one, the
    /// direction can be said too: `2f0c-outgoing`, with all its digits.
    ///
    /// # Errors
    /// [`HistoryError::NotFound`], [`HistoryError::Ambiguous`] or [`HistoryError::Read`].
    pub fn find(&self, digits: &str) -> Result<Migration, HistoryError> {
        let wanted = digits.trim().to_ascii_lowercase();
        let known = self.known().clone();
        let found: Vec<&String> = known.keys().filter(|name| name.starts_with(&wanted)).collect();
        match found.as_slice() {
            [name] if !wanted.is_empty() => {
                let path = self.path(name);
                read(&path).map_err(|cause| HistoryError::Read { path, cause })
            }
            [] | [_] => Err(HistoryError::NotFound(digits.to_owned())),
            several => Err(HistoryError::Ambiguous {
                given: digits.to_owned(),
                candidates: several.iter().take(8).map(|name| (*name).clone()).collect(),
            }),
        }
    }

    fn prune(&self, known: &mut BTreeMap<String, f64>) {
        while known.len() > self.kept {
            let oldest = known.iter().min_by(|(_, one), (_, other)| one.total_cmp(other));
            let Some(name) = oldest.map(|(name, _)| name.clone()) else { return };
            known.remove(&name);
            let path = self.path(&name);
            if let Err(error) = fs::remove_file(&path) {
                tracing::warn!("the old record {} cannot be removed: {error}", path.display());
            }
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.json"))
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<String, f64>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// When it was over; one that never was counts from when it was asked for.
fn ended(migration: &Migration) -> f64 {
    migration.ended_at.unwrap_or(migration.requested_at)
}

/// The name of a record without `.json`; nothing where the file is none.
fn record_name(path: &Path) -> Option<&str> {
    let name = path.file_name()?.to_str()?.strip_suffix(".json")?;
    let (id, direction) = name.split_once('-')?;
    let digits = id.len() == ID_DIGITS && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    (digits && matches!(direction, "outgoing" | "incoming")).then_some(name)
}

fn write(directory: &Path, path: &Path, migration: &Migration) -> io::Result<()> {
    let text = serde_json::to_vec(migration)?;
    let written = path.with_extension("new");
    let result = (|| {
        let mut file = File::create(&written)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&written, path)?;
        File::open(directory)?.sync_all()
    })();
    if result.is_err() {
        // It may be there in part; in its place there is what was before.
        let _ = fs::remove_file(&written);
    }
    result
}

fn read(path: &Path) -> io::Result<Migration> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

fn read_or_warn(path: &Path) -> Option<Migration> {
    read(path)
        .inspect_err(|error| {
            tracing::warn!("the history's record {} is left out: {error}", path.display());
        })
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::api::migration::Direction;
    use crate::host::view::sample;

    fn history() -> (tempfile::TempDir, History) {
        let directory = tempfile::tempdir().unwrap();
        let history = History::open(directory.path().join("history")).unwrap();
        (directory, history)
    }

    fn ended_at(id: &str, at: f64) -> Migration {
        Migration { id: format!("{id:0<32}"), ended_at: Some(at), ..sample::completed() }
    }

    fn ids(migrations: &[Migration]) -> Vec<&str> {
        migrations.iter().map(|migration| migration.id.trim_end_matches('0')).collect()
    }

    #[test]
    fn a_record_comes_back_whole_also_after_a_restart() {
        let (directory, history) = history();
        let migration = sample::completed();
        history.record(&migration).unwrap();
        assert_eq!(history.find(&migration.id).unwrap(), migration);
        let again = History::open(directory.path().join("history")).unwrap();
        assert_eq!(again.list(10), std::slice::from_ref(&migration));
        let files: Vec<_> = fs::read_dir(directory.path().join("history")).unwrap().collect();
        assert_eq!(files.len(), 1, "nothing temporary is left: {files:?}");
        assert_eq!(
            files[0].as_ref().unwrap().file_name().to_str().unwrap(),
            format!("{}-outgoing.json", migration.id)
        );
    }

    #[test]
    fn the_newest_come_first_and_a_later_record_of_one_replaces_the_earlier() {
        let (_directory, history) = history();
        for (id, at) in [("aa", 20.0), ("bb", 30.0), ("cc", 10.0)] {
            history.record(&ended_at(id, at)).unwrap();
        }
        assert_eq!(ids(&history.list(10)), ["bb", "aa", "cc"]);
        assert_eq!(ids(&history.list(2)), ["bb", "aa"]);
        history.record(&ended_at("cc", 40.0)).unwrap();
        assert_eq!(ids(&history.list(10)), ["cc", "bb", "aa"]);
    }

    #[test]
    fn a_migration_is_found_by_what_tells_it_from_the_others() {
        let (_directory, history) = history();
        for id in ["ab1", "ab2", "ff"] {
            history.record(&ended_at(id, 1.0)).unwrap();
        }
        assert_eq!(ids(&[history.find("F").unwrap()]), ["ff"]);
        assert_eq!(ids(&[history.find("ab2").unwrap()]), ["ab2"]);
        let ambiguous = history.find("ab").unwrap_err().to_string();
        assert_eq!(
            ambiguous,
            "\"ab\" could be any of ab100000000000000000000000000000-outgoing, \
             ab200000000000000000000000000000-outgoing; give more of its digits"
        );
        for nothing in ["0", "ab10000000000000000000000000000000000", "../ab1", ""] {
            let error = history.find(nothing).unwrap_err();
            assert!(
                matches!(error, HistoryError::NotFound(_) | HistoryError::Ambiguous { .. }),
                "{nothing}: {error}"
            );
        }
        assert_eq!(
            history.find("0").unwrap_err().to_string(),
            "the history (`pageferry history`) has no migration whose number begins with \"0\""
        );
    }

    #[test]
    fn both_ends_of_one_migration_are_kept_apart() {
        let (_directory, history) = history();
        let there = sample::completed();
        let here = Migration { direction: Direction::Incoming, ..there.clone() };
        history.record(&there).unwrap();
        history.record(&here).unwrap();
        assert!(matches!(history.find(&there.id), Err(HistoryError::Ambiguous { .. })));
        assert_eq!(history.find(&format!("{}-incoming", there.id)).unwrap(), here);
    }

    #[test]
    fn the_oldest_give_way() {
        let directory = tempfile::tempdir().unwrap();
        let history = History::open_keeping(directory.path().to_owned(), 3).unwrap();
        for (id, at) in [("a", 5.0), ("b", 1.0), ("c", 3.0), ("d", 4.0), ("e", 2.0)] {
            history.record(&ended_at(id, at)).unwrap();
        }
        assert_eq!(ids(&history.list(10)), ["a", "d", "c"]);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 3);
    }

    #[test]
    fn a_broken_file_is_left_out_and_left_alone() {
        let (directory, history) = history();
        history.record(&ended_at("aa", 1.0)).unwrap();
        let folder = directory.path().join("history");
        let broken = folder.join(format!("{:0<32}-incoming.json", "bb"));
        fs::write(&broken, "{\"id\": ").unwrap();
        fs::write(folder.join("notes.json"), "not ours").unwrap();
        fs::write(folder.join("half.new"), "{").unwrap();
        let again = History::open(&folder).unwrap();
        assert_eq!(ids(&again.list(10)), ["aa"]);
        assert!(matches!(again.find("bb"), Err(HistoryError::NotFound(_))));
        assert!(broken.exists());
        // One that breaks later is no more fatal.
        fs::write(folder.join(format!("{:0<32}-outgoing.json", "aa")), "").unwrap();
        assert!(again.list(10).is_empty());
        assert!(matches!(again.find("aa"), Err(HistoryError::Read { .. })));
    }

    #[test]
    fn a_record_of_an_older_version_with_fewer_fields_is_read() {
        let (directory, history) = history();
        let mut value = serde_json::to_value(ended_at("aa", 1.0)).unwrap();
        let object = value.as_object_mut().unwrap();
        object.remove("peer_address");
        object.insert("of_a_newer_version".to_owned(), true.into());
        let folder = directory.path().join("history");
        fs::write(folder.join(format!("{:0<32}-outgoing.json", "aa")), value.to_string()).unwrap();
        drop(history);
        assert_eq!(History::open(&folder).unwrap().find("aa").unwrap().peer_address, None);
    }

    #[test]
    fn a_number_that_is_none_writes_nowhere() {
        let (directory, history) = history();
        for id in ["", "../../../../../../etc/passwd/000", "zz", "0123456789abcdef0123456789abcdeg"] {
            let error = history.record(&Migration { id: id.to_owned(), ..sample::completed() }).unwrap_err();
            assert!(matches!(error, HistoryError::NotAnId(_)), "{error}");
        }
        assert_eq!(fs::read_dir(directory.path().join("history")).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_that_cannot_be_and_a_record_that_cannot_be_written_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        let error = History::open(file.join("history")).unwrap_err();
        assert!(matches!(error, HistoryError::Directory { .. }), "{error}");
        let history = History::open(directory.path().join("gone")).unwrap();
        fs::remove_dir(directory.path().join("gone")).unwrap();
        let error = history.record(&sample::completed()).unwrap_err();
        assert!(matches!(error, HistoryError::Write { .. }), "{error}");
        assert!(history.list(1).is_empty());
    }
}

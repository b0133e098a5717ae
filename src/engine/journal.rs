//! What a host may and may not do with a guest, on disk: read after any kill, at any moment.
//!
//! One small text file each: `source-<migration>` says how far a source has gone; `token-<token>` holds a destination's
//! decision, which is written once. A file appears whole or not at all, and is on disk before the call returns.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path as FilePath, PathBuf};

use crate::migration::handover::{Decision, SourceRecord};
use crate::session::path::Path;
use crate::wire::control::Token;
use crate::wire::preamble::MigrationId;

/// Why the journal could not be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The directory cannot be made or read.
    #[error("the state directory {path} cannot be used; give one that can be written")]
    Directory {
        /// Which.
        path: PathBuf,
        /// What the system answered.
        #[source]
        cause: io::Error,
    },
    /// An entry cannot be written.
    #[error("the journal entry {path} cannot be written")]
    Write {
        /// Which.
        path: PathBuf,
        /// What the system answered.
        #[source]
        cause: io::Error,
    },
    /// An entry is there but makes no sense.
    #[error("the journal entry {path} cannot be read: {text:?}; it was not written by this version")]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What it holds.
        text: String,
    },
}

/// The journal of one host, in its state directory.
#[derive(Clone, Debug)]
pub struct Journal {
    directory: PathBuf,
}

/// Whom to ask what became of a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peers {
    /// The ways to the destination's process, and to its host, in the order in which they are tried.
    pub paths: Vec<Path>,
    /// The name that the destination's certificate holds, where hosts prove who they are.
    pub name: Option<String>,
}

/// A migration from here whose end this journal does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfinished {
    /// Which migration.
    pub migration: MigrationId,
    /// What to ask for.
    pub token: Token,
    /// Whom to ask.
    pub peers: Peers,
}

/// What a source wrote down last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceEntry {
    /// It may have told the destination to run the guest, and does not know what became of it.
    Committing(Unfinished),
    /// The destination runs it.
    Completed,
    /// The destination never will.
    RolledBack,
}

impl Journal {
    /// Opens the journal, and makes its directory where there is none.
    ///
    /// # Errors
    /// [`JournalError::Directory`].
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, JournalError> {
        let directory = directory.into();
        fs::create_dir_all(&directory)
            .and_then(|()| File::open(&directory).map(drop))
            .map_err(|cause| JournalError::Directory { path: directory.clone(), cause })?;
        Ok(Self { directory })
    }

    /// Writes down how far a source has gone, in place of what it had written before.
    ///
    /// # Errors
    /// [`JournalError::Write`]; the entry may stand all the same.
    pub fn record_source(
        &self,
        migration: MigrationId,
        peers: &Peers,
        record: SourceRecord,
    ) -> Result<(), JournalError> {
        let (state, token) = match record {
            SourceRecord::Committing(token) => ("committing", token),
            SourceRecord::Completed(token) => ("completed", token),
            SourceRecord::RolledBack(token) => ("rolled-back", token),
        };
        let mut text = format!("state={state}\ntoken={token}\n");
        for path in &peers.paths {
            text.push_str(&peer_line(path));
        }
        if let Some(name) = &peers.name {
            text.push_str(&format!("peer-name={name}\n"));
        }
        let path = self.directory.join(format!("source-{migration}"));
        self.write(&path, &text, |written| fs::rename(written, &path))?;
        self.sync(&path)
    }

    /// Decides about a token, unless that has been done: answers the decision that stands, from now on and for ever.
    ///
    /// # Errors
    /// [`JournalError`]; nothing is known of the decision then.
    pub fn decide(&self, token: Token, decision: Decision) -> Result<Decision, JournalError> {
        let path = self.token_path(token);
        let linked = self.write(&path, decision_text(decision), |written| fs::hard_link(written, &path));
        match linked {
            Ok(()) => {
                // It stands for every process of this host, whatever the disk says: an error here would have the guest
                // dropped while the journal says that it runs.
                if let Err(error) = self.sync(&path) {
                    tracing::warn!("a decision may not survive a power failure: {}", super::chain(&error));
                }
                Ok(decision)
            }
            // `link(2)` fails when the name exists: somebody was first.
            Err(JournalError::Write { cause, .. }) if cause.kind() == io::ErrorKind::AlreadyExists => {
                let standing = self.decision(token)?;
                standing.ok_or_else(|| JournalError::Damaged { path, text: "it was removed".into() })
            }
            Err(error) => Err(error),
        }
    }

    /// Replaces `Running` by `Fenced`: only for the process that holds the guest, and knows that it has not run.
    ///
    /// # Errors
    /// [`JournalError::Write`].
    pub fn revoke(&self, token: Token) -> Result<(), JournalError> {
        let path = self.token_path(token);
        self.write(&path, decision_text(Decision::Fenced), |written| fs::rename(written, &path))?;
        self.sync(&path)
    }

    /// The decision about a token, if there is one.
    ///
    /// # Errors
    /// [`JournalError`] when the entry cannot be read.
    pub fn decision(&self, token: Token) -> Result<Option<Decision>, JournalError> {
        let path = self.token_path(token);
        match fs::read_to_string(&path) {
            Ok(text) => [Decision::Running, Decision::Fenced]
                .into_iter()
                .find(|decision| decision_text(*decision) == text)
                .map(Some)
                .ok_or(JournalError::Damaged { path, text }),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(cause) => Err(JournalError::Directory { path, cause }),
        }
    }

    /// Every migration from here that was committed and whose end is not known.
    ///
    /// # Errors
    /// [`JournalError`] when an entry cannot be read.
    pub fn unfinished(&self) -> Result<Vec<Unfinished>, JournalError> {
        let failed = |cause| JournalError::Directory { path: self.directory.clone(), cause };
        let mut unfinished = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let Some(migration) = name.strip_prefix("source-") else { continue };
            let text = fs::read_to_string(&path)
                .map_err(|cause| JournalError::Directory { path: path.clone(), cause })?;
            match parse_source(migration, &text) {
                Some(SourceEntry::Committing(entry)) => unfinished.push(entry),
                Some(SourceEntry::Completed | SourceEntry::RolledBack) => {}
                None => return Err(JournalError::Damaged { path, text }),
            }
        }
        Ok(unfinished)
    }

    /// How far the source of a migration from here has gone; nothing where it was never committed.
    ///
    /// # Errors
    /// [`JournalError`] when the entry cannot be read.
    pub fn source_record(&self, migration: MigrationId) -> Result<Option<SourceEntry>, JournalError> {
        let path = self.directory.join(format!("source-{migration}"));
        match fs::read_to_string(&path) {
            Ok(text) => {
                let entry = parse_source(&migration.to_string(), &text);
                entry.map(Some).ok_or(JournalError::Damaged { path, text })
            }
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(cause) => Err(JournalError::Directory { path, cause }),
        }
    }

    fn token_path(&self, token: Token) -> PathBuf {
        self.directory.join(format!("token-{token}"))
    }

    /// Makes the names in the directory durable.
    fn sync(&self, path: &FilePath) -> Result<(), JournalError> {
        File::open(&self.directory)
            .and_then(|directory| directory.sync_all())
            .map_err(|cause| JournalError::Write { path: path.to_owned(), cause })
    }

    /// Writes a file under a name of its own, makes its content durable, and puts it in its place with `place`.
    fn write(
        &self,
        path: &FilePath,
        text: &str,
        place: impl FnOnce(&FilePath) -> io::Result<()>,
    ) -> Result<(), JournalError> {
        let failed = |cause| JournalError::Write { path: path.to_owned(), cause };
        let unique: [u8; 8] = super::draw().map_err(failed)?;
        let written = self.directory.join(format!("new-{:016x}", u64::from_le_bytes(unique)));
        let result = (|| {
            let mut file = File::create_new(&written)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            place(&written)
        })();
        // Renamed away, or a second name of what is in place.
        let _ = fs::remove_file(&written);
        result.map_err(failed)
    }
}

fn decision_text(decision: Decision) -> &'static str {
    match decision {
        Decision::Running => "running\n",
        Decision::Fenced => "fenced\n",
    }
}

/// `peer=ADDRESS:PORT`, and where the path says so ` from ADDRESS` and ` by INTERFACE`.
fn peer_line(path: &Path) -> String {
    let from = path.source.map_or_else(String::new, |source| format!(" from {source}"));
    let by = path.interface.map_or_else(String::new, |interface| format!(" by {interface}"));
    format!("peer={}{from}{by}\n", path.destination)
}

fn parse_peer(text: &str) -> Option<Path> {
    let mut words = text.split(' ');
    let mut path = Path::to(words.next()?.parse().ok()?);
    while let Some(word) = words.next() {
        match (word, words.next()?) {
            ("from", source) => path.source = Some(source.parse().ok()?),
            ("by", interface) => path.interface = Some(interface.parse().ok()?),
            _ => return None,
        }
    }
    Some(path)
}

fn parse_source(migration: &str, text: &str) -> Option<SourceEntry> {
    let (mut state, mut token, mut peers) = (None, None, Peers::default());
    for line in text.lines() {
        match line.split_once('=')? {
            ("state", value) => state = Some(value),
            ("token", value) => token = Some(value.parse().ok()?),
            ("peer", value) => peers.paths.push(parse_peer(value)?),
            ("peer-name", value) => peers.name = Some(value.to_owned()),
            _ => return None,
        }
    }
    let migration = MigrationId(migration.parse::<Token>().ok()?.0);
    let unfinished = Unfinished { migration, token: token?, peers };
    match state? {
        "committing" => Some(SourceEntry::Committing(unfinished)),
        "completed" => Some(SourceEntry::Completed),
        "rolled-back" => Some(SourceEntry::RolledBack),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: Token = Token([5; 16]);
    const MIGRATION: MigrationId = MigrationId([6; 16]);

    fn journal() -> (tempfile::TempDir, Journal) {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path().join("state")).unwrap();
        (directory, journal)
    }

    #[test]
    fn the_first_decision_stands() {
        let (_directory, journal) = journal();
        assert_eq!(journal.decision(TOKEN).unwrap(), None);
        assert_eq!(journal.decide(TOKEN, Decision::Fenced).unwrap(), Decision::Fenced);
        assert_eq!(journal.decide(TOKEN, Decision::Running).unwrap(), Decision::Fenced);
        assert_eq!(journal.decision(TOKEN).unwrap(), Some(Decision::Fenced));
    }

    #[test]
    fn many_at_once_agree_on_one_decision() {
        let (_directory, journal) = journal();
        let decisions: Vec<Decision> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|n| {
                    let wanted = if n % 2 == 0 { Decision::Running } else { Decision::Fenced };
                    let journal = &journal;
                    scope.spawn(move || journal.decide(TOKEN, wanted).unwrap())
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(decisions.windows(2).all(|pair| pair[0] == pair[1]), "{decisions:?}");
    }

    #[test]
    fn a_guest_that_never_ran_can_be_given_back() {
        let (_directory, journal) = journal();
        journal.decide(TOKEN, Decision::Running).unwrap();
        journal.revoke(TOKEN).unwrap();
        assert_eq!(journal.decision(TOKEN).unwrap(), Some(Decision::Fenced));
    }

    #[test]
    fn only_what_is_committing_is_unfinished() {
        let (_directory, journal) = journal();
        let by = Path {
            source: Some("::2".parse().unwrap()),
            destination: "[::1]:7000".parse().unwrap(),
            interface: Some("lo".parse().unwrap()),
        };
        let paths = vec![Path::to("127.0.0.1:7000".parse().unwrap()), by];
        let peers = Peers { paths, name: Some("beta".into()) };
        journal.record_source(MIGRATION, &peers, SourceRecord::Committing(TOKEN)).unwrap();
        let expected = Unfinished { migration: MIGRATION, token: TOKEN, peers: peers.clone() };
        assert_eq!(
            journal.source_record(MIGRATION).unwrap(),
            Some(SourceEntry::Committing(expected.clone()))
        );
        assert_eq!(journal.unfinished().unwrap(), [expected]);
        for over in [SourceRecord::Completed(TOKEN), SourceRecord::RolledBack(TOKEN)] {
            journal.record_source(MIGRATION, &peers, over).unwrap();
            assert_eq!(journal.unfinished().unwrap(), []);
        }
    }

    /// The lines are read by later versions of this program, and by people.
    #[test]
    fn the_peers_are_written_in_words() {
        let (directory, journal) = journal();
        let destination = "10.77.0.2:7434".parse().unwrap();
        let paths = vec![
            Path::to(destination),
            Path { source: Some("10.77.0.1".parse().unwrap()), destination, interface: None },
            Path { source: None, destination, interface: Some("pf0".parse().unwrap()) },
            Path {
                source: Some("10.77.0.1".parse().unwrap()),
                destination,
                interface: Some("pf0".parse().unwrap()),
            },
        ];
        let peers = Peers { paths, name: Some("beta".into()) };
        journal.record_source(MIGRATION, &peers, SourceRecord::Committing(TOKEN)).unwrap();
        let file = directory.path().join("state").join(format!("source-{MIGRATION}"));
        let text = fs::read_to_string(&file).unwrap();
        let expected = "state=committing\ntoken=05050505050505050505050505050505\n\
                        peer=10.77.0.2:7434\n\
                        peer=10.77.0.2:7434 from 10.77.0.1\n\
                        peer=10.77.0.2:7434 by pf0\n\
                        peer=10.77.0.2:7434 from 10.77.0.1 by pf0\n\
                        peer-name=beta\n";
        assert_eq!(text, expected);
        assert_eq!(journal.unfinished().unwrap()[0].peers, peers);

        for wrong in [
            "10.77.0.2",
            "10.77.0.2:7434 from",
            "10.77.0.2:7434 from pf0",
            "10.77.0.2:7434 by a/b",
            "10.77.0.2:7434 via 10.77.0.1",
            "10.77.0.2:7434  from 10.77.0.1",
        ] {
            fs::write(&file, format!("state=committing\ntoken={TOKEN}\npeer={wrong}\n")).unwrap();
            let error = journal.unfinished().unwrap_err();
            assert!(matches!(error, JournalError::Damaged { .. }), "{wrong:?}: {error}");
        }
    }

    /// Entries of before hosts had names and interfaces.
    #[test]
    fn an_entry_without_a_name_is_understood() {
        let (directory, journal) = journal();
        let text = format!("state=committing\ntoken={TOKEN}\npeer=127.0.0.1:7000\npeer=[::1]:7000\n");
        fs::write(directory.path().join("state").join(format!("source-{MIGRATION}")), text).unwrap();
        let paths = ["127.0.0.1:7000", "[::1]:7000"].map(|peer| Path::to(peer.parse().unwrap())).to_vec();
        assert_eq!(journal.unfinished().unwrap()[0].peers, Peers { paths, name: None });
    }

    #[test]
    fn damage_is_named_and_a_directory_that_cannot_be_is_too() {
        let (directory, journal) = journal();
        fs::write(directory.path().join("state").join(format!("source-{MIGRATION}")), "state=eaten").unwrap();
        let said = journal.unfinished().unwrap_err().to_string();
        assert!(said.contains("state=eaten") && said.contains("source-0606"), "{said}");
        fs::write(directory.path().join("file"), "").unwrap();
        let said = Journal::open(directory.path().join("file/state")).unwrap_err().to_string();
        assert!(said.contains("file/state"), "{said}");
    }
}

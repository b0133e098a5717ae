//! After a restart: what became of the guests that were committed and whose end was not written down.
//!
//! The process that held such a guest is gone, and its memory with it. Only the destination can still have it: it is told
//! `Commit` again, and runs the guest if it holds it complete, or answers what it decided before.

use std::time::Duration;

use super::chain;
use super::journal::{Journal, JournalError, Unfinished};
use crate::migration::handover::SourceRecord;
use crate::session::path::Path;
use crate::session::query;
use crate::wire::control::Message;

/// What became of one migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recovered {
    /// The guest runs at the destination.
    Completed,
    /// The destination never ran it, and its memory here is gone: start it anew from its disk.
    Lost,
    /// Nobody answered, for this reason; ask again.
    InDoubt(String),
}

/// Asks about every unfinished migration once, and writes down what is known then.
///
/// # Errors
/// [`JournalError`] when the journal cannot be read or written.
pub fn recover(journal: &Journal, timeout: Duration) -> Result<Vec<(Unfinished, Recovered)>, JournalError> {
    let mut recovered = Vec::new();
    for unfinished in journal.unfinished()? {
        let answer = ask(&unfinished, timeout);
        let record = match answer {
            Recovered::Completed => Some(SourceRecord::Completed(unfinished.token)),
            Recovered::Lost => Some(SourceRecord::RolledBack(unfinished.token)),
            Recovered::InDoubt(_) => None,
        };
        if let Some(record) = record {
            journal.record_source(unfinished.migration, &unfinished.peers, record)?;
        }
        tracing::info!(migration = %unfinished.migration, ?answer, "recovered");
        recovered.push((unfinished, answer));
    }
    Ok(recovered)
}

fn ask(unfinished: &Unfinished, timeout: Duration) -> Recovered {
    let paths: Vec<Path> =
        unfinished.peers.iter().map(|peer| Path { source: None, destination: *peer }).collect();
    let asked = Message::Commit(unfinished.token).encode();
    let answer = match query(&paths, unfinished.migration, &asked, timeout) {
        Ok(answer) => answer,
        Err(error) => return Recovered::InDoubt(chain(&error)),
    };
    match Message::decode(&answer) {
        Ok(Message::Running(token)) if token == unfinished.token => Recovered::Completed,
        Ok(Message::Fenced(token)) if token == unfinished.token => Recovered::Lost,
        Ok(other) => Recovered::InDoubt(format!("the destination answered {other:?}")),
        Err(error) => Recovered::InDoubt(chain(&error)),
    }
}

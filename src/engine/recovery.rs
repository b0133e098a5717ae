//! After a restart: what became of the guests that were committed and whose end was not written down.
//!
//! The process that held such a guest is gone, and its memory with it. Only the destination can still have it: it is told
//! `Commit` again, and runs the guest if it holds it complete, or answers what it decided before.

use std::time::Duration;

use super::chain;
use super::journal::{Journal, JournalError, Peers, Unfinished};
use crate::guest::{Guest, GuestError};
use crate::migration::handover::{NEVER_STARTED, Outcome, SourceRecord};
use crate::session::query;
use crate::session::trust::{PeerTrust, Trust};
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
pub fn recover(
    journal: &Journal,
    trust: &Trust,
    timeout: Duration,
) -> Result<Vec<(Unfinished, Recovered)>, JournalError> {
    let unfinished = journal.unfinished()?.into_iter();
    unfinished
        .map(|unfinished| {
            let answer = recover_one(&unfinished, journal, trust, timeout)?;
            Ok((unfinished, answer))
        })
        .collect()
}

/// Asks about one unfinished migration once, whose process is gone here, and writes down what is known then.
///
/// # Errors
/// [`JournalError`] when the journal cannot be written.
pub fn recover_one(
    unfinished: &Unfinished,
    journal: &Journal,
    trust: &Trust,
    timeout: Duration,
) -> Result<Recovered, JournalError> {
    let answer = ask(unfinished, &Message::Commit(unfinished.token), trust, timeout);
    let record = match answer {
        Recovered::Completed => Some(SourceRecord::Completed(unfinished.token)),
        Recovered::Lost => Some(SourceRecord::RolledBack(unfinished.token)),
        Recovered::InDoubt(_) => None,
    };
    if let Some(record) = record {
        journal.record_source(unfinished.migration, &unfinished.peers, record)?;
    }
    tracing::info!(migration = %unfinished.migration, ?answer, "recovered");
    Ok(answer)
}

/// Asks once about a guest that stands still here since its migration ended [`Outcome::InDoubt`], and acts on the answer:
/// when the destination has given it up, it runs here again. Call it until it is not in doubt any more.
///
/// # Errors
/// [`ResolveError`] when the answer could not be written down or the guest not be resumed; call it again.
pub fn resolve<G: Guest + ?Sized>(
    guest: &mut G,
    unfinished: &Unfinished,
    journal: &Journal,
    trust: &Trust,
    timeout: Duration,
) -> Result<Outcome, ResolveError> {
    let (outcome, record) = match ask(unfinished, &Message::Query(unfinished.token), trust, timeout) {
        Recovered::Completed => {
            (Outcome::Completed { warnings: Vec::new() }, SourceRecord::Completed(unfinished.token))
        }
        Recovered::Lost => {
            (Outcome::RolledBack { cause: NEVER_STARTED.into() }, SourceRecord::RolledBack(unfinished.token))
        }
        Recovered::InDoubt(_) => return Ok(Outcome::InDoubt { token: unfinished.token }),
    };
    journal.record_source(unfinished.migration, &unfinished.peers, record)?;
    if matches!(outcome, Outcome::RolledBack { .. }) {
        guest.resume()?;
    }
    Ok(outcome)
}

/// Why an answer could not be acted on.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// It could not be written down.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The guest could not be resumed.
    #[error(transparent)]
    Guest(#[from] GuestError),
}

fn ask(unfinished: &Unfinished, question: &Message, trust: &Trust, timeout: Duration) -> Recovered {
    let Peers { paths, name } = &unfinished.peers;
    let trust = PeerTrust { trust: trust.clone(), name: name.clone() };
    let answer = match query(paths, unfinished.migration, &question.encode(), &trust, timeout) {
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

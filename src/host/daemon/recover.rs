//! Finds everything again after a restart: the guests' processes that still run, and what became of the migrations.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::store::{GuestRecord, StoreError};
use super::tables::{Active, Guest, Tables};
use super::{ANSWER, Daemon, watch};
use crate::engine::journal::SourceEntry;
use crate::host::api::migration::{Direction, MigrationState};
use crate::host::guest_process::{Attached, GuestProcess};
use crate::host::holder::protocol::Command;

/// Takes up what an earlier daemon left. What has to be asked of other hosts goes on by itself.
///
/// # Errors
/// [`StoreError`] when the state directory cannot be read.
pub async fn recover(daemon: &Arc<Daemon>) -> Result<(), StoreError> {
    let (guests, migrations) = (daemon.store.guests()?, daemon.store.migrations()?);
    daemon.store.prune_logs(&guests);
    let settings = daemon.settings();
    {
        let mut tables = daemon.tables();
        for record in migrations {
            let mut active = Active::new(record.migration, Arc::clone(&settings), None);
            (active.peer, active.peer_gone) = (record.peer, record.peer_gone);
            tables.migrations.insert(active.migration.id.clone(), active);
        }
        for record in &guests {
            if is_over(record, &tables) {
                continue;
            }
            let guest = Guest { record: record.clone(), process: None, stopping: false };
            tables.guests.insert(record.info.name.clone(), guest);
        }
    }
    let mut taking_part = BTreeSet::new();
    for record in guests {
        let name = &record.info.name;
        taking_part.extend(record.info.migration.clone());
        let attached = GuestProcess::attach(&daemon.store.socket(&record.instance)).await;
        let is_known = |guest: &Guest| guest.record.instance == record.instance;
        if !daemon.tables().guests.get(name).is_some_and(is_known) {
            forget(daemon, &record, attached.ok()).await;
            continue;
        }
        match attached {
            Ok(attached) => {
                tracing::info!("guest {name}: its process {} is found again", attached.0.pid());
                watch::watch_again(daemon, name, attached);
            }
            Err(error) => {
                tracing::warn!("guest {name}: {error}");
                watch::watch_the_dead(daemon, name);
            }
        }
    }
    for migration in daemon.active_migrations() {
        if !taking_part.contains(&migration.id) {
            end_without_guest(daemon, &migration.id, migration.direction);
        }
    }
    Ok(())
}

/// Whether it is the guest of a QEMU whose migration is over: the crash came before it was forgotten.
fn is_over(record: &GuestRecord, tables: &Tables) -> bool {
    let migration = record.info.migration.as_ref();
    record.qemu.is_some() && migration.is_none_or(|id| !tables.migrations.contains_key(id))
}

async fn forget(daemon: &Daemon, record: &GuestRecord, attached: Option<Attached>) {
    if let Some((process, _)) = attached {
        let _ = process.request(Command::Acknowledge, ANSWER).await;
    }
    daemon.wrote(daemon.store.remove_guest(record));
}

/// A migration whose guest this host does not know: the crash came between two writes.
fn end_without_guest(daemon: &Daemon, id: &str, direction: Direction) {
    let written = watch::parse_id(id).ok().and_then(|id| daemon.journal.source_record(id).ok()).flatten();
    if direction == Direction::Outgoing && written == Some(SourceEntry::Completed) {
        return daemon.finish(id, MigrationState::Completed, None);
    }
    let cause = "the daemon was restarted before the guest began to move";
    daemon.finish(id, MigrationState::RolledBack, Some(cause.into()));
}

//! The guests of this host and the migrations under way, as the daemon has them in mind. What matters after a restart is written
//! down with each change.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

use super::settings::Settings;
use super::store::{GuestRecord, MigrationRecord};
use crate::host::api::guest::GuestState;
use crate::host::api::migration::{Direction, Migration, MigrationState};
use crate::host::guest_process::GuestProcess;
use crate::host::peer::client::PeerTarget;
use crate::host::peer::messages::Gone;

/// A guest.
#[derive(Debug)]
pub struct Guest {
    /// What is known of it.
    pub record: GuestRecord,
    /// The process that holds it, while that lives.
    pub process: Option<Arc<GuestProcess>>,
    /// Whether somebody told that process to end.
    pub stopping: bool,
}

/// A migration that is not over.
#[derive(Debug)]
pub struct Active {
    /// What is known of it.
    pub migration: Migration,
    /// How the other host's daemon is reached.
    pub peer: Option<PeerTarget>,
    /// What the other host said when its end was gone.
    pub peer_gone: Option<Gone>,
    /// The host file that it began with.
    pub settings: Arc<Settings>,
    /// The most that it was asked to send, in bytes a second.
    pub own_cap: Option<u64>,
    /// Becomes true when it is to end.
    pub cancel: watch::Sender<bool>,
    /// When its course was noted last, and what each interface had carried by then.
    pub sampled: Option<(Instant, BTreeMap<String, u64>)>,
    /// Whether it may wait for the next slot now; one whose destination was busy just now lets others go first.
    pub ready: bool,
}

impl Active {
    /// A migration that nothing has been done for yet.
    #[must_use]
    pub fn new(migration: Migration, settings: Arc<Settings>, own_cap: Option<u64>) -> Self {
        Self {
            migration,
            peer: None,
            peer_gone: None,
            settings,
            own_cap,
            cancel: watch::Sender::new(false),
            sampled: None,
            ready: true,
        }
    }

    /// What is kept of it.
    #[must_use]
    pub fn record(&self) -> MigrationRecord {
        MigrationRecord {
            migration: self.migration.clone(),
            peer: self.peer.clone(),
            peer_gone: self.peer_gone.clone(),
        }
    }

    /// Whether it takes a slot: it is being checked or under way. One in doubt moves nothing.
    #[must_use]
    pub fn takes_slot(&self) -> bool {
        matches!(self.migration.state, MigrationState::Checking | MigrationState::Running)
    }
}

/// All of them.
#[derive(Debug, Default)]
pub struct Tables {
    /// By name.
    pub guests: BTreeMap<String, Guest>,
    /// By identifier.
    pub migrations: BTreeMap<String, Active>,
}

impl Tables {
    /// How many slots are taken.
    #[must_use]
    pub fn taken(&self, direction: Direction) -> u32 {
        let taken = self.migrations.values().filter(|active| active.migration.direction == direction);
        taken.filter(|active| active.takes_slot()).count() as u32
    }

    /// Gives a waiting migration a slot, if there is one and nobody has waited longer.
    pub fn claim(&mut self, id: &str, most: u32) -> bool {
        if self.taken(Direction::Outgoing) >= most {
            return false;
        }
        let waiting = self.migrations.values().filter(|active| {
            active.migration.direction == Direction::Outgoing
                && active.migration.state == MigrationState::Waiting
                && active.ready
        });
        let first = waiting.min_by(|a, b| a.migration.requested_at.total_cmp(&b.migration.requested_at));
        if first.is_none_or(|first| first.migration.id != id) {
            return false;
        }
        if let Some(active) = self.migrations.get_mut(id) {
            active.migration.state = MigrationState::Checking;
        }
        true
    }

    /// The identifier that begins so, if there is just one.
    #[must_use]
    pub fn find_migration(&self, beginning: &str) -> Option<&Active> {
        let mut found = self.migrations.values().filter(|active| active.migration.id.starts_with(beginning));
        found.next().filter(|_| found.next().is_none())
    }

    /// Memory that was promised to guests on their way here, and that their processes do not hold yet.
    #[must_use]
    pub fn promised(&self) -> u64 {
        let arriving = self.guests.values().filter(|guest| guest.record.info.state == GuestState::Arriving);
        arriving
            .map(|guest| {
                let held = guest.process.as_ref().map_or(0, |process| resident(process.pid()));
                guest.record.promised_bytes.saturating_sub(held)
            })
            .sum()
    }
}

/// Memory that a process holds, in bytes (`/proc/PID/statm`, the second number, in pages).
fn resident(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages = text.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.unwrap_or(0) * crate::units::PAGE_SIZE
}

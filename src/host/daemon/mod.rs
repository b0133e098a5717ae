//! The daemon of a host: which guests it has, which move, and that a crash of anything leaves that known.
//!
//! - [`run`] starts it and keeps it going; [`routes`] is its HTTP API, [`peer_routes`] what other daemons may ask.
//! - [`outgoing`] takes a migration from the request, by the checks ([`check`]), to the guest's process; [`incoming`] makes the
//!   place for one.
//! - [`watch`] listens to a guest's process for as long as it lives, [`ended`] decides what its end means.
//! - `qemu` does the same for guests that a QEMU has, which is asked where the guest is.
//! - [`recover`] finds everything again after a restart.
//! - [`tables`] is what it has in mind, [`store`] what is on disk; [`share`] divides the bandwidth.

mod account;
pub mod check;
mod ended;
pub mod guests;
pub mod incoming;
pub mod outgoing;
pub mod peer_routes;
mod qemu;
pub mod recover;
pub mod routes;
pub mod run;
pub mod settings;
pub mod share;
pub mod store;
pub mod tables;
pub mod watch;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::Notify;

use crate::engine::chain;
use crate::engine::journal::Journal;
use crate::host::api::guest::{GuestInfo, GuestState};
use crate::host::api::migration::{Direction, LogLine, Migration, MigrationState};
use crate::host::guest_process::GuestProcess;
use crate::host::hex;
use crate::host::history::History;
use crate::host::holder::protocol::Command;
use crate::host::metrics::Metrics;
use settings::Settings;
use share::Sending;
use store::Store;
use tables::{Active, Guest, Tables};

/// How long a guest's process may take over a small command.
const ANSWER: Duration = Duration::from_secs(10);

/// The wall clock, in seconds since 1970.
#[must_use]
pub fn now() -> f64 {
    crate::engine::wall_clock() as f64 / 1e9
}

/// What a daemon is.
pub struct Daemon {
    settings: RwLock<Arc<Settings>>,
    store: Store,
    journal: Journal,
    history: History,
    metrics: Metrics,
    tables: Mutex<Tables>,
    /// Told whenever a slot may have become free.
    freed: Notify,
    since: f64,
    host_file: Option<std::path::PathBuf>,
    /// Where other daemons reach this one.
    listening: Mutex<Vec<std::net::SocketAddr>>,
    /// Counts the console lines and the like that need a number of their own.
    numbers: AtomicU64,
    /// Whether faults may be asked for, for tests.
    faults_allowed: bool,
    /// The versions that it says it speaks; another one's in tests.
    versions: crate::host::preflight::Versions,
}

impl Daemon {
    /// What is in force for new migrations.
    #[must_use]
    pub fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.settings.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn set_settings(&self, settings: Settings) {
        *self.settings.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(settings);
        self.freed.notify_waiters();
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        // Changed in steps that leave it whole.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listening(&self) -> MutexGuard<'_, Vec<std::net::SocketAddr>> {
        self.listening.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A name for the files of one more process.
    fn new_instance(&self) -> String {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let drawn = crate::engine::draw::<4>().unwrap_or((number as u32 ^ std::process::id()).to_le_bytes());
        hex::encode(&drawn)
    }

    /// Changes a guest and writes it down. Answers what `change` does; nothing where there is no such guest.
    fn with_guest<T>(&self, name: &str, change: impl FnOnce(&mut Guest) -> T) -> Option<T> {
        let mut tables = self.tables();
        let guest = tables.guests.get_mut(name)?;
        let before = guest.record.clone();
        let done = change(guest);
        if guest.record != before {
            self.wrote(self.store.put_guest(&guest.record));
        }
        Some(done)
    }

    /// Forgets a guest.
    fn remove_guest(&self, name: &str) {
        self.remove_guest_if(name, |_| true);
    }

    fn remove_guest_if(&self, name: &str, condition: impl FnOnce(&Guest) -> bool) {
        let mut tables = self.tables();
        if tables.guests.get(name).is_some_and(condition)
            && let Some(guest) = tables.guests.remove(name)
        {
            self.wrote(self.store.remove_guest(&guest.record));
        }
    }

    /// Changes a migration, and writes it down when `keep`.
    fn with_migration<T>(&self, id: &str, keep: bool, change: impl FnOnce(&mut Active) -> T) -> Option<T> {
        let mut tables = self.tables();
        let active = tables.migrations.get_mut(id)?;
        let done = change(active);
        if keep {
            self.wrote(self.store.put_migration(&active.record()));
        }
        Some(done)
    }

    /// What cannot be written is said loudly: the daemon goes on, but would not know it after a restart.
    fn wrote(&self, done: Result<(), store::StoreError>) {
        if let Err(error) = done {
            tracing::error!("a restart of this daemon would not know what is now: {}", chain(&error));
        }
    }

    /// Notes what happens to a migration, for its record and the log.
    fn say(&self, id: &str, text: impl Into<String>) {
        let text = text.into();
        let noted = self.with_migration(id, false, |active| {
            active.migration.log.push(LogLine { at: now(), text: text.clone() });
            (active.migration.guest.clone(), active.migration.insecure)
        });
        if let Some((guest, insecure)) = noted {
            log_line(id, &guest, insecure, &text);
        }
    }

    /// A migration is over: into the history with it. One that is not under way is left alone.
    fn finish(&self, id: &str, state: MigrationState, cause: Option<String>) {
        let mut tables = self.tables();
        let Some(active) = tables.migrations.remove(id) else { return };
        let mut migration = active.migration;
        let end = now();
        migration.state = state;
        migration.ended_at = Some(end);
        migration.total_seconds = migration.total_seconds.or(migration.started_at.map(|began| end - began));
        migration.cause = cause.or(migration.cause);
        let text = ending(&migration);
        let said = account::carried(&migration.channels).into_iter().chain([text]);
        let said: Vec<LogLine> = said.map(|text| LogLine { at: end, text }).collect();
        migration.log.extend(said.iter().cloned());
        // The record of the end comes first: a crash in between is found out again from the guest's process or the journal.
        self.recorded(&migration);
        self.wrote(self.store.remove_migration(id));
        drop(tables);
        for line in said {
            log_line(id, &migration.guest, migration.insecure, &line.text);
        }
        self.metrics.ended(&migration);
        self.freed.notify_waiters();
    }

    fn recorded(&self, migration: &Migration) {
        if let Err(error) = self.history.record(migration) {
            tracing::error!("the history cannot be written: {}", chain(&error));
        }
    }

    /// Divides the bandwidth anew between those that send.
    async fn rebalance(&self) {
        let (sending, processes): (Vec<Sending>, Vec<(String, Arc<GuestProcess>)>) = {
            let tables = self.tables();
            let outgoing = tables.migrations.values().filter(|active| {
                active.migration.direction == Direction::Outgoing
                    && active.migration.state == MigrationState::Running
            });
            outgoing
                .filter_map(|active| {
                    let guest = tables.guests.get(&active.migration.guest)?;
                    let process = (active.migration.id.clone(), guest.process.clone()?);
                    Some((sending(active), process))
                })
                .unzip()
        };
        let mut shares = share::shares(&sending);
        for (id, process) in processes {
            let Some(caps) = shares.remove(&id) else { continue };
            if let Err(error) = process.request(Command::SetCaps(caps), ANSWER).await {
                tracing::warn!("the bandwidth of migration {id} could not be set: {error}");
            }
        }
    }

    /// What is to be sent by whom, now and with one more migration.
    fn shares_with(
        &self,
        one_more: Sending,
    ) -> std::collections::BTreeMap<String, crate::host::holder::protocol::Caps> {
        let tables = self.tables();
        let outgoing = tables.migrations.values().filter(|active| {
            active.migration.direction == Direction::Outgoing
                && active.migration.state == MigrationState::Running
                && active.migration.id != one_more.id
        });
        let mut all: Vec<Sending> = outgoing.map(sending).collect();
        drop(tables);
        all.push(one_more);
        share::shares(&all)
    }

    /// A guest stands so from now on.
    fn guest_is(&self, name: &str, state: GuestState, note: Option<String>) {
        self.with_guest(name, |guest| {
            guest.record.info.state = state;
            guest.record.info.note = note;
        });
    }

    /// Every guest, as people see it.
    fn guest_infos(&self) -> Vec<GuestInfo> {
        self.tables().guests.values().map(|guest| guest.record.info.clone()).collect()
    }

    /// Every migration that is not over.
    fn active_migrations(&self) -> Vec<Migration> {
        self.tables().migrations.values().map(|active| active.migration.clone()).collect()
    }
}

fn sending(active: &Active) -> Sending {
    let paths = active.migration.paths.iter();
    Sending {
        id: active.migration.id.clone(),
        host_cap: active.settings.config().bandwidth_cap,
        own_cap: active.own_cap,
        interfaces: paths.map(|path| (path.interface.clone(), path.bandwidth_cap)).collect(),
    }
}

fn ending(migration: &Migration) -> String {
    let cause = migration.cause.as_deref().unwrap_or("no cause is known");
    match migration.state {
        MigrationState::Completed => match migration.direction {
            Direction::Outgoing => format!("completed: the guest runs at {}", migration.peer),
            Direction::Incoming => format!("completed: the guest came from {} and runs here", migration.peer),
        },
        MigrationState::RolledBack => match migration.direction {
            Direction::Outgoing => format!("did not move, and runs here: {cause}"),
            Direction::Incoming => format!("did not come from {}: {cause}", migration.peer),
        },
        _ => format!("lost: {cause}"),
    }
}

fn log_line(id: &str, guest: &str, insecure: bool, text: &str) {
    let short = &id[..id.len().min(8)];
    if insecure {
        tracing::info!("migration {short} of {guest} [insecure: hosts do not prove who they are]: {text}");
    } else {
        tracing::info!("migration {short} of {guest}: {text}");
    }
}

//! A migration away from here: from the request, by a slot, the checks and the destination's admission, to the guest's process.
//! From there on [`super::watch`] has it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::check::{Checked, Way};
use super::settings::Settings;
use super::share::Sending;
use super::tables::Active;
use super::{ANSWER, Daemon, now};
use crate::host::api::check::{Check, CheckStatus, PathInfo};
use crate::host::api::guest::GuestState;
use crate::host::api::migration::{Direction, MigrateRequest, Migration, MigrationState};
use crate::host::hex;
use crate::host::holder::protocol::{Agreed, Command, MovePath, MoveSpec};
use crate::host::peer::messages::{AdmitAnswer, AdmitRequest, CheckRequest, Gone, MigrationAnswer};
use crate::session::mode::TransferMode;

/// How long another daemon may take to make a place.
const CALL: Duration = Duration::from_secs(30);
/// How often a busy destination is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How long a destination waits for a source that has fallen silent.
const WAITS_FOR_US: Duration = Duration::from_secs(60);
/// How long a source asks in doubt before its guest counts as being in it.
const DOUBT: Duration = Duration::from_secs(20);
/// From this speed on one connection does not fill a path, in bits a second.
const FAST: u64 = 20_000_000_000;

/// Why a migration is not begun, or ends before anything has moved.
#[derive(Clone, Debug, thiserror::Error)]
pub enum MigrateFailure {
    /// It cannot be, or not now.
    #[error("{0}")]
    Refused(String),
    /// Checks failed.
    #[error("{}", failed_in_words(.0))]
    Checks(Vec<Check>),
    /// Every slot of the destination is taken.
    #[error("{0}")]
    Busy(String),
    /// Somebody cancelled it.
    #[error("it was cancelled")]
    Cancelled,
}

fn failed_in_words(checks: &[Check]) -> String {
    let failed = checks.iter().filter(|check| check.status == CheckStatus::Failed);
    let words = failed.map(|check| match &check.advice {
        Some(advice) => format!("{}: {} ({advice})", check.name, check.finding),
        None => format!("{}: {}", check.name, check.finding),
    });
    words.collect::<Vec<_>>().join("; ")
}

impl Daemon {
    /// Begins to move a guest. Answers at once; the migration goes on by itself.
    ///
    /// # Errors
    /// [`MigrateFailure::Refused`] when it cannot even begin.
    pub fn migrate(
        self: &Arc<Self>,
        name: &str,
        request: MigrateRequest,
    ) -> Result<Migration, MigrateFailure> {
        let refused = |why: String| Err(MigrateFailure::Refused(why));
        if (request.source_fault.is_some() || request.destination_fault.is_some()) && !self.faults_allowed {
            return refused("faults are injected only by a daemon that was started for tests".into());
        }
        super::qemu::check_request(name, &request)?;
        let drawn =
            crate::engine::draw::<16>().map_err(|error| MigrateFailure::Refused(error.to_string()))?;
        let id = hex::encode(&drawn);
        let settings = self.settings();
        let mut tables = self.tables();
        self.attach_qemu(&mut tables, name)?;
        let Some(guest) = tables.guests.get(name) else {
            return refused(super::guests::GuestFailure::Unknown(name.to_owned()).to_string());
        };
        let info = &guest.record.info;
        if let Some(active) = info.migration.as_ref().and_then(|id| tables.migrations.get(id)) {
            let id = &active.migration.id;
            return refused(format!(
                "{name} is being moved already, by migration {id}; `pageferry cancel {id}` ends it"
            ));
        }
        if info.state != GuestState::Running {
            return refused(format!(
                "{name} does not run: {}",
                info.note.as_deref().unwrap_or("it is being started")
            ));
        }
        let migration = requested(&id, info, &request, &settings);
        let active = Active::new(migration.clone(), settings, request.bandwidth_cap);
        self.wrote(self.store.put_migration(&active.record()));
        tables.migrations.insert(id.clone(), active);
        // Under the same lock: a second request finds it moving.
        if let Some(guest) = tables.guests.get_mut(name) {
            guest.record.info.migration = Some(id.clone());
            self.wrote(self.store.put_guest(&guest.record));
        }
        drop(tables);
        self.metrics.begun(&migration);
        self.say(&id, format!("asked to move to {} in mode {}", request.to, migration.mode_requested));
        let daemon = Arc::clone(self);
        let name = name.to_owned();
        tokio::spawn(async move { daemon.run_outgoing(&id, &name, &request).await });
        Ok(migration)
    }

    async fn run_outgoing(self: &Arc<Self>, id: &str, name: &str, request: &MigrateRequest) {
        let Some((settings, cancel)) = self
            .with_migration(id, false, |active| (Arc::clone(&active.settings), active.cancel.subscribe()))
        else {
            return;
        };
        loop {
            let prepared = tokio::select! {
                prepared = self.prepare(id, name, request, &settings) => prepared,
                () = cancelled(cancel.clone()) => Err(MigrateFailure::Cancelled),
            };
            let done = match prepared {
                Ok((checked, spec)) => self.start_moving(id, name, &checked, spec).await,
                Err(failure) => Err(failure),
            };
            match done {
                Ok(()) => return self.rebalance().await,
                Err(MigrateFailure::Busy(why)) if request.wait => {
                    self.wait_for_destination(id, &why).await;
                }
                Err(failure) => {
                    self.tell_gone(id, false, &failure.to_string()).await;
                    self.with_guest(name, |guest| {
                        // Its process may have ended meanwhile, which says more.
                        if guest.record.info.state == GuestState::Moving {
                            guest.record.info.state = GuestState::Running;
                        }
                    });
                    if crate::host::qemu::is_qemu(name) {
                        return self.detach_qemu(name, id, &failure.to_string()).await;
                    }
                    return self.finish(id, MigrationState::RolledBack, Some(failure.to_string()));
                }
            }
        }
    }

    async fn wait_for_destination(&self, id: &str, why: &str) {
        self.with_migration(id, true, |active| {
            active.migration.state = MigrationState::Waiting;
            active.ready = false;
        });
        self.note(id, Some(format!("waits for the destination: {why}")));
        self.freed.notify_waiters();
        tokio::time::sleep(ASK_AGAIN).await;
        self.with_migration(id, false, |active| active.ready = true);
    }

    fn note(&self, id: &str, note: Option<String>) {
        let news = self.with_migration(id, false, |active| {
            let progress = active.migration.progress.get_or_insert_default();
            let news = progress.note != note;
            progress.note.clone_from(&note);
            news
        });
        if let (Some(true), Some(note)) = (news, note) {
            self.say(id, note);
        }
    }

    /// Everything before the guest's process is told. May be dropped at any point.
    async fn prepare(
        self: &Arc<Self>,
        id: &str,
        name: &str,
        request: &MigrateRequest,
        settings: &Arc<Settings>,
    ) -> Result<(Checked, MoveSpec), MigrateFailure> {
        self.wait_for_slot(id, request.wait).await?;
        self.note(id, None);
        let mode = request.mode.unwrap_or(settings.config().performance_option);
        let way = Way { to: &request.to, incoming: request.incoming.as_deref(), mode };
        let checked = self.checked(id, name, way, settings).await?;
        let failed: Vec<&Check> =
            checked.checks.iter().filter(|check| check.status == CheckStatus::Failed).collect();
        if let [only] = failed[..]
            && only.name == "slots"
            && request.wait
            && checked.theirs.max_incoming > 0
        {
            return Err(MigrateFailure::Busy(only.finding.clone()));
        }
        if !failed.is_empty() {
            return Err(MigrateFailure::Checks(checked.checks));
        }
        let admitted = self.admit(id, request, mode, settings, &checked).await?;
        let spec = self.move_spec(id, name, request, settings, &checked, admitted)?;
        Ok((checked, spec))
    }

    /// Tells the guest's process. From then on only that process can end it.
    async fn start_moving(
        self: &Arc<Self>,
        id: &str,
        name: &str,
        checked: &Checked,
        spec: MoveSpec,
    ) -> Result<(), MigrateFailure> {
        let refused = |why: String| MigrateFailure::Refused(why);
        if spec.qemu.is_some() {
            self.start_for_qemu(name).await.map_err(|error| refused(error.to_string()))?;
        }
        let process = self.process(name).map_err(|error| refused(error.to_string()))?;
        if spec.requires_encryption && !process.hello().encrypts {
            // It would skip the word, and send in plain.
            return Err(refused(
                "the host file demands encryption, and the guest's process is of a release that does not encrypt memory; mark a \
                 network isolated = true and take encryption out to move it, or start the guest anew"
                    .into(),
            ));
        }
        self.guest_is(name, GuestState::Moving, None);
        let cancelled = self.with_migration(id, true, |active| {
            active.migration.state = MigrationState::Running;
            active.migration.started_at = Some(now());
            active.migration.paths.clone_from(&checked.paths);
            active.cancel.subscribe()
        });
        let ways: Vec<String> = checked
            .paths
            .iter()
            .map(|path| format!("{} to {}", path.interface, path.peer_interface))
            .collect();
        self.say(id, format!("moves to {} over {}", checked.theirs.name, ways.join(" and ")));
        process.request(Command::Move(spec), ANSWER).await.map_err(|error| refused(error.to_string()))?;
        if cancelled.is_some_and(|cancelled| *cancelled.borrow()) {
            // Somebody cancelled while there was nothing in the process to cancel.
            let _ = process.request(Command::Cancel, ANSWER).await;
        }
        Ok(())
    }

    async fn wait_for_slot(&self, id: &str, wait: bool) -> Result<(), MigrateFailure> {
        loop {
            let freed = self.freed.notified();
            let most = self.settings().config().max_migrations;
            if self.tables().claim(id, most) {
                return Ok(());
            }
            let why = format!(
                "{most} migrations from this host are under way, and its host file allows no more (max_migrations)"
            );
            if !wait {
                return Err(MigrateFailure::Refused(format!("{why}; --wait waits for one to end")));
            }
            self.note(id, Some(format!("waits for a slot: {why}")));
            tokio::select! {
                () = freed => {}
                () = tokio::time::sleep(ASK_AGAIN) => {}
            }
        }
    }

    async fn admit(
        &self,
        id: &str,
        request: &MigrateRequest,
        mode: TransferMode,
        settings: &Settings,
        checked: &Checked,
    ) -> Result<Admitted, MigrateFailure> {
        let question = AdmitRequest {
            migration: id.to_owned(),
            check: CheckRequest {
                source: settings.config().name.clone(),
                versions: self.versions.clone(),
                guest: checked.guest.clone(),
                mode,
            },
            listen: checked.paths.iter().map(|path| path.destination).collect(),
            port: settings.config().port,
            verify: request.verify,
            downtime_limit_ms: downtime_limit_ms(request, settings),
            fault: request.destination_fault.clone(),
        };
        let asked =
            checked.target.call::<_, AdmitAnswer>(&settings.trust, "/peer/v1/admit", &question, CALL).await;
        match asked {
            Ok(AdmitAnswer::Admitted { secret, addresses, answering }) => {
                Ok(Admitted { secret, addresses, answering })
            }
            Ok(AdmitAnswer::Busy { why }) => Err(MigrateFailure::Busy(why)),
            Ok(AdmitAnswer::Refused { checks }) => Err(MigrateFailure::Checks(checks)),
            Err(error) => Err(MigrateFailure::Refused(error.to_string())),
        }
    }

    fn move_spec(
        &self,
        id: &str,
        name: &str,
        request: &MigrateRequest,
        settings: &Settings,
        checked: &Checked,
        admitted: Admitted,
    ) -> Result<MoveSpec, MigrateFailure> {
        let config = settings.config();
        let paths: Vec<MovePath> = checked
            .paths
            .iter()
            .filter_map(|path| {
                let at = admitted.addresses.iter().find(|at| at.ip() == path.destination)?;
                let interface = Some(path.interface.clone());
                let isolated = path.isolated;
                Some(MovePath { source: Some(path.source), destination: *at, interface, isolated })
            })
            .collect();
        if paths.is_empty() {
            let why = "the destination listens at none of the addresses that it was asked for";
            return Err(MigrateFailure::Refused(why.into()));
        }
        let per_path = request.channels_per_path.or(config.channels_per_path);
        let channels = paths.len() * per_path.map_or_else(|| channels_per_path(&checked.paths), usize::from);
        let sending = Sending {
            id: id.to_owned(),
            host_cap: config.bandwidth_cap,
            own_cap: request.bandwidth_cap,
            interfaces: checked
                .paths
                .iter()
                .map(|path| (path.interface.clone(), path.bandwidth_cap))
                .collect::<BTreeMap<_, _>>(),
        };
        Ok(MoveSpec {
            name: name.to_owned(),
            paths,
            answering: admitted.answering,
            channels,
            mode: request.mode.unwrap_or(config.performance_option),
            downtime_limit_ms: downtime_limit_ms(request, settings),
            max_rounds: request.max_rounds.unwrap_or(config.max_rounds),
            on_no_convergence: request.on_no_convergence.unwrap_or(config.on_no_convergence),
            doubt_ms: DOUBT.as_millis() as u64,
            agreed: Some(Agreed {
                migration: id.to_owned(),
                admission: admitted.secret,
                trust: config.tls.clone(),
                peer_name: config.tls.as_ref().map(|_| checked.target.name.clone()),
            }),
            caps: self.shares_with(sending).remove(id).unwrap_or_default(),
            requires_encryption: config.requires_encryption,
            rdma: config.rdma,
            digest_ram: request.verify,
            fault: request.source_fault.clone(),
            qemu: self.qemu_end(name),
        })
    }

    /// Ends a migration, if it can still be ended.
    ///
    /// # Errors
    /// Why not, in words.
    pub async fn cancel(&self, id: &str) -> Result<String, String> {
        let (id, guest, state) = {
            let tables = self.tables();
            let active = tables
                .find_migration(id)
                .or_else(|| {
                    let id = tables.guests.get(id)?.record.info.migration.clone()?;
                    tables.migrations.get(&id)
                })
                .ok_or_else(|| {
                    format!("no migration {id:?} is under way; `pageferry status` shows those that are")
                })?;
            active.cancel.send_replace(true);
            (active.migration.id.clone(), active.migration.guest.clone(), active.migration.state)
        };
        match state {
            MigrationState::InDoubt => Err(format!(
                "migration {id} is in doubt: the guest was given away, so it cannot be called back; the other host is being asked"
            )),
            MigrationState::Waiting | MigrationState::Checking if self.is_outgoing(&id) => {
                Ok(format!("migration {id} is cancelled; {guest} goes on here"))
            }
            _ => {
                let process = self.process(&guest).map_err(|error| error.to_string())?;
                process.request(Command::Cancel, ANSWER).await.map_err(|error| error.to_string())?;
                self.say(&id, "somebody cancels it");
                Ok(format!("migration {id} is told to end; `pageferry status {id}` shows how it ends"))
            }
        }
    }

    fn is_outgoing(&self, id: &str) -> bool {
        self.with_migration(id, false, |active| active.migration.direction == Direction::Outgoing)
            == Some(true)
    }

    /// The destination need not wait for a source that does not come any more.
    pub(super) async fn tell_gone(&self, id: &str, lost: bool, cause: &str) {
        let Some(Some(peer)) = self.with_migration(id, false, |active| active.peer.clone()) else { return };
        let trust = self.settings().trust.clone();
        let path = format!("/peer/v1/migrations/{id}/gone");
        let gone = Gone { lost, cause: cause.to_owned() };
        if let Err(error) = peer.call::<_, MigrationAnswer>(&trust, &path, &gone, ANSWER).await {
            self.say(id, format!("the destination could not be told: {error}"));
        }
    }

    /// The same about a guest that goes on here, until it has heard, for as long as it would wait by itself: where the network
    /// failed, its process has not heard from the guest's either, and keeps the guest's name and memory.
    pub(super) fn keep_telling_gone(self: &Arc<Self>, id: &str, cause: Option<&str>) {
        let Some(Some(peer)) = self.with_migration(id, false, |active| active.peer.clone()) else { return };
        let why = cause.unwrap_or("it was not moved");
        let gone = Gone { lost: false, cause: format!("the guest goes on at the source: {why}") };
        let (daemon, path) = (Arc::clone(self), format!("/peer/v1/migrations/{id}/gone"));
        tokio::spawn(async move {
            let began = Instant::now();
            let mut told = false;
            while !told && began.elapsed() < WAITS_FOR_US {
                // First of all its process hears it from the guest's, as a rule.
                tokio::time::sleep(ASK_AGAIN).await;
                let trust = daemon.settings().trust.clone();
                told = peer.call::<_, MigrationAnswer>(&trust, &path, &gone, ANSWER).await.is_ok();
            }
        });
    }
}

/// What the destination gave.
struct Admitted {
    secret: String,
    addresses: Vec<SocketAddr>,
    answering: Vec<SocketAddr>,
}

fn requested(
    id: &str,
    guest: &crate::host::api::guest::GuestInfo,
    request: &MigrateRequest,
    settings: &Settings,
) -> Migration {
    let config = settings.config();
    let origin = match request.mode {
        Some(_) => "request",
        None => settings.loaded.origin_of("performance_option"),
    };
    Migration {
        id: id.to_owned(),
        guest: guest.name.clone(),
        guest_kind: guest.kind.clone(),
        peer: request.to.clone(),
        mode_requested: request.mode.unwrap_or(config.performance_option),
        mode_origin: origin.to_owned(),
        insecure: settings.trust.is_insecure(),
        downtime_limit_seconds: downtime_limit_ms(request, settings) as f64 / 1e3,
        memory_bytes: guest.memory_bytes,
        ..super::account::blank(Direction::Outgoing)
    }
}

fn downtime_limit_ms(request: &MigrateRequest, settings: &Settings) -> u64 {
    let own = settings.config().downtime_limit.as_millis();
    request.downtime_limit_ms.unwrap_or(u64::try_from(own).unwrap_or(u64::MAX))
}

/// How many connections a path gets when nobody says: a second one where one processor would not fill the wire.
fn channels_per_path(paths: &[PathInfo]) -> usize {
    let fast = paths.iter().any(|path| path.speed_bits_per_second.is_none_or(|speed| speed >= FAST));
    if paths.len() == 1 || fast { 2 } else { 1 }
}

async fn cancelled(mut cancel: watch::Receiver<bool>) {
    if cancel.wait_for(|cancelled| *cancelled).await.is_err() {
        std::future::pending::<()>().await;
    }
}

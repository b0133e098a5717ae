//! Listens to the process that holds a guest, for as long as it lives ([`super::ended`] comes after). The same whether the
//! process was started just now or found again after a restart: its first word tells how it stands.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::broadcast::error::RecvError;

use super::account::{note_moved, note_progress};
use super::store::QemuRecord;
use super::tables::Guest;
use super::{ANSWER, Daemon, now};
use crate::engine::source::MigrationId;
use crate::host::api::guest::GuestState;
use crate::host::api::migration::MigrationState;
use crate::host::guest_process::{Attached, GuestProcess};
use crate::host::hex;
use crate::host::holder::protocol::{Arrived, Command, Doing, Event, HolderState, MoveProgress, Moved};
use crate::host::peer::messages::{Gone, MigrationAnswer};
use crate::migration::handover::NEVER_STARTED;

/// How long a process that is being made ready by a daemon that has gone is left alone.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// How long a question may take.
pub(super) const QUESTION: Duration = Duration::from_secs(5);
/// How long a destination may take to note why it did not start a guest, and how often it is asked.
const REASON: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(50);
/// How long a source may take from its admission to its connection.
const COME_WITHIN: Duration = Duration::from_secs(30);

/// Starts to listen to a guest's process that was started just now.
pub fn watch(daemon: &Arc<Daemon>, name: &str, attached: Attached) {
    listen(daemon, name, attached, false);
}

/// Starts to listen to a guest's process that runs since before this daemon.
pub fn watch_again(daemon: &Arc<Daemon>, name: &str, attached: Attached) {
    listen(daemon, name, attached, true);
}

fn listen(daemon: &Arc<Daemon>, name: &str, attached: Attached, found: bool) {
    let (process, events) = attached;
    let process = Arc::new(process);
    let instance = daemon.with_guest(name, |guest| {
        guest.process = Some(Arc::clone(&process));
        guest.record.info.pid = Some(process.pid());
        guest.record.instance.clone()
    });
    let Some(instance) = instance else { return };
    let watch = Watch { daemon: Arc::clone(daemon), name: name.to_owned(), instance };
    tokio::spawn(async move { watch.run((process, events), found).await });
}

/// A guest's process has ended while nobody listened.
pub fn watch_the_dead(daemon: &Arc<Daemon>, name: &str) {
    let instance = daemon.with_guest(name, |guest| {
        guest.record.info.pid = None;
        guest.record.instance.clone()
    });
    let Some(instance) = instance else { return };
    let watch = Watch { daemon: Arc::clone(daemon), name: name.to_owned(), instance };
    tokio::spawn(async move { watch.ended().await });
}

/// Who listens to one process.
pub(super) struct Watch {
    pub(super) daemon: Arc<Daemon>,
    pub(super) name: String,
    /// Which of its processes: another guest may have the name before this one has ended.
    instance: String,
}

type Listening = (Arc<GuestProcess>, tokio::sync::broadcast::Receiver<Event>);

impl Watch {
    async fn run(&self, first: Listening, mut found: bool) {
        let mut listening = Some(first);
        while let Some((process, mut events)) = listening.take() {
            let hello = process.hello().clone();
            if found && hello.doing == Doing::Starting {
                // It was told by a daemon that is gone, and answers only that one.
                tokio::time::sleep(LOOK_AGAIN).await;
                listening = self.attach_again().await;
                continue;
            }
            if found {
                self.hello(&process, hello).await;
            }
            found = true;
            let mut due = self.is_awaited().then(|| Instant::now() + COME_WITHIN);
            loop {
                let waiting = due
                    .map_or(Duration::from_secs(3600), |due| due.saturating_duration_since(Instant::now()));
                match tokio::time::timeout(waiting, events.recv()).await {
                    Err(_) => {
                        if due.take().is_some() && self.is_awaited() {
                            self.say("the source does not come; the place for the guest is given up");
                            let _ = process.request(Command::Cancel, ANSWER).await;
                        }
                    }
                    Ok(Ok(event)) => self.heard(&process, event).await,
                    Ok(Err(RecvError::Lagged(_))) => {
                        listening = self.attach_again().await;
                        break;
                    }
                    Ok(Err(RecvError::Closed)) => break,
                }
            }
        }
        self.with_guest(|guest| {
            guest.process = None;
            guest.record.info.pid = None;
        });
        self.ended().await;
    }

    async fn attach_again(&self) -> Option<Listening> {
        let socket = self.daemon.store.socket(&self.instance);
        let (process, events) = GuestProcess::attach(&socket).await.ok()?;
        let process = Arc::new(process);
        self.with_guest(|guest| guest.process = Some(Arc::clone(&process)));
        Some((process, events))
    }

    /// The migration that the guest takes part in, if it does.
    pub(super) fn migration(&self) -> Option<String> {
        let id = self.with_guest(|guest| guest.record.info.migration.clone())??;
        self.daemon.tables().migrations.contains_key(&id).then_some(id)
    }

    fn state(&self) -> Option<GuestState> {
        self.with_guest(|guest| guest.record.info.state)
    }

    pub(super) fn with_guest<T>(&self, change: impl FnOnce(&mut Guest) -> T) -> Option<T> {
        let change = |guest: &mut Guest| self.is_of(guest).then(|| change(guest));
        self.daemon.with_guest(&self.name, change).flatten()
    }

    /// The QEMU whose guest it is, where it is one's.
    pub(super) fn qemu(&self) -> Option<QemuRecord> {
        self.with_guest(|guest| guest.record.qemu.clone()).flatten()
    }

    pub(super) fn is_of(&self, guest: &Guest) -> bool {
        guest.record.instance == self.instance
    }

    pub(super) fn is(&self, state: GuestState, note: Option<String>) {
        self.with_guest(|guest| {
            guest.record.info.state = state;
            guest.record.info.note = note;
        });
    }

    pub(super) fn remove(&self) {
        self.daemon.remove_guest_if(&self.name, |guest| self.is_of(guest));
    }

    /// Whether it is to arrive and its source has not come yet.
    fn is_awaited(&self) -> bool {
        let Some(id) = self.migration() else { return false };
        let state = self.daemon.with_migration(&id, false, |active| active.migration.state);
        self.state() == Some(GuestState::Arriving) && state == Some(MigrationState::Checking)
    }

    fn say(&self, text: impl Into<String>) {
        match self.migration() {
            Some(id) => self.daemon.say(&id, text),
            None => tracing::info!("guest {}: {}", self.name, text.into()),
        }
    }

    /// How the process stands when this daemon begins to listen to it.
    async fn hello(&self, process: &GuestProcess, hello: HolderState) {
        if let Some(moved) = hello.moved {
            self.moved(process, &moved).await;
        }
        if let Some(here) = hello.settled {
            self.settled(process, here).await;
        }
        if let Some(arrived) = hello.arrived {
            self.arrived(process, &arrived).await;
        }
        let state = self.state();
        match (hello.doing, state) {
            (Doing::Moving, _) => {
                if let (Some(id), Some(progress)) = (self.migration(), hello.progress) {
                    self.daemon.with_migration(&id, true, |active| {
                        active.migration.state = MigrationState::Running;
                        note_progress(active, &progress);
                    });
                }
            }
            (Doing::Running, Some(GuestState::Moving | GuestState::Running)) => {
                // It was waiting, or was being checked.
                if let Some(id) = self.migration() {
                    let cause = "the daemon was restarted before the guest began to move; ask for it again";
                    self.daemon.tell_gone(&id, false, cause).await;
                    self.daemon.finish(&id, MigrationState::RolledBack, Some(cause.into()));
                }
                self.is(GuestState::Running, None);
            }
            (Doing::Running, Some(GuestState::Starting)) => {
                self.is(GuestState::Running, None);
            }
            (Doing::Receiving, Some(GuestState::Arriving)) => {
                if hello.begun {
                    self.begun();
                }
                self.ask_the_source(process).await;
            }
            // Started, or to be started, by a daemon that was killed then: there is no guest in it.
            (Doing::Nothing, Some(GuestState::Starting | GuestState::Arriving)) => {
                self.with_guest(|guest| guest.stopping = true);
                let _ = process.request(Command::Stop, ANSWER).await;
            }
            // Started for the guest of a QEMU by a daemon that was killed before it said which.
            (Doing::Nothing, Some(GuestState::Running)) => {
                let _ = process.request(Command::Stop, ANSWER).await;
            }
            // Its migration is over, and only the process does not know that this is known.
            (Doing::Nothing, Some(GuestState::Moving | GuestState::InDoubt)) => {
                self.with_guest(|guest| guest.stopping = true);
                let _ = process.request(Command::Acknowledge, ANSWER).await;
            }
            _ => {}
        }
    }

    async fn heard(&self, process: &GuestProcess, event: Event) {
        match event {
            Event::Begun => self.begun(),
            Event::Progress(progress) => self.progress(&progress),
            Event::Moved(moved) => self.moved(process, &moved).await,
            Event::Settled { here } => self.settled(process, here).await,
            Event::Arrived(arrived) => self.arrived(process, &arrived).await,
            _ => {}
        }
    }

    fn begun(&self) {
        let Some(id) = self.migration() else { return };
        let before = self.daemon.with_migration(&id, true, |active| {
            std::mem::replace(&mut active.migration.state, MigrationState::Running)
        });
        if before != Some(MigrationState::Running) {
            self.daemon.say(&id, "the source has connected, and its guest is being taken in");
        }
    }

    /// A source that ended while nobody listened here could not tell.
    async fn ask_the_source(&self, process: &GuestProcess) {
        let Some(id) = self.migration() else { return };
        let Some(answer) = self.ask_peer(&id).await else { return };
        let lost = match answer.state {
            Some(MigrationState::RolledBack) => false,
            Some(MigrationState::Lost) => true,
            _ => return,
        };
        let cause = answer.cause.unwrap_or_else(|| "the source has ended it".into());
        self.daemon.with_migration(&id, true, |active| active.peer_gone = Some(Gone { lost, cause }));
        let _ = process.request(Command::Cancel, ANSWER).await;
    }

    fn progress(&self, progress: &MoveProgress) {
        let Some(id) = self.migration() else { return };
        let news = self.daemon.with_migration(&id, false, |active| {
            let news = note_progress(active, progress);
            self.daemon.metrics.progress(&active.migration);
            news
        });
        for news in news.into_iter().flatten() {
            self.daemon.say(&id, news);
        }
    }

    async fn moved(&self, process: &GuestProcess, moved: &Moved) {
        let Some(id) = self.migration() else { return };
        self.daemon.with_migration(&id, true, |active| note_moved(active, moved));
        match moved.outcome.as_str() {
            "completed" => self.has_left(process, &id).await,
            "rolled_back" => self.stays(process, &id, moved.cause.clone()).await,
            // The process holds nothing. When it has ended both QEMUs are asked.
            _ if self.qemu().is_some() => {
                let cause = moved.cause.clone().unwrap_or_default();
                self.daemon.say(&id, format!("it is being found out where the guest is: {cause}"));
                self.daemon.with_migration(&id, true, |active| active.migration.cause = Some(cause));
                let _ = process.request(Command::Acknowledge, ANSWER).await;
            }
            _ => {
                self.daemon.with_migration(&id, true, |active| {
                    active.migration.state = MigrationState::InDoubt;
                    active.migration.cause = moved.cause.clone();
                });
                self.is(GuestState::InDoubt, moved.cause.clone());
                self.daemon
                    .say(&id, "in doubt: the destination is asked until it answers whose the guest is");
                self.daemon.freed.notify_waiters();
            }
        }
        self.daemon.rebalance().await;
    }

    async fn settled(&self, process: &GuestProcess, here: bool) {
        let Some(id) = self.migration() else { return };
        if here {
            self.stays(process, &id, Some(NEVER_STARTED.into())).await;
        } else {
            self.has_left(process, &id).await;
        }
    }

    async fn has_left(&self, process: &GuestProcess, id: &str) {
        self.compare_ram(id).await;
        self.handed_over(id);
        let _ = process.request(Command::Acknowledge, ANSWER).await;
    }

    /// The guest is the other host's. The name is free before the end is told; the process has nothing, and ends.
    pub(super) fn handed_over(&self, id: &str) {
        if self.qemu().is_some() {
            // Where it is was found out.
            return self.qemu_is_over(id, MigrationState::Completed, None);
        }
        self.remove();
        let gone = self.daemon.with_migration(id, false, |active| {
            active.migration.cause = None;
            active
                .peer_gone
                .clone()
                .map(|gone| format!("it was handed over to {}, and {}", active.migration.peer, gone.cause))
        });
        match gone.flatten() {
            Some(cause) => self.daemon.finish(id, MigrationState::Lost, Some(cause)),
            None => self.daemon.finish(id, MigrationState::Completed, None),
        }
    }

    /// Holds the digest of RAM at the pause against the destination's, where it was asked for.
    async fn compare_ram(&self, id: &str) {
        let asked = self
            .daemon
            .with_migration(id, false, |active| active.migration.ram_digest.clone().zip(active.peer.clone()));
        let Some(Some((ours, peer))) = asked else { return };
        let trust = self.daemon.settings().trust.clone();
        let path = format!("/peer/v1/migrations/{id}");
        let began = Instant::now();
        // It may still be hashing.
        let theirs = loop {
            let answer = peer.call::<_, MigrationAnswer>(&trust, &path, &(), QUESTION).await;
            match answer {
                Ok(MigrationAnswer { ram_digest: Some(digest), .. }) => break Some(digest),
                _ if began.elapsed() > QUESTION => break None,
                _ => tokio::time::sleep(LOOK_AGAIN).await,
            }
        };
        self.daemon.with_migration(id, false, |active| match theirs {
            Some(theirs) => active.migration.ram_equal = Some(theirs == ours),
            None => active
                .migration
                .warnings
                .push("the destination has not told its digest of RAM at the pause".into()),
        });
    }

    async fn stays(&self, process: &GuestProcess, id: &str, cause: Option<String>) {
        if self.qemu().is_some() {
            self.daemon.keep_telling_gone(id, cause.as_deref());
            self.qemu_is_over(id, MigrationState::RolledBack, cause);
            let _ = process.request(Command::Acknowledge, ANSWER).await;
            return;
        }
        self.is(GuestState::Running, None);
        let cause = match cause {
            Some(cause) if cause.ends_with(NEVER_STARTED) => Some(self.with_their_reason(id, cause).await),
            other => other,
        };
        self.daemon.keep_telling_gone(id, cause.as_deref());
        self.daemon.finish(id, MigrationState::RolledBack, cause);
        let _ = process.request(Command::Acknowledge, ANSWER).await;
    }

    /// Why the destination did not start a guest that it had complete: only its daemon can say.
    async fn with_their_reason(&self, id: &str, cause: String) -> String {
        let began = Instant::now();
        while began.elapsed() < REASON {
            match self.ask_peer(id).await {
                Some(MigrationAnswer { state: Some(state), cause: Some(theirs), .. }) if state.is_over() => {
                    return format!("{cause}: {theirs}");
                }
                Some(_) => tokio::time::sleep(LOOK).await,
                None => break,
            }
        }
        cause
    }

    /// What the other host knows of a migration; nothing where it has told, or does not answer.
    pub(super) async fn ask_peer(&self, id: &str) -> Option<MigrationAnswer> {
        let peer = self
            .daemon
            .with_migration(id, false, |active| active.peer.clone().filter(|_| active.peer_gone.is_none()));
        let trust = self.daemon.settings().trust.clone();
        peer??.call(&trust, &format!("/peer/v1/migrations/{id}"), &(), QUESTION).await.ok()
    }

    async fn arrived(&self, process: &GuestProcess, arrived: &Arrived) {
        if self.state() != Some(GuestState::Arriving) {
            return;
        }
        let id = self.migration();
        if let Some(id) = &id {
            self.daemon.with_migration(id, false, |active| {
                let migration = &mut active.migration;
                // Only the source knows when its QEMU stopped the guest.
                let known = arrived.running && migration.guest_kind != super::qemu::KIND;
                migration.downtime_seconds = known.then_some(arrived.downtime_seconds);
                migration.cpu_seconds = Some(arrived.cpu_seconds);
                migration.ram_digest = arrived.ram.as_ref().map(|ram| ram.digest.clone());
                migration.warnings.clone_from(&arrived.warnings);
            });
        }
        if let (Some(_), Some(id)) = (self.qemu(), &id) {
            self.qemu_arrived(id, arrived);
            let _ = process.request(Command::Acknowledge, ANSWER).await;
            return;
        }
        if arrived.running {
            self.is(GuestState::Running, None);
            self.with_guest(|guest| guest.record.info.since = now());
        } else {
            // Whoever asks again is to find the name free. The process has nothing, and ends.
            self.remove();
        }
        if let Some(id) = id {
            if arrived.running {
                self.daemon.finish(&id, MigrationState::Completed, None);
            } else {
                self.did_not_come(&id, arrived.cause.clone());
            }
        }
        let _ = process.request(Command::Acknowledge, ANSWER).await;
    }

    /// A guest that was to arrive does not, and nothing of it is here.
    pub(super) fn did_not_come(&self, id: &str, cause: Option<String>) {
        // The source knows better why, where it has told.
        match self.daemon.with_migration(id, false, |active| active.peer_gone.clone()).flatten() {
            Some(Gone { lost: true, cause }) => self.daemon.finish(id, MigrationState::Lost, Some(cause)),
            Some(gone) => self.daemon.finish(id, MigrationState::RolledBack, Some(gone.cause)),
            None => self.daemon.finish(id, MigrationState::RolledBack, cause),
        }
    }
}

/// A migration's name in the engine's terms.
///
/// # Errors
/// A text that is not 32 hexadecimal digits.
pub fn parse_id(id: &str) -> Result<MigrationId, String> {
    hex::decode(id).map(MigrationId).ok_or_else(|| format!("{id:?} is no name of a migration"))
}

//! Listens to the process that holds a guest, for as long as it lives, and decides what its end means. The same whether the
//! process was started just now or found again after a restart: its first word tells how it stands.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::broadcast::error::RecvError;

use super::account::{note_moved, note_progress};
use super::{ANSWER, Daemon, now};
use crate::engine::chain;
use crate::engine::journal::SourceEntry;
use crate::engine::recovery::{Recovered, recover_one};
use crate::engine::source::MigrationId;
use crate::host::api::guest::GuestState;
use crate::host::api::migration::MigrationState;
use crate::host::guest_process::{Attached, GuestProcess};
use crate::host::holder::protocol::{Arrived, Command, Doing, Event, HolderState, MoveProgress, Moved};
use crate::host::peer::messages::MigrationAnswer;

/// How long a process that is being made ready by a daemon that has gone is left alone.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// How long between two questions.
const ASK_AGAIN: Duration = Duration::from_secs(2);
/// How long a question may take.
const QUESTION: Duration = Duration::from_secs(5);
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
    daemon.with_guest(name, |guest| {
        guest.process = Some(Arc::clone(&process));
        guest.record.info.pid = Some(process.pid());
    });
    let watch = Watch { daemon: Arc::clone(daemon), name: name.to_owned() };
    tokio::spawn(async move { watch.run((process, events), found).await });
}

/// A guest's process has ended while nobody listened.
pub fn watch_the_dead(daemon: &Arc<Daemon>, name: &str) {
    let watch = Watch { daemon: Arc::clone(daemon), name: name.to_owned() };
    tokio::spawn(async move { watch.ended().await });
}

struct Watch {
    daemon: Arc<Daemon>,
    name: String,
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
        self.daemon.with_guest(&self.name, |guest| {
            guest.process = None;
            guest.record.info.pid = None;
        });
        self.ended().await;
    }

    async fn attach_again(&self) -> Option<Listening> {
        let socket = self.daemon.with_guest(&self.name, |guest| guest.record.instance.clone())?;
        let (process, events) = GuestProcess::attach(&self.daemon.store.socket(&socket)).await.ok()?;
        let process = Arc::new(process);
        self.daemon.with_guest(&self.name, |guest| guest.process = Some(Arc::clone(&process)));
        Some((process, events))
    }

    /// The migration that the guest takes part in, if it does.
    fn migration(&self) -> Option<String> {
        let tables = self.daemon.tables();
        let id = tables.guests.get(&self.name)?.record.info.migration.clone()?;
        tables.migrations.contains_key(&id).then_some(id)
    }

    fn state(&self) -> Option<GuestState> {
        self.daemon.tables().guests.get(&self.name).map(|guest| guest.record.info.state)
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
            (Doing::Moving | Doing::InDoubt, _) => {
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
                    self.daemon.finish(&id, MigrationState::RolledBack, Some(cause.into()));
                }
                self.daemon.guest_is(&self.name, GuestState::Running, None);
            }
            (Doing::Running, Some(GuestState::Starting)) => {
                self.daemon.guest_is(&self.name, GuestState::Running, None);
            }
            // Started, or to be started, by a daemon that was killed then: there is no guest in it.
            (Doing::Nothing, Some(GuestState::Starting | GuestState::Arriving)) => {
                self.daemon.with_guest(&self.name, |guest| guest.stopping = true);
                let _ = process.request(Command::Stop, ANSWER).await;
            }
            // Its migration is over, and only the process does not know that this is known.
            (Doing::Nothing, Some(GuestState::Moving | GuestState::InDoubt)) => {
                self.daemon.with_guest(&self.name, |guest| guest.stopping = true);
                let _ = process.request(Command::Acknowledge, ANSWER).await;
            }
            _ => {}
        }
    }

    async fn heard(&self, process: &GuestProcess, event: Event) {
        match event {
            Event::Begun => {
                if let Some(id) = self.migration() {
                    self.daemon.with_migration(&id, true, |active| {
                        active.migration.state = MigrationState::Running;
                    });
                    self.daemon.say(&id, "the source has connected, and its guest is being taken in");
                }
            }
            Event::Progress(progress) => self.progress(&progress),
            Event::Moved(moved) => self.moved(process, &moved).await,
            Event::Settled { here } => self.settled(process, here).await,
            Event::Arrived(arrived) => self.arrived(process, &arrived).await,
            _ => {}
        }
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
            _ => {
                self.daemon.with_migration(&id, true, |active| {
                    active.migration.state = MigrationState::InDoubt;
                    active.migration.cause = moved.cause.clone();
                });
                self.daemon.guest_is(&self.name, GuestState::InDoubt, moved.cause.clone());
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
            let cause = "the destination has not started the guest and never will".to_owned();
            self.stays(process, &id, Some(cause)).await;
        } else {
            self.has_left(process, &id).await;
        }
    }

    async fn has_left(&self, process: &GuestProcess, id: &str) {
        self.daemon.with_guest(&self.name, |guest| guest.stopping = true);
        self.compare_ram(id).await;
        self.daemon.with_migration(id, false, |active| active.migration.cause = None);
        self.daemon.finish(id, MigrationState::Completed, None);
        let _ = process.request(Command::Acknowledge, ANSWER).await;
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
        self.daemon.guest_is(&self.name, GuestState::Running, None);
        self.daemon.finish(id, MigrationState::RolledBack, cause);
        let _ = process.request(Command::Acknowledge, ANSWER).await;
    }

    async fn arrived(&self, process: &GuestProcess, arrived: &Arrived) {
        if self.state() != Some(GuestState::Arriving) {
            return;
        }
        let id = self.migration();
        if let Some(id) = &id {
            self.daemon.with_migration(id, false, |active| {
                let migration = &mut active.migration;
                migration.downtime_seconds = arrived.running.then_some(arrived.downtime_seconds);
                migration.cpu_seconds = Some(arrived.cpu_seconds);
                migration.ram_digest = arrived.ram.as_ref().map(|ram| ram.digest.clone());
                migration.warnings.clone_from(&arrived.warnings);
            });
        }
        if arrived.running {
            self.daemon.guest_is(&self.name, GuestState::Running, None);
            self.daemon.with_guest(&self.name, |guest| guest.record.info.since = now());
        } else {
            // Whoever asks again is to find the name free. The process has nothing, and ends.
            self.daemon.remove_guest(&self.name);
        }
        if let Some(id) = id {
            let state = if arrived.running { MigrationState::Completed } else { MigrationState::RolledBack };
            self.daemon.finish(&id, state, arrived.cause.clone());
        }
        let _ = process.request(Command::Acknowledge, ANSWER).await;
    }

    /// The process is gone. What does that mean for the guest?
    async fn ended(&self) {
        let Some((state, stopping)) =
            self.daemon.with_guest(&self.name, |guest| (guest.record.info.state, guest.stopping))
        else {
            return;
        };
        let id = self.migration();
        match (state, id) {
            (GuestState::Moving | GuestState::InDoubt, Some(id)) => self.source_died(&id).await,
            (GuestState::Arriving, Some(id)) => self.destination_died(&id).await,
            _ if stopping || self.has_moved() => self.daemon.remove_guest(&self.name),
            (GuestState::Arriving, None) => self.daemon.remove_guest(&self.name),
            (GuestState::Starting, _) => self.lost("its process ended before it had started"),
            _ => self.lost("its process ended, and its memory with it"),
        }
        self.daemon.rebalance().await;
    }

    /// Whether the journal says that the guest runs at another host.
    fn has_moved(&self) -> bool {
        let id = self.daemon.with_guest(&self.name, |guest| {
            let leaving = matches!(guest.record.info.state, GuestState::Moving | GuestState::InDoubt);
            guest.record.info.migration.clone().filter(|_| leaving)
        });
        let Some(Some(Ok(id))) = id.map(|id| id.map(|id| parse_id(&id))) else { return false };
        matches!(self.daemon.journal.source_record(id), Ok(Some(SourceEntry::Completed)))
    }

    fn lost(&self, why: &str) {
        let log = self.daemon.with_guest(&self.name, |guest| guest.record.instance.clone());
        let log = log.map(|instance| self.daemon.store.log(&instance)).unwrap_or_default();
        let note =
            format!("{why}; its log is {}; `pageferry guest stop {}` forgets it", log.display(), self.name);
        tracing::error!("guest {}: {note}", self.name);
        self.daemon.guest_is(&self.name, GuestState::Lost, Some(note));
    }

    /// The process at the source died with the guest in it. If it had told the destination to run the guest, that may.
    async fn source_died(&self, id: &str) {
        self.daemon.say(id, "the process that held the guest here has ended");
        let Ok(migration) = parse_id(id) else { return };
        loop {
            match self.daemon.journal.source_record(migration) {
                Ok(Some(SourceEntry::Completed)) => {
                    self.daemon.remove_guest(&self.name);
                    return self.daemon.finish(id, MigrationState::Completed, None);
                }
                Ok(Some(SourceEntry::Committing(unfinished))) => {
                    let (journal, trust) =
                        (self.daemon.journal.clone(), self.daemon.settings().trust.clone());
                    let asked = tokio::task::spawn_blocking(move || {
                        recover_one(&unfinished, &journal, &trust, QUESTION)
                    });
                    match asked.await {
                        Ok(Ok(Recovered::Completed)) => {
                            self.daemon.say(id, "the destination answers that it runs the guest");
                            self.daemon.remove_guest(&self.name);
                            return self.daemon.finish(id, MigrationState::Completed, None);
                        }
                        Ok(Ok(Recovered::Lost)) => {
                            return self.lost_on_the_way(
                                id,
                                "the process that held it ended, and the destination had not everything of it",
                            );
                        }
                        Ok(Ok(Recovered::InDoubt(why))) => self.doubt(id, &why),
                        Ok(Err(error)) => self.doubt(id, &chain(&error)),
                        Err(error) => self.doubt(id, &error.to_string()),
                    }
                }
                Ok(None | Some(SourceEntry::RolledBack)) => {
                    self.daemon.tell_gone(id).await;
                    return self.lost_on_the_way(id, "the process that held it ended before it had moved");
                }
                Err(error) => self.doubt(id, &chain(&error)),
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    fn lost_on_the_way(&self, id: &str, why: &str) {
        self.daemon.finish(id, MigrationState::Lost, Some(why.into()));
        self.lost(why);
    }

    fn doubt(&self, id: &str, why: &str) {
        let cause = format!(
            "the process that held the guest ended after it had told the destination to run it, and the destination does not say whether it does: {why}"
        );
        let news = self.daemon.with_migration(id, true, |active| {
            let news = active.migration.cause.as_deref() != Some(cause.as_str());
            active.migration.state = MigrationState::InDoubt;
            active.migration.cause = Some(cause.clone());
            news
        });
        self.daemon.guest_is(&self.name, GuestState::InDoubt, Some(cause.clone()));
        if news == Some(true) {
            self.daemon.say(id, format!("in doubt: {cause}; it is asked every {} s", ASK_AGAIN.as_secs()));
        }
    }

    /// The process at the destination died. The source knows whether it had run the guest.
    async fn destination_died(&self, id: &str) {
        self.daemon.say(id, "the process that was to take the guest in has ended");
        let path = format!("/peer/v1/migrations/{id}");
        loop {
            let peer = self.daemon.with_migration(id, false, |active| active.peer.clone());
            let Some(peer) = peer else { return self.daemon.remove_guest(&self.name) };
            let answer = match peer {
                None => Ok(MigrationAnswer::default()),
                Some(peer) => {
                    let trust = self.daemon.settings().trust.clone();
                    peer.call::<_, MigrationAnswer>(&trust, &path, &(), QUESTION).await
                }
            };
            match answer.map(|answer| answer.state) {
                Ok(Some(MigrationState::Completed)) => {
                    return self
                        .lost_on_the_way(id, "it arrived here, and the process that held it ended at once");
                }
                Ok(Some(MigrationState::RolledBack | MigrationState::Lost) | None) => {
                    self.daemon.remove_guest(&self.name);
                    let cause = "the process that was to take the guest in ended; see its log";
                    return self.daemon.finish(id, MigrationState::RolledBack, Some(cause.into()));
                }
                Ok(Some(_)) => {}
                Err(error) => {
                    self.daemon.with_migration(id, true, |active| {
                        active.migration.state = MigrationState::InDoubt;
                        active.migration.cause =
                            Some(format!("the source is asked what became of the guest: {error}"));
                    });
                }
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }
}

/// A migration's name in the engine's terms.
///
/// # Errors
/// A text that is not 32 hexadecimal digits.
pub fn parse_id(id: &str) -> Result<MigrationId, String> {
    super::hex(id).map(MigrationId).ok_or_else(|| format!("{id:?} is no name of a migration"))
}

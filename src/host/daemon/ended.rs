//! A guest's process has ended: what does that mean for the guest, and for the migration that it took part in?

use std::time::Duration;

use super::watch::{QUESTION, Watch, parse_id};
use crate::engine::chain;
use crate::engine::journal::SourceEntry;
use crate::engine::recovery::{Recovered, recover_one};
use crate::host::api::guest::GuestState;
use crate::host::api::migration::MigrationState;
use crate::host::peer::messages::{Gone, MigrationAnswer};

/// How long between two questions.
const ASK_AGAIN: Duration = Duration::from_secs(2);

impl Watch {
    /// The process is gone. What does that mean for the guest?
    pub(super) async fn ended(&self) {
        let Some((state, stopping)) = self.with_guest(|guest| (guest.record.info.state, guest.stopping))
        else {
            return;
        };
        let id = self.migration();
        if let Some(qemu) = self.qemu() {
            self.qemu_ended(&qemu, state, id).await;
            return self.daemon.rebalance().await;
        }
        match (state, id) {
            (GuestState::Moving | GuestState::InDoubt, Some(id)) => self.source_died(&id).await,
            (GuestState::Arriving, Some(id)) => self.destination_died(&id).await,
            (_, id) if stopping || self.has_moved() => {
                self.remove();
                self.give_up(id, MigrationState::RolledBack, "somebody stopped the guest").await;
            }
            (GuestState::Arriving, None) => self.remove(),
            (GuestState::Starting, _) => self.lost("its process ended before it had started"),
            (_, id) => {
                let why = "its process ended, and its memory with it";
                self.lost(why);
                self.give_up(id, MigrationState::Lost, why).await;
            }
        }
        self.daemon.rebalance().await;
    }

    /// A migration that still waited, or was being checked, has no guest any more.
    async fn give_up(&self, id: Option<String>, state: MigrationState, cause: &str) {
        let Some(id) = id else { return };
        self.daemon.with_migration(&id, false, |active| active.cancel.send_replace(true));
        self.daemon.tell_gone(&id, state == MigrationState::Lost, cause).await;
        self.daemon.finish(&id, state, Some(cause.into()));
    }

    /// Whether the journal says that the guest runs at another host.
    fn has_moved(&self) -> bool {
        let id = self.with_guest(|guest| {
            let leaving = matches!(guest.record.info.state, GuestState::Moving | GuestState::InDoubt);
            guest.record.info.migration.clone().filter(|_| leaving)
        });
        let Some(Some(Ok(id))) = id.map(|id| id.map(|id| parse_id(&id))) else { return false };
        matches!(self.daemon.journal.source_record(id), Ok(Some(SourceEntry::Completed)))
    }

    fn lost(&self, why: &str) {
        let log = self.with_guest(|guest| guest.record.instance.clone());
        let log = log.map(|instance| self.daemon.store.log(&instance)).unwrap_or_default();
        let note =
            format!("{why}; its log is {}; `pageferry guest stop {}` forgets it", log.display(), self.name);
        tracing::error!("guest {}: {note}", self.name);
        self.is(GuestState::Lost, Some(note));
    }

    /// The process at the source died with the guest in it. If it had told the destination to run the guest, that may.
    async fn source_died(&self, id: &str) {
        self.daemon.say(id, "the process that held the guest here has ended");
        let Ok(migration) = parse_id(id) else { return };
        loop {
            match self.daemon.journal.source_record(migration) {
                Ok(Some(SourceEntry::Completed)) => return self.handed_over(id),
                Ok(Some(SourceEntry::Committing(unfinished))) => {
                    let (journal, trust) =
                        (self.daemon.journal.clone(), self.daemon.settings().trust.clone());
                    let asked = tokio::task::spawn_blocking(move || {
                        recover_one(&unfinished, &journal, &trust, QUESTION)
                    });
                    match asked.await {
                        Ok(Ok(Recovered::Completed)) => {
                            self.daemon.say(id, "the destination answers that it runs the guest");
                            return self.handed_over(id);
                        }
                        Ok(Ok(Recovered::Lost)) => {
                            let cause = "the process that held it at its source ended, and its destination has given it up";
                            self.daemon.tell_gone(id, true, cause).await;
                            return self.lost_on_the_way(id, cause);
                        }
                        Ok(Ok(Recovered::InDoubt(why))) => self.doubt(id, &why),
                        Ok(Err(error)) => self.doubt(id, &chain(&error)),
                        Err(error) => self.doubt(id, &error.to_string()),
                    }
                }
                Ok(None | Some(SourceEntry::RolledBack)) => {
                    let cause = "the process that held it at its source ended before it had moved";
                    self.daemon.tell_gone(id, true, cause).await;
                    return self.lost_on_the_way(id, cause);
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
        self.is(GuestState::InDoubt, Some(cause.clone()));
        if news == Some(true) {
            self.daemon.say(id, format!("in doubt: {cause}; it is asked every {} s", ASK_AGAIN.as_secs()));
        }
    }

    /// The process at the destination died. The source is told, which need not wait for it then, and knows whether it had been told
    /// to run the guest.
    async fn destination_died(&self, id: &str) {
        self.daemon.say(id, "the process that was to take the guest in has ended");
        let path = format!("/peer/v1/migrations/{id}/gone");
        let cause = "the process that was to take it in there ended; the log of that process may say why";
        let gone = Gone { lost: false, cause: cause.into() };
        loop {
            let known = self
                .daemon
                .with_migration(id, false, |active| (active.peer.clone(), active.peer_gone.clone()));
            let answer = match known {
                None => return self.remove(),
                Some((None, _) | (_, Some(_))) => Ok(MigrationAnswer::default()),
                Some((Some(peer), None)) => {
                    let trust = self.daemon.settings().trust.clone();
                    peer.call::<_, MigrationAnswer>(&trust, &path, &gone, QUESTION).await
                }
            };
            match answer.map(|answer| answer.state) {
                Ok(Some(MigrationState::Completed | MigrationState::Lost)) => {
                    let why =
                        "it was handed over to this host, and the process that took it in ended at once";
                    return self.lost_on_the_way(id, why);
                }
                Ok(Some(MigrationState::RolledBack) | None) => {
                    self.remove();
                    let cause = "the process that was to take the guest in ended; see its log";
                    return self.did_not_come(id, Some(cause.into()));
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

//! Where the guest of a QEMU is when the process that moved it has ended without being sure, or has been killed.
//!
//! Two rules make that there is never more than one that runs. A source that is *in doubt* (its QEMU has given the guest up) lets it
//! run again only after the destination has said that it rolled back; so the destination may run it once the source says that
//! it is in doubt. And a destination says that it rolled back only when its copy never ran and never will: it has not got it whole,
//! or its QEMU was ended. `docs/decisions/0030-the-daemon-asks-both-qemus-where-a-guest-is.md` has the whole of it.

use std::path::PathBuf;
use std::time::Duration;

use super::ask;
use crate::engine::chain;
use crate::host::api::guest::GuestState;
use crate::host::api::migration::{Direction, MigrationState};
use crate::host::daemon::store::QemuRecord;
use crate::host::daemon::watch::{QUESTION, Watch};
use crate::host::holder::protocol::Arrived;
use crate::host::peer::messages::{Gone, MigrationAnswer};
use crate::host::qemu::{self, Standing};

/// How long between two questions.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How often a source QEMU is asked before it is told that nobody carries its bytes any more. It notices by itself, as a rule.
const NOTICES: u32 = 3;

/// What the other host's daemon says of the migration.
enum Theirs {
    /// This.
    Is(MigrationState),
    /// It knows nothing of it.
    Unknown,
    /// It does not answer; with the reason.
    Silent(String),
}

/// What follows from what both QEMUs and the other host say.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// The guest runs at the destination.
    Completed,
    /// It is at the source.
    RolledBack(String),
    /// It is at neither.
    Lost(String),
    /// Not known yet.
    Doubt(String),
    /// Known soon.
    Wait,
}

impl Watch {
    /// The process that carried the guest of a QEMU is gone.
    pub(in crate::host::daemon) async fn qemu_ended(
        &self,
        qemu: &QemuRecord,
        state: GuestState,
        id: Option<String>,
    ) {
        let Some(id) = id else { return self.remove() };
        if state == GuestState::Running {
            let cause = "the daemon was restarted before the guest began to move; ask for it again";
            self.daemon.tell_gone(&id, false, cause).await;
            return self.qemu_is_over(&id, MigrationState::RolledBack, Some(cause.into()));
        }
        let direction = self.daemon.with_migration(&id, false, |active| active.migration.direction);
        let cause = self.cause(&id);
        for turn in 0.. {
            let verdict = match direction {
                Some(Direction::Outgoing) => self.source(qemu, &id, (turn, &cause)).await,
                Some(Direction::Incoming) => self.destination(qemu, &id).await,
                None => return self.remove(),
            };
            match verdict {
                Verdict::Completed => return self.qemu_is_over(&id, MigrationState::Completed, None),
                Verdict::RolledBack(cause) => {
                    if direction == Some(Direction::Outgoing) {
                        self.daemon.keep_telling_gone(&id, Some(&cause));
                    }
                    return self.qemu_is_over(&id, MigrationState::RolledBack, Some(cause));
                }
                Verdict::Lost(cause) => return self.qemu_is_over(&id, MigrationState::Lost, Some(cause)),
                Verdict::Doubt(why) => self.qemu_in_doubt(&id, &why),
                Verdict::Wait => {}
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    /// Why a guest that turns out to be at the source did not move.
    fn cause(&self, id: &str) -> String {
        let known = self.daemon.with_migration(id, false, |active| {
            let gone = active.peer_gone.clone().map(|gone| gone.cause);
            match active.migration.state {
                // Of a daemon before this one: the cause says only that it is asked.
                MigrationState::InDoubt => gone,
                _ => active.migration.cause.clone().or(gone),
            }
        });
        known.flatten().unwrap_or_else(|| "the process that carried it at its source ended".into())
    }

    /// A migration of a QEMU's guest has ended.
    pub(in crate::host::daemon) fn qemu_is_over(
        &self,
        id: &str,
        state: MigrationState,
        cause: Option<String>,
    ) {
        let is_it = |guest: &crate::host::daemon::tables::Guest| self.is_of(guest);
        self.daemon.end_with_qemu(&self.name, is_it, || {
            if state == MigrationState::Completed {
                self.daemon.with_migration(id, false, |active| active.migration.cause = None);
            }
            self.daemon.finish(id, state, cause);
        });
    }

    /// What the process at the destination tells at its end.
    pub(in crate::host::daemon) fn qemu_arrived(&self, id: &str, arrived: &Arrived) {
        let cause = arrived.cause.clone();
        if arrived.in_doubt {
            // Asked about when the process has ended.
            self.qemu_in_doubt(id, &cause.unwrap_or_default());
        } else if arrived.running {
            self.qemu_is_over(id, MigrationState::Completed, None);
        } else {
            // The source knows better why, where it has told.
            let gone = self.daemon.with_migration(id, false, |active| active.peer_gone.clone()).flatten();
            let (state, cause) = match gone {
                Some(Gone { lost: true, cause }) => (MigrationState::Lost, Some(cause)),
                Some(gone) => (MigrationState::RolledBack, Some(gone.cause)),
                None => (MigrationState::RolledBack, cause),
            };
            self.qemu_is_over(id, state, cause);
        }
    }

    fn qemu_in_doubt(&self, id: &str, why: &str) {
        // Written down before anybody is told: the other host acts on it.
        let news = self.daemon.with_migration(id, true, |active| {
            let news = active.migration.cause.as_deref() != Some(why)
                || active.migration.state != MigrationState::InDoubt;
            active.migration.state = MigrationState::InDoubt;
            active.migration.cause = Some(why.to_owned());
            news
        });
        let outgoing = self.with_guest(|guest| guest.record.info.state) != Some(GuestState::Arriving);
        if outgoing {
            self.is(GuestState::InDoubt, Some(why.to_owned()));
        }
        if news == Some(true) {
            self.daemon.say(id, format!("in doubt: {why}"));
        }
    }

    async fn source(&self, qemu: &QemuRecord, id: &str, (turn, cause): (u32, &str)) -> Verdict {
        let qmp = qemu.qmp.clone();
        match standing(&qmp, false).await {
            Standing::Runs | Standing::Paused => Verdict::RolledBack(cause.to_owned()),
            Standing::Given => {
                let theirs = self.theirs(id).await;
                let verdict = given(&theirs);
                let Verdict::RolledBack(_) = verdict else { return verdict };
                self.take_back(qemu, cause.to_owned()).await
            }
            Standing::Gone => {
                let verdict = source_has_gone(&self.theirs(id).await);
                if matches!(verdict, Verdict::Wait | Verdict::Lost(_)) {
                    // One that has ended it already has its record corrected.
                    self.daemon.tell_gone(id, true, "the source QEMU has ended, and its guest with it").await;
                }
                verdict
            }
            Standing::Silent(why) => {
                Verdict::Doubt(format!("the source QEMU does not say where its guest is: {why}"))
            }
            // It has no more to say of the others at a source.
            Standing::UnderWay | Standing::Untouched | Standing::Incomplete | Standing::Complete => {
                if turn >= NOTICES {
                    let _ = ask(move || qemu::cancel(&qmp)).await;
                }
                Verdict::Wait
            }
        }
    }

    /// The destination's copy never runs: the guest goes on here.
    async fn take_back(&self, qemu: &QemuRecord, cause: String) -> Verdict {
        if !qemu.runs {
            return Verdict::RolledBack(cause);
        }
        let qmp = qemu.qmp.clone();
        match ask(move || qemu::resume(&qmp)).await {
            Ok(Ok(())) => Verdict::RolledBack(cause),
            Ok(Err(error)) => Verdict::Doubt(format!(
                "{cause}; the destination gave the guest up, and it cannot go on here: {}; continue it by hand (cont)",
                chain(&error)
            )),
            Err(error) => Verdict::Doubt(error),
        }
    }

    async fn destination(&self, qemu: &QemuRecord, id: &str) -> Verdict {
        let here = standing(&qemu.qmp, true).await;
        if here == Standing::Runs {
            return Verdict::Completed;
        }
        let theirs = self.theirs(id).await;
        match taken_in(&here, &theirs) {
            Act::Say(verdict) => verdict,
            Act::TellGone => {
                self.daemon
                    .tell_gone(id, false, "the process that was to take the guest in there ended")
                    .await;
                Verdict::Wait
            }
            Act::Run => self.let_run(qemu).await,
            Act::End(cause) => {
                if matches!(here, Standing::Complete | Standing::Incomplete) {
                    let qmp = qemu.qmp.clone();
                    if let Ok(Err(error)) = ask(move || qemu::end(&qmp)).await {
                        self.daemon.say(
                            id,
                            format!("the QEMU that took the guest in is to be ended: {}", chain(&error)),
                        );
                    }
                }
                let gone = self.daemon.with_migration(id, false, |active| active.peer_gone.clone()).flatten();
                Verdict::RolledBack(gone.map_or(cause, |gone| gone.cause))
            }
        }
    }

    async fn let_run(&self, qemu: &QemuRecord) -> Verdict {
        if !qemu.runs {
            return Verdict::Completed;
        }
        let qmp = qemu.qmp.clone();
        match ask(move || qemu::resume(&qmp)).await {
            Ok(Ok(())) => Verdict::Completed,
            Ok(Err(error)) => Verdict::Doubt(format!(
                "the guest was handed over, and does not go on here: {}",
                chain(&error)
            )),
            Err(error) => Verdict::Doubt(error),
        }
    }

    async fn theirs(&self, id: &str) -> Theirs {
        let Some(Some(peer)) = self.daemon.with_migration(id, false, |active| active.peer.clone()) else {
            return Theirs::Unknown;
        };
        let trust = self.daemon.settings().trust.clone();
        let path = format!("/peer/v1/migrations/{id}");
        match peer.call::<_, MigrationAnswer>(&trust, &path, &(), QUESTION).await {
            Ok(MigrationAnswer { state: Some(state), .. }) => Theirs::Is(state),
            Ok(_) => Theirs::Unknown,
            Err(error) => Theirs::Silent(error.to_string()),
        }
    }
}

async fn standing(qmp: &std::path::Path, incoming: bool) -> Standing {
    let qmp: PathBuf = qmp.to_owned();
    ask(move || qemu::standing(&qmp, incoming)).await.unwrap_or_else(Standing::Silent)
}

/// What a source whose QEMU has given the guest up makes of the destination's word.
fn given(theirs: &Theirs) -> Verdict {
    let by_hand =
        "if the guest does not run there and never did, end the QEMU there and continue the one here (cont)";
    match theirs {
        Theirs::Is(MigrationState::Completed) => Verdict::Completed,
        Theirs::Is(MigrationState::RolledBack) => Verdict::RolledBack(String::new()),
        Theirs::Is(MigrationState::Lost) => Verdict::Doubt(format!(
            "the guest is complete here and stopped, and the QEMU at the destination has ended, which may have run it; {by_hand}"
        )),
        Theirs::Is(_) => Verdict::Doubt(
            "the guest is complete here and stopped; the destination is asked whether it runs there".into(),
        ),
        Theirs::Unknown => Verdict::Doubt(format!(
            "the guest is complete here and stopped, and the destination knows nothing of the migration; {by_hand}"
        )),
        Theirs::Silent(why) => Verdict::Doubt(format!(
            "the guest is complete here and stopped, and the destination does not say whether it runs there: {why}"
        )),
    }
}

/// What a source whose QEMU has ended makes of the destination's word.
fn source_has_gone(theirs: &Theirs) -> Verdict {
    let lost = || Verdict::Lost("the source QEMU has ended, and its guest with it".into());
    match theirs {
        Theirs::Is(MigrationState::Completed) => Verdict::Completed,
        Theirs::Is(MigrationState::RolledBack | MigrationState::Lost) | Theirs::Unknown => lost(),
        Theirs::Is(_) => Verdict::Wait,
        Theirs::Silent(why) => Verdict::Doubt(format!(
            "the source QEMU has ended, and the destination does not say whether the guest runs there: {why}"
        )),
    }
}

/// What a destination does.
#[derive(Debug, PartialEq, Eq)]
enum Act {
    Say(Verdict),
    /// Tells the source that its guest will not be taken in, so that it gives up or is in doubt.
    TellGone,
    /// Lets the guest run.
    Run,
    /// Ends the copy.
    End(String),
}

/// What a destination whose guest does not run makes of its QEMU's and the source's word.
fn taken_in(here: &Standing, theirs: &Theirs) -> Act {
    let died = "the process that was to take the guest in ended; see its log";
    match (theirs, here) {
        // It was told so by a process here, before that ended.
        (Theirs::Is(MigrationState::Completed), Standing::Complete) => Act::Say(Verdict::Completed),
        (Theirs::Is(MigrationState::Completed), _) => {
            Act::Say(Verdict::Lost("it was handed over to this host, and the QEMU that took it in has ended".into()))
        }
        (Theirs::Is(MigrationState::RolledBack), _) => Act::End(died.into()),
        (Theirs::Is(MigrationState::InDoubt), Standing::Complete) => Act::Run,
        (Theirs::Is(MigrationState::InDoubt), Standing::Incomplete | Standing::Untouched) => Act::End(died.into()),
        (Theirs::Is(MigrationState::InDoubt), Standing::Gone) => Act::Say(Verdict::Lost(
            "it may have been handed over to this host, and the QEMU that took it in has ended".into(),
        )),
        (Theirs::Is(MigrationState::Lost), Standing::Complete) => Act::Say(Verdict::Lost(
            "the source QEMU has ended; the guest is complete here and stopped: continue it (cont) if it is to go on".into(),
        )),
        (Theirs::Is(MigrationState::Lost), _) => {
            Act::Say(Verdict::Lost("the source QEMU has ended, and its guest with it".into()))
        }
        (Theirs::Is(MigrationState::Waiting | MigrationState::Checking | MigrationState::Running), _) => Act::TellGone,
        (Theirs::Is(MigrationState::InDoubt), _) => Act::Say(Verdict::Doubt(
            "the source has given the guest up, and the QEMU that took it in does not answer".into(),
        )),
        (Theirs::Unknown, Standing::Untouched | Standing::Incomplete) => Act::End(died.into()),
        (Theirs::Unknown, _) => Act::Say(Verdict::Doubt("the source knows nothing of the migration".into())),
        (Theirs::Silent(why), _) => {
            Act::Say(Verdict::Doubt(format!("the source is asked what became of the guest: {why}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [MigrationState; 7] = [
        MigrationState::Waiting,
        MigrationState::Checking,
        MigrationState::Running,
        MigrationState::Completed,
        MigrationState::RolledBack,
        MigrationState::InDoubt,
        MigrationState::Lost,
    ];

    fn words() -> Vec<Theirs> {
        let states = STATES.into_iter().map(Theirs::Is);
        states.chain([Theirs::Unknown, Theirs::Silent("no route".into())]).collect()
    }

    #[test]
    fn a_source_that_gave_its_guest_up_has_it_back_only_from_a_destination_that_rolled_back() {
        for theirs in words() {
            let back = matches!(given(&theirs), Verdict::RolledBack(_));
            assert_eq!(back, matches!(theirs, Theirs::Is(MigrationState::RolledBack)));
        }
    }

    #[test]
    fn a_destination_runs_a_guest_only_when_it_is_whole_and_the_source_is_in_doubt() {
        let standings = [
            Standing::Untouched,
            Standing::Incomplete,
            Standing::Complete,
            Standing::Gone,
            Standing::Silent("busy".into()),
        ];
        for here in &standings {
            for theirs in words() {
                let act = taken_in(here, &theirs);
                let in_doubt = matches!(theirs, Theirs::Is(MigrationState::InDoubt));
                assert_eq!(act == Act::Run, in_doubt && *here == Standing::Complete, "{here:?}");
                // It says that it rolled back, upon which a source in doubt runs the guest, only when the copy here cannot run.
                if let (Act::End(_), true) = (&act, in_doubt) {
                    assert!(matches!(here, Standing::Untouched | Standing::Incomplete), "{here:?}");
                }
                assert!(!matches!(act, Act::Say(Verdict::RolledBack(_))));
            }
        }
    }

    #[test]
    fn a_guest_whose_qemu_has_ended_is_lost_unless_it_had_moved() {
        assert_eq!(source_has_gone(&Theirs::Is(MigrationState::Completed)), Verdict::Completed);
        assert!(matches!(source_has_gone(&Theirs::Is(MigrationState::RolledBack)), Verdict::Lost(_)));
        assert_eq!(source_has_gone(&Theirs::Is(MigrationState::Running)), Verdict::Wait);
        assert!(matches!(source_has_gone(&Theirs::Silent(String::new())), Verdict::Doubt(_)));
    }
}

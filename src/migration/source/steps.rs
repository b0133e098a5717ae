//! The source's transitions, in the order in which a migration passes them.

use std::time::Duration;

use super::phase::{Closing, Phase};
use super::{PlacedStats, Source, SourceAction, SourceInput};
use crate::migration::convergence::{RoundRecord, Verdict};
use crate::migration::handover::{GivenUp, NEVER_STARTED, Outcome, SourceRecord};
use crate::pageset::PageSet;
use crate::units::RoundId;
use crate::wire::control::{Message, STATE_CHUNK_BYTES, Token};

impl Source {
    /// Takes in what happened at `now`.
    pub fn handle(&mut self, now: Duration, input: SourceInput) {
        match input {
            SourceInput::Begin => self.begin(now),
            SourceInput::Message(message) => self.message(now, message),
            SourceInput::ChannelsOpen => self.channels_open(),
            SourceInput::TrackingStarted(touched) => self.tracking_started(now, &touched),
            SourceInput::Drained(dirty) => self.drained(now, &dirty),
            SourceInput::Progressed => self.progressed(now),
            SourceInput::Placed(round, stats) => self.placed(now, round, stats),
            SourceInput::Paused(wall_clock) => self.stopped(wall_clock),
            SourceInput::StateSaved(state) => self.state_saved(&state),
            SourceInput::Journaled => self.journaled(now),
            SourceInput::Resumed => self.resumed(),
            SourceInput::Failed(cause) => self.failed(now, cause),
            SourceInput::LinkLost(cause) => {
                self.link_lost(now, format!("the connection to the destination is lost: {cause}"));
            }
            SourceInput::Violation(cause) => {
                self.link_lost(now, format!("the destination broke the protocol: {cause}"));
            }
            SourceInput::Cancel if self.can_cancel() => self.roll_back("cancelled".into()),
            SourceInput::Cancel => {}
            SourceInput::Answer(answer) => self.answer(now, answer.as_ref()),
        }
    }

    /// The deadline of [`Source::poll_timeout`] has come.
    pub fn handle_timeout(&mut self, now: Duration) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.deadline = None;
        match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::InDoubt(given_up, since) => self.ask_again(now, given_up, since),
            phase => {
                let cause =
                    format!("the destination did not answer in time: waited for {}", phase.waits_for());
                match phase {
                    Phase::AwaitingRunning(given_up) => self.doubt(now, given_up, cause),
                    phase => {
                        self.phase = phase;
                        self.roll_back(cause);
                    }
                }
            }
        }
    }

    fn act(&mut self, action: SourceAction) {
        self.actions.push_back(action);
    }

    // Set up.

    fn begin(&mut self, now: Duration) {
        if self.phase == Phase::Connecting {
            self.act(SourceAction::Send(Message::Setup(self.config.setup.clone())));
            self.phase = Phase::SettingUp;
            self.deadline = Some(now + self.config.patience.setup);
        }
    }

    fn message(&mut self, now: Duration, message: Message) {
        match (&self.phase, message) {
            (Phase::Over | Phase::RollingBack(_) | Phase::Closing(_), _) => {}
            (Phase::SettingUp, Message::Accept(accept)) => {
                self.deadline = None;
                self.phase = Phase::OpeningChannels;
                self.act(SourceAction::OpenChannels(Box::new(accept)));
            }
            (Phase::AwaitingReady, Message::Ready(token)) => self.ready(token),
            (Phase::AwaitingRunning(_) | Phase::InDoubt(..), message) => self.answer(now, Some(&message)),
            // The journal may say by now that the guest is given up: what the peer says next is heard after that.
            (Phase::Journaling(_), _) => {}
            (_, Message::Abort(cause)) => {
                self.roll_back(format!("the destination ended the migration: {cause}"));
            }
            (phase, message) => {
                let waits_for = phase.waits_for();
                self.roll_back(format!(
                    "the destination broke the protocol: it sent {} while {waits_for} was waited for",
                    message.name()
                ));
            }
        }
    }

    fn channels_open(&mut self) {
        if self.phase == Phase::OpeningChannels {
            self.phase = Phase::StartingTracking;
            self.act(SourceAction::StartTracking);
        }
    }

    // Pre-copy.

    fn tracking_started(&mut self, now: Duration, touched: &PageSet) {
        if self.phase == Phase::StartingTracking {
            self.ledger.owe(touched);
            self.place(now, Phase::Placing);
        }
    }

    /// Posts everything that is pending, as the round of the given phase.
    fn place(&mut self, now: Duration, phase: fn(RoundId, Duration) -> Phase) {
        let round = self.next_round;
        let pages = self.ledger.post(round);
        self.phase = phase(round, now);
        self.deadline = Some(now + self.config.patience.placing);
        self.act(SourceAction::Place(round, pages));
    }

    fn progressed(&mut self, now: Duration) {
        if matches!(self.phase, Phase::Placing(..) | Phase::LastPlacing(..)) {
            self.deadline = Some(now + self.config.patience.placing);
        }
    }

    fn placed(&mut self, now: Duration, round: RoundId, stats: PlacedStats) {
        let (last, began) = match self.phase {
            Phase::Placing(current, began) if current == round => (false, began),
            Phase::LastPlacing(current, began) if current == round => (true, began),
            _ => return,
        };
        let confirmed = self.ledger.confirm(round);
        debug_assert!(confirmed, "the phase names the round that is posted");
        self.rounds.push(RoundRecord {
            round,
            pages: stats.pages,
            zero_pages: stats.zero_pages,
            bytes: stats.bytes,
            wire_bytes: stats.wire_bytes,
            took: now.saturating_sub(began),
            dirtied: 0,
        });
        self.next_round = round.next();
        self.deadline = None;
        if last {
            self.finish(now);
        } else {
            self.phase = Phase::Draining;
            self.act(SourceAction::Drain);
        }
    }

    fn drained(&mut self, now: Duration, dirty: &PageSet) {
        match self.phase {
            Phase::Draining => {
                self.ledger.owe(dirty);
                self.judge(now, dirty.len());
            }
            Phase::LastDrain => {
                self.ledger.owe(dirty);
                self.place(now, Phase::LastPlacing);
            }
            // Taken from the tracker and so owed, whatever happened since.
            _ => self.ledger.owe(dirty),
        }
    }

    fn judge(&mut self, now: Duration, dirtied: u64) {
        let Some(record) = self.rounds.last_mut() else { return };
        record.dirtied = dirtied;
        let record = *record;
        self.act(SourceAction::Send(Message::RoundDone { round: record.round, dirtied }));
        match self.convergence.judge(&record, self.ledger.pending_pages()) {
            Verdict::AnotherRound => self.place(now, Phase::Placing),
            Verdict::Throttle(percent) => {
                self.act(SourceAction::Throttle(percent));
                self.place(now, Phase::Placing);
            }
            Verdict::StopAndCopy => {
                self.paused = true;
                self.phase = Phase::Pausing;
                self.act(SourceAction::Pause);
            }
            Verdict::GiveUp(why) => self.roll_back(why),
        }
    }

    // Stop and copy.

    fn stopped(&mut self, wall_clock: u64) {
        if self.phase == Phase::Pausing {
            self.stopped_at = wall_clock;
            self.phase = Phase::Saving;
            // Before the last drain: saving state may itself write guest memory (a pending exit, a clock page).
            self.act(SourceAction::SaveState);
        }
    }

    fn state_saved(&mut self, state: &[u8]) {
        if self.phase == Phase::Saving {
            self.state_bytes = state.len() as u64;
            self.phase = Phase::LastDrain;
            self.act(SourceAction::Drain);
            for chunk in state.chunks(STATE_CHUNK_BYTES) {
                self.act(SourceAction::Send(Message::State(chunk.to_vec())));
            }
        }
    }

    fn finish(&mut self, now: Duration) {
        self.phase = Phase::AwaitingReady;
        self.deadline = Some(now + self.config.patience.ready);
        self.act(SourceAction::Send(Message::Finish {
            state_bytes: self.state_bytes,
            stopped_at: self.stopped_at,
        }));
    }

    // Handover. Everything before `ready` can be taken back; from the moment the journal has `Committing`, only the
    // destination's word decides.

    fn ready(&mut self, token: Token) {
        self.deadline = None;
        self.phase = Phase::Journaling(token);
        self.act(SourceAction::Journal(SourceRecord::Committing(token)));
    }

    fn journaled(&mut self, now: Duration) {
        match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::Journaling(token) => match self.right.take() {
                Some(right) => {
                    self.phase = Phase::AwaitingRunning(right.commit(token));
                    self.deadline = Some(now + self.config.patience.running);
                    self.act(SourceAction::Send(Message::Commit(token)));
                }
                None => debug_assert!(false, "the right is held until it is committed"),
            },
            Phase::Closing(Closing::Completed) => {
                let warnings = std::mem::take(&mut self.warnings);
                self.act(SourceAction::Finished(Outcome::Completed { warnings }));
            }
            Phase::Closing(Closing::RolledBack(cause)) => self.resume(cause),
            phase => self.phase = phase,
        }
    }

    /// The destination's word after `Commit`: from the link or as the answer to a question.
    fn answer(&mut self, now: Duration, answer: Option<&Message>) {
        let (given_up, since) = match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::AwaitingRunning(given_up) => (given_up, None),
            Phase::InDoubt(given_up, since) => (given_up, Some(since)),
            phase => return self.phase = phase,
        };
        match answer {
            Some(Message::Running(token)) if *token == given_up.token() => {
                self.close(SourceRecord::Completed(*token), Closing::Completed);
            }
            Some(Message::Fenced(token)) => match given_up.fenced(*token) {
                Ok(right) => {
                    self.right = Some(right);
                    self.warnings.push(NEVER_STARTED.into());
                    let cause = std::mem::take(&mut self.warnings).join("; ");
                    self.close(SourceRecord::RolledBack(*token), Closing::RolledBack(cause));
                }
                Err(given_up) => self.no_answer(now, given_up, since, answer),
            },
            _ => self.no_answer(now, given_up, since, answer),
        }
    }

    /// Neither word: it is still unknown. A question that has just gone unanswered is asked again in its time; other talk after
    /// Commit is a peer that cannot be trusted to say Running, so it is asked.
    fn no_answer(
        &mut self,
        now: Duration,
        given_up: GivenUp,
        since: Option<Duration>,
        answer: Option<&Message>,
    ) {
        if let Some(since) = since {
            self.phase = Phase::InDoubt(given_up, since);
            return;
        }
        let why = match answer {
            Some(Message::Abort(cause)) => format!("the destination ended the migration: {cause}"),
            Some(Message::Running(_) | Message::Fenced(_)) => "the destination spoke of another token".into(),
            Some(other) => {
                format!("the destination broke the protocol: it sent {} after Commit", other.name())
            }
            None => "the destination did not answer".into(),
        };
        self.doubt(now, given_up, why);
    }

    fn close(&mut self, record: SourceRecord, closing: Closing) {
        self.deadline = None;
        self.phase = Phase::Closing(closing);
        self.act(SourceAction::Journal(record));
    }

    fn doubt(&mut self, now: Duration, given_up: GivenUp, why: String) {
        self.warnings.push(why);
        self.ask_again(now, given_up, now);
    }

    fn ask_again(&mut self, now: Duration, given_up: GivenUp, since: Duration) {
        let token = given_up.token();
        if now.saturating_sub(since) >= self.config.patience.doubt {
            self.phase = Phase::Over;
            self.act(SourceAction::Finished(Outcome::InDoubt { token }));
            return;
        }
        self.phase = Phase::InDoubt(given_up, since);
        self.deadline = Some(now + self.config.patience.query);
        self.act(SourceAction::Query(token));
    }

    // Trouble.

    fn link_lost(&mut self, now: Duration, cause: String) {
        match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::AwaitingRunning(given_up) => self.doubt(now, given_up, cause),
            phase @ (Phase::InDoubt(..) | Phase::Journaling(_) | Phase::Closing(_) | Phase::Over) => {
                self.phase = phase;
            }
            phase => {
                self.phase = phase;
                self.roll_back(cause);
            }
        }
    }

    /// A local action failed, or the last channel is gone.
    fn failed(&mut self, now: Duration, cause: String) {
        match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::Over => {}
            // Commit may be on its way, and the channels are not needed any more.
            Phase::AwaitingRunning(given_up) => {
                self.phase = Phase::AwaitingRunning(given_up);
                self.warnings.push(cause);
            }
            Phase::InDoubt(given_up, since) => self.phase = Phase::InDoubt(given_up, since),
            // The entry may stand all the same, and a restart would act on it: the token is burnt before the guest runs.
            Phase::Journaling(token) => match self.right.take() {
                Some(right) => self.doubt(now, right.commit(token), cause),
                None => debug_assert!(false, "the right is held until it is committed"),
            },
            // The guest is where it is; only the note of it is missing, and the next start asks again.
            Phase::Closing(closing) => {
                self.warnings.push(cause);
                self.phase = Phase::Closing(closing);
                self.journaled(now);
            }
            Phase::RollingBack(first) => {
                let cause = format!("{first}; then, on the way back: {cause}");
                self.act(SourceAction::Finished(Outcome::RolledBack { cause }));
            }
            phase => {
                // A pause that failed left the guest running.
                self.paused &= phase != Phase::Pausing;
                self.phase = phase;
                self.roll_back(cause);
            }
        }
    }

    /// Ends the migration before `Commit`: the guest goes on here.
    fn roll_back(&mut self, cause: String) {
        if matches!(self.phase, Phase::RollingBack(_) | Phase::Over) {
            return;
        }
        self.deadline = None;
        self.ledger.give_back();
        if self.phase != Phase::Connecting {
            self.act(SourceAction::Send(Message::Abort(cause.clone())));
        }
        self.resume(cause);
    }

    fn resume(&mut self, cause: String) {
        self.act(SourceAction::Release);
        match self.right.take() {
            Some(right) if self.paused => {
                self.phase = Phase::RollingBack(cause);
                self.act(SourceAction::Resume(right));
            }
            _ => {
                self.phase = Phase::Over;
                self.act(SourceAction::Finished(Outcome::RolledBack { cause }));
            }
        }
    }

    fn resumed(&mut self) {
        if let Phase::RollingBack(cause) = std::mem::replace(&mut self.phase, Phase::Over) {
            self.act(SourceAction::Finished(Outcome::RolledBack { cause }));
        }
    }
}

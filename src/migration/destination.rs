//! The destination's machine. It is used as the source's is: see [`super::source`].
//!
//! The guest may run here only after its own journal decided so: see [`Decision`].

use std::collections::VecDeque;
use std::time::Duration;

use super::handover::{Arrival, Decision, ResumeRight};
use super::source::PhaseName;
use crate::wire::control::{Accept, MAX_STATE_BYTES, Message, Setup, Token};

/// What the destination needs to know before it begins.
#[derive(Clone, Debug)]
pub struct DestinationConfig {
    /// What stands for the right to run the guest; drawn at random, never used again.
    pub token: Token,
    /// What further connections have to show; drawn at random.
    pub secret: [u8; 32],
    /// Optional abilities of this host.
    pub capabilities: Vec<String>,
    /// How long the source may take from its connection to `Setup`.
    pub setup_within: Duration,
    /// How long to hold a complete guest that the source does not commit, before giving up the right to run it.
    pub fence_after: Duration,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum DestinationInput {
    /// A message of the peer over the control link.
    Message(Message),
    /// A `Query` or `Commit` that came over a connection of its own.
    Asked(Message),
    /// Answers [`DestinationAction::MakeGuest`]: the skeleton is there, and channels are accepted.
    GuestMade,
    /// Answers [`DestinationAction::LoadState`].
    StateLoaded,
    /// Answers [`DestinationAction::Decide`]: the decision that stands.
    Decided(Decision),
    /// Answers [`DestinationAction::Revoke`].
    Revoked,
    /// Answers [`DestinationAction::Resume`].
    Resumed,
    /// An action failed, in these words.
    Failed(String),
    /// The source broke the protocol on a channel, or sent what is no message; in these words.
    Violation(String),
    /// The control link is lost and will not come back.
    LinkLost(String),
    /// Someone here wants the migration to stop.
    Cancel,
}

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub enum DestinationAction {
    /// Make the guest's skeleton and accept channels.
    MakeGuest(Box<Setup>),
    /// Send this over the control link.
    Send(Message),
    /// Close every channel so that nothing writes the guest's memory any more, then load this state.
    LoadState {
        /// CPU and device state as the source saved it.
        state: Vec<u8>,
        /// The source's wall clock when the guest stopped, in nanoseconds since 1970.
        stopped_at: u64,
    },
    /// Make this decision durable, unless one stands already.
    Decide(Token, Decision),
    /// The guest has not run an instruction and cannot: replace the decision `Running` by `Fenced`.
    Revoke(Token),
    /// Let the guest run.
    Resume(ResumeRight),
    /// Answer the one who asked over a connection of its own.
    Answer(Message),
    /// Drop the guest and everything received.
    DropGuest,
    /// The end.
    Finished(Arrival),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    AwaitingSetup,
    MakingGuest,
    /// Pages, and the state as far as it has come.
    Receiving(Vec<u8>),
    Loading,
    /// Everything is here.
    Ready,
    /// The journal decides; why it was asked.
    Deciding(Question),
    Resuming,
    /// The guest could not be started, because of this.
    Revoking(String),
    /// The end, as the peer has to be told when it asks again.
    Running,
    Discarded,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Question {
    /// The source committed.
    Run,
    /// It is to be given up, because of this.
    Fence(String),
}

/// The destination's side of one migration.
#[derive(Debug)]
pub struct Destination {
    config: DestinationConfig,
    phase: Phase,
    stopped_at: u64,
    /// Whether someone waits for an answer over a connection of its own.
    asked: bool,
    deadline: Option<Duration>,
    /// Why the control link was lost while the source may still commit beside it.
    lost: Option<String>,
    actions: VecDeque<DestinationAction>,
}

impl Destination {
    /// Waits for `Setup`; the migration begins now, at time 0.
    #[must_use]
    pub fn new(config: DestinationConfig) -> Self {
        Self {
            deadline: Some(config.setup_within),
            config,
            phase: Phase::AwaitingSetup,
            stopped_at: 0,
            asked: false,
            lost: None,
            actions: VecDeque::new(),
        }
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<DestinationAction> {
        self.actions.pop_front()
    }

    /// When [`Destination::handle_timeout`] is due.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Duration> {
        self.deadline
    }

    /// Which phase it is in.
    #[must_use]
    pub fn phase(&self) -> PhaseName {
        match self.phase {
            Phase::AwaitingSetup | Phase::MakingGuest => PhaseName::SetUp,
            Phase::Receiving(_) => PhaseName::PreCopy,
            Phase::Loading => PhaseName::StopAndCopy,
            Phase::Ready | Phase::Deciding(_) | Phase::Resuming | Phase::Revoking(_) => PhaseName::Handover,
            Phase::Running | Phase::Discarded => PhaseName::Finished,
        }
    }

    /// Takes in what happened at `now`.
    pub fn handle(&mut self, now: Duration, input: DestinationInput) {
        match input {
            DestinationInput::Message(message) => self.message(message),
            DestinationInput::Asked(message) => self.ask(&message),
            DestinationInput::GuestMade => self.guest_made(),
            DestinationInput::StateLoaded => self.state_loaded(now),
            DestinationInput::Decided(decision) => self.decided(decision),
            DestinationInput::Revoked => self.revoked(),
            DestinationInput::Resumed => self.resumed(),
            DestinationInput::Failed(cause) => self.failed(&cause),
            DestinationInput::Violation(cause) => {
                self.end(&format!("the source broke the protocol: {cause}"));
            }
            DestinationInput::LinkLost(cause) => self.link_lost(now, &cause),
            DestinationInput::Cancel => self.end("cancelled at the destination"),
        }
    }

    /// The deadline of [`Destination::poll_timeout`] has come.
    pub fn handle_timeout(&mut self, now: Duration) {
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            self.deadline = None;
            let late = match self.phase {
                Phase::AwaitingSetup => "the source said nothing in time: waited for Setup",
                _ => "the source did not commit in time: waited for Commit",
            };
            let lost = self.lost.take().map(|cause| format!("; the connection to it was lost: {cause}"));
            self.end(&format!("{late}{}", lost.unwrap_or_default()));
        }
    }

    fn act(&mut self, action: DestinationAction) {
        self.actions.push_back(action);
    }

    fn message(&mut self, message: Message) {
        match (&mut self.phase, message) {
            (Phase::Running | Phase::Discarded | Phase::Revoking(_), _) => {}
            (Phase::AwaitingSetup, Message::Setup(setup)) => {
                self.deadline = None;
                self.phase = Phase::MakingGuest;
                self.act(DestinationAction::MakeGuest(Box::new(setup)));
            }
            (Phase::Receiving(state), Message::State(chunk)) => {
                state.extend_from_slice(&chunk);
                if state.len() as u64 > MAX_STATE_BYTES {
                    self.end(&format!("the guest's state is longer than {MAX_STATE_BYTES} bytes"));
                }
            }
            (Phase::Receiving(_), Message::RoundDone { .. }) => {}
            (Phase::Receiving(state), Message::Finish { state_bytes, stopped_at }) => {
                let state = std::mem::take(state);
                self.finish(state, state_bytes, stopped_at);
            }
            (Phase::Ready, Message::Commit(token)) if token == self.config.token => self.commit(),
            (Phase::Deciding(_) | Phase::Resuming, Message::Commit(token)) if token == self.config.token => {}
            (_, Message::Query(token)) if token == self.config.token => self.query(),
            (_, Message::Abort(cause)) => self.end(&format!("the source ended the migration: {cause}")),
            (phase, message) => {
                let cause = format!(
                    "the source broke the protocol: it sent {} {}",
                    message.name(),
                    match phase {
                        Phase::AwaitingSetup => "before Setup",
                        Phase::MakingGuest => "before it was accepted",
                        Phase::Receiving(_) => "in the middle of the pages",
                        _ => "after Finish, or with a wrong token",
                    }
                );
                self.end(&cause);
            }
        }
    }

    fn guest_made(&mut self) {
        if self.phase == Phase::MakingGuest {
            self.phase = Phase::Receiving(Vec::new());
            self.act(DestinationAction::Send(Message::Accept(Accept {
                secret: self.config.secret,
                capabilities: self.config.capabilities.clone(),
            })));
        }
    }

    fn finish(&mut self, state: Vec<u8>, state_bytes: u64, stopped_at: u64) {
        if state.len() as u64 != state_bytes {
            return self.end(&format!("{} bytes of guest state came, {state_bytes} were sent", state.len()));
        }
        self.stopped_at = stopped_at;
        self.phase = Phase::Loading;
        self.act(DestinationAction::LoadState { state, stopped_at });
    }

    fn state_loaded(&mut self, now: Duration) {
        if self.phase == Phase::Loading {
            self.deadline = Some(now + self.config.fence_after);
            self.phase = Phase::Ready;
            self.act(DestinationAction::Send(Message::Ready(self.config.token)));
        }
    }

    /// The source gave the guest up. Only the journal makes it ours.
    fn commit(&mut self) {
        self.deadline = None;
        self.phase = Phase::Deciding(Question::Run);
        self.act(DestinationAction::Decide(self.config.token, Decision::Running));
    }

    /// The source asks: what has not been decided is now decided against running here.
    fn query(&mut self) {
        match self.phase {
            Phase::Running => self.tell(Message::Running(self.config.token)),
            Phase::Discarded => self.tell(Message::Fenced(self.config.token)),
            // The answer follows from what is under way.
            Phase::Deciding(_) | Phase::Resuming | Phase::Revoking(_) => {}
            _ => self.end("the source asked, and the guest had not been committed"),
        }
    }

    /// Over a connection of its own: from a source that lost the link, or came back after a restart.
    fn ask(&mut self, message: &Message) {
        self.asked = true;
        match (message, &self.phase) {
            (Message::Query(token) | Message::Commit(token), _) if *token != self.config.token => {
                self.tell(Message::Abort("that token is of no migration here".into()));
            }
            (Message::Commit(_), Phase::Ready) => self.commit(),
            (Message::Query(_) | Message::Commit(_), _) => self.query(),
            _ => self.tell(Message::Abort("only Query and Commit may be asked".into())),
        }
    }

    fn decided(&mut self, decision: Decision) {
        let Phase::Deciding(question) = std::mem::replace(&mut self.phase, Phase::Discarded) else { return };
        match (question, decision) {
            (Question::Run, Decision::Running) => {
                self.phase = Phase::Resuming;
                self.act(DestinationAction::Resume(ResumeRight::decided()));
            }
            (Question::Run, Decision::Fenced) => self.discard("the right to run it had been given up"),
            (Question::Fence(cause), _) => self.discard(&cause),
        }
    }

    fn resumed(&mut self) {
        if self.phase == Phase::Resuming {
            self.phase = Phase::Running;
            self.say(Message::Running(self.config.token));
            self.act(DestinationAction::Finished(Arrival::Running { token: self.config.token }));
        }
    }

    fn failed(&mut self, cause: &str) {
        match &self.phase {
            // No vCPU ran (that is what a failed resume promises), so the decision can be taken back.
            Phase::Resuming => {
                self.phase = Phase::Revoking(format!("the guest could not be started: {cause}"));
                self.act(DestinationAction::Revoke(self.config.token));
            }
            // The journal does not answer: nothing may be said about the token, only that nothing runs here.
            Phase::Deciding(_) | Phase::Revoking(_) => {
                self.phase = Phase::Discarded;
                self.act(DestinationAction::DropGuest);
                let cause = format!("the journal cannot be written: {cause}");
                self.act(DestinationAction::Finished(Arrival::Discarded { cause }));
            }
            _ => self.end(cause),
        }
    }

    fn revoked(&mut self) {
        if let Phase::Revoking(cause) = std::mem::replace(&mut self.phase, Phase::Discarded) {
            self.discard(&cause);
        }
    }

    fn link_lost(&mut self, now: Duration, cause: &str) {
        match self.phase {
            // It may have committed and come back over another path.
            Phase::Ready => {
                self.deadline = Some(now + self.config.fence_after);
                self.lost = Some(cause.to_owned());
            }
            Phase::AwaitingSetup | Phase::MakingGuest | Phase::Receiving(_) | Phase::Loading => {
                self.end(&format!("the connection to the source is lost: {cause}"));
            }
            _ => {}
        }
    }

    /// Ends the migration here, unless the guest runs here or is about to.
    fn end(&mut self, cause: &str) {
        match self.phase {
            Phase::Running | Phase::Discarded | Phase::Resuming | Phase::Deciding(_) | Phase::Revoking(_) => {
            }
            Phase::Ready => {
                self.deadline = None;
                self.phase = Phase::Deciding(Question::Fence(cause.to_owned()));
                self.act(DestinationAction::Decide(self.config.token, Decision::Fenced));
            }
            _ => {
                self.deadline = None;
                self.act(DestinationAction::Send(Message::Abort(cause.to_owned())));
                self.discard(cause);
            }
        }
    }

    fn discard(&mut self, cause: &str) {
        self.phase = Phase::Discarded;
        self.say(Message::Fenced(self.config.token));
        self.act(DestinationAction::DropGuest);
        self.act(DestinationAction::Finished(Arrival::Discarded { cause: cause.to_owned() }));
    }

    /// Tells whoever waits: the one who asked, and the link.
    fn say(&mut self, message: Message) {
        if self.asked {
            self.asked = false;
            self.act(DestinationAction::Answer(message.clone()));
        }
        self.act(DestinationAction::Send(message));
    }

    fn tell(&mut self, message: Message) {
        if self.asked {
            self.asked = false;
            self.act(DestinationAction::Answer(message));
        } else {
            self.act(DestinationAction::Send(message));
        }
    }
}

#[cfg(test)]
mod tests;

//! The source's machine.
//!
//! Call [`Source::handle`] with what happened, then take every action from [`Source::poll_action`] and perform it in order;
//! an action that has an answer names the input that carries it. [`Source::handle_timeout`] is due at
//! [`Source::poll_timeout`]. After [`SourceAction::Finished`] nothing changes any more.
//!
//! An input that does not belong to the phase is ignored when it is a late answer (the machine has moved on since it
//! asked), and ends the migration when it is a message that the peer had no right to send.

mod phase;
mod steps;

use std::collections::VecDeque;
use std::time::Duration;

use phase::Phase;
pub use phase::PhaseName;

use super::convergence::{Convergence, Limits, RoundRecord};
use super::handover::{Outcome, ResumeRight, SourceRecord};
use super::ledger::PageLedger;
use crate::pageset::PageSet;
use crate::units::RoundId;
use crate::wire::control::{Accept, Message, Setup, Token};

/// What one migration needs to know before it begins.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// The description that the destination gets.
    pub setup: Setup,
    /// When to stop, and what to do when that does not come.
    pub limits: Limits,
    /// How long to wait for a peer that is connected but does not answer.
    pub patience: Patience,
}

/// How long each answer of the peer may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// From `Setup` to `Accept`: memory is allocated meanwhile.
    pub setup: Duration,
    /// Within a round, how long nothing may be sent and nothing confirmed.
    pub placing: Duration,
    /// From `Finish` to `Ready`: state is loaded meanwhile.
    pub ready: Duration,
    /// From `Commit` to `Running`; after that the source asks.
    pub running: Duration,
    /// Between two questions when in doubt.
    pub query: Duration,
    /// How long to ask before the outcome is left in doubt.
    pub doubt: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            setup: Duration::from_secs(30),
            placing: Duration::from_secs(30),
            ready: Duration::from_secs(30),
            running: Duration::from_secs(5),
            query: Duration::from_millis(500),
            doubt: Duration::from_secs(60),
        }
    }
}

/// What a round's placement cost, as the session counts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlacedStats {
    /// Pages placed, zero pages among them.
    pub pages: u64,
    /// Pages that held only zero bytes.
    pub zero_pages: u64,
    /// Bytes of guest memory that travelled.
    pub bytes: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum SourceInput {
    /// The control link is up.
    Begin,
    /// A message of the peer.
    Message(Message),
    /// Answers [`SourceAction::OpenChannels`].
    ChannelsOpen,
    /// Answers [`SourceAction::StartTracking`]: the pages that may hold something, seen after tracking began.
    TrackingStarted(PageSet),
    /// Answers [`SourceAction::Drain`].
    Drained(PageSet),
    /// More of the round under way was sent or confirmed.
    Progressed,
    /// Answers [`SourceAction::Place`]: the round's barrier came back.
    Placed(RoundId, PlacedStats),
    /// Answers [`SourceAction::Pause`], with the wall clock at that moment in nanoseconds since 1970.
    Paused(u64),
    /// Answers [`SourceAction::SaveState`].
    StateSaved(Vec<u8>),
    /// Answers [`SourceAction::Journal`].
    Journaled,
    /// Answers [`SourceAction::Resume`].
    Resumed,
    /// An action failed, or the session lost its last channel, in these words.
    Failed(String),
    /// The control link is lost and will not come back.
    LinkLost(String),
    /// The peer sent what is no message, in these words.
    Violation(String),
    /// Someone wants the migration to stop.
    Cancel,
    /// Answers [`SourceAction::Query`]: the peer's word, or `None` when it cannot be reached.
    Answer(Option<Message>),
}

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub enum SourceAction {
    /// Send this over the control link.
    Send(Message),
    /// Open the data channels with this secret.
    OpenChannels(Box<Accept>),
    /// Start the dirty tracker, *then* find out which pages are touched.
    StartTracking,
    /// Ask the tracker.
    Drain,
    /// Place these pages at the destination, then a barrier.
    Place(RoundId, PageSet),
    /// Take this percentage of vCPU time from the guest.
    Throttle(u8),
    /// Stop the guest.
    Pause,
    /// Read CPU and device state.
    SaveState,
    /// Make this durable.
    Journal(SourceRecord),
    /// Let the guest run again.
    Resume(ResumeRight),
    /// End tracking and throttling: the guest stays here and runs at full speed.
    Release,
    /// Ask the destination about this token, over any path.
    Query(Token),
    /// The end.
    Finished(Outcome),
}

/// The source's side of one migration.
#[derive(Debug)]
pub struct Source {
    config: SourceConfig,
    phase: Phase,
    ledger: PageLedger,
    convergence: Convergence,
    next_round: RoundId,
    rounds: Vec<RoundRecord>,
    /// Held while the source may run the guest; given up by `Commit`.
    right: Option<ResumeRight>,
    /// Whether the guest has been told to stop, and so has to be told to run on a way back.
    paused: bool,
    stopped_at: u64,
    state_bytes: u64,
    /// When the answer that is waited for is late.
    deadline: Option<Duration>,
    actions: VecDeque<SourceAction>,
    warnings: Vec<String>,
}

impl Source {
    /// A migration that has not begun.
    #[must_use]
    pub fn new(config: SourceConfig) -> Self {
        Self {
            ledger: PageLedger::new(config.setup.layout.total_pages()),
            convergence: Convergence::new(config.limits),
            config,
            phase: Phase::Connecting,
            next_round: RoundId(0),
            rounds: Vec::new(),
            right: Some(ResumeRight::of_the_source()),
            paused: false,
            stopped_at: 0,
            state_bytes: 0,
            deadline: None,
            actions: VecDeque::new(),
            warnings: Vec::new(),
        }
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<SourceAction> {
        self.actions.pop_front()
    }

    /// When [`Source::handle_timeout`] is due, by the clock of `now`.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Duration> {
        self.deadline
    }

    /// Which phase it is in.
    #[must_use]
    pub fn phase(&self) -> PhaseName {
        self.phase.name()
    }

    /// What it waits for, in words.
    #[must_use]
    pub fn waits_for(&self) -> &'static str {
        self.phase.waits_for()
    }

    /// Whether [`SourceInput::Cancel`] still has an effect: it has none from the journal entry before `Commit` on.
    #[must_use]
    pub fn can_cancel(&self) -> bool {
        self.right.is_some() && !matches!(self.phase, Phase::Journaling(_) | Phase::Closing(_) | Phase::Over)
    }

    /// The rounds that are done.
    #[must_use]
    pub fn rounds(&self) -> &[RoundRecord] {
        &self.rounds
    }

    /// The round under way, or the next one.
    #[must_use]
    pub fn round(&self) -> RoundId {
        self.next_round
    }

    /// How long the guest would be stopped if it were stopped with `pages` left to send.
    #[must_use]
    pub fn expected_downtime(&self, pages: u64) -> Option<Duration> {
        self.convergence.expected_downtime(pages)
    }

    /// What an operator should know while it runs: why it does not converge, how much it is throttled.
    #[must_use]
    pub fn note(&self) -> Option<&str> {
        self.convergence.note()
    }

    /// What an operator should know and no outcome has told: why it is in doubt.
    #[must_use]
    pub fn take_warnings(&mut self) -> Vec<String> {
        std::mem::take(&mut self.warnings)
    }

    /// How many percent of vCPU time are taken from the guest.
    #[must_use]
    pub fn throttle(&self) -> u8 {
        self.convergence.throttle()
    }
}

#[cfg(test)]
mod tests;

//! The phases of the source, in the order in which a migration passes them.

use std::time::Duration;

use crate::migration::handover::GivenUp;
use crate::units::RoundId;
use crate::wire::control::Token;

/// What the source waits for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The control link.
    Connecting,
    /// `Accept`.
    SettingUp,
    /// The data channels.
    OpeningChannels,
    /// The dirty tracker and the list of touched pages.
    StartingTracking,
    /// The barrier of a pre-copy round that began then.
    Placing(RoundId, Duration),
    /// The dirty pages of the round just placed.
    Draining,
    /// The guest to stop.
    Pausing,
    /// CPU and device state.
    Saving,
    /// The last dirty pages.
    LastDrain,
    /// The barrier of the last round, which began then.
    LastPlacing(RoundId, Duration),
    /// `Ready`.
    AwaitingReady,
    /// The journal, before `Commit`.
    Journaling(Token),
    /// `Running`.
    AwaitingRunning(GivenUp),
    /// Any answer about the token; given up at that time.
    InDoubt(GivenUp, Duration),
    /// The journal, after the end of a doubt; then what is to follow.
    Closing(Closing),
    /// The guest to run again, because of this.
    RollingBack(String),
    /// Nothing more.
    Over,
}

/// What follows once the journal has the end of the handover.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Closing {
    Completed,
    RolledBack(String),
}

/// The phases as people see them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PhaseName {
    /// Connecting, setting up, opening channels.
    SetUp,
    /// Rounds while the guest runs.
    PreCopy,
    /// The guest is stopped; last pages and state are on their way.
    StopAndCopy,
    /// Ready, Commit, Running.
    Handover,
    /// The source asks whether the destination runs the guest.
    InDoubt,
    /// Going back to running at the source.
    RollBack,
    /// Done.
    Finished,
}

impl PhaseName {
    /// Every phase.
    pub const ALL: [Self; 7] = [
        Self::SetUp,
        Self::PreCopy,
        Self::StopAndCopy,
        Self::Handover,
        Self::InDoubt,
        Self::RollBack,
        Self::Finished,
    ];

    /// The word for it in logs, progress and JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::SetUp => "set-up",
            Self::PreCopy => "pre-copy",
            Self::StopAndCopy => "stop-and-copy",
            Self::Handover => "handover",
            Self::InDoubt => "in-doubt",
            Self::RollBack => "roll-back",
            Self::Finished => "finished",
        }
    }
}

impl Phase {
    pub(super) fn name(&self) -> PhaseName {
        match self {
            Self::Connecting | Self::SettingUp | Self::OpeningChannels | Self::StartingTracking => {
                PhaseName::SetUp
            }
            Self::Placing(..) | Self::Draining => PhaseName::PreCopy,
            Self::Pausing | Self::Saving | Self::LastDrain | Self::LastPlacing(..) => PhaseName::StopAndCopy,
            Self::AwaitingReady | Self::Journaling(_) | Self::AwaitingRunning(_) | Self::Closing(_) => {
                PhaseName::Handover
            }
            Self::InDoubt(..) => PhaseName::InDoubt,
            Self::RollingBack(_) => PhaseName::RollBack,
            Self::Over => PhaseName::Finished,
        }
    }

    /// What is waited for, in words for an error.
    pub(super) fn waits_for(&self) -> &'static str {
        match self {
            Self::Connecting => "the connection",
            Self::SettingUp => "Accept (the destination makes the guest's skeleton)",
            Self::OpeningChannels => "the data channels",
            Self::StartingTracking => "the dirty tracker",
            Self::Placing(..) => "the barrier of a round",
            Self::Draining | Self::LastDrain => "the dirty pages",
            Self::Pausing => "the guest to stop",
            Self::Saving => "the guest's state",
            Self::LastPlacing(..) => "the barrier of the last round",
            Self::AwaitingReady => "Ready (the destination loads the guest's state)",
            Self::Journaling(_) | Self::Closing(_) => "the journal",
            Self::AwaitingRunning(_) | Self::InDoubt(..) => "Running (the destination starts the guest)",
            Self::RollingBack(_) => "the guest to run again",
            Self::Over => "nothing",
        }
    }
}

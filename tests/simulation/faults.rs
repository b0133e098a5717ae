//! What goes wrong, and when.

/// One thing that goes wrong. All of it heals: hosts come back, links too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    /// The process at the source is killed, with its guest.
    KillSource,
    /// The process at the destination is killed, with its guest.
    KillDestination,
    /// The control link's connection is cut, with whatever is on it; it comes back.
    CutLink,
    /// The control link is lost for good.
    LoseLink,
    /// As above, but each end notices in its own time.
    LoseLinkSilently,
    /// One data channel is cut; what is on it may still arrive until it is fenced.
    CutChannel,
    /// All data channels are cut.
    CutAllChannels,
    /// Someone cancels at the source.
    CancelAtSource,
    /// Someone cancels at the destination.
    CancelAtDestination,
    /// The next action of the source that can fail does.
    FailSource,
    /// The next action of the destination that can fail does.
    FailDestination,
    /// Time passes: whatever waits for an answer gives up waiting.
    Stall,
    /// A question about the token is lost, twice.
    LoseQuestions,
}

impl Fault {
    pub(crate) const ALL: [Self; 13] = [
        Self::KillSource,
        Self::KillDestination,
        Self::CutLink,
        Self::LoseLink,
        Self::LoseLinkSilently,
        Self::CutChannel,
        Self::CutAllChannels,
        Self::CancelAtSource,
        Self::CancelAtDestination,
        Self::FailSource,
        Self::FailDestination,
        Self::Stall,
        Self::LoseQuestions,
    ];

    /// Whether the fault, at the right step, keeps the guest from moving.
    pub(crate) fn ends_a_migration(self) -> bool {
        !matches!(self, Self::CutChannel | Self::CutLink | Self::LoseQuestions)
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct FaultAt {
    pub(crate) step: u32,
    pub(crate) fault: Fault,
}

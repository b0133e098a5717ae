//! The built-in programs that a self-checking guest runs, and what it says of itself.

use std::time::Duration;

use crate::guest::{Guest, GuestError};

/// What a built-in guest does with its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Program {
    /// Writes nothing but its heartbeat, once each page has been written.
    Idle,
    /// Writes pages all over its RAM, in a scattered order that reaches every page.
    Uniform,
    /// 90 % of the writes go to 10 % of the pages.
    Hotset,
    /// Writes page after page, round and round.
    Stream,
}

impl Program {
    /// Every program, for help texts and tests.
    pub const ALL: [Self; 4] = [Self::Idle, Self::Uniform, Self::Hotset, Self::Stream];

    /// The word for it on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Uniform => "uniform",
            Self::Hotset => "hotset",
            Self::Stream => "stream",
        }
    }
}

/// A program and its pace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgramConfig {
    /// What the guest does.
    pub program: Program,
    /// How much it dirties per second, counted in whole pages; all vCPUs together.
    pub bytes_per_second: u64,
    /// How many bytes of RAM, from the lowest page on, the program uses; the rest stays untouched. `None` is all.
    pub touch_bytes: Option<u64>,
    /// What its choices are drawn from.
    pub seed: u64,
}

/// What a guest has seen of itself, summed since its first start, over all moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SelfReport {
    /// Heartbeats; a guest that hangs gives no more.
    pub heartbeats: u64,
    /// Pages written (each write of a page counts).
    pub writes: u64,
    /// Pages whose stamp was found right when the guest looked again.
    pub verified: u64,
    /// Pages whose stamp was wrong: lost, stale or corrupt.
    pub corrupt: u64,
    /// The longest time between two looks at the clock since the last [`SelfChecking::reset_gap`]: over a move, the
    /// downtime as the guest sees it, with the resolution of its tick.
    pub longest_gap: Duration,
}

/// A guest that checks its own memory.
pub trait SelfChecking: Guest {
    /// What it has seen so far. The guest may run.
    fn report(&mut self) -> SelfReport;

    /// Has the running guest look at every page that it ever wrote, and answers what it saw.
    ///
    /// # Errors
    /// [`GuestError`] when the guest does not run or does not answer in time.
    fn verify_all(&mut self) -> Result<SelfReport, GuestError>;

    /// Forgets the longest gap.
    fn reset_gap(&mut self);

    /// Whether every page that the program uses has been written once: the state in which a move is worth measuring.
    fn warmed_up(&mut self) -> bool;

    /// What came out of the guest's serial port (or its like) since the last call.
    fn console(&mut self) -> String;

    /// The word for its kind that the destination makes the same by: `kvm`, `process`.
    fn kind_name(&self) -> &'static str;
}

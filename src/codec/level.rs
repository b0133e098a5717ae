//! Whether compression pays on a channel, and how much of it.
//!
//! [`LevelController`] does no I/O and has no clock: it is told what sending cost and says what to try next.
//!
//! Costs are seconds per byte of pages. Sending raw costs what was measured of it. A level costs about the longer of
//! compressing (which is measured on samples) and sending what is left, because the kernel sends one batch while the next is
//! compressed. A level that looks cheaper than what is done now is tried on a few batches; what these really cost decides.
//! That catches what no sample shows: a destination that takes batches apart slower than its wire brings them.
//!
//! Memory is a mixture: a part of it shrinks and another (packed files, ciphertext) does not. A batch that did not shrink says
//! nothing of its level, so it counts neither for nor against it; those that follow are probed by a sample first. A level is given
//! up when what such batches and probes take is more than [`WASTE`], or when nothing shrinks any more.
//!
//! Samples, trials that failed and looks back at raw are paid from one budget: [`BUDGET`] of all time, and [`CREDIT`] once.
//! So a channel on which compression never pays is hardly slower than one that never compresses.

/// The zstd levels that are worth having, by rising effort. Negative levels trade ratio for speed.
pub const LEVELS: [i32; 6] = [-5, -1, 1, 3, 6, 9];
/// What a batch is probed with: whether it shrinks, not how well.
pub const PROBE_LEVEL: i32 = LEVELS[0];
/// How many pages of a batch a sample takes: 16 x 4 KiB = 64 KiB, enough for matches within it and cheap (some 0.1 ms).
pub const SAMPLE_PAGES: u64 = 16;
/// The part of all sending time that may go into finding out.
pub const BUDGET: f64 = 0.02;
/// Seconds that may go into finding out before any time has passed: a few trials.
pub const CREDIT: f64 = 0.02;

/// A new measurement's weight against all before it.
const WEIGHT: f64 = 0.3;
/// How many batches are taken together.
const TALLY_BATCHES: u32 = 4;
/// How many batches a trial, or a look back at raw, takes; those of the first half flush what the buffers held.
const TRIAL_BATCHES: u32 = 2 * TALLY_BATCHES;
/// Nothing is changed for less than this gain.
const MARGIN: f64 = 0.95;
/// A level has to beat raw by this, or raw is taken: it leaves the CPU to the guest.
const KEEP: f64 = 0.97;
/// A level in use that is this near to raw is given up.
const GIVE_UP: f64 = 0.99;
/// How much of the shorter of compressing and sending does not overlap with the longer.
const SERIAL: f64 = 0.1;
/// How many batches after a trial that failed the next one may begin, at first and at most; it doubles in between.
const BACKOFF: (u64, u64) = (32, 4096);
/// How many batches a level may be used before raw is looked at again.
const LOOK_BACK: u64 = 256;
/// How near the quickest level another has to be to be taken for its lesser effort, which leaves the CPU to the guest.
const LESS_EFFORT: f64 = 1.05;
/// The part of its time that a channel may lose to batches that did not shrink.
pub const WASTE: f64 = 0.03;
/// A new batch's weight in that part.
const WASTE_WEIGHT: f64 = 0.03;
/// How many batches are probed after one that did not shrink.
const WARY: u32 = 32;
/// After so many batches in a row that did not shrink, nothing is expected to.
const HOPELESS: u32 = 64;
/// What a level costs per byte while nothing is known: 100 MB/s, slower than level 6 is anywhere.
const UNKNOWN_COST: f64 = 1e-8;

use tally::{Average, Tally, Unshrunk};

/// How to send a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Choice {
    /// As it is.
    Raw,
    /// Compressed with one of [`LEVELS`].
    Level(i32),
}

/// What to do with the next batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// How to send it.
    pub choice: Choice,
    /// Before that, compress a sample of at most [`SAMPLE_PAGES`] of it with this level, tell
    /// [`LevelController::sampled`], and throw the result away.
    pub sample: Option<i32>,
    /// Before compressing, see by a sample with [`PROBE_LEVEL`] whether the batch shrinks, and send it raw if it does not. It
    /// is a part of what compressing takes.
    pub probe: bool,
}

/// What a compressed sample showed.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// The level of the plan.
    pub level: i32,
    /// Bytes of its pages.
    pub page_bytes: u64,
    /// What they became; as many as `page_bytes` when they did not shrink.
    pub packed_bytes: u64,
    /// How long it took.
    pub seconds: f64,
}

impl Sample {
    /// Whether its pages became fewer bytes.
    #[must_use]
    pub fn shrank(&self) -> bool {
        self.packed_bytes < self.page_bytes
    }
}

/// What a batch cost.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// The choice of the plan, also when the batch did not shrink and went raw.
    pub choice: Choice,
    /// Bytes of its pages.
    pub page_bytes: u64,
    /// Bytes that went out.
    pub wire_bytes: u64,
    /// How long compressing took.
    pub compress_seconds: f64,
    /// How long all of it took, from taking the batch to having handed over its last byte, waiting for a rate cap included.
    pub seconds: f64,
    /// Bytes that left the socket's buffer meanwhile (for the peer's), or `None` where the wire cannot tell.
    pub drained_bytes: Option<u64>,
}

/// What is known of a level.
#[derive(Clone, Copy, Debug, Default)]
struct Arm {
    /// Seconds to compress a byte.
    compress: Average,
    /// Bytes left of a byte.
    ratio: Average,
    /// Seconds per byte, all in all; forgotten when it is old.
    measured: Average,
}

impl Arm {
    /// What the level costs when raw costs `raw`; `None` without a sample.
    fn expected(&self, raw: f64) -> Option<f64> {
        if self.measured.0.is_some() {
            return self.measured.0;
        }
        let (compress, send) = (self.compress.0?, self.ratio.0? * raw);
        Some(compress.max(send) + SERIAL * compress.min(send))
    }

    /// What a trial loses per byte if things go badly: from raw, nothing overlaps and the destination needs half as long to
    /// take the batch apart; from another level, what it is worse in is not made up for by what it is better in.
    fn regret(&self, raw: f64, in_use: Option<&Self>) -> f64 {
        let (compress, ratio) = (self.compress_cost(), self.ratio.0.unwrap_or(1.0));
        match in_use {
            None => (compress * 1.5 + ratio * raw - raw).max(compress / 4.0),
            Some(other) => {
                let more_left = ratio - other.ratio.0.unwrap_or(0.0);
                (compress - other.compress_cost()).max(0.0) + more_left.max(0.0) * raw
            }
        }
    }

    fn compress_cost(&self) -> f64 {
        self.compress.0.unwrap_or(UNKNOWN_COST)
    }
}

/// What the controller is doing.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    /// Using a choice that has proven itself.
    Settled,
    /// Finding out what the current choice costs, which is not yet proven; `then` is what to go back to.
    Trying { batches: u32, then: Choice },
}

/// Decides for one channel. Ask [`LevelController::plan`] before each batch, and tell it everything that it asks for.
#[derive(Clone, Debug)]
pub struct LevelController {
    raw: Average,
    arms: [Arm; LEVELS.len()],
    choice: Choice,
    phase: Phase,
    tally: Tally,
    batches: u64,
    /// No trial before this many batches.
    next_trial: u64,
    backoff: u64,
    next_look_back: u64,
    /// The level whose sample is due next.
    next_sample: usize,
    unshrunk: Unshrunk,
    /// Seconds in all, and of them those spent on finding out.
    total: f64,
    spent: f64,
}

impl Default for LevelController {
    fn default() -> Self {
        Self::new()
    }
}

impl LevelController {
    /// Begins with raw.
    #[must_use]
    pub fn new() -> Self {
        Self {
            raw: Average::default(),
            arms: [Arm::default(); LEVELS.len()],
            choice: Choice::Raw,
            phase: Phase::Settled,
            tally: Tally::default(),
            batches: 0,
            next_trial: 0,
            backoff: BACKOFF.0,
            next_look_back: LOOK_BACK,
            next_sample: 0,
            unshrunk: Unshrunk::default(),
            total: 0.0,
            spent: 0.0,
        }
    }

    /// What is in use now.
    #[must_use]
    pub fn choice(&self) -> Choice {
        self.choice
    }

    /// What to do with the next batch, of `page_bytes`.
    pub fn plan(&mut self, page_bytes: u64) -> Plan {
        if self.phase == Phase::Settled {
            self.reconsider(page_bytes);
        }
        let sample =
            (self.phase == Phase::Settled && self.raw.0.is_some()).then(|| self.due_sample(page_bytes));
        Plan { choice: self.choice, sample: sample.flatten(), probe: self.unshrunk.wary > 0 }
    }

    /// What the sample of the last plan showed.
    pub fn sampled(&mut self, sample: Sample) {
        self.spent += sample.seconds;
        self.total += sample.seconds;
        let Some(arm) = arm_of(sample.level).map(|index| &mut self.arms[index]) else { return };
        let bytes = sample.page_bytes.max(1) as f64;
        arm.compress.add(sample.seconds / bytes);
        arm.ratio.add(sample.packed_bytes as f64 / bytes);
    }

    /// What the batch of the last plan cost.
    pub fn sent(&mut self, sent: Sent) {
        self.batches += 1;
        self.total += sent.seconds;
        if sent.choice != Choice::Raw && self.has_not_shrunk(&sent) {
            return;
        }
        if let Choice::Level(level) = sent.choice
            && let Some(arm) = arm_of(level).map(|index| &mut self.arms[index])
        {
            let bytes = sent.page_bytes.max(1) as f64;
            arm.compress.add(sent.compress_seconds / bytes);
            arm.ratio.add(sent.wire_bytes as f64 / bytes);
        }
        self.tally.add(&sent);
        match self.phase {
            Phase::Trying { batches, then } => self.tried(batches + 1, then),
            Phase::Settled => self.settled(),
        }
    }

    /// Counts a batch that was to be compressed; answers whether it went raw, which says nothing of the level.
    fn has_not_shrunk(&mut self, sent: &Sent) -> bool {
        let raw = sent.wire_bytes >= sent.page_bytes;
        self.unshrunk.count(if raw { sent.compress_seconds } else { 0.0 }, sent.seconds);
        if !raw {
            self.unshrunk.row = 0;
            self.unshrunk.wary = self.unshrunk.wary.saturating_sub(1);
            return false;
        }
        self.unshrunk.row += 1;
        self.unshrunk.wary = WARY;
        let most = match self.phase {
            Phase::Trying { then, .. } => {
                self.spent += sent.compress_seconds;
                if then == Choice::Raw { TRIAL_BATCHES } else { HOPELESS }
            }
            Phase::Settled => HOPELESS,
        };
        if self.unshrunk.waste() > WASTE || self.unshrunk.row >= most {
            self.phase = Phase::Settled;
            self.give_up();
            self.backoff = (self.backoff * 2).min(BACKOFF.1);
        }
        true
    }

    /// Back to raw. What was measured of other levels was of another time too.
    fn give_up(&mut self) {
        self.choice = Choice::Raw;
        self.unshrunk = Unshrunk::default();
        self.tally = Tally::default();
        self.forget();
        self.next_trial = self.batches + self.backoff;
    }

    /// Looks for something cheaper than what is done now.
    fn reconsider(&mut self, page_bytes: u64) {
        let Some(raw) = self.raw.0 else { return };
        if self.batches < self.next_trial {
            return;
        }
        let current = match self.choice {
            Choice::Raw => Some(raw),
            Choice::Level(level) => arm_of(level).and_then(|index| self.arms[index].expected(raw)),
        };
        let Some(current) = current else { return };
        let trial_bytes = (page_bytes * u64::from(TRIAL_BATCHES)) as f64;
        if let Choice::Level(_) = self.choice
            && self.batches >= self.next_look_back
            && self.affordable((raw - current).max(0.0) * trial_bytes)
        {
            self.next_look_back = self.batches + LOOK_BACK;
            self.start(Choice::Raw);
            return;
        }
        let in_use = match self.choice {
            Choice::Raw => None,
            Choice::Level(level) => arm_of(level).map(|index| &self.arms[index]),
        };
        let others = || {
            let not_in_use =
                self.arms.iter().zip(LEVELS).filter(|(_, level)| self.choice != Choice::Level(*level));
            not_in_use.filter_map(|(arm, level)| Some((arm.expected(raw)?, arm.regret(raw, in_use), level)))
        };
        let quickest = others().map(|(expected, ..)| expected).fold(f64::INFINITY, f64::min);
        // The least effort of those that are about as quick.
        let best = others().find(|(expected, ..)| *expected <= quickest * LESS_EFFORT);
        if let Some((expected, regret, level)) = best
            && expected < current * MARGIN
            && (in_use.is_none() || self.choice > Choice::Level(level) || expected * LESS_EFFORT < current)
            && self.affordable(regret * trial_bytes)
        {
            self.start(Choice::Level(level));
        }
    }

    fn start(&mut self, choice: Choice) {
        self.phase = Phase::Trying { batches: 0, then: self.choice };
        self.choice = choice;
        self.tally = Tally::default();
        if let Choice::Level(level) = choice
            && let Some(index) = arm_of(level)
        {
            self.arms[index].measured = Average::default();
        }
    }

    fn tried(&mut self, batches: u32, then: Choice) {
        let before = match then {
            Choice::Raw => self.raw.0,
            Choice::Level(level) => arm_of(level).and_then(|index| self.arms[index].measured.0),
        };
        let before = before.or(self.raw.0).unwrap_or(f64::INFINITY);
        self.phase = Phase::Trying { batches, then };
        if self.tally.batches < TALLY_BATCHES {
            return;
        }
        let tally = std::mem::take(&mut self.tally);
        let cost = tally.cost();
        if let Some(cost) = cost
            && before.is_finite()
        {
            self.spent += (cost - before).max(0.0) * tally.page_bytes;
        }
        if batches < TRIAL_BATCHES && cost.is_none_or(|cost| cost < 3.0 * before) {
            return;
        }
        if let Some(cost) = cost {
            if self.choice == Choice::Raw {
                // What was known of raw is as old as the last look back.
                self.raw = Average::default();
            }
            self.learn(self.choice, cost);
        }
        self.phase = Phase::Settled;
        let tried = self.choice;
        self.choose_of(tried, then);
        if tried == Choice::Raw && self.choice != tried {
            // A look back that confirmed the level in use.
            self.next_look_back = self.batches + LOOK_BACK;
        } else if self.choice == tried {
            self.backoff = BACKOFF.0;
            self.next_look_back = self.batches + LOOK_BACK;
        } else {
            self.next_trial = self.batches + self.backoff;
            self.backoff = (self.backoff * 2).min(BACKOFF.1);
        }
    }

    /// After a trial: the cheaper of the two, raw when it is as good.
    fn choose_of(&mut self, tried: Choice, before: Choice) {
        let raw = self.raw.0.unwrap_or(f64::INFINITY);
        let cost = |choice: Choice| match choice {
            Choice::Raw => raw * KEEP,
            Choice::Level(level) => {
                arm_of(level).and_then(|index| self.arms[index].measured.0).unwrap_or(f64::INFINITY)
            }
        };
        let winner = if cost(tried) < cost(before) { tried } else { before };
        self.choice = if cost(winner) < raw * KEEP { winner } else { Choice::Raw };
    }

    fn settled(&mut self) {
        if self.tally.batches < TALLY_BATCHES {
            return;
        }
        let Some(cost) = std::mem::take(&mut self.tally).cost() else { return };
        self.learn(self.choice, cost);
        if let Choice::Level(level) = self.choice
            && let Some(raw) = self.raw.0
            && let Some(index) = arm_of(level)
            && self.arms[index].measured.0.is_some_and(|measured| measured > raw * GIVE_UP)
        {
            // The data, the wire or the CPU changed.
            self.give_up();
        }
        if self.batches.is_multiple_of(LOOK_BACK) {
            self.forget();
        }
    }

    fn learn(&mut self, choice: Choice, cost: f64) {
        match choice {
            Choice::Raw => self.raw.add(cost),
            Choice::Level(level) => {
                if let Some(index) = arm_of(level) {
                    self.arms[index].measured.add(cost);
                }
            }
        }
    }

    /// Drops what was measured of the levels that are not in use.
    fn forget(&mut self) {
        for (arm, level) in self.arms.iter_mut().zip(LEVELS) {
            if self.choice != Choice::Level(level) {
                arm.measured = Average::default();
            }
        }
    }

    fn due_sample(&mut self, page_bytes: u64) -> Option<i32> {
        let index = self.next_sample;
        let bytes = page_bytes.min(SAMPLE_PAGES * crate::units::PAGE_SIZE) as f64;
        // Samples may take half of the budget, or nothing would ever be left for a trial.
        if !self.affordable(2.0 * self.arms[index].compress_cost() * bytes + self.spent) {
            return None;
        }
        self.next_sample = (index + 1) % LEVELS.len();
        Some(LEVELS[index])
    }

    fn affordable(&self, seconds: f64) -> bool {
        self.spent + seconds <= CREDIT + BUDGET * self.total
    }
}

fn arm_of(level: i32) -> Option<usize> {
    LEVELS.iter().position(|&known| known == level)
}

mod tally;
#[cfg(test)]
mod tests;

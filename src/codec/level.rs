//! Whether compression pays on a channel, and how much of it.
//!
//! [`LevelController`] does no I/O and has no clock: it is told what sending cost and says what to do next.
//!
//! A wire and a processor work at the same time: while the wire takes what waits in the socket's buffer, the next batch can be
//! compressed for nothing. So a batch is compressed if what waits keeps the wire busy meanwhile, and goes as it is when the
//! wire would have to wait. Where the processor is the slower of both this mixes raw and compressed batches so that neither is ever
//! idle, which is the most that can be had of them together; a fast wire, which empties the buffer at once, gets everything raw but what
//! shrinks to next to nothing. The longer the queue, the more effort a batch may take.
//!
//! What compressing costs and leaves is known from samples and from the batches themselves. What it saves of the wire has to be
//! [`WORTH`] its time, which is the guest's too.
//!
//! Memory is a mixture: a part of it shrinks and another (packed files, ciphertext) does not. A batch that did not shrink says
//! nothing of its level; those that follow are probed by a sample first, and when nothing shrinks any more, ever fewer of them.
//!
//! A destination that takes batches apart slower than its wire brings them also makes a long queue. So each [`WINDOW`] batches are
//! looked at together: where they were compressed and cost more than raw ones would at the wire's best, compression rests for a while.
//! The wire's best is that of late, so now and then some batches go raw to see it.

/// The zstd levels that are worth having, by rising effort. Negative levels trade ratio for speed.
pub const LEVELS: [i32; 6] = [-5, -1, 1, 3, 6, 9];
/// What a batch is probed with: whether it shrinks, not how well.
pub const PROBE_LEVEL: i32 = LEVELS[0];
/// How many pages of a batch a sample takes: 16 x 4 KiB = 64 KiB, enough for matches within it and cheap (some 0.1 ms).
pub const SAMPLE_PAGES: u64 = 16;
const SAMPLE_BYTES: u64 = SAMPLE_PAGES * crate::units::PAGE_SIZE;
/// The part of all sending time that may go into finding out.
pub const BUDGET: f64 = 0.01;
/// Seconds that may go into finding out before any time has passed: a few samples.
pub const CREDIT: f64 = 0.002;
/// Seconds of the wire that a second of compressing has to save. Below it the gain is less than this part, for a whole processor.
pub const WORTH: f64 = 0.5;

/// A new measurement's weight against all before it.
const WEIGHT: f64 = 0.3;
/// How many batches are compared together.
const WINDOW: u32 = 8;
/// Compression rests when it costs so many times what raw takes at the wire's best.
const TOO_MUCH: f64 = 1.05;
/// By how much a batch that cannot be hidden behind what waits has to be sooner than raw.
const SOONER: f64 = 0.9;
/// Over how many batches the queue may be brought back to half of what it was at its longest.
const BATCHES_TO_EVEN_OUT: f64 = 8.0;
/// How many batches compression rests after it was no gain, at first and at most; four times as many in between.
const REST: (u64, u64) = (32, 4096);
/// How many batches may be compressed before raw is looked at again.
const LOOK_BACK: u64 = 256;
/// How many batches are between two samples, at least and at most; twice as many in between while nothing pays.
const SAMPLE_EVERY: (u64, u64) = (8, 256);
/// The same while none has shrunk.
const SAMPLE_IN_VAIN: u64 = 32;
/// How many batches are probed after one that did not shrink.
const WARY: u32 = 32;
/// After so many batches in a row that did not shrink, the next are not all looked at, but one in a growing number
const PATIENT: u32 = 16;
/// which is at most this.
const GLANCE: u32 = 32;
/// What a level costs per byte while nothing is known: 100 MB/s, slower than level 6 is anywhere.
const UNKNOWN_COST: f64 = 1e-8;

use measured::{Average, Factor, Rate, Window};

/// How to send a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Choice {
    /// As it is.
    Raw,
    /// Compressed with one of [`LEVELS`].
    Level(i32),
}

/// What a channel has before it when it takes a batch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Queued {
    /// Bytes that the socket's buffer holds; `None` where the wire cannot tell.
    pub bytes: Option<u64>,
    /// How long a cap on the rate held the channel back after its last batch, in seconds.
    pub held_seconds: f64,
    /// How many channels share the wire: what one saves of its time is the gain of all.
    pub sharing: usize,
}

/// What to do with the next batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// How to send it.
    pub choice: Choice,
    /// Before that, compress a sample of at most [`SAMPLE_PAGES`] of it with each of these levels, tell
    /// [`LevelController::sampled`], and throw the results away.
    pub sample: &'static [i32],
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
    /// How long it kept the processor, in seconds.
    pub seconds: f64,
    /// The same with what was needed to make the level ready.
    pub spent_seconds: f64,
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
    /// How long all of it took, from having sent the batch before to having handed over its last byte, waiting for a rate cap
    /// included and a sample not.
    pub seconds: f64,
    /// Bytes that left the socket's buffer meanwhile (for the peer's), or `None` where the wire cannot tell.
    pub drained_bytes: Option<u64>,
    /// Bytes that the wire took while it had any, and in how long.
    pub taken: (u64, f64),
}

/// What samples show of a level, by what the level below it (for the lowest, leaving the pages as they are) made of the same pages.
#[derive(Clone, Copy, Debug, Default)]
struct Arm {
    /// Seconds of a processor; for the lowest level, per byte.
    compress: Factor,
    /// Bytes left.
    ratio: Factor,
}

/// Decides for one channel. Ask [`LevelController::plan`] before each batch, and tell it everything that it asks for.
#[derive(Clone, Debug)]
pub struct LevelController {
    wire: Rate,
    arms: [Arm; LEVELS.len()],
    /// The sample before.
    below: Option<Sample>,
    /// How much longer compressing a batch takes than samples of its level keep the processor, and how much more it leaves.
    longer: Factor,
    larger: Factor,
    choice: Choice,
    /// How many channels share the wire.
    sharing: f64,
    /// The most bytes that waited at once.
    room: u64,
    window: Window,
    /// Seconds per byte of pages in windows of compressed batches.
    packed: Average,
    batches: u64,
    /// The batch at which raw was measured last.
    raw_at: u64,
    /// Nothing is compressed before this batch.
    rests_until: u64,
    rest: u64,
    /// When a sample is due, and after how many batches another.
    sample_at: u64,
    sample_every: u64,
    /// Batches in a row that did not shrink.
    unshrunk: u32,
    /// How many batches more are probed, since one did not shrink a short while ago.
    wary: u32,
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
            wire: Rate::default(),
            arms: [Arm::default(); LEVELS.len()],
            below: None,
            longer: Factor::default(),
            larger: Factor::default(),
            choice: Choice::Raw,
            sharing: 1.0,
            room: 0,
            window: Window::default(),
            packed: Average::default(),
            batches: 0,
            raw_at: 0,
            rests_until: 0,
            rest: REST.0,
            sample_at: 0,
            sample_every: 1,
            unshrunk: 0,
            wary: 0,
            total: 0.0,
            spent: 0.0,
        }
    }

    /// What the last batch was planned to be.
    #[must_use]
    pub fn choice(&self) -> Choice {
        self.choice
    }

    /// What to do with the next batch, of `page_bytes`, when so much waits before it.
    pub fn plan(&mut self, page_bytes: u64, queued: Queued) -> Plan {
        self.choice = Choice::Raw;
        let waits = queued.bytes.unwrap_or(0);
        self.room = self.room.max(waits);
        self.sharing = queued.sharing.max(1) as f64;
        let Some(wire) = self.wire.seconds_per_byte() else {
            // What a sample takes is also time in which the wire shows how fast it is.
            let sample = if waits > 0 { self.first_sample() } else { &[] };
            return Plan { choice: Choice::Raw, sample, probe: false };
        };
        let ahead = waits as f64 * wire + queued.held_seconds;
        let longest = self.room as f64 * wire + queued.held_seconds;
        self.look_back(page_bytes, wire);
        let sample = self.due_sample(page_bytes, ahead, longest, wire);
        if self.batches >= self.rests_until && self.glances() {
            self.choice = self.choose(page_bytes, ahead, longest, wire);
        }
        Plan { choice: self.choice, sample, probe: self.wary > 0 }
    }

    /// What the sample of the last plan showed.
    pub fn sampled(&mut self, sample: Sample) {
        self.spent += sample.spent_seconds;
        self.total += sample.spent_seconds;
        let below = self.below.replace(sample);
        let Some(index) = arm_of(sample.level) else { return };
        let below = match index.checked_sub(1) {
            None => Some((sample.page_bytes as f64, sample.page_bytes as f64)),
            Some(index) => below
                .filter(|below| arm_of(below.level) == Some(index) && below.shrank())
                .map(|below| (below.seconds, below.packed_bytes as f64)),
        };
        // Pages that do not shrink say nothing of those that do.
        if let Some((seconds, bytes)) = below.filter(|_| sample.shrank()) {
            self.arms[index].compress.add(sample.seconds, seconds);
            self.arms[index].ratio.add(sample.packed_bytes as f64, bytes);
        }
        if sample.level == LEVELS[0] {
            // What batches came to is of another time by and by.
            self.longer.fade();
            self.larger.fade();
        }
    }

    /// What the batch of the last plan cost.
    pub fn sent(&mut self, sent: Sent) {
        self.batches += 1;
        self.total += sent.seconds;
        self.wire.add(sent.taken);
        if let Choice::Level(level) = sent.choice {
            self.learn(level, &sent);
        }
        self.window.add(&sent);
        if self.window.batches >= WINDOW {
            self.compare();
        }
    }

    /// Takes in what a batch that was to be compressed shows of its level.
    fn learn(&mut self, level: i32, sent: &Sent) {
        if sent.wire_bytes >= sent.page_bytes {
            self.unshrunk += 1;
            self.wary = WARY;
            return;
        }
        self.unshrunk = 0;
        self.wary = self.wary.saturating_sub(1);
        let Some((cost, ratio)) = arm_of(level).and_then(|index| self.known().nth(index)) else { return };
        let bytes = sent.page_bytes.max(1) as f64;
        self.longer.add(sent.compress_seconds, cost * bytes);
        self.larger.add(sent.wire_bytes as f64, ratio * bytes);
    }

    /// What is known of the levels, from the lowest: seconds of a processor to compress a byte, and bytes left of it.
    fn known(&self) -> impl Iterator<Item = (f64, f64)> {
        self.arms.iter().scan((1.0, 1.0), |(cost, left), arm| {
            *cost *= arm.compress.value()?;
            *left *= arm.ratio.value()?;
            Some((*cost, *left))
        })
    }

    /// The most effort that keeps the wire busy and is worth its time.
    fn choose(&self, page_bytes: u64, ahead: f64, longest: f64, wire: f64) -> Choice {
        let bytes = page_bytes as f64;
        let raw_send = bytes * wire;
        // To half of the longest queue it is brought back slowly, so that the effort hardly changes from batch to batch.
        let too_long = (ahead - longest / 2.0) / BATCHES_TO_EVEN_OUT;
        // A buffer that cannot hold a batch is no measure: the wire waits for whatever is compressed.
        let small = self.room < page_bytes;
        let (longer, larger) = (self.longer.value().unwrap_or(1.0), self.larger.value().unwrap_or(1.0));
        let mut best = (Choice::Raw, 0.0, raw_send);
        for ((cost, ratio), level) in self.known().zip(LEVELS) {
            let (compress, send) = (cost * longer * bytes, ratio * larger * raw_send);
            let hidden = best.0 == Choice::Raw && compress <= ahead;
            let keeps_up = small || hidden || compress - send <= too_long;
            let sooner = (compress - ahead).max(0.0) + send < SOONER * raw_send;
            let (_, less_compress, more_send) = best;
            if keeps_up && sooner && (more_send - send) / self.sharing > WORTH * (compress - less_compress) {
                best = (Choice::Level(level), compress, send);
            }
        }
        best.0
    }

    /// Whether the next batch is looked at, although the last ones may not have shrunk.
    fn glances(&self) -> bool {
        if self.unshrunk < PATIENT {
            return true;
        }
        let every = ((self.unshrunk - PATIENT) / 4 + 1).min(GLANCE);
        self.batches.is_multiple_of(u64::from(every))
    }

    /// After a window of batches: were those that were compressed worth it?
    fn compare(&mut self) {
        let window = std::mem::take(&mut self.window);
        let Some(wire) = self.wire.seconds_per_byte() else { return };
        if window.tried == 0 {
            self.raw_at = self.batches;
        } else if window.packed * 2 >= window.batches
            && let Some(cost) = window.cost(wire)
        {
            self.packed.add(cost);
            if self.packed.0 > Some(wire * TOO_MUCH) {
                self.packed = Average::default();
                self.rests_until = self.batches + self.rest;
                self.rest = (self.rest * 4).min(REST.1);
            } else {
                self.rest = REST.0;
            }
        }
    }

    /// Has some batches go raw when it is long ago that any did, where that costs little.
    fn look_back(&mut self, page_bytes: u64, wire: f64) {
        let Some(packed) = self.packed.0 else { return };
        let batches = u64::from(2 * WINDOW);
        let lost = (wire - packed).max(0.0) * (page_bytes * batches) as f64;
        if self.batches >= self.raw_at + LOOK_BACK
            && self.batches >= self.rests_until
            && self.affordable(lost)
        {
            self.spent += lost;
            self.rests_until = self.batches + batches;
            self.raw_at = self.batches;
        }
    }

    /// The levels up to the one above the most that can be of use, when a sample is due.
    fn due_sample(&mut self, page_bytes: u64, ahead: f64, longest: f64, wire: f64) -> &'static [i32] {
        if self.batches < self.sample_at {
            return &[];
        }
        let of_use = self.choose(page_bytes, longest, longest, wire);
        let tried = self.known().count();
        let levels = match of_use {
            Choice::Raw => 1,
            Choice::Level(level) => arm_of(level).map_or(1, |index| index + 2).min(LEVELS.len()),
        };
        let costs = self.known().map(|(cost, _)| cost).chain(std::iter::repeat(UNKNOWN_COST));
        let seconds = costs.take(levels).sum::<f64>() * page_bytes.min(SAMPLE_BYTES) as f64;
        // What the wire does not wait for is free.
        if seconds > ahead / 8.0 && !self.affordable(seconds) {
            return &[];
        }
        self.sample_every = match of_use {
            // Perhaps only because none has shrunk yet.
            Choice::Raw if tried == 0 => (self.sample_every * 2).min(SAMPLE_IN_VAIN),
            Choice::Raw => (self.sample_every * 2).min(SAMPLE_EVERY.1),
            Choice::Level(_) if levels > tried => 1,
            Choice::Level(_) => SAMPLE_EVERY.0,
        };
        self.sample_at = self.batches + self.sample_every;
        &LEVELS[..levels]
    }

    fn first_sample(&mut self) -> &'static [i32] {
        if self.sample_at > 0 {
            return &[];
        }
        self.sample_at = self.batches + 1;
        &LEVELS[..1]
    }

    fn affordable(&self, seconds: f64) -> bool {
        self.spent + seconds <= CREDIT + BUDGET * self.total
    }
}

fn arm_of(level: i32) -> Option<usize> {
    LEVELS.iter().position(|&known| known == level)
}

mod measured;
#[cfg(test)]
mod tests;

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
//! What compressing costs and leaves is known from samples and from the batches themselves, of all channels of a session
//! ([`Findings`]). What it saves of the wire has to be [`WORTH`] its time, and what more effort saves [`MORE_WORTH`]: a processor is the
//! guest's too.
//!
//! Memory is a mixture: a part of it shrinks and another (packed files, ciphertext) does not. A batch that did not shrink says
//! nothing of its level; those that follow are probed by a sample first, and when nothing shrinks any more, ever fewer of them.
//!
//! A destination that takes batches apart slower than its wire brings them also makes a long queue. So each [`WINDOW`] batches are
//! looked at together: where they were compressed and cost more than raw ones would at the wire's best, compression rests for a while.
//! The wire's best is that of late, so now and then some batches go raw to see it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use levels::Levels;
use measured::{Average, Rate, Window};

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
/// The same for each level above the first, of what it takes and saves more: the higher, the less there is to gain.
pub const MORE_WORTH: f64 = 1.0;

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
const SAMPLE_EVERY: (u64, u64) = (32, 256);
/// The same while nothing pays, but the wire does not wait for a sample.
const SAMPLE_HIDDEN: u64 = 8;
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
    /// How long it kept the processor.
    pub compress_cpu_seconds: f64,
    /// How long all of it took, from having sent the batch before to having handed over its last byte, waiting for a rate cap
    /// included and a sample not.
    pub seconds: f64,
    /// Bytes that left the socket's buffer meanwhile (for the peer's), or `None` where the wire cannot tell.
    pub drained_bytes: Option<u64>,
    /// What the wire took of this channel while it had any.
    pub taken: Taken,
}

/// Bytes that a wire took, and when, in seconds since any moment that is the same for all channels on it.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    /// Bytes.
    pub bytes: u64,
    /// Since when it had any.
    pub from: f64,
    /// When it was looked how many it had taken.
    pub until: f64,
}

/// What channels find out together: what levels come to, which is the same for all of a session, and how fast a wire is that some of
/// them share.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    levels: Arc<Mutex<Levels>>,
    wire: Arc<Mutex<Rate>>,
}

impl Findings {
    /// For channels of the same session on another wire.
    #[must_use]
    pub fn of_another_wire(&self) -> Self {
        Self { levels: Arc::clone(&self.levels), wire: Arc::default() }
    }

    fn levels(&self) -> MutexGuard<'_, Levels> {
        self.levels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wire(&self) -> MutexGuard<'_, Rate> {
        self.wire.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Decides for one channel. Ask [`LevelController::plan`] before each batch, and tell it everything that it asks for.
#[derive(Debug)]
pub struct LevelController {
    findings: Findings,
    /// The sample before.
    below: Option<Sample>,
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
    /// Batches in a row that did not shrink.
    unshrunk: u32,
    /// How many batches more are probed, since one did not shrink a short while ago.
    wary: u32,
}

impl LevelController {
    /// Begins with raw.
    #[must_use]
    pub fn new(findings: Findings) -> Self {
        Self {
            findings,
            below: None,
            choice: Choice::Raw,
            sharing: 1.0,
            room: 0,
            window: Window::default(),
            packed: Average::default(),
            batches: 0,
            raw_at: 0,
            rests_until: 0,
            rest: REST.0,
            unshrunk: 0,
            wary: 0,
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
        let findings = self.findings.clone();
        let wire = self.seconds_per_byte();
        let mut levels = findings.levels();
        let Some(wire) = wire else {
            // What a sample takes is also time in which the wire shows how fast it is.
            let sample = if waits > 0 { levels.first_sample() } else { &[] };
            return Plan { choice: Choice::Raw, sample, probe: false };
        };
        let ahead = waits as f64 * wire + queued.held_seconds;
        let longest = self.room as f64 * wire + queued.held_seconds;
        self.look_back(&mut levels, page_bytes, wire);
        let of_use = self.choose(&levels, page_bytes, longest, longest, wire);
        let sample = levels.due_sample(of_use, page_bytes, ahead);
        if self.batches >= self.rests_until && self.glances() {
            self.choice = self.choose(&levels, page_bytes, ahead, longest, wire);
        }
        Plan { choice: self.choice, sample, probe: self.wary > 0 }
    }

    /// How long the wire takes for a byte of this channel, while the others that share it send as well.
    fn seconds_per_byte(&self) -> Option<f64> {
        self.findings.wire().seconds_per_byte().map(|wire| wire * self.sharing)
    }

    /// What the sample of the last plan showed.
    pub fn sampled(&mut self, sample: Sample) {
        let before = self.below.replace(sample);
        self.findings.levels().sampled(sample, before);
    }

    /// What the batch of the last plan cost.
    pub fn sent(&mut self, sent: Sent) {
        self.batches += 1;
        self.findings.wire().add(sent.taken, self.sharing);
        let findings = self.findings.clone();
        let mut levels = findings.levels();
        levels.sent(sent.seconds);
        if let Choice::Level(level) = sent.choice {
            self.learn(&mut levels, level, &sent);
        }
        drop(levels);
        self.window.add(&sent);
        if self.window.batches >= WINDOW {
            self.compare();
        }
    }

    /// Takes in what a batch that was to be compressed shows.
    fn learn(&mut self, levels: &mut Levels, level: i32, sent: &Sent) {
        if sent.wire_bytes >= sent.page_bytes {
            self.unshrunk += 1;
            self.wary = WARY;
            return;
        }
        self.unshrunk = 0;
        self.wary = self.wary.saturating_sub(1);
        levels.shrank(level, sent);
    }

    /// The most effort that keeps the wire busy and is worth its time.
    fn choose(&self, levels: &Levels, page_bytes: u64, ahead: f64, longest: f64, wire: f64) -> Choice {
        let bytes = page_bytes as f64;
        let raw_send = bytes * wire;
        // To half of the longest queue it is brought back slowly, so that the effort hardly changes from batch to batch.
        let too_long = (ahead - longest / 2.0) / BATCHES_TO_EVEN_OUT;
        // A buffer that cannot hold a batch is no measure: the wire waits for whatever is compressed.
        let small = self.room < page_bytes;
        let mut best = (Choice::Raw, 0.0, raw_send);
        for (expected, level) in levels.of_batches().zip(LEVELS) {
            let (cpu, compress, send) =
                (expected.cpu * bytes, expected.seconds * bytes, expected.left * raw_send);
            let hidden = best.0 == Choice::Raw && compress <= ahead;
            let keeps_up = small || hidden || compress - send <= too_long;
            let sooner = (compress - ahead).max(0.0) + send < SOONER * raw_send;
            let (_, less_cpu, more_send) = best;
            let worth = if best.0 == Choice::Raw { WORTH } else { MORE_WORTH };
            if keeps_up && sooner && (more_send - send) / self.sharing > worth * (cpu - less_cpu) {
                best = (Choice::Level(level), cpu, send);
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
        let Some(wire) = self.seconds_per_byte() else { return };
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
    fn look_back(&mut self, levels: &mut Levels, page_bytes: u64, wire: f64) {
        let Some(packed) = self.packed.0 else { return };
        let batches = u64::from(2 * WINDOW);
        let lost = (wire - packed).max(0.0) * (page_bytes * batches) as f64;
        if self.batches >= self.raw_at + LOOK_BACK
            && self.batches >= self.rests_until
            && levels.affordable(lost)
        {
            levels.spend(lost);
            self.rests_until = self.batches + batches;
            self.raw_at = self.batches;
        }
    }
}

fn arm_of(level: i32) -> Option<usize> {
    LEVELS.iter().position(|&known| known == level)
}

mod levels;
mod measured;
#[cfg(test)]
mod tests;

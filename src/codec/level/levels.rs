//! What is known of the levels, by samples and by the batches of all channels of a session.

use super::measured::Factor;
use super::{
    BUDGET, CREDIT, Choice, LEVELS, SAMPLE_BYTES, SAMPLE_EVERY, SAMPLE_HIDDEN, SAMPLE_IN_VAIN, Sample, Sent,
    UNKNOWN_COST, arm_of,
};

/// So many times what was expected is as much as a batch is believed: after that it is something else that takes the time.
const UNUSUAL: f64 = 4.0;

/// What samples show of a level, by what the level below it (for the lowest, leaving the pages as they are) made of the same pages.
#[derive(Clone, Copy, Debug, Default)]
struct Arm {
    /// Seconds of a processor; for the lowest level, per byte.
    compress: Factor,
    /// Bytes left.
    ratio: Factor,
}

/// What a level makes of a byte of a batch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Expected {
    /// Seconds that it keeps a processor.
    pub(super) cpu: f64,
    /// Seconds that it takes.
    pub(super) seconds: f64,
    /// Bytes left.
    pub(super) left: f64,
}

#[derive(Debug, Default)]
pub(super) struct Levels {
    arms: [Arm; LEVELS.len()],
    /// How much more of the processor compressing a batch takes than samples of its level, how much longer it takes, and how much more
    /// it leaves.
    dearer: Factor,
    longer: Factor,
    larger: Factor,
    batches: u64,
    /// When a sample is due, and after how many batches another.
    sample_at: u64,
    sample_every: u64,
    /// Seconds in all, and of them those spent on finding out.
    total: f64,
    spent: f64,
}

impl Levels {
    /// What samples say, from the lowest level: seconds of a processor to compress a byte, and bytes left of it.
    fn known(&self) -> impl Iterator<Item = (f64, f64)> {
        self.arms.iter().scan((1.0, 1.0), |(cost, left), arm| {
            *cost *= arm.compress.value()?;
            *left *= arm.ratio.value()?;
            Some((*cost, *left))
        })
    }

    /// What is to be expected of whole batches.
    pub(super) fn of_batches(&self) -> impl Iterator<Item = Expected> {
        let [dearer, longer, larger] =
            [self.dearer, self.longer, self.larger].map(|factor| factor.value().unwrap_or(1.0));
        self.known().map(move |(cost, left)| Expected {
            cpu: cost * dearer,
            seconds: cost * longer,
            left: left * larger,
        })
    }

    /// Takes in a sample, and the one before it.
    pub(super) fn sampled(&mut self, sample: Sample, before: Option<Sample>) {
        self.spent += sample.spent_seconds;
        self.total += sample.spent_seconds;
        let Some(index) = arm_of(sample.level) else { return };
        let below = match index.checked_sub(1) {
            None => Some((sample.page_bytes as f64, sample.page_bytes as f64)),
            Some(index) => before
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
            self.dearer.fade();
            self.longer.fade();
            self.larger.fade();
        }
    }

    /// A batch was sent.
    pub(super) fn sent(&mut self, seconds: f64) {
        self.batches += 1;
        self.total += seconds;
    }

    /// Takes in what a batch that shrank shows of its level.
    pub(super) fn shrank(&mut self, level: i32, sent: &Sent) {
        let Some((cost, ratio)) = arm_of(level).and_then(|index| self.known().nth(index)) else { return };
        let bytes = sent.page_bytes.max(1) as f64;
        self.dearer.add_at_most(sent.compress_cpu_seconds, cost * bytes, UNUSUAL);
        self.longer.add_at_most(sent.compress_seconds, cost * bytes, UNUSUAL);
        self.larger.add(sent.wire_bytes as f64, ratio * bytes);
    }

    /// The first sample of all.
    pub(super) fn first_sample(&mut self) -> &'static [i32] {
        if self.sample_at > 0 {
            return &[];
        }
        self.sample_at = self.batches + 1;
        &LEVELS[..1]
    }

    /// The levels up to the one above the most that can be of use, when a sample is due. The wire is busy for `ahead` seconds.
    pub(super) fn due_sample(&mut self, of_use: Choice, page_bytes: u64, ahead: f64) -> &'static [i32] {
        if self.batches < self.sample_at {
            return &[];
        }
        let tried = self.known().count();
        let levels = match of_use {
            Choice::Raw => 1,
            Choice::Level(level) => arm_of(level).map_or(1, |index| index + 2).min(LEVELS.len()),
        };
        let costs = self.known().map(|(cost, _)| cost).chain(std::iter::repeat(UNKNOWN_COST));
        let seconds = costs.take(levels).sum::<f64>() * page_bytes.min(SAMPLE_BYTES) as f64;
        // What the wire does not wait for is free.
        let hidden = seconds <= ahead / 8.0;
        if !hidden && !self.affordable(seconds) {
            return &[];
        }
        self.sample_every = match of_use {
            Choice::Raw if hidden && tried == 0 => 1,
            Choice::Raw if hidden => SAMPLE_HIDDEN,
            // Perhaps only because none has shrunk yet.
            Choice::Raw if tried == 0 => (self.sample_every * 2).clamp(1, SAMPLE_IN_VAIN),
            Choice::Raw => (self.sample_every * 2).clamp(1, SAMPLE_EVERY.1),
            Choice::Level(_) if levels > tried => 1,
            Choice::Level(_) => SAMPLE_EVERY.0,
        };
        self.sample_at = self.batches + self.sample_every;
        &LEVELS[..levels]
    }

    /// Whether so many seconds can go into finding out.
    pub(super) fn affordable(&self, seconds: f64) -> bool {
        self.spent + seconds <= CREDIT + BUDGET * self.total
    }

    /// They do.
    pub(super) fn spend(&mut self, seconds: f64) {
        self.spent += seconds;
    }
}

//! What a level controller adds up of the batches that were sent.

use std::collections::VecDeque;

use super::{Choice, Sent, Taken, WEIGHT};

/// How many bytes, and for how long, a wire must have taken before its rate is guessed.
const GUESS: (f64, f64) = (65536.0, 0.001);
/// Bytes over which a rate is measured, and how many such measurements are kept.
const MEASURED: f64 = (2 << 20) as f64;
const KEPT: usize = 8;

/// A moving average.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Average(pub(super) Option<f64>);

impl Average {
    pub(super) fn add(&mut self, value: f64) {
        self.0 = Some(self.0.map_or(value, |old| old + WEIGHT * (value - old)));
    }
}

/// How much more something comes to than was expected.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Factor(Option<(f64, f64)>);

impl Factor {
    pub(super) fn add(&mut self, was: f64, expected: f64) {
        let (all, all_expected) = self.0.unwrap_or((was, expected));
        self.0 = Some((all + WEIGHT * (was - all), all_expected + WEIGHT * (expected - all_expected)));
    }

    pub(super) fn value(&self) -> Option<f64> {
        self.0.map(|(was, expected)| was / expected).filter(|value| value.is_finite() && *value > 0.0)
    }

    /// As [`Factor::add`], but no more than so many times what was expected: once in a while a thread stands still for something else.
    pub(super) fn add_at_most(&mut self, was: f64, expected: f64, times: f64) {
        self.add(was.min(expected * times), expected);
    }

    /// A part of it is forgotten.
    pub(super) fn fade(&mut self) {
        if let Some((was, expected)) = &mut self.0 {
            *was += WEIGHT * (*expected - *was);
        }
    }
}

/// How fast a wire takes the bytes of all channels on it: at its best of late. Where processors are short the other end stands still now and then, and a wire
/// that seems slow for that would have more compressed, which makes processors shorter.
#[derive(Clone, Debug, Default)]
pub(super) struct Rate {
    bytes: f64,
    seconds: f64,
    /// Until when the wire is known to have been busy.
    busy_until: f64,
    /// Seconds per byte.
    measured: VecDeque<f64>,
}

impl Rate {
    /// The wire took bytes of one channel, of `sharing`. Time in which it took those of another counts once.
    pub(super) fn add(&mut self, taken: Taken, sharing: f64) {
        // What others sent in the same time belongs to it, and is told by now.
        if self.bytes >= MEASURED * sharing && taken.until > self.busy_until {
            self.measured.push_back(self.seconds / self.bytes);
            self.measured.drain(..self.measured.len().saturating_sub(KEPT));
            (self.bytes, self.seconds) = (0.0, 0.0);
        }
        self.bytes += taken.bytes as f64;
        self.seconds += (taken.until - taken.from.max(self.busy_until)).max(0.0);
        self.busy_until = self.busy_until.max(taken.until);
    }

    pub(super) fn seconds_per_byte(&self) -> Option<f64> {
        let guess = (self.bytes >= GUESS.0 && self.seconds >= GUESS.1).then(|| self.seconds / self.bytes);
        self.measured.iter().copied().reduce(f64::min).or(guess)
    }
}

/// Some batches together: what one of them leaves in a buffer another drains.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Window {
    pub(super) batches: u32,
    /// Those that were to be compressed, and those that were.
    pub(super) tried: u32,
    pub(super) packed: u32,
    seconds: f64,
    page_bytes: f64,
    /// Bytes by which the buffer grew.
    grown: f64,
}

impl Window {
    pub(super) fn add(&mut self, sent: &Sent) {
        self.batches += 1;
        self.tried += u32::from(sent.choice != Choice::Raw);
        self.packed += u32::from(sent.wire_bytes < sent.page_bytes);
        self.seconds += sent.seconds;
        self.page_bytes += sent.page_bytes as f64;
        self.grown += sent.drained_bytes.map_or(0.0, |drained| sent.wire_bytes as f64 - drained as f64);
    }

    /// Seconds per byte of pages if the buffer had stayed as it was, which the wire takes `wire` seconds a byte for.
    pub(super) fn cost(&self, wire: f64) -> Option<f64> {
        let cost = (self.seconds + self.grown * wire) / self.page_bytes;
        (cost.is_finite() && cost > 0.0).then_some(cost)
    }
}

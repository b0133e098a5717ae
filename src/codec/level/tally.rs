//! What a level controller adds up of the batches that were sent.

use super::{Sent, WASTE_WEIGHT, WEIGHT};

/// The costs of some batches that went the same way, taken together: what one of them leaves in a buffer another drains.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    pub(super) batches: u32,
    seconds: f64,
    pub(super) page_bytes: f64,
    wire_bytes: f64,
    drained_bytes: Option<f64>,
    compress_seconds: f64,
}

impl Tally {
    pub(super) fn add(&mut self, sent: &Sent) {
        self.batches += 1;
        self.seconds += sent.seconds;
        self.page_bytes += sent.page_bytes as f64;
        self.wire_bytes += sent.wire_bytes as f64;
        self.compress_seconds += sent.compress_seconds;
        if let Some(drained) = sent.drained_bytes {
            *self.drained_bytes.get_or_insert(0.0) += drained as f64;
        }
    }

    /// Seconds per byte of pages if the buffers stayed as full as they are. `None` when nothing can be said.
    ///
    /// A buffer that grew took bytes whose sending is yet to be paid, at the rate at which it drained. One that shrank was
    /// waited for to make room for more than these batches need: the kernel wakes a sender when a third of the buffer is free.
    /// What is left then is what the wire takes for these bytes, or compressing them where that takes longer.
    pub(super) fn cost(&self) -> Option<f64> {
        let owed = self.drained_bytes.map_or(1.0, |drained| self.wire_bytes / drained);
        let cost = (self.seconds * owed).max(self.compress_seconds.min(self.seconds)) / self.page_bytes;
        (cost.is_finite() && cost > 0.0).then_some(cost)
    }
}

/// A moving average.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Average(pub(super) Option<f64>);

impl Average {
    pub(super) fn add(&mut self, value: f64) {
        self.0 = Some(self.0.map_or(value, |old| old + WEIGHT * (value - old)));
    }
}

/// The batches that did not shrink although they should have.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Unshrunk {
    /// How many in a row.
    pub(super) row: u32,
    /// How many batches more are probed, since one did not shrink a short while ago.
    pub(super) wary: u32,
    /// What they and their probes took of a batch's time, and that time, as moving averages.
    wasted: f64,
    seconds: f64,
}

impl Unshrunk {
    /// A batch that was to be compressed took so long, of which so much was for nothing.
    pub(super) fn count(&mut self, wasted: f64, seconds: f64) {
        self.wasted += WASTE_WEIGHT * (wasted - self.wasted);
        self.seconds += WASTE_WEIGHT * (seconds - self.seconds);
    }

    /// The part of the time that was for nothing.
    pub(super) fn waste(&self) -> f64 {
        if self.seconds > 0.0 { self.wasted / self.seconds } else { 0.0 }
    }
}

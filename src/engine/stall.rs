//! Notices that nothing moves although the peer gives its signs of life.
//!
//! Heartbeats come from a thread of their own, so they say that the peer's process lives, not that it gets on.

use std::time::{Duration, Instant};

/// Watches a measure of progress.
#[derive(Debug)]
pub(super) struct Stall<T> {
    seen: Option<T>,
    since: Instant,
}

impl<T: PartialEq> Stall<T> {
    pub(super) fn new(now: Instant) -> Self {
        Self { seen: None, since: now }
    }

    /// How long the measure has been what it is now.
    pub(super) fn lasts(&mut self, now: Instant, measure: T) -> Duration {
        if self.seen.as_ref() != Some(&measure) {
            self.seen = Some(measure);
            self.since = now;
        }
        now.saturating_duration_since(self.since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_does_not_stall() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut stall = Stall::new(begin);
        let lasts = [(1, 7), (3, 7), (9, 7), (10, 8), (12, 8), (13, 7)]
            .map(|(second, measure)| stall.lasts(at(second), measure).as_secs());
        assert_eq!(lasts, [0, 2, 8, 0, 2, 0]);
    }
}

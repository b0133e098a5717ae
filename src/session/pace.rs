//! The cap on a session's rate. No clock: time is an argument.

use std::time::Duration;

/// Spreads bytes over time so that all channels together stay at or below a rate.
///
/// Bytes are charged once they are sent, since only then their number is known; whoever comes next waits for them.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    bytes_per_second: f64,
    /// When the bytes charged so far are paid.
    paid_at: Duration,
}

impl Pace {
    /// A cap in bytes a second; at least 1.
    #[must_use]
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1) as f64, paid_at: Duration::ZERO }
    }

    /// How long to wait at time `now` before sending more.
    #[must_use]
    pub fn wait(&self, now: Duration) -> Duration {
        self.paid_at.saturating_sub(now)
    }

    /// Bytes were sent at time `now`. Time in which nothing was sent is not made up for.
    pub fn charge(&mut self, now: Duration, bytes: u64) {
        // A day is longer than anyone waits, and keeps a tiny rate from overflowing.
        let seconds = (bytes as f64 / self.bytes_per_second).min(86_400.0);
        self.paid_at = self.paid_at.max(now) + Duration::from_secs_f64(seconds);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_and_idle_time_is_not_saved_up() {
        let mut pace = Pace::new(1000);
        assert_eq!(pace.wait(Duration::from_secs(5)), Duration::ZERO);
        let mut now = Duration::from_secs(5);
        for _ in 0..20 {
            pace.charge(now, 500);
            now += pace.wait(now);
        }
        assert_eq!(now, Duration::from_secs(15));
        pace.charge(Duration::from_secs(100), 500);
        assert_eq!(pace.wait(Duration::from_secs(100)), Duration::from_millis(500));
        Pace::new(0).charge(Duration::MAX - Duration::from_secs(90_000), u64::MAX);
    }
}

//! The caps on a session's rate. No clock: time is an argument.

use std::collections::BTreeMap;
use std::time::Duration;

use super::caps::RateCaps;

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

/// The paces of a session: of everything that it sends, and of single interfaces.
#[derive(Debug, Default)]
pub(super) struct Paces {
    total: Option<Pace>,
    interfaces: BTreeMap<String, Pace>,
    seen: u64,
}

impl Paces {
    pub(super) fn new(caps: &RateCaps) -> Self {
        // Another number than any that comes, so that the caps of now are taken.
        let mut paces = Self { seen: u64::MAX, ..Self::default() };
        paces.follow(caps);
        paces
    }

    /// Takes caps over that were changed. What was sent before is still paid for, at the new rate where one stays.
    pub(super) fn follow(&mut self, caps: &RateCaps) {
        let changes = caps.changes();
        if changes == self.seen {
            return;
        }
        self.seen = changes;
        let caps = caps.now();
        let changed = |old: Option<&Pace>, rate: u64| Pace {
            paid_at: old.map_or(Duration::ZERO, |old| old.paid_at),
            ..Pace::new(rate)
        };
        self.total = caps.total.map(|rate| changed(self.total.as_ref(), rate));
        let interfaces = caps.interfaces.into_iter();
        self.interfaces = interfaces
            .map(|(name, rate)| {
                let pace = changed(self.interfaces.get(&name), rate);
                (name, pace)
            })
            .collect();
    }

    /// How long to wait before more is sent by an interface.
    pub(super) fn wait(&self, interface: Option<&str>, now: Duration) -> Duration {
        let own = interface.and_then(|name| self.interfaces.get(name));
        self.total.iter().chain(own).map(|pace| pace.wait(now)).max().unwrap_or_default()
    }

    /// Bytes were sent by an interface.
    pub(super) fn charge(&mut self, interface: Option<&str>, now: Duration, bytes: u64) {
        let own = interface.and_then(|name| self.interfaces.get_mut(name));
        for pace in self.total.iter_mut().chain(own) {
            pace.charge(now, bytes);
        }
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

    #[test]
    fn an_interface_has_a_cap_of_its_own_and_caps_change_on_the_way() {
        let caps = RateCaps::new(Some(1000));
        let mut paces = Paces::new(&caps);
        paces.charge(Some("a"), Duration::ZERO, 500);
        assert_eq!(paces.wait(Some("a"), Duration::ZERO), Duration::from_millis(500));
        caps.set_interfaces(BTreeMap::from([("a".to_owned(), 100)]));
        paces.follow(&caps);
        paces.charge(Some("a"), Duration::ZERO, 100);
        assert_eq!(paces.wait(Some("a"), Duration::ZERO), Duration::from_secs(1));
        assert_eq!(paces.wait(Some("b"), Duration::ZERO), Duration::from_millis(600));
        caps.set_total(None);
        paces.follow(&caps);
        assert_eq!(paces.wait(Some("b"), Duration::ZERO), Duration::ZERO);
        assert_eq!(paces.wait(Some("a"), Duration::ZERO), Duration::from_secs(1));
    }
}

//! The paths of a migration, as an operator sees them: how much each carries, and whether it is up. And the time that the guest
//! stands still, in parts.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::engine::observe::{LinkSeen, LinkState};
use crate::session::SessionStats;
use crate::session::path::{InterfaceName, Path, interface_of};

/// An interface without a carrier for so long carries nothing any more: its channels are given up. A cable that is swapped, or a
/// switch that starts anew, takes longer than TCP should be waited for.
const NO_CARRIER: Duration = Duration::from_secs(1);
/// How fast a rate follows what it measures: slowly enough for two pieces of 4 MiB that come soon after each other.
const SMOOTH: Duration = Duration::from_secs(2);
/// How often the carriers are looked at.
const LOOK: Duration = Duration::from_millis(500);

/// What is known of the paths.
#[derive(Debug)]
pub(in crate::engine) struct Links {
    paths: Vec<Seen>,
    looked: Option<Instant>,
}

#[derive(Debug)]
struct Seen {
    path: Path,
    interface: Option<String>,
    bytes: u64,
    rate: Rate,
    bytes_per_second: u64,
    down_since: Option<Instant>,
}

impl Links {
    pub(in crate::engine) fn new(paths: &[Path]) -> Self {
        let seen = |path: &Path| Seen {
            path: *path,
            interface: interface(path),
            bytes: 0,
            rate: Rate::new(Instant::now()),
            bytes_per_second: 0,
            down_since: None,
        };
        Self { paths: paths.iter().map(seen).collect(), looked: None }
    }

    /// Looks at the carriers now and then. Answers interfaces that have been without one for too long.
    pub(in crate::engine) fn look(&mut self, now: Instant) -> Vec<String> {
        if self.looked.is_some_and(|looked| now - looked < LOOK) {
            return Vec::new();
        }
        self.looked = Some(now);
        let mut down = BTreeSet::new();
        for seen in &mut self.paths {
            let Some(interface) = &seen.interface else { continue };
            seen.down_since = is_down(interface).then(|| seen.down_since.unwrap_or(now));
            if seen.down_since.is_some_and(|since| now - since >= NO_CARRIER) {
                down.insert(interface.clone());
            }
        }
        down.into_iter().collect()
    }

    /// Takes over what the channels have carried until now.
    pub(in crate::engine) fn update(&mut self, stats: &SessionStats, now: Instant) {
        for seen in &mut self.paths {
            let on_it = stats.channels.iter().filter(|channel| channel.path == seen.path);
            seen.bytes = on_it.map(|channel| channel.bytes).sum::<u64>();
            seen.bytes_per_second = seen.rate.update(now, seen.bytes);
        }
    }

    /// How they stand.
    pub(in crate::engine) fn seen(&self, stats: Option<&SessionStats>) -> Vec<LinkSeen> {
        let channels = |path: &Path| {
            let all = stats.map_or(&[][..], |stats| &stats.channels);
            all.iter().filter(|channel| channel.alive && channel.path == *path).count() as u32
        };
        let seen = |seen: &Seen| LinkSeen {
            interface: seen.interface.clone(),
            destination: seen.path.destination,
            channels: channels(&seen.path),
            bytes: seen.bytes,
            bytes_per_second: seen.bytes_per_second,
            state: match seen.down_since {
                Some(_) => LinkState::Down,
                None if stats.is_some() && channels(&seen.path) == 0 => LinkState::Lost,
                None => LinkState::Up,
            },
        };
        self.paths.iter().map(seen).collect()
    }

    /// Whether a path leads by an interface that is down.
    pub(in crate::engine) fn is_down(&self, path: &Path) -> bool {
        self.paths.iter().any(|seen| seen.path == *path && seen.down_since.is_some())
    }

    /// The interfaces that are down.
    pub(in crate::engine) fn down(&self) -> Vec<String> {
        let down = self.paths.iter().filter(|seen| seen.down_since.is_some());
        down.filter_map(|seen| seen.interface.clone()).collect()
    }

    /// The interfaces that no channel uses although a path leads by them.
    pub(in crate::engine) fn idle(&self, stats: &SessionStats) -> Vec<String> {
        let seen = self.seen(Some(stats));
        let idle = seen.into_iter().filter(|link| link.channels == 0);
        idle.map(|link| link.interface.unwrap_or_else(|| link.destination.to_string())).collect()
    }
}

/// The rate of something that comes in pieces: what a slow wire confirms comes 4 MiB at a time, which at a MiB a second is
/// nothing for a long time, and then much.
#[derive(Debug)]
pub(in crate::engine) struct Rate {
    amount: u64,
    /// When the last piece came, and how large it was.
    changed: Instant,
    piece: u64,
    per_second: f64,
}

impl Rate {
    pub(in crate::engine) fn new(now: Instant) -> Self {
        Self { amount: 0, changed: now, piece: 0, per_second: 0.0 }
    }

    /// So much has come until now. Answers the rate, smoothed: a line that jumps cannot be read.
    pub(in crate::engine) fn update(&mut self, now: Instant, amount: u64) -> u64 {
        let seconds = now.saturating_duration_since(self.changed).as_secs_f64().max(1e-6);
        if amount > self.amount {
            let lately = (amount - self.amount) as f64 / seconds;
            let weight = if self.piece == 0 { 1.0 } else { 1.0 - (-seconds / SMOOTH.as_secs_f64()).exp() };
            self.per_second += (lately - self.per_second) * weight;
            (self.piece, self.changed, self.amount) = (amount - self.amount, now, amount);
        } else {
            // Were it faster, another piece would have come by now.
            self.per_second = self.per_second.min(self.piece as f64 / seconds);
        }
        self.per_second as u64
    }
}

fn interface(path: &Path) -> Option<String> {
    match path.interface {
        Some(interface) => Some(InterfaceName::to_string(&interface)),
        None => interface_of(path.source?).ok().flatten(),
    }
}

/// What the interfaces of the paths carry together, where all of them say (`Documentation/ABI/testing/sysfs-class-net`, in
/// Mbit/s; -1 for unknown).
pub(in crate::engine) fn bits_per_second(paths: &[Path]) -> Option<u64> {
    let interfaces: BTreeSet<String> = paths.iter().map(interface).collect::<Option<_>>()?;
    let speed = |interface: &String| {
        let text = std::fs::read_to_string(format!("/sys/class/net/{interface}/speed")).ok()?;
        Some(text.trim().parse::<u64>().ok()? * 1_000_000)
    };
    interfaces.iter().map(speed).sum()
}

/// Whether an interface carries nothing: it was taken down, or nobody is at the other end of its wire
/// (`Documentation/ABI/testing/sysfs-class-net`). One that cannot be asked counts as up.
fn is_down(interface: &str) -> bool {
    let read = |what: &str| std::fs::read_to_string(format!("/sys/class/net/{interface}/{what}"));
    match (read("operstate"), read("carrier")) {
        (Ok(state), _) if matches!(state.trim(), "down" | "lowerlayerdown" | "notpresent") => true,
        // Reading it from an interface that was taken down fails (EINVAL), which the state tells already.
        (_, Ok(carrier)) => carrier.trim() == "0",
        _ => false,
    }
}

/// The parts of the time in which the guest stands still.
#[derive(Debug, Default)]
pub(super) struct Downtime {
    marks: Vec<(&'static str, Instant)>,
    begun: Option<Instant>,
}

impl Downtime {
    /// The pause begins.
    pub(super) fn begin(&mut self) {
        self.begun = Some(Instant::now());
        self.marks.clear();
    }

    /// Something is done that was part of it; what was not begun has no parts.
    pub(super) fn mark(&mut self, what: &'static str) {
        if self.begun.is_some() && self.marks.iter().all(|(marked, _)| *marked != what) {
            self.marks.push((what, Instant::now()));
        }
    }

    /// Since the pause.
    pub(super) fn elapsed(&self) -> Duration {
        self.begun.map_or(Duration::ZERO, |begun| begun.elapsed())
    }

    /// The parts, in order.
    pub(super) fn parts(&self) -> Vec<(&'static str, Duration)> {
        let Some(mut last) = self.begun else { return Vec::new() };
        let part = |(what, at): &(&'static str, Instant)| {
            let took = at.saturating_duration_since(last);
            last = *at;
            (*what, took)
        };
        self.marks.iter().map(part).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_that_of_the_bytes_also_when_they_come_in_large_pieces() {
        let began = Instant::now();
        let mut rate = Rate::new(began);
        let at = |milliseconds: u64| began + Duration::from_millis(milliseconds);
        let mut amount = 0;
        for tick in 1..100 {
            // 4 MB each second, all at once.
            if tick % 10 == 0 {
                amount += 4_000_000;
            }
            let seen = rate.update(at(tick * 100), amount);
            let expected = if tick < 10 { 0..=0 } else { 2_000_000..=4_000_001 };
            assert!(expected.contains(&seen), "{seen} after {tick} ticks");
        }
        // Then nothing comes any more.
        assert!(rate.update(at(30_000), amount) < 200_000);
        // Small pieces, at once and then more.
        let mut rate = Rate::new(began);
        assert_eq!(rate.update(at(100), 100), 1000);
        assert_eq!(rate.update(at(200), 200), 1000);
        let faster = rate.update(at(300), 500);
        assert!((1001..3000).contains(&faster), "{faster}");
    }
}

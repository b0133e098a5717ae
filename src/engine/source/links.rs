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
/// How often the carriers are looked at.
const LOOK: Duration = Duration::from_millis(500);

/// What is known of the paths.
#[derive(Debug)]
pub(super) struct Links {
    paths: Vec<Seen>,
    looked: Option<Instant>,
}

#[derive(Debug)]
struct Seen {
    path: Path,
    interface: Option<String>,
    bytes: u64,
    bytes_per_second: u64,
    down_since: Option<Instant>,
}

impl Links {
    pub(super) fn new(paths: &[Path]) -> Self {
        let seen = |path: &Path| Seen {
            path: *path,
            interface: interface(path),
            bytes: 0,
            bytes_per_second: 0,
            down_since: None,
        };
        Self { paths: paths.iter().map(seen).collect(), looked: None }
    }

    /// Looks at the carriers now and then. Answers interfaces that have been without one for too long.
    pub(super) fn look(&mut self, now: Instant) -> Vec<String> {
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

    /// Takes over what the channels have carried since it was asked last, `elapsed` ago.
    pub(super) fn update(&mut self, stats: &SessionStats, elapsed: Duration) {
        for seen in &mut self.paths {
            let on_it = stats.channels.iter().filter(|channel| channel.path == seen.path);
            let bytes = on_it.map(|channel| channel.bytes).sum::<u64>();
            let lately = bytes.saturating_sub(seen.bytes) as f64 / elapsed.as_secs_f64();
            seen.bytes_per_second = smoothed(seen.bytes_per_second, lately);
            seen.bytes = bytes;
        }
    }

    /// How they stand.
    pub(super) fn seen(&self, stats: Option<&SessionStats>) -> Vec<LinkSeen> {
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

    /// The interfaces that no channel uses although a path leads by them.
    pub(super) fn idle(&self, stats: &SessionStats) -> Vec<String> {
        let seen = self.seen(Some(stats));
        let idle = seen.into_iter().filter(|link| link.channels == 0);
        idle.map(|link| link.interface.unwrap_or_else(|| link.destination.to_string())).collect()
    }
}

/// A rate smoothed over about half a second, since a line that jumps cannot be read; from nothing it starts at once.
pub(super) fn smoothed(before: u64, lately: f64) -> u64 {
    if before == 0 { lately as u64 } else { (before as f64 * 0.8 + lately * 0.2) as u64 }
}

fn interface(path: &Path) -> Option<String> {
    match path.interface {
        Some(interface) => Some(InterfaceName::to_string(&interface)),
        None => interface_of(path.source?).ok().flatten(),
    }
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

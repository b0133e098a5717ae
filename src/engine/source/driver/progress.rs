//! What the observer is told now and then, and what a person should know at that moment.

use std::time::Instant;

use super::{Driver, TICK};
use crate::engine::observe::{ChannelRecord, Progress};
use crate::guest::Guest;
use crate::migration::source::{PhaseName, SourceInput};
use crate::session::source::SourceSession;
use crate::session::{ChannelStats, SessionStats};
use crate::units::PAGE_SIZE;

impl<G: Guest + ?Sized> Driver<'_, G> {
    pub(super) fn progress(&mut self) -> Progress {
        let stats = self.session.as_ref().map(SourceSession::stats);
        for interface in self.links.look(Instant::now()) {
            if let Some(session) = &self.session {
                session.interface_is_down(&interface);
            }
        }
        let remaining = stats.as_ref().map_or(0, |stats| stats.remaining_pages);
        let placed = stats.as_ref().map_or(0, |stats| stats.placed_pages * PAGE_SIZE);
        let now = Instant::now();
        if now - self.seen.0 >= TICK {
            if let Some(stats) = &stats {
                self.links.update(stats, now);
            }
            // Bytes count too: on a slow wire, or under a low cap, the next confirmation may be 4 MiB away. A destination that
            // takes them and confirms nothing is sent no more than each channel's window.
            let sent = stats.as_ref().map_or(0, |stats| stats.wire_bytes);
            if placed > self.seen.1 || sent > self.seen_sent {
                self.tell(SourceInput::Progressed);
            }
            self.seen_sent = sent;
            self.seen = (now, placed);
        }
        Progress {
            phase: self.machine.phase(),
            mode: stats.as_ref().map_or(self.options.mode, |stats| stats.mode),
            interfaces: stats.as_ref().map_or_else(Vec::new, live_interfaces),
            links: self.links.seen(stats.as_ref()),
            rounds: self.machine.rounds().to_vec(),
            round: self.machine.round(),
            bytes_per_second: self.rate.update(now, placed),
            remaining_bytes: remaining * PAGE_SIZE,
            expected_downtime: self.machine.expected_downtime(remaining),
            note: self.note(stats.as_ref()),
        }
    }

    /// What a person should know at this moment: why it does not converge, what went wrong, else what it waits for.
    fn note(&self, stats: Option<&SessionStats>) -> Option<String> {
        if let Some((stats, gone)) = stats.and_then(|stats| Some((stats, stats.none_for?))) {
            let (tried, limit) = (self.links.idle(stats).join(", "), self.options.reopen_within.as_secs());
            return Some(format!(
                "no channel lives; {tried} are tried again ({} s of {limit} s)",
                gone.as_secs()
            ));
        }
        let waits = || format!("waits for {}", self.machine.waits_for());
        let known = self.machine.note().map(str::to_owned).or_else(|| self.warnings.last().cloned());
        match self.machine.phase() {
            PhaseName::PreCopy | PhaseName::Finished => known,
            _ => Some(known.map_or_else(waits, |known| format!("{}; {known}", waits()))),
        }
    }
}

impl From<ChannelStats> for ChannelRecord {
    fn from(stats: ChannelStats) -> Self {
        Self {
            local: stats.local,
            remote: stats.remote,
            interface: stats.interface,
            carrier: stats.carrier,
            bytes: stats.bytes,
            lost: !stats.alive,
        }
    }
}

fn live_interfaces(stats: &SessionStats) -> Vec<String> {
    let mut interfaces: Vec<String> = stats
        .channels
        .iter()
        .filter(|channel| channel.alive)
        .filter_map(|channel| channel.interface.clone())
        .collect();
    interfaces.sort_unstable();
    interfaces.dedup();
    interfaces
}

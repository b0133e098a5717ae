//! What a guest's process tells, taken over into the account of its migration.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::now;
use super::tables::Active;
use crate::host::api::migration::{
    ChannelInfo, Direction, DowntimePart, LinkProgress, Migration, MigrationProgress, MigrationState,
    RoundInfo, Sample,
};
use crate::host::holder::protocol::{MoveProgress, Moved, MovedRound};
use crate::session::mode::TransferMode;
use crate::units::Bytes;

/// How often the course of a migration is noted at first; half as often after every 500 samples.
const SAMPLE: Duration = Duration::from_millis(100);
/// Samples of one migration: the last 500 of them are 12.8 s apart, so that they reach over three hours.
const MOST_SAMPLES: usize = 4000;

/// A migration of which nothing is known but that it was asked for now.
pub(super) fn blank(direction: Direction) -> Migration {
    Migration {
        id: String::new(),
        guest: String::new(),
        guest_kind: String::new(),
        direction,
        peer: String::new(),
        peer_address: None,
        state: MigrationState::Waiting,
        cause: None,
        requested_at: now(),
        started_at: None,
        ended_at: None,
        mode_requested: TransferMode::Auto,
        mode_origin: String::new(),
        mode_used: None,
        mode_reason: None,
        insecure: false,
        paths: Vec::new(),
        notes: Vec::new(),
        progress: None,
        rounds: Vec::new(),
        channels: Vec::new(),
        samples: Vec::new(),
        downtime_seconds: None,
        downtime_limit_seconds: 0.0,
        downtime_parts: Vec::new(),
        total_seconds: None,
        cpu_seconds: None,
        memory_bytes: 0,
        touched_bytes: None,
        throttle_percent: 0,
        ram_digest: None,
        ram_equal: None,
        warnings: Vec::new(),
        log: Vec::new(),
    }
}

/// Takes progress over; answers what is worth a line in the log.
pub(super) fn note_progress(active: &mut Active, progress: &MoveProgress) -> Vec<String> {
    let migration = &mut active.migration;
    let mut news = Vec::new();
    let before = migration.progress.take();
    if before.as_ref().is_none_or(|before| before.phase != progress.phase) {
        news.push(format!("phase {}", progress.phase));
    }
    let links: Vec<LinkProgress> = progress
        .links
        .iter()
        .map(|link| LinkProgress {
            interface: link.interface.clone().unwrap_or_default(),
            channels: link.channels,
            bytes_per_second: link.bytes_per_second,
            bytes: link.bytes,
            state: link.state.clone(),
        })
        .collect();
    for link in &links {
        let was = before
            .as_ref()
            .and_then(|before| before.links.iter().find(|was| was.interface == link.interface));
        if was.is_some_and(|was| was.state != link.state) {
            news.push(format!("interface {} is {}", link.interface, link.state));
        }
    }
    if let Some(note) = &progress.note
        && before.as_ref().and_then(|before| before.note.as_ref()) != Some(note)
        && !note.starts_with("waits for")
        // The last one comes back when there is nothing newer to say.
        && migration.log.iter().all(|line| line.text != *note)
    {
        news.push(note.clone());
    }
    migration.mode_used = progress.mode.parse().ok().or(migration.mode_used);
    migration.rounds = progress.rounds.iter().map(round).collect();
    if let Some(sample) = sample(active, progress, &links) {
        active.migration.samples.push(sample);
    }
    let migration = &mut active.migration;
    migration.progress = Some(MigrationProgress {
        phase: progress.phase.clone(),
        links,
        round: progress.round,
        bytes_per_second: progress.bytes_per_second,
        remaining_bytes: progress.remaining_bytes,
        expected_downtime_seconds: progress.expected_downtime,
        note: progress.note.clone(),
    });
    news
}

/// The next sample of the course, if one is due: often at first, and sparser the longer it takes.
fn sample(active: &mut Active, progress: &MoveProgress, links: &[LinkProgress]) -> Option<Sample> {
    let taken = active.migration.samples.len();
    let apart = SAMPLE * (1 << (taken / 500).min(20));
    let elapsed = active.sampled.as_ref().map(|(last, _)| last.elapsed());
    if taken >= MOST_SAMPLES || elapsed.is_some_and(|elapsed| elapsed < apart) {
        return None;
    }
    let mut carried: BTreeMap<String, u64> = BTreeMap::new();
    for link in links {
        *carried.entry(link.interface.clone()).or_default() += link.bytes;
    }
    let (_, before) = active
        .sampled
        .replace((Instant::now(), carried.clone()))
        .unwrap_or_else(|| (Instant::now(), BTreeMap::new()));
    let rate = |(interface, bytes): (String, u64)| {
        let lately = bytes.saturating_sub(before.get(&interface).copied().unwrap_or(0));
        let rate = elapsed.map_or(0.0, |elapsed| lately as f64 / elapsed.as_secs_f64());
        (interface, rate as u64)
    };
    Some(Sample {
        at: now() - active.migration.started_at.unwrap_or_else(now),
        phase: progress.phase.clone(),
        remaining_bytes: progress.remaining_bytes,
        rates: carried.into_iter().map(rate).collect(),
    })
}

fn round(round: &MovedRound) -> RoundInfo {
    let MovedRound { pages, bytes, wire_bytes, seconds, dirtied } = *round;
    RoundInfo { pages, bytes, wire_bytes, seconds, dirtied }
}

/// What carried the pages, for the log: each kind of channel with the interface, and the device, port and GID of RDMA.
pub(super) fn carried(channels: &[ChannelInfo]) -> Option<String> {
    let mut kinds: BTreeMap<(String, String), (usize, u64)> = BTreeMap::new();
    for channel in channels {
        let by = match &channel.rdma {
            Some(rdma) => format!("RDMA ({} port {}, GID {})", rdma.device, rdma.port, rdma.gid),
            None if channel.encrypted => "TCP under TLS".to_owned(),
            None => "TCP".to_owned(),
        };
        let interface = channel.interface.clone().unwrap_or_else(|| "an unknown interface".to_owned());
        let (count, bytes) = kinds.entry((interface, by)).or_default();
        *count += 1;
        *bytes += channel.bytes;
    }
    let said: Vec<String> = kinds
        .into_iter()
        .map(|((interface, by), (count, bytes))| {
            let s = if count == 1 { "" } else { "s" };
            format!("{} by {count} channel{s} of {by} on {interface}", Bytes(bytes))
        })
        .collect();
    (!said.is_empty()).then(|| format!("carried {}", said.join(", ")))
}

pub(super) fn note_moved(active: &mut Active, moved: &Moved) {
    let migration = &mut active.migration;
    migration.mode_used = Some(moved.mode_used);
    migration.mode_reason = Some(moved.mode_reason.clone()).filter(|reason| !reason.is_empty());
    migration.rounds = moved.rounds.iter().map(round).collect();
    migration.channels = moved
        .channels
        .iter()
        .map(|channel| ChannelInfo {
            local: channel.local.to_string(),
            remote: channel.remote.to_string(),
            interface: channel.interface.clone(),
            rdma: channel.rdma.clone(),
            encrypted: channel.encrypted,
            bytes: channel.bytes,
            lost: channel.lost,
        })
        .collect();
    if moved.memory_bytes > 0 {
        migration.memory_bytes = moved.memory_bytes;
        migration.touched_bytes = Some(moved.touched_bytes);
    }
    migration.total_seconds = Some(moved.total_seconds);
    migration.downtime_seconds = (moved.outcome == "completed").then_some(moved.paused_seconds);
    migration.downtime_parts = moved
        .downtime_parts
        .iter()
        .map(|(name, seconds)| DowntimePart { name: name.clone(), seconds: *seconds })
        .collect();
    migration.throttle_percent = moved.throttle;
    migration.cpu_seconds = Some(moved.cpu_seconds);
    migration.ram_digest = moved.ram.as_ref().map(|ram| ram.digest.clone());
    migration.warnings.extend(moved.warnings.iter().cloned());
}

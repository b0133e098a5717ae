//! One line about a migration that is under way.

use super::table::{seconds, three_digits};
use super::words::{INSECURE, clean, over_limit, way};
use crate::host::api::migration::{LinkProgress, Migration, MigrationProgress, MigrationState};

/// Where a migration stands, in one line: guest, phase, mode, each interface with its rate or what ails it, round, what is
/// left of it, the downtime to be expected, and what a person should know.
#[must_use]
pub fn progress_line(migration: &Migration) -> String {
    let mut parts = Vec::new();
    if migration.insecure {
        parts.push(INSECURE.to_owned());
    }
    let mut stage = phase(migration);
    let progress = migration.progress.as_ref().filter(|_| !migration.state.is_over());
    if let (Some(mode), Some(_)) = (migration.mode_used, progress) {
        stage.push_str(&format!(", {mode}"));
    }
    parts.push(format!("{} {}: {stage}", clean(&migration.guest), way(migration)));
    if let Some(progress) = progress {
        parts.extend(progress.links.iter().map(link));
        parts.extend(copying(progress));
        parts.extend(progress.note.as_deref().map(clean));
    }
    parts.extend(end(migration));
    parts.join("; ")
}

/// What a migration does now: its phase while it is running, else its state.
pub(super) fn phase(migration: &Migration) -> String {
    let phase = migration.progress.as_ref().map(|progress| progress.phase.as_str());
    match (migration.state, phase) {
        (MigrationState::Waiting, _) => "waiting for a slot".to_owned(),
        (MigrationState::Running, Some(phase)) if !phase.is_empty() => clean(phase),
        (MigrationState::RolledBack, _) => "rolled back".to_owned(),
        (MigrationState::InDoubt, _) => "in doubt".to_owned(),
        (state, _) => state.name().to_owned(),
    }
}

/// An interface with its rate, or with what ails it.
pub(super) fn link(link: &LinkProgress) -> String {
    let name =
        if link.interface.is_empty() { "unknown interface".to_owned() } else { clean(&link.interface) };
    match link.state.as_str() {
        "lost" => format!("{name} lost, tried again"),
        "down" => format!("{name} down, used again when it is up"),
        _ => format!("{name} {}/s", three_digits(link.bytes_per_second)),
    }
}

/// Only while pages travel are a round and what is left of it worth a place on the line.
fn copying(progress: &MigrationProgress) -> Vec<String> {
    if !["pre-copy", "stop-and-copy"].contains(&progress.phase.as_str()) {
        return Vec::new();
    }
    let left = three_digits(progress.remaining_bytes);
    let mut parts = vec![format!("round {}, {left} to go", progress.round)];
    let expected = progress.expected_downtime_seconds;
    parts.extend(expected.map(|expected| format!("expected downtime {}", seconds(expected))));
    parts
}

/// How it went, of one that is over.
fn end(migration: &Migration) -> Vec<String> {
    match migration.state {
        MigrationState::Completed => {
            let over = if over_limit(migration) { ", OVER the limit" } else { "" };
            let downtime = migration.downtime_seconds;
            let total = migration.total_seconds;
            [
                downtime.map(|downtime| format!("downtime {}{over}", seconds(downtime))),
                total.map(|total| format!("total {}", seconds(total))),
            ]
            .into_iter()
            .flatten()
            .collect()
        }
        state if state.is_over() => migration.cause.as_deref().map(clean).into_iter().collect(),
        _ => Vec::new(),
    }
}

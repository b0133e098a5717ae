//! The sentences about a migration that the account in the terminal and the report page share.

use super::table::{moment, seconds};
use crate::host::api::check::PathInfo;
use crate::host::api::migration::{Direction, Migration, MigrationState};
use crate::units::Bytes;

/// A text that others gave, without what would move a terminal's cursor, change its colours, or turn the reading direction.
pub(in crate::host) fn clean(text: &str) -> String {
    let harmless = |character: char| match character {
        '\n' | '\r' | '\t' => ' ',
        '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => char::REPLACEMENT_CHARACTER,
        character if character.is_control() => char::REPLACEMENT_CHARACTER,
        character => character,
    };
    text.chars().map(harmless).collect()
}

/// `to host-b` or `from host-b`.
pub(in crate::host) fn way(migration: &Migration) -> String {
    let word = match migration.direction {
        Direction::Outgoing => "to",
        Direction::Incoming => "from",
    };
    format!("{word} {}", clean(&migration.peer))
}

/// What stands with everything about a migration between hosts that did not prove who they are.
pub(in crate::host) const INSECURE: &str = "WARNING insecure";

/// How a migration stands or ended, in a word.
pub(in crate::host) fn outcome(state: MigrationState) -> &'static str {
    match state {
        MigrationState::Waiting => "Waiting",
        MigrationState::Checking => "Checking",
        MigrationState::Running => "Under way",
        MigrationState::Completed => "Completed",
        MigrationState::RolledBack => "Rolled back",
        MigrationState::InDoubt => "In doubt",
        MigrationState::Lost => "Lost",
    }
}

/// What that means for the guest.
pub(in crate::host) fn meaning(migration: &Migration) -> String {
    let (guest, peer) = (clean(&migration.guest), clean(&migration.peer));
    match (migration.state, migration.direction) {
        (MigrationState::Waiting, Direction::Outgoing) => {
            format!("{guest} is to move to {peer} as soon as both hosts have a slot")
        }
        (MigrationState::Waiting, Direction::Incoming) => {
            format!("{guest} is to come from {peer} as soon as both hosts have a slot")
        }
        (MigrationState::Checking, Direction::Outgoing) => {
            format!("it is looked whether {guest} can move to {peer}")
        }
        (MigrationState::Checking, Direction::Incoming) => {
            format!("it is looked whether {guest} can come from {peer}")
        }
        (MigrationState::Running, Direction::Outgoing) => format!("{guest} is moving to {peer}"),
        (MigrationState::Running, Direction::Incoming) => format!("{guest} is coming from {peer}"),
        (MigrationState::Completed, Direction::Outgoing) => format!("{guest} moved to {peer} and runs there"),
        (MigrationState::Completed, Direction::Incoming) => format!("{guest} came from {peer} and runs here"),
        (MigrationState::RolledBack, Direction::Outgoing) => {
            format!("{guest} did not move to {peer} and goes on here")
        }
        (MigrationState::RolledBack, Direction::Incoming) => {
            format!("{guest} did not come from {peer} and goes on there")
        }
        (MigrationState::InDoubt, Direction::Outgoing) => format!(
            "{guest} was given away and it is not known whether {peer} runs it; it stays stopped here until {peer} has \
             answered"
        ),
        (MigrationState::InDoubt, Direction::Incoming) => {
            format!("it is not settled whether {guest} runs here or at {peer}")
        }
        (MigrationState::Lost, _) => format!(
            "{guest} runs at neither host: the process that held it was killed at the wrong moment, or its host went down"
        ),
    }
}

/// The figures of a migration, each with what it is.
pub(in crate::host) fn facts(migration: &Migration) -> Vec<(&'static str, String)> {
    let mut facts = vec![("Guest", guest(migration)), ("Asked for", asked_for(migration))];
    facts.push(("Mode", mode(migration)));
    if !migration.paths.is_empty() {
        let path = |path: &PathInfo| format!("{} to {}", clean(&path.interface), clean(&path.peer_interface));
        facts.push(("Paths", migration.paths.iter().map(path).collect::<Vec<_>>().join(", ")));
    }
    facts.push(("Downtime", downtime(migration)));
    if let Some(total) = total(migration) {
        facts.push(("Total", total));
    }
    if let Some(cpu) = migration.cpu_seconds {
        facts.push(("Processor time", format!("{} at this host, without the guest's", seconds(cpu))));
    }
    if migration.throttle_percent > 0 {
        let percent = migration.throttle_percent;
        facts.push(("Guest slowed down", format!("{percent} % of its processor time was taken at most")));
    }
    if let Some(digest) = &migration.ram_digest {
        let compared = match migration.ram_equal {
            Some(true) => ", the same at the destination",
            Some(false) => ", ANOTHER ONE AT THE DESTINATION: the guest's memory is damaged",
            None => "",
        };
        facts.push(("Memory at the pause", format!("digest {}{compared}", clean(digest))));
    }
    facts.push(("Migration", clean(&migration.id)));
    facts
}

fn guest(migration: &Migration) -> String {
    let kind = match migration.guest_kind.as_str() {
        "kvm" => "a KVM guest".to_owned(),
        "process" => "a process's memory".to_owned(),
        "qemu" => "a guest of QEMU".to_owned(),
        other => format!("a {} guest", clean(other)),
    };
    let used = migration.touched_bytes.map(|bytes| format!(", {} of it in use", Bytes(bytes)));
    format!(
        "{}, {kind} of {}{}",
        clean(&migration.guest),
        Bytes(migration.memory_bytes),
        used.unwrap_or_default()
    )
}

fn asked_for(migration: &Migration) -> String {
    let waited = migration.started_at.map(|at| at - migration.requested_at).filter(|waited| *waited >= 1.0);
    let waited = waited.map(|waited| format!(", waited {} for a slot", seconds(waited)));
    format!("{}{}", moment(migration.requested_at), waited.unwrap_or_default())
}

/// The mode, what was asked for where that is another, and why.
pub(in crate::host) fn mode(migration: &Migration) -> String {
    let requested = migration.mode_requested;
    let origin = match migration.mode_origin.as_str() {
        "request" => "with the request",
        "host file" => "in the host file",
        "default" => "by default",
        other => return format!("{requested} ({})", clean(other)),
    };
    let used = match migration.mode_used {
        None => return format!("none was chosen yet; {requested} is asked for {origin}"),
        Some(used) if used == requested => format!("{used}, asked for {origin}"),
        Some(used) => format!("{used} ({requested} was asked for {origin})"),
    };
    match &migration.mode_reason {
        Some(reason) if migration.mode_used != Some(requested) => format!("{used}: {}", clean(reason)),
        _ => used,
    }
}

/// The downtime against its limit.
pub(in crate::host) fn downtime(migration: &Migration) -> String {
    let limit = seconds(migration.downtime_limit_seconds);
    match migration.downtime_seconds {
        Some(downtime) if over_limit(migration) => {
            format!("{}, OVER the limit of {limit}", seconds(downtime))
        }
        Some(downtime) => format!("{}, within the limit of {limit}", seconds(downtime)),
        None => format!("none was measured (limit {limit})"),
    }
}

/// Whether the guest stood still for longer than was aimed at.
pub(in crate::host) fn over_limit(migration: &Migration) -> bool {
    migration.downtime_seconds.is_some_and(|downtime| downtime > migration.downtime_limit_seconds)
}

fn total(migration: &Migration) -> Option<String> {
    let total = migration.total_seconds?;
    Some(match carried(migration) {
        0 => seconds(total),
        bytes => {
            let rate = average(migration).map(|rate| format!(", {}/s", Bytes(rate))).unwrap_or_default();
            format!("{}, {} over the network{rate}", seconds(total), Bytes(bytes))
        }
    })
}

/// Everything that crossed the network, headers included, as far as this host knows.
pub(in crate::host) fn carried(migration: &Migration) -> u64 {
    let channels: u64 = sum(migration.channels.iter().map(|channel| channel.bytes));
    let rounds: u64 = sum(migration.rounds.iter().map(|round| round.wire_bytes));
    let links = migration.progress.iter().flat_map(|progress| &progress.links);
    channels.max(rounds).max(sum(links.map(|link| link.bytes)))
}

/// What crossed the network a second, while there was something to send.
pub(in crate::host) fn average(migration: &Migration) -> Option<u64> {
    let moving: f64 = migration.rounds.iter().map(|round| round.seconds).sum();
    (moving > 0.0).then(|| (carried(migration) as f64 / moving) as u64)
}

fn sum(values: impl Iterator<Item = u64>) -> u64 {
    values.fold(0, u64::saturating_add)
}

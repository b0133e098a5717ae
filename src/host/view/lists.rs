//! Tables of several migrations or guests.

use std::collections::BTreeSet;

use comfy_table::CellAlignment;

use super::progress::{link, phase};
use super::table::{flush, moment, seconds, table, three_digits};
use super::words::{INSECURE, clean, way};
use crate::host::api::guest::{GuestInfo, GuestState};
use crate::host::api::migration::Migration;
use crate::units::Bytes;

/// As many digits of a migration's number as one can still read out.
const DIGITS: usize = 8;

/// The migrations that are not over. Ends with a line feed.
#[must_use]
pub fn status_table(migrations: &[Migration]) -> String {
    if migrations.is_empty() {
        return "No migration is under way.\n".to_owned();
    }
    let digits = distinct(migrations);
    let mut shown = table(&["Id", "Guest", "Where", "State", "Mode", "Interfaces", "Round", "To go", "Note"]);
    for migration in migrations {
        let progress = migration.progress.as_ref();
        let links = progress.map(|progress| progress.links.iter().map(link).collect::<Vec<_>>().join("; "));
        let copying = progress.filter(|progress| ["pre-copy", "stop-and-copy"].contains(&&*progress.phase));
        let note = progress.and_then(|progress| progress.note.as_deref()).map(clean);
        let insecure = migration.insecure.then(|| INSECURE.to_owned());
        let notes: Vec<String> = insecure.into_iter().chain(note).collect();
        shown.add_row([
            short(&migration.id, digits),
            clean(&migration.guest),
            way(migration),
            phase(migration),
            migration.mode_used.map_or("-", |mode| mode.name()).to_owned(),
            links.filter(|links| !links.is_empty()).unwrap_or_else(|| "-".to_owned()),
            copying.map_or_else(|| "-".to_owned(), |progress| progress.round.to_string()),
            copying.map_or_else(|| "-".to_owned(), |progress| three_digits(progress.remaining_bytes)),
            notes.join("; "),
        ]);
    }
    for column in [6, 7] {
        right(&mut shown, column);
    }
    format!("{}\n", flush(&shown))
}

/// Migrations that are over, in the order in which they are given. Ends with a line feed.
#[must_use]
pub fn history_table(migrations: &[Migration]) -> String {
    if migrations.is_empty() {
        return "No migration has ended here yet.\n".to_owned();
    }
    let digits = distinct(migrations);
    let mut shown = table(&["Id", "Ended", "Guest", "Where", "Outcome", "Mode", "Downtime", "Total", "Note"]);
    let known = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), seconds);
    for migration in migrations {
        shown.add_row([
            short(&migration.id, digits),
            migration.ended_at.map_or_else(|| "-".to_owned(), moment),
            clean(&migration.guest),
            way(migration),
            phase(migration),
            migration.mode_used.map_or("-", |mode| mode.name()).to_owned(),
            known(migration.downtime_seconds),
            known(migration.total_seconds),
            history_note(migration),
        ]);
    }
    for column in [6, 7] {
        right(&mut shown, column);
    }
    format!("{}\n", flush(&shown))
}

/// Why it did not complete, or how much there is to read about it.
fn history_note(migration: &Migration) -> String {
    let insecure = migration.insecure.then(|| INSECURE.to_owned());
    let cause = migration.cause.as_deref().map(clean);
    let warnings = match migration.warnings.len() {
        0 => None,
        1 => Some("1 warning".to_owned()),
        several => Some(format!("{several} warnings")),
    };
    insecure.into_iter().chain(cause).chain(warnings).collect::<Vec<_>>().join("; ")
}

/// The guests of a host. Ends with a line feed.
#[must_use]
pub fn guest_table(guests: &[GuestInfo]) -> String {
    if guests.is_empty() {
        return "There is no guest here.\n".to_owned();
    }
    let mut shown = table(&["Name", "State", "Kind", "Memory", "Process", "Since", "Note"]);
    for guest in guests {
        shown.add_row([
            clean(&guest.name),
            guest.state.name().replace('_', " "),
            clean(&guest.kind),
            Bytes(guest.memory_bytes).to_string(),
            guest.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            moment(guest.since),
            guest_note(guest),
        ]);
    }
    for column in [3, 4] {
        right(&mut shown, column);
    }
    format!("{}\n", flush(&shown))
}

fn guest_note(guest: &GuestInfo) -> String {
    let from = guest.arrived_from.as_deref().map(|from| format!("came from {}", clean(from)));
    let moves = matches!(guest.state, GuestState::Moving | GuestState::Arriving | GuestState::InDoubt);
    let migration = guest.migration.as_deref().filter(|_| moves);
    let migration = migration.map(|id| format!("migration {}", short(id, DIGITS)));
    let note = guest.note.as_deref().map(clean);
    [from, migration, note].into_iter().flatten().collect::<Vec<_>>().join("; ")
}

/// So many digits that no two of these migrations look alike, at least [`DIGITS`].
fn distinct(migrations: &[Migration]) -> usize {
    let ids: BTreeSet<&str> = migrations.iter().map(|migration| migration.id.as_str()).collect();
    let longest = ids.iter().map(|id| id.chars().count()).max().unwrap_or(DIGITS);
    let apart =
        |digits: &usize| ids.iter().map(|id| short(id, *digits)).collect::<BTreeSet<_>>().len() == ids.len();
    (DIGITS..longest).find(apart).unwrap_or(longest)
}

fn short(id: &str, digits: usize) -> String {
    clean(id).chars().take(digits).collect()
}

fn right(table: &mut comfy_table::Table, column: usize) {
    if let Some(column) = table.column_mut(column) {
        column.set_cell_alignment(CellAlignment::Right);
    }
}

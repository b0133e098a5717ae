//! The account of a migration, for the person who waited for it.

use super::table::{self, channels, indented, rounds, seconds};
use super::words::{self, INSECURE, clean};
use crate::host::api::migration::{Migration, MigrationState};

/// How a migration went: what it means for the guest first, figures below. Ends with a line feed.
#[must_use]
pub fn result_text(migration: &Migration) -> String {
    let mut text = format!("{}: {}.\n", words::outcome(migration.state), words::meaning(migration));
    if let Some(cause) = &migration.cause {
        text.push_str(&format!("Cause: {}\n", clean(cause)));
    }
    if migration.insecure {
        text.push_str(&format!("{INSECURE}: the hosts did not prove who they are (allow_insecure).\n"));
    }
    text.push_str(&format!("\n{}\n", indented(&table::facts(&words::facts(migration)))));
    if !migration.rounds.is_empty() {
        let paused = match migration.state {
            MigrationState::Completed | MigrationState::InDoubt => "; the guest is paused in the last",
            _ => "",
        };
        text.push_str(&format!(
            "\nRounds (each sends what the guest wrote during the one before{paused})\n{}\n",
            indented(&rounds(&migration.rounds))
        ));
    }
    if !migration.downtime_parts.is_empty() {
        let mut parts = table::table(&[]);
        for part in &migration.downtime_parts {
            parts.add_row([clean(&part.name), seconds(part.seconds)]);
        }
        text.push_str(&format!("\nDowntime, part by part\n{}\n", indented(&parts)));
    }
    if !migration.channels.is_empty() {
        text.push_str(&format!("\nChannels\n{}\n", indented(&channels(migration.channels.iter()))));
    }
    let notes = migration.notes.iter().map(|note| format!("{}: {}", clean(&note.name), clean(&note.finding)));
    text.push_str(&list("Noted before it began", notes));
    text.push_str(&list("Warnings", migration.warnings.iter().map(|warning| clean(warning))));
    text
}

/// A heading and lines below it; nothing where there are none.
fn list(heading: &str, lines: impl Iterator<Item = String>) -> String {
    let lines: String = lines.map(|line| format!("  {line}\n")).collect();
    if lines.is_empty() { lines } else { format!("\n{heading}\n{lines}") }
}

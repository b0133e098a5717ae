//! The checks themselves: what follows from the facts of both hosts. Nothing here asks the kernel or the network, but for the
//! processor, which only the destination can compare.
//!
//! The names are stable, `docs/preflight.md` lists them. Every failed check says what to do.

mod destination;
mod encryption;
mod links;
mod qemu;
mod source;

pub use destination::at_destination;
pub use qemu::at_destination as qemu_at_destination;
pub use source::{SourceView, at_source};

use crate::host::api::check::{Check, CheckStatus};

fn passed(name: &str, finding: impl AsRef<str>) -> Check {
    check(name, CheckStatus::Passed, finding.as_ref(), None)
}

fn failed(name: &str, finding: impl AsRef<str>, advice: impl AsRef<str>) -> Check {
    check(name, CheckStatus::Failed, finding.as_ref(), Some(advice.as_ref()))
}

fn note(name: &str, finding: impl AsRef<str>, advice: impl AsRef<str>) -> Check {
    check(name, CheckStatus::Note, finding.as_ref(), Some(advice.as_ref()))
}

fn check(name: &str, status: CheckStatus, finding: &str, advice: Option<&str>) -> Check {
    Check { name: name.to_owned(), status, finding: shown(finding), advice: advice.map(shown) }
}

/// Names and reasons come from the other host: without what could rewrite a terminal.
fn shown(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Slots for migrations in one direction.
fn slots(host: &str, direction: &str, free: u32, most: u32) -> Check {
    if free > 0 {
        return passed("slots", format!("{host} has {free} of {most} slots for {direction} migrations free"));
    }
    let finding = match most {
        0 => format!("{host} takes part in no {direction} migrations"),
        _ => format!("{host} has no slot for {direction} migrations free; it has {most} (max_migrations)"),
    };
    let advice = match most {
        0 => format!("raise max_migrations in {host}'s host file"),
        _ => format!("wait until one is over (--wait does), or raise max_migrations in {host}'s host file"),
    };
    failed("slots", finding, advice)
}

#[cfg(test)]
mod tests;

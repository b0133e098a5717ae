//! The checks before a migration.

use super::table::{indented, table};
use super::words::clean;
use crate::host::api::check::{CheckReport, CheckStatus, PathInfo};
use crate::units::Bytes;

/// Every check with how it came out, the paths that would be used, and at the end what to do about those that failed.
/// Ends with a line feed.
#[must_use]
pub fn check_text(report: &CheckReport) -> String {
    let mut text = headline(report);
    let mut checks = table(&[]);
    for check in &report.checks {
        checks.add_row([clean(&check.name), status(check.status).to_owned(), clean(&check.finding)]);
    }
    if !report.checks.is_empty() {
        text.push_str(&format!("\n{}\n", indented(&checks)));
    }
    if !report.paths.is_empty() {
        text.push_str(&format!("\nPaths, the preferred first\n{}\n", indented(&paths(&report.paths))));
    }
    if !report.ok {
        text.push_str("\nWhat to do\n");
    }
    for check in report.failed() {
        text.push_str(&format!("  {}: {}\n", clean(&check.name), clean(&check.finding)));
        let advice = check.advice.as_deref().map(clean);
        text.push_str(&advice.map(|advice| format!("    {advice}\n")).unwrap_or_default());
    }
    text
}

fn headline(report: &CheckReport) -> String {
    let (host, all) = (clean(&report.destination), report.checks.len());
    match report.failed().count() {
        0 if report.ok => format!("Ready: the guest can move to {host}.\n"),
        1 => format!("Not ready: 1 of {all} checks failed, so the guest cannot move to {host}.\n"),
        failed => {
            format!("Not ready: {failed} of {all} checks failed, so the guest cannot move to {host}.\n")
        }
    }
}

fn status(status: CheckStatus) -> &'static str {
    match status {
        CheckStatus::Passed => "passed",
        CheckStatus::Failed => "FAILED",
        CheckStatus::Note => "note",
    }
}

fn paths(paths: &[PathInfo]) -> comfy_table::Table {
    let mut shown = table(&["Here", "Address", "There", "Address", "Speed", "MTU", "Cap"]);
    for path in paths {
        shown.add_row([
            clean(&path.interface),
            path.source.to_string(),
            clean(&path.peer_interface),
            path.destination.to_string(),
            speed(path.speed_bits_per_second),
            path.mtu.to_string(),
            path.bandwidth_cap.map_or_else(|| "none".to_owned(), |cap| format!("{}/s", Bytes(cap))),
        ]);
    }
    shown
}

/// A link's speed as it is printed on the box: `10 Gbit/s`.
pub(in crate::host) fn speed(bits: Option<u64>) -> String {
    match bits {
        None => "unknown".to_owned(),
        Some(bits) if bits >= 1_000_000_000 => format!("{} Gbit/s", bits as f64 / 1e9),
        Some(bits) => format!("{} Mbit/s", bits as f64 / 1e6),
    }
}

//! How a relay went, as JSON and for people. `docs/json.md` describes the fields.

use std::fmt::Write as _;

use serde::Serialize;

use crate::engine::relay::{RelayOutcome, RelayReport};
use crate::host::view::words::clean;
use crate::units::{Bytes, PAGE_SIZE};

#[derive(Debug, Serialize)]
pub(super) struct RelayResult {
    outcome: &'static str,
    cause: Option<String>,
    mode_requested: &'static str,
    mode_used: &'static str,
    mode_reason: String,
    placed_blocks: Vec<String>,
    relay_because: Option<String>,
    channels: Vec<Channel>,
    wire_bytes: u64,
    placed_bytes: u64,
    total_seconds: f64,
    downtime_seconds: Option<f64>,
    qemu_status: String,
    qemu_downtime_seconds: Option<f64>,
    qemu_rounds: u64,
    qemu_normal_pages: u64,
    qemu_zero_pages: u64,
    guest_runs_here: Option<bool>,
    guest_status_here: Option<String>,
    cpu_seconds: f64,
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Channel {
    local: String,
    remote: String,
    interface: Option<String>,
    bytes: u64,
}

impl RelayResult {
    pub(super) fn of(report: &RelayReport) -> Self {
        let (outcome, cause) = match &report.outcome {
            RelayOutcome::Completed => ("completed", None),
            RelayOutcome::RolledBack { cause } => ("rolled_back", Some(clean(cause))),
            RelayOutcome::InDoubt { cause } => ("in_doubt", Some(clean(cause))),
        };
        let channel = |channel: &crate::session::ChannelStats| Channel {
            local: channel.local.to_string(),
            remote: channel.remote.to_string(),
            interface: channel.interface.clone(),
            bytes: channel.bytes,
        };
        Self {
            outcome,
            cause,
            mode_requested: report.mode_requested.name(),
            mode_used: report.mode_used.name(),
            mode_reason: report.mode_reason.clone(),
            placed_blocks: report.placed_blocks.iter().map(|name| clean(name)).collect(),
            relay_because: report.relay_because.as_deref().map(clean),
            channels: report.channels.iter().map(channel).collect(),
            wire_bytes: report.wire_bytes,
            placed_bytes: report.placed_pages * PAGE_SIZE,
            total_seconds: report.total.as_secs_f64(),
            downtime_seconds: report.downtime.map(|downtime| downtime.as_secs_f64()),
            qemu_status: report.qemu.status.clone(),
            qemu_downtime_seconds: report.qemu.downtime_ms.map(|ms| ms as f64 / 1000.0),
            qemu_rounds: report.qemu.rounds,
            qemu_normal_pages: report.qemu.normal_pages,
            qemu_zero_pages: report.qemu.zero_pages,
            guest_runs_here: report.guest_here.as_ref().map(|(runs, _)| *runs),
            guest_status_here: report.guest_here.as_ref().map(|(_, status)| clean(status)),
            cpu_seconds: report.cpu.as_secs_f64(),
            warnings: report.warnings.iter().map(|warning| clean(warning)).collect(),
        }
    }

    /// In words, with a line's end.
    pub(super) fn text(&self, source: bool) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let mut line = |what: std::fmt::Arguments<'_>| {
            let _ = writeln!(text, "{what}");
        };
        let cause = self.cause.as_deref().unwrap_or_default();
        match self.outcome {
            "completed" if source => line(format_args!("The guest runs at the destination.")),
            "completed" => line(format_args!("The guest is here.")),
            "in_doubt" => line(format_args!("In doubt: {cause}")),
            _ => line(format_args!("The guest did not move: {cause}")),
        }
        if let (true, Some(status)) = (source && self.outcome != "completed", &self.guest_status_here) {
            line(format_args!("Here QEMU says that it is {status}."));
        }
        if self.placed_blocks.is_empty() {
            let because = self.relay_because.as_deref().unwrap_or("there was nothing to place");
            line(format_args!("  pages      in whole packets of QEMU: {because}"));
        } else {
            line(format_args!("  pages      placed, of RAM block {}", self.placed_blocks.join(", ")));
            if let Some(because) = &self.relay_because {
                line(format_args!("             others in whole packets of QEMU: {because}"));
            }
        }
        if source {
            // None was chosen where it failed before.
            if !self.mode_reason.is_empty() {
                line(format_args!("  mode       {} ({})", self.mode_used, self.mode_reason));
            }
            let downtime =
                self.downtime_seconds.map(|seconds| format!(", downtime {:.0} ms", seconds * 1000.0));
            line(format_args!("  time       {:.2} s{}", self.total_seconds, downtime.unwrap_or_default()));
        }
        line(format_args!("  on wire    {} for {}", Bytes(self.wire_bytes), Bytes(self.placed_bytes)));
        for channel in &self.channels {
            let by = channel.interface.as_ref().map(|name| format!(" by {name}")).unwrap_or_default();
            line(format_args!(
                "  channel    {} to {}{by}: {}",
                channel.local,
                channel.remote,
                Bytes(channel.bytes)
            ));
        }
        for warning in &self.warnings {
            line(format_args!("  warning    {warning}"));
        }
        text
    }
}

//! The report as a page for someone who has never seen the tool: how it went first, figures below.

use std::fmt;
use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};

use super::{GuestCheck, Report, ReportedOutcome};
use crate::host::demo_options::GuestKind;
use crate::units::{Bytes, PAGE_SIZE};

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.headline())?;
        let mut facts = table(&[]);
        for (name, value) in self.facts() {
            facts.add_row([name, &value]);
        }
        writeln!(f, "{}", trimmed(&facts))?;
        if !self.rounds.is_empty() {
            let paused = match self.outcome {
                ReportedOutcome::RolledBack => "",
                ReportedOutcome::Completed | ReportedOutcome::InDoubt => "; the guest is paused in the last",
            };
            writeln!(f, "\nRounds (each sends what the guest wrote during the one before{paused})")?;
            writeln!(f, "{}", trimmed(&self.rounds_table()))?;
        }
        if !self.channels.is_empty() {
            writeln!(f, "\nChannels")?;
            writeln!(f, "{}", trimmed(&self.channels_table()))?;
        }
        if !self.warnings.is_empty() {
            writeln!(f, "\nWarnings")?;
        }
        for warning in &self.warnings {
            writeln!(f, "  {warning}")?;
        }
        Ok(())
    }
}

impl Report {
    fn headline(&self) -> String {
        let cause = self.cause.as_deref().map(|cause| format!("\nCause: {cause}")).unwrap_or_default();
        match self.outcome {
            ReportedOutcome::Completed => {
                format!("Completed: the guest moved and runs at the destination.{cause}")
            }
            ReportedOutcome::RolledBack => {
                format!("Rolled back: the guest did not move and goes on at the source.{cause}")
            }
            ReportedOutcome::InDoubt => format!(
                "In doubt: the source gave the guest away and has not heard whether the destination runs it. It stays \
                 stopped at the source until the destination has answered.{cause}"
            ),
        }
    }

    fn facts(&self) -> Vec<(&'static str, String)> {
        let mut facts = vec![("Guest", self.guest_line())];
        facts.push(("Mode", self.mode_line()));
        facts.push(("Downtime", self.downtime_line()));
        facts.push((
            "Total",
            format!(
                "{}, {} over the network, {}/s",
                seconds(self.total_seconds),
                Bytes(self.wire_bytes),
                Bytes(self.throughput_bytes_per_second as u64)
            ),
        ));
        facts.push((
            "Processor time",
            format!(
                "source {}, destination {}",
                seconds(self.source_cpu_seconds),
                seconds(self.destination_cpu_seconds)
            ),
        ));
        if let Some(slowdown) = self.guest_slowdown {
            facts.push(("Guest slowdown", format!("{:.0} % while its memory was copied", slowdown * 100.0)));
        }
        facts.push(("Guest's own check", self.check_line().to_owned()));
        facts.push(("Memory compared", self.equality_line()));
        if self.moves > 1 {
            facts.push((
                "Moves",
                format!("{}, back and forth; the figures are those of the last", self.moves),
            ));
        }
        facts
    }

    fn guest_line(&self) -> String {
        let what = match self.guest {
            GuestKind::Kvm => "a KVM guest",
            GuestKind::Process => "a process's memory",
        };
        let tracker = self.dirty_tracker.map(|kind| format!(", written pages found by {}", kind.name()));
        let why = self.guest_why.as_deref().map(|why| format!(" ({why})"));
        format!(
            "{what} of {}, {} of it in use{}{}",
            Bytes(self.memory_bytes),
            Bytes(self.touched_bytes),
            tracker.unwrap_or_default(),
            why.unwrap_or_default()
        )
    }

    fn mode_line(&self) -> String {
        let requested = self.mode_requested.name();
        let used = match self.mode_used {
            None => return format!("none was chosen yet (asked for: {requested})"),
            Some(used) if used == self.mode_requested => used.name().to_owned(),
            Some(used) => format!("{} (asked for: {requested})", used.name()),
        };
        let reason = self.mode_reason.as_deref().map(|reason| format!(": {reason}"));
        format!("{used}{}", reason.unwrap_or_default())
    }

    fn downtime_line(&self) -> String {
        let limit = seconds(self.downtime_limit_seconds);
        match (self.downtime_seconds, self.downtime_host_seconds) {
            (Some(guest), host) => {
                let host = host.map(|host| format!("; {} as the hosts saw it", seconds(host)));
                format!(
                    "{}, {} the limit of {limit}{}",
                    seconds(guest),
                    self.against_limit(guest),
                    host.unwrap_or_default()
                )
            }
            (None, Some(host)) => {
                format!(
                    "{} as the hosts saw it, {} the limit of {limit}",
                    seconds(host),
                    self.against_limit(host)
                )
            }
            (None, None) => format!("not measured (limit {limit})"),
        }
    }

    fn against_limit(&self, downtime: f64) -> &'static str {
        if downtime <= self.downtime_limit_seconds { "within" } else { "OVER" }
    }

    fn check_line(&self) -> &'static str {
        match self.guest_check {
            Some(GuestCheck::Ok) => "ok: every page that it wrote is as it left it",
            Some(GuestCheck::Corrupt) => "CORRUPT: pages are not as the guest left them",
            None => "not done",
        }
    }

    fn equality_line(&self) -> String {
        let how = self.ram_check.as_deref().map(|how| format!(" ({how})")).unwrap_or_default();
        match self.ram_equal {
            Some(true) => format!("equal byte for byte at the pause{how}"),
            Some(false) => format!("DIFFERENT at the pause{how}"),
            None => "not done".to_owned(),
        }
    }

    fn rounds_table(&self) -> Table {
        let mut rounds = table(&["Round", "Sent", "Over the network", "Took", "Rate", "Written meanwhile"]);
        for (index, round) in self.rounds.iter().enumerate() {
            let rate = if round.seconds > 0.0 { round.bytes as f64 / round.seconds } else { 0.0 };
            rounds.add_row([
                index.to_string(),
                Bytes(round.bytes).to_string(),
                Bytes(round.wire_bytes).to_string(),
                seconds(round.seconds),
                format!("{}/s", Bytes(rate as u64)),
                Bytes(round.dirtied.saturating_mul(PAGE_SIZE)).to_string(),
            ]);
        }
        for column in rounds.column_iter_mut() {
            column.set_cell_alignment(CellAlignment::Right);
        }
        rounds
    }

    fn channels_table(&self) -> Table {
        let mut channels = table(&["From", "To", "Interface", "Carried"]);
        for channel in &self.channels {
            channels.add_row([
                channel.local.clone(),
                channel.remote.clone(),
                channel.interface.clone().unwrap_or_else(|| "unknown".to_owned()),
                Bytes(channel.bytes).to_string(),
            ]);
        }
        channels
    }
}

/// A table without lines: a header where there is one, and columns.
fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    if !header.is_empty() {
        table.set_header(header.iter().copied());
    }
    table
}

/// Lines without the blanks that fill the last column.
fn trimmed(table: &Table) -> String {
    table.to_string().lines().map(|line| format!(" {}", line.trim_end())).collect::<Vec<_>>().join("\n")
}

/// A duration with three digits: `112 ms`, `3.21 s`.
pub(super) fn seconds(seconds: f64) -> String {
    let seconds = Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX).as_secs_f64();
    if seconds < 0.000_999_5 {
        format!("{:.0} us", seconds * 1e6)
    } else if seconds < 0.009_995 {
        format!("{:.2} ms", seconds * 1e3)
    } else if seconds < 0.099_95 {
        format!("{:.1} ms", seconds * 1e3)
    } else if seconds < 0.999_5 {
        format!("{:.0} ms", seconds * 1e3)
    } else {
        format!("{seconds:.2} s")
    }
}

//! The report as a page for someone who has never seen the tool: how it went first, figures below.

use std::fmt;

use comfy_table::Table;

use super::{ChannelReport, GuestCheck, Report, ReportedOutcome};
use crate::host::api::migration::ChannelInfo;
use crate::host::demo_options::GuestKind;
use crate::host::view::table::{self, indented, seconds};
use crate::units::Bytes;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.headline())?;
        writeln!(f, "{}", indented(&table::facts(&self.facts())))?;
        if !self.rounds.is_empty() {
            let paused = match self.outcome {
                ReportedOutcome::RolledBack => "",
                ReportedOutcome::Completed | ReportedOutcome::InDoubt => "; the guest is paused in the last",
            };
            writeln!(f, "\nRounds (each sends what the guest wrote during the one before{paused})")?;
            writeln!(f, "{}", indented(&table::rounds(&self.rounds)))?;
        }
        if !self.channels.is_empty() {
            writeln!(f, "\nChannels")?;
            writeln!(f, "{}", indented(&self.channels_table()))?;
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

    fn channels_table(&self) -> Table {
        let shown: Vec<ChannelInfo> = self.channels.iter().map(ChannelReport::info).collect();
        table::channels(shown.iter())
    }
}

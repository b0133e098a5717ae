//! The demonstration's account: what both processes and the guest said, put together into one report.

use crate::dirty::TrackerKind;
use crate::host::demo::watch::Ends;
use crate::host::demo_options::{DemoOptions, GuestKind};
use crate::host::holder::protocol::{GuestSeen, Moved, Ram};
use crate::host::report::{ChannelReport, GuestCheck, Report, ReportedOutcome, RoundReport};
use crate::host::supervise::SuperviseError;

pub(super) struct Account {
    report: Report,
    /// Two looks at the guest before it moves.
    pace: [GuestSeen; 2],
    corrupt: bool,
    warnings: Vec<String>,
}

impl Account {
    pub(super) fn new(
        options: &DemoOptions,
        guest: GuestKind,
        guest_why: Option<String>,
        tracker: TrackerKind,
    ) -> Self {
        let report = Report {
            outcome: ReportedOutcome::RolledBack,
            cause: None,
            guest,
            guest_why,
            dirty_tracker: Some(tracker),
            mode_requested: options.mode,
            mode_used: None,
            mode_reason: None,
            channels: Vec::new(),
            rounds: Vec::new(),
            memory_bytes: options.memory_bytes,
            touched_bytes: 0,
            wire_bytes: 0,
            total_seconds: 0.0,
            downtime_seconds: None,
            downtime_host_seconds: None,
            downtime_limit_seconds: options.downtime_limit.as_secs_f64(),
            throughput_bytes_per_second: 0.0,
            source_cpu_seconds: 0.0,
            destination_cpu_seconds: 0.0,
            guest_check: None,
            ram_equal: None,
            ram_check: None,
            guest_slowdown: None,
            moves: 0,
            warnings: Vec::new(),
        };
        Self { report, pace: [GuestSeen::default(); 2], corrupt: false, warnings: Vec::new() }
    }

    pub(super) fn pace_before(&mut self, seen: GuestSeen) {
        self.pace[0] = seen;
    }

    pub(super) fn pace_after(&mut self, seen: GuestSeen) {
        self.pace[1] = seen;
    }

    /// How the move ended. Of several moves the last one's figures are reported.
    pub(super) fn moved(&mut self, ends: &Ends) {
        self.warnings.extend(ends.noticed.iter().cloned());
        self.outcome(ends);
        if ends.runs_at_destination() {
            self.report.moves += 1;
        }
        if let Some(arrived) = &ends.arrived {
            self.report.destination_cpu_seconds = arrived.cpu_seconds;
            self.report.downtime_host_seconds = arrived.running.then_some(arrived.downtime_seconds);
            self.warnings.extend(arrived.warnings.iter().map(|warning| format!("destination: {warning}")));
        }
        let Some(moved) = &ends.moved else { return };
        let report = &mut self.report;
        report.mode_used = Some(moved.mode_used);
        report.mode_reason = Some(moved.mode_reason.clone());
        report.channels = moved
            .channels
            .iter()
            .map(|channel| ChannelReport {
                local: channel.local.to_string(),
                remote: channel.remote.to_string(),
                interface: channel.interface.clone(),
                rdma: channel.rdma.clone(),
                encrypted: channel.encrypted,
                bytes: channel.bytes,
            })
            .collect();
        report.rounds = moved
            .rounds
            .iter()
            .map(|round| RoundReport {
                pages: round.pages,
                bytes: round.bytes,
                wire_bytes: round.wire_bytes,
                seconds: round.seconds,
                dirtied: round.dirtied,
            })
            .collect();
        report.memory_bytes = moved.memory_bytes;
        report.touched_bytes = moved.touched_bytes;
        report.wire_bytes = moved.channels.iter().map(|channel| channel.bytes).sum();
        report.total_seconds = moved.total_seconds;
        report.source_cpu_seconds = moved.cpu_seconds;
        let placed: u64 = moved.rounds.iter().map(|round| round.pages * crate::units::PAGE_SIZE).sum();
        let seconds: f64 = moved.rounds.iter().map(|round| round.seconds).sum();
        report.throughput_bytes_per_second = if seconds > 0.0 { placed as f64 / seconds } else { 0.0 };
        report.guest_slowdown = slowdown(&self.pace, moved);
        self.warnings.extend(moved.warnings.iter().map(|warning| format!("source: {warning}")));
        let source_ram = moved.ram.as_ref();
        self.compare_ram(source_ram, ends.arrived.as_ref().and_then(|arrived| arrived.ram.as_ref()));
    }

    fn outcome(&mut self, ends: &Ends) {
        let report = &mut self.report;
        (report.outcome, report.cause) = match &ends.moved {
            Some(moved) if moved.outcome == "completed" => (ReportedOutcome::Completed, None),
            Some(moved) if moved.outcome == "in_doubt" => match ends.settled_here {
                None => (ReportedOutcome::InDoubt, moved.cause.clone()),
                Some(false) => (ReportedOutcome::Completed, None),
                Some(true) => {
                    let cause =
                        "the destination was in doubt, and then had not started the guest and never will";
                    (ReportedOutcome::RolledBack, Some(cause.into()))
                }
            },
            Some(moved) => (ReportedOutcome::RolledBack, moved.cause.clone()),
            // The source is gone, and only the destination can say.
            None if ends.runs_at_destination() => (ReportedOutcome::Completed, None),
            None if ends.source_killed => (
                ReportedOutcome::RolledBack,
                Some("the source process was killed, and its guest with it".into()),
            ),
            None => (ReportedOutcome::RolledBack, ends.noticed.last().cloned()),
        };
        if report.outcome == ReportedOutcome::Completed && ends.destination_killed {
            report.cause = Some("the guest moved, and then its process at the destination was killed".into());
        }
    }

    fn compare_ram(&mut self, source: Option<&Ram>, destination: Option<&Ram>) {
        let (Some(source), Some(destination)) = (source, destination) else { return };
        let equal = source.digest == destination.digest;
        // Of several moves, one that differs is what counts.
        self.report.ram_equal = Some(equal && self.report.ram_equal != Some(false));
        self.report.ram_check = Some(if destination.in_the_pause {
            "digested on both sides in the pause, which made it longer".into()
        } else {
            "digested on both sides as of the pause; at the destination behind the guest's back while it ran"
                .into()
        });
    }

    /// The guest has run a little after the move: how long it stood still, by its own clock.
    pub(super) fn settled(&mut self, seen: GuestSeen) {
        if self.report.outcome == ReportedOutcome::Completed {
            self.report.downtime_seconds = Some(seen.longest_gap);
        }
    }

    /// What the guest found in its memory.
    pub(super) fn verified(&mut self, verified: Result<GuestSeen, SuperviseError>) {
        match verified {
            Ok(seen) => {
                let went_back =
                    seen.writes < self.pace[1].writes || seen.heartbeats <= self.pace[1].heartbeats;
                if went_back {
                    self.warnings.push(
                        "the guest counts less than before it moved: it is not the one that left".into(),
                    );
                }
                self.corrupt |= seen.corrupt > 0 || went_back;
                let check = if self.corrupt { GuestCheck::Corrupt } else { GuestCheck::Ok };
                self.report.guest_check = Some(check);
            }
            Err(error) => {
                self.warnings.push(format!("the guest did not verify its memory: {error}"));
                self.report.guest_check = Some(GuestCheck::Corrupt);
            }
        }
    }

    pub(super) fn report(mut self) -> Report {
        self.report.warnings = self.warnings;
        self.report
    }
}

/// The share of its pace that the guest lost between the start of the move and its pause.
fn slowdown(pace: &[GuestSeen; 2], moved: &Moved) -> Option<f64> {
    let rate = |from: GuestSeen, to: GuestSeen, seconds: f64| {
        (seconds > 0.0).then(|| to.writes.saturating_sub(from.writes) as f64 / seconds)
    };
    let usual = rate(pace[0], pace[1], pace[1].at - pace[0].at).filter(|usual| *usual > 0.0)?;
    let running = moved.total_seconds - moved.paused_seconds;
    Some((1.0 - rate(moved.guest_before, moved.guest_after, running)? / usual).max(0.0))
}

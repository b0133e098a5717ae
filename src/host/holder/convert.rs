//! The engine's reports as they travel to the supervisor.

use crate::engine::observe::{self, DestinationReport, SourceReport};
use crate::host::api::migration::RdmaPort;
use crate::host::holder::protocol::{
    Arrived, GuestSeen, MoveLink, MoveProgress, Moved, MovedChannel, MovedRound, Ram,
};
use crate::migration::convergence::RoundRecord;
use crate::migration::handover::{Arrival, Outcome};

pub(super) fn move_progress(progress: &observe::Progress) -> MoveProgress {
    MoveProgress {
        phase: progress.phase.name().to_owned(),
        mode: progress.mode.name().to_owned(),
        interfaces: progress.interfaces.clone(),
        links: progress.links.iter().map(move_link).collect(),
        round: progress.round.0,
        bytes_per_second: progress.bytes_per_second,
        remaining_bytes: progress.remaining_bytes,
        expected_downtime: progress.expected_downtime.map(|time| time.as_secs_f64()),
        note: progress.note.clone(),
        rounds: progress.rounds.iter().map(moved_round).collect(),
    }
}

pub(super) fn move_link(link: &observe::LinkSeen) -> MoveLink {
    MoveLink {
        interface: link.interface.clone(),
        channels: link.channels,
        bytes: link.bytes,
        bytes_per_second: link.bytes_per_second,
        state: link.state.name().to_owned(),
    }
}

pub(super) fn moved(report: SourceReport, guest_before: GuestSeen, guest_after: GuestSeen) -> Moved {
    let mut warnings = report.warnings;
    let (outcome, cause) = match report.outcome {
        Outcome::Completed { warnings: more } => {
            warnings.extend(more);
            ("completed", None)
        }
        Outcome::RolledBack { cause } => ("rolled_back", Some(cause)),
        Outcome::InDoubt { token } => (
            "in_doubt",
            Some(format!(
                "the destination was told to run the guest and does not answer; the guest stays paused here until it \
                 does (token {token})"
            )),
        ),
    };
    Moved {
        outcome: outcome.to_owned(),
        cause,
        mode_used: report.mode_used,
        mode_reason: report.mode_reason,
        channels: report
            .channels
            .into_iter()
            .map(|channel| MovedChannel {
                local: channel.local,
                remote: channel.remote,
                interface: channel.interface,
                rdma: RdmaPort::of(&channel.carrier),
                encrypted: channel.carrier.is_encrypted(),
                bytes: channel.bytes,
                lost: channel.lost,
            })
            .collect(),
        rounds: report.rounds.iter().map(moved_round).collect(),
        memory_bytes: report.memory_bytes,
        touched_bytes: report.touched_bytes,
        total_seconds: report.total.as_secs_f64(),
        paused_seconds: report.paused.as_secs_f64(),
        downtime_parts: report
            .downtime_parts
            .iter()
            .map(|(name, time)| ((*name).to_owned(), time.as_secs_f64()))
            .collect(),
        throttle: report.throttle,
        cpu_seconds: report.cpu.as_secs_f64(),
        ram: report.ram.as_ref().map(ram),
        guest_before,
        guest_after,
        warnings,
    }
}

fn moved_round(round: &RoundRecord) -> MovedRound {
    MovedRound {
        pages: round.pages,
        bytes: round.bytes,
        wire_bytes: round.wire_bytes,
        seconds: round.took.as_secs_f64(),
        dirtied: round.dirtied,
    }
}

fn ram(digest: &observe::RamDigest) -> Ram {
    Ram {
        digest: format!("{:032x}/{}", digest.digest.digest, digest.digest.nonzero_pages),
        in_the_pause: digest.in_the_pause,
    }
}

pub(super) fn arrived(report: DestinationReport) -> Arrived {
    let (running, cause) = match report.arrival {
        Arrival::Running { .. } => (true, None),
        Arrival::Discarded { cause } => (false, Some(cause)),
    };
    Arrived {
        running,
        cause,
        in_doubt: false,
        downtime_seconds: report.downtime.as_secs_f64(),
        cpu_seconds: report.cpu.as_secs_f64(),
        ram: report.ram.as_ref().map(ram),
        warnings: report.warnings,
    }
}

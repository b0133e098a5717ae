//! What the source finds out, from its own facts and the destination's.

use std::time::Duration;

use super::encryption::{encryption, forbids_rdma};
use super::links::links;
use super::{failed, note, passed, slots};
use crate::host::api::check::{Check, PathInfo};
use crate::host::network::probe::ProbeResult;
use crate::host::preflight::HostFacts;
use crate::session::TransferMode;
use crate::session::mode::{Capabilities, resolve};

/// Clocks that differ by more than this are worth a word.
const MOST_SKEW_SECONDS: f64 = 1.0;

/// What the source knows when it judges.
#[derive(Clone, Copy, Debug)]
pub struct SourceView<'a> {
    /// Its own facts. Its clock was read when the destination's facts arrived.
    pub ours: &'a HostFacts,
    /// The destination's.
    pub theirs: &'a HostFacts,
    /// How long the destination's answer took.
    pub round_trip: Duration,
    /// What its host file names in vain ([`crate::host::network::allowed::unmatched`]).
    pub unmatched: &'a [String],
    /// The paths between the two.
    pub paths: &'a [PathInfo],
    /// What each of them carries.
    pub probes: &'a [ProbeResult],
    /// Slots for outgoing migrations that are free.
    pub free_outgoing: u32,
    /// How many there are.
    pub max_outgoing: u32,
    /// The mode that is asked for.
    pub mode: TransferMode,
}

/// All checks at the source.
#[must_use]
pub fn at_source(view: &SourceView<'_>) -> Vec<Check> {
    let mut checks = links(view);
    checks.push(protocol(view));
    checks.push(guest_state(view));
    checks.push(slots(&view.ours.name, "outgoing", view.free_outgoing, view.max_outgoing));
    checks.push(clock(view));
    checks.push(trust(view));
    checks.push(encryption(view));
    checks.push(mode(view));
    checks
}

fn protocol(view: &SourceView<'_>) -> Check {
    let (ours, theirs) = (&view.ours.versions, &view.theirs.versions);
    let common = ours.newest_protocol.min(theirs.newest_protocol);
    if common >= ours.oldest_protocol.max(theirs.oldest_protocol) {
        return passed("protocol", format!("both hosts speak version {common} of the migration protocol"));
    }
    let finding = format!(
        "{} (pageferry {}) speaks versions {} to {} of the migration protocol, {} (pageferry {}) {} to {}",
        view.ours.name,
        ours.program,
        ours.oldest_protocol,
        ours.newest_protocol,
        view.theirs.name,
        theirs.program,
        theirs.oldest_protocol,
        theirs.newest_protocol
    );
    let update = if theirs.newest_protocol < ours.newest_protocol { view.theirs } else { view.ours };
    failed("protocol", finding, update_advice(update))
}

/// An older source moves to a newer destination; not the other way round, unless the destination can read what the source
/// writes.
fn guest_state(view: &SourceView<'_>) -> Check {
    let (ours, theirs) = (&view.ours.versions, &view.theirs.versions);
    let written = ours.guest_state;
    if (theirs.oldest_guest_state..=theirs.guest_state).contains(&written) {
        let finding = format!(
            "{} reads version {written} of the guest state, which {} writes",
            view.theirs.name, view.ours.name
        );
        return passed("guest-state", finding);
    }
    let finding = format!(
        "{} (pageferry {}) writes version {written} of the guest state, {} (pageferry {}) reads {} to {}",
        view.ours.name,
        ours.program,
        view.theirs.name,
        theirs.program,
        theirs.oldest_guest_state,
        theirs.guest_state
    );
    let update = if written > theirs.guest_state { view.theirs } else { view.ours };
    failed("guest-state", finding, update_advice(update))
}

fn update_advice(older: &HostFacts) -> String {
    format!("update pageferry at {}: an older source can move to a newer destination", older.name)
}

fn clock(view: &SourceView<'_>) -> Check {
    let (ours, theirs) = (&view.ours.name, &view.theirs.name);
    // The destination read its clock at some moment of the round trip, most likely in its middle.
    let half = view.round_trip.as_secs_f64() / 2.0;
    let skew = view.theirs.clock - (view.ours.clock - half);
    let apart = skew.abs();
    // What is no number is no small one either.
    if apart.is_finite() && apart - half <= MOST_SKEW_SECONDS {
        return passed(
            "clock",
            format!("the clocks of {ours} and {theirs} are within {MOST_SKEW_SECONDS} s"),
        );
    }
    let side = if skew > 0.0 { "ahead of" } else { "behind" };
    note(
        "clock",
        format!("{theirs}'s clock is {apart:.1} s {side} that of {ours} (give or take {half:.1} s)"),
        "have both follow the same time (chrony): the guest's clock jumps by the difference, and downtimes are wrong by it",
    )
}

fn trust(view: &SourceView<'_>) -> Check {
    let insecure: Vec<&str> = [view.ours, view.theirs]
        .into_iter()
        .filter(|host| host.insecure)
        .map(|host| host.name.as_str())
        .collect();
    if insecure.is_empty() {
        return passed("trust", "both hosts prove who they are");
    }
    note(
        "trust",
        format!("the hosts do not prove who they are: allow_insecure is set at {}", insecure.join(" and ")),
        "make certificates (pageferry pki init, pageferry pki issue) and name them in both host files",
    )
}

/// What the paths carry together, where all of them say.
fn speed(paths: &[PathInfo]) -> Option<u64> {
    paths.iter().map(|path| path.speed_bits_per_second).sum()
}

fn mode(view: &SourceView<'_>) -> Check {
    let asked = view.mode;
    let can = |host: &HostFacts| Capabilities::with_rdma(host.no_rdma.as_deref());
    let resolved =
        resolve(asked, &can(view.ours), &can(view.theirs), speed(view.paths), forbids_rdma(view).as_deref());
    if asked == TransferMode::Rdma && resolved.used != asked {
        let advice = "nothing to do; ask for another mode to be rid of this note";
        return note("mode", format!("rdma is asked for; {}", resolved.reason), advice);
    }
    passed("mode", format!("{}: {}", resolved.used, resolved.reason))
}

//! What a process does with the guest of a QEMU: it holds no guest itself, but carries one between that QEMU and the other host.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::convert::move_link;
use super::protocol::{
    Arrived, Doing, Event, GuestSeen, MoveProgress, MoveSpec, Moved, MovedChannel, QemuEnd, ReceiveSpec,
};
use super::work::{Agreement, linger, path, rdma, set_caps};
use super::{Handles, Holder};
use crate::engine::cancel::{cancel_pair, peer_gone_pair};
use crate::engine::chain;
use crate::engine::observe::{LinkSeen, LinkState};
use crate::engine::relay::destination::{DestinationRelayOptions, Waiting, take_in_place};
use crate::engine::relay::source::{SourceRelayOptions, send};
use crate::engine::relay::{RelayOutcome, RelayProgress, RelayReport};
use crate::guest::qemu::settings::Settings;
use crate::host::api::migration::RdmaPort;
use crate::host::relay::{REOPEN_WITHIN, Rate, control};
use crate::session::caps::RateCaps;
use crate::session::trust::PeerTrust;
use crate::session::{Encryption, RdmaSupport};
use crate::units::PAGE_SIZE;

/// How many channels a QEMU uses to pageferry. One thread reads each; more do not pay on a socket of the same host.
const MULTIFD_CHANNELS: u8 = 2;

impl Holder {
    /// Carries the guest of a QEMU away.
    pub(super) fn migrate_qemu(self: &Arc<Self>, spec: &MoveSpec, qemu: &QemuEnd) -> Result<Event, String> {
        self.not_busy()?;
        let agreement = Agreement::of(spec.agreed.as_ref())?;
        let admission = agreement.admission.ok_or("a guest of QEMU is moved where two hosts agreed on it")?;
        let (cancel, signal) = cancel_pair();
        let (peer_gone, peer_gone_signal) = peer_gone_pair();
        let caps = RateCaps::default();
        set_caps(&caps, &spec.caps);
        let isolated: Vec<IpAddr> =
            spec.paths.iter().filter(|path| path.isolated).filter_map(|path| path.source).collect();
        let options = SourceRelayOptions {
            qmp: qemu.qmp.clone(),
            socket: None,
            settings: Settings {
                channels: MULTIFD_CHANNELS,
                return_path: true,
                downtime_limit: Duration::from_millis(spec.downtime_limit_ms),
            },
            placement: true,
            migration: Some(admission.migration),
            admission: admission.secret,
            trust: PeerTrust {
                trust: agreement.trust,
                name: spec.agreed.as_ref().and_then(|agreed| agreed.peer_name.clone()),
            },
            paths: spec.paths.iter().map(path).collect::<Result<Vec<_>, _>>()?,
            channels: spec.channels,
            mode: spec.mode,
            rdma: rdma(spec),
            encryption: Encryption { required: spec.requires_encryption, isolated },
            rate_caps: caps.clone(),
            control: control(),
            reopen_within: REOPEN_WITHIN,
            cancel: signal,
            peer_gone: peer_gone_signal,
            faults: self.faults(spec.fault.as_ref())?,
        };
        {
            let mut state = self.state();
            state.doing = Doing::Moving;
            state.migration = spec.agreed.as_ref().map(|agreed| agreed.migration.clone());
            (state.moved, state.settled, state.progress) = (None, None, None);
        }
        let holder = Arc::clone(self);
        let spawned = self.spawn(Handles { cancel, peer_gone: Some(peer_gone), caps }, move || {
            let mut rate = Rate::default();
            let report = send(&options, &mut |seen| {
                let progress = progress(seen, rate.update(seen));
                holder.state().progress = Some(progress.clone());
                holder.outlet.emit(Event::Progress(progress));
            });
            let ended = Box::new(moved(report));
            {
                let mut state = holder.state();
                (state.doing, state.moved) = (Doing::Nothing, Some(ended.clone()));
            }
            holder.outlet.emit(Event::Moved(ended));
        });
        if spawned.is_err() {
            self.state().doing = Doing::Nothing;
        }
        spawned.map(|()| Event::Done)
    }

    /// Takes a guest in for a QEMU that waits.
    pub(super) fn receive_qemu(
        self: &Arc<Self>,
        spec: &ReceiveSpec,
        qemu: &QemuEnd,
    ) -> Result<Event, String> {
        self.not_busy()?;
        let agreement = Agreement::of(spec.agreed.as_ref())?;
        let admission =
            agreement.admission.ok_or("a guest of QEMU is taken in where two hosts agreed on it")?;
        let (cancel, signal) = cancel_pair();
        let isolated = spec.listen.iter().filter(|at| at.isolated).map(|at| at.address).collect();
        let options = DestinationRelayOptions {
            qmp: qemu.qmp.clone(),
            socket: None,
            placement: true,
            link_timeout: control().link_timeout,
            rdma: Some(RdmaSupport::of_this_host_with(&spec.rdma)),
            encryption: Encryption { required: spec.requires_encryption, isolated },
            takes_tls: !agreement.trust.is_insecure(),
            cancel: signal,
            faults: self.faults(spec.fault.as_ref())?,
        };
        let waiting = Waiting::connect(&options).map_err(|error| chain(&error))?;
        let endpoint = self.endpoint_for(spec, &agreement, control())?;
        let addresses = endpoint.local_addresses();
        {
            let mut state = self.state();
            state.doing = Doing::Receiving;
            state.migration = spec.agreed.as_ref().map(|agreed| agreed.migration.clone());
            state.begun = false;
        }
        let holder = Arc::clone(self);
        let (made, place_made) = crossbeam_channel::bounded::<()>(1);
        let spawned = self.spawn(Handles { cancel, peer_gone: None, caps: RateCaps::default() }, move || {
            let place = endpoint.expect_only(admission);
            let _ = made.send(());
            let begun = || {
                holder.state().begun = true;
                holder.outlet.emit(Event::Begun);
            };
            let report = take_in_place(waiting, &options, place, begun);
            holder.state().doing = Doing::Nothing;
            holder.told_arrived(arrived(report));
            linger(&holder, endpoint);
        });
        if spawned.is_err() {
            self.state().doing = Doing::Nothing;
        }
        spawned?;
        let _ = place_made.recv();
        Ok(Event::Receiving { addresses })
    }
}

/// The phase of a migration, in the words of pageferry's own.
fn phase(qemu_status: &str) -> &str {
    match qemu_status {
        "none" | "setup" => "set-up",
        "active" => "pre-copy",
        "pre-switchover" | "device" => "stop-and-copy",
        "completed" => "handover",
        "cancelling" | "cancelled" | "failed" => "roll-back",
        other => other,
    }
}

fn progress(seen: &RelayProgress, rate: Option<u64>) -> MoveProgress {
    let live = |link: &&LinkSeen| link.state == LinkState::Up;
    let mut interfaces: Vec<String> =
        seen.links.iter().filter(live).filter_map(|link| link.interface.clone()).collect();
    interfaces.dedup();
    let none = |gone: Duration| {
        format!(
            "no channel lives; they are tried again ({} s of {} s)",
            gone.as_secs(),
            REOPEN_WITHIN.as_secs()
        )
    };
    MoveProgress {
        phase: phase(&seen.qemu.status).to_owned(),
        mode: seen.mode.name().to_owned(),
        interfaces,
        links: seen.links.iter().map(move_link).collect(),
        round: u32::try_from(seen.qemu.rounds).unwrap_or(u32::MAX),
        bytes_per_second: rate.unwrap_or_default(),
        remaining_bytes: seen.qemu.remaining_bytes,
        expected_downtime: None,
        rounds: Vec::new(),
        note: seen.none_for.map(none),
    }
}

fn moved(report: RelayReport) -> Moved {
    let (outcome, cause) = match report.outcome {
        RelayOutcome::Completed => ("completed", None),
        // Whether a QEMU that does not say how its guest is has ended, and what that means, the daemon finds out.
        RelayOutcome::RolledBack { cause } if report.began && report.guest_here.is_none() => {
            ("in_doubt", Some(cause))
        }
        RelayOutcome::RolledBack { cause } => ("rolled_back", Some(cause)),
        RelayOutcome::InDoubt { cause } => ("in_doubt", Some(cause)),
    };
    let mut mode_reason = report.mode_reason;
    if !report.placed_blocks.is_empty() {
        let blocks = report.placed_blocks.join(", ");
        mode_reason += &format!("; pages of RAM block {blocks} go from memory to memory");
    }
    let mut warnings = report.warnings;
    warnings.extend(report.relay_because.map(|why| format!("QEMU's packets were carried whole: {why}")));
    let touched = report.qemu.normal_pages.saturating_mul(PAGE_SIZE).min(report.qemu.total_bytes);
    Moved {
        outcome: outcome.to_owned(),
        cause,
        mode_used: report.mode_used,
        mode_reason,
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
                lost: !channel.alive,
            })
            .collect(),
        rounds: Vec::new(),
        memory_bytes: report.qemu.total_bytes,
        touched_bytes: touched,
        total_seconds: report.total.as_secs_f64(),
        paused_seconds: report.downtime.unwrap_or_default().as_secs_f64(),
        downtime_parts: Vec::new(),
        throttle: 0,
        cpu_seconds: report.cpu.as_secs_f64(),
        ram: None,
        guest_before: GuestSeen::default(),
        guest_after: GuestSeen::default(),
        warnings,
    }
}

fn arrived(report: Option<RelayReport>) -> Arrived {
    let Some(report) = report else {
        let cause = Some("it was told not to wait any longer".into());
        return Arrived { cause, ..Arrived::default() };
    };
    let (running, in_doubt, cause) = match report.outcome {
        RelayOutcome::Completed => (true, false, None),
        RelayOutcome::RolledBack { cause } => (false, false, Some(cause)),
        RelayOutcome::InDoubt { cause } => (false, true, Some(cause)),
    };
    Arrived {
        running,
        in_doubt,
        cause,
        downtime_seconds: report.downtime.unwrap_or_default().as_secs_f64(),
        cpu_seconds: report.cpu.as_secs_f64(),
        ram: None,
        warnings: report.warnings,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::relay::RelayOutcome;

    fn report(outcome: RelayOutcome) -> RelayReport {
        RelayReport { outcome, ..RelayReport::new(crate::session::TransferMode::Tcp) }
    }

    #[test]
    fn where_the_guest_is_is_never_told_better_than_it_is_known() {
        let rolled_back = || RelayOutcome::RolledBack { cause: "cut".into() };
        assert_eq!(moved(report(rolled_back())).outcome, "rolled_back");
        let silent = RelayReport { began: true, guest_here: None, ..report(rolled_back()) };
        assert_eq!(moved(silent).outcome, "in_doubt");
        let known =
            RelayReport { began: true, guest_here: Some((true, "running".into())), ..report(rolled_back()) };
        assert_eq!(moved(known).outcome, "rolled_back");
        assert_eq!(moved(report(RelayOutcome::InDoubt { cause: "cut".into() })).outcome, "in_doubt");
        let here = arrived(Some(report(RelayOutcome::InDoubt { cause: "cut".into() })));
        assert!(here.in_doubt && !here.running);
        assert!(arrived(Some(report(RelayOutcome::Completed))).running);
        assert!(!arrived(None).running);
    }

    #[test]
    fn packets_that_were_carried_whole_are_a_warning() {
        let whole =
            RelayReport { relay_because: Some("ram0 is private".into()), ..report(RelayOutcome::Completed) };
        assert_eq!(moved(whole).warnings, ["QEMU's packets were carried whole: ram0 is private"]);
    }
}

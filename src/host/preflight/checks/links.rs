//! What the network between the two hosts carries.

use std::time::Duration;

use super::source::SourceView;
use super::{failed, note, passed};
use crate::host::api::check::{Check, PathInfo};
use crate::host::network::Offer;
use crate::host::network::probe::ProbeResult;
use crate::host::preflight::HostFacts;
use crate::units::Bytes;

/// A path that carries something.
struct Usable<'a> {
    path: &'a PathInfo,
    rtt: Duration,
    mtu_ok: bool,
    largest: u32,
}

/// `network`, `reachable`, `mtu` and `speed`; a check that has nothing to look at, because one before failed, is left out.
pub(super) fn links(view: &SourceView<'_>) -> Vec<Check> {
    let mut checks = vec![network(view)];
    if view.paths.is_empty() {
        return checks;
    }
    for unmatched in view.unmatched {
        checks.push(note("network", unmatched, "correct the host file, or bring the interface up"));
    }
    let (usable, silent) = part(view);
    checks.push(reachable(view, &usable, &silent));
    if !usable.is_empty() {
        checks.push(mtu(view, &usable));
        checks.push(speed(&usable));
    }
    checks
}

fn part<'a>(view: &SourceView<'a>) -> (Vec<Usable<'a>>, Vec<String>) {
    let (mut usable, mut silent) = (Vec::new(), Vec::new());
    for (path, result) in view.paths.iter().zip(view.probes) {
        match result {
            ProbeResult::Reachable { rtt, mtu_ok, largest } => {
                usable.push(Usable { path, rtt: *rtt, mtu_ok: *mtu_ok, largest: *largest });
            }
            ProbeResult::Silent { why } => {
                let why = why.as_deref().unwrap_or("no answer");
                silent.push(format!("{} ({why})", way(path)));
            }
        }
    }
    (usable, silent)
}

fn way(path: &PathInfo) -> String {
    format!("{} from {} to {}", path.interface, path.source, path.destination)
}

fn network(view: &SourceView<'_>) -> Check {
    let (ours, theirs) = (&view.ours.name, &view.theirs.name);
    if !view.paths.is_empty() {
        let each: Vec<String> = view.paths.iter().map(way).collect();
        return passed("network", format!("{ours} and {theirs} are joined by {}", each.join(", ")));
    }
    let mut finding = format!(
        "no network that {ours} may use leads to one that {theirs} may use; {}, {}",
        allowed(view.ours),
        allowed(view.theirs)
    );
    for unmatched in view.unmatched {
        finding += "; ";
        finding += unmatched;
    }
    failed(
        "network",
        finding,
        "name networks in both host files that join the two hosts, or add a route from one to the other",
    )
}

fn allowed(host: &HostFacts) -> String {
    let show = |offer: &Offer| format!("{}/{} on {}", offer.address, offer.prefix, offer.interface);
    let each: Vec<String> = host.offers.iter().map(show).collect();
    format!("{} has {}", host.name, if each.is_empty() { "none".to_owned() } else { each.join(", ") })
}

fn reachable(view: &SourceView<'_>, usable: &[Usable<'_>], silent: &[String]) -> Check {
    let theirs = &view.theirs.name;
    let advice = format!(
        "look at the cables, the switches' VLANs and the firewalls: {theirs} must be reached by TCP and UDP at the \
         migration_ports of its host file"
    );
    let silent = silent.join(", ");
    if usable.is_empty() {
        return failed("reachable", format!("{theirs} does not answer on any path: {silent}"), advice);
    }
    if !silent.is_empty() {
        let finding = format!(
            "{theirs} does not answer on {silent}; {} of {} paths work",
            usable.len(),
            view.paths.len()
        );
        return note("reachable", finding, advice);
    }
    let each: Vec<String> = usable
        .iter()
        .map(|usable| format!("{} in {:.2} ms", usable.path.interface, usable.rtt.as_secs_f64() * 1e3))
        .collect();
    passed("reachable", format!("{theirs} answers on {}", each.join(", ")))
}

fn mtu(view: &SourceView<'_>, usable: &[Usable<'_>]) -> Check {
    let (ours, theirs) = (view.ours, view.theirs);
    let mtu_of = |host: &HostFacts, address, otherwise| {
        host.offers.iter().find(|offer| offer.address == address).map_or(otherwise, |offer| offer.mtu)
    };
    let ends =
        |path: &PathInfo| (mtu_of(ours, path.source, path.mtu), mtu_of(theirs, path.destination, path.mtu));
    let too_small: Vec<&Usable<'_>> = usable.iter().filter(|usable| !usable.mtu_ok).collect();
    if let Some(first) = too_small.first() {
        let each = too_small.iter().map(|Usable { path, largest, .. }| {
            let (here, there) = ends(path);
            format!(
                "{} at {} has MTU {here} and {} at {} {there}, but the largest packet that passes between {} and {} has \
                 {largest} bytes",
                path.interface, ours.name, path.peer_interface, theirs.name, path.source, path.destination
            )
        });
        let advice = format!(
            "set the MTU of every switch and bridge on the way to {} or more, or that of both interfaces to {} (ip link \
             set {} mtu {})",
            first.path.mtu, first.largest, first.path.interface, first.largest
        );
        return failed("mtu", each.collect::<Vec<_>>().join("; "), advice);
    }
    let differing = usable.iter().filter(|usable| ends(usable.path).0 != ends(usable.path).1);
    let each: Vec<String> = differing
        .map(|Usable { path, .. }| {
            let (here, there) = ends(path);
            format!(
                "{} at {} has MTU {here}, {} at {} {there}",
                path.interface, ours.name, path.peer_interface, theirs.name
            )
        })
        .collect();
    if !each.is_empty() {
        let advice = "give both ends the same MTU; until then the smaller one is used";
        return note("mtu", each.join("; "), advice);
    }
    let each: Vec<String> = usable
        .iter()
        .map(|usable| format!("{} bytes on {}", usable.path.mtu, usable.path.interface))
        .collect();
    passed("mtu", format!("the largest packets arrive: {}", each.join(", ")))
}

fn speed(usable: &[Usable<'_>]) -> Check {
    let each: Vec<String> = usable
        .iter()
        .map(|Usable { path, .. }| {
            let speed = path.speed_bits_per_second.map_or("of unknown speed".to_owned(), bits);
            let cap = path.bandwidth_cap.map(|cap| format!(" (the host file allows {}/s)", Bytes(cap)));
            format!("{} {speed}{}", path.interface, cap.unwrap_or_default())
        })
        .collect();
    if usable.iter().any(|usable| usable.path.speed_bits_per_second.is_none()) {
        let advice = "nothing to do: a virtual interface has no speed of its own, and the driver of another may not say it";
        return note("speed", each.join(", "), advice);
    }
    passed("speed", each.join(", "))
}

/// Bits a second in the unit that network cards are sold by.
fn bits(per_second: u64) -> String {
    let megabits = per_second as f64 / 1e6;
    if megabits < 1000.0 { format!("{megabits} Mbit/s") } else { format!("{} Gbit/s", megabits / 1e3) }
}

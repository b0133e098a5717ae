//! By which pairs of interfaces two hosts reach each other.

use std::net::IpAddr;

use super::allowed::subnet;
use super::netlink::Netlink;
use super::{NetworkError, Offer};
use crate::host::api::check::PathInfo;

/// More than two hosts with eight ports each have: the other host's list is not a reason to open any number of sockets.
pub const MAX_PATHS: usize = 64;

/// The paths between two hosts, as [`pair`] finds them; where no interface of one is a neighbour of the other's, those that
/// the routing table knows from each of our interfaces.
///
/// # Errors
/// [`NetworkError`] when the kernel cannot be asked for its routes.
pub async fn paths(ours: &[Offer], theirs: &[Offer]) -> Result<Vec<PathInfo>, NetworkError> {
    let neighbours = pair(ours, theirs);
    if !neighbours.is_empty() {
        return Ok(neighbours);
    }
    routed(ours, theirs).await
}

/// All pairs of interfaces that are neighbours: each has an address that lies in the other's subnet. Ours in our order, for
/// each theirs in their order; the first such pair of addresses for each pair of interfaces; at most [`MAX_PATHS`].
///
/// Loopback joins them only when both are the same machine and nothing else does; there, what leads from an address to
/// itself is taken when there is nothing better.
#[must_use]
pub fn pair(ours: &[Offer], theirs: &[Offer]) -> Vec<PathInfo> {
    let between = pair_by(ours, theirs, |our, their| {
        !our.loopback && !their.loopback && our.address != their.address && neighbours(our, their)
    });
    if !between.is_empty() || !same_machine(ours, theirs) {
        return between;
    }
    let loopback =
        pair_by(ours, theirs, |our, their| our.loopback && their.loopback && neighbours(our, their));
    if !loopback.is_empty() {
        return loopback;
    }
    pair_by(ours, theirs, |our, their| our.address == their.address)
}

fn pair_by(ours: &[Offer], theirs: &[Offer], reach: impl Fn(&Offer, &Offer) -> bool) -> Vec<PathInfo> {
    let mut paths: Vec<PathInfo> = Vec::new();
    for our in ours {
        for their in theirs.iter().filter(|their| reach(our, their)) {
            let taken =
                |path: &PathInfo| path.interface == our.interface && path.peer_interface == their.interface;
            if paths.len() == MAX_PATHS {
                return paths;
            }
            if !paths.iter().any(taken) {
                paths.push(path(our, their));
            }
        }
    }
    paths
}

fn path(our: &Offer, their: &Offer) -> PathInfo {
    let speeds = [our.speed_bits_per_second, their.speed_bits_per_second];
    PathInfo {
        interface: our.interface.clone(),
        source: our.address,
        peer_interface: their.interface.clone(),
        destination: their.address,
        // The slower of what is known: a driver that says nothing makes the link no faster.
        speed_bits_per_second: speeds.into_iter().flatten().min(),
        mtu: our.mtu.min(their.mtu),
        bandwidth_cap: our.bandwidth_cap,
        isolated: our.isolated,
        peer_isolated: their.isolated,
    }
}

fn neighbours(our: &Offer, their: &Offer) -> bool {
    let holds = |offer: &Offer, address| subnet(offer).is_some_and(|subnet| subnet.contains(&address));
    holds(our, their.address) && holds(their, our.address)
}

/// Whether the lists can be of one machine: apart from loopback, one has every address of the other. A bridge that has the
/// same address everywhere (`docker0`) is not enough, unless it is all that a host offers.
fn same_machine(ours: &[Offer], theirs: &[Offer]) -> bool {
    let real = |offers: &[Offer]| -> Vec<IpAddr> {
        offers.iter().filter(|offer| !offer.loopback).map(|offer| offer.address).collect()
    };
    let (ours, theirs) = (real(ours), real(theirs));
    ours.iter().all(|address| theirs.contains(address)) || theirs.iter().all(|address| ours.contains(address))
}

/// From each of our addresses to their first of the same family, where the kernel has a route by our interface.
async fn routed(ours: &[Offer], theirs: &[Offer]) -> Result<Vec<PathInfo>, NetworkError> {
    let netlink = Netlink::open()?;
    let links = super::interfaces::interfaces().await?;
    let mut paths: Vec<PathInfo> = Vec::new();
    for our in ours.iter().filter(|our| !our.loopback) {
        let alike = |their: &&Offer| !their.loopback && their.address.is_ipv4() == our.address.is_ipv4();
        let Some(their) = theirs.iter().find(alike) else { continue };
        let Some(link) = links.iter().find(|link| link.name == our.interface) else { continue };
        if paths.iter().any(|path| path.interface == our.interface) || our.address == their.address {
            continue;
        }
        if netlink.has_route(our.address, link.index, their.address).await {
            paths.push(path(our, their));
        }
    }
    paths.truncate(MAX_PATHS);
    Ok(paths)
}

#[cfg(test)]
mod tests;

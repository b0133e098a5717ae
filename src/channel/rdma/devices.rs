//! The RDMA devices of this host, and of each whether a migration can use it or why not.

use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;

use rustix::net::{AddressFamily, SocketType, netdevice, socket};
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};
use serde::Serialize;

use super::Reason;
use crate::sys::verbs::{self, Context, GidEntry, GidKind, LinkLayer, PortAttributes, PortState};

/// What this host has for RDMA.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RdmaDevices {
    /// Why none can be used; `None` when one can.
    pub reason: Option<Reason>,
    /// What this process may lock, which is what it may register.
    pub memory_lock: MemoryLock,
    /// The devices.
    pub devices: Vec<RdmaDevice>,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RdmaDevice {
    /// Its name, such as `mlx5_0`.
    pub name: String,
    /// Its node, such as `/dev/infiniband/uverbs0`.
    pub node: String,
    /// Why it cannot be used; `None` when it can.
    pub reason: Option<Reason>,
    /// What it can do at most; `None` when it does not open.
    pub limits: Option<Limits>,
    /// Its ports.
    pub ports: Vec<Port>,
}

/// What a device can do at most.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// The version of its firmware; empty for software.
    pub firmware: String,
    /// Bytes in one memory region.
    pub memory_region_bytes: u64,
    /// Memory regions.
    pub memory_regions: u32,
    /// Queue pairs.
    pub queue_pairs: u32,
    /// Work requests that a queue pair holds.
    pub work_requests: u32,
    /// Segments of a work request.
    pub segments: u32,
    /// Entries of a completion queue.
    pub completions: u32,
    /// Whether guest RAM need not be resident and locked to be sent and written.
    pub on_demand_paging: bool,
}

/// A port of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Port {
    /// Its number, from 1.
    pub number: u8,
    /// `active`, `down`, `starting` or `unknown`.
    pub state: &'static str,
    /// `ethernet`, `infiniband` or `unknown`.
    pub link_layer: &'static str,
    /// What it carries, as negotiated; `None` when it does not say.
    pub bits_per_second: Option<u64>,
    /// Payload bytes of one packet, as the interface's MTU allows now.
    pub active_mtu: u32,
    /// The most that it could.
    pub max_mtu: u32,
    /// Bytes of one message.
    pub message_bytes: u32,
    /// Why it cannot be used; `None` when it can.
    pub reason: Option<Reason>,
    /// Its addresses.
    pub gids: Vec<Gid>,
}

/// An address of a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Gid {
    /// Its place in the port's table.
    pub index: u32,
    /// As RDMA writes it.
    pub gid: Ipv6Addr,
    /// `roce-v2`, `roce-v1`, `infiniband` or `unknown`.
    pub kind: &'static str,
    /// The IP address that it is; `None` for InfiniBand.
    pub address: Option<IpAddr>,
    /// The network interface that has the address.
    pub interface: Option<String>,
    /// Whether a migration can use it: RoCE v2 and not link-local.
    pub usable: bool,
}

/// A limit on locked memory. Memory that is registered is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryLock {
    /// `RLIMIT_MEMLOCK` (getrlimit(2)); `None` when this process is not bound by it, by `CAP_IPC_LOCK` or because there is none.
    pub limit_bytes: Option<u64>,
}

impl MemoryLock {
    /// That of this process.
    #[must_use]
    pub fn of_this_process() -> Self {
        let exempt = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
        Self { limit_bytes: if exempt { None } else { getrlimit(Resource::Memlock).current } }
    }

    /// Why so much memory cannot be registered, if so.
    #[must_use]
    pub fn reason_against(self, needed: u64) -> Option<Reason> {
        let limit = self.limit_bytes.filter(|limit| *limit < needed)?;
        Some(Reason::MemlockTooSmall { limit, needed })
    }
}

impl RdmaDevices {
    /// Looks at all devices of this host. What fails is in the answer.
    #[must_use]
    pub fn of_this_host() -> Self {
        let memory_lock = MemoryLock::of_this_process();
        match verbs::devices() {
            Ok(found) => Self::of(found.iter().map(look_at).collect(), memory_lock),
            Err(error) => Self { reason: Some(error.into()), memory_lock, devices: Vec::new() },
        }
    }

    fn of(devices: Vec<RdmaDevice>, memory_lock: MemoryLock) -> Self {
        let reason = match devices.iter().any(|device| device.reason.is_none()) {
            true => None,
            false if devices.is_empty() => Some(Reason::of_no_device(Path::new("/"))),
            // With one device its own reason says more.
            false if devices.len() == 1 => devices[0].reason.clone(),
            false => Some(Reason::NoUsableDevice),
        };
        Self { reason, memory_lock, devices }
    }

    /// The device, the port and the GID that have an IP address of this host, if they can be used.
    #[must_use]
    pub fn at(&self, address: IpAddr) -> Option<(&RdmaDevice, &Port, &Gid)> {
        let devices = self.devices.iter().filter(|device| device.reason.is_none());
        let ports = devices.flat_map(|device| device.ports.iter().map(move |port| (device, port)));
        ports.filter(|(_, port)| port.reason.is_none()).find_map(|(device, port)| {
            let gid = port.gids.iter().find(|gid| gid.usable && gid.address == Some(address))?;
            Some((device, port, gid))
        })
    }

    /// Why no device can be used at an IP address of this host.
    #[must_use]
    pub fn reason_at(&self, address: IpAddr) -> Reason {
        let ports = self.devices.iter().flat_map(|device| &device.ports);
        let has = |port: &&Port| port.gids.iter().any(|gid| gid.address == Some(address));
        let of_port = ports.clone().find(has).and_then(|port| port.reason.clone());
        of_port.or_else(|| self.reason.clone()).unwrap_or(Reason::NotAtAddress(address))
    }
}

fn look_at(device: &verbs::Device) -> RdmaDevice {
    let mut seen = RdmaDevice {
        name: device.name(),
        node: format!("/dev/infiniband/{}", device.node()),
        reason: None,
        limits: None,
        ports: Vec::new(),
    };
    seen.reason = match device.open().and_then(|context| fill(&mut seen, &context)) {
        Ok(()) => Reason::of_transport(device.transport()).or_else(|| of_ports(&seen.ports)),
        Err(error) => Some(error.into()),
    };
    seen
}

fn fill(seen: &mut RdmaDevice, context: &Context) -> Result<(), verbs::VerbsError> {
    let limits = context.limits()?;
    let ports = 1..=limits.ports;
    seen.limits = Some(Limits {
        firmware: limits.firmware,
        memory_region_bytes: limits.memory_region_bytes,
        memory_regions: limits.memory_regions,
        queue_pairs: limits.queue_pairs,
        work_requests: limits.work_requests,
        segments: limits.segments,
        completions: limits.completions,
        on_demand_paging: limits.on_demand_paging,
    });
    let gids = context.gids()?;
    for number in ports {
        let own = gids.iter().filter(|gid| gid.port == number).map(Gid::from).collect();
        seen.ports.push(Port::of(number, &context.port(number)?, own));
    }
    Ok(())
}

/// Why a device with these ports cannot be used, if so.
fn of_ports(ports: &[Port]) -> Option<Reason> {
    if ports.iter().any(|port| port.reason.is_none()) {
        return None;
    }
    match ports {
        [only] => only.reason.clone(),
        _ => Some(Reason::NoUsablePort),
    }
}

impl Port {
    fn of(number: u8, attributes: &PortAttributes, gids: Vec<Gid>) -> Self {
        let ethernet = attributes.link_layer == LinkLayer::Ethernet;
        let usable = gids.iter().any(|gid| gid.usable);
        let reason = (!ethernet)
            .then_some(Reason::NotEthernet)
            .or_else(|| Reason::of_state(attributes.state))
            .or_else(|| (!usable).then_some(Reason::NoUsableGid));
        Self {
            number,
            state: match attributes.state {
                PortState::Active => "active",
                PortState::Down => "down",
                PortState::Starting => "starting",
                PortState::Other(_) => "unknown",
            },
            link_layer: match attributes.link_layer {
                LinkLayer::Ethernet => "ethernet",
                LinkLayer::InfiniBand => "infiniband",
                LinkLayer::Unknown => "unknown",
            },
            bits_per_second: attributes.bits_per_second,
            active_mtu: attributes.active_mtu,
            max_mtu: attributes.max_mtu,
            message_bytes: attributes.message_bytes,
            reason,
            gids,
        }
    }
}

impl From<&GidEntry> for Gid {
    fn from(entry: &GidEntry) -> Self {
        let gid = Ipv6Addr::from(entry.gid);
        let address = match entry.kind {
            GidKind::RoceV1 | GidKind::RoceV2 => {
                Some(gid.to_ipv4_mapped().map_or(IpAddr::V6(gid), IpAddr::V4))
            }
            GidKind::InfiniBand | GidKind::Other(_) => None,
        };
        Self {
            index: entry.index,
            gid,
            kind: match entry.kind {
                GidKind::RoceV2 => "roce-v2",
                GidKind::RoceV1 => "roce-v1",
                GidKind::InfiniBand => "infiniband",
                GidKind::Other(_) => "unknown",
            },
            address,
            interface: entry.interface.and_then(interface_name),
            usable: entry.kind == GidKind::RoceV2 && address.is_some_and(is_reachable),
        }
    }
}

/// Whether others can send to it: a table that is not filled in has the address of all zeros.
fn is_reachable(address: IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    !link_local && !address.is_unspecified() && !address.is_loopback() && !address.is_multicast()
}

fn interface_name(index: u32) -> Option<String> {
    let any = socket(AddressFamily::INET, SocketType::DGRAM, None).ok()?;
    netdevice::index_to_name(&any, index).ok()
}

#[cfg(test)]
mod tests;

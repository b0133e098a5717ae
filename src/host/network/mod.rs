//! The host's interfaces: which of them migrations may use, and by which pairs of them two hosts reach each other.

pub mod allowed;
pub mod interfaces;
#[cfg(test)]
pub(crate) mod lab;
mod netlink;
pub mod pairs;
pub mod probe;

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub(in crate::host) use interfaces::speed_of;

/// A network interface of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// The kernel's number for it.
    pub index: u32,
    /// Whether it is up and has a carrier.
    pub up: bool,
    /// Whether it leads only to this host.
    pub loopback: bool,
    /// The largest IP packet, in bytes.
    pub mtu: u32,
    /// Its speed in bits a second, where the driver says it (`/sys/class/net/*/speed`).
    pub speed_bits_per_second: Option<u64>,
    /// Its addresses, with their prefixes.
    pub addresses: Vec<IpNet>,
}

/// An address of a host that migrations may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Offer {
    /// The interface that has it.
    pub interface: String,
    /// The address.
    #[schema(value_type = String)]
    pub address: IpAddr,
    /// The length of its prefix.
    pub prefix: u8,
    /// The largest IP packet, in bytes.
    pub mtu: u32,
    /// The interface's speed in bits a second, where its driver says it.
    #[serde(default)]
    pub speed_bits_per_second: Option<u64>,
    /// The cap that the host file sets for its network, in bytes a second.
    #[serde(default)]
    pub bandwidth_cap: Option<u64>,
    /// Whether it leads only to the host itself.
    #[serde(default)]
    pub loopback: bool,
    /// Whether the host file says that nobody else is on its network.
    #[serde(default)]
    pub isolated: bool,
}

/// Why the kernel did not tell of its network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// No connection to the kernel.
    #[error("asking the kernel for its network: a netlink socket cannot be opened")]
    Open(#[source] io::Error),
    /// A question was refused or the answer cannot be read.
    #[error("asking the kernel for its {what} (rtnetlink)")]
    Ask {
        /// What was asked for.
        what: &'static str,
        /// What it answered.
        #[source]
        cause: io::Error,
    },
}

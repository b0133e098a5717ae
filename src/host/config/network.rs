//! `networks` and `peers` of the host file: addresses, as people write them.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use super::value::{self, Reader};
use super::{Network, NetworkMatch, PeerAddress};
use crate::session::path::InterfaceName;

/// An element of `networks`.
#[derive(Debug)]
pub(super) struct NetworkEntry(pub(super) Network);

/// An element of `networks` with more to say than which network.
#[derive(serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct NetworkTable {
    /// Every local address within this subnet.
    #[serde(default, deserialize_with = "subnet")]
    #[schemars(with = "String", extend("examples" = ["10.77.1.0/24"]))]
    subnet: Option<NetworkMatch>,
    /// Every address of this interface.
    #[serde(default, deserialize_with = "interface")]
    #[schemars(with = "String", length(min = 1, max = 15), extend("examples" = ["eth1"]))]
    interface: Option<NetworkMatch>,
    /// The most that all migrations from this host send by this network together, in bits or bytes a second.
    #[serde(default, deserialize_with = "value::cap")]
    #[schemars(with = "String", extend("examples" = ["1Gbit/s"]))]
    bandwidth_cap: Option<u64>,
    /// Whether nobody else is on it, so that memory may go over it in plain although `encryption` is required.
    #[serde(default, deserialize_with = "value::flag")]
    #[schemars(with = "bool", extend("default" = false))]
    isolated: Option<bool>,
}

pub(super) const NETWORK_KEYS: [&str; 4] = ["bandwidth_cap", "interface", "isolated", "subnet"];

fn subnet<'de, D: Deserializer<'de>>(from: D) -> Result<Option<NetworkMatch>, D::Error> {
    Reader::of("a subnet in quotes, like \"10.77.1.0/24\"").text(subnet_of).read(from).map(Some)
}

fn interface<'de, D: Deserializer<'de>>(from: D) -> Result<Option<NetworkMatch>, D::Error> {
    let read = |text: &str| {
        let name: Result<InterfaceName, _> = text.parse();
        name.map(NetworkMatch::Interface)
            .map_err(|error| format!("{error}; `ip link` lists this host's interfaces"))
    };
    Reader::of("the name of an interface in quotes, like \"eth1\"").text(read).read(from).map(Some)
}

impl<'de> Deserialize<'de> for NetworkEntry {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Entry;
        impl<'de> Visitor<'de> for Entry {
            type Value = NetworkEntry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a subnet or an interface in quotes, like \"10.77.1.0/24\" or \"eth1\"")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<NetworkEntry, E> {
                let what = network(text).map_err(E::custom)?;
                Ok(NetworkEntry(Network { what, bandwidth_cap: None, isolated: false }))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<NetworkEntry, A::Error> {
                let table = NetworkTable::deserialize(MapAccessDeserializer::new(map))?;
                let what = match (table.subnet, table.interface) {
                    (Some(what), None) | (None, Some(what)) => Ok(what),
                    (Some(_), Some(_)) => {
                        Err("a network is a subnet or an interface; leave one of the two out")
                    }
                    (None, None) => Err(
                        "which network is not said; add subnet = \"10.77.1.0/24\" or interface = \"eth1\"",
                    ),
                };
                let what = what.map_err(A::Error::custom)?;
                let isolated = table.isolated.unwrap_or(false);
                Ok(NetworkEntry(Network { what, bandwidth_cap: table.bandwidth_cap, isolated }))
            }
        }
        from.deserialize_any(Entry)
    }
}

/// A subnet where it looks like one, else an interface.
fn network(text: &str) -> Result<NetworkMatch, String> {
    let address = text.contains(':') || text.parse::<IpAddr>().is_ok();
    if text.contains('/') || address {
        return subnet_of(text);
    }
    let name: Result<InterfaceName, _> = text.parse();
    name.map(NetworkMatch::Interface).map_err(|_| {
        format!(
            "{text:?} is neither a subnet nor the name of an interface; write it like \"10.77.1.0/24\" or \"eth1\""
        )
    })
}

fn subnet_of(text: &str) -> Result<NetworkMatch, String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        let whole = IpNet::from(address);
        return Err(format!("{text:?} is an address; write the subnet, or \"{whole}\" for it alone"));
    }
    let subnet: IpNet = text
        .parse()
        .map_err(|_| format!("{text:?} is no subnet; write it like \"10.77.1.0/24\" or \"fd00:1::/64\""))?;
    if subnet.addr() != subnet.network() {
        return Err(format!(
            "{text:?} is an address in a subnet; write \"{}\" for the subnet",
            subnet.trunc()
        ));
    }
    Ok(NetworkMatch::Subnet(subnet))
}

impl JsonSchema for NetworkEntry {
    fn schema_name() -> Cow<'static, str> {
        "Network".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let table = NetworkTable::json_schema(generator);
        json_schema!({
            "description": "A subnet or an interface, alone or in a table that says more about it.",
            "anyOf": [{ "type": "string", "examples": ["10.77.1.0/24", "eth1"] }, table],
        })
    }
}

/// The name of another host.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PeerName(pub(super) String);

impl<'de> Deserialize<'de> for PeerName {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        value::name(from).map(Self)
    }
}

/// Where another host's daemon is reached.
#[derive(Debug)]
pub(super) struct PeerAddresses(pub(super) Vec<PeerAddress>);

/// Other hosts, as the file has them.
pub(super) type Peers = BTreeMap<PeerName, PeerAddresses>;

impl<'de> Deserialize<'de> for PeerAddresses {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Addresses;
        impl<'de> Visitor<'de> for Addresses {
            type Value = PeerAddresses;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "an address in quotes, like \"10.0.0.2\" or \"10.0.0.2:7433\", or an array of such",
                )
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<PeerAddresses, E> {
                Ok(PeerAddresses(vec![peer_address(text).map_err(E::custom)?]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<PeerAddresses, A::Error> {
                let mut addresses = Vec::new();
                while let Some(Spelled(address)) = elements.next_element()? {
                    if addresses.contains(&address) {
                        let twice = format!("{:?} is there twice; take one out", peer_text(&address));
                        return Err(A::Error::custom(twice));
                    }
                    addresses.push(address);
                }
                if addresses.is_empty() {
                    return Err(A::Error::custom("there is no address; write one, like \"10.0.0.2\""));
                }
                Ok(PeerAddresses(addresses))
            }
        }
        from.deserialize_any(Addresses)
    }
}

/// One of several addresses of a host.
struct Spelled(PeerAddress);

impl<'de> Deserialize<'de> for Spelled {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let wanted = Reader::of("an address in quotes, like \"10.0.0.2\" or \"10.0.0.2:7433\"");
        wanted.text(|text| peer_address(text).map(Self)).read(from)
    }
}

fn peer_address(text: &str) -> Result<PeerAddress, String> {
    let address = text.parse().map(PeerAddress::Host).or_else(|_| text.parse().map(PeerAddress::HostAndPort));
    let address = address.map_err(|_| {
        format!(
            "{text:?} is no IP address, with or without a port; write it like \"10.0.0.2\", \"10.0.0.2:7433\" or \
             \"[fd00::2]:7433\""
        )
    })?;
    let (ip, port) = match address {
        PeerAddress::Host(ip) => (ip, None),
        PeerAddress::HostAndPort(at) => (at.ip(), Some(at.port())),
    };
    if ip.is_unspecified() || ip.is_multicast() {
        return Err(format!("{text:?} is no address of one host; write that host's own, like \"10.0.0.2\""));
    }
    if port == Some(0) {
        return Err(format!(
            "{text:?} has port 0, which nobody listens at; write the daemon's, or leave it out"
        ));
    }
    Ok(address)
}

impl JsonSchema for PeerAddresses {
    fn schema_name() -> Cow<'static, str> {
        "PeerAddresses".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "Where another host's daemon is reached: an IP address, with or without a port, or several.",
            "anyOf": [
                { "type": "string", "examples": ["10.0.0.2", "10.0.0.2:7433"] },
                { "type": "array", "items": { "type": "string" }, "minItems": 1, "uniqueItems": true },
            ],
        })
    }
}

/// A network as the host file writes it.
pub(super) fn network_text(what: &NetworkMatch) -> String {
    match what {
        NetworkMatch::Subnet(subnet) => subnet.to_string(),
        NetworkMatch::Interface(name) => name.to_string(),
    }
}

/// An address as the host file writes it.
pub(super) fn peer_text(address: &PeerAddress) -> String {
    match address {
        PeerAddress::Host(ip) => ip.to_string(),
        PeerAddress::HostAndPort(at) => SocketAddr::to_string(at),
    }
}

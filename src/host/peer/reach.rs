//! By which of this host's interfaces another host is reached, when only its name or an address is known.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use ipnet::IpNet;

use super::client::{Dial, PeerTarget};
use crate::host::config::{HostConfig, PeerAddress};
use crate::host::network::Offer;

/// Why another host cannot be called.
#[derive(Debug, thiserror::Error)]
pub enum ReachError {
    /// Nobody knows the name.
    #[error(
        "{name:?} is neither an address nor one of this host's [peers] ({known}), and the name is not found: {why}"
    )]
    Unknown {
        /// The name.
        name: String,
        /// What `[peers]` has.
        known: String,
        /// What the resolver says.
        why: String,
    },
    /// No allowed network leads there.
    #[error("no network that migrations may use leads to {to}: {tried}")]
    NotAllowed {
        /// The other host.
        to: String,
        /// For each address, by which interface it would go.
        tried: String,
    },
}

impl ReachError {
    /// What to do about it.
    #[must_use]
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Unknown { .. } => "add it to [peers] in the host file, or give an address",
            Self::NotAllowed { .. } => {
                "allow a network that leads there (networks in the host file), or name the host by an address within one"
            }
        }
    }
}

/// Finds out how to call the host that is called `to`.
///
/// # Errors
/// [`ReachError`].
pub async fn reach(to: &str, config: &HostConfig, offers: &[Offer]) -> Result<PeerTarget, ReachError> {
    let (name, addresses) = addresses(to, config).await?;
    let mut dials = Vec::new();
    let mut tried = Vec::new();
    for address in addresses {
        match way(address.ip(), offers) {
            Ok(offer) => {
                let (source, interface) = (offer.address, offer.interface.clone());
                dials.push(Dial { address, source, interface });
            }
            Err(why) => tried.push(why),
        }
    }
    if dials.is_empty() {
        return Err(ReachError::NotAllowed { to: to.to_owned(), tried: tried.join("; ") });
    }
    Ok(PeerTarget { called: to.to_owned(), name, dials })
}

/// The name that the host must prove, and its addresses.
async fn addresses(to: &str, config: &HostConfig) -> Result<(String, Vec<SocketAddr>), ReachError> {
    if let Some(known) = config.peers.get(to) {
        let address = |address: &PeerAddress| match *address {
            PeerAddress::Host(ip) => SocketAddr::new(ip, config.port),
            PeerAddress::HostAndPort(address) => address,
        };
        return Ok((to.to_owned(), known.iter().map(address).collect()));
    }
    if let Ok(ip) = to.trim_matches(['[', ']']).parse::<IpAddr>() {
        return Ok((ip.to_string(), vec![SocketAddr::new(ip, config.port)]));
    }
    if let Ok(address) = to.parse::<SocketAddr>() {
        return Ok((address.ip().to_string(), vec![address]));
    }
    let (host, port) = match to.rsplit_once(':') {
        Some((host, port)) => (host, port.parse().unwrap_or(config.port)),
        None => (to, config.port),
    };
    match tokio::net::lookup_host((host, port)).await {
        Ok(found) => Ok((host.to_owned(), found.collect())),
        Err(error) => {
            let known: Vec<&str> = config.peers.keys().map(String::as_str).collect();
            let known = if known.is_empty() { "it names none".into() } else { known.join(", ") };
            Err(ReachError::Unknown { name: to.to_owned(), known, why: error.to_string() })
        }
    }
}

/// The offer by which an address is reached: one of the same subnet, else the one that the routing table names.
pub(in crate::host) fn way(to: IpAddr, offers: &[Offer]) -> Result<&Offer, String> {
    let on_link =
        |offer: &&Offer| IpNet::new(offer.address, offer.prefix).is_ok_and(|subnet| subnet.contains(&to));
    if let Some(offer) = offers.iter().find(on_link) {
        return Ok(offer);
    }
    let from = routed(to).map_err(|error| format!("{to} has no route ({error})"))?;
    offers
        .iter()
        .find(|offer| offer.address == from)
        .ok_or_else(|| format!("{to} is reached from {from}, which is on no allowed network"))
}

/// The address that the routing table has this host come from. Nothing is sent: connecting a UDP socket only looks it up.
fn routed(to: IpAddr) -> std::io::Result<IpAddr> {
    let any: SocketAddr = if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0; 16], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect((to, 9))?;
    Ok(socket.local_addr()?.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(interface: &str, address: &str, prefix: u8) -> Offer {
        Offer {
            interface: interface.into(),
            address: address.parse().unwrap(),
            prefix,
            mtu: 1500,
            speed_bits_per_second: None,
            bandwidth_cap: None,
            loopback: false,
            isolated: false,
        }
    }

    #[test]
    fn the_offer_of_the_same_subnet_is_taken_and_no_other() {
        let offers = [offer("a", "10.0.1.1", 24), offer("b", "10.0.2.1", 24)];
        assert_eq!(way("10.0.2.9".parse().unwrap(), &offers).unwrap().interface, "b");
        let said = way("127.0.0.5".parse().unwrap(), &offers).unwrap_err();
        assert_eq!(said, "127.0.0.5 is reached from 127.0.0.1, which is on no allowed network");
        let lo = [offer("lo", "127.0.0.1", 32)];
        assert_eq!(way("127.0.0.5".parse().unwrap(), &lo).unwrap().interface, "lo");
    }
}

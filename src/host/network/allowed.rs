//! Which addresses of this host migrations may use, by its host file.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Interface, Offer};
use crate::host::config::{Network, NetworkMatch, Networks};

/// The addresses that migrations may use, the preferred first: of interfaces that are up, each address once.
///
/// Two addresses of one interface in the same subnet are one way into it, so only the first counts. Where any network is
/// allowed, those that lead only to this host come last; a network in the list is taken at its word.
#[must_use]
pub fn offers(interfaces: &[Interface], networks: &Networks) -> Vec<Offer> {
    let mut offers = Vec::new();
    match networks {
        Networks::Any => {
            let (loopback, others): (Vec<_>, Vec<_>) =
                interfaces.iter().partition(|interface| interface.loopback);
            for interface in others.into_iter().chain(loopback) {
                add(&mut offers, interface, (None, false), |_| true);
            }
        }
        Networks::Listed(list) => {
            for network in list {
                for interface in interfaces {
                    let said = (network.bandwidth_cap, network.isolated);
                    add(&mut offers, interface, said, |address| matches(network, interface, address));
                }
            }
        }
    }
    offers
}

/// The networks of the list that give no address, each with the reason as a sentence.
#[must_use]
pub fn unmatched(interfaces: &[Interface], networks: &Networks) -> Vec<String> {
    let Networks::Listed(list) = networks else { return Vec::new() };
    list.iter().filter_map(|network| why_unmatched(interfaces, network)).collect()
}

/// Adds the addresses of an interface that is up and that `wanted` takes, with the cap of their network and whether it is isolated.
fn add(
    offers: &mut Vec<Offer>,
    interface: &Interface,
    (cap, isolated): (Option<u64>, bool),
    wanted: impl Fn(IpAddr) -> bool,
) {
    if !interface.up {
        return;
    }
    for net in interface.addresses.iter().filter(|net| wanted(net.addr())) {
        let same_way = |offer: &&Offer| {
            offer.address == net.addr()
                || offer.interface == interface.name && subnet(offer) == Some(net.trunc())
        };
        if offers.iter().find(same_way).is_none() {
            offers.push(Offer {
                interface: interface.name.clone(),
                address: net.addr(),
                prefix: net.prefix_len(),
                mtu: interface.mtu,
                speed_bits_per_second: interface.speed_bits_per_second,
                bandwidth_cap: cap,
                loopback: interface.loopback,
                isolated,
            });
        }
    }
}

/// The subnet that an offered address lies in, if its prefix is one: it may come from another host.
pub(super) fn subnet(offer: &Offer) -> Option<IpNet> {
    IpNet::new(offer.address, offer.prefix).ok().map(|net| net.trunc())
}

fn matches(network: &Network, interface: &Interface, address: IpAddr) -> bool {
    match &network.what {
        NetworkMatch::Subnet(subnet) => subnet.contains(&address),
        NetworkMatch::Interface(name) => name.as_str() == interface.name,
    }
}

fn why_unmatched(interfaces: &[Interface], network: &Network) -> Option<String> {
    let has =
        |interface: &Interface| interface.addresses.iter().any(|net| matches(network, interface, net.addr()));
    if interfaces.iter().any(|interface| interface.up && has(interface)) {
        return None;
    }
    let named = |interface: &&Interface| match &network.what {
        NetworkMatch::Interface(name) => name.as_str() == interface.name,
        NetworkMatch::Subnet(_) => has(interface),
    };
    let what = match &network.what {
        NetworkMatch::Subnet(subnet) => subnet.to_string(),
        NetworkMatch::Interface(name) => name.to_string(),
    };
    let why = match interfaces.iter().find(named) {
        Some(interface) if !interface.up => {
            format!("is only on {}, which is down or has no carrier", interface.name)
        }
        Some(interface) => format!("is the interface {}, which has no address", interface.name),
        None => match &network.what {
            NetworkMatch::Interface(_) => {
                let names: Vec<&str> = interfaces.iter().map(|interface| interface.name.as_str()).collect();
                format!("matches no interface of this host; it has {}", names.join(", "))
            }
            NetworkMatch::Subnet(_) => format!("matches no address of this host; {}", addresses(interfaces)),
        },
    };
    Some(format!("the network {what} (host file) {why}"))
}

fn addresses(interfaces: &[Interface]) -> String {
    let each: Vec<String> = interfaces
        .iter()
        .flat_map(|interface| interface.addresses.iter().map(|net| format!("{net} on {}", interface.name)))
        .collect();
    if each.is_empty() { "it has none".into() } else { format!("it has {}", each.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(name: &str, index: u32, addresses: &[&str]) -> Interface {
        Interface {
            name: name.into(),
            index,
            up: true,
            loopback: name == "lo",
            mtu: 1500 * index,
            speed_bits_per_second: Some(u64::from(index)),
            addresses: addresses.iter().map(|net| net.parse().unwrap()).collect(),
        }
    }

    fn host() -> Vec<Interface> {
        let mut down = interface("eth2", 4, &["10.0.2.1/24"]);
        down.up = false;
        vec![
            interface("lo", 1, &["127.0.0.1/8", "::1/128"]),
            interface("eth0", 2, &["10.0.0.1/24", "10.0.0.9/24", "fd00::1/64"]),
            interface("eth1", 3, &["10.0.1.1/24", "10.0.0.1/32"]),
            down,
            interface("eth3", 5, &[]),
        ]
    }

    fn listed(networks: &[&str]) -> Networks {
        let network = |(at, text): (usize, &&str)| Network {
            what: match text.parse() {
                Ok(subnet) => NetworkMatch::Subnet(subnet),
                Err(_) => NetworkMatch::Interface(text.parse().unwrap()),
            },
            bandwidth_cap: Some(at as u64),
            isolated: at % 2 == 1,
        };
        Networks::Listed(networks.iter().enumerate().map(network).collect())
    }

    fn shown(networks: &Networks) -> Vec<String> {
        let offers = offers(&host(), networks);
        offers.iter().map(|offer| format!("{} {}/{}", offer.interface, offer.address, offer.prefix)).collect()
    }

    #[test]
    fn any_network_is_every_interface_that_is_up_and_loopback_last() {
        assert_eq!(
            shown(&Networks::Any),
            ["eth0 10.0.0.1/24", "eth0 fd00::1/64", "eth1 10.0.1.1/24", "lo 127.0.0.1/8", "lo ::1/128"]
        );
        assert_eq!(unmatched(&host(), &Networks::Any), Vec::<String>::new());
    }

    #[test]
    fn a_list_is_kept_to_in_its_order() {
        assert_eq!(
            shown(&listed(&["eth1", "10.0.0.0/24"])),
            ["eth1 10.0.1.1/24", "eth1 10.0.0.1/32", "eth0 10.0.0.9/24"]
        );
        assert_eq!(shown(&listed(&["fd00::/16", "eth0"])), ["eth0 fd00::1/64", "eth0 10.0.0.1/24"]);
        assert_eq!(shown(&listed(&["10.0.0.9/32"])), ["eth0 10.0.0.9/24"]);
        assert_eq!(shown(&listed(&["eth2", "10.0.2.0/24", "eth3", "eth7"])), Vec::<String>::new());
        assert_eq!(shown(&listed(&["lo"])), ["lo 127.0.0.1/8", "lo ::1/128"]);
    }

    #[test]
    fn an_offer_says_what_its_interface_is_and_what_its_network_may_carry() {
        let offers = offers(&host(), &listed(&["10.0.1.0/24", "eth0"]));
        let eth0 = Offer {
            interface: "eth0".into(),
            address: "10.0.0.1".parse().unwrap(),
            prefix: 24,
            mtu: 3000,
            speed_bits_per_second: Some(2),
            bandwidth_cap: Some(1),
            loopback: false,
            isolated: true,
        };
        assert_eq!(offers[1], eth0);
        assert_eq!((offers[0].bandwidth_cap, offers[0].isolated), (Some(0), false));
    }

    #[test]
    fn a_network_that_gives_nothing_is_named_with_the_reason() {
        let networks = listed(&["eth7", "eth2", "10.0.2.0/24", "eth3", "10.9.0.0/16", "eth0", "10.0.1.0/24"]);
        assert_eq!(
            unmatched(&host(), &networks),
            [
                "the network eth7 (host file) matches no interface of this host; it has lo, eth0, eth1, eth2, eth3",
                "the network eth2 (host file) is only on eth2, which is down or has no carrier",
                "the network 10.0.2.0/24 (host file) is only on eth2, which is down or has no carrier",
                "the network eth3 (host file) is the interface eth3, which has no address",
                "the network 10.9.0.0/16 (host file) matches no address of this host; it has 127.0.0.1/8 on lo, ::1/128 on \
                 lo, 10.0.0.1/24 on eth0, 10.0.0.9/24 on eth0, fd00::1/64 on eth0, 10.0.1.1/24 on eth1, 10.0.0.1/32 on \
                 eth1, 10.0.2.1/24 on eth2",
            ]
        );
        let bare = [interface("eth3", 1, &[])];
        assert_eq!(
            unmatched(&bare, &listed(&["10.9.0.0/16"])),
            ["the network 10.9.0.0/16 (host file) matches no address of this host; it has none"]
        );
    }
}

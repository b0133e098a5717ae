//! The interfaces of this host, as the kernel tells of them.

use std::net::IpAddr;
use std::path::Path;

use ipnet::IpNet;
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};

use super::netlink::Netlink;
use super::{Interface, NetworkError};

/// Where the kernel shows what drivers say of their interfaces. It shows those of the network namespace in which it was
/// mounted, which `ip netns exec` and containers take care of.
const SYS_CLASS_NET: &str = "/sys/class/net";

/// Every interface in the network namespace of the calling thread, by the kernel's numbers.
///
/// Addresses of IPv6 that reach only neighbours (`fe80::`) are left out, since they need an interface's number beside them;
/// so are those that the kernel does not let anybody use yet, or found in use elsewhere.
///
/// # Errors
/// [`NetworkError`] when the kernel does not answer.
pub async fn interfaces() -> Result<Vec<Interface>, NetworkError> {
    let netlink = Netlink::open()?;
    let links = netlink.links().await?;
    let addresses = netlink.addresses().await?;
    let mut interfaces: Vec<Interface> =
        links.iter().filter_map(|link| interface(link, &addresses, Path::new(SYS_CLASS_NET))).collect();
    interfaces.sort_by_key(|interface| interface.index);
    Ok(interfaces)
}

fn interface(link: &LinkMessage, addresses: &[AddressMessage], sys: &Path) -> Option<Interface> {
    let name = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })?;
    let mtu = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    })?;
    let index = link.header.index;
    let flags = link.header.flags;
    Some(Interface {
        speed_bits_per_second: speed(sys, &name),
        name,
        index,
        // The carrier itself: "running", which follows from it, may come a second later (netdevice(7)).
        up: flags.contains(LinkFlags::Up | LinkFlags::LowerUp) && !flags.contains(LinkFlags::Dormant),
        loopback: flags.contains(LinkFlags::Loopback),
        mtu,
        addresses: addresses
            .iter()
            .filter(|address| address.header.index == index)
            .filter_map(usable)
            .collect(),
    })
}

/// The address of a message, if a socket can be bound to it.
fn usable(message: &AddressMessage) -> Option<IpNet> {
    let unusable = AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed;
    if message.header.flags.intersects(unusable) {
        return None;
    }
    // On a point-to-point link "address" is the other end's and "local" is ours; IPv6 has often only the first.
    let of = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(wanted);
    let local = of(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let address = local.or_else(|| {
        of(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })?;
    if matches!(address, IpAddr::V6(address) if address.is_unicast_link_local()) {
        return None;
    }
    IpNet::new(address, message.header.prefix_len).ok()
}

/// The speed of an interface of this host in bits a second, where its driver says it.
pub(in crate::host) fn speed_of(interface: &str) -> Option<u64> {
    speed(Path::new(SYS_CLASS_NET), interface)
}

/// In bits a second. A driver that does not know says -1 or refuses; one of an interface that is down as well.
fn speed(sys: &Path, interface: &str) -> Option<u64> {
    let text = std::fs::read_to_string(sys.join(interface).join("speed")).ok()?;
    let megabits: u64 = text.trim().parse().ok()?;
    // 2^32 - 1 is how some drivers write "unknown" (SPEED_UNKNOWN, ethtool(8)).
    (megabits > 0 && megabits < u64::from(u32::MAX)).then(|| megabits * 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::network::lab::Lab;
    use crate::testing::{Need, require};

    #[tokio::test]
    async fn this_host_has_its_loopback() {
        let interfaces = interfaces().await.unwrap();
        let lo = interfaces.iter().find(|interface| interface.name == "lo").unwrap();
        assert!(lo.loopback && lo.up);
        assert_eq!(lo.speed_bits_per_second, None);
        assert!(lo.addresses.contains(&"127.0.0.1/8".parse().unwrap()), "{lo:?}");
        for interface in &interfaces {
            let scoped = |net: &IpNet| matches!(net, IpNet::V6(v6) if v6.addr().is_unicast_link_local());
            assert!(!interface.addresses.iter().any(scoped), "{interface:?}");
        }
    }

    #[test]
    fn a_link_in_a_namespace_is_seen_with_its_mtu_and_addresses_and_when_it_is_down() {
        if !require(&[Need::Netns]) {
            return;
        }
        let lab = Lab::new(&["a", "b"]);
        lab.join(("a", "eth1"), ("b", "eth9"), 9000);
        lab.ip("a", "address add 10.1.0.1/24 dev eth1");
        lab.ip("a", "address add 10.2.0.1 peer 10.2.0.2 dev eth1");
        lab.ip("a", "address add fd01::1/64 dev eth1 nodad");
        let seen = || {
            let all = lab.run("a", async || interfaces().await.unwrap());
            assert_eq!(all.len(), 2, "{all:?}");
            all.into_iter().find(|interface| interface.name == "eth1").unwrap()
        };
        let eth1 = seen();
        assert!(eth1.up && !eth1.loopback && eth1.index > 1);
        assert_eq!(eth1.mtu, 9000);
        let addresses: Vec<String> = eth1.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["10.1.0.1/24", "10.2.0.1/32", "fd01::1/64"]);

        lab.ip("b", "link set eth9 down");
        assert!(!seen().up, "the carrier is gone");
        lab.ip("a", "link set eth1 down");
        assert!(!seen().up);
    }

    #[test]
    fn an_address_that_cannot_be_bound_is_left_out() {
        let with = |address: &str, flags| {
            let mut message = AddressMessage::default();
            message.header.prefix_len = 64;
            message.header.flags = flags;
            message.attributes.push(AddressAttribute::Address(address.parse().unwrap()));
            usable(&message)
        };
        let permanent = AddressHeaderFlags::Permanent;
        assert_eq!(with("fd00::1", permanent), Some("fd00::1/64".parse().unwrap()));
        assert_eq!(with("fe80::1", permanent), None);
        for flag in [AddressHeaderFlags::Tentative, AddressHeaderFlags::Dadfailed] {
            assert_eq!(with("fd00::1", permanent | flag), None);
        }
        assert_eq!(with("10.0.0.1", permanent), None, "IPv4 has no prefix of 64");
    }

    #[test]
    fn a_speed_is_what_the_driver_says_or_nothing() {
        let sys = tempfile::tempdir().unwrap();
        let with = |text: &str| {
            std::fs::create_dir_all(sys.path().join("eth0")).unwrap();
            std::fs::write(sys.path().join("eth0/speed"), text).unwrap();
            speed(sys.path(), "eth0")
        };
        assert_eq!(with("25000\n"), Some(25_000_000_000));
        for unknown in ["-1\n", "4294967295\n", "0\n", "fast\n", ""] {
            assert_eq!(with(unknown), None, "{unknown:?}");
        }
        assert_eq!(speed(sys.path(), "eth1"), None);
    }
}

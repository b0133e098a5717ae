use std::net::Ipv4Addr;

use super::*;

fn entry(kind: GidKind, address: &str) -> GidEntry {
    let gid = match address.parse().unwrap() {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    };
    GidEntry { port: 1, index: 3, gid: gid.octets(), kind, interface: None }
}

fn port(state: PortState, link_layer: LinkLayer, gids: &[GidEntry]) -> Port {
    let attributes = PortAttributes {
        state,
        link_layer,
        active_mtu: 4096,
        max_mtu: 4096,
        message_bytes: 1 << 31,
        bits_per_second: Some(100_000_000_000),
    };
    Port::of(1, &attributes, gids.iter().map(Gid::from).collect())
}

fn device(ports: Vec<Port>) -> RdmaDevice {
    let reason = of_ports(&ports);
    RdmaDevice { name: "mlx5_0".into(), node: "/dev/infiniband/uverbs0".into(), reason, limits: None, ports }
}

fn host(devices: Vec<RdmaDevice>) -> RdmaDevices {
    RdmaDevices::of(devices, MemoryLock { limit_bytes: None })
}

fn code(reason: Option<&Reason>) -> &'static str {
    reason.map_or("usable", Reason::code)
}

#[test]
fn an_address_that_others_reach_by_roce_v2_is_usable() {
    for (kind, address, usable) in [
        (GidKind::RoceV2, "192.0.2.1", true),
        (GidKind::RoceV2, "2001:db8::1", true),
        (GidKind::RoceV2, "fd00::1", true),
        (GidKind::RoceV2, "fe80::1", false),
        (GidKind::RoceV2, "169.254.1.1", false),
        (GidKind::RoceV2, "::", false),
        (GidKind::RoceV2, "127.0.0.1", false),
        (GidKind::RoceV1, "192.0.2.1", false),
        (GidKind::InfiniBand, "fd00::1", false),
        (GidKind::Other(9), "192.0.2.1", false),
    ] {
        assert_eq!(Gid::from(&entry(kind, address)).usable, usable, "{kind:?} {address}");
    }
    let gid = Gid::from(&entry(GidKind::RoceV2, "192.0.2.1"));
    assert_eq!(gid.address, Some(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1))));
    assert_eq!(Gid::from(&entry(GidKind::InfiniBand, "fd00::1")).address, None);
}

#[test]
fn each_thing_that_a_port_lacks_has_its_own_reason() {
    let good = [entry(GidKind::RoceV2, "fe80::1"), entry(GidKind::RoceV2, "192.0.2.1")];
    for (state, link_layer, gids, expected) in [
        (PortState::Active, LinkLayer::Ethernet, &good[..], "usable"),
        (PortState::Down, LinkLayer::Ethernet, &good[..], "port-not-active"),
        (PortState::Starting, LinkLayer::Ethernet, &good[..], "port-not-active"),
        (PortState::Active, LinkLayer::InfiniBand, &good[..], "not-ethernet"),
        (PortState::Active, LinkLayer::Ethernet, &good[..1], "no-usable-gid"),
        (PortState::Active, LinkLayer::Ethernet, &[], "no-usable-gid"),
    ] {
        assert_eq!(code(port(state, link_layer, gids).reason.as_ref()), expected, "{state:?} {link_layer:?}");
    }
}

#[test]
fn a_host_says_the_reason_of_its_only_device_and_port() {
    let good = || port(PortState::Active, LinkLayer::Ethernet, &[entry(GidKind::RoceV2, "192.0.2.1")]);
    let down = || port(PortState::Down, LinkLayer::Ethernet, &[entry(GidKind::RoceV2, "192.0.2.2")]);
    for (devices, expected) in [
        (vec![device(vec![good()])], "usable"),
        (vec![device(vec![down()])], "port-not-active"),
        (vec![device(vec![down(), down()])], "no-usable-port"),
        (vec![device(vec![down(), good()])], "usable"),
        (vec![device(vec![down()]), device(vec![down()])], "no-usable-device"),
        (vec![device(vec![down()]), device(vec![good()])], "usable"),
    ] {
        assert_eq!(code(host(devices).reason.as_ref()), expected);
    }
}

#[test]
fn a_device_is_found_by_an_address_that_works() {
    let gids = [entry(GidKind::RoceV1, "192.0.2.1"), entry(GidKind::RoceV2, "192.0.2.1")];
    let up = host(vec![device(vec![port(PortState::Active, LinkLayer::Ethernet, &gids)])]);
    let found = up
        .at("192.0.2.1".parse().unwrap())
        .map(|(device, port, gid)| (device.name.as_str(), port.number, gid.kind));
    assert_eq!(found, Some(("mlx5_0", 1, "roce-v2")));
    assert_eq!(up.at("192.0.2.2".parse().unwrap()), None);
    let down = host(vec![device(vec![port(PortState::Down, LinkLayer::Ethernet, &gids)])]);
    assert_eq!(down.at("192.0.2.1".parse().unwrap()), None);
}

#[test]
fn a_limit_on_locked_memory_is_named_with_what_is_needed() {
    let limited = MemoryLock { limit_bytes: Some(8 << 20) };
    assert_eq!(limited.reason_against(8 << 20), None);
    let reason = limited.reason_against(64 << 20).unwrap();
    assert_eq!(reason.code(), "memlock-too-small");
    assert!(reason.to_string().contains("8388608") && reason.to_string().contains("67108864"), "{reason}");
    assert_eq!(MemoryLock { limit_bytes: None }.reason_against(u64::MAX), None);
}

#[test]
fn json_has_a_code_and_a_text_for_what_cannot_be_used() {
    let seen = host(vec![device(vec![port(PortState::Down, LinkLayer::Ethernet, &[])])]);
    let json = serde_json::to_value(&seen).unwrap();
    for object in [&json, &json["devices"][0], &json["devices"][0]["ports"][0]] {
        assert_eq!(object["reason"]["code"], "port-not-active");
        assert!(object["reason"]["text"].as_str().unwrap().contains("is the cable in"), "{json}");
    }
    assert_eq!(json["memory_lock"]["limit_bytes"], serde_json::Value::Null);
}

/// Whatever this machine has.
#[test]
fn this_host_is_looked_at() {
    let seen = RdmaDevices::of_this_host();
    let usable = seen.devices.iter().any(|device| device.reason.is_none());
    assert_eq!(seen.reason.is_none(), usable, "{seen:?}");
}

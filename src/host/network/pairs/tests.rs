use super::*;
use crate::host::network::lab::Lab;
use crate::testing::{Need, require};
use proptest::prelude::*;

fn offer(text: &str) -> Offer {
    let (interface, net) = text.split_once(' ').unwrap();
    let net: ipnet::IpNet = net.parse().unwrap();
    Offer {
        interface: interface.into(),
        address: net.addr(),
        prefix: net.prefix_len(),
        mtu: 1500,
        speed_bits_per_second: None,
        bandwidth_cap: None,
        loopback: interface == "lo",
        isolated: false,
    }
}

fn offers(texts: &[&str]) -> Vec<Offer> {
    texts.iter().map(|text| offer(text)).collect()
}

fn shown(paths: &[PathInfo]) -> Vec<String> {
    let show = |path: &PathInfo| {
        format!("{} {}-{} {}", path.interface, path.source, path.destination, path.peer_interface)
    };
    paths.iter().map(show).collect()
}

#[test]
fn neighbours_are_paired_in_our_order_and_then_theirs() {
    for (ours, theirs, expected) in [
        // Two separate links.
        (
            &["e2 10.0.2.1/24", "e1 10.0.1.1/24"][..],
            &["e1 10.0.1.2/24", "e2 10.0.2.2/24"][..],
            &["e2 10.0.2.1-10.0.2.2 e2", "e1 10.0.1.1-10.0.1.2 e1"][..],
        ),
        // Two ports each in one subnet: every pair.
        (
            &["a 10.0.0.1/24", "b 10.0.0.2/24"],
            &["c 10.0.0.3/24", "d 10.0.0.4/24"],
            &[
                "a 10.0.0.1-10.0.0.3 c",
                "a 10.0.0.1-10.0.0.4 d",
                "b 10.0.0.2-10.0.0.3 c",
                "b 10.0.0.2-10.0.0.4 d",
            ],
        ),
        // Both families on the same two interfaces are one path, ours decides which.
        (&["e fd00::1/64", "e 10.0.0.1/24"], &["e 10.0.0.2/24", "e fd00::2/64"], &["e fd00::1-fd00::2 e"]),
        // Only one of them believes that the other is its neighbour.
        (&["e 10.0.0.1/8"], &["e 10.0.1.2/24"], &[]),
        (&["e 10.0.1.1/8"], &["e 10.0.1.2/24"], &["e 10.0.1.1-10.0.1.2 e"]),
        // A prefix that cannot be.
        (&["e 10.0.0.1/24"], &["e fd00::1/64"], &[]),
    ] {
        assert_eq!(shown(&pair(&offers(ours), &offers(theirs))), expected);
    }
    let mut impossible = offer("e 10.0.0.2/24");
    impossible.prefix = 33;
    assert_eq!(pair(&offers(&["e 10.0.0.1/24"]), &[impossible]), []);
}

#[test]
fn loopback_joins_only_what_can_be_one_machine() {
    let lo = "lo 127.0.0.1/8";
    for (ours, theirs, expected) in [
        (&[lo][..], &[lo][..], &["lo 127.0.0.1-127.0.0.1 lo"][..]),
        (&["e 10.0.0.1/24", lo], &["e 10.0.0.1/24", lo], &["lo 127.0.0.1-127.0.0.1 lo"]),
        // Two hosts behind routers, each with the usual bridge for containers.
        (
            &["e 10.0.0.1/24", "docker0 172.17.0.1/16", lo],
            &["e 10.0.1.1/24", "docker0 172.17.0.1/16", lo],
            &[],
        ),
        // Two hosts with a link.
        (&[lo, "e 10.0.0.1/24"], &[lo, "e 10.0.0.2/24"], &["e 10.0.0.1-10.0.0.2 e"]),
        // One machine, no loopback allowed.
        (&["e 10.0.0.1/24"], &["e 10.0.0.1/24"], &["e 10.0.0.1-10.0.0.1 e"]),
    ] {
        assert_eq!(shown(&pair(&offers(ours), &offers(theirs))), expected);
    }
}

#[test]
fn a_path_has_the_lesser_of_both_ends_and_our_cap() {
    let mut our = offer("e 10.0.0.1/24");
    let mut their = offer("f 10.0.0.2/24");
    (our.mtu, their.mtu) = (9000, 1500);
    (our.bandwidth_cap, their.bandwidth_cap) = (Some(7), Some(8));
    for (ours, theirs, path) in [
        (None, None, None),
        (Some(10), None, Some(10)),
        (None, Some(25), Some(25)),
        (Some(10), Some(25), Some(10)),
    ] {
        (our.speed_bits_per_second, their.speed_bits_per_second) = (ours, theirs);
        let paths = pair(&[our.clone()], &[their.clone()]);
        assert_eq!(
            (paths[0].mtu, paths[0].bandwidth_cap, paths[0].speed_bits_per_second),
            (1500, Some(7), path)
        );
    }
}

#[test]
fn a_long_list_is_cut() {
    let many = |network: u8| -> Vec<Offer> {
        (1..=20).map(|host| offer(&format!("e{host} 10.0.0.{}/24", network + host))).collect()
    };
    assert_eq!(pair(&many(0), &many(100)).len(), MAX_PATHS);
}

#[test]
fn a_path_over_a_router_is_found_only_by_an_interface_that_leads_there() {
    if !require(&[Need::Netns]) {
        return;
    }
    let lab = Lab::new(&["a", "r"]);
    lab.join(("a", "e1"), ("r", "r1"), 1500);
    lab.join(("a", "e2"), ("r", "r2"), 1500);
    lab.ip("a", "address add 10.0.1.1/24 dev e1");
    lab.ip("a", "address add 10.0.2.1/24 dev e2");
    lab.ip("r", "address add 10.0.1.254/24 dev r1");
    let ours = offers(&["e1 10.0.1.1/24", "e2 10.0.2.1/24", "lo 127.0.0.1/8"]);
    let theirs = offers(&["e5 fd05::1/64", "e5 10.0.5.1/24", "e6 10.0.6.1/24", "lo 127.0.0.1/8"]);
    let found = || shown(&lab.run("a", async || paths(&ours, &theirs).await.unwrap()));
    assert_eq!(found(), Vec::<String>::new());
    lab.ip("a", "route add 10.0.5.0/24 via 10.0.1.254");
    assert_eq!(found(), ["e1 10.0.1.1-10.0.5.1 e5"]);
    lab.ip("a", "route add default dev e2 metric 100");
    assert_eq!(found(), ["e1 10.0.1.1-10.0.5.1 e5", "e2 10.0.2.1-10.0.5.1 e5"]);
    lab.ip("a", "route add unreachable 10.0.5.1");
    assert_eq!(found(), Vec::<String>::new());
}

/// Every pair of every pair, by arithmetic on the bits, then the first of each pair of interfaces.
fn naive(ours: &[Offer], theirs: &[Offer]) -> Vec<String> {
    let bits = |address: IpAddr| match address {
        IpAddr::V4(v4) => (u128::from(v4.to_bits()) << 96, 4),
        IpAddr::V6(v6) => (v6.to_bits(), 6),
    };
    let within = |offer: &Offer, address: IpAddr| {
        let ((one, family), (other, other_family)) = (bits(offer.address), bits(address));
        family == other_family && (one ^ other).leading_zeros() >= u32::from(offer.prefix)
    };
    let mut all = Vec::new();
    for our in ours {
        for their in theirs {
            let real = !our.loopback && !their.loopback && our.address != their.address;
            if real && within(our, their.address) && within(their, our.address) {
                let shown =
                    format!("{} {}-{} {}", our.interface, our.address, their.address, their.interface);
                all.push(((our.interface.clone(), their.interface.clone()), shown));
            }
        }
    }
    let first = |at: &usize| all[..*at].iter().all(|(interfaces, _)| *interfaces != all[*at].0);
    (0..all.len()).filter(first).map(|at| all[at].1.clone()).collect()
}

/// Few addresses and short prefixes of many lengths, so that they meet often.
fn any_offer() -> impl Strategy<Value = Offer> {
    (0..4_u8, any::<bool>(), 0..8_u8, 26..=33_u8).prop_map(|(interface, v4, host, prefix)| {
        let mut offer = offer(if v4 { "e 10.0.0.0/24" } else { "e fd00::/64" });
        offer.interface = format!("e{interface}");
        offer.loopback = interface == 3;
        offer.address = match offer.address {
            IpAddr::V4(v4) => IpAddr::V4((v4.to_bits() | u32::from(host)).into()),
            IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() | u128::from(host)).into()),
        };
        offer.prefix = if v4 { prefix.min(32) } else { 95 + prefix };
        offer
    })
}

proptest! {
    #[test]
    fn pairs_are_those_of_a_naive_search(
        ours in prop::collection::vec(any_offer(), 0..7),
        theirs in prop::collection::vec(any_offer(), 0..7),
    ) {
        let expected = naive(&ours, &theirs);
        let found = pair(&ours, &theirs);
        if expected.is_empty() {
            // Then one machine, or nothing.
            prop_assert!(found.is_empty() || same_machine(&ours, &theirs));
        } else {
            prop_assert_eq!(shown(&found), expected);
        }
    }
}

use super::*;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::host::network::lab::Lab;
use crate::testing::{Need, require};
use proptest::prelude::*;

const TOKEN: ProbeToken = [7; 16];

fn offer(interface: &str, address: &str, mtu: u32) -> Offer {
    Offer {
        interface: interface.into(),
        address: address.parse().unwrap(),
        prefix: 24,
        mtu,
        speed_bits_per_second: None,
        bandwidth_cap: None,
        loopback: interface == "lo",
        isolated: false,
    }
}

fn path(interface: &str, source: &str, destination: &str, mtu: u32) -> PathInfo {
    PathInfo {
        interface: interface.into(),
        source: source.parse().unwrap(),
        peer_interface: "there".into(),
        destination: destination.parse().unwrap(),
        speed_bits_per_second: None,
        mtu,
        bandwidth_cap: None,
        isolated: false,
        peer_isolated: false,
    }
}

fn carries(result: &ProbeResult) -> (bool, u32) {
    match result {
        ProbeResult::Reachable { mtu_ok, largest, .. } => (*mtu_ok, *largest),
        ProbeResult::Silent { why } => panic!("silent: {why:?}"),
    }
}

#[tokio::test]
async fn loopback_carries_its_whole_mtu_in_both_families() {
    let service =
        EchoService::start(&[offer("lo", "127.0.0.1", 65_536), offer("lo", "::1", 65_536)], (0, 0), TOKEN);
    assert_eq!(service.problems(), Vec::<String>::new());
    let paths = [path("lo", "127.0.0.1", "127.0.0.1", 65_536), path("lo", "::1", "::1", 65_536)];
    let results = probe(&paths, service.ports(), TOKEN).await;
    assert_eq!(results.iter().map(carries).collect::<Vec<_>>(), [(true, 65_536); 2]);
}

#[tokio::test]
async fn a_machine_reaches_itself_by_an_address_of_its_own() {
    let interfaces = crate::host::network::interfaces::interfaces().await.unwrap();
    let offers = crate::host::network::allowed::offers(&interfaces, &crate::host::config::Networks::Any);
    let Some(own) = offers.into_iter().find(|offer| !offer.loopback) else { return };
    let paths = crate::host::network::pairs::pair(std::slice::from_ref(&own), std::slice::from_ref(&own));
    assert_eq!(paths.len(), 1);
    let service = EchoService::start(&[own], (0, 0), TOKEN);
    assert!(carries(&probe(&paths, service.ports(), TOKEN).await[0]).0);
}

#[tokio::test]
async fn strangers_get_no_answer_and_nobody_a_longer_one() {
    let service = EchoService::start(&[offer("lo", "127.0.0.1", 1500)], (0, 0), TOKEN);
    let asker = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    asker.connect(("127.0.0.1", service.ports()[0].1)).await.unwrap();
    for short in [&[7; 16][..], &[7; 23], &[8; 24], b""] {
        asker.send(short).await.unwrap();
    }
    asker.send(&[7; 24]).await.unwrap();
    let mut answer = [0; 100];
    assert_eq!(asker.recv(&mut answer).await.unwrap(), 24);
    assert_eq!(answer[20..24], 24_u32.to_le_bytes());
    assert!(asker.try_recv(&mut answer).is_err(), "one question of five was answered");

    let paths = [path("lo", "127.0.0.1", "127.0.0.1", 1500)];
    let results = probe(&paths, service.ports(), [8; 16]).await;
    assert_eq!(results, [ProbeResult::Silent { why: None }]);
}

#[tokio::test]
async fn a_path_that_cannot_be_is_silent_and_says_why() {
    let paths = [
        path("lo", "127.0.0.1", "127.0.0.1", 1500),
        path("pf-none", "127.0.0.1", "127.0.0.2", 1500),
        path("lo", "192.0.2.77", "127.0.0.2", 1500),
        path("lo", "127.0.0.1", "127.0.0.9", 1500),
    ];
    // A port that was free a moment ago.
    let closed = UdpSocket::bind("127.0.0.2:0").await.unwrap().local_addr().unwrap();
    let results = probe(&paths, &[(closed.ip(), closed.port())], TOKEN).await;
    let why: Vec<&str> = results
        .iter()
        .map(|result| match result {
            ProbeResult::Silent { why: Some(why) } => why.as_str(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(why[0], "the destination does not answer probes at this address");
    assert!(why[1].contains("No such device"), "{why:?}");
    assert!(why[2].contains("Cannot assign requested address"), "{why:?}");
    let results =
        probe(&[path("lo", "127.0.0.1", "127.0.0.2", 1500)], &[(closed.ip(), closed.port())], TOKEN).await;
    assert!(matches!(&results[0], ProbeResult::Silent { why: Some(why) } if why.contains("refused")));
}

#[tokio::test]
async fn the_ports_of_the_range_are_used_and_one_that_is_taken_is_passed_over() {
    let taken = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let first = taken.local_addr().unwrap().port();
    let lo = [offer("lo", "127.0.0.1", 1500)];
    let service = EchoService::start(&lo, (first, first.saturating_add(20)), TOKEN);
    assert_eq!(service.problems(), Vec::<String>::new());
    assert!((first + 1..=first + 20).contains(&service.ports()[0].1));
    let service = EchoService::start(&lo, (first, first), TOKEN);
    assert_eq!(service.ports(), []);
    let expected = format!(
        "probes cannot be answered at 127.0.0.1 on lo (UDP port {first} to {first}): Address already in use (os error 98)"
    );
    assert_eq!(service.problems(), [expected]);
}

#[test]
fn a_link_that_carries_less_than_its_ends_say_is_found_out() {
    if !require(&[Need::Netns]) {
        return;
    }
    // Two ends with jumbo frames, and a bridge between them on whose ports somebody forgot them.
    let lab = Lab::new(&["a", "s", "b"]);
    lab.join(("a", "eth1"), ("s", "p1"), 9000);
    lab.join(("b", "eth1"), ("s", "p2"), 9000);
    lab.ip("s", "link add br0 type bridge");
    for port in ["p1", "p2"] {
        lab.ip("s", &format!("link set {port} master br0 mtu 1500"));
    }
    lab.ip("s", "link set br0 up");
    lab.ip("a", "address add 10.1.0.1/24 dev eth1");
    lab.ip("b", "address add 10.1.0.2/24 dev eth1");
    lab.ip("a", "address add fd01::1/64 dev eth1 nodad");
    lab.ip("b", "address add fd01::2/64 dev eth1 nodad");

    let ask = |mtu| ask(&lab, [("10.1.0.1", "10.1.0.2"), ("fd01::1", "fd01::2")], mtu);
    for (mtu_ok, largest) in ask(9000) {
        assert!(!mtu_ok);
        // The kernel lets a tag of four bytes pass beyond a port's MTU (is_skb_forwardable).
        assert!((1500..=1504).contains(&largest), "{largest}");
    }
    assert_eq!(ask(1500), [(true, 1500); 2]);
    for port in ["p1", "p2"] {
        lab.ip("s", &format!("link set {port} mtu 9000"));
    }
    assert_eq!(ask(9000), [(true, 9000); 2]);
}

#[test]
fn a_router_does_not_hide_a_small_link_by_cutting_packets() {
    if !require(&[Need::Netns]) {
        return;
    }
    let lab = Lab::new(&["a", "r", "b"]);
    lab.join(("a", "eth1"), ("r", "r1"), 9000);
    lab.join(("b", "eth1"), ("r", "r2"), 9000);
    lab.ip("r", "link set r2 mtu 1500");
    for (name, interface, number) in [("a", "r1", 1), ("b", "r2", 2)] {
        lab.ip(name, &format!("address add 10.{number}.0.1/24 dev eth1"));
        lab.ip(name, &format!("address add fd0{number}::1/64 dev eth1 nodad"));
        lab.ip("r", &format!("address add 10.{number}.0.254/24 dev {interface}"));
        lab.ip("r", &format!("address add fd0{number}::254/64 dev {interface} nodad"));
        lab.ip(name, &format!("route add default via 10.{number}.0.254"));
        lab.ip(name, &format!("-6 route add default via fd0{number}::254"));
    }
    lab.set("r", "ipv4/ip_forward", "1");
    lab.set("r", "ipv6/conf/all/forwarding", "1");
    let routes = [("10.1.0.1", "10.2.0.1"), ("fd01::1", "fd02::1")];
    // Twice: what the kernel learns from the first time does not answer for the path the second time.
    for _ in 0..2 {
        assert_eq!(ask(&lab, routes, 9000), [(false, 1500); 2]);
    }
    lab.ip("r", "link set r2 mtu 9000");
    assert_eq!(ask(&lab, routes, 9000), [(true, 9000); 2]);
}

/// Probes paths from eth1 in `a` to eth1 in `b`.
fn ask(lab: &Lab, paths: [(&str, &str); 2], mtu: u32) -> Vec<(bool, u32)> {
    let (ports_out, ports_in) = std::sync::mpsc::channel();
    let done = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            lab.run("b", async move || {
                let offers = paths.map(|(_, destination)| offer("eth1", destination, mtu));
                let service = EchoService::start(&offers, (0, 0), TOKEN);
                ports_out.send(service.ports().to_vec()).unwrap();
                while !done.load(Ordering::Relaxed) {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            });
        });
        let ports = ports_in.recv().unwrap();
        let paths = paths.map(|(source, destination)| path("eth1", source, destination, mtu));
        let results = lab.run("a", async || probe(&paths, &ports, TOKEN).await);
        done.store(true, Ordering::Relaxed);
        results.iter().map(carries).collect()
    })
}

/// What the search finds on a path that carries so much.
fn found(limit: u32, mtu: u32) -> u32 {
    let (mut passing, mut failing) = (52, mtu);
    for _ in 0..MOST_SIZES {
        let Some(size) = next_size(passing, failing) else { break };
        if size <= limit { passing = size } else { failing = size }
    }
    passing
}

#[test]
fn common_sizes_are_found_exactly() {
    for limit in COMMON_MTUS {
        for mtu in [limit + 1, 1500, 9000, 65_535] {
            if mtu > limit {
                assert_eq!(found(limit, mtu), limit, "of {mtu}");
            }
        }
    }
}

proptest! {
    #[test]
    fn the_search_never_names_more_than_passes_and_comes_near(limit in 52..65_000_u32, more in 1..9000_u32) {
        let largest = found(limit, limit + more);
        prop_assert!(largest <= limit);
        prop_assert!(limit - largest <= 20.max(limit / 20), "{largest} of {limit}");
    }
}

//! What runs on the first of two hosts that have two rails between them: guests that move by RDMA, and rails that fail.

use crate::hosts::{HERE, Host, MIB, THERE, as_at_first, carried, channels};

const BOTH: [&str; 2] = ["pf0", "pf1"];

/// A guest on hosts on which no other test has left anything.
fn start(name: &str, flags: &str) {
    as_at_first();
    HERE.done(&format!("guest start --name {name} {flags}"));
}

/// The guest goes, and nothing of its migrations stays on a device.
fn end(host: Host, name: &str) {
    host.check_whole(name);
    host.done(&format!("guest stop {name}"));
    HERE.check_devices_are_free();
    THERE.check_devices_are_free();
}

/// Packets that a host's device has received: what the driver knows of it.
fn packets(host: Host, device: &str) -> u64 {
    let path = format!("/sys/class/infiniband/{device}/ports/1/hw_counters/rcvd_pkts");
    host.sh(&format!("cat {path}")).trim().parse().expect("a number")
}

#[test]
#[ignore = "runs in two hosts of scripts/rxe-testbed"]
fn a_kvm_guest_under_load_moves_by_rdma_and_both_rails_share() {
    start("loaded", "--guest kvm --memory 64MiB --dirty-rate 4MiB --program hotset");
    let before = [packets(THERE, "rxe0"), packets(THERE, "rxe1")];
    let report = HERE.moved("loaded", "");
    let packets = [packets(THERE, "rxe0") - before[0], packets(THERE, "rxe1") - before[1]];
    assert_eq!(report["mode_used"], "rdma", "{report:#}");
    for (interface, packets) in BOTH.into_iter().zip(packets) {
        let (all, lost, bytes) = channels(&report, interface);
        assert_eq!((all, lost), (1, 0), "{interface}: {report:#}");
        assert!(bytes > 8 * MIB, "{bytes} on {interface}: {report:#}");
        // At most 4 KiB each, by the driver's own count.
        assert!(packets * 4096 > bytes * 9 / 10, "{packets} packets for {bytes} bytes on {interface}");
    }
    end(THERE, "loaded");
}

#[test]
#[ignore = "runs in two hosts of scripts/rxe-testbed"]
fn process_guests_of_64_and_256_mib_move_by_rdma() {
    for mebibytes in [64, 256] {
        start("sized", &format!("--guest process --memory {mebibytes}MiB --dirty-rate 1MiB"));
        let report = HERE.moved("sized", "");
        assert_eq!(report["mode_used"], "rdma", "{report:#}");
        let bytes: u64 = BOTH.iter().map(|interface| channels(&report, interface).2).sum();
        assert!(bytes >= mebibytes * MIB * 9 / 10, "{report:#}");
        println!("{mebibytes} MiB: {} s", report["total_seconds"]);
        end(THERE, "sized");
    }
}

#[test]
#[ignore = "runs in two hosts of scripts/rxe-testbed"]
fn a_rail_that_is_cut_in_a_round_comes_back_and_rdma_finishes() {
    start("cut", "--guest kvm --memory 48MiB --dirty-rate 512KiB");
    let id = HERE.begin("cut", "--bandwidth 3MiB");
    HERE.wait_for_bytes(&id, &BOTH, MIB);
    HERE.sh("wire 1 off");
    HERE.wait_for("the rail to be given up", || {
        let migration = HERE.migration(&id);
        let link =
            migration["progress"]["links"].as_array()?.iter().find(|link| link["interface"] == "pf1")?;
        (link["channels"] == 0).then_some(())
    });
    let before = HERE.migration(&id);
    HERE.wait_for_bytes(&id, &["pf0"], carried(&before, "pf0") + MIB);
    HERE.sh("wire 1 on");
    HERE.wait_for_bytes(&id, &["pf1"], carried(&before, "pf1") + MIB);
    let report = HERE.over(&id);
    assert_eq!((&report["state"], &report["ram_equal"]), (&"completed".into(), &true.into()), "{report:#}");
    assert_eq!(report["mode_used"], "rdma", "{report:#}");
    assert_eq!(channels(&report, "pf0").1, 0, "{report:#}");
    let (all, lost, _) = channels(&report, "pf1");
    assert_eq!((all, lost), (2, 1), "{report:#}");
    end(THERE, "cut");
}

/// A switch before a host that drops RDMA's packets and lets TCP through: neither end hears of it but by silence.
fn drop_rdma(host: Host, drop: bool) {
    for interface in BOTH {
        host.sh(&if drop {
            format!(
                "tc qdisc add dev {interface} clsact && tc filter add dev {interface} ingress protocol ip u32 \
                 match ip protocol 17 0xff match ip dport 4791 0xffff action drop"
            )
        } else {
            format!("tc qdisc del dev {interface} clsact")
        });
    }
}

#[test]
#[ignore = "runs in two hosts of scripts/rxe-testbed"]
fn tcp_finishes_without_rails_and_rdma_is_taken_up_again_when_it_returns() {
    start("dropped", "--guest process --memory 32MiB --dirty-rate 256KiB");
    let id = HERE.begin("dropped", "--bandwidth 2MiB");
    HERE.wait_for_bytes(&id, &BOTH, MIB);
    drop_rdma(THERE, true);
    HERE.wait_for("TCP to take over", || {
        let migration = HERE.migration(&id);
        assert!(migration["ended_at"].is_null(), "it is over: {migration:#}");
        (migration["mode_used"] == "tcp").then_some(())
    });
    drop_rdma(THERE, false);
    let report = HERE.over(&id);
    assert_eq!((&report["state"], &report["ram_equal"]), (&"completed".into(), &true.into()), "{report:#}");
    assert_eq!(report["mode_used"], "rdma", "it is taken up again: {report:#}");
    let warnings = report["warnings"].to_string();
    assert!(
        warnings.contains("tcp took over: the RDMA queue pair failed: the peer did not answer"),
        "{report:#}"
    );
    THERE.check_whole("dropped");

    // The way back: it does not return.
    let id = THERE.begin("dropped", "--bandwidth 2MiB");
    THERE.wait_for_bytes(&id, &BOTH, MIB);
    drop_rdma(HERE, true);
    let report = THERE.over(&id);
    drop_rdma(HERE, false);
    assert_eq!((&report["state"], &report["ram_equal"]), (&"completed".into(), &true.into()), "{report:#}");
    assert_eq!(report["mode_used"], "tcp", "{report:#}");
    let reason = report["mode_reason"].as_str().unwrap_or_default();
    assert!(reason.contains("RDMA was lost, and tcp took over"), "{report:#}");
    end(HERE, "dropped");
}

#[test]
#[ignore = "runs in two hosts of scripts/rxe-testbed"]
fn what_a_failed_test_leaves_is_taken_away_before_the_next() {
    start("left", "--guest process --memory 8MiB --dirty-rate 64KiB");
    drop_rdma(THERE, true);
    HERE.begin("left", "--bandwidth 64KiB");
    THERE.sh("rdma link del rxe1");
    HERE.sh("wire 0 off");
    as_at_first();
    for host in [HERE, THERE] {
        assert_eq!(host.sh("tc qdisc show | grep clsact | wc -l").trim(), "0", "{host}");
        assert_eq!(host.guest_state("left"), "none", "{host}");
        host.check_devices_are_free();
    }
    start("next", "--guest process --memory 8MiB --dirty-rate 64KiB");
    let report = HERE.moved("next", "");
    assert_eq!(report["mode_used"], "rdma", "{report:#}");
    for interface in BOTH {
        assert_eq!(channels(&report, interface).0, 1, "{interface}: {report:#}");
    }
    end(THERE, "next");
}

/// What becomes of a migration whose devices are removed. soft-RoCE tells nobody (its driver has no `disassociate_ucontext`): the
/// device goes on until all have closed it, and whoever removes it waits so long. Other drivers tell, and TCP finishes.
#[test]
#[ignore = "runs in two hosts of scripts/rxe-testbed"]
fn devices_that_are_removed_in_a_round_end_with_the_migration_and_not_before_its_guest_is_there() {
    let daemons = [HERE, THERE].map(|host| host.sh("cat /run/pageferry.pid"));
    start("removed", "--guest kvm --memory 32MiB --dirty-rate 256KiB");
    let (mut here, mut there) = (HERE, THERE);
    // At the source at first, and on the way back at the destination.
    for _ in 0..2 {
        let id = here.begin("removed", "--bandwidth 3MiB");
        here.wait_for_bytes(&id, &BOTH, MIB);
        HERE.sh("rdma link del rxe0 && rdma link del rxe1");
        assert_eq!(HERE.sh("ls /sys/class/infiniband").trim(), "", "they are gone");
        let report = here.over(&id);
        HERE.sh("rdma link add rxe0 type rxe netdev pf0 && rdma link add rxe1 type rxe netdev pf1");
        assert_eq!(
            (&report["state"], &report["ram_equal"]),
            (&"completed".into(), &true.into()),
            "{report:#}"
        );
        let reason = report["mode_reason"].as_str().unwrap_or_default();
        println!("removed: {} ({reason}), {}", report["mode_used"], report["warnings"]);
        if report["mode_used"] == "tcp" {
            assert!(reason.contains("RDMA was lost, and tcp took over"), "{report:#}");
        } else {
            assert!(BOTH.iter().all(|interface| channels(&report, interface).1 == 0), "{report:#}");
        }
        there.check_whole("removed");
        (here, there) = (there, here);
    }
    for (host, daemon) in [HERE, THERE].into_iter().zip(daemons) {
        host.sh(&format!("kill -0 {}", daemon.trim()));
    }
    // The devices are new ones, and as good as the old.
    let report = here.moved("removed", "");
    assert_eq!(report["mode_used"], "rdma", "{report:#}");
    end(there, "removed");
}

/// Begins the daemons anew, with these lines in both host files.
fn with_lines(lines: &str) {
    for host in [HERE, THERE] {
        host.sh("p=$(cat /run/pageferry.pid); kill $p; while [ -e /proc/$p ]; do sleep 0.1; done");
    }
    HERE.sh(&format!("daemons --verbose {lines}"));
}

#[test]
#[ignore = "runs in two hosts of scripts/rxe-testbed"]
fn the_host_file_says_how_queue_pairs_are() {
    start("tuned", "--guest process --memory 8MiB --dirty-rate 64KiB");
    HERE.done("guest stop tuned");
    with_lines("'rdma.mtu = 512' 'rdma.queue_depth = 32' 'rdma.timeout = 17' 'rdma.retries = 5'");
    start("tuned", "--guest process --memory 8MiB --dirty-rate 64KiB");
    let before = packets(THERE, "rxe0") + packets(THERE, "rxe1");
    let report = HERE.moved("tuned", "");
    let packets = packets(THERE, "rxe0") + packets(THERE, "rxe1") - before;
    assert_eq!(report["mode_used"], "rdma", "{report:#}");
    let bytes: u64 = BOTH.iter().map(|interface| channels(&report, interface).2).sum();
    assert!(packets * 512 > bytes * 9 / 10, "{packets} packets of 512 bytes for {bytes} bytes");
    // The guest's process has a log of its own.
    let log = HERE.sh("grep -h 'an RDMA queue pair is connected' /var/lib/pageferry/log/*.log");
    assert!(log.contains("mtu=512 depth=32 timeout=17 retries=5"), "{log}");
    end(THERE, "tuned");
    with_lines("");
}

#[test]
#[ignore = "runs in two hosts of scripts/rxe-testbed"]
fn a_destination_that_is_killed_leaves_the_guest_at_the_source() {
    start("orphan", "--guest kvm --memory 32MiB --dirty-rate 1MiB");
    let id = HERE.begin("orphan", "--bandwidth 4MiB");
    HERE.wait_for_bytes(&id, &BOTH, MIB);
    // The process that takes the guest in, by the devices that it has open; not the daemon.
    THERE.sh("for p in /proc/[0-9]*; do ls -l $p/fd 2>/dev/null | grep -q infiniband/uverbs && kill -9 ${p#/proc/}; done; true");
    let report = HERE.over(&id);
    assert_eq!(report["state"], "rolled_back", "{report:#}");
    HERE.check_whole("orphan");
    let report = HERE.moved("orphan", "");
    assert_eq!(report["mode_used"], "rdma", "{report:#}");
    end(THERE, "orphan");
}

#[test]
#[ignore = "runs in two hosts of scripts/rxe-testbed"]
fn a_host_without_rdma_gets_the_guest_by_tcp_with_the_reason_shown() {
    start("mixed", "--guest process --memory 16MiB --dirty-rate 256KiB");
    let remove = "rdma link del rxe0 && rdma link del rxe1";
    let add = "rdma link add rxe0 type rxe netdev pf0 && rdma link add rxe1 type rxe netdev pf1";
    let (mut here, mut there) = (HERE, THERE);
    for words in ["the destination", "this host has no RDMA device"] {
        // Host 2 is the destination at first, and then the source.
        THERE.sh(remove);
        let report = here.moved("mixed", "");
        THERE.sh(add);
        assert_eq!(report["mode_used"], "tcp", "{report:#}");
        let reason = report["mode_reason"].as_str().unwrap_or_default();
        assert!(reason.contains(words), "{words:?}: {report:#}");
        (here, there) = (there, here);
    }
    // One rail without: the other carries it alone.
    there.sh("rdma link del rxe1");
    let report = here.moved("mixed", "");
    there.sh("rdma link add rxe1 type rxe netdev pf1");
    assert_eq!(report["mode_used"], "rdma", "{report:#}");
    assert!(report["warnings"].to_string().contains("rxe1") || channels(&report, "pf1").0 == 0, "{report:#}");
    end(there, "mixed");
}

/// Of a daemon: descriptors, resident and locked memory in KiB.
fn daemon(host: Host) -> (u64, u64, u64) {
    let numbers = host
        .sh("p=$(cat /run/pageferry.pid); ls /proc/$p/fd | wc -l; awk '/VmRSS/{print $2}' /proc/$p/status; \
         awk '/VmLck/{print $2}' /proc/$p/status");
    let numbers: Vec<u64> = numbers.lines().map(|line| line.trim().parse().expect("a number")).collect();
    (numbers[0], numbers[1], numbers[2])
}

#[test]
#[ignore = "runs in two hosts of scripts/rxe-testbed"]
fn twenty_migrations_leave_nothing_behind() {
    start("often", "--guest process --memory 8MiB --dirty-rate 64KiB");
    let (mut here, mut there) = (HERE, THERE);
    let mut at_first = Vec::new();
    let processes = |host: Host| host.sh("ls -d /proc/[0-9]* | wc -l; ls /dev/shm | wc -l; ls /tmp | wc -l");
    for number in 0..20 {
        let report = here.moved("often", "");
        assert_eq!(report["mode_used"], "rdma", "{report:#}");
        (here, there) = (there, here);
        here.check_devices_are_free();
        there.check_devices_are_free();
        // What is allocated once, is by then.
        if number == 3 {
            at_first = vec![daemon(HERE), daemon(THERE)];
        }
    }
    for (host, before) in [HERE, THERE].into_iter().zip(at_first) {
        // Connections between the daemons, and of the commands, are kept for a while and then closed.
        host.wait_for("descriptors to be closed", || (daemon(host).0 <= before.0).then_some(()));
        let after = daemon(host);
        println!(
            "{host}: descriptors, resident and locked KiB: {before:?}, then {after:?}; {}",
            processes(host)
        );
        // A leaked guest would be 8 MiB; threads that came for the first time, and the history, are less.
        assert!(after.1 <= before.1 + 6 * 1024, "{host}: {before:?}, {after:?}");
        assert_eq!(after.2, 0, "{host}: {before:?}, {after:?}");
    }
    end(here, "often");
}

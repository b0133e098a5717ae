//! What runs on the first of two hosts that have two rails between them and a stock QEMU each: its guest moves by RDMA.

use crate::hosts::{HERE, Host, MIB, THERE};

/// Memory that is filled at the source: from which MiB on, and how many.
const FILLED: (u64, u64) = (16, 32);

/// A machine whose memory is a file that pageferry can map. Nothing is there to boot, so the firmware waits.
fn qemu(host: Host, more: &str) {
    host.sh(&format!(
        "qemu-system-x86_64 -L /root/firmware -accel tcg -cpu max -nodefaults -display none -m 64 \
         -machine q35,memory-backend=ram0 \
         -object memory-backend-file,id=ram0,size=64M,mem-path=/dev/shm/ram,share=on \
         -qmp unix:/tmp/qmp,server=on,wait=off -pidfile /tmp/qemu.pid -daemonize {more}"
    ));
}

fn digest(host: Host) -> String {
    let (at, many) = FILLED;
    host.sh(&format!("dd if=/dev/shm/ram bs=1M skip={at} count={many} 2>/dev/null | sha256sum"))
}

fn packets() -> u64 {
    let counters = "/sys/class/infiniband/rxe*/ports/1/hw_counters/rcvd_pkts";
    THERE
        .sh(&format!("cat {counters}"))
        .lines()
        .map(|line| line.trim().parse::<u64>().expect("a number"))
        .sum()
}

#[test]
#[ignore = "runs in two hosts of scripts/rxe-testbed, with QEMU"]
fn the_guest_of_a_stock_qemu_moves_by_rdma() {
    let (at, many) = FILLED;
    HERE.sh(&format!("truncate -s 64M /dev/shm/ram && dd if=/dev/urandom of=/dev/shm/ram bs=1M seek={at} count={many} conv=notrunc 2>/dev/null"));
    qemu(HERE, "");
    qemu(THERE, "-incoming defer");
    THERE.sh("pageferry relay destination --qmp /tmp/qmp --listen 10.78.0.2 --listen 10.78.1.2 --json \
         >/tmp/result 2>/tmp/log </dev/null & echo $! >/tmp/relay.pid");
    THERE.wait_for("the relay to listen", || THERE.sh("cat /tmp/log").contains("7431").then_some(()));
    let packets_before = packets();
    let (code, source) = HERE.json(
        "relay source --qmp /tmp/qmp --to 10.78.0.1-10.78.0.2 --to 10.78.1.1-10.78.1.2 --mode rdma --channels 2",
    );
    let log = THERE.sh("cat /tmp/log /tmp/result");
    assert_eq!((code, &source["outcome"]), (0, &"completed".into()), "{source:#}\n{log}");
    assert_eq!(source["mode_used"], "rdma", "{source:#}");
    assert!(source["placed_bytes"].as_u64() >= Some(many * MIB), "{source:#}");
    // By the driver's own count, packets of 4 KiB at most.
    let packets = packets() - packets_before;
    assert!(packets * 4096 > many * MIB * 9 / 10, "{packets} packets");
    // The firmware may have written to it, too; now the guest stands still at the source, and has nothing to do at the destination.
    assert_eq!(digest(THERE), digest(HERE));
    THERE.wait_for("the relay's end", || {
        THERE.sh("kill -0 $(cat /tmp/relay.pid) 2>/dev/null || echo over").contains("over").then_some(())
    });
    let log = THERE.sh("cat /tmp/log /tmp/result");
    assert!(log.contains("\"outcome\":\"completed\"") || log.contains("\"outcome\": \"completed\""), "{log}");
    for host in [HERE, THERE] {
        host.check_devices_are_free();
    }
    // The guest runs there.
    THERE.sh("kill -0 $(cat /tmp/qemu.pid)");
    println!("{source:#}");
}

//! Every check that can fail between two hosts, as whoever asks for a migration sees it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use crate::ask::{check, failed, list, moved, on, reload, said};
use crate::lab::{Host, Lab, is_here};

/// A check that ends so, by the command's exit code and its JSON; the guest stays, and a migration is refused for the same.
#[track_caller]
fn refused(host: &Host, to: &str, names: &[&str], words: &[&str]) -> Value {
    let (code, report) = host.json(&format!("check vm --to {to}"));
    assert_eq!((code, &report["ok"]), (1, &false.into()), "{report:#}");
    assert_eq!(failed(&report), names, "{report:#}");
    for name in names {
        println!("{name}: {} -- {}", check(&report, name)["finding"], check(&report, name)["advice"]);
        assert!(
            check(&report, name)["advice"].as_str().is_some_and(|advice| !advice.is_empty()),
            "{report:#}"
        );
    }
    let (code, text, _) = said(&host.run(&format!("check vm --to {to}")));
    assert_eq!(code, 1, "{text}");
    let (code, migration) = host.json(&format!("migrate vm --to {to}"));
    assert_eq!((code, &migration["state"]), (1, &"rolled_back".into()), "{migration:#}");
    let cause = migration["cause"].as_str().expect("there is a cause");
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text}");
        assert!(cause.contains(word), "{word:?} is not in {cause}");
    }
    assert_eq!(host.guest_state("vm"), "running");
    report
}

#[test]
fn each_failed_check_is_named_with_what_to_do() {
    if !is_here() {
        return;
    }
    let mut lab = Lab::up("--rate none --mtu 9000");
    lab.alpha.start();
    lab.alpha.start_guest("vm", "");

    let nobody = ["10.77.1.2:7433", "refused", "is `pageferry serve` running there?"];
    refused(&lab.alpha, "beta", &["reachable"], &nobody);
    let unknown = ["\"nowhere.invalid\" is neither an address nor one of this host's [peers] (alpha, beta)"];
    refused(&lab.alpha, "nowhere.invalid", &["reachable"], &unknown);
    refused(
        &lab.alpha,
        "192.0.2.1",
        &["reachable"],
        &["no network that migrations may use leads to 192.0.2.1"],
    );
    lab.beta.start();

    // Everything is well, and says so.
    let (code, report) = lab.alpha.json("check vm --to beta");
    assert_eq!(
        (code, &report["ok"], &report["destination"]),
        (0, &true.into(), &"beta".into()),
        "{report:#}"
    );
    assert_eq!(list(&report["paths"]).len(), 2, "{report:#}");
    for name in [
        "network",
        "reachable",
        "mtu",
        "protocol",
        "guest-state",
        "slots",
        "trust",
        "kvm",
        "cpu",
        "memory",
        "name",
    ] {
        assert_eq!(check(&report, name)["status"], "passed", "{name}: {report:#}");
    }

    packets_that_are_too_large(&lab);
    lab.beta.start_guest("vm", "");
    refused(&lab.alpha, "beta", &["name"], &["the name vm is in use at beta"]);

    // Another version, and all that is wrong at once.
    lab.beta.signal("TERM");
    assert!(lab.beta.ended());
    lab.beta.start_with("--claim-protocol 2");
    let words = [
        "alpha (pageferry 0.1.0) speaks versions 1 to 1",
        "2 to 2",
        "update pageferry at alpha",
        "the name vm is in use",
    ];
    refused(&lab.alpha, "beta", &["protocol", "name"], &words);
    refused(
        &lab.beta,
        "alpha",
        &["protocol", "name"],
        &["beta (pageferry 0.1.0) speaks versions 2 to 2", "1 to 1"],
    );
    lab.beta.signal("TERM");
    assert!(lab.beta.ended());
    lab.beta.start();
    lab.beta.done("guest stop vm");

    networks_that_do_not_meet(&lab);
    lab.alpha.check_whole("vm");
}

/// One end, or something between the ends, passes smaller packets than the interfaces promise.
fn packets_that_are_too_large(lab: &Lab) {
    on(&lab.beta, "ip link set pf0 mtu 1500");
    let (code, report) = lab.alpha.json("check vm --to beta");
    let mtu = check(&report, "mtu");
    assert_eq!((code, &mtu["status"]), (0, &"note".into()), "{report:#}");
    let finding = mtu["finding"].to_string();
    assert!(finding.contains("pf0 at alpha has MTU 9000") && finding.contains("1500"), "{report:#}");
    on(&lab.beta, "ip link set pf0 mtu 9000");
    // A switch in between: larger packets than this bucket holds are thrown away.
    on(&lab.alpha, "tc qdisc replace dev pf0 root tbf rate 1gbit burst 1600 latency 50ms");
    let words =
        ["pf0 at alpha has MTU 9000", "the largest packet that passes", "set the MTU of every switch"];
    refused(&lab.alpha, "beta", &["mtu"], &words);
    on(&lab.alpha, "tc qdisc del dev pf0 root");
}

/// Each host allows another network than the other: the daemon there is not even reached.
fn networks_that_do_not_meet(lab: &Lab) {
    let all = r#"["10.77.0.0/24", "10.77.1.0/24"]"#;
    lab.alpha.reconfigure(all, r#"["10.77.0.0/24"]"#);
    lab.beta.reconfigure(all, r#"["10.77.1.0/24"]"#);
    reload(&lab.alpha);
    reload(&lab.beta);
    refused(&lab.alpha, "beta", &["reachable"], &["10.77.0.2:7433 by pf0 is not reached", "networks"]);
    lab.alpha.reconfigure(r#"["10.77.0.0/24"]"#, all);
    lab.beta.reconfigure(r#"["10.77.1.0/24"]"#, all);
    reload(&lab.alpha);
    reload(&lab.beta);
}

/// A control group that may use so much memory; nothing where this machine lets nobody make one.
struct MemoryGroup {
    path: PathBuf,
    /// What mounts control groups.
    mount: &'static str,
}

impl MemoryGroup {
    fn new(bytes: u64) -> Option<Self> {
        let name = format!("pageferry-test-{}", std::process::id());
        let (old, new) = (PathBuf::from("/sys/fs/cgroup/memory"), PathBuf::from("/sys/fs/cgroup"));
        let (root, limit, mount) = if old.join("memory.limit_in_bytes").exists() {
            let mount = "mount -t tmpfs none /sys/fs/cgroup && mkdir /sys/fs/cgroup/memory && \
                         mount -t cgroup -o memory none /sys/fs/cgroup/memory";
            (old, "memory.limit_in_bytes", mount)
        } else {
            let _ = fs::write(new.join("cgroup.subtree_control"), "+memory");
            (new, "memory.max", "mount -t cgroup2 none /sys/fs/cgroup")
        };
        let group = Self { path: root.join(name), mount };
        let made =
            fs::create_dir(&group.path).and_then(|()| fs::write(group.path.join(limit), bytes.to_string()));
        made.is_ok().then_some(group)
    }

    /// Moves a process that `ip netns exec` has started into the group. That has given it a `/sys` of its own, where control
    /// groups are not mounted.
    fn take(&self, pid: u64) {
        fs::write(self.path.join("cgroup.procs"), pid.to_string()).expect("the process is moved");
        let mounted = Command::new("nsenter")
            .args(["--mount", "--target", &pid.to_string(), "sh", "-c", self.mount])
            .output()
            .expect("nsenter starts");
        assert!(mounted.status.success(), "{mounted:?}");
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // It goes when the last process in it has.
        for _ in 0..50 {
            if fs::remove_dir(&self.path).is_ok() || !self.path.exists() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
}

#[test]
fn a_host_takes_no_guest_that_its_memory_does_not_hold() {
    if !is_here() {
        return;
    }
    let Some(group) = MemoryGroup::new(60 << 20) else {
        eprintln!("no control group for memory can be made here; the unit tests of the check have to do");
        return;
    };
    let lab = Lab::running("--rate none");
    group.take(lab.beta.done("host")["pid"].as_u64().expect("it has a process"));
    lab.alpha.start_guest("vm", "");
    let words = ["of memory and beta has", "its control group leaves", "nothing is overcommitted"];
    refused(&lab.alpha, "beta", &["memory"], &words);
    // What it has not touched need not be there.
    lab.alpha.done("guest start --name small --memory 128MiB --touch 8MiB");
    let (code, report) = lab.alpha.json("check small --to beta");
    assert_eq!((code, &check(&report, "memory")["status"]), (0, &"note".into()), "{report:#}");
    moved(&lab.alpha, "small", "--to beta");
    lab.beta.check_whole("small");
    drop(lab);
}

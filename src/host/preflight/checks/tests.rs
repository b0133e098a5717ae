mod encryption;

use std::time::Duration;

use super::destination::cpu;
use super::*;
use crate::guest::{GuestError, ProcessorError};
use crate::host::api::check::PathInfo;
use crate::host::network::Offer;
use crate::host::network::probe::ProbeResult;
use crate::host::preflight::facts::versions;
use crate::host::preflight::{GuestFacts, HostFacts, MemoryFacts};
use crate::session::TransferMode;

const GIB: u64 = 1 << 30;

pub(super) fn host(name: &str, last: u8) -> HostFacts {
    let offer = |link: u8| Offer {
        interface: format!("eth{link}"),
        address: format!("10.0.{link}.{last}").parse().unwrap(),
        prefix: 24,
        mtu: 9000,
        speed_bits_per_second: Some(25_000_000_000),
        bandwidth_cap: None,
        loopback: false,
        isolated: false,
    };
    HostFacts {
        name: name.into(),
        versions: versions(),
        offers: vec![offer(1), offer(2)],
        memory: MemoryFacts { available: 8 * GIB, cgroup_left: None, memlock: None, promised: 0 },
        why_no_kvm: None,
        no_rdma: None,
        processor: "AuthenticAMD EPYC".into(),
        free_incoming: 2,
        max_incoming: 2,
        clock: 1e9,
        insecure: false,
        requires_encryption: false,
        takes_encrypted: true,
        takes_qemu: true,
    }
}

pub(super) fn guest(kind: &str) -> GuestFacts {
    GuestFacts {
        name: "web1".into(),
        kind: kind.into(),
        memory_bytes: 4 * GIB,
        touched_bytes: GIB,
        qemu: None,
        config: String::new(),
    }
}

/// Everything that the source judges by.
struct Case {
    ours: HostFacts,
    theirs: HostFacts,
    round_trip: Duration,
    unmatched: Vec<String>,
    paths: Vec<PathInfo>,
    probes: Vec<ProbeResult>,
    free_outgoing: u32,
    max_outgoing: u32,
    mode: TransferMode,
}

impl Case {
    /// Two hosts with two good links between them.
    fn good() -> Self {
        let (ours, theirs) = (host("a", 1), host("b", 2));
        let paths = crate::host::network::pairs::pair(&ours.offers, &theirs.offers);
        let probes = vec![reachable(true, 9000); 2];
        Self {
            ours,
            theirs,
            round_trip: Duration::from_millis(200),
            unmatched: Vec::new(),
            paths,
            probes,
            free_outgoing: 1,
            max_outgoing: 2,
            mode: TransferMode::Compression,
        }
    }

    fn with(change: impl FnOnce(&mut Self)) -> Vec<Check> {
        let mut case = Self::good();
        change(&mut case);
        case.checks()
    }

    fn checks(&self) -> Vec<Check> {
        at_source(&SourceView {
            ours: &self.ours,
            theirs: &self.theirs,
            round_trip: self.round_trip,
            unmatched: &self.unmatched,
            paths: &self.paths,
            probes: &self.probes,
            free_outgoing: self.free_outgoing,
            max_outgoing: self.max_outgoing,
            mode: self.mode,
        })
    }

    /// How one check came out, and its finding.
    fn find(&self, name: &str) -> (CheckStatus, String) {
        let check = self.checks().into_iter().find(|check| check.name == name).expect("it is made");
        (check.status, check.finding)
    }
}

fn reachable(mtu_ok: bool, largest: u32) -> ProbeResult {
    ProbeResult::Reachable { rtt: Duration::from_micros(210), mtu_ok, largest }
}

fn silent(why: Option<&str>) -> ProbeResult {
    ProbeResult::Silent { why: why.map(Into::into) }
}

fn destination(guest: &GuestFacts, change: impl FnOnce(&mut HostFacts)) -> Vec<Check> {
    let mut facts = host("b", 2);
    change(&mut facts);
    at_destination(guest, &facts, None, true)
}

/// What is not passed: status, name, finding, advice.
fn remarks(checks: &[Check]) -> Vec<String> {
    let other = checks.iter().filter(|check| check.status != CheckStatus::Passed);
    other
        .map(|check| {
            let advice = check.advice.as_deref().unwrap_or("no advice");
            format!("{:?} {}: {} | {advice}", check.status, check.name, check.finding)
        })
        .collect()
}

#[test]
fn nothing_stands_in_the_way_of_a_good_pair_and_every_check_is_there() {
    let checks = Case::with(|_| ());
    assert_eq!(remarks(&checks), Vec::<String>::new());
    let names: Vec<&str> = checks.iter().map(|check| check.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "network",
            "reachable",
            "mtu",
            "speed",
            "protocol",
            "guest-state",
            "slots",
            "clock",
            "trust",
            "encryption",
            "mode"
        ]
    );
    let findings: Vec<&str> = checks.iter().map(|check| check.finding.as_str()).collect();
    assert_eq!(
        findings[..4],
        [
            "a and b are joined by eth1 from 10.0.1.1 to 10.0.1.2, eth2 from 10.0.2.1 to 10.0.2.2",
            "b answers on eth1 in 0.21 ms, eth2 in 0.21 ms",
            "the largest packets arrive: 9000 bytes on eth1, 9000 bytes on eth2",
            "eth1 25 Gbit/s, eth2 25 Gbit/s",
        ]
    );

    let checks = destination(&guest("process"), |_| ());
    assert_eq!(remarks(&checks), Vec::<String>::new());
    let names: Vec<&str> = checks.iter().map(|check| check.name.as_str()).collect();
    assert_eq!(names, ["kvm", "cpu", "memory", "memlock", "name", "slots"]);
}

#[test]
fn every_check_at_the_source_that_does_not_pass_says_what_and_what_to_do() {
    type Change = fn(&mut Case);
    let cases: &[(Change, &[&str])] = &[
        (
            |case| {
                case.paths.clear();
                case.theirs.offers.clear();
                case.unmatched =
                    vec!["the network eth7 (host file) matches no interface of this host; it has lo".into()];
            },
            &[
                "Failed network: no network that a may use leads to one that b may use; a has 10.0.1.1/24 on eth1, 10.0.2.1/24 \
               on eth2, b has none; the network eth7 (host file) matches no interface of this host; it has lo | name networks \
               in both host files that join the two hosts, or add a route from one to the other",
            ],
        ),
        (
            |case| case.unmatched = vec!["the network eth7 is gone".into()],
            &["Note network: the network eth7 is gone | correct the host file, or bring the interface up"],
        ),
        (
            |case| case.probes = vec![silent(None), silent(Some("Connection refused"))],
            &[
                "Failed reachable: b does not answer on any path: eth1 from 10.0.1.1 to 10.0.1.2 (no answer), eth2 from 10.0.2.1 \
               to 10.0.2.2 (Connection refused) | look at the cables, the switches' VLANs and the firewalls: b must be \
               reached by TCP and UDP at the migration_ports of its host file",
            ],
        ),
        (
            |case| case.probes[0] = silent(None),
            &[
                "Note reachable: b does not answer on eth1 from 10.0.1.1 to 10.0.1.2 (no answer); 1 of 2 paths work | look at the \
               cables, the switches' VLANs and the firewalls: b must be reached by TCP and UDP at the migration_ports of \
               its host file",
            ],
        ),
        (
            |case| case.probes[1] = reachable(false, 1500),
            &[
                "Failed mtu: eth2 at a has MTU 9000 and eth2 at b 9000, but the largest packet that passes between 10.0.2.1 and \
               10.0.2.2 has 1500 bytes | set the MTU of every switch and bridge on the way to 9000 or more, or that of both \
               interfaces to 1500 (ip link set eth2 mtu 1500)",
            ],
        ),
        (
            |case| {
                case.theirs.offers[0].mtu = 1500;
                case.paths[0].mtu = 1500;
            },
            &[
                "Note mtu: eth1 at a has MTU 9000, eth1 at b 1500 | give both ends the same MTU; until then the smaller one is \
               used",
            ],
        ),
        (
            |case| {
                case.paths[0].speed_bits_per_second = None;
                case.paths[0].bandwidth_cap = Some(1 << 20);
                case.paths[1].speed_bits_per_second = Some(100_000_000);
            },
            &[
                "Note speed: eth1 of unknown speed (the host file allows 1 MiB/s), eth2 100 Mbit/s | nothing to do: a virtual \
               interface has no speed of its own, and the driver of another may not say it",
            ],
        ),
        (
            |case| {
                (case.ours.versions.oldest_protocol, case.ours.versions.newest_protocol) = (3, 4);
                case.ours.versions.program = "0.3.0".into();
            },
            &[
                "Failed protocol: a (pageferry 0.3.0) speaks versions 3 to 4 of the migration protocol, b (pageferry 0.1.0) 1 to \
               1 | update pageferry at b: an older source can move to a newer destination",
            ],
        ),
        (
            |case| (case.theirs.versions.oldest_protocol, case.theirs.versions.newest_protocol) = (2, 2),
            &[
                "Failed protocol: a (pageferry 0.1.0) speaks versions 1 to 1 of the migration protocol, b (pageferry 0.1.0) 2 to \
               2 | update pageferry at a: an older source can move to a newer destination",
            ],
        ),
        (
            |case| case.ours.versions.guest_state = 2,
            &[
                "Failed guest-state: a (pageferry 0.1.0) writes version 2 of the guest state, b (pageferry 0.1.0) reads 1 to 1 | \
               update pageferry at b: an older source can move to a newer destination",
            ],
        ),
        (
            |case| (case.theirs.versions.oldest_guest_state, case.theirs.versions.guest_state) = (2, 3),
            &[
                "Failed guest-state: a (pageferry 0.1.0) writes version 1 of the guest state, b (pageferry 0.1.0) reads 2 to 3 | \
               update pageferry at a: an older source can move to a newer destination",
            ],
        ),
        (
            |case| case.free_outgoing = 0,
            &[
                "Failed slots: a has no slot for outgoing migrations free; it has 2 (max_migrations) | wait until one is over (--wait does), or \
               raise max_migrations in a's host file",
            ],
        ),
        (
            |case| (case.free_outgoing, case.max_outgoing) = (0, 0),
            &["Failed slots: a takes part in no outgoing migrations | raise max_migrations in a's host file"],
        ),
        (
            |case| case.theirs.clock += 3.0,
            &[
                "Note clock: b's clock is 3.1 s ahead of that of a (give or take 0.1 s) | have both follow the same time \
               (chrony): the guest's clock jumps by the difference, and downtimes are wrong by it",
            ],
        ),
        (
            |case| case.theirs.clock -= 3.0,
            &[
                "Note clock: b's clock is 2.9 s behind that of a (give or take 0.1 s) | have both follow the same time \
               (chrony): the guest's clock jumps by the difference, and downtimes are wrong by it",
            ],
        ),
        (
            |case| (case.ours.insecure, case.theirs.insecure) = (true, true),
            &[
                "Note trust: the hosts do not prove who they are: allow_insecure is set at a and b | make certificates \
               (pageferry pki init, pageferry pki issue) and name them in both host files",
            ],
        ),
        (
            |case| (case.mode, case.theirs.no_rdma) = (TransferMode::Rdma, Some("no device".into())),
            &[
                "Note mode: rdma is asked for; the destination has no RDMA (no device), so tcp is used | nothing to do; ask \
               for another mode to be rid of this note",
            ],
        ),
    ];
    for (change, expected) in cases {
        assert_eq!(remarks(&Case::with(*change)), *expected);
    }
}

#[test]
fn an_older_source_moves_to_a_newer_destination() {
    let checks = Case::with(|case| {
        (case.theirs.versions.newest_protocol, case.theirs.versions.guest_state) = (7, 9);
    });
    assert_eq!(remarks(&checks), Vec::<String>::new());
}

#[test]
fn clocks_are_compared_as_well_as_the_network_lets_them() {
    for (apart, round_trip, noted) in [
        (0.99, 0.0, false),
        (1.01, 0.0, true),
        (-1.01, 0.0, true),
        (-1.99, 2.0, false),
        (0.99, 2.0, false),
        (1.01, 2.0, true),
        (f64::NAN, 0.0, true),
        (f64::INFINITY, 0.0, true),
    ] {
        let checks = Case::with(|case| {
            case.theirs.clock += apart;
            case.round_trip = Duration::from_secs_f64(round_trip);
        });
        assert_eq!(!remarks(&checks).is_empty(), noted, "{apart} within {round_trip}");
    }
}

#[test]
fn every_check_at_the_destination_that_does_not_pass_says_what_and_what_to_do() {
    type Change = fn(&mut HostFacts);
    let cases: &[(&str, Change, &[&str])] = &[
        (
            "kvm",
            |facts| facts.why_no_kvm = Some("/dev/kvm does not open: no such file".into()),
            &[
                "Failed kvm: b can hold no KVM guest: /dev/kvm does not open: no such file | see at b that virtualisation is on in \
               the firmware, that the module is loaded (modprobe kvm_intel or kvm_amd) and that the daemon may open /dev/kvm",
            ],
        ),
        ("process", |facts| facts.why_no_kvm = Some("none".into()), &[]),
        (
            "jail",
            |_| (),
            &[
                "Failed kvm: b knows no guests of kind \"jail\" | run the same release of pageferry on both hosts; b has 0.1.0",
                "Failed cpu: b (AuthenticAMD EPYC): this host has no adapter for guests of kind \"jail\"; it has kvm and \
                 process | run the same release of pageferry on both hosts",
            ],
        ),
        (
            "process",
            |facts| facts.memory.available = GIB - 1024,
            &[
                "Failed memory: the guest uses 1 GiB of memory and b has 1024.00 MiB for it: 1024.00 MiB are available | stop or \
               move guests at b, or give it more memory; nothing is overcommitted",
            ],
        ),
        (
            "process",
            |facts| facts.memory.promised = 8 * GIB,
            &[
                "Failed memory: the guest uses 1 GiB of memory and b has 0 B for it: 8 GiB are available, 8 GiB are promised to \
               guests on their way | stop or move guests at b, or give it more memory; nothing is overcommitted",
            ],
        ),
        (
            "process",
            |facts| facts.memory.cgroup_left = Some(GIB / 2),
            &[
                "Failed memory: the guest uses 1 GiB of memory and b has 512 MiB for it: its control group leaves 512 MiB of 8 GiB \
               available | stop or move guests at b, or give it more memory; nothing is overcommitted",
            ],
        ),
        (
            "process",
            |facts| (facts.memory.cgroup_left, facts.memory.promised) = (Some(9 * GIB), 6 * GIB),
            &[
                "Note memory: b has 2 GiB for the guest: enough for the 1 GiB that it uses, not for all its 4 GiB: 8 GiB are \
               available, 6 GiB are promised to guests on their way | see that b gets more memory before the guest uses \
               more",
            ],
        ),
        (
            "process",
            |facts| facts.memory.memlock = Some(64 << 10),
            &[
                "Failed memlock: RDMA locks the guest's memory, 4 GiB, and the daemon at b may lock 64 KiB | set \
               LimitMEMLOCK=infinity for the daemon at b, give it CAP_IPC_LOCK, or choose another mode",
            ],
        ),
        ("process", |facts| facts.memory.memlock = Some(4 * GIB), &[]),
        (
            "process",
            |facts| facts.free_incoming = 0,
            &[
                "Failed slots: b has no slot for incoming migrations free; it has 2 (max_migrations) | wait until one is over (--wait does), or \
               raise max_migrations in b's host file",
            ],
        ),
    ];
    for (kind, change, expected) in cases {
        assert_eq!(remarks(&destination(&guest(kind), *change)), *expected);
    }
    let in_use = at_destination(&guest("process"), &host("b", 2), Some("it runs there"), false);
    assert_eq!(
        remarks(&in_use),
        [
            "Failed name: the name web1 is in use at b: it runs there | stop or move the guest of that name at b first"
        ]
    );
    assert!(!in_use.iter().any(|check| check.name == "memlock"), "only RDMA locks memory");
}

#[test]
fn a_processor_that_does_not_fit_is_told_with_its_cause() {
    let (kvm, facts) = (guest("kvm"), host("b", 2));
    let judged = |error| remarks(&[cpu(&kvm, &facts, Err(error))]);
    assert_eq!(
        judged(ProcessorError::Unfit(GuestError::new("this host's processor lacks avx512f"))),
        [
            "Failed cpu: b (AuthenticAMD EPYC): this host's processor lacks avx512f | choose a host with a processor of the same \
          vendor that is as new, or start the guest anew there"
        ]
    );
    let denied = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
    assert_eq!(
        judged(ProcessorError::Host(GuestError::caused("opening /dev/kvm", denied))),
        [
            "Failed cpu: b (AuthenticAMD EPYC): opening /dev/kvm: permission denied | see that the daemon at b may use /dev/kvm"
        ]
    );
    assert_eq!(remarks(&[cpu(&kvm, &facts, Ok(()))]), Vec::<String>::new());
}

#[test]
#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
fn a_guest_of_this_host_fits_its_processor_and_a_config_that_is_none_is_refused() {
    if !require(&[Need::Kvm]) {
        return;
    }
    use crate::guest::Guest;
    use crate::guest::kvm::{KvmConfig, KvmGuest, pc_layout};
    use crate::guest::program::{Program, ProgramConfig};
    use crate::testing::{Need, require};
    let config = KvmConfig {
        layout: pc_layout(16 << 20).unwrap(),
        huge: crate::memory::HugePages::No,
        vcpus: 1,
        program: ProgramConfig { program: Program::Idle, bytes_per_second: 0, touch_bytes: None, seed: 1 },
        tracker: crate::dirty::TrackerKind::Log,
    };
    let mut facts = guest("kvm");
    let bytes = KvmGuest::new(&config).unwrap().config().unwrap();
    facts.config = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(remarks(&destination(&facts, |_| ())), Vec::<String>::new());

    for (config, said) in [
        ("0g".to_owned(), "is no row of bytes in hexadecimal digits"),
        ("012".to_owned(), "is no row of bytes in hexadecimal digits"),
        ("é".to_owned(), "is no row of bytes in hexadecimal digits"),
        ("0".repeat(3 << 20), "is longer than one can be"),
        ("00ff".to_owned(), "cannot be decoded"),
    ] {
        facts.config = config;
        let remarks = remarks(&destination(&facts, |_| ()));
        assert!(remarks.len() == 1 && remarks[0].contains(said), "{remarks:?}");
    }
}

#[test]
fn what_a_peer_says_does_not_rewrite_the_terminal() {
    let checks = Case::with(|case| case.theirs.name = "b\u{1b}[2J\n".into());
    assert!(checks.iter().all(|check| !check.finding.contains(char::is_control)));
    assert!(checks[0].finding.contains("b [2J "));
}

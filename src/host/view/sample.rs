//! Made-up migrations, guests and checks that tests show and keep.

use std::collections::BTreeMap;

use crate::host::api::check::{Check, CheckReport, CheckStatus, PathInfo};
use crate::host::api::guest::{GuestInfo, GuestState};
use crate::host::api::migration::{
    ChannelInfo, Direction, DowntimePart, LinkProgress, LogLine, Migration, MigrationProgress,
    MigrationState, RoundInfo, Sample,
};
use crate::session::mode::TransferMode;

/// 2026-03-04 05:06:07 UTC.
pub(in crate::host) const BEGAN: f64 = 1_772_600_767.0;

const MIB: u64 = 1 << 20;

/// A guest of 4 GiB that moved in 27.6 s, of which one of two interfaces was away for eight.
pub(in crate::host) fn completed() -> Migration {
    Migration {
        state: MigrationState::Completed,
        ended_at: Some(BEGAN + 27.8),
        progress: None,
        rounds: rounds(),
        channels: channels(),
        samples: samples(),
        downtime_seconds: Some(0.1432),
        downtime_parts: downtime_parts(),
        total_seconds: Some(27.6),
        cpu_seconds: Some(1.94),
        throttle_percent: 0,
        warnings: vec![
            "channel 1 over pf2 was lost and its pages went by the others: connection reset by peer"
                .to_owned(),
        ],
        log: vec![
            log(0.0, "asked for: web1 to host-b, mode compression from the host file"),
            log(0.2, "every check passed; 2 paths: pf1 (10.0.1.0/24), pf2 (10.0.2.0/24)"),
            log(0.9, "compression, as asked for; 4 channels are open"),
            log(9.2, "pf2 is down; its channels are lost and are tried again"),
            log(17.1, "pf2 is back; 2 channels are open again"),
            log(27.5, "the guest pauses for the last round"),
            log(27.6, "the guest runs at host-b; it stood still for 143 ms"),
        ],
        ..running()
    }
}

/// The same in its third round.
pub(in crate::host) fn running() -> Migration {
    Migration {
        id: "2f0c6f7d9a4b4e1e8d5c3b2a19080706".to_owned(),
        guest: "web1".to_owned(),
        guest_kind: "kvm".to_owned(),
        direction: Direction::Outgoing,
        peer: "host-b".to_owned(),
        peer_address: Some("10.0.1.2:7400".to_owned()),
        state: MigrationState::Running,
        cause: None,
        requested_at: BEGAN,
        started_at: Some(BEGAN + 0.2),
        ended_at: None,
        mode_requested: TransferMode::Compression,
        mode_origin: "host file".to_owned(),
        mode_used: Some(TransferMode::Compression),
        mode_reason: Some("compression was asked for".to_owned()),
        insecure: false,
        paths: paths(),
        notes: vec![Check {
            name: "clock".to_owned(),
            status: CheckStatus::Note,
            finding: "the clocks differ by 1.2 s".to_owned(),
            advice: None,
        }],
        progress: Some(MigrationProgress {
            phase: "pre-copy".to_owned(),
            links: vec![link("pf1", 2, 112 * MIB, 2240 * MIB, "up"), link("pf2", 0, 0, 960 * MIB, "lost")],
            round: 2,
            bytes_per_second: 181 * MIB,
            remaining_bytes: 120 * MIB,
            expected_downtime_seconds: Some(0.148),
            note: None,
        }),
        rounds: rounds()[..2].to_vec(),
        channels: Vec::new(),
        samples: samples(),
        downtime_seconds: None,
        downtime_limit_seconds: 0.3,
        downtime_parts: Vec::new(),
        total_seconds: None,
        cpu_seconds: None,
        memory_bytes: 4096 * MIB,
        touched_bytes: Some(3584 * MIB),
        throttle_percent: 0,
        ram_digest: None,
        ram_equal: None,
        warnings: Vec::new(),
        log: Vec::new(),
    }
}

/// Refused before anything moved.
pub(in crate::host) fn failed_early() -> Migration {
    Migration {
        id: "9b1d00000000000000000000000000aa".to_owned(),
        state: MigrationState::RolledBack,
        cause: Some(
            "the checks failed: memory: the guest needs 4 GiB and host-b can give 1.50 GiB".to_owned(),
        ),
        started_at: None,
        ended_at: Some(BEGAN + 0.4),
        mode_used: None,
        mode_reason: None,
        paths: Vec::new(),
        notes: Vec::new(),
        progress: None,
        rounds: Vec::new(),
        samples: Vec::new(),
        touched_bytes: None,
        log: vec![log(0.0, "asked for: web1 to host-b"), log(0.4, "a check failed: memory")],
        ..running()
    }
}

/// As the destination sees it, without proof of who the source is.
pub(in crate::host) fn incoming() -> Migration {
    Migration {
        id: "77aa000000000000000000000000beef".to_owned(),
        guest: "db".to_owned(),
        guest_kind: "process".to_owned(),
        direction: Direction::Incoming,
        peer: "host-c".to_owned(),
        insecure: true,
        mode_used: Some(TransferMode::Tcp),
        mode_requested: TransferMode::Auto,
        mode_origin: "default".to_owned(),
        mode_reason: Some("neither host has an RDMA device".to_owned()),
        progress: Some(MigrationProgress { phase: "set-up".to_owned(), ..MigrationProgress::default() }),
        rounds: Vec::new(),
        samples: Vec::new(),
        notes: Vec::new(),
        ..running()
    }
}

/// Two guests: one that moves, one whose process was killed.
pub(in crate::host) fn guests() -> Vec<GuestInfo> {
    let guest = |name: &str, state| GuestInfo {
        name: name.to_owned(),
        kind: "kvm".to_owned(),
        state,
        memory_bytes: 4096 * MIB,
        pid: Some(4711),
        since: BEGAN - 86_400.0,
        arrived_from: None,
        migration: None,
        seen: None,
        note: None,
    };
    vec![
        GuestInfo { migration: Some(running().id), ..guest("web1", GuestState::Moving) },
        GuestInfo {
            kind: "process".to_owned(),
            pid: None,
            arrived_from: Some("host-c".to_owned()),
            note: Some("its process was killed (signal 9)".to_owned()),
            ..guest("db", GuestState::Lost)
        },
    ]
}

/// Four checks, of which two failed.
pub(in crate::host) fn failing_checks() -> CheckReport {
    let check = |name: &str, status, finding: &str, advice: Option<&str>| Check {
        name: name.to_owned(),
        status,
        finding: finding.to_owned(),
        advice: advice.map(str::to_owned),
    };
    CheckReport::new(
        "host-b".to_owned(),
        vec![
            check(
                "mtu",
                CheckStatus::Failed,
                "packets of 9000 bytes do not pass from pf1 to eth1 although both interfaces say they would",
                Some("Raise the MTU of the switch between them to 9000, or lower both to 1500."),
            ),
            check(
                "processor",
                CheckStatus::Passed,
                "both are AMD EPYC 9354; host-b has all 412 features",
                None,
            ),
            check(
                "memory",
                CheckStatus::Failed,
                "the guest needs 4 GiB and host-b can give 1.50 GiB",
                Some("Free 2.50 GiB at host-b, or choose another host."),
            ),
            check("clock", CheckStatus::Note, "the clocks differ by 1.2 s", None),
        ],
        paths(),
    )
}

fn link(interface: &str, channels: u32, rate: u64, bytes: u64, state: &str) -> LinkProgress {
    LinkProgress {
        interface: interface.to_owned(),
        channels,
        bytes_per_second: rate,
        bytes,
        state: state.to_owned(),
    }
}

fn log(after: f64, text: &str) -> LogLine {
    LogLine { at: BEGAN + after, text: text.to_owned() }
}

fn paths() -> Vec<PathInfo> {
    let path = |number: u8, speed, cap| PathInfo {
        interface: format!("pf{number}"),
        source: [10, 0, number, 1].into(),
        peer_interface: format!("eth{number}"),
        destination: [10, 0, number, 2].into(),
        speed_bits_per_second: speed,
        mtu: 9000,
        bandwidth_cap: cap,
        isolated: false,
        peer_isolated: false,
    };
    vec![path(1, Some(1_000_000_000), None), path(2, None, Some(100 * MIB))]
}

fn rounds() -> Vec<RoundInfo> {
    let round = |pages: u64, percent: u64, seconds, dirtied| RoundInfo {
        pages,
        bytes: pages * 4096 * 94 / 100,
        wire_bytes: pages * 4096 * percent / 100,
        seconds,
        dirtied,
    };
    vec![
        round(917_504, 88, 21.4, 141_200),
        round(141_200, 90, 4.1, 30_720),
        round(30_720, 91, 1.05, 9_100),
        round(9_100, 92, 0.3, 3_300),
        round(3_300, 92, 0.09, 0),
    ]
}

fn channels() -> Vec<ChannelInfo> {
    let channel = |network: u8, port: u16, bytes, lost| ChannelInfo {
        local: format!("10.0.{network}.1:{port}"),
        remote: format!("10.0.{network}.2:7400"),
        interface: Some(format!("pf{network}")),
        rdma: None,
        encrypted: false,
        bytes,
        lost,
    };
    vec![
        channel(1, 40_001, 1290 * MIB, false),
        channel(1, 40_003, 1284 * MIB, false),
        channel(2, 40_002, 812 * MIB, true),
        channel(2, 40_011, 590 * MIB, false),
    ]
}

fn downtime_parts() -> Vec<DowntimePart> {
    let part = |name: &str, seconds| DowntimePart { name: name.to_owned(), seconds };
    vec![
        part("the guest pauses", 0.0021),
        part("the last dirty pages are found", 0.0034),
        part("the last pages are placed", 0.0903),
        part("the guest's state is saved", 0.0012),
        part("the destination loads the state", 0.0308),
        part("the journal is written", 0.0064),
        part("the destination starts the guest", 0.0052),
    ]
}

/// Every half second; pf2 is away from 9 s to 17 s.
fn samples() -> Vec<Sample> {
    let mut ends = Vec::new();
    let mut end = 0.9;
    for round in rounds() {
        ends.push((end, end + round.seconds, round.bytes));
        end += round.seconds;
    }
    (0..56)
        .map(|half| {
            let at = f64::from(half) * 0.5;
            let wobble = (at * 2.9).sin() * 4.0 + (at * 7.3).cos() * 2.5;
            let rate = |base: f64| ((base + wobble) * MIB as f64) as u64;
            let round = ends.iter().find(|(_, to, _)| at < *to);
            let remaining = round.map_or(0, |(from, to, bytes)| {
                let left = ((to - at) / (to - from)).clamp(0.0, 1.0);
                (*bytes as f64 * left) as u64
            });
            let phase = match at {
                at if at < 0.9 => "set-up",
                at if at < 27.4 => "pre-copy",
                _ => "stop-and-copy",
            };
            let moving = phase != "set-up";
            let pf2 = if (9.0..17.0).contains(&at) { 0 } else { rate(74.0) };
            let rates =
                [("pf1", if moving { rate(107.0) } else { 0 }), ("pf2", if moving { pf2 } else { 0 })];
            Sample {
                at,
                phase: phase.to_owned(),
                remaining_bytes: if moving { remaining } else { 0 },
                rates: rates
                    .into_iter()
                    .map(|(name, rate)| (name.to_owned(), rate))
                    .collect::<BTreeMap<_, _>>(),
            }
        })
        .collect()
}

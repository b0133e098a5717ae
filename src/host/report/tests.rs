//! The report in both its forms.

use super::*;

fn sample() -> Report {
    let channel = |port, bytes| ChannelReport {
        local: format!("127.0.0.1:{port}"),
        remote: "127.0.0.1:7400".to_owned(),
        interface: Some("lo".to_owned()),
        rdma: None,
        encrypted: false,
        bytes,
    };
    let round = |pages: u64, seconds, dirtied| RoundReport {
        pages,
        bytes: pages * 4096,
        wire_bytes: pages * 4096 + 8192,
        seconds,
        dirtied,
    };
    Report {
        outcome: ReportedOutcome::Completed,
        cause: None,
        guest: GuestKind::Process,
        guest_why: Some("/dev/kvm does not open: permission denied".to_owned()),
        dirty_tracker: Some(TrackerKind::Pagemap),
        mode_requested: TransferMode::Auto,
        mode_used: Some(TransferMode::Tcp),
        mode_reason: Some("neither host has an RDMA device".to_owned()),
        channels: vec![channel(40001, 600 << 20), channel(40002, 482 << 20)],
        rounds: vec![round(262_144, 0.75, 19_200), round(19_200, 0.06, 1536), round(1536, 0.005, 0)],
        memory_bytes: 1 << 30,
        touched_bytes: 1 << 30,
        wire_bytes: 1082 << 20,
        total_seconds: 0.921,
        downtime_seconds: Some(0.0083),
        downtime_host_seconds: Some(0.0071),
        downtime_limit_seconds: 0.3,
        throughput_bytes_per_second: 1.3e9,
        source_cpu_seconds: 0.104,
        destination_cpu_seconds: 0.52,
        guest_check: Some(GuestCheck::Ok),
        ram_equal: Some(true),
        ram_check: Some("both memories hashed page by page".to_owned()),
        guest_slowdown: Some(0.04),
        moves: 1,
        warnings: vec!["channel 1 was lost and its pages went by the others: connection reset".to_owned()],
    }
}

#[test]
fn the_page_for_people() {
    assert_eq!(sample().to_string(), include_str!("sample.txt"));
}

#[test]
fn the_object_for_programs_has_every_documented_field() {
    let value: serde_json::Value = serde_json::from_str(&sample().to_json()).unwrap();
    let (documented, _) = include_str!("../../../docs/json.md").split_once("One element").unwrap();
    let documented: Vec<&str> =
        documented.lines().filter_map(|line| Some(line.strip_prefix("| `")?.split_once('`')?.0)).collect();
    let fields: Vec<&String> = value.as_object().unwrap().keys().collect();
    assert_eq!(fields.len(), documented.len());
    for field in documented {
        assert!(value.get(field).is_some(), "docs/json.md tells of {field}, which is not there");
    }
    assert_eq!(value["outcome"], "completed");
    assert_eq!(value["guest"], "process");
    assert_eq!(value["mode_requested"], "auto");
    assert_eq!(value["mode_used"], "tcp");
    assert_eq!(value["dirty_tracker"], "pagemap");
    assert_eq!(value["guest_check"], "ok");
    assert_eq!(value["rounds"][1]["dirtied"], 1536);
    assert_eq!(value["cause"], serde_json::Value::Null);
    assert!(!sample().to_json().contains('\n'));
}

#[test]
fn a_number_that_json_cannot_write_becomes_null() {
    let report = Report { throughput_bytes_per_second: f64::NAN, ..sample() };
    let value: serde_json::Value = serde_json::from_str(&report.to_json()).unwrap();
    assert!(value["throughput_bytes_per_second"].is_null());
    assert!(report.to_string().contains("Completed"));
}

#[test]
fn outcomes_have_their_exit_codes() {
    let with =
        |outcome, guest_check, ram_equal| Report { outcome, guest_check, ram_equal, ..sample() }.exit();
    use ReportedOutcome::{Completed, InDoubt, RolledBack};
    assert_eq!(with(Completed, Some(GuestCheck::Ok), Some(true)), Exit::Completed);
    assert_eq!(with(Completed, Some(GuestCheck::Corrupt), Some(true)), Exit::Damaged);
    assert_eq!(with(Completed, Some(GuestCheck::Ok), Some(false)), Exit::Damaged);
    assert_eq!(with(RolledBack, Some(GuestCheck::Ok), None), Exit::Failed);
    assert_eq!(with(RolledBack, Some(GuestCheck::Corrupt), None), Exit::Damaged);
    assert_eq!(with(InDoubt, None, None), Exit::InDoubt);
}

#[test]
fn what_did_not_happen_is_said() {
    let report = Report {
        outcome: ReportedOutcome::RolledBack,
        cause: Some("the destination refused: not enough memory".to_owned()),
        mode_used: None,
        mode_reason: None,
        downtime_seconds: None,
        downtime_host_seconds: None,
        guest_check: None,
        ram_equal: None,
        ram_check: None,
        channels: Vec::new(),
        rounds: Vec::new(),
        ..sample()
    };
    let text = report.to_string();
    assert!(text.starts_with(
        "Rolled back: the guest did not move and goes on at the source.\nCause: the destination"
    ));
    for words in ["none was chosen yet (asked for: auto)", "not measured (limit 300 ms)", "not done"] {
        assert!(text.contains(words), "{text}");
    }
    assert!(!text.contains("Rounds") && !text.contains("Channels"), "{text}");
}

#[test]
fn a_downtime_over_its_limit_stands_out() {
    let text = Report { downtime_seconds: Some(0.412), ..sample() }.to_string();
    assert!(text.contains("412 ms, OVER the limit of 300 ms"), "{text}");
    let text = Report { downtime_seconds: None, ..sample() }.to_string();
    assert!(text.contains("7.10 ms as the hosts saw it, within the limit"), "{text}");
}

//! The texts as a whole. `PAGEFERRY_BLESS=1` writes those in `expected/` anew.

use std::path::Path;

use super::table::{moment, seconds, three_digits, time_of_day};
use super::words::clean;
use super::*;
use crate::host::api::check::{Check, CheckReport, CheckStatus};
use crate::host::api::migration::{Migration, MigrationState};
use crate::session::mode::TransferMode;

fn assert_text(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/host/view/expected").join(name);
    if std::env::var_os("PAGEFERRY_BLESS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, expected, "\n{text}\nis not what {} holds", path.display());
}

#[test]
fn the_line_of_a_migration() {
    let line = |migration: &Migration| progress_line(migration);
    assert_eq!(
        line(&sample::running()),
        "web1 to host-b: pre-copy, compression; pf1 112 MiB/s; pf2 lost, tried again; round 2, 120 MiB to go; \
         expected downtime 148 ms"
    );
    let mut slow = sample::running();
    let progress = slow.progress.as_mut().unwrap();
    progress.links[1].state = "down".to_owned();
    progress.note = Some("it writes 300 MiB/s, more than the wire carries".to_owned());
    progress.expected_downtime_seconds = None;
    assert_eq!(
        line(&slow),
        "web1 to host-b: pre-copy, compression; pf1 112 MiB/s; pf2 down, used again when it is up; \
         round 2, 120 MiB to go; it writes 300 MiB/s, more than the wire carries"
    );
    assert_eq!(line(&sample::incoming()), "WARNING insecure; db from host-c: set-up, tcp");
    let waiting = Migration { state: MigrationState::Waiting, progress: None, ..sample::running() };
    assert_eq!(line(&waiting), "web1 to host-b: waiting for a slot");
    assert_eq!(line(&sample::completed()), "web1 to host-b: completed; downtime 143 ms; total 27.60 s");
    assert!(
        line(&sample::failed_early()).starts_with("web1 to host-b: rolled back; the checks failed: memory")
    );
    let over = Migration { downtime_seconds: Some(0.31), ..sample::completed() };
    assert!(line(&over).contains("downtime 310 ms, OVER the limit;"), "{}", line(&over));
}

#[test]
fn the_account_at_the_end() {
    assert_text("completed.txt", &result_text(&sample::completed()));
    assert_text("failed_early.txt", &result_text(&sample::failed_early()));
    let arrived = Migration {
        state: MigrationState::Completed,
        downtime_seconds: Some(0.412),
        total_seconds: Some(190.0),
        cpu_seconds: Some(7.5),
        throttle_percent: 40,
        ram_digest: Some("6b8f".to_owned()),
        ram_equal: Some(true),
        started_at: Some(sample::BEGAN + 75.0),
        progress: None,
        ..sample::incoming()
    };
    assert_text("arrived.txt", &result_text(&arrived));
}

#[test]
fn every_outcome_says_where_the_guest_is() {
    for (state, words) in [
        (MigrationState::Completed, "runs there"),
        (MigrationState::RolledBack, "goes on here"),
        (MigrationState::InDoubt, "stays stopped here until host-b has answered"),
        (MigrationState::Lost, "runs at neither host"),
    ] {
        let text = result_text(&Migration { state, ..sample::completed() });
        assert!(text.lines().next().unwrap().contains(words), "{text}");
    }
}

#[test]
fn tables_of_several() {
    let mut stuck = sample::running();
    stuck.id = "2f0c6f7dffff00000000000000000000".to_owned();
    stuck.progress.as_mut().unwrap().note = Some("does not converge: 3 rounds were no smaller".to_owned());
    let waiting = Migration {
        id: "0".repeat(32),
        state: MigrationState::Waiting,
        mode_used: None,
        progress: None,
        ..sample::running()
    };
    assert_text("status.txt", &status_table(&[sample::running(), stuck, sample::incoming(), waiting]));
    assert_text("history.txt", &history_table(&[sample::completed(), sample::failed_early()]));
    assert_text("guests.txt", &guest_table(&sample::guests()));
    for empty in [status_table(&[]), history_table(&[]), guest_table(&[])] {
        assert!(empty.lines().count() == 1 && empty.ends_with(".\n"), "{empty}");
    }
}

#[test]
fn the_checks() {
    assert_text("checks_failed.txt", &check_text(&sample::failing_checks()));
    let failing = sample::failing_checks();
    let passing = failing.checks.into_iter().filter(|check| check.status != CheckStatus::Failed).collect();
    let report = CheckReport::new("host-b".to_owned(), passing, failing.paths);
    assert_text("checks_passed.txt", &check_text(&report));
    let check = Check {
        name: "reach".to_owned(),
        status: CheckStatus::Failed,
        finding: "10.0.0.9:7400 does not answer".to_owned(),
        advice: Some("Start `pageferry serve` there.".to_owned()),
    };
    let text = check_text(&CheckReport::new("10.0.0.9:7400".to_owned(), vec![check], Vec::new()));
    assert!(text.starts_with("Not ready: 1 of 1 checks failed"), "{text}");
}

#[test]
fn nothing_that_others_gave_reaches_the_terminal_as_a_command() {
    let hostile = "a\x1b[2J\x1b]0;title\x07\u{9b}31m\nb\u{202e}c";
    let mut migration = sample::completed();
    migration.guest = hostile.to_owned();
    migration.peer = hostile.to_owned();
    migration.cause = Some(hostile.to_owned());
    migration.mode_origin = hostile.to_owned();
    migration.warnings = vec![hostile.to_owned()];
    migration.channels[0].interface = Some(hostile.to_owned());
    migration.notes[0].finding = hostile.to_owned();
    migration.downtime_parts[0].name = hostile.to_owned();
    let mut moving = sample::running();
    moving.guest = hostile.to_owned();
    let progress = moving.progress.as_mut().unwrap();
    (progress.phase, progress.note) = (hostile.to_owned(), Some(hostile.to_owned()));
    progress.links[0].interface = hostile.to_owned();
    let mut guests = sample::guests();
    guests[1].note = Some(hostile.to_owned());
    guests[0].name = hostile.to_owned();
    let mut checks = sample::failing_checks();
    checks.destination = hostile.to_owned();
    checks.checks[0].advice = Some(hostile.to_owned());
    checks.paths[0].peer_interface = hostile.to_owned();
    for text in [
        result_text(&migration),
        history_table(&[migration]),
        progress_line(&moving),
        status_table(&[moving]),
        guest_table(&guests),
        check_text(&checks),
    ] {
        let bad = text.chars().find(|c| (c.is_control() && *c != '\n') || *c == '\u{202e}');
        assert_eq!(bad, None, "{text:?}");
        assert!(text.contains("a\u{fffd}[2J"), "{text}");
    }
    assert_eq!(clean("a\tb\r\nü"), "a b  ü");
}

#[test]
fn the_mode_says_what_was_asked_for_and_why_it_is_another() {
    let other = Migration {
        mode_requested: TransferMode::Rdma,
        mode_used: Some(TransferMode::Tcp),
        mode_origin: "request".to_owned(),
        mode_reason: Some("host-b has no RDMA device".to_owned()),
        ..sample::completed()
    };
    assert_eq!(words::mode(&other), "tcp (rdma was asked for with the request): host-b has no RDMA device");
}

#[test]
fn quantities_are_shown_with_their_unit() {
    for (value, text) in [
        (0.0, "0 us"),
        (-1.0, "0 us"),
        (f64::NAN, "0 us"),
        (0.000_012, "12 us"),
        (0.000_999_9, "1.00 ms"),
        (0.009_999, "10.0 ms"),
        (0.112_4, "112 ms"),
        (0.999_9, "1.00 s"),
        (61.0, "61.00 s"),
        (119.996, "2 min 0 s"),
        (3725.0, "62 min 5 s"),
        (7260.0, "2 h 1 min"),
    ] {
        assert_eq!(seconds(value), text);
    }
    for (bytes, text) in [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (112 << 20, "112 MiB"),
        ((112 << 20) + 400_000, "112 MiB"),
        (1000 << 20, "0.98 GiB"),
        (98 << 20, "98.0 MiB"),
        (u64::MAX, "16384 PiB"),
    ] {
        assert_eq!(three_digits(bytes), text);
    }
    assert_eq!(moment(sample::BEGAN), "2026-03-04 05:06:07 UTC");
    assert_eq!(time_of_day(sample::BEGAN + 0.25), "05:06:07.250");
    for nonsense in [0.0, -5.0, f64::NAN, f64::INFINITY, 1e300] {
        assert_eq!((moment(nonsense), time_of_day(nonsense)), ("unknown".to_owned(), "unknown".to_owned()));
    }
}

/// The fields that a part of docs/json-migration.md tells of.
fn documented(heading: &str) -> Vec<String> {
    let document = include_str!("../../../docs/json-migration.md");
    let (_, part) = document.split_once(&format!("{heading}\n")).unwrap();
    let part = part.split("\n#").next().unwrap();
    let field = |line: &str| Some(line.strip_prefix("| `")?.split_once('`')?.0.to_owned());
    let mut fields: Vec<String> = part.lines().filter_map(field).collect();
    fields.sort();
    fields
}

#[test]
fn every_field_of_the_json_is_documented_and_every_documented_one_is_there() {
    let migration = serde_json::to_value(sample::completed()).unwrap();
    let running = serde_json::to_value(sample::running()).unwrap();
    let guests = serde_json::to_value(sample::guests()).unwrap();
    let checks = serde_json::to_value(sample::failing_checks()).unwrap();
    for (heading, object) in [
        ("## Migration", &migration),
        ("### Progress", &running["progress"]),
        ("### Link", &running["progress"]["links"][0]),
        ("### Round", &migration["rounds"][0]),
        ("### Channel", &migration["channels"][0]),
        ("### Sample", &migration["samples"][0]),
        ("### Part of the downtime", &migration["downtime_parts"][0]),
        ("### Line of the log", &migration["log"][0]),
        ("## Guest", &guests[0]),
        ("## Checks", &checks),
        ("### Check", &checks["checks"][0]),
        ("### Path", &checks["paths"][0]),
    ] {
        let mut fields: Vec<String> = object.as_object().unwrap().keys().cloned().collect();
        fields.sort();
        assert_eq!(fields, documented(heading), "{heading}");
    }
}

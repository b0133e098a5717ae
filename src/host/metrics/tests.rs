//! The text that is scraped.

use super::*;
use crate::host::api::migration::{ChannelInfo, LinkProgress, MigrationProgress};
use crate::host::view::sample;

/// The samples of one metric, in order.
fn samples(metrics: &Metrics, name: &str) -> Vec<String> {
    let text = metrics.encode();
    let mut lines: Vec<String> = text
        .lines()
        .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])))
        .map(str::to_owned)
        .collect();
    lines.sort();
    lines
}

fn with_links(links: &[(&str, u64, u64)]) -> Migration {
    let links = links.iter().map(|(interface, bytes, rate)| LinkProgress {
        interface: (*interface).to_owned(),
        bytes: *bytes,
        bytes_per_second: *rate,
        ..LinkProgress::default()
    });
    let progress = MigrationProgress { links: links.collect(), ..MigrationProgress::default() };
    Migration { progress: Some(progress), ..sample::running() }
}

#[test]
fn a_host_where_nothing_happened_shows_zeros() {
    let metrics = Metrics::new();
    let text = metrics.encode();
    assert!(text.ends_with("# EOF\n"));
    assert_eq!(
        samples(&metrics, "pageferry_build_info"),
        [format!("pageferry_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION"))]
    );
    assert_eq!(
        samples(&metrics, "pageferry_migrations"),
        [
            "pageferry_migrations{direction=\"incoming\",state=\"checking\"} 0",
            "pageferry_migrations{direction=\"incoming\",state=\"in_doubt\"} 0",
            "pageferry_migrations{direction=\"incoming\",state=\"running\"} 0",
            "pageferry_migrations{direction=\"incoming\",state=\"waiting\"} 0",
            "pageferry_migrations{direction=\"outgoing\",state=\"checking\"} 0",
            "pageferry_migrations{direction=\"outgoing\",state=\"in_doubt\"} 0",
            "pageferry_migrations{direction=\"outgoing\",state=\"running\"} 0",
            "pageferry_migrations{direction=\"outgoing\",state=\"waiting\"} 0",
        ]
    );
    assert_eq!(samples(&metrics, "pageferry_guests").len(), GUEST_STATES.len());
    assert!(samples(&metrics, "pageferry_interface_sent_bytes_total").is_empty());
}

#[test]
fn every_metric_is_documented_and_every_documented_one_is_there() {
    let metrics = Metrics::new();
    metrics.begun(&sample::running());
    metrics.ended(&sample::completed());
    let text = metrics.encode();
    let mut families: Vec<String> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .filter_map(|line| {
            let (name, kind) = line.split_once(' ')?;
            Some(match kind {
                "counter" => format!("{name}_total"),
                "info" => format!("{name}_info"),
                _ => name.to_owned(),
            })
        })
        .collect();
    families.sort();
    let documents = include_str!("../../../docs/observability.md");
    let mut documented: Vec<String> = documents
        .lines()
        .filter_map(|line| Some(line.strip_prefix("| `pageferry_")?.split_once('`')?.0))
        .map(|name| format!("pageferry_{name}"))
        .collect();
    documented.sort();
    assert_eq!(families, documented);
}

#[test]
fn a_migration_is_counted_from_its_beginning_to_its_end() {
    let metrics = Metrics::new();
    metrics.begun(&Migration { state: MigrationState::Waiting, progress: None, ..sample::running() });
    let gauge = |state: &str| {
        let labels = format!("{{direction=\"outgoing\",state=\"{state}\"}} ");
        let lines = samples(&metrics, "pageferry_migrations");
        lines.iter().find_map(|line| line.split_once(&labels)).unwrap().1.to_owned()
    };
    assert_eq!((gauge("waiting"), gauge("running")), ("1".to_owned(), "0".to_owned()));
    metrics.progress(&sample::running());
    assert_eq!((gauge("waiting"), gauge("running")), ("0".to_owned(), "1".to_owned()));
    assert_eq!(
        samples(&metrics, "pageferry_interface_send_rate_bytes_per_second"),
        [
            "pageferry_interface_send_rate_bytes_per_second{interface=\"pf1\"} 117440512",
            "pageferry_interface_send_rate_bytes_per_second{interface=\"pf2\"} 0",
        ]
    );
    metrics.ended(&sample::completed());
    assert_eq!(gauge("running"), "0");
    assert_eq!(
        samples(&metrics, "pageferry_migrations_begun_total"),
        ["pageferry_migrations_begun_total{direction=\"outgoing\",mode=\"compression\"} 1"]
    );
    assert_eq!(
        samples(&metrics, "pageferry_migrations_ended_total"),
        [
            "pageferry_migrations_ended_total{direction=\"outgoing\",state=\"completed\",mode=\"compression\"} 1"
        ]
    );
    assert_eq!(
        samples(&metrics, "pageferry_interface_send_rate_bytes_per_second"),
        [
            "pageferry_interface_send_rate_bytes_per_second{interface=\"pf1\"} 0",
            "pageferry_interface_send_rate_bytes_per_second{interface=\"pf2\"} 0",
        ]
    );
    // The channels' own figures at the end: (1290 + 1284) MiB and (812 + 590) MiB.
    assert_eq!(
        samples(&metrics, "pageferry_interface_sent_bytes_total"),
        [
            "pageferry_interface_sent_bytes_total{interface=\"pf1\"} 2699034624",
            "pageferry_interface_sent_bytes_total{interface=\"pf2\"} 1470103552",
        ]
    );
    let downtime = metrics.encode();
    for line in [
        "# TYPE pageferry_migration_downtime_seconds histogram",
        "# UNIT pageferry_migration_downtime_seconds seconds",
        "pageferry_migration_downtime_seconds_sum{direction=\"outgoing\"} 0.1432",
        "pageferry_migration_downtime_seconds_bucket{le=\"0.1\",direction=\"outgoing\"} 0",
        "pageferry_migration_downtime_seconds_bucket{le=\"0.2\",direction=\"outgoing\"} 1",
        "pageferry_migration_total_seconds_bucket{le=\"30.0\",direction=\"outgoing\"} 1",
        "pageferry_migration_cpu_seconds_total{direction=\"outgoing\"} 1.94",
        "pageferry_migrations_over_downtime_limit_total{direction=\"outgoing\"} 0",
    ] {
        assert!(downtime.lines().any(|found| found == line), "no {line:?} in\n{downtime}");
    }
}

#[test]
fn bytes_are_counted_once_however_often_progress_is_told() {
    let metrics = Metrics::new();
    let sent = || samples(&metrics, "pageferry_interface_sent_bytes_total");
    metrics.progress(&with_links(&[("pf1", 100, 5), ("pf1", 10, 2), ("", 1, 0)]));
    metrics.progress(&with_links(&[("pf1", 100, 5), ("pf1", 10, 2)]));
    metrics.progress(&with_links(&[("pf1", 150, 5), ("pf1", 50, 2)]));
    // Behind what was counted: no counter goes back.
    metrics.progress(&with_links(&[("pf1", 20, 5)]));
    let (unknown, known) = (
        "pageferry_interface_sent_bytes_total{interface=\"unknown\"} 1".to_owned(),
        "pageferry_interface_sent_bytes_total{interface=\"pf1\"} 200".to_owned(),
    );
    assert_eq!(sent(), [known, unknown.clone()]);
    let channel =
        ChannelInfo { interface: Some("pf1".to_owned()), ..sample::completed().channels[0].clone() };
    metrics
        .ended(&Migration { channels: vec![ChannelInfo { bytes: 250, ..channel }], ..sample::completed() });
    assert_eq!(sent(), ["pageferry_interface_sent_bytes_total{interface=\"pf1\"} 250".to_owned(), unknown]);
}

#[test]
fn rates_of_several_migrations_add_up() {
    let metrics = Metrics::new();
    metrics.progress(&with_links(&[("pf1", 0, 5)]));
    metrics.progress(&Migration { id: "b".repeat(32), ..with_links(&[("pf1", 0, 7)]) });
    assert_eq!(
        samples(&metrics, "pageferry_interface_send_rate_bytes_per_second"),
        ["pageferry_interface_send_rate_bytes_per_second{interface=\"pf1\"} 12"]
    );
}

#[test]
fn what_did_not_move_has_no_downtime_and_doubt_is_no_end() {
    let metrics = Metrics::new();
    metrics.ended(&Migration { downtime_seconds: Some(f64::NAN), ..sample::failed_early() });
    let doubt = Migration { state: MigrationState::InDoubt, ..sample::running() };
    metrics.ended(&doubt);
    let text = metrics.encode();
    for line in [
        "pageferry_migration_downtime_seconds_count{direction=\"outgoing\"} 0",
        "pageferry_migrations_ended_total{direction=\"outgoing\",state=\"rolled_back\",mode=\"compression\"} 1",
        "pageferry_migrations{direction=\"outgoing\",state=\"in_doubt\"} 1",
    ] {
        assert!(text.lines().any(|found| found == line), "no {line:?} in\n{text}");
    }
    assert_eq!(samples(&metrics, "pageferry_migrations_ended_total").len(), 1);
    metrics.ended(&Migration { downtime_seconds: Some(0.4), ..sample::completed() });
    assert_eq!(
        samples(&metrics, "pageferry_migrations_over_downtime_limit_total"),
        [
            "pageferry_migrations_over_downtime_limit_total{direction=\"incoming\"} 0",
            "pageferry_migrations_over_downtime_limit_total{direction=\"outgoing\"} 1",
        ]
    );
}

#[test]
fn guests_are_counted_by_what_they_do() {
    let metrics = Metrics::new();
    metrics.guests(&sample::guests());
    let lines = samples(&metrics, "pageferry_guests");
    assert!(lines.contains(&"pageferry_guests{state=\"moving\"} 1".to_owned()), "{lines:?}");
    assert!(lines.contains(&"pageferry_guests{state=\"running\"} 0".to_owned()), "{lines:?}");
    metrics.guests(&[]);
    assert!(samples(&metrics, "pageferry_guests").iter().all(|line| line.ends_with(" 0")));
}

#[test]
fn no_label_names_a_guest_a_peer_or_a_migration() {
    let metrics = Metrics::new();
    metrics.begun(&sample::running());
    metrics.guests(&sample::guests());
    metrics.ended(&sample::completed());
    let text = metrics.encode();
    for name in [&sample::running().id, "web1", "host-b", "10.0."] {
        assert!(!text.contains(name), "{name} in\n{text}");
    }
}

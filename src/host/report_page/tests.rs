//! The page as a whole. `PAGEFERRY_WRITE_PAGES=DIRECTORY` leaves the pages there, to be looked at.

use super::*;
use crate::host::api::migration::{DowntimePart, RoundInfo, Sample};
use crate::host::view::sample;

/// Every tag is closed in its order, and every attribute is quoted: what a browser need not guess at.
fn assert_well_formed(page: &str) {
    let body = page.split_once("</style>").unwrap().1;
    let mut open = vec!["html", "head"];
    let mut rest = body;
    while let Some((_, after)) = rest.split_once('<') {
        let (tag, after) = after.split_once('>').expect("a tag ends");
        rest = after;
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "in {tag}");
        } else if !tag.ends_with('/') {
            open.push(tag.split([' ', '\n']).next().unwrap());
        }
        assert!(tag.matches('"').count().is_multiple_of(2), "{tag}");
    }
    assert!(open.is_empty(), "{open:?} are left open");
}

fn written(name: &str, migration: &Migration) -> String {
    let page = page(migration);
    if let Some(directory) = std::env::var_os("PAGEFERRY_WRITE_PAGES") {
        std::fs::write(std::path::Path::new(&directory).join(name), &page).unwrap();
    }
    assert_well_formed(&page);
    page
}

#[test]
fn a_migration_with_everything() {
    let page = written("completed.html", &sample::completed());
    assert_eq!(page.matches("<svg ").count(), 4);
    for words in [
        "web1 moved to host-b and runs there",
        "compression, asked for in the host file",
        "143 ms",
        "limit 300 ms",
        "<b class=\"\">148 MiB/s</b>",
        "pages (logarithmic)",
        "MiB/s</",
        "seconds since it began",
        "the last pages are placed: 90.3 ms",
        "pf1",
        "10.0.2.1:40011",
        "lost on the way",
        "connection reset by peer",
        "the clocks differ by 1.2 s",
        "pf2 is back",
        "05:06:16.200",
    ] {
        assert!(page.contains(words), "{words:?} is not on the page");
    }
}

#[test]
fn nothing_is_fetched_and_nothing_runs() {
    let page = page(&sample::completed());
    for word in ["<script", "<link", "<img", "<iframe", "url(", "@import", " src=", " href=", "javascript:"] {
        assert!(!page.contains(word), "{word}");
    }
    let addresses: Vec<&str> = page.match_indices("http").map(|(at, _)| &page[at..at + 27]).collect();
    for address in addresses {
        assert!(
            address.starts_with("http://www.w3.org/2000/svg") || address.starts_with("http-equiv"),
            "{address}"
        );
    }
}

#[test]
fn a_migration_that_failed_before_it_moved() {
    let page = written("failed_early.html", &sample::failed_early());
    assert!(!page.contains("<svg") && !page.contains("NaN"), "{page}");
    for words in ["Rolled back", "host-b can give 1.50 GiB", "goes on here", "none was chosen yet"] {
        assert!(page.contains(words), "{words:?} is not on the page");
    }
    let incoming = written("incoming.html", &sample::incoming());
    assert!(incoming.contains("did not prove who they are"));
}

#[test]
fn a_migration_that_is_under_way_or_in_doubt() {
    let page = written("running.html", &sample::running());
    assert_eq!(page.matches("<svg ").count(), 3);
    let doubt = Migration { state: MigrationState::InDoubt, ..sample::completed() };
    assert!(written("in_doubt.html", &doubt).contains("stays stopped here"));
}

#[test]
fn no_text_becomes_a_tag() {
    let hostile = "<script>alert('x')</script>\"'&<b onmouseover=\"x\">";
    let mut migration = sample::completed();
    let (channel, path) = (&mut migration.channels[0], &mut migration.paths[0]);
    let note = &mut migration.notes[0];
    for text in [
        &mut migration.id,
        &mut migration.guest,
        &mut migration.guest_kind,
        &mut migration.peer,
        &mut migration.mode_origin,
        &mut migration.warnings[0],
        &mut channel.local,
        &mut channel.remote,
        &mut path.interface,
        &mut path.peer_interface,
        &mut note.name,
        &mut note.finding,
        &mut migration.downtime_parts[0].name,
        &mut migration.log[0].text,
        &mut migration.samples[5].phase,
    ] {
        *text = hostile.to_owned();
    }
    for text in [
        &mut migration.cause,
        &mut migration.peer_address,
        &mut migration.mode_reason,
        &mut channel.interface,
        &mut migration.ram_digest,
    ] {
        *text = Some(hostile.to_owned());
    }
    migration.samples[5].rates.insert(hostile.to_owned(), 1);
    let page = written("hostile.html", &migration);
    assert!(!page.contains("<script") && !page.contains("<b on"), "a tag came through");
    assert!(page.contains("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;"));
}

#[test]
fn figures_that_make_no_sense_make_no_panic() {
    let mut migration = sample::completed();
    migration.rounds =
        vec![RoundInfo { pages: 0, bytes: 0, wire_bytes: u64::MAX, seconds: f64::NAN, dirtied: u64::MAX }; 3];
    migration.downtime_parts = vec![
        DowntimePart { name: "a".to_owned(), seconds: f64::NAN },
        DowntimePart { name: "b".to_owned(), seconds: f64::MAX },
        DowntimePart { name: "c".to_owned(), seconds: 1e-300 },
    ];
    migration.downtime_limit_seconds = f64::INFINITY;
    migration.downtime_seconds = Some(f64::NEG_INFINITY);
    let template = migration.samples[3].clone();
    let sample = |at, remaining_bytes| Sample { at, remaining_bytes, ..template.clone() };
    migration.samples = vec![
        sample(f64::NAN, 1),
        sample(1e300, u64::MAX),
        sample(-1e300, 0),
        sample(0.0, 3),
        sample(9e8, u64::MAX),
    ];
    written("nonsense.html", &migration);
    migration.samples = vec![sample(5.0, 0), sample(5.0, 0)];
    migration.rounds = vec![RoundInfo { pages: 0, bytes: 0, wire_bytes: 0, seconds: 0.0, dirtied: 0 }];
    migration.downtime_parts.clear();
    written("nothing.html", &migration);
}

#[test]
fn a_long_migration_stays_readable() {
    let mut migration = sample::completed();
    let round = migration.rounds[1];
    migration.rounds = (0..60).map(|index| RoundInfo { pages: 200_000 - index * 500, ..round }).collect();
    let template = migration.samples[9].clone();
    migration.samples =
        (0..7200).map(|half| Sample { at: f64::from(half) * 0.5, ..template.clone() }).collect();
    for (index, sample) in migration.samples.iter_mut().enumerate() {
        sample.remaining_bytes = (3 << 30) - (index as u64 % 120) * (24 << 20);
        sample.rates = (0..9).map(|link| (format!("pf{link}"), (80 + link * 9) << 20)).collect();
    }
    migration.downtime_seconds = Some(0.42);
    let page = written("long.html", &migration);
    assert!(page.len() < 2_000_000, "{} bytes", page.len());
}

//! A migration as one HTML page: how it went, key figures, plots, tables. It needs no network and no script, and follows the
//! reader's choice of light or dark.

mod charts;
pub(in crate::host) mod html;
pub(in crate::host) mod plot;
#[cfg(test)]
mod tests;

use html::{Column, card, escape, table};

use crate::host::api::migration::{Migration, MigrationState};
use crate::host::view::speed;
use crate::host::view::table::{by, moment, per_second, seconds, three_digits, time_of_day};
use crate::host::view::words;
use crate::units::{Bytes, PAGE_SIZE};

const STYLE: &str = include_str!("style.css");

/// The page of a migration, whatever became of it and however far it is.
#[must_use]
pub fn page(migration: &Migration) -> String {
    let title = format!("{}: {}", words::outcome(migration.state), words::meaning(migration));
    let mut body = header(migration);
    body.push_str(&tiles(migration));
    body.push_str(&plots(migration));
    body.push_str(&tables(migration));
    document(&title, &body)
}

/// A page of this program: a title, which is not yet escaped, and what stands on it.
pub(in crate::host) fn document(title: &str, body: &str) -> String {
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{}</title>\n<style>\n{STYLE}{}</style>\n</head>\n<body>\n<main>\n{body}\
         <footer>Written by pageferry {}. Times of day are UTC.</footer>\n</main>\n</body>\n</html>\n",
        escape(title),
        plot::style(),
        env!("CARGO_PKG_VERSION"),
    )
}

fn header(migration: &Migration) -> String {
    let class = match migration.state {
        MigrationState::Completed => "good",
        MigrationState::RolledBack | MigrationState::Lost => "bad",
        _ => "warn",
    };
    let mut meaning = words::meaning(migration);
    // Sentences that begin in the middle of the terminal's line begin this one.
    if let Some(first) = meaning.strip_prefix("it is ") {
        meaning = format!("It is {first}");
    }
    let mut html = format!(
        "<header>\n<span class=\"pill {class}\">{}</span>\n<h1>{}</h1>\n<p class=\"sub\">Mode: {}</p>\n",
        words::outcome(migration.state),
        escape(&meaning),
        escape(&words::mode(migration)),
    );
    if let Some(cause) = &migration.cause {
        html.push_str(&format!("<p class=\"box {class}\"><b>Cause:</b> {}</p>\n", escape(cause)));
    }
    if migration.insecure {
        html.push_str(
            "<p class=\"box warn\"><b>Insecure:</b> the hosts did not prove who they are (allow_insecure).</p>\n",
        );
    }
    html.push_str("</header>\n");
    html
}

fn tiles(migration: &Migration) -> String {
    let mut tiles = Vec::new();
    let limit = format!("downtime (limit {})", seconds(migration.downtime_limit_seconds));
    match migration.downtime_seconds {
        Some(downtime) if words::over_limit(migration) => tiles.push(("bad", seconds(downtime), limit)),
        Some(downtime) => tiles.push(("", seconds(downtime), limit)),
        None => tiles.push(("", "-".to_owned(), limit)),
    }
    if let Some(total) = migration.total_seconds {
        tiles.push(("", seconds(total), "in total".to_owned()));
    }
    if words::carried(migration) > 0 {
        tiles.push(("", Bytes(words::carried(migration)).to_string(), "over the network".to_owned()));
    }
    if let Some(rate) = words::average(migration) {
        tiles.push(("", format!("{}/s", three_digits(rate)), "on average".to_owned()));
    }
    if !migration.rounds.is_empty() {
        tiles.push(("", migration.rounds.len().to_string(), "rounds".to_owned()));
    }
    let used = migration.touched_bytes.map(|used| format!("RAM, {} in use", Bytes(used)));
    let used = used.unwrap_or_else(|| "RAM".to_owned());
    tiles.push(("", Bytes(migration.memory_bytes).to_string(), used));
    let tile = |(class, value, says): &(&str, String, String)| {
        format!(
            "<div class=\"tile\"><b class=\"{class}\">{}</b><span>{}</span></div>",
            escape(value),
            escape(says)
        )
    };
    format!("<div class=\"tiles\">{}</div>\n", tiles.iter().map(tile).collect::<String>())
}

fn plots(migration: &Migration) -> String {
    let mut html = card(
        "Downtime",
        "What was done while the guest stood still, in order.",
        &charts::downtime(migration),
    );
    html.push_str(&card(
        "Pages per round",
        "Each round sends what the guest wrote during the one before; in the last the guest stands still.",
        &charts::rounds(migration),
    ));
    html.push_str(&card(
        "Rate of each interface",
        "Bytes on the wire, headers included.",
        &charts::rates(migration),
    ));
    html.push_str(&card(
        "What was left of each round",
        "Guest memory that was not yet at the destination.",
        &charts::remaining(migration),
    ));
    html
}

fn tables(migration: &Migration) -> String {
    let list =
        |lines: &[String]| -> Vec<Vec<String>> { lines.iter().map(|line| vec![line.clone()]).collect() };
    let facts = words::facts(migration).into_iter().map(|(name, value)| vec![name.to_owned(), value]);
    let facts: Vec<Vec<String>> = facts.chain(ends(migration)).collect();
    [
        card("Warnings", "", &table("", &[], &list(&migration.warnings))),
        card("Details", "", &table("facts", &[], &facts)),
        card("Rounds", "", &rounds(migration)),
        card("Paths", "", &paths(migration)),
        card("Channels", "Connections, the lost ones too.", &channels(migration)),
        card("Noted before it began", "", &notes(migration)),
        card("Log", "", &log(migration)),
    ]
    .concat()
}

fn ends(migration: &Migration) -> Vec<Vec<String>> {
    let address = migration.peer_address.clone().map(|address| vec!["Other host at".to_owned(), address]);
    let ended = migration.ended_at.map(|at| vec!["Ended".to_owned(), moment(at)]);
    ended.into_iter().chain(address).collect()
}

fn rounds(migration: &Migration) -> String {
    let row = |(index, round): (usize, &crate::host::api::migration::RoundInfo)| {
        vec![
            index.to_string(),
            round.pages.to_string(),
            Bytes(round.bytes).to_string(),
            Bytes(round.wire_bytes).to_string(),
            seconds(round.seconds),
            per_second(round.bytes, round.seconds),
            Bytes(round.dirtied.saturating_mul(PAGE_SIZE)).to_string(),
        ]
    };
    let rows: Vec<Vec<String>> = migration.rounds.iter().enumerate().map(row).collect();
    let columns = ["Round", "Pages", "Sent", "Over the network", "Took", "Rate", "Written meanwhile"]
        .map(Column::Figure);
    table("", &columns, &rows)
}

fn paths(migration: &Migration) -> String {
    let rows = migration.paths.iter().map(|path| {
        vec![
            path.interface.clone(),
            path.source.to_string(),
            path.peer_interface.clone(),
            path.destination.to_string(),
            speed(path.speed_bits_per_second),
            path.mtu.to_string(),
            path.bandwidth_cap.map_or_else(|| "none".to_owned(), |cap| format!("{}/s", Bytes(cap))),
        ]
    });
    let columns = [
        Column::Text("At the source"),
        Column::Text("Address"),
        Column::Text("At the destination"),
        Column::Text("Address"),
        Column::Figure("Speed"),
        Column::Figure("MTU"),
        Column::Figure("Cap"),
    ];
    table("", &columns, &rows.collect::<Vec<_>>())
}

fn channels(migration: &Migration) -> String {
    let rows = migration.channels.iter().map(|channel| {
        vec![
            channel.local.clone(),
            channel.remote.clone(),
            channel.interface.clone().unwrap_or_else(|| "unknown".to_owned()),
            by(channel),
            Bytes(channel.bytes).to_string(),
            if channel.lost { "lost on the way" } else { "to the end" }.to_owned(),
        ]
    });
    let columns = [
        Column::Text("From"),
        Column::Text("To"),
        Column::Text("Interface"),
        Column::Text("By"),
        Column::Figure("Carried"),
        Column::Text("Lived"),
    ];
    table("", &columns, &rows.collect::<Vec<_>>())
}

fn notes(migration: &Migration) -> String {
    let rows = migration.notes.iter().map(|note| vec![note.name.clone(), note.finding.clone()]);
    table("facts", &[], &rows.collect::<Vec<_>>())
}

fn log(migration: &Migration) -> String {
    let rows = migration.log.iter().map(|line| vec![time_of_day(line.at), line.text.clone()]);
    table("log", &[], &rows.collect::<Vec<_>>())
}

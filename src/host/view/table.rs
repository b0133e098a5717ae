//! Tables and quantities, as every text of this program shows them.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};
use time::OffsetDateTime;

use super::words::clean;
use crate::host::api::migration::{ChannelInfo, RoundInfo};
use crate::units::{Bytes, PAGE_SIZE};

/// A table without lines: a header where there is one, and columns.
pub(in crate::host) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    if !header.is_empty() {
        table.set_header(header.iter().copied());
    }
    table
}

/// A table that begins at the left edge, without the blanks that fill the last column.
pub(super) fn flush(table: &Table) -> String {
    let lines = table.to_string();
    let lines = lines.lines().map(|line| line.strip_prefix(' ').unwrap_or(line).trim_end());
    lines.collect::<Vec<_>>().join("\n")
}

/// The same, indented by two.
pub(in crate::host) fn indented(table: &Table) -> String {
    table.to_string().lines().map(|line| format!(" {}", line.trim_end())).collect::<Vec<_>>().join("\n")
}

/// Two columns: what it is, and what it is like.
pub(in crate::host) fn facts(facts: &[(&'static str, String)]) -> Table {
    let mut shown = table(&[]);
    for (name, value) in facts {
        shown.add_row([*name, value]);
    }
    shown
}

/// The rounds of a migration.
pub(in crate::host) fn rounds(rounds: &[RoundInfo]) -> Table {
    let mut shown = table(&["Round", "Sent", "Over the network", "Took", "Rate", "Written meanwhile"]);
    for (index, round) in rounds.iter().enumerate() {
        shown.add_row([
            index.to_string(),
            Bytes(round.bytes).to_string(),
            Bytes(round.wire_bytes).to_string(),
            seconds(round.seconds),
            per_second(round.bytes, round.seconds),
            Bytes(round.dirtied.saturating_mul(PAGE_SIZE)).to_string(),
        ]);
    }
    for column in shown.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    shown
}

/// The connections of a migration.
pub(in crate::host) fn channels<'a>(channels: impl Iterator<Item = &'a ChannelInfo>) -> Table {
    let mut shown = table(&["From", "To", "Interface", "By", "Carried", ""]);
    for channel in channels {
        shown.add_row([
            clean(&channel.local),
            clean(&channel.remote),
            channel.interface.as_deref().map_or_else(|| "unknown".to_owned(), clean),
            by(channel),
            Bytes(channel.bytes).to_string(),
            if channel.lost { "lost on the way".to_owned() } else { String::new() },
        ]);
    }
    shown
}

/// What carried the pages of a connection.
pub(in crate::host) fn by(channel: &ChannelInfo) -> String {
    match &channel.rdma {
        Some(rdma) => format!("RDMA, {} port {}, {}", clean(&rdma.device), rdma.port, gid(rdma.gid)),
        None if channel.encrypted => "TCP, encrypted".to_owned(),
        None => "TCP".to_owned(),
    }
}

/// A GID as the IP address that it is.
fn gid(gid: Ipv6Addr) -> IpAddr {
    IpAddr::V6(gid).to_canonical()
}

/// A rate over some time.
pub(in crate::host) fn per_second(bytes: u64, seconds: f64) -> String {
    let rate = if seconds > 0.0 { bytes as f64 / seconds } else { 0.0 };
    format!("{}/s", Bytes(rate as u64))
}

/// A size with three digits, for a line that changes: `112 MiB`, `1.21 GiB`.
pub(in crate::host) fn three_digits(bytes: u64) -> String {
    const PREFIXES: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut prefix = 0;
    while value >= 999.5 && prefix + 1 < PREFIXES.len() {
        value /= 1024.0;
        prefix += 1;
    }
    let decimals = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.decimals$} {}", PREFIXES[prefix])
}

/// A duration with three digits: `112 ms`, `3.21 s`; from two minutes on `2 min 5 s`.
pub(in crate::host) fn seconds(seconds: f64) -> String {
    let seconds = Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX).as_secs_f64();
    if seconds < 0.000_999_5 {
        format!("{:.0} us", seconds * 1e6)
    } else if seconds < 0.009_995 {
        format!("{:.2} ms", seconds * 1e3)
    } else if seconds < 0.099_95 {
        format!("{:.1} ms", seconds * 1e3)
    } else if seconds < 0.999_5 {
        format!("{:.0} ms", seconds * 1e3)
    } else if seconds < 119.995 {
        format!("{seconds:.2} s")
    } else if seconds < 3600.0 * 2.0 {
        let whole = seconds.round() as u64;
        format!("{} min {} s", whole / 60, whole % 60)
    } else {
        let minutes = (seconds / 60.0).round() as u64;
        format!("{} h {} min", minutes / 60, minutes % 60)
    }
}

/// A moment by the calendar, in UTC: hosts of one migration may be in different time zones.
pub(in crate::host) fn moment(at: f64) -> String {
    let Some(at) = calendar(at) else { return "unknown".to_owned() };
    format!("{} {:02}:{:02}:{:02} UTC", at.date(), at.hour(), at.minute(), at.second())
}

/// The time of day, in UTC, with milliseconds.
pub(in crate::host) fn time_of_day(at: f64) -> String {
    let Some(at) = calendar(at) else { return "unknown".to_owned() };
    format!("{:02}:{:02}:{:02}.{:03}", at.hour(), at.minute(), at.second(), at.millisecond())
}

fn calendar(at: f64) -> Option<OffsetDateTime> {
    let known = at.is_finite() && at > 0.0;
    // To the nearest millisecond, which is about what such a number of seconds can tell.
    let nanoseconds = known.then(|| (at * 1e3).round() as i128)?.checked_mul(1_000_000)?;
    OffsetDateTime::from_unix_timestamp_nanos(nanoseconds).ok()
}

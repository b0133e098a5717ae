//! A measurement as text for people.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, Table};

use super::case::{BenchReport, Case, LatencyUs};
use super::verdict;
use crate::host::view::table::{indented, per_second, seconds, table, three_digits};
use crate::session::striping::BATCH_PAGES;
use crate::units::{Bytes, PAGE_SIZE};

/// Everything.
pub(super) fn of(report: &BenchReport) -> String {
    let mut text = String::new();
    // Writing into a string does not fail.
    let _ = write_all(&mut text, report);
    text
}

fn write_all(text: &mut String, report: &BenchReport) -> std::fmt::Result {
    if let Some(case) = report.cases.first() {
        writeln!(text, "{}\n", what(report, case))?;
    }
    writeln!(text, "{}\n", indented(&rates(&report.cases)))?;
    for case in &report.cases {
        writeln!(text, "{}: limited by {}: {}.", name(case), case.bottleneck, case.bottleneck_reason)?;
        if !case.verified {
            writeln!(text, "{}: DAMAGED: what came is not what was sent.", name(case))?;
        }
    }
    writeln!(text, "\nTime from taking a batch to its receipt, and from a barrier to its own")?;
    writeln!(text, "{}", indented(&latencies(&report.cases)))?;
    writeln!(text, "\nWhere the channels' threads spent their time, and what the engine took of memory")?;
    writeln!(text, "{}", indented(&shares(&report.cases)))?;
    if report.cases.iter().any(|case| case.interfaces.len() > 1) {
        writeln!(text, "\nInterfaces")?;
        writeln!(text, "{}", indented(&interfaces(&report.cases)))?;
    }
    if !report.comparison.is_empty() {
        writeln!(text, "\nOver the baseline (1.00 is the same)")?;
        writeln!(text, "{}", indented(&comparison(report)))?;
    }
    if let Some(best) = &report.best {
        writeln!(
            text,
            "\nBest: {} with {} channels and batches of {}, {}/s. As a part of a host file:\n\n{}",
            best.mode,
            best.channels,
            Bytes(best.message_bytes),
            Bytes(best.bytes_per_second as u64),
            best.host_file.trim_end()
        )?;
    }
    for skipped in &report.skipped {
        writeln!(text, "\n{} was not measured: {}.", skipped.mode, skipped.reason)?;
    }
    Ok(())
}

/// A line that says what was measured between what.
pub(super) fn what(report: &BenchReport, case: &Case) -> String {
    let source = &report.source;
    let machines = if report.one_machine {
        format!("between two processes of one machine ({} processors, {})", source.cores, source.cpu)
    } else {
        let to = &report.destination;
        format!("from {} processors ({}) to {} processors ({})", source.cores, source.cpu, to.cores, to.cpu)
    };
    let mut line = format!("{} of memory ({}), ", Bytes(case.memory_bytes), case.fill);
    if case.in_use_bytes != case.memory_bytes {
        let _ = write!(line, "{} of it in use, ", Bytes(case.in_use_bytes));
    }
    if case.dirty_bytes_per_second > 0 {
        let _ = write!(line, "written at {}/s meanwhile, ", Bytes(case.dirty_bytes_per_second));
    }
    let into = if case.warm { "populated" } else { "fresh" };
    let _ = write!(line, "into {into} memory, {machines}");
    line
}

pub(super) fn name(case: &Case) -> String {
    let batch = match case.message_bytes {
        bytes if bytes == BATCH_PAGES * PAGE_SIZE => String::new(),
        bytes => format!(", batches of {}", Bytes(bytes)),
    };
    format!("{}, {}{batch}", case.mode, verdict::channels(case))
}

fn right(mut table: Table) -> Table {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn rates(cases: &[Case]) -> Table {
    let mut shown = table(&[
        "Mode",
        "Channels",
        "Batch",
        "Moved",
        "Took",
        "Rate",
        "On the wire",
        "CPU s/GiB here",
        "there",
        "Verified",
    ]);
    for case in cases {
        shown.add_row([
            case.mode.to_string(),
            case.channels.to_string(),
            Bytes(case.message_bytes).to_string(),
            Bytes(case.bytes).to_string(),
            seconds(case.seconds),
            per_second(case.bytes, case.seconds),
            per_second(case.wire_bytes, case.seconds),
            format!("{:.3}", case.source_cpu_seconds_per_gib),
            format!("{:.3}", case.destination_cpu_seconds_per_gib),
            if case.verified { "yes" } else { "NO" }.to_owned(),
        ]);
    }
    right(shown)
}

fn latencies(cases: &[Case]) -> Table {
    let mut shown =
        table(&["Mode", "Channels", "Batch", "p50", "p90", "p99", "p99.9", "max", "barrier p50", "max"]);
    for case in cases {
        let time = |us: u64| seconds(us as f64 / 1e6);
        let LatencyUs { p50, p90, p99, p999, max, .. } = case.latency_us;
        let barrier = case.barrier_latency_us;
        let times = [p50, p90, p99, p999, max, barrier.p50, barrier.max].map(time);
        shown.add_row(
            [case.mode.to_string(), case.channels.to_string(), Bytes(case.message_bytes).to_string()]
                .into_iter()
                .chain(times),
        );
    }
    right(shown)
}

fn shares(cases: &[Case]) -> Table {
    let mut shown = table(&[
        "Mode",
        "Channels",
        "Batch",
        "scan",
        "compress",
        "send",
        "wait",
        "place",
        "Page faults",
        "Memory here",
        "there",
    ]);
    for case in cases {
        let split = &case.time_split;
        let whole = case.seconds * case.channels as f64;
        let share =
            |part: f64| if whole > 0.0 { format!("{:.0} %", part / whole * 100.0) } else { "-".to_owned() };
        shown.add_row([
            case.mode.to_string(),
            case.channels.to_string(),
            Bytes(case.message_bytes).to_string(),
            share(split.scan_seconds),
            share(split.compress_seconds),
            share(split.send_seconds),
            share(split.wait_seconds),
            share(split.place_seconds),
            case.destination_page_faults.to_string(),
            three_digits(case.engine_memory_bytes.source),
            three_digits(case.engine_memory_bytes.destination),
        ]);
    }
    right(shown)
}

fn interfaces(cases: &[Case]) -> Table {
    let mut shown = table(&["Mode", "Channels", "Batch", "Interface", "Carried", "Rate"]);
    for case in cases {
        for interface in &case.interfaces {
            shown.add_row([
                case.mode.to_string(),
                interface.channels.to_string(),
                Bytes(case.message_bytes).to_string(),
                interface.interface.clone(),
                Bytes(interface.bytes).to_string(),
                format!("{}/s", Bytes(interface.bytes_per_second as u64)),
            ]);
        }
    }
    right(shown)
}

fn comparison(report: &BenchReport) -> Table {
    let mut shown = table(&["Mode", "Channels", "Batch", "Rate", "CPU s/GiB here", "there", "p99"]);
    let ratio = |ratio: Option<f64>| ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
    for case in &report.comparison {
        shown.add_row([
            case.mode.to_string(),
            case.channels.to_string(),
            Bytes(case.message_bytes).to_string(),
            ratio(case.bytes_per_second),
            ratio(case.source_cpu_seconds_per_gib),
            ratio(case.destination_cpu_seconds_per_gib),
            ratio(case.latency_p99),
        ]);
    }
    right(shown)
}

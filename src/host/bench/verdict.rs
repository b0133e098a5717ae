//! What limits a transfer, from what was measured of it.
//!
//! A transfer is as fast as its busiest part. The wire is busy where it carries what its interface is said to carry; an end's
//! processors are where the threads of its channels used most of the time that they had. Where nothing is busy the wire is
//! waited for.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::case::Case;
use crate::host::view::{speed, table::per_second};
use crate::units::PAGE_SIZE;

/// What limits a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bottleneck {
    /// The source's processors, sending.
    SourceCpu,
    /// The source's processors, compressing.
    Compressor,
    /// The destination's processors, making pages for memory that was never used.
    DestinationPageFaults,
    /// The destination's processors, otherwise.
    DestinationCpu,
    /// The network.
    Wire,
}

impl fmt::Display for Bottleneck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SourceCpu => "the source's CPU",
            Self::Compressor => "the compressor",
            Self::DestinationPageFaults => "the destination's page faults",
            Self::DestinationCpu => "the destination's CPU",
            Self::Wire => "the wire",
        })
    }
}

/// An interface that carries this part of its speed is full: frames and headers take the rest.
const FULL: f64 = 0.85;
/// A driver that names a lower speed than was measured does not know it (a veth always says 10 Gbit/s).
const UNBELIEVABLE: f64 = 1.05;
/// Threads that ran for this part of their time are what is waited for.
const BUSY: f64 = 0.65;
/// The same for all processors of a machine that both ends share.
const CROWDED: f64 = 0.8;

/// What a verdict is made of.
pub(super) struct Figures<'a> {
    pub(super) case: &'a Case,
    pub(super) source_cores: usize,
    pub(super) destination_cores: usize,
    pub(super) one_machine: bool,
}

impl Figures<'_> {
    /// The processors that the threads of the channels can keep busy.
    fn usable(&self, cores: usize) -> f64 {
        cores.min(self.case.channels).max(1) as f64
    }
}

/// The verdict, and the figures that lead to it as a sentence.
pub(super) fn of(figures: &Figures<'_>) -> (Bottleneck, String) {
    let case = figures.case;
    if case.bytes == 0 {
        return (Bottleneck::Wire, "no page had to be sent, so that is the time of the answers".to_owned());
    }
    if let Some(reason) = full_wire(case) {
        return (Bottleneck::Wire, reason);
    }
    let seconds = case.seconds.max(1e-9);
    let source = case.source_cpu_seconds / seconds / figures.usable(figures.source_cores);
    let destination_cpu = case.destination_cpu_seconds / seconds / figures.usable(figures.destination_cores);
    // Its threads wait for bytes or place them, and while they place they cannot be waiting for the source.
    let placing = case.time_split.place_seconds / (seconds * case.channels.max(1) as f64);
    let destination = destination_cpu.max(placing);
    let both = case.source_cpu_seconds + case.destination_cpu_seconds;
    let shared = both / seconds / figures.source_cores.max(1) as f64;
    let crowded = figures.one_machine && shared >= CROWDED;
    let why_crowded = if crowded {
        format!(
            "; both ends share {} processors, of which they use {}",
            figures.source_cores,
            percent(shared)
        )
    } else {
        String::new()
    };
    if source >= destination && (source >= BUSY || crowded) {
        let used = format!(
            "the source used {:.2} CPU seconds in {seconds:.2} s, {} of what the threads of {} can",
            case.source_cpu_seconds,
            percent(source),
            channels(case)
        );
        let split = &case.time_split;
        let working = split.scan_seconds + split.compress_seconds + split.send_seconds;
        if split.compress_seconds > working / 2.0 {
            let part = percent(split.compress_seconds / working);
            return (
                Bottleneck::Compressor,
                format!("{used}; {part} of its threads' work was compressing{why_crowded}"),
            );
        }
        return (Bottleneck::SourceCpu, format!("{used}{why_crowded}"));
    }
    if destination > source && (destination >= BUSY || crowded) {
        let used = format!(
            "the destination used {:.2} CPU seconds in {seconds:.2} s, and its threads were putting pages into memory for \
             {} of that time",
            case.destination_cpu_seconds,
            percent(placing.min(1.0))
        );
        let placed = case.bytes.saturating_sub(case.zero_bytes) / PAGE_SIZE;
        let faults = case.destination_page_faults;
        // A fault may fill more than one page, but where there are that many, making pages is most of the work.
        if placed > 0 && faults * 4 >= placed {
            return (
                Bottleneck::DestinationPageFaults,
                format!("{used}, with {faults} page faults for {placed} pages{why_crowded}"),
            );
        }
        return (Bottleneck::DestinationCpu, format!("{used}, with {faults} page faults{why_crowded}"));
    }
    let reason = format!(
        "the source used {} of the processor time that it could and the destination {}; both waited for the network, \
         which carried {}",
        percent(source),
        percent(destination),
        per_second(case.wire_bytes, seconds)
    );
    (Bottleneck::Wire, reason)
}

/// Why the wire is full, where an interface knows its speed.
fn full_wire(case: &Case) -> Option<String> {
    case.interfaces.iter().find_map(|interface| {
        let speed_bits = interface.speed_bits_per_second?;
        let part = interface.bytes_per_second * 8.0 / speed_bits as f64;
        (FULL..UNBELIEVABLE).contains(&part).then(|| {
            format!(
                "{} carried {}, {} of its {}",
                interface.interface,
                per_second(interface.bytes_per_second as u64, 1.0),
                percent(part),
                speed(Some(speed_bits))
            )
        })
    })
}

pub(super) fn channels(case: &Case) -> String {
    if case.channels == 1 { "1 channel".to_owned() } else { format!("{} channels", case.channels) }
}

fn percent(part: f64) -> String {
    format!("{:.0} %", part * 100.0)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::host::bench::case::{InterfaceRate, TimeShares};

    /// 1 GiB in a second over two channels, with nobody busy.
    pub(in crate::host::bench) fn case() -> Case {
        let json = serde_json::json!({
            "mode": "tcp", "channels": 2, "message_bytes": 1 << 20, "fill": "random", "memory_bytes": 1 << 30,
            "in_use_bytes": 1 << 30, "warm": false, "dirty_bytes_per_second": 0, "rounds": 1, "bytes": 1 << 30,
            "zero_bytes": 0, "wire_bytes": 1 << 30, "seconds": 1.0, "bytes_per_second": 1e9,
            "wire_bytes_per_second": 1e9, "source_cpu_seconds": 0.1, "destination_cpu_seconds": 0.2,
            "source_cpu_seconds_per_gib": 0.1, "destination_cpu_seconds_per_gib": 0.2,
            "latency_us": {"count": 9, "p50": 100, "p90": 200, "p99": 300, "p999": 400, "max": 500},
            "barrier_latency_us": {"count": 2, "p50": 10, "p90": 20, "p99": 30, "p999": 40, "max": 50},
            "time_split": {"scan_seconds": 0.1, "compress_seconds": 0.0, "send_seconds": 1.0, "wait_seconds": 0.9,
                "place_seconds": 0.8, "unpack_seconds": 0.0},
            "destination_page_faults": 100, "engine_memory_bytes": {"source": 1, "destination": 2},
            "interfaces": [], "verified": true, "bottleneck": "wire", "bottleneck_reason": "", "runs": []
        });
        serde_json::from_value(json).expect("a case")
    }

    fn verdict(case: &Case, one_machine: bool) -> (Bottleneck, String) {
        of(&Figures { case, source_cores: 2, destination_cores: 2, one_machine })
    }

    #[test]
    fn each_limit_is_named_with_its_figures() {
        let idle = case();
        let source = Case { source_cpu_seconds: 1.9, ..case() };
        let split = TimeShares { compress_seconds: 1.5, send_seconds: 0.2, ..idle.time_split };
        let compressing = Case { time_split: split, ..source.clone() };
        let faulting = Case { destination_cpu_seconds: 1.8, destination_page_faults: 262_144, ..case() };
        let placing = Case { destination_cpu_seconds: 1.8, ..case() };
        // Its processors were taken by others: its threads had little time, and were never waiting for bytes.
        let split = TimeShares { place_seconds: 1.8, ..idle.time_split };
        let starved = Case { time_split: split, ..case() };
        let carried = |bytes_per_second, bits| {
            let interface = InterfaceRate {
                interface: "eth1".to_owned(),
                channels: 2,
                bytes: 1,
                bytes_per_second,
                speed_bits_per_second: Some(bits),
            };
            Case { interfaces: vec![interface], ..source.clone() }
        };
        for (case, expected, words) in [
            (&idle, Bottleneck::Wire, "waited for the network"),
            (&source, Bottleneck::SourceCpu, "95 %"),
            (&compressing, Bottleneck::Compressor, "compressing"),
            (&faulting, Bottleneck::DestinationPageFaults, "262144 page faults for 262144 pages"),
            (&placing, Bottleneck::DestinationCpu, "with 100 page faults"),
            (&starved, Bottleneck::DestinationCpu, "90 % of that time"),
            (&carried(118e6, 1_000_000_000), Bottleneck::Wire, "94 % of its 1 Gbit/s"),
            (&carried(3e9, 10_000_000_000), Bottleneck::SourceCpu, "95 %"),
            (&carried(10e6, 1_000_000_000), Bottleneck::SourceCpu, "95 %"),
        ] {
            let (found, reason) = verdict(case, false);
            assert_eq!(found, expected, "{reason}");
            assert!(reason.contains(words), "{reason}");
        }
    }

    #[test]
    fn on_one_machine_both_ends_use_the_same_processors() {
        let case = Case { source_cpu_seconds: 0.6, destination_cpu_seconds: 1.2, ..case() };
        assert_eq!(verdict(&case, false).0, Bottleneck::Wire);
        let (found, reason) = verdict(&case, true);
        assert_eq!(found, Bottleneck::DestinationCpu);
        assert!(reason.contains("share 2 processors, of which they use 90 %"), "{reason}");
    }

    #[test]
    fn a_transfer_of_nothing_is_judged_too() {
        let nothing =
            Case { seconds: 0.0, bytes: 0, source_cpu_seconds: 0.0, destination_cpu_seconds: 0.0, ..case() };
        let (found, reason) = verdict(&nothing, true);
        assert!(found == Bottleneck::Wire && reason.contains("no page"), "{reason}");
    }
}

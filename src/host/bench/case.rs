//! What a measurement comes to: an object for each mode and number of channels. Its fields are described in `docs/bench.md`.

use serde::{Deserialize, Serialize};

use super::Machine;
use super::compare::Comparison;
use super::options::BenchOptions;
use super::source::{Measured, Payload, Setting};
use super::sweep::Best;
use super::verdict::{self, Bottleneck, Figures};
use crate::session::{Latencies, TransferMode};
use crate::units::PAGE_SIZE;

const GIB: f64 = (1u64 << 30) as f64;

/// All that `pageferry bench` found out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BenchReport {
    /// The release that measured.
    pub version: String,
    /// When, in seconds since 1970.
    pub measured_at: f64,
    /// The sending machine.
    pub source: Machine,
    /// The receiving machine.
    pub destination: Machine,
    /// Whether they are one, so that both ends compete for its processors.
    pub one_machine: bool,
    /// What was measured.
    pub cases: Vec<Case>,
    /// What was asked for and could not be.
    pub skipped: Vec<Skipped>,
    /// The cases beside those of a baseline that has them too.
    #[serde(default)]
    pub comparison: Vec<Comparison>,
    /// What a sweep found best.
    #[serde(default)]
    pub best: Option<Best>,
}

/// A mode that was not measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Which.
    pub mode: TransferMode,
    /// Why, as a sentence.
    pub reason: String,
}

/// One way to send, measured once or some times. Where there were several runs, every figure is the median of its own.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Case {
    /// How memory travelled.
    pub mode: TransferMode,
    /// Over how many connections.
    pub channels: usize,
    /// The largest batch of pages, in bytes.
    pub message_bytes: u64,
    /// What the memory held.
    pub fill: String,
    /// How much memory there was.
    pub memory_bytes: u64,
    /// How much of it had ever been touched.
    pub in_use_bytes: u64,
    /// Whether the destination's was populated before.
    pub warm: bool,
    /// How much a thread wrote of it a second meanwhile.
    pub dirty_bytes_per_second: u64,
    /// Rounds that it took.
    pub rounds: u32,
    /// What the pages held that were placed, zero pages included.
    pub bytes: u64,
    /// How much of that were zero pages, of which only the numbers travel.
    pub zero_bytes: u64,
    /// What crossed the network for it.
    pub wire_bytes: u64,
    /// From the first page to the answer that all are placed.
    pub seconds: f64,
    /// `bytes` over `seconds`.
    pub bytes_per_second: f64,
    /// `wire_bytes` over `seconds`.
    pub wire_bytes_per_second: f64,
    /// Processor time of the sending process.
    pub source_cpu_seconds: f64,
    /// Processor time of the receiving process.
    pub destination_cpu_seconds: f64,
    /// The same for each GiB of `bytes`.
    pub source_cpu_seconds_per_gib: f64,
    /// The same for each GiB of `bytes`.
    pub destination_cpu_seconds_per_gib: f64,
    /// From taking a batch to the receipt that covers it.
    pub latency_us: LatencyUs,
    /// From sending a barrier to its receipt.
    pub barrier_latency_us: LatencyUs,
    /// Where the threads' time went, added up over them.
    pub time_split: TimeShares,
    /// Page faults of the receiving process.
    pub destination_page_faults: u64,
    /// What the engine took of memory beyond the RAM.
    pub engine_memory_bytes: EngineMemory,
    /// What each interface of the source carried.
    pub interfaces: Vec<InterfaceRate>,
    /// Whether what came is what was sent, byte for byte, in every run.
    pub verified: bool,
    /// What limits it.
    pub bottleneck: Bottleneck,
    /// By which figures, as a sentence.
    pub bottleneck_reason: String,
    /// The runs one by one.
    pub runs: Vec<RunFigures>,
    /// Points of the latency's distribution: the part of the batches, and what it took at most, in microseconds.
    #[serde(default)]
    pub latency_curve: Vec<(f64, u64)>,
}

/// A distribution, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatencyUs {
    /// How many were measured.
    pub count: u64,
    /// Half of them took at most this.
    pub p50: u64,
    /// Nine of ten.
    pub p90: u64,
    /// 99 of 100.
    pub p99: u64,
    /// 999 of 1000.
    pub p999: u64,
    /// All.
    pub max: u64,
}

impl LatencyUs {
    fn of(latencies: &Latencies) -> Self {
        Self {
            count: latencies.count(),
            p50: latencies.quantile_us(0.5),
            p90: latencies.quantile_us(0.9),
            p99: latencies.quantile_us(0.99),
            p999: latencies.quantile_us(0.999),
            max: latencies.max_us(),
        }
    }
}

/// Seconds of threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TimeShares {
    /// At the source: looking for pages of zeros.
    pub scan_seconds: f64,
    /// At the source: compressing.
    pub compress_seconds: f64,
    /// At the source: handing bytes to the wire until it takes them.
    pub send_seconds: f64,
    /// At the source: waiting for confirmations and for each other.
    pub wait_seconds: f64,
    /// At the destination: putting pages into memory.
    pub place_seconds: f64,
    /// How much of that was taking compressed pages apart.
    pub unpack_seconds: f64,
}

/// The most private memory of each process in any run, beyond what it had before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineMemory {
    /// Of the sending one.
    pub source: u64,
    /// Of the receiving one.
    pub destination: u64,
}

/// What an interface carried.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InterfaceRate {
    /// Its name at the source; empty where the address belongs to none.
    pub interface: String,
    /// Connections over it.
    pub channels: usize,
    /// Bytes, headers included.
    pub bytes: u64,
    /// Bytes a second.
    pub bytes_per_second: f64,
    /// Its speed in bits a second, where its driver says it.
    pub speed_bits_per_second: Option<u64>,
}

/// One run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunFigures {
    /// As in the case.
    pub seconds: f64,
    /// As in the case.
    pub bytes_per_second: f64,
    /// As in the case.
    pub source_cpu_seconds: f64,
    /// As in the case.
    pub destination_cpu_seconds: f64,
}

/// What all cases have in common.
pub(super) struct Facts<'a> {
    pub(super) options: &'a BenchOptions,
    pub(super) payload: &'a Payload,
    pub(super) source: &'a Machine,
    pub(super) destination: &'a Machine,
    pub(super) one_machine: bool,
}

impl BenchReport {
    pub(super) fn new(facts: &Facts<'_>, cases: Vec<Case>, skipped: Vec<Skipped>) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            measured_at: (crate::engine::wall_clock() / 1_000_000) as f64 / 1e3,
            source: facts.source.clone(),
            destination: facts.destination.clone(),
            one_machine: facts.one_machine,
            cases,
            skipped,
            comparison: Vec::new(),
            best: None,
        }
    }
}

/// The middle one, or the mean of the two in the middle; 0 of none.
pub(super) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.get(middle) {
        None => 0.0,
        Some(upper) if sorted.len() % 2 == 1 => *upper,
        Some(upper) => (sorted[middle - 1] + upper) / 2.0,
    }
}

impl Case {
    pub(super) fn of(setting: Setting, runs: &[Measured], facts: &Facts<'_>) -> Self {
        let real = |value: fn(&Measured) -> f64| median(runs.iter().map(value));
        let whole = |value: fn(&Measured) -> u64| median(runs.iter().map(|run| value(run) as f64)) as u64;
        let (mut placement, mut barrier) = (Latencies::new(), Latencies::new());
        for run in runs {
            placement.add(&run.times.placement);
            barrier.add(&run.times.barrier);
        }
        let (bytes, wire_bytes) = (whole(|run| run.bytes), whole(|run| run.wire_bytes));
        let seconds = real(|run| run.seconds);
        let per_second = |bytes: u64| if seconds > 0.0 { bytes as f64 / seconds } else { 0.0 };
        let per_gib = |cpu: f64| if bytes > 0 { cpu * GIB / bytes as f64 } else { 0.0 };
        let source_cpu_seconds = real(|run| run.cpu_seconds);
        let destination_cpu_seconds = real(|run| run.received.cpu_seconds);
        let mut case = Self {
            mode: setting.mode,
            channels: setting.channels,
            message_bytes: setting.batch_pages * PAGE_SIZE,
            fill: facts.options.fill.to_string(),
            memory_bytes: facts.payload.memory.layout().total_bytes(),
            in_use_bytes: facts.payload.in_use.len() * PAGE_SIZE,
            warm: facts.options.warm,
            dirty_bytes_per_second: facts.options.dirty_bytes_per_second,
            rounds: whole(|run| u64::from(run.rounds)) as u32,
            bytes,
            zero_bytes: whole(|run| run.zero_bytes),
            wire_bytes,
            seconds,
            bytes_per_second: per_second(bytes),
            wire_bytes_per_second: per_second(wire_bytes),
            source_cpu_seconds,
            destination_cpu_seconds,
            source_cpu_seconds_per_gib: per_gib(source_cpu_seconds),
            destination_cpu_seconds_per_gib: per_gib(destination_cpu_seconds),
            latency_us: LatencyUs::of(&placement),
            barrier_latency_us: LatencyUs::of(&barrier),
            time_split: TimeShares {
                scan_seconds: real(|run| run.times.split.scan.as_secs_f64()),
                compress_seconds: real(|run| run.times.split.compress.as_secs_f64()),
                send_seconds: real(|run| run.times.split.send.as_secs_f64()),
                wait_seconds: real(|run| run.times.split.wait.as_secs_f64()),
                place_seconds: real(|run| run.received.placing_seconds),
                unpack_seconds: real(|run| run.received.unpacking_seconds),
            },
            destination_page_faults: whole(|run| run.received.page_faults),
            engine_memory_bytes: EngineMemory {
                source: runs.iter().map(|run| run.memory_bytes).max().unwrap_or(0),
                destination: runs.iter().map(|run| run.received.memory_bytes).max().unwrap_or(0),
            },
            interfaces: interfaces(runs),
            verified: runs.iter().all(|run| run.verified),
            bottleneck: Bottleneck::Wire,
            bottleneck_reason: String::new(),
            runs: runs.iter().map(RunFigures::of).collect(),
            latency_curve: curve(&placement),
        };
        let figures = Figures {
            case: &case,
            source_cores: facts.source.cores,
            destination_cores: facts.destination.cores,
            one_machine: facts.one_machine,
        };
        (case.bottleneck, case.bottleneck_reason) = verdict::of(&figures);
        case
    }
}

impl RunFigures {
    fn of(run: &Measured) -> Self {
        Self {
            seconds: run.seconds,
            bytes_per_second: if run.seconds > 0.0 { run.bytes as f64 / run.seconds } else { 0.0 },
            source_cpu_seconds: run.cpu_seconds,
            destination_cpu_seconds: run.received.cpu_seconds,
        }
    }
}

/// Of all runs together.
fn interfaces(runs: &[Measured]) -> Vec<InterfaceRate> {
    let Some(first) = runs.first() else { return Vec::new() };
    let rate = |(name, (channels, _)): (&String, &(usize, u64))| {
        let carried = |run: &Measured| run.interfaces.get(name).map_or(0, |(_, bytes)| *bytes) as f64;
        let bytes = median(runs.iter().map(carried));
        InterfaceRate {
            interface: name.clone(),
            channels: *channels,
            bytes: bytes as u64,
            bytes_per_second: median(runs.iter().map(|run| carried(run) / run.seconds.max(1e-9))),
            speed_bits_per_second: crate::host::network::speed_of(name),
        }
    };
    first.interfaces.iter().map(rate).collect()
}

/// Ever nearer to the slowest batch: tenths up to 0.9, then tenths of what is left, as far as there are batches.
fn curve(latencies: &Latencies) -> Vec<(f64, u64)> {
    let mut points = Vec::new();
    let (mut base, mut step) = (0.0, 0.1);
    while (1.0 - base) * latencies.count() as f64 >= 1.0 && step > 1e-6 {
        let parts = (0..9).map(|tenth| base + step * f64::from(tenth));
        points.extend(parts.map(|part| (part, latencies.quantile_us(part))));
        (base, step) = (base + step * 9.0, step / 10.0);
    }
    points
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_median_is_in_the_middle() {
        for (values, expected) in [
            (vec![], 0.0),
            (vec![3.0], 3.0),
            (vec![9.0, 1.0], 5.0),
            (vec![9.0, 1.0, 2.0], 2.0),
            (vec![f64::INFINITY, 1.0, 2.0], 2.0),
        ] {
            assert_eq!(median(values.into_iter()), expected);
        }
    }

    #[test]
    fn a_curve_rises_and_ends_where_no_batch_is_left() {
        let mut latencies = Latencies::new();
        assert!(curve(&latencies).is_empty());
        (1..=500).for_each(|ms| latencies.record(Duration::from_millis(ms)));
        let curve = curve(&latencies);
        assert!(curve.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1), "{curve:?}");
        let last = curve.last().unwrap();
        assert!(last.0 > 0.99 && last.0 < 1.0 && last.1 <= latencies.max_us(), "{curve:?}");
    }
}

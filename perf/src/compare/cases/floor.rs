//! pageferry's tcp mode against the cheapest known way to move the same bytes, both into memory that is populated already.

use super::Setup;
use crate::iperf;
use crate::measure::{CaseResult, Goal, Sample, Way, in_turns};
use crate::memory::at_hand;
use crate::ours::{self, Bench, bench};

pub(super) fn run(setup: &Setup) -> anyhow::Result<CaseResult> {
    let (mut ways, takes) = (Vec::new(), Setup::takes(setup.bytes));
    for channels in [1, 2] {
        for warm in [true, false] {
            let state = if warm { "populated" } else { "fresh" };
            ways.push(Way::new(format!("pageferry {state} {channels}"), takes, move || {
                bench(&Bench {
                    binary: &setup.binary,
                    mode: "tcp",
                    channels,
                    fill: Setup::fill(&setup.random),
                    bytes: setup.bytes,
                    warm,
                    between: None,
                })
            }));
        }
        for way in ["sendfile", "vmsplice"] {
            ways.push(Way::new(format!("floor {way} {channels}"), takes, move || {
                ours::floor(&setup.random, way, channels)
            }));
        }
        for (name, zero_copy) in [("iperf3", false), ("iperf3 -Z", true)] {
            ways.push(Way::new(format!("{name} {channels}"), 64 << 20, move || {
                iperf::run(channels.into(), zero_copy)
            }));
        }
    }
    let sides = in_turns(&ways, setup.runs, at_hand)?;
    let how = "the floor receives into populated memory in huge pages; iperf3 throws away what comes from a buffer that stays \
               in the cache; the number is that of channels";
    let mut result = CaseResult { case: "floor".into(), how: how.into(), sides, ratios: Vec::new() };
    let rate = Sample::gib_per_second;
    let median = |begins: &str| result.best(begins, rate).map(|side| side.median(rate));
    let (warm, fresh, floor) = (median("pageferry populated"), median("pageferry fresh"), median("floor"));
    let (plain, zero_copy) = (median("iperf3 -Z"), median("iperf3"));
    let iperf = plain.into_iter().chain(zero_copy).reduce(f64::max);
    let cpu = |begins: &str| {
        result
            .best(begins, rate)
            .map(|side| side.median(|sample| sample.source_cpu_per_gib() + sample.destination_cpu_per_gib()))
    };
    let (our_cpu, floor_cpu) = (cpu("pageferry populated"), cpu("floor"));
    result.ratio("tcp rate / floor's, populated memory", (warm, floor), Some(Goal::AtLeast(0.95)));
    result.ratio("tcp CPU of both ends / floor's, populated memory", (our_cpu, floor_cpu), None);
    result.ratio("tcp rate, fresh memory / floor's, populated memory", (fresh, floor), None);
    result.ratio("floor's rate / iperf3's best", (floor, iperf), None);
    Ok(result)
}

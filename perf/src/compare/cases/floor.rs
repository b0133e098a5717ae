//! pageferry's tcp mode against the cheapest known way to move the same bytes, both into memory that is populated already.

use super::{PAIRS, Setup, pageferry};
use crate::iperf;
use crate::measure::{CaseResult, Sample, Way, alternating, in_turns};
use crate::ours;
use crate::ratio::Goal;

pub(super) fn run(setup: &Setup) -> anyhow::Result<CaseResult> {
    let (mut ways, takes) = (Vec::new(), Setup::takes(setup.bytes));
    let populated = |channels| pageferry(format!("populated {channels}"), setup.tcp(channels, true));
    for channels in [1, 2] {
        let times = if setup.quick { 1 } else { PAIRS };
        for floor in alternating([None, Some("vmsplice"), Some("sendfile")], times) {
            ways.push(match floor {
                None => populated(channels),
                Some(way) => Way::new(format!("floor {way} {channels}"), takes, move || {
                    ours::floor(&setup.random, way, channels)
                }),
            });
        }
        ways.push(pageferry(format!("fresh {channels}"), setup.tcp(channels, false)));
        for (name, zero_copy) in [("iperf3", false), ("iperf3 -Z", true)] {
            ways.push(Way::new(format!("{name} {channels}"), 64 << 20, move || {
                iperf::run(channels.into(), zero_copy)
            }));
        }
    }
    let sides = in_turns(&ways, setup.runs, |takes| setup.prepare(takes))?;
    let how = "the floor receives into populated memory in huge pages; iperf3 throws away what comes from a buffer that stays \
               in the cache; the number is that of channels";
    let mut result = CaseResult { case: "floor".into(), how: how.into(), sides, ratios: Vec::new() };
    let rate = Sample::gib_per_second;
    let best = |begins: &str| result.best(begins, rate).map(|side| side.figures(rate));
    let (warm, fresh, floor) = (best("pageferry populated"), best("pageferry fresh"), best("floor"));
    let iperf = best("iperf3");
    let cpu = |begins: &str| {
        result
            .best(begins, rate)
            .map(|side| side.figures(|sample| sample.source_cpu_per_gib() + sample.destination_cpu_per_gib()))
    };
    let (our_cpu, floor_cpu) = (cpu("pageferry populated"), cpu("floor"));
    result.ratio("tcp rate / floor's, populated memory", (warm, floor.clone()), Some(Goal::AtLeast(0.95)));
    result.ratio("tcp CPU of both ends / floor's, populated memory", (our_cpu, floor_cpu), None);
    result.ratio("tcp rate, fresh memory / floor's, populated memory", (fresh, floor.clone()), None);
    result.ratio("floor's rate / iperf3's best", (floor, iperf), None);
    Ok(result)
}

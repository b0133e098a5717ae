//! How cost grows: with channels, with memory, and with the part of a large memory that is in use.

use super::{CLOSE_PAIRS, PAIRS, Setup};
use crate::measure::{CaseResult, Sample, Way, alternating, in_turns};
use crate::memory::at_hand;
use crate::ours::{Bench, bench};
use crate::ratio::{Figures, Goal};

/// The large memory whose part in use is varied.
const SPARSE: u64 = 256 << 30;

pub(super) fn run(setup: &Setup) -> anyhow::Result<CaseResult> {
    // Memory of which so much is in use.
    let tcp = |name: &str, channels: u32, fill: String, (bytes, in_use): (u64, u64)| {
        Way::new(name, Setup::takes(in_use), move || {
            bench(&Bench {
                binary: &setup.binary,
                mode: "tcp",
                channels,
                fill: fill.clone(),
                bytes,
                warm: false,
                between: None,
            })
        })
    };
    let (channels, memory, touched): (&[u32], &[u64], &[f64]) = if setup.quick {
        (&[1, 2], &[256 << 20, 1 << 30], &[1.0])
    } else {
        (
            &[1, 2, 3, 4, 6, 8],
            &[256 << 20, 512 << 20, 1 << 30, 2 << 30, 4 << 30, 8 << 30],
            &[0.25, 0.5, 1.0, 2.0, 3.0],
        )
    };
    // The goal's: 1 GiB in use of 256 GiB, in one piece and in pieces of 64 KiB, and a guest of 1 GiB. What the pieces leave behind has
    // no huge pages, and whoever comes after them takes twice the time: hence at the other end.
    let share = 100.0 / 256.0;
    let mut ways = Vec::new();
    let pairs = if setup.quick { 1 } else { CLOSE_PAIRS };
    for is_sparse in alternating([true, false], pairs) {
        ways.push(if is_sparse {
            tcp("1 GiB of 256 GiB, one piece", 2, format!("first:{share}%"), (SPARSE, 1 << 30))
        } else {
            tcp("1 GiB of 1 GiB", 2, "random".into(), (1 << 30, 1 << 30))
        });
    }
    for &channels in channels {
        ways.push(tcp(&format!("channels {channels}"), channels, "random".into(), (2 << 30, 2 << 30)));
    }
    for &bytes in memory {
        ways.push(tcp(&format!("memory {} MiB", bytes >> 20), 2, "random".into(), (bytes, bytes)));
    }
    for &percent in touched {
        let in_use = (SPARSE as f64 * percent / 100.0) as u64;
        ways.push(tcp(&format!("of 256 GiB {percent} %"), 2, format!("sparse:{percent}%"), (SPARSE, in_use)));
    }
    for _ in 0..if setup.quick { 1 } else { PAIRS } {
        ways.push(tcp("1 GiB of 256 GiB, scattered", 2, format!("sparse:{share}%"), (SPARSE, 1 << 30)));
    }
    let sides = in_turns(&ways, setup.runs, at_hand)?;
    let how = "tcp over loopback into fresh memory; rates are of the whole memory, in use or not";
    let mut result = CaseResult { case: "scaling".into(), how: how.into(), sides, ratios: Vec::new() };
    let seconds = |name: &str| result.side(name).map(|side| side.figures(|sample| sample.seconds));
    let dense = seconds("1 GiB of 1 GiB");
    let engine = |name: &str| {
        let side = result.side(name)?;
        let most = side.samples.iter().filter_map(|sample: &Sample| sample.engine_bytes).max();
        most.map(|bytes| Figures::exact(bytes as f64))
    };
    let allowed = (64 << 20) as f64 + SPARSE as f64 / 1e4;
    let held = (engine("1 GiB of 256 GiB, one piece"), Some(Figures::exact(allowed)));
    let one_piece = (seconds("1 GiB of 256 GiB, one piece"), dense.clone());
    let scattered = (seconds("1 GiB of 256 GiB, scattered"), dense);
    let goal = Some(Goal::AtMost(1.2));
    result.ratio("sparse: 1 GiB of 256 GiB, one piece / 1 GiB of 1 GiB", one_piece, goal);
    result.ratio("sparse: 1 GiB of 256 GiB, pieces of 64 KiB / 1 GiB of 1 GiB", scattered, goal);
    result.ratio("256 GiB: engine memory / (64 MiB + 0.01 % of RAM)", held, Some(Goal::AtMost(1.0)));
    Ok(result)
}

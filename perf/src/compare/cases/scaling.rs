//! How cost grows: with channels, with memory, and with the part of a large memory that is in use.

use super::{PAIRS, Setup};
use crate::measure::{CaseResult, Goal, Sample, Way, in_turns};
use crate::memory;
use crate::ours::{Bench, bench};

/// The large memory whose part in use is varied.
const SPARSE: u64 = 256 << 30;

pub(super) fn run(setup: &Setup) -> anyhow::Result<CaseResult> {
    let tcp = |channels: u32, fill: String, bytes: u64| {
        move || {
            bench(&Bench {
                binary: &setup.binary,
                mode: "tcp",
                channels,
                fill: fill.clone(),
                bytes,
                warm: false,
                between: None,
            })
        }
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
    let largest = memory.iter().copied().max().unwrap_or(0);
    // The goal's: 1 GiB in use of 256 GiB, in one piece and in pieces of 64 KiB, and a guest of 1 GiB. What the pieces leave behind has
    // no huge pages, and whoever comes after them takes twice the time: hence at the other end.
    let share = 100.0 / 256.0;
    let mut ways = Vec::new();
    for _ in 0..PAIRS {
        ways.push(Way::new("1 GiB of 256 GiB, one piece", tcp(2, format!("first:{share}%"), SPARSE)));
        ways.push(Way::new("1 GiB of 1 GiB", tcp(2, "random".into(), 1 << 30)));
    }
    for &channels in channels {
        ways.push(Way::new(format!("channels {channels}"), tcp(channels, "random".into(), 2 << 30)));
    }
    for &bytes in memory {
        ways.push(Way::new(format!("memory {} MiB", bytes >> 20), tcp(2, "random".into(), bytes)));
    }
    for &percent in touched {
        let fill = format!("sparse:{percent}%");
        ways.push(Way::new(format!("of 256 GiB {percent} %"), tcp(2, fill, SPARSE)));
    }
    for _ in 0..PAIRS {
        ways.push(Way::new("1 GiB of 256 GiB, scattered", tcp(2, format!("sparse:{share}%"), SPARSE)));
    }
    let sides = in_turns(&ways, setup.runs, || memory::at_hand(largest.max(3 << 30) * 2))?;
    let how = "tcp over loopback into fresh memory; rates are of the whole memory, in use or not";
    let mut result = CaseResult { case: "scaling".into(), how: how.into(), sides, ratios: Vec::new() };
    let seconds = |name: &str| result.side(name).map(|side| side.median(|sample| sample.seconds));
    let dense = seconds("1 GiB of 1 GiB");
    let engine = |name: &str| {
        let side = result.side(name)?;
        side.samples.iter().filter_map(|sample: &Sample| sample.engine_bytes).max().map(|bytes| bytes as f64)
    };
    let allowed = (64 << 20) as f64 + SPARSE as f64 / 1e4;
    let held = (engine("1 GiB of 256 GiB, one piece"), Some(allowed));
    let one_piece = (seconds("1 GiB of 256 GiB, one piece"), dense);
    let scattered = (seconds("1 GiB of 256 GiB, scattered"), dense);
    let goal = Some(Goal::AtMost(1.2));
    result.ratio("sparse: 1 GiB of 256 GiB, one piece / 1 GiB of 1 GiB", one_piece, goal);
    result.ratio("sparse: 1 GiB of 256 GiB, pieces of 64 KiB / 1 GiB of 1 GiB", scattered, goal);
    result.ratio("256 GiB: engine memory / (64 MiB + 0.01 % of RAM)", held, Some(Goal::AtMost(1.0)));
    Ok(result)
}

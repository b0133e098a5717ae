//! Mode rdma and `ib_write_bw`, in turns in a virtual machine with soft-RoCE: `scripts/perf-rdma` measures, this reads what it kept.

use std::process::Command;

use anyhow::{Context, ensure};

use super::Setup;
use crate::measure::{CaseResult, Sample, Side};
use crate::ratio::Goal;

/// A row: MTU, queue pairs, case, program, MiB/s, CPU ms/MiB of both ends.
const COLUMNS: usize = 6;

pub(super) fn run(setup: &Setup) -> anyhow::Result<CaseResult> {
    let results = setup.directory.join("rdma.tsv");
    let mut command = Command::new(setup.root.join("scripts/perf-rdma"));
    command.args(["--runs", &setup.runs.to_string()]).arg("--binary").arg(&setup.binary);
    command.arg("--results").arg(&results);
    if setup.quick {
        command.args(["--mtu", "9000", "--qps", "1", "--cases", "1MiB"]);
    }
    // Its own table is this one's second telling.
    let status = command.stdout(std::process::Stdio::null()).status().context("scripts/perf-rdma")?;
    ensure!(status.success(), "scripts/perf-rdma: {status}");
    of(&std::fs::read_to_string(&results)?)
}

fn of(rows: &str) -> anyhow::Result<CaseResult> {
    let mut sides: Vec<Side> = Vec::new();
    // What is compared, in the order in which it was measured.
    let mut compared: Vec<(String, bool)> = Vec::new();
    for row in rows.lines().skip(1) {
        let columns: Vec<&str> = row.split('\t').collect();
        ensure!(columns.len() == COLUMNS, "a row of {} columns: {row}", columns.len());
        let what = format!("MTU {}, {} queue pairs, {}", columns[0], columns[1], columns[2]);
        let name = format!("{}, {what}", columns[3]);
        let sample = sample(columns[4].parse()?, columns[5].parse()?);
        match sides.iter_mut().find(|side| side.name == name) {
            Some(side) => side.samples.push(sample),
            None => {
                if !compared.iter().any(|(known, _)| *known == what) {
                    compared.push((what, columns[2] == "scattered"));
                }
                sides.push(Side { name, samples: vec![sample] });
            }
        }
    }
    let how = "rdma writes from a device to itself for 5 s; CPU is that of both ends, in the source's column; ib-lists is \
               ib_write_bw with 16 requests in a post";
    let mut result = CaseResult { case: "rdma".into(), how: how.into(), sides, ratios: Vec::new() };
    for (what, scattered) in &compared {
        let rate = |program: &str| {
            result.side(&format!("{program}, {what}")).map(|side| side.figures(Sample::gib_per_second))
        };
        let (ours, plain, lists) = (rate("pageferry"), rate("ib"), rate("ib-lists"));
        let goal = Goal::AtLeast(if *scattered { 0.8 } else { 0.97 });
        result.ratio(&format!("rdma rate / ib_write_bw's, {what}"), (ours.clone(), plain), Some(goal));
        result.ratio(&format!("rdma rate / ib_write_bw's with lists, {what}"), (ours, lists), None);
    }
    Ok(result)
}

/// A second of it.
fn sample(mib_per_second: f64, cpu_ms_per_mib: f64) -> Sample {
    let bytes = (mib_per_second * 1_048_576.0) as u64;
    Sample {
        bytes,
        wire_bytes: bytes,
        seconds: 1.0,
        source_cpu_seconds: mib_per_second * cpu_ms_per_mib / 1e3,
        ..Sample::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_perf_rdma_keeps_becomes_ratios_of_medians() {
        let rows = "mtu\tqps\tcase\tprogram\tmib_per_s\tcpu_ms_per_mib\n\
                    1500\t1\t64KiB\tpageferry\t40\t3\n1500\t1\t64KiB\tib\t20\t20\n1500\t1\t64KiB\tib-lists\t50\t20\n\
                    1500\t1\tscattered\tpageferry\t30\t3\n1500\t1\tscattered\tib\t40\t20\n\
                    1500\t1\t64KiB\tpageferry\t60\t3\n1500\t1\t64KiB\tib\t30\t20\n1500\t1\t64KiB\tib-lists\t50\t20\n";
        let result = of(rows).unwrap();
        let ratios: Vec<_> = result.ratios.iter().map(|ratio| (ratio.value, ratio.goal)).collect();
        let near = |value: f64, expected: f64| (value - expected).abs() < 1e-6;
        assert!(near(ratios[0].0, 2.0) && ratios[0].1 == Some(Goal::AtLeast(0.97)), "{ratios:?}");
        assert!(near(ratios[1].0, 1.0) && ratios[1].1.is_none(), "{ratios:?}");
        assert!(near(ratios[2].0, 0.75) && ratios[2].1 == Some(Goal::AtLeast(0.8)), "{ratios:?}");
        assert_eq!(ratios.len(), 3);
        assert!(near(result.sides[0].samples[0].source_cpu_per_gib(), 3.0 * 1.024), "3 ms for a MiB");
        assert!(of("mtu\nno table\n").is_err());
    }
}

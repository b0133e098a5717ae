//! The one table of ratios, and the figures that they are of.

use std::fmt::Write as _;

use crate::measure::{CaseResult, Goal, Sample};

/// All medians, case by case, and at the end every ratio with its goal.
pub(crate) fn of(results: &[CaseResult]) -> String {
    let mut text = String::new();
    for result in results {
        figures(result, &mut text);
    }
    ratios(results, &mut text);
    text
}

fn figures(result: &CaseResult, text: &mut String) {
    let width = result.sides.iter().map(|side| side.name.chars().count()).max().unwrap_or(0);
    let _ = writeln!(text, "\n{} ({})", result.case, result.how);
    let _ = writeln!(
        text,
        "  {:width$} {:>9} {:>8} {:>12} {:>12} {:>9} {:>5}",
        "", "seconds", "GiB/s", "source", "destination", "wire MiB", "runs"
    );
    for side in &result.sides {
        let _ = write!(
            text,
            "  {:width$} {:>9.3} {:>8.2} {:>8.3} s/GiB {:>6.3} s/GiB {:>9.0} {:>5}",
            side.name,
            side.median(|sample| sample.seconds),
            side.median(Sample::gib_per_second),
            side.median(Sample::source_cpu_per_gib),
            side.median(Sample::destination_cpu_per_gib),
            side.median(|sample| sample.wire_bytes as f64 / 1_048_576.0),
            side.samples.len(),
        );
        let downtime = side.median(|sample| sample.downtime_seconds.unwrap_or(f64::NAN));
        let _ = if downtime.is_nan() {
            writeln!(text)
        } else {
            writeln!(text, "  downtime {:.1} ms", downtime * 1e3)
        };
    }
}

fn ratios(results: &[CaseResult], text: &mut String) {
    let all = || results.iter().flat_map(|result| &result.ratios);
    let width = all().map(|ratio| ratio.what.chars().count()).max().unwrap_or(0);
    let _ = writeln!(text, "\n{:width$} {:>9} {:>10}", "ratio of medians", "value", "goal");
    for ratio in all() {
        let (goal, verdict) = match ratio.goal {
            None => (String::new(), ""),
            Some(goal) => {
                let words = match goal {
                    Goal::AtLeast(least) => format!(">= {least}"),
                    Goal::AtMost(most) => format!("<= {most}"),
                };
                (words, if goal.is_met(ratio.value) { "met" } else { "not met" })
            }
        };
        let line = format!("{:width$} {:>9.3} {goal:>10} {verdict}", ratio.what, ratio.value);
        let _ = writeln!(text, "{}", line.trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::{Ratio, Side};

    #[test]
    fn a_table_says_which_goals_are_met() {
        let sample = Sample {
            bytes: 1 << 30,
            seconds: 0.5,
            source_cpu_seconds: 0.1,
            downtime_seconds: Some(0.0123),
            ..Sample::default()
        };
        let result = CaseResult {
            case: "throughput".into(),
            how: "in turns".into(),
            sides: vec![Side { name: "ours".into(), samples: vec![sample] }],
            ratios: vec![
                Ratio::new("rate", 3.5, Some(Goal::AtLeast(3.0))),
                Ratio::new("CPU", 0.25, Some(Goal::AtMost(0.2))),
                Ratio::new("context", 1.0, None),
            ],
        };
        let text = of(&[result]);
        for expected in [
            "throughput (in turns)",
            "  ours     0.500     2.00    0.100 s/GiB  0.000 s/GiB         0     1  downtime 12.3 ms",
            "rate        3.500       >= 3 met",
            "CPU         0.250     <= 0.2 not met",
            "context     1.000\n",
        ] {
            assert!(text.contains(expected), "{expected}\nis not in\n{text}");
        }
    }
}

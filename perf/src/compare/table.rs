//! The one table of ratios, and the figures that they are of.

use std::fmt::Write as _;

use crate::measure::{CaseResult, Sample};
use crate::ratio::Goal;

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
    let (value, chance, goal) = ("value", "9 in 10 draws", "goal");
    let _ = writeln!(text, "\n{:width$} {value:>9} {chance:>16} {goal:>10}", "ratio of medians");
    for ratio in all() {
        let chance =
            ratio.nine_in_ten.map_or_else(String::new, |[low, high]| format!("{low:.3} to {high:.3}"));
        let goal = match ratio.goal {
            None => String::new(),
            Some(Goal::AtLeast(least)) => format!(">= {least}"),
            Some(Goal::AtMost(most)) => format!("<= {most}"),
        };
        let (what, value, verdict) = (&ratio.what, ratio.value, ratio.verdict());
        let line = format!("{what:width$} {value:>9.3} {chance:>16} {goal:>10} {verdict}");
        let _ = writeln!(text, "{}", line.trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::Side;
    use crate::ratio::{Figures, Ratio};

    #[test]
    fn a_table_says_which_goals_are_met() {
        let sample = Sample {
            bytes: 1 << 30,
            seconds: 0.5,
            source_cpu_seconds: 0.1,
            downtime_seconds: Some(0.0123),
            ..Sample::default()
        };
        let ratio =
            |above: &[f64], goal| Ratio::of("ratio", &Figures(above.to_vec()), &Figures::exact(1.0), goal);
        let result = CaseResult {
            case: "throughput".into(),
            how: "in turns".into(),
            sides: vec![Side { name: "ours".into(), samples: vec![sample] }],
            ratios: vec![
                ratio(&[3.5; 3], Some(Goal::AtLeast(3.0))),
                ratio(&[0.25], Some(Goal::AtMost(0.2))),
                ratio(&[1.0], None),
            ],
        };
        let text = of(&[result]);
        for expected in [
            "throughput (in turns)",
            "  ours     0.500     2.00    0.100 s/GiB  0.000 s/GiB         0     1  downtime 12.3 ms",
            "ratio     3.500   3.500 to 3.500       >= 3 met\n",
            "ratio     0.250                      <= 0.2 not met\n",
            "ratio     1.000\n",
        ] {
            assert!(text.contains(expected), "{expected}\nis not in\n{text}");
        }
    }
}

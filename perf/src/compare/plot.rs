//! The plot of what the cases found: rates side by side, and how time grows with channels, memory, and the part in use.

use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::measure::{CaseResult, Sample};

type Panel<'a, 'b> = &'b DrawingArea<SVGBackend<'a>, Shift>;

/// What draws a panel.
type Draw<'a> = Box<dyn Fn(Panel<'_, '_>) -> anyhow::Result<()> + 'a>;

/// Draws a panel for each case that was measured.
pub(crate) fn draw(results: &[CaseResult]) -> anyhow::Result<String> {
    let mut panels: Vec<Draw<'_>> = Vec::new();
    for result in results {
        if result.case == "scaling" {
            for (begins, title, unit, scale) in [
                ("channels ", "2 GiB, by channels", "", 1.0),
                ("memory ", "By memory, GiB", " MiB", 1.0 / 1024.0),
                ("of 256 GiB ", "256 GiB, by percent in use", " %", 1.0),
            ] {
                let points = points(result, begins, unit, scale);
                panels.push(Box::new(move |area| line(area, title, &points)));
            }
        } else {
            panels.push(Box::new(move |area| bars(area, result)));
        }
    }
    let mut svg = String::new();
    {
        let rows = panels.len().div_ceil(2).max(1);
        let root = SVGBackend::with_string(&mut svg, (1100, 360 * rows as u32)).into_drawing_area();
        root.fill(&WHITE).map_err(|error| anyhow!("{error}"))?;
        for (panel, area) in panels.iter().zip(root.split_evenly((rows, 2))) {
            panel(&area.margin(8, 8, 8, 8))?;
        }
        root.present().map_err(|error| anyhow!("{error}"))?;
    }
    Ok(svg)
}

/// What is varied, and the seconds that it took.
fn points(result: &CaseResult, begins: &str, unit: &str, scale: f64) -> Vec<(f64, f64)> {
    let number = |name: &str| name.strip_prefix(begins)?.strip_suffix(unit)?.parse::<f64>().ok();
    let sides = result.sides.iter();
    let mut points: Vec<(f64, f64)> = sides
        .filter_map(|side| Some((number(&side.name)? * scale, side.median(|sample| sample.seconds))))
        .collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    points
}

fn line(area: Panel<'_, '_>, title: &str, points: &[(f64, f64)]) -> anyhow::Result<()> {
    let most = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).fold(0.1, f64::max) * 1.05;
    let mut chart = ChartBuilder::on(area)
        .caption(format!("{title}: seconds"), ("sans-serif", 16))
        .x_label_area_size(28)
        .y_label_area_size(44)
        .build_cartesian_2d(0.0..most(|point| point.0), 0.0..most(|point| point.1))
        .map_err(|error| anyhow!("{error}"))?;
    let drawn = || -> Result<(), Box<dyn std::error::Error>> {
        chart.configure_mesh().light_line_style(WHITE).draw()?;
        chart.draw_series(LineSeries::new(points.iter().copied(), &BLUE))?;
        chart.draw_series(points.iter().map(|point| Circle::new(*point, 3, BLUE.filled())))?;
        Ok(())
    };
    let mut drawn = drawn;
    drawn().map_err(|error| anyhow!("{error}"))
}

/// The medians of the rates, one bar for each side.
fn bars(area: Panel<'_, '_>, result: &CaseResult) -> anyhow::Result<()> {
    let rates: Vec<f64> = result.sides.iter().map(|side| side.median(Sample::gib_per_second)).collect();
    let most = rates.iter().copied().fold(0.1, f64::max) * 1.05;
    let count = rates.len().max(1) as f64;
    let draw = || -> Result<(), Box<dyn std::error::Error>> {
        let mut chart = ChartBuilder::on(area)
            .caption(format!("{}: GiB/s", result.case), ("sans-serif", 16))
            .x_label_area_size(28)
            .build_cartesian_2d(0.0..most, 0.0..count)?;
        chart.configure_mesh().disable_y_axis().light_line_style(WHITE).disable_y_mesh().draw()?;
        for (index, (side, rate)) in result.sides.iter().zip(&rates).enumerate() {
            // The first on top.
            let bottom = count - index as f64 - 1.0;
            let color = if side.name.starts_with("pageferry") { BLUE.mix(0.5) } else { BLACK.mix(0.25) };
            let bar = Rectangle::new([(0.0, bottom + 0.1), (*rate, bottom + 0.9)], color.filled());
            let label = Text::new(
                format!("{}: {rate:.2}", side.name),
                (most * 0.01, bottom + 0.75),
                ("sans-serif", (9.0 + 60.0 / count).min(14.0)),
            );
            chart.draw_series([bar])?;
            chart.draw_series([label])?;
        }
        Ok(())
    };
    draw().map_err(|error| anyhow!("{error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::Side;

    fn result(case: &str, names: &[&str]) -> CaseResult {
        let sample = Sample { bytes: 1 << 30, seconds: 0.25, ..Sample::default() };
        let side = |name: &&str| Side { name: (*name).into(), samples: vec![sample] };
        CaseResult {
            case: case.into(),
            how: String::new(),
            sides: names.iter().map(side).collect(),
            ratios: Vec::new(),
        }
    }

    #[test]
    fn what_is_varied_is_read_from_the_name() {
        let result =
            result("scaling", &["memory 2048 MiB", "memory 256 MiB", "channels 4", "of 256 GiB 0.5 %"]);
        assert_eq!(points(&result, "memory ", " MiB", 1.0 / 1024.0), [(0.25, 0.25), (2.0, 0.25)]);
        assert_eq!(points(&result, "channels ", "", 1.0), [(4.0, 0.25)]);
        assert_eq!(points(&result, "of 256 GiB ", " %", 1.0), [(0.5, 0.25)]);
    }

    #[test]
    fn a_plot_names_every_side() {
        let results =
            [result("throughput", &["qemu file 1", "pageferry 1"]), result("scaling", &["channels 1"])];
        let svg = draw(&results).unwrap();
        for expected in ["<svg", "qemu file 1: 4.00", "pageferry 1: 4.00", "2 GiB, by channels: seconds"] {
            assert!(svg.contains(expected), "{expected} is missing");
        }
    }
}

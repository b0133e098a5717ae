//! A measurement as one HTML page with plots. It needs no network and no script.

use plotters::element::{Rectangle, Text};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::case::{BenchReport, Case};
use super::text::{name, what};
use crate::host::report_page::document;
use crate::host::report_page::html::{Column, card, escape, figure, table};
use crate::host::report_page::plot::{
    GRID, HEIGHT, OTHER, PlotError, SERIES, svg, text_style, tick, top, unit,
};
use crate::host::view::table::{moment, per_second, seconds};
use crate::units::Bytes;

/// The page.
pub(super) fn page(report: &BenchReport) -> String {
    let title = "How fast memory moves";
    let sub = report.cases.first().map(|case| what(report, case)).unwrap_or_default();
    let mut body = format!(
        "<header>\n<h1>{title}</h1>\n<p class=\"sub\">{}</p>\n<p class=\"sub\">{}</p>\n</header>\n",
        escape(&sub),
        escape(&moment(report.measured_at)),
    );
    for case in report.cases.iter().filter(|case| !case.verified) {
        body.push_str(&format!(
            "<p class=\"box bad\"><b>Damaged:</b> {}: what came is not what was sent.</p>\n",
            escape(&name(case))
        ));
    }
    body.push_str(&card("Rate", "What the placed pages hold, by the second.", &rates(&report.cases)));
    body.push_str(&card("What limits it", "", &verdicts(&report.cases)));
    body.push_str(&card(
        "Processor time for each GiB",
        "Of each end's process, all its threads.",
        &cpu(&report.cases),
    ));
    body.push_str(&card(
        "Latency of placement",
        "From taking a batch to the receipt that covers it: the part of all batches that took at most so long.",
        &latency(&report.cases),
    ));
    body.push_str(&card("Figures", "", &figures(&report.cases)));
    body.push_str(&card("Over the baseline", "1.00 is the same.", &comparison(report)));
    if let Some(best) = &report.best {
        let snippet = format!("<pre>{}</pre>", escape(&best.host_file));
        body.push_str(&card("Best settings", "As a part of a host file.", &snippet));
    }
    let skipped: Vec<Vec<String>> =
        report.skipped.iter().map(|skipped| vec![skipped.mode.to_string(), skipped.reason.clone()]).collect();
    body.push_str(&card("Not measured", "", &table("facts", &[], &skipped)));
    document(title, &body)
}

fn verdicts(cases: &[Case]) -> String {
    let row = |case: &Case| vec![name(case), format!("{}: {}.", case.bottleneck, case.bottleneck_reason)];
    table("facts", &[], &cases.iter().map(row).collect::<Vec<_>>())
}

fn figures(cases: &[Case]) -> String {
    let columns = [
        Column::Text("Case"),
        Column::Figure("Moved"),
        Column::Figure("Took"),
        Column::Figure("Rate"),
        Column::Figure("On the wire"),
        Column::Figure("CPU s/GiB here"),
        Column::Figure("there"),
        Column::Figure("p50"),
        Column::Figure("p99"),
        Column::Figure("max"),
    ];
    let time = |us: u64| seconds(us as f64 / 1e6);
    let row = |case: &Case| {
        vec![
            name(case),
            Bytes(case.bytes).to_string(),
            seconds(case.seconds),
            per_second(case.bytes, case.seconds),
            per_second(case.wire_bytes, case.seconds),
            format!("{:.3}", case.source_cpu_seconds_per_gib),
            format!("{:.3}", case.destination_cpu_seconds_per_gib),
            time(case.latency_us.p50),
            time(case.latency_us.p99),
            time(case.latency_us.max),
        ]
    };
    table("", &columns, &cases.iter().map(row).collect::<Vec<_>>())
}

fn comparison(report: &BenchReport) -> String {
    let ratio = |ratio: Option<f64>| ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
    let rows = report.comparison.iter().map(|case| {
        vec![
            format!("{}, {} x {}", case.mode, case.channels, Bytes(case.message_bytes)),
            ratio(case.bytes_per_second),
            ratio(case.source_cpu_seconds_per_gib),
            ratio(case.destination_cpu_seconds_per_gib),
            ratio(case.latency_p99),
        ]
    });
    let columns = [
        Column::Text("Case"),
        Column::Figure("Rate"),
        Column::Figure("CPU s/GiB here"),
        Column::Figure("there"),
        Column::Figure("p99"),
    ];
    table("", &columns, &rows.collect::<Vec<_>>())
}

/// A bar for each value of each series, in groups.
struct Bars {
    groups: Vec<String>,
    /// Name, and a value for each group where there is one.
    series: Vec<(String, Vec<Option<f64>>)>,
    /// What the groups are.
    by: &'static str,
    unit: String,
}

impl Bars {
    fn figure(&self, says: &str) -> String {
        if self.groups.is_empty() {
            return String::new();
        }
        let entries: Vec<(usize, String)> =
            self.series.iter().enumerate().map(|(index, (name, _))| (index % OTHER, name.clone())).collect();
        self.draw().map(|svg| figure(&svg, says, &entries)).unwrap_or_default()
    }

    fn draw(&self) -> Result<String, PlotError> {
        let values = self.series.iter().flat_map(|(_, values)| values.iter().flatten().copied());
        let largest = top(values) * 1.06;
        let groups = self.groups.len();
        let width = 0.8 / self.series.len().max(1) as f64;
        svg(HEIGHT, |area| {
            let mut chart = ChartBuilder::on(area)
                .margin(8)
                .margin_top(16)
                .margin_right(32)
                .x_label_area_size(44)
                .y_label_area_size(76)
                .build_cartesian_2d(-0.5..groups as f64 - 0.5, 0.0..largest)?;
            let name = |x: &f64| {
                let whole = x.fract() == 0.0 && *x >= 0.0;
                if whole { self.groups.get(*x as usize).cloned().unwrap_or_default() } else { String::new() }
            };
            chart
                .configure_mesh()
                .disable_x_mesh()
                .light_line_style(TRANSPARENT)
                .bold_line_style(GRID)
                .axis_style(GRID)
                .label_style(text_style())
                .x_labels(groups + 1)
                .x_label_formatter(&name)
                .y_labels(5)
                .y_label_formatter(&|y| tick(*y))
                .x_desc(self.by)
                .y_desc(&self.unit)
                .draw()?;
            for (series, (_, values)) in self.series.iter().enumerate() {
                for (group, value) in values.iter().enumerate() {
                    let Some(value) = value else { continue };
                    let from = group as f64 - 0.4 + width * series as f64;
                    let bar = [(from, 0.0), (from + width * 0.92, *value)];
                    chart.draw_series([Rectangle::new(bar, SERIES[series % OTHER].filled())])?;
                    if groups * self.series.len() <= 18 {
                        let style = text_style().pos(Pos::new(HPos::Center, VPos::Bottom));
                        chart.draw_series([Text::new(tick(*value), (from + width * 0.46, *value), style)])?;
                    }
                }
            }
            Ok(())
        })
    }
}

/// By number of channels, and batch where that was varied, a bar for each mode.
fn rates(cases: &[Case]) -> String {
    let one_batch = cases.windows(2).all(|pair| pair[0].message_bytes == pair[1].message_bytes);
    let group = |case: &Case| {
        if one_batch {
            case.channels.to_string()
        } else {
            format!("{} x {}", case.channels, Bytes(case.message_bytes))
        }
    };
    let (mut groups, mut modes): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new());
    for case in cases {
        let (group, mode) = (group(case), case.mode.to_string());
        if !groups.contains(&group) {
            groups.push(group);
        }
        if !modes.contains(&mode) {
            modes.push(mode);
        }
    }
    let by = if one_batch { "channels" } else { "channels and batch" };
    let (unit, worth) = unit(cases.iter().map(|case| case.bytes_per_second).fold(0.0, f64::max));
    let value = |mode: &str, wanted: &str| {
        let case = cases.iter().find(|case| case.mode.name() == mode && group(case) == wanted)?;
        on_axis(case.bytes_per_second / worth)
    };
    let series = modes.into_iter().map(|mode| {
        let values = groups.iter().map(|group| value(&mode, group)).collect();
        (mode, values)
    });
    let bars = Bars { series: series.collect(), groups: groups.clone(), by, unit: format!("{unit}/s") };

    bars.figure("Rate by channels and mode")
}

fn cpu(cases: &[Case]) -> String {
    let series = |end: &str, of: fn(&Case) -> f64| {
        (end.to_owned(), cases.iter().map(|case| on_axis(of(case))).collect::<Vec<_>>())
    };
    let series = [
        series("source", |case| case.source_cpu_seconds_per_gib),
        series("destination", |case| case.destination_cpu_seconds_per_gib),
    ];
    let group = |case: &Case| format!("{} x{}", case.mode, case.channels);
    let bars = Bars {
        series: series.into(),
        groups: cases.iter().map(group).collect(),
        by: "mode and channels",
        unit: "CPU seconds a GiB".to_owned(),
    };
    bars.figure("Processor time for each GiB, by case")
}

/// A number that an axis can end with.
fn on_axis(value: f64) -> Option<f64> {
    (0.0..1e15).contains(&value).then_some(value)
}

fn latency(cases: &[Case]) -> String {
    // Beyond the colours that there are, lines could not be told apart.
    let shown: Vec<&Case> = cases.iter().filter(|case| case.latency_curve.len() > 1).take(OTHER).collect();
    if shown.is_empty() {
        return String::new();
    }
    let entries: Vec<(usize, String)> =
        shown.iter().enumerate().map(|(index, case)| (index, name(case))).collect();
    let drawn = draw_latency(&shown);
    drawn.map(|svg| figure(&svg, "Latency of placement by percentile", &entries)).unwrap_or_default()
}

/// Percentiles by how many nines they have, so that the slowest batches have room.
fn draw_latency(cases: &[&Case]) -> Result<String, PlotError> {
    let nines = |part: f64| -(1.0 - part.clamp(0.0, 0.999_999)).log10();
    let points = |case: &Case| -> Vec<(f64, f64)> {
        let points = case.latency_curve.iter().filter(|(part, _)| (0.0..1.0).contains(part));
        points.map(|(part, us)| (nines(*part), (*us).clamp(1, 3_600_000_000) as f64)).collect()
    };
    let all: Vec<(f64, f64)> = cases.iter().flat_map(|case| points(case)).collect();
    let right = all.iter().map(|(x, _)| *x).fold(1.0, f64::max).ceil();
    let highest = all.iter().map(|(_, y)| *y).fold(10.0, f64::max) * 1.5;
    let lowest = (all.iter().map(|(_, y)| *y).fold(highest, f64::min) / 1.5).max(1.0);
    svg(HEIGHT, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .margin_top(16)
            .margin_right(48)
            .x_label_area_size(44)
            .y_label_area_size(76)
            .build_cartesian_2d(0.0..right, (lowest..highest).log_scale())?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(GRID)
            .label_style(text_style())
            .x_labels(right as usize + 1)
            .x_label_formatter(&|x| percentile(*x))
            .y_labels(5)
            .y_label_formatter(&|y| seconds(*y / 1e6))
            .x_desc("part of the batches")
            .draw()?;
        for (index, case) in cases.iter().enumerate() {
            chart.draw_series(LineSeries::new(points(case), SERIES[index % OTHER].stroke_width(2)))?;
        }
        Ok(())
    })
}

fn percentile(nines: f64) -> String {
    if nines.fract() != 0.0 {
        return String::new();
    }
    match nines as usize {
        0 => "0 %".to_owned(),
        1 => "90 %".to_owned(),
        2 => "99 %".to_owned(),
        more => format!("99.{} %", "9".repeat(more - 2)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::bench::Machine;
    use crate::host::bench::verdict::tests::case;
    use crate::session::TransferMode;

    fn report(cases: Vec<Case>) -> BenchReport {
        BenchReport {
            version: "0".to_owned(),
            measured_at: 1.8e9,
            source: Machine { cores: 2, cpu: "<b>fast</b>".to_owned(), kernel: String::new() },
            destination: Machine::default(),
            one_machine: true,
            cases,
            skipped: Vec::new(),
            comparison: Vec::new(),
            best: None,
        }
    }

    #[test]
    fn the_page_has_a_plot_of_each_kind_and_nothing_from_outside() {
        let curve = vec![(0.0, 90), (0.5, 100), (0.9, 200), (0.99, 300)];
        let tcp = Case { latency_curve: curve.clone(), ..case() };
        let packed = Case { mode: TransferMode::Compression, channels: 1, latency_curve: curve, ..case() };
        let page = page(&report(vec![tcp, packed]));
        assert_eq!(page.matches("<svg ").count(), 3);
        for words in ["tcp, 2 channels", "compression, 1 channel", "&lt;b&gt;fast", "99 %", "limits"] {
            assert!(page.contains(words), "{words}");
        }
        // The name of SVG itself, which nothing fetches.
        let page = page.replace("http://www.w3.org/2000/svg", "");
        assert!(!page.contains("<b>fast") && !page.contains("://") && !page.contains("<script"));
    }

    #[test]
    fn strange_figures_make_a_page_too() {
        let curve = vec![(0.0, 0), (2.0, u64::MAX), (0.5, u64::MAX)];
        let strange = Case {
            bytes_per_second: f64::INFINITY,
            seconds: 0.0,
            verified: false,
            latency_curve: curve,
            ..case()
        };
        assert!(page(&report(vec![strange])).contains("Damaged"));
        assert!(page(&report(Vec::new())).contains("</html>"));
    }
}

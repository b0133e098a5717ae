//! The plots of a migration. Each is nothing where there is nothing to show.

use std::collections::BTreeSet;

use plotters::element::{Rectangle, Text};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::html::figure;
use super::plot::{GRID, HEIGHT, INK, LIMIT, OTHER, PlotError, SERIES, svg, text_style, tick, top, unit};
use crate::host::api::migration::{Migration, RoundInfo, Sample};
use crate::host::view::table::seconds;
use crate::layout::MAX_BYTES;
use crate::units::PAGE_SIZE;

/// The most rounds for which every bar carries its number.
const NUMBERED_ROUNDS: usize = 9;
/// A dirtied set that is that much smaller than the largest would not be seen beside it.
const LOG_FROM: f64 = 40.0;
/// Some thirty years in seconds. What a damaged record says beyond that goes on no axis: on one without an end, the library's
/// search for round numbers has none either.
const LONGEST: f64 = 1e9;
/// The same for pages: those of the largest guest.
const MOST_PAGES: f64 = (MAX_BYTES / PAGE_SIZE) as f64;

/// Pages sent and dirtied in each round.
pub(super) fn rounds(migration: &Migration) -> String {
    let rounds = &migration.rounds;
    if rounds.is_empty() {
        return String::new();
    }
    let entries = [(0, "sent in the round".to_owned()), (1, "written by the guest meanwhile".to_owned())];
    let drawn = draw_rounds(rounds);
    drawn.map(|svg| figure(&svg, "Pages sent and written in each round", &entries)).unwrap_or_default()
}

fn draw_rounds(rounds: &[RoundInfo]) -> Result<String, PlotError> {
    let pages = rounds.iter().flat_map(|round| [round.pages, round.dirtied]).map(on_axis);
    let largest = pages.clone().fold(1.0, f64::max);
    let smallest = pages.filter(|pages| *pages > 0.0).fold(largest, f64::min);
    let logarithmic = largest / smallest >= LOG_FROM;
    let x = -0.5..rounds.len() as f64 - 0.5;
    svg(HEIGHT, |area| {
        let mut builder = ChartBuilder::on(area);
        builder.margin(8).margin_top(16).margin_right(32).x_label_area_size(44).y_label_area_size(76);
        // The two kinds of axis are two types, so what is drawn on them is a macro.
        macro_rules! draw {
            ($y:expr, $floor:expr, $name:expr) => {{
                let floor: f64 = $floor;
                let mut chart = builder.build_cartesian_2d(x, $y)?;
                chart
                    .configure_mesh()
                    .disable_x_mesh()
                    .light_line_style(TRANSPARENT)
                    .bold_line_style(GRID)
                    .axis_style(GRID)
                    .label_style(text_style())
                    .x_labels(rounds.len().min(24) + 1)
                    .x_label_formatter(&|x| if x.fract() == 0.0 { tick(*x) } else { String::new() })
                    .y_labels(5)
                    .y_label_formatter(&|y| tick(*y))
                    .x_desc("round")
                    .y_desc($name)
                    .draw()?;
                for (index, round) in rounds.iter().enumerate() {
                    for (series, pages) in [round.pages, round.dirtied].into_iter().enumerate() {
                        let from = index as f64 - 0.36 + 0.37 * series as f64;
                        let value = on_axis(pages).max(floor);
                        let bar = [(from, floor), (from + 0.35, value)];
                        chart.draw_series([Rectangle::new(bar, SERIES[series].filled())])?;
                        if rounds.len() <= NUMBERED_ROUNDS {
                            let style = text_style().pos(Pos::new(HPos::Center, VPos::Bottom));
                            chart.draw_series([Text::new(
                                tick(pages as f64),
                                (from + 0.175, value),
                                style,
                            )])?;
                        }
                    }
                }
                Ok(())
            }};
        }
        if logarithmic {
            draw!((1.0..largest * 2.5).log_scale(), 1.0, "pages (logarithmic)")
        } else {
            draw!(0.0..largest * 1.12, 0.0, "pages")
        }
    })
}

fn on_axis(pages: u64) -> f64 {
    (pages as f64).min(MOST_PAGES)
}

/// What each interface carried over time.
pub(super) fn rates(migration: &Migration) -> String {
    let samples = usable(&migration.samples);
    let names: BTreeSet<&str> =
        samples.iter().flat_map(|sample| sample.rates.keys().map(String::as_str)).collect();
    if samples.len() < 2 || names.is_empty() {
        return String::new();
    }
    let names: Vec<&str> = names.into_iter().collect();
    let entries: Vec<(usize, String)> = names
        .iter()
        .enumerate()
        .map(|(index, name)| {
            let name = if name.is_empty() { "no interface of this host" } else { name };
            (index % OTHER, name.to_owned())
        })
        .collect();
    let drawn = draw_rates(&samples, &names);
    drawn.map(|svg| figure(&svg, "Rate of each interface over time", &entries)).unwrap_or_default()
}

fn draw_rates(samples: &[&Sample], names: &[&str]) -> Result<String, PlotError> {
    let largest = top(samples.iter().flat_map(|sample| sample.rates.values().map(|rate| *rate as f64)));
    let (unit, worth) = unit(largest);
    svg(HEIGHT, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .margin_top(16)
            .margin_right(32)
            .x_label_area_size(44)
            .y_label_area_size(76)
            .build_cartesian_2d(span(samples), 0.0..largest / worth)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(GRID)
            .label_style(text_style())
            .y_labels(6)
            .x_label_formatter(&|x| tick(*x))
            .y_label_formatter(&|y| tick(*y))
            .x_desc("seconds since it began")
            .y_desc(format!("{unit}/s"))
            .draw()?;
        for (index, name) in names.iter().enumerate() {
            let rate = |sample: &Sample| sample.rates.get(*name).copied().unwrap_or(0) as f64 / worth;
            let line = samples.iter().map(|sample| (sample.at, rate(sample)));
            chart.draw_series(LineSeries::new(line, SERIES[index % OTHER].stroke_width(2)))?;
        }
        Ok(())
    })
}

/// The phases in the order in which a migration goes through them; one that is not known comes last.
const PHASES: [&str; 7] =
    ["pre-copy", "stop-and-copy", "set-up", "handover", "in-doubt", "roll-back", "finished"];

fn phase_colour(phase: &str) -> usize {
    PHASES.iter().position(|known| *known == phase).unwrap_or(OTHER)
}

/// What was left of each round over time, coloured by phase.
pub(super) fn remaining(migration: &Migration) -> String {
    let samples = usable(&migration.samples);
    if samples.len() < 2 || samples.iter().all(|sample| sample.remaining_bytes == 0) {
        return String::new();
    }
    let mut entries: Vec<(usize, String)> = Vec::new();
    for sample in &samples {
        let entry = (phase_colour(&sample.phase), sample.phase.clone());
        if !entries.contains(&entry) {
            entries.push(entry);
        }
    }
    let drawn = draw_remaining(&samples);
    drawn.map(|svg| figure(&svg, "What was left of each round over time", &entries)).unwrap_or_default()
}

fn draw_remaining(samples: &[&Sample]) -> Result<String, PlotError> {
    let largest = top(samples.iter().map(|sample| sample.remaining_bytes as f64));
    let (unit, worth) = unit(largest);
    let points: Vec<(f64, f64)> =
        samples.iter().map(|sample| (sample.at, sample.remaining_bytes as f64 / worth)).collect();
    svg(HEIGHT, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .margin_top(16)
            .margin_right(32)
            .x_label_area_size(44)
            .y_label_area_size(76)
            .build_cartesian_2d(span(samples), 0.0..largest / worth)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(GRID)
            .label_style(text_style())
            .y_labels(6)
            .x_label_formatter(&|x| tick(*x))
            .y_label_formatter(&|y| tick(*y))
            .x_desc("seconds since it began")
            .y_desc(unit)
            .draw()?;
        let mut from = 0;
        while from + 1 < samples.len() {
            // A phase lasts until the first sample of the next.
            let same =
                samples[from..].iter().take_while(|sample| sample.phase == samples[from].phase).count();
            let to = (from + same).min(samples.len() - 1);
            let colour = SERIES[phase_colour(&samples[from].phase)];
            let part = points[from..=to].iter().copied();
            chart.draw_series(
                AreaSeries::new(part, 0.0, colour.mix(0.18)).border_style(colour.stroke_width(2)),
            )?;
            from = to;
        }
        Ok(())
    })
}

/// What the downtime went into, as one bar against the limit.
pub(super) fn downtime(migration: &Migration) -> String {
    let mut parts: Vec<(usize, String, f64)> = Vec::new();
    for part in migration.downtime_parts.iter().filter(|part| (1e-9..LONGEST).contains(&part.seconds)) {
        parts.push((parts.len() % OTHER, part.name.clone(), part.seconds));
    }
    if parts.is_empty() {
        return String::new();
    }
    let known: f64 = parts.iter().map(|(_, _, seconds)| seconds).sum();
    // The parts are measured by the source's clock, the whole by both.
    let downtime = migration.downtime_seconds.filter(|downtime| (0.0..LONGEST).contains(downtime));
    let rest = downtime.map_or(0.0, |downtime| downtime - known);
    if rest > known * 0.01 {
        parts.push((OTHER, "not seen by the source".to_owned(), rest));
    }
    let whole: f64 = parts.iter().map(|(_, _, seconds)| seconds).sum();
    let entry = |(colour, name, took): &(usize, String, f64)| {
        (*colour, format!("{name}: {} ({:.0} %)", seconds(*took), took / whole * 100.0))
    };
    let entries: Vec<(usize, String)> = parts.iter().map(entry).collect();
    let drawn = draw_downtime(&parts, whole, migration.downtime_limit_seconds);
    drawn.map(|svg| figure(&svg, "What the downtime went into", &entries)).unwrap_or_default()
}

fn draw_downtime(parts: &[(usize, String, f64)], whole: f64, limit: f64) -> Result<String, PlotError> {
    let limit = if (0.0..LONGEST).contains(&limit) { limit } else { 0.0 };
    // A limit far beyond what was needed would squeeze the bar.
    let shown_limit = limit <= whole * 4.0;
    let largest = top([whole, if shown_limit { limit } else { 0.0 }].into_iter());
    let (unit, worth) = if largest >= 2.0 { ("s", 1.0) } else { ("ms", 1e-3) };
    svg(132, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .margin_right(32)
            .x_label_area_size(44)
            .build_cartesian_2d(0.0..largest / worth, 0.0..1.0)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(GRID)
            .label_style(text_style())
            .x_labels(8)
            .x_label_formatter(&|x| tick(*x))
            .x_desc(format!("{unit} since the guest's last instruction at the source"))
            .draw()?;
        let mut from = 0.0;
        for (colour, _, took) in parts {
            let to = from + took / worth;
            chart.draw_series([Rectangle::new([(from, 0.12), (to, 0.62)], SERIES[*colour].filled())])?;
            from = to;
        }
        if shown_limit && limit > 0.0 {
            let x = limit / worth;
            let line = PathElement::new([(x, 0.0), (x, 0.74)], LIMIT.stroke_width(2));
            chart.draw_series([line])?;
            let style = text_style().color(&LIMIT).pos(Pos::new(HPos::Right, VPos::Bottom));
            chart.draw_series([Text::new(format!("limit {}", seconds(limit)), (x, 0.78), style)])?;
        }
        let style = text_style().color(&INK).pos(Pos::new(HPos::Left, VPos::Bottom));
        chart.draw_series([Text::new(seconds(whole), (0.0, 0.66), style)])?;
        Ok(())
    })
}

/// Those that can be put on an axis.
fn usable(samples: &[Sample]) -> Vec<&Sample> {
    samples.iter().filter(|sample| (0.0..LONGEST).contains(&sample.at)).collect()
}

fn span(samples: &[&Sample]) -> std::ops::Range<f64> {
    // From the beginning, and long enough to have round numbers in it.
    0.0..samples.iter().map(|sample| sample.at).fold(0.1, f64::max)
}

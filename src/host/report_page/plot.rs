//! What the plots have in common: size, colours, axes, units.
//!
//! A plot is SVG inside the page. Its colours are those of a light page; the page's style gives each its dark counterpart,
//! so that a plot that is taken out of the page still has colours.

use plotters::coord::Shift;
use plotters::prelude::*;

/// Wide enough for a page of 980 pixels; the browser scales it.
pub(in crate::host) const WIDTH: u32 = 920;
/// A plot with a vertical axis.
pub(in crate::host) const HEIGHT: u32 = 280;

/// The colours of the series on a light page, `--s0` to `--s7` of the style. The last is for what belongs to no series.
pub(in crate::host) const SERIES: [RGBColor; 8] = [
    RGBColor(0x2a, 0x6f, 0xdb),
    RGBColor(0xd9, 0x6c, 0x06),
    RGBColor(0x12, 0x90, 0x6b),
    RGBColor(0xb8, 0x36, 0x8c),
    RGBColor(0x7a, 0x56, 0xe0),
    RGBColor(0xa8, 0x79, 0x00),
    RGBColor(0x0e, 0x8f, 0xa3),
    RGBColor(0x8c, 0x8f, 0x96),
];
/// For what belongs to no series.
pub(in crate::host) const OTHER: usize = SERIES.len() - 1;

pub(in crate::host) const INK: RGBColor = RGBColor(0x5a, 0x65, 0x73);
pub(in crate::host) const GRID: RGBColor = RGBColor(0xe1, 0xe5, 0xea);
pub(in crate::host) const LIMIT: RGBColor = RGBColor(0xb3, 0x26, 0x1e);

/// The style that gives every colour of a plot the page's own, which differs between light and dark.
pub(in crate::host) fn style() -> String {
    let series = SERIES.iter().enumerate().map(|(index, colour)| (*colour, format!("--s{index}")));
    let others = [(INK, "--soft"), (GRID, "--line"), (LIMIT, "--bad")];
    let others = others.into_iter().map(|(colour, name)| (colour, name.to_owned()));
    let rule = |(RGBColor(red, green, blue), name): (RGBColor, String)| {
        let colour = format!("#{red:02X}{green:02X}{blue:02X}");
        format!(
            "svg [fill=\"{colour}\"]{{fill:var({name})}}svg [stroke=\"{colour}\"]{{stroke:var({name})}}\n"
        )
    };
    series.chain(others).map(rule).collect()
}

/// The area of a plot.
pub(in crate::host) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// Why a plot cannot be drawn. Into a string it always can; the library's type says otherwise.
pub(in crate::host) type PlotError = DrawingAreaErrorKind<std::io::Error>;

/// An SVG image.
pub(in crate::host) fn svg(
    height: u32,
    draw: impl FnOnce(&Area<'_>) -> Result<(), PlotError>,
) -> Result<String, PlotError> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, (WIDTH, height)).into_drawing_area();
        draw(&area)?;
        area.present()?;
    }
    Ok(text)
}

/// The style of texts in a plot.
pub(in crate::host) fn text_style() -> TextStyle<'static> {
    // The library divides by 1.24.
    ("sans-serif", 16).into_font().color(&INK)
}

/// A binary unit in which the largest of some sizes has few digits, and what it is worth in bytes.
pub(in crate::host) fn unit(largest: f64) -> (&'static str, f64) {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut worth = 1.0;
    let mut index = 0;
    while largest / worth >= 1024.0 && index + 1 < UNITS.len() {
        worth *= 1024.0;
        index += 1;
    }
    (UNITS[index], worth)
}

/// A number at an axis: no more digits than it needs, thousands and millions by their letters.
pub(in crate::host) fn tick(value: f64) -> String {
    let (value, letter) = match value.abs() {
        size if size >= 1e9 => (value / 1e9, " G"),
        size if size >= 1e6 => (value / 1e6, " M"),
        size if size >= 1e4 => (value / 1e3, " k"),
        _ => (value, ""),
    };
    let text = format!("{value:.2}");
    format!("{}{letter}", text.trim_end_matches('0').trim_end_matches('.'))
}

/// A little above the largest value, so that nothing touches the edge; never 0, since an axis needs some length.
pub(in crate::host) fn top(values: impl Iterator<Item = f64>) -> f64 {
    let largest = values.filter(|value| value.is_finite()).fold(0.0, f64::max);
    if largest > 0.0 { largest * 1.08 } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_short_numbers() {
        for (value, text) in [
            (0.0, "0"),
            (0.25, "0.25"),
            (100.0, "100"),
            (20_000.0, "20 k"),
            (1_500_000.0, "1.5 M"),
            (3e9, "3 G"),
        ] {
            assert_eq!(tick(value), text);
        }
        assert_eq!(unit(1.0), ("B", 1.0));
        assert_eq!(unit(3.5 * 1024.0 * 1024.0 * 1024.0), ("GiB", 1024.0 * 1024.0 * 1024.0));
        assert_eq!(unit(f64::INFINITY).0, "PiB");
        assert_eq!(top([f64::NAN, 0.0].into_iter()), 1.0);
    }

    #[test]
    fn the_style_has_the_colours_of_the_plots() {
        let style = include_str!("style.css");
        for (index, RGBColor(red, green, blue)) in SERIES.into_iter().enumerate() {
            let colour = format!("--s{index}: #{red:02x}{green:02x}{blue:02x}");
            assert!(style.contains(&colour), "{colour}");
        }
    }
}

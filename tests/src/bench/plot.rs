//! Series as a picture.

use anyhow::{Context as _, anyhow};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

use super::report::Series;

const SIZE: (u32, u32) = (760, 400);
const FONT: &str = "sans-serif";

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// All series of one plot as an SVG; heading and labels are the first one's.
///
/// # Errors
///
/// No series, or none with a point.
pub(super) fn svg(series: &[&Series]) -> anyhow::Result<String> {
    let first = *series.first().context("a plot without series")?;
    let points = || series.iter().flat_map(|series| &series.points);
    let least = points().map(|(x, _)| *x).fold(f64::INFINITY, f64::min);
    let most = points().map(|(x, _)| *x).fold(f64::NEG_INFINITY, f64::max);
    let top = points().map(|(_, y)| *y).fold(0.0, f64::max) * 1.15;
    anyhow::ensure!(least.is_finite() && most.is_finite() && top.is_finite(), "{}: no points", first.plot);
    // One point alone would make an axis of no length.
    let most = if most > least { most } else { least + least.abs().max(1.0) };
    let top = if top > 0.0 { top } else { 1.0 };
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        let drawn = if first.logarithmic && least > 0.0 {
            draw(&area, (least..most).log_scale(), top, first, series)
        } else {
            draw(&area, least..most, top, first, series)
        };
        drawn.map_err(|error| anyhow!("{}: {error}", first.plot))?;
        area.present().map_err(|error| anyhow!("{}: {error}", first.plot))?;
    }
    Ok(text)
}

fn draw<X>(area: &Area, x: X, top: f64, first: &Series, series: &[&Series]) -> Result<(), String>
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: ValueFormatter<f64>,
{
    let text = |error: DrawingAreaErrorKind<_>| error.to_string();
    area.fill(&WHITE).map_err(text)?;
    let mut chart = ChartBuilder::on(area)
        .caption(&first.title, (FONT, 17))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(x, 0.0..top)
        .map_err(text)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc(&first.x_label)
        .y_desc(&first.unit)
        .x_label_formatter(&|x| number(*x))
        .y_label_formatter(&|y| number(*y))
        .label_style((FONT, 13))
        .draw()
        .map_err(text)?;
    for (i, line) in series.iter().enumerate() {
        let color = Palette99::pick(i).to_rgba();
        let style = color.stroke_width(2);
        chart
            .draw_series(LineSeries::new(line.points.iter().copied(), style))
            .map_err(text)?
            .label(&line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        chart
            .draw_series(line.points.iter().map(|point| Circle::new(*point, 3, color.filled())))
            .map_err(text)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .label_font((FONT, 13))
        .draw()
        .map_err(text)
}

/// `1 k`, `64 k`, `4 M`; powers of two are what flows come in.
fn number(value: f64) -> String {
    let binary = |unit: f64| (value / unit).fract() == 0.0 && value >= unit;
    match value {
        v if v >= 1_048_576.0 && binary(1_048_576.0) => format!("{} M", v / 1_048_576.0),
        v if (1024.0..1e6).contains(&v) && binary(1024.0) => format!("{} k", v / 1024.0),
        v if v >= 1e6 => format!("{:.1} M", v / 1e6).replace(".0", ""),
        v if v >= 10_000.0 => format!("{:.1} k", v / 1e3).replace(".0", ""),
        v if v.fract() == 0.0 => format!("{v:.0}"),
        v => format!("{v:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(name: &str, logarithmic: bool, points: &[(f64, f64)]) -> Series {
        Series {
            plot: "growth".to_owned(),
            title: "It grows".to_owned(),
            name: name.to_owned(),
            x_label: "live flows".to_owned(),
            unit: "ns".to_owned(),
            logarithmic,
            points: points.to_vec(),
        }
    }

    #[test]
    fn a_plot_has_its_title_and_the_names_of_all_its_lines() {
        let two = [
            series("hot", true, &[(1024.0, 70.0), (65_536.0, 90.0)]),
            series("random", true, &[(1024.0, 80.0)]),
        ];
        let svg = svg(&two.each_ref()).expect("it can be drawn");
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        assert!(["It grows", "hot", "random", "live flows"].iter().all(|word| svg.contains(word)), "{svg}");
    }

    #[test]
    fn a_single_point_and_zeroes_can_be_drawn_and_nothing_cannot() {
        assert!(svg(&[&series("one", true, &[(0.0, 0.0)])]).is_ok());
        assert!(svg(&[&series("one", false, &[(7.0, 0.5)])]).is_ok());
        assert!(svg(&[&series("none", true, &[])]).is_err());
        assert!(svg(&[]).is_err());
    }

    #[test]
    fn numbers_of_flows_are_short() {
        assert_eq!(
            [1024.0, 65_536.0, 4_194_304.0, 100.0, 0.5].map(number),
            ["1 k", "64 k", "4 M", "100", "0.50"]
        );
    }
}

//! Line charts as inline SVG; colours are the page's (`report.css`).

use std::fmt::Write;

/// One line of a chart.
pub struct Series {
    /// What the legend says.
    pub label: String,
    /// (step, value), finite, in order.
    pub points: Vec<(f64, f64)>,
    /// Drawn faint with a running mean over it, as batches are; otherwise with dots.
    pub noisy: bool,
}

const WIDTH: f64 = 360.0;
const HEIGHT: f64 = 190.0;
const LEFT: f64 = 48.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 28.0;
/// Points of a line that are drawn; of more, means of neighbours.
const MAX_POINTS: usize = 400;
/// The largest number of ticks of an axis.
const TICKS: usize = 5;

/// From numbers to places in the picture.
struct Axes {
    x: (f64, f64),
    y: (f64, f64),
}

impl Axes {
    fn around(series: &[Series]) -> Self {
        let points = || series.iter().flat_map(|s| &s.points);
        let range = |values: &mut dyn Iterator<Item = f64>| {
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)))
        };
        let x = range(&mut points().map(|p| p.0));
        let (low, high) = range(&mut points().map(|p| p.1));
        // a constant gets room around it
        let room = if high > low { 0.06 * (high - low) } else { (0.1 * high.abs()).max(1e-9) };
        Self { x: (x.0, x.1.max(x.0 + 1.0)), y: (low - room, high + room) }
    }
    fn left(&self, x: f64) -> f64 {
        LEFT + (x - self.x.0) / (self.x.1 - self.x.0) * (WIDTH - LEFT - RIGHT)
    }
    fn top(&self, y: f64) -> f64 {
        HEIGHT - BOTTOM - (y - self.y.0) / (self.y.1 - self.y.0) * (HEIGHT - TOP - BOTTOM)
    }
    fn path(&self, points: &[(f64, f64)]) -> String {
        let places = points.iter().map(|(x, y)| format!("{:.1},{:.1}", self.left(*x), self.top(*y)));
        places.collect::<Vec<_>>().join(" ")
    }
}

/// The chart of some series, each with at least one point.
pub fn chart(series: &[Series]) -> String {
    let axes = Axes::around(series);
    let mut svg = format!(r#"<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">"#);
    for value in ticks(axes.y) {
        let y = axes.top(value);
        let _ = write!(
            svg,
            r#"<line class="grid" x1="{LEFT}" x2="{}" y1="{y:.1}" y2="{y:.1}"/><text x="{}" y="{:.1}" text-anchor="end">{}</text>"#,
            WIDTH - RIGHT,
            LEFT - 6.0,
            y + 4.0,
            tick_text(value)
        );
    }
    for value in ticks(axes.x).into_iter().filter(|value| value.fract() == 0.0) {
        let x = axes.left(value);
        let _ = write!(svg, r#"<text x="{x:.1}" y="{}" text-anchor="middle">{value}</text>"#, HEIGHT - 8.0);
    }
    for (number, series) in series.iter().enumerate() {
        let points = thinned(&series.points);
        let class = format!("s{}", number % 4);
        if series.noisy && points.len() > 2 {
            let smooth = running_mean(&points);
            let _ = write!(svg, r#"<polyline class="{class} raw" points="{}"/>"#, axes.path(&points));
            let _ = write!(svg, r#"<polyline class="{class}" points="{}"/>"#, axes.path(&smooth));
        } else {
            let _ = write!(svg, r#"<polyline class="{class}" points="{}"/>"#, axes.path(&points));
            for (x, y) in &points {
                let (cx, cy) = (axes.left(*x), axes.top(*y));
                let _ = write!(
                    svg,
                    r#"<circle class="{class}" cx="{cx:.1}" cy="{cy:.1}" r="3"><title>step {x}: {}</title></circle>"#,
                    short(*y)
                );
            }
        }
    }
    svg + "</svg>"
}

/// A number with four significant digits, without zeros at its end.
pub fn short(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return format!("{value}");
    }
    let magnitude = value.abs().log10().floor() as i32;
    if !(-4..6).contains(&magnitude) {
        return format!("{value:.2e}");
    }
    let text = format!("{value:.*}", (3 - magnitude).max(0) as usize);
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// `45 s`, `3.5 min`, `2.1 h`.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 10.0 => format!("{s:.1} s"),
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.1} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

fn tick_text(value: f64) -> String {
    if value.abs() >= 1e5 || (value != 0.0 && value.abs() < 1e-3) {
        let text = format!("{value:.2e}");
        let (digits, power) = text.split_once('e').unwrap_or((&text, "0"));
        return format!("{}e{power}", digits.trim_end_matches('0').trim_end_matches('.'));
    }
    // ticks are whole multiples of 1, 2 or 5 of some power of ten: what is left is rounding
    format!("{}", (value * 1e6).round() / 1e6)
}

/// Round numbers inside a range.
fn ticks((low, high): (f64, f64)) -> Vec<f64> {
    let rough = (high - low) / TICKS as f64;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|k| k * power).into_iter().find(|step| *step >= rough).unwrap_or(rough);
    let first = (low / step).ceil(); // not a number where the range is too narrow for steps: then nothing is inside
    (0..=TICKS).map(|i| (first + i as f64) * step).take_while(|value| *value <= high).collect()
}

/// Means of neighbours, so that a long line does not make a long file.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let size = points.len().div_ceil(MAX_POINTS).max(1);
    points.chunks(size).map(mean).collect()
}

/// The mean of up to 15 points, or of a tenth of the line, that ends at each point.
fn running_mean(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let width = (points.len() / 10).clamp(3, 15);
    let ends = 1..=points.len();
    ends.map(|end| (points[end - 1].0, mean(&points[end.saturating_sub(width)..end]).1)).collect()
}

fn mean(points: &[(f64, f64)]) -> (f64, f64) {
    let n = points.len() as f64;
    let sum = points.iter().fold((0.0, 0.0), |sum, p| (sum.0 + p.0, sum.1 + p.1));
    (sum.0 / n, sum.1 / n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks((0.0, 10.0)), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(
            ticks((-0.13, 0.31)).into_iter().map(tick_text).collect::<Vec<_>>(),
            ["-0.1", "0", "0.1", "0.2", "0.3"]
        );
        for (low, high) in [(1e-9, 3e-9), (-5e7, 1.0), (0.7, 0.7001)] {
            let found = ticks((low, high));
            assert!((2..=6).contains(&found.len()) && found.iter().all(|v| (low..=high).contains(v)), "{found:?}");
        }
        for range in [(0.0, 5e-324), (1e-320, 1e-320 + 5e-324), (3.0, 3.0)] {
            assert_eq!(ticks(range), [0.0; 0], "{range:?}");
        }
    }

    #[test]
    fn numbers_are_short() {
        let cases =
            [(0.718_26, "0.7183"), (-2.381, "-2.381"), (150.0, "150"), (1e-5, "1.00e-5"), (0.0, "0"), (12.3, "12.3")];
        for (value, text) in cases {
            assert_eq!(short(value), text);
        }
    }

    #[test]
    fn every_point_lies_in_the_picture() {
        let line = |values: &[f64], noisy| Series {
            label: String::new(),
            points: (0..).zip(values).map(|(i, v)| (f64::from(i), *v)).collect(),
            noisy,
        };
        let many: Vec<f64> = (0..5000).map(|i| (f64::from(i) * 0.01).sin()).collect();
        for series in [
            vec![line(&[3.0], false)],
            vec![line(&[1.0, 1.0, 1.0], true)],
            vec![line(&many, true), line(&[9.0], false)],
        ] {
            let svg = chart(&series);
            assert!(!svg.contains("NaN") && svg.len() < 40_000, "{}", svg.len());
            for points in svg.split("points=\"").skip(1).map(|rest| rest.split('"').next().unwrap()) {
                for point in points.split(' ') {
                    let (x, y) = point.split_once(',').unwrap();
                    assert!(
                        (0.0..=WIDTH).contains(&x.parse().unwrap()) && (0.0..=HEIGHT).contains(&y.parse().unwrap())
                    );
                }
            }
        }
    }
}

//! `report.html` of a run: one file with everything in it, for a browser without a network.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::chart::{Series, chart, duration, short};
use super::metrics::{Metrics, names};
use crate::config::Config;

/// What the page is made from.
pub struct Contents<'a> {
    /// The run's folder.
    pub dir: &'a Path,
    /// The run's config.
    pub config: &'a Config,
    /// The file that it is in.
    pub config_file: &'a Path,
    /// What was measured.
    pub metrics: &'a Metrics,
    /// The steps that have a sample grid, in order, and their pictures.
    pub grids: &'a [(usize, PathBuf)],
    /// The process' resident memory at its peak, in bytes, where the system tells it.
    pub resident_peak: Option<f64>,
}

/// Everything that was measured under one name.
struct Metric<'a> {
    key: &'a str,
    points: Vec<(f64, f64)>,
}

impl Metric<'_> {
    fn base(&self) -> &str {
        names::base(self.key)
    }
    fn group(&self) -> &str {
        names::group(self.key)
    }
    fn is_batches(&self) -> bool {
        names::is_of_batches(self.key)
    }
    fn is_constant(&self) -> bool {
        self.points.len() > 1 && self.points.iter().all(|point| point.1 == self.points[0].1)
    }
    fn first(&self) -> f64 {
        self.points[0].1
    }
    fn last(&self) -> f64 {
        self.points[self.points.len() - 1].1
    }
}

/// What has curves: spreads are left out.
fn shown(metrics: &Metrics) -> Vec<Metric<'_>> {
    let metrics = metrics.all().filter(|(key, _)| !names::is_spread(key));
    let points = |points: &[(usize, f64)]| points.iter().map(|(step, value)| (*step as f64, *value)).collect();
    metrics.map(|(key, values)| Metric { key, points: points(values) }).collect()
}

/// The page, as HTML.
///
/// # Errors
/// A picture cannot be read.
pub fn page(contents: &Contents) -> Result<String> {
    let Contents { dir, config, metrics, .. } = contents;
    let done = metrics.history(names::LOSS).last().map_or(0, |(step, _)| *step);
    let metrics = shown(metrics);
    let title = escape(&dir.display().to_string());
    let steps = config.train.steps;
    let share = 100.0 * done as f64 / steps.max(1) as f64;
    let mut html = format!(
        r#"<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title><style>
{}</style></head><body>
<h1>{title}</h1>
<p class="soft">{} · optimizer step {done} of {steps}</p>
<div class="bar"><div style="width:{share:.1}%"></div></div>
"#,
        include_str!("report.css"),
        escape(&config.model.path)
    );
    html += &tiles(&metrics, config, contents.resident_peak);
    html += &charts(&metrics);
    html += &grids(contents.grids)?;
    let _ = write!(
        html,
        r#"<h2>Make it again</h2><div class="card"><pre>{}</pre></div>
<p class="soft">With alignprop {}, in the folder that the run was started in: paths in the config are relative to it.</p>
<h2>Settings</h2><div class="card"><details><summary>config.toml, with every default</summary><pre>{}</pre></details></div>
</body></html>
"#,
        escape(&reproduce(dir, contents.config_file)),
        env!("CARGO_PKG_VERSION"),
        escape(&config.to_toml()?)
    );
    Ok(html)
}

/// The command that makes the same run in another folder.
fn reproduce(dir: &Path, config_file: &Path) -> String {
    let quoted = |text: String| {
        let plain = text.chars().all(|c| c.is_alphanumeric() || "/._-+=:,@".contains(c));
        if plain { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
    };
    let again = format!("run.dir={}-again", dir.display());
    format!("alignprop train --config {} --set {}", quoted(config_file.display().to_string()), quoted(again))
}

/// What the run came to, in a few numbers.
fn tiles(metrics: &[Metric], config: &Config, resident_peak: Option<f64>) -> String {
    let mut tiles = Vec::new();
    let mut tile = |name: &str, value: String, note: String| {
        tiles.push(format!(
            r#"<div class="card tile"><span class="soft">{}</span><b>{value}</b><span class="soft">{}</span></div>"#,
            escape(name),
            escape(&note)
        ));
    };
    let judged = metrics.iter().filter(|m| !m.is_batches() && m.points.len() > 1);
    for metric in judged {
        let change = metric.last() - metric.first();
        let sign = if change >= 0.0 { "+" } else { "−" };
        tile(
            metric.key,
            short(metric.last()),
            format!("{sign}{} since step {}", short(change.abs()), metric.points[0].0),
        );
    }
    if let Some(seconds) = metrics.iter().find(|m| m.key == names::SECONDS) {
        let total: f64 = seconds.points.iter().map(|p| p.1).sum();
        let mean = total / seconds.points.len() as f64;
        let images = config.train.batch_size * config.train.gradient_accumulation_steps;
        tile("training time", duration(total), format!("{} a step of {images} images", duration(mean)));
    }
    if let Some(peak) = resident_peak {
        tile("peak memory", format!("{:.0} MiB", peak / f64::from(1 << 20)), "of this session's process".to_owned());
    }
    format!(r#"<div class="tiles">{}</div>"#, tiles.concat())
}

/// A chart for every name: a reward in training batches, on samples and held out shares one.
fn charts(metrics: &[Metric]) -> String {
    let mut bases: Vec<&str> = Vec::new();
    // rewards first, then what is measured on samples and held-out prompts, then the rest
    for rank in 0..3 {
        let of_rank = |m: &&Metric| match m.group() {
            "reward" => rank == 0,
            "" => rank == 2,
            _ => rank == 1,
        };
        for base in metrics.iter().filter(of_rank).map(Metric::base) {
            if !bases.contains(&base) {
                bases.push(base);
            }
        }
    }
    if bases.is_empty() {
        return r#"<p class="soft">Nothing is measured yet.</p>"#.to_owned();
    }
    // a level line says no more than its number
    let level = |base: &&str| metrics.iter().filter(|m| m.base() == *base).all(Metric::is_constant);
    let (levels, curves): (Vec<&str>, Vec<&str>) = bases.into_iter().partition(level);
    let cards: String = curves.into_iter().map(|base| chart_card(base, metrics)).collect();
    let constants: Vec<String> = metrics
        .iter()
        .filter(|m| levels.contains(&m.base()))
        .map(|m| format!("{} {}", escape(m.key), short(m.first())))
        .collect();
    let note = if constants.is_empty() { String::new() } else { format!(" Constant: {}.", constants.join(", ")) };
    format!(r#"<h2>Curves</h2><p class="soft">Against optimizer steps.{note}</p><div class="charts">{cards}</div>"#)
}

fn chart_card(base: &str, metrics: &[Metric]) -> String {
    let (batches, others): (Vec<&Metric>, Vec<&Metric>) =
        metrics.iter().filter(|metric| metric.base() == base).partition(|metric| metric.is_batches());
    let series: Vec<Series> = batches
        .into_iter()
        .chain(others)
        .map(|metric| Series {
            label: match metric.group() {
                "" | "reward" => "training batches, and their running mean".to_owned(),
                "sample" => "samples: fixed prompts and noise".to_owned(),
                other => other.to_owned(),
            },
            points: metric.points.clone(),
            noisy: metric.is_batches(),
        })
        .collect();
    let legend = if series.len() == 1 && series[0].noisy {
        String::new()
    } else {
        let entries = series.iter().enumerate();
        entries.map(|(i, s)| format!(r#"<span><i class="s{}"></i>{}</span>"#, i % 4, escape(&s.label))).collect()
    };
    format!(r#"<div class="card"><h3>{}</h3><p class="legend">{legend}</p>{}</div>"#, escape(base), chart(&series))
}

/// The first and the last sample grid.
fn grids(grids: &[(usize, PathBuf)]) -> Result<String> {
    let shown = match grids {
        [] => return Ok(String::new()),
        [only] => vec![only],
        [first, .., last] => vec![first, last],
    };
    let mut cards = String::new();
    for (step, path) in shown {
        let png = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        let name = if *step == 0 { "Before: step 0".to_owned() } else { format!("After: step {step}") };
        let _ = write!(
            cards,
            r#"<div class="card"><h3>{name}</h3><div class="scroll"><img alt="samples of step {step}" src="data:image/png;base64,{}"></div></div>"#,
            base64(&png)
        );
    }
    Ok(format!(r#"<h2>Samples</h2><p class="soft">The same prompts and noise.</p><div class="grids">{cards}</div>"#))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let group = (0..3).fold(0, |group, i| group << 8 | u32::from(chunk.get(i).copied().unwrap_or(0)));
        for i in 0..4 {
            let letter = LETTERS[(group >> (18 - 6 * i) & 63) as usize];
            text.push(if i <= chunk.len() { char::from(letter) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_standard() {
        // RFC 4648, 10
        let cases =
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("foobar", "Zm9vYmFy")];
        for (text, expected) in cases {
            assert_eq!(base64(text.as_bytes()), expected);
        }
        assert_eq!(base64(&[0xff, 0xfe, 0xfd]), "//79");
    }

    #[test]
    fn the_page_holds_every_metric_and_escapes_what_users_wrote() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("a <b> & 'c'");
        let config = Config::parse("prompts.list = ['<script>']", "test", &[]).unwrap();
        std::fs::create_dir(&dir).unwrap();
        let mut metrics = Metrics::read(&dir.join("metrics.jsonl")).unwrap();
        let page = |metrics: &Metrics, grids: &[(usize, PathBuf)]| {
            let (config, config_file) = (&config, &dir.join("config.toml"));
            let resident_peak = Some(3e6);
            super::page(&Contents { dir: &dir, config, config_file, metrics, grids, resident_peak }).unwrap()
        };
        assert!(page(&metrics, &[]).contains("Nothing is measured yet"));

        for step in 0..4 {
            let line = serde_json::json!({ "step": step, "loss": 0.5 - f64::from(step), "reward/hps": 0.1 * f64::from(step), "reward/hps_std": 0.1,
                "guard/held_out": 0.2 + f64::from(step), "lr": 0.001, "sample/hps": 0.3, "seconds": 30.0, "cause": "text" });
            metrics.append(line.as_object().unwrap()).unwrap();
        }
        let picture = dir.join("step-000000.png");
        image::RgbImage::new(2, 2).save(&picture).unwrap();
        let page = page(&metrics, &[(0, picture)]);
        for part in [
            "<h3>hps</h3>",
            "<h3>loss</h3>",
            "Constant: lr 0.001, seconds 30",
            "<h3>held_out</h3>",
            "samples: fixed",
            "step 3 of 100",
            "2.0 min",
            "3 MiB",
            "-again'",
            "data:image/png;base64,iVBOR",
        ] {
            assert!(page.contains(part), "{part}");
        }
        assert!(page.contains("a &lt;b&gt; &amp; 'c'") && page.contains("&lt;script&gt;"));
        assert!(
            !page.contains("<script") && !page.contains("hps_std") && !page.contains("http"),
            "it needs no network"
        );
    }
}

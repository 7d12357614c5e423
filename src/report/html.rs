//! `report.html` of a run: one file with everything in it, for a browser without a network.

use std::fmt::Write;
use std::path::Path;

use anyhow::Result;
use image::codecs::jpeg::JpegEncoder;

use super::chart::{Series, chart, duration, short};
use super::metrics::{Metrics, names};
use super::samples::{Pairs, Sample};
use super::summary::{Summary, summary};
use crate::config::{Config, shell_word};

/// Pairs on the page.
const MAX_PAIRS: usize = 24;
/// Bytes of a picture that is put on the page as it is; larger ones are JPEGs there.
const LARGE: usize = 96 << 10;
/// Seconds after which the page of a run that goes on loads itself again.
const RELOAD: u32 = 10;

/// How far the run is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    Training,
    Finished,
    /// Before its last step, with the reason.
    Stopped(String),
}

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
    pub status: &'a Status,
    /// Samples before and after.
    pub pairs: &'a Pairs,
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
/// The config cannot be shown: a path in it is not Unicode.
pub fn page(contents: &Contents) -> Result<String> {
    let Contents { dir, config, metrics, status, pairs, .. } = contents;
    let dir_name = dir.display().to_string();
    let found = summary(config, metrics, pairs, &dir_name);
    let done = metrics.history(names::LOSS).last().map_or(0, |(step, _)| *step);
    let (title, steps) = (escape(&dir_name), config.train.steps);
    let share = 100.0 * done as f64 / steps.max(1) as f64;
    let (going_on, said) = match status {
        Status::Training => {
            let seconds: Vec<f64> = metrics.history(names::SECONDS).iter().map(|(_, seconds)| *seconds).collect();
            let left = seconds.iter().sum::<f64>() / seconds.len().max(1) as f64 * steps.saturating_sub(done) as f64;
            let left = if seconds.is_empty() { String::new() } else { format!(", about {} left", duration(left)) };
            (true, format!("Training{left}; this page loads itself again"))
        }
        Status::Finished => (false, "Finished".to_owned()),
        Status::Stopped(reason) => (false, format!("Stopped: {reason}")),
    };
    let reload = if going_on { format!(r#"<meta http-equiv="refresh" content="{RELOAD}">"#) } else { String::new() };
    let metrics = shown(metrics);
    let mut html = format!(
        r#"<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">{reload}
<title>{title}</title><style>
{}</style></head><body>
<h1>{title}</h1>
<p class="soft">{} · optimizer step {done} of {steps} · {}</p>
<div class="bar"><div style="width:{share:.1}%"></div></div>
"#,
        include_str!("report.css"),
        escape(&config.model.path),
        escape(&said)
    );
    html += &words(&found, going_on);
    html += &side_by_side(pairs, &config.reward.weights());
    html += &charts(&metrics);
    html += &tiles(&metrics, config, contents.resident_peak);
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
    let again = format!("run.dir={}-again", dir.display());
    format!("alignprop train --config {} --set {}", shell_word(&config_file.display().to_string()), shell_word(&again))
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

/// What happened, in words, and what to do next.
fn words(Summary { findings, next }: &Summary, going_on: bool) -> String {
    if findings.is_empty() {
        return String::new();
    }
    let title = if going_on { "What happened so far" } else { "What happened" };
    let sentences: String = findings.iter().map(|text| format!("<p>{}</p>", escape(text))).collect();
    let mut html = format!(r#"<h2>{title}</h2><div class="card words">{sentences}"#);
    if !going_on {
        let _ = write!(html, r#"<p>Next: {}.</p><pre>{}</pre>"#, escape(&next.0), escape(&next.1));
    }
    html + "</div>"
}

/// Pictures before and after with their prompts, those first whose rewards changed most.
fn side_by_side(pairs: &Pairs, weights: &[(&str, f64)]) -> String {
    let Pairs { steps, pairs } = pairs;
    let Some((_, after)) = pairs.first() else { return String::new() };
    let change = |(before, after): &(Sample, Option<Sample>)| {
        let score =
            |sample: &Sample| weights.iter().map(|(name, w)| w * sample.scores.get(*name).unwrap_or(&0.0)).sum::<f64>();
        after.as_ref().map_or(0.0, |after| (score(after) - score(before)).abs())
    };
    let mut sorted: Vec<_> = pairs.iter().collect();
    sorted.sort_by(|one, other| change(other).total_cmp(&change(one)));
    let (title, mut note) = match after {
        Some(_) => (
            "Before and after",
            format!(
                "The same prompts and noise at step {} and at step {}, the largest changes first.",
                steps.0, steps.1
            ),
        ),
        None => ("Before", "Samples of the model that the run began with.".to_owned()),
    };
    if sorted.len() > MAX_PAIRS {
        note += &format!(" {MAX_PAIRS} of {}.", sorted.len());
    }
    let mut html = format!(r#"<h2>{title}</h2><p class="soft">{note}</p><div class="pairs">"#);
    for (before, after) in sorted.into_iter().take(MAX_PAIRS) {
        let mut figures = figure(before, "before", steps.0);
        figures += &after.as_ref().map_or(String::new(), |after| figure(after, "after", steps.1));
        let scores: String = before
            .scores
            .iter()
            .map(|(name, from)| {
                let to = after.as_ref().and_then(|after| after.scores.get(name));
                let to = to.map_or(String::new(), |to| format!(" → {} ({:+.3})", short(*to), to - from));
                format!("<p>{} {}{to}</p>", escape(name), short(*from))
            })
            .collect();
        let _ = write!(
            html,
            r#"<div class="card"><h3>{}</h3><div class="pair">{figures}</div><div class="soft">{scores}</div></div>"#,
            escape(&before.prompt)
        );
    }
    html + "</div>"
}

/// A picture; one that cannot be read leaves a gap, for the run goes on without it.
fn figure(sample: &Sample, name: &str, step: usize) -> String {
    let read = || -> Result<_> {
        let png = std::fs::read(&sample.picture)?;
        if png.len() <= LARGE {
            return Ok(("png", png));
        }
        let mut jpeg = Vec::new();
        image::load_from_memory(&png)?.to_rgb8().write_with_encoder(JpegEncoder::new_with_quality(&mut jpeg, 90))?;
        Ok(("jpeg", jpeg))
    };
    let Ok((kind, bytes)) = read() else {
        return format!(r#"<figure><figcaption class="soft">{name}: no picture</figcaption></figure>"#);
    };
    // of few pixels each is to be seen
    let is_small = image::image_dimensions(&sample.picture).is_ok_and(|(width, _)| width < 256);
    let class = if is_small { r#" class="small""# } else { "" };
    format!(
        r#"<figure><img{class} alt="{} at step {step}" src="data:image/{kind};base64,{}"><figcaption class="soft">{name}</figcaption></figure>"#,
        escape(&sample.prompt),
        base64(&bytes)
    )
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
        let config = Config::parse("prompts.list = ['<script>']\nreward.hps = {}", "test", &[]).unwrap();
        std::fs::create_dir(&dir).unwrap();
        let mut metrics = Metrics::read(&dir.join("metrics.jsonl")).unwrap();
        let page = |metrics: &Metrics, pairs: &Pairs, status: &Status| {
            let (config, config_file) = (&config, &dir.join("config.toml"));
            let resident_peak = Some(3e6);
            super::page(&Contents { dir: &dir, config, config_file, metrics, status, pairs, resident_peak }).unwrap()
        };
        assert!(page(&metrics, &Pairs::default(), &Status::Training).contains("Nothing is measured yet"));

        for step in 0..4 {
            let line = serde_json::json!({ "step": step, "loss": 0.5 - f64::from(step), "reward/hps": 0.1 * f64::from(step), "reward/hps_std": 0.1,
                "guard/held_out": 0.2 + f64::from(step), "lr": 0.001, "sample/hps": 0.3, "seconds": 30.0, "cause": "text" });
            metrics.append(line.as_object().unwrap()).unwrap();
        }
        // a small picture as it is, a large one as a JPEG
        let random = |seed: u32| {
            let mixed = (seed ^ seed >> 15).wrapping_mul(0x9E37_79B9);
            ((mixed ^ mixed >> 13).wrapping_mul(0x85EB_CA6B) >> 24) as u8
        };
        let noise = image::RgbImage::from_fn(300, 300, |x, y| {
            image::Rgb([0, 1, 2].map(|channel| random((300 * x + y) * 3 + channel)))
        });
        let sample = |hps: f64, name: &str, picture: &image::RgbImage| {
            picture.save(dir.join(name)).unwrap();
            Sample { prompt: format!("<b>{name}"), scores: [("hps".to_owned(), hps)].into(), picture: dir.join(name) }
        };
        let small = image::RgbImage::new(2, 2);
        let pairs = vec![
            (sample(0.1, "little.png", &small), Some(sample(0.2, "b.png", &small))),
            (sample(0.1, "much.png", &small), Some(sample(-0.7, "d.png", &noise))),
        ];
        let mut pairs = Pairs { steps: (0, 3), pairs };
        let going_on = page(&metrics, &pairs, &Status::Training);
        assert!(
            going_on.contains(r#"http-equiv="refresh""#)
                && going_on.contains("about 48.5 min left")
                && !going_on.contains("Next:")
        );
        let page = page(&metrics, &pairs, &Status::Stopped("by <me>".to_owned()));
        assert!(page.find("&lt;b&gt;much.png") < page.find("&lt;b&gt;little.png"), "the largest change first");
        assert!(!page.contains("refresh") && page.contains("hps 0.1 → -0.7 (-0.800)"));
        pairs.pairs[0].0.picture = dir.join("gone.png");
        assert!(super::side_by_side(&pairs, &[("hps", 1.0)]).contains("before: no picture"));
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
            "data:image/jpeg;base64,/9j/",
            "Stopped: by &lt;me&gt;",
            "Next: ",
            "held-out score, which is not trained, rose: from 0.2000 at step 0 to 3.2000 at step 3",
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

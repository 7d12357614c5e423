//! `alignprop fit`: a head on a CLIP's image tower from opinions of pictures.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value as Json, json};

use super::experiment::{DEFAULTS, compute_of, config_of};
use crate::cli::FitArgs;
use crate::config::{AestheticConfig, HeadLayer, Preprocess, shown};
use crate::files::{check_writable, located, make_folder_of, save_tensors};
use crate::fit::{Choice, Data, Learnt, Matrix, Measure, Opinions, near_duplicates};
use crate::models::Weights;
use crate::pictures::{self, FILE, Picture, Row, Rows};
use crate::rewards::{Embedder, HeadFile, aesthetic_scores};

/// What lists of choices call the better picture, the worse one, and whether neither was better.
const BETTER: [&str; 4] = ["better", "chosen", "preferred", "winner"];
const WORSE: [&str; 3] = ["worse", "rejected", "loser"];
const DRAW: [&str; 3] = ["draw", "equal", "tie"];

pub fn run(args: &FitArgs) -> Result<()> {
    check_writable(&args.output)?; // before there is work to lose
    args.embeddings.iter().try_for_each(|file| check_writable(file))?;
    let config = config_of(args.config.config.as_deref(), &args.settings(), DEFAULTS)?;
    let asked = Asked::read(args)?;
    let compute = compute_of(&config.run)?.with_rewards_in(config.run.reward_precision)?;
    let clip = whole(&args.clip)?;
    let vectors = vectors(args, &clip, &asked.files, || Embedder::load(&args.clip, args.preprocess, &compute))?;
    let asked = asked.only(|row| vectors[row].is_some());
    let vectors: Vec<Vec<f32>> = vectors.into_iter().flatten().collect();
    ensure!(!vectors.is_empty(), "none of the pictures could be read");
    let width = vectors[0].len();
    let embeddings = Matrix::new(vectors.concat().into_iter().map(f64::from).collect(), width)?;

    let (groups, cosine) = near_duplicates(&embeddings);
    let alike = groups.len() - groups.iter().collect::<BTreeSet<_>>().len();
    let described = asked.describe();
    let data = Data::new(embeddings, asked.opinions, &groups, args.seed)?;
    let learnt = data.learn(args.lambda)?;
    let how = if args.lambda.is_some() { "as given" } else { "by cross-validation" };
    say!("opinions    {described}");
    if alike > 0 {
        say!(
            "alike       {alike} pictures are near-duplicates of others (cosine {cosine} and more), and are kept with them"
        );
    }
    say!("penalty     lambda = {:e}, {how}", learnt.lambda);
    say!(
        "held out    {} {}, on {} {}",
        asked.kind.measure,
        shown_measure(&learnt.held_out),
        learnt.held_out.count,
        asked.kind.unseen
    );
    say!("chance      {:.3}", learnt.chance);
    let compared = config.reward.aesthetic.unwrap_or_default();
    match beside(&compared, args, &data, &vectors) {
        Ok(measure) => say!(
            "LAION       {} {} on the same, by {}",
            asked.kind.measure,
            shown_measure(&measure),
            shown(&compared.head)
        ),
        Err(why) => note!("not compared with the LAION head: {why:#}"),
    }
    let curve: Vec<String> = learnt.curve.iter().map(|(n, value)| format!("{n}: {value:.3}")).collect();
    say!("learning    {} ({} learnt from: {})", curve.join(", "), asked.kind.unit, asked.kind.measure);
    if let Some(twice) = learnt.twice {
        say!("twice       about {twice:.3} is what this curve says of twice as many");
    }

    let said = HeadFile { clip, preprocess: args.preprocess, layers: vec![HeadLayer::Linear("head".into())] };
    save(&args.output, &said, &learnt, asked.kind, args.lambda.is_none())?;
    say!(
        "head        {}: [reward.clip-head] head = {}",
        args.output.display(),
        Json::from(args.output.display().to_string())
    );
    Ok(())
}

/// How a kind of opinions is fitted and measured.
#[derive(Clone, Copy)]
struct Kind {
    name: &'static str,
    unit: &'static str,
    measure: &'static str,
    /// What `count` pictures or choices are, of which a measure is.
    unseen: &'static str,
}

/// Files, and what is known of them by their place among them.
struct Asked {
    files: Vec<PathBuf>,
    opinions: Opinions,
    kind: Kind,
}

impl Asked {
    fn read(args: &FitArgs) -> Result<Self> {
        let mut files = Files::default();
        let (kind, opinions) = if let Some(list) = &args.scores {
            ("ridge", Opinions::Scores(scores(list, &args.column, &mut files)?))
        } else if let Some(list) = &args.choices {
            ("choices", Opinions::Choices(choices(list, &mut files)?))
        } else {
            let mut labels = Vec::new();
            for (paths, liked) in [(&args.like, true), (&args.dislike, false)] {
                for Picture { file, .. } in pictures::collect(paths)? {
                    let place = files.place(file);
                    labels.resize(files.all.len(), liked);
                    ensure!(
                        labels[place] == liked,
                        "{} is both in --like and in --dislike",
                        files.all[place].display()
                    );
                }
            }
            ("logistic", Opinions::Labels(labels))
        };
        let (pictures, choices) =
            ("pictures that were not learnt from", "choices between pictures that were not learnt from");
        let (unit, measure, unseen) = match opinions {
            Opinions::Scores(_) => ("pictures", "rank correlation", pictures),
            Opinions::Labels(_) => ("pictures", "accuracy", pictures),
            Opinions::Choices(_) => ("choices", "accuracy", choices),
        };
        Ok(Self { files: files.all, opinions, kind: Kind { name: kind, unit, measure, unseen } })
    }

    /// Without the files, and what is said of them, for which `keep` does not hold.
    fn only(self, keep: impl Fn(usize) -> bool) -> Self {
        let mut places = Vec::with_capacity(self.files.len());
        let mut next = 0;
        for row in 0..self.files.len() {
            places.push(keep(row).then_some(next));
            next += usize::from(keep(row));
        }
        let kept = |row: usize| places[row].is_some();
        let opinions = match self.opinions {
            Opinions::Scores(scores) => Opinions::Scores(filtered(scores, kept)),
            Opinions::Labels(labels) => Opinions::Labels(filtered(labels, kept)),
            Opinions::Choices(choices) => {
                let moved = |Choice { better, worse, draw }: Choice| {
                    Some(Choice { better: places[better]?, worse: places[worse]?, draw })
                };
                Opinions::Choices(choices.into_iter().filter_map(moved).collect())
            }
        };
        Self { files: filtered(self.files, kept), opinions, kind: self.kind }
    }

    fn describe(&self) -> String {
        let pictures = self.files.len();
        match &self.opinions {
            Opinions::Scores(_) => format!("scores of {pictures} pictures"),
            Opinions::Labels(labels) => {
                let liked = labels.iter().filter(|liked| **liked).count();
                format!("{liked} pictures that are liked and {} that are not", pictures - liked)
            }
            Opinions::Choices(choices) => {
                let draws = choices.iter().filter(|choice| choice.draw).count();
                format!("{} choices between {pictures} pictures, {draws} of them draws", choices.len())
            }
        }
    }
}

fn filtered<T>(values: Vec<T>, keep: impl Fn(usize) -> bool) -> Vec<T> {
    values.into_iter().enumerate().filter(|(row, _)| keep(*row)).map(|(_, value)| value).collect()
}

/// Files, each once.
#[derive(Default)]
struct Files {
    all: Vec<PathBuf>,
    places: HashMap<PathBuf, usize>,
}

impl Files {
    fn place(&mut self, file: PathBuf) -> usize {
        let all = &mut self.all;
        *self.places.entry(file).or_insert_with_key(|file| {
            all.push(file.clone());
            all.len() - 1
        })
    }
}

/// The scores of a list; of a picture that is there more than once, their mean.
fn scores(list: &Path, column: &str, files: &mut Files) -> Result<Vec<f64>> {
    let rows = Rows::read(list, &FILE)?;
    let mut sums: Vec<(f64, f64)> = Vec::new();
    for row in &rows.rows {
        let score = row.number(&[column]).with_context(|| rows.at(row))?;
        let score = score.with_context(|| format!("{} has no `{column}`; --column names another", rows.at(row)))?;
        let place = files.place(rows.located(text(&rows, row, &FILE)?));
        sums.resize(files.all.len(), (0.0, 0.0));
        sums[place] = (sums[place].0 + score, sums[place].1 + 1.0);
    }
    Ok(sums.into_iter().map(|(sum, count)| sum / count).collect())
}

fn choices(list: &Path, files: &mut Files) -> Result<Vec<Choice>> {
    let rows = Rows::read(list, &BETTER)?;
    let read = |row: &Row| {
        let better = files.place(rows.located(text(&rows, row, &BETTER)?));
        let worse = files.place(rows.located(text(&rows, row, &WORSE)?));
        ensure!(better != worse, "{}: a choice between a picture and itself", rows.at(row));
        let draw = row.number(&DRAW).with_context(|| rows.at(row))?;
        Ok(Choice { better, worse, draw: draw.unwrap_or(0.0) != 0.0 })
    };
    rows.rows.iter().map(read).collect()
}

fn text<'a>(rows: &Rows, row: &'a Row, names: &[&str]) -> Result<&'a str> {
    row.text(names).with_context(|| format!("{} has no `{}`", rows.at(row), names[0]))
}

/// The unit vector of each file, from `--embeddings` or its pixels; `None` of one that cannot be read, which is named.
fn vectors(
    args: &FitArgs,
    clip: &str,
    files: &[PathBuf],
    load: impl FnOnce() -> Result<Embedder>,
) -> Result<Vec<Option<Vec<f32>>>> {
    let mut kept = match &args.embeddings {
        Some(path) if path.exists() => read_vectors(path, clip, args.preprocess)?,
        _ => BTreeMap::new(),
    };
    let name = |file: &Path| Ok::<_, anyhow::Error>(std::path::absolute(file)?.display().to_string());
    let names = files.iter().map(|file| name(file)).collect::<Result<Vec<_>>>()?;
    let missing: Vec<Picture> = files
        .iter()
        .zip(&names)
        .filter(|(_, name)| !kept.contains_key(*name))
        .map(|(file, _)| Picture { file: file.clone(), prompt: None })
        .collect();
    if !missing.is_empty() {
        let embedder = load()?;
        let bar = ProgressBar::with_draw_target(Some(missing.len() as u64), ProgressDrawTarget::stderr());
        bar.set_style(ProgressStyle::with_template("{pos}/{len} {wide_bar} {elapsed} (left {eta})")?);
        let read = |picture: &Picture| pictures::read(&picture.file);
        pictures::in_batches(&missing, args.batch, read, |chunk, found| {
            let (mut images, mut whose) = (Vec::new(), Vec::new());
            for (picture, found) in chunk.iter().zip(found) {
                match found {
                    Ok(image) => {
                        images.push(image);
                        whose.push(&picture.file);
                    }
                    Err(error) => bar.suspend(|| note!("{}", shown(format!("{error:#}")))),
                }
            }
            if !images.is_empty() {
                let rows = embedder.embed(images)?.to_vec2::<f32>()?;
                for (file, row) in whose.into_iter().zip(rows) {
                    kept.insert(name(file)?, row);
                }
            }
            bar.inc(chunk.len() as u64);
            Ok(())
        })?;
        bar.finish_and_clear();
        if let Some(path) = &args.embeddings {
            write_vectors(path, clip, args.preprocess, &kept)?;
        }
    }
    Ok(names.iter().map(|name| kept.get(name).cloned()).collect())
}

/// What a file of vectors must say of the tower.
fn tower(clip: &str, preprocess: Preprocess) -> Json {
    json!({ "clip": clip, "preprocess": preprocess })
}

fn read_vectors(path: &Path, clip: &str, preprocess: Preprocess) -> Result<BTreeMap<String, Vec<f32>>> {
    let weights = Weights::open_file(path)?;
    let said = |key: &str| weights.metadata().get(key).and_then(|text| serde_json::from_str::<Json>(text).ok());
    ensure!(
        said("tower") == Some(tower(clip, preprocess)),
        "--embeddings {}: it is not of this tower and preprocessing: remove it, or name another file",
        path.display()
    );
    let files: Vec<String> = said("files").and_then(|files| serde_json::from_value(files).ok()).unwrap_or_default();
    let rows = weights.get_any("embeddings")?.to_vec2::<f32>()?;
    ensure!(
        files.len() == rows.len(),
        "--embeddings {}: {} vectors of {} files",
        path.display(),
        rows.len(),
        files.len()
    );
    Ok(files.into_iter().zip(rows).collect())
}

fn write_vectors(path: &Path, clip: &str, preprocess: Preprocess, kept: &BTreeMap<String, Vec<f32>>) -> Result<()> {
    let Some(width) = kept.values().next().map(Vec::len) else { return Ok(()) };
    let rows: Vec<f32> = kept.values().flatten().copied().collect();
    let files = Json::from(kept.keys().cloned().collect::<Vec<_>>());
    let header = [("files", files), ("tower", tower(clip, preprocess))];
    let header = header.map(|(key, value)| (key.to_owned(), value.to_string())).into();
    make_folder_of(path)?;
    let tensor = Tensor::from_vec(rows, (kept.len(), width), &Device::Cpu)?;
    save_tensors(path, &header, &[("embeddings".to_owned(), tensor)], DType::F32)
        .with_context(|| format!("writing the vectors {}", path.display()))
}

/// A local folder by its whole path, so that the head's file means the same from another folder.
fn whole(clip: &str) -> Result<String> {
    let path = Path::new(clip);
    // what the program carries is found from everywhere
    if !path.exists() || located(path)? != path {
        return Ok(clip.to_owned());
    }
    Ok(std::path::absolute(path)?.to_string_lossy().into_owned())
}

/// The published aesthetic head on the same pictures, where its tower is the same.
fn beside(compared: &AestheticConfig, args: &FitArgs, data: &Data, vectors: &[Vec<f32>]) -> Result<Measure> {
    ensure!(compared.clip == args.clip, "it is for {}", shown(&compared.clip));
    let Some(width) = vectors.first().map(Vec::len) else { bail!("there are no pictures") };
    let scores =
        aesthetic_scores(&compared.head, &Tensor::from_vec(vectors.concat(), (vectors.len(), width), &Device::Cpu)?)?;
    data.beside(&scores)
}

fn shown_measure(measure: &Measure) -> String {
    format!("{:.3} ± {:.3}", measure.value, measure.stderr)
}

/// Writes the head with its tower, its layers and how it was made into one file.
fn save(path: &Path, said: &HeadFile, learnt: &Learnt, kind: Kind, validated: bool) -> Result<()> {
    let Learnt { head, lambda, held_out, chance, .. } = learnt;
    let how = json!({
        "problem": kind.name, "lambda": lambda, "lambda_by_cross_validation": validated, "measure": kind.measure,
        "held_out": held_out.value, "stderr": held_out.stderr, "on": held_out.count, "chance": chance,
    });
    let header = [(HeadFile::KEY, serde_json::to_string(said)?), ("alignprop.fit", how.to_string())];
    let header = header.map(|(key, value)| (key.to_owned(), value)).into();
    let weight: Vec<f32> = head.weight.iter().map(|w| *w as f32).collect();
    let tensors = [
        ("head.weight".to_owned(), Tensor::from_vec(weight, (1, head.weight.len()), &Device::Cpu)?),
        ("head.bias".to_owned(), Tensor::new(&[head.bias as f32], &Device::Cpu)?),
    ];
    make_folder_of(path)?;
    save_tensors(path, &header, &tensors, DType::F32).with_context(|| format!("writing the head {}", path.display()))
}

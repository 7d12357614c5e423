//! `alignprop score`: the rewards of pictures that exist.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use comfy_table::{Table, presets};
use image::{Rgb, RgbImage, imageops};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Map, Value as Json};

use super::experiment::{DEFAULTS, compute_of, config_of};
use crate::cli::{ScoreArgs, ScoreFormat};
use crate::config::{Prompt, shown};
use crate::files::{check_writable, make_folder_of, save_tensors};
use crate::models::Source;
use crate::models::tokenizer::ClipTokenizer;
use crate::pictures::{self, Picture};
use crate::report::pictures as sheets;
use crate::rewards::{Rewards, TapedImages};

/// Pictures that a sheet shows of the best, and as many of the worst.
const SHOWN: usize = 16;
/// Pictures in one row of a sheet.
const COLUMNS: usize = 8;
/// Pixels of a picture's square in a sheet.
const SQUARE: u32 = 192;

/// A picture with what was found, in the order of the rewards.
struct Scored {
    file: String,
    prompt: Option<String>,
    scores: Vec<f64>,
    /// Where they are wanted, of each reward that has one.
    embeddings: Vec<Option<Vec<f32>>>,
}

pub fn run(args: &ScoreArgs) -> Result<()> {
    args.sheet.iter().try_for_each(|sheet| sheets::format_of(sheet).map(drop))?;
    args.sheet.iter().chain(&args.embeddings).try_for_each(|file| check_writable(file))?; // before there is work to lose
    let config = config_of(args.config.config.as_deref(), &args.settings(), DEFAULTS)?;
    let named = if args.reward.is_empty() { config.reward.clone() } else { config.reward.select(&args.reward) };
    ensure!(!named.weights().is_empty(), "no reward is named: give --reward aesthetic (or others), or --config");
    let named = if args.as_trained { named } else { named.as_published() };
    let pictures = pictures::collect(&args.pictures)?;
    let compute = compute_of(&config.run)?.with_rewards_in(config.run.reward_precision)?;
    let tokenizer = || Ok(Arc::new(ClipTokenizer::load(&Source::pipeline(&config.model)?.sub("tokenizer"))?));
    let rewards = Rewards::load_with(&named, &tokenizer, &compute)?;
    let names = rewards.names();
    let sorted = args.sort.as_deref().map(|kind| {
        let place = names.iter().position(|name| *name == kind);
        place.with_context(|| format!("--sort {kind}: the pictures are scored with {}", names.join(", ")))
    });
    let sorted = sorted.transpose()?;
    let readers = rewards.that_read_prompts();

    let columns: Vec<&str> = if readers.is_empty() { names.clone() } else { [&["prompt"], &names[..]].concat() };
    let print = Printer { format: args.format, columns: [&["file"], &columns[..]].concat() };
    let at_once = sorted.is_none() && args.format != ScoreFormat::Table;
    if at_once {
        print.heading()?;
    }
    let bar = ProgressBar::with_draw_target(Some(pictures.len() as u64), ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template("{pos}/{len} {wide_bar} {elapsed} (left {eta})")?);
    let mut scored: Vec<Scored> = Vec::new();
    let read = |picture: &Picture| read(picture, args.prompt.as_deref(), &readers);
    pictures::in_batches(&pictures, args.batch, read, |chunk, found| {
        let (mut images, mut asked) = (Vec::new(), Vec::new());
        let mut complain = |error: anyhow::Error| bar.suspend(|| note!("{}", shown(format!("{error:#}"))));
        for (picture, found) in chunk.iter().zip(found) {
            match found {
                Ok((image, prompt)) => {
                    images.push(image);
                    asked.push((picture, prompt));
                }
                Err(error) => complain(error),
            }
        }
        let done = score(&rewards, images, &asked, args.embeddings.is_some(), compute.device(), &mut complain);
        if at_once {
            bar.suspend(|| done.iter().try_for_each(|row| print.row(row)))?;
        }
        scored.extend(done);
        bar.inc(chunk.len() as u64);
        Ok(())
    })?;
    bar.finish_and_clear();
    ensure!(!scored.is_empty(), "none of the {} pictures could be scored", pictures.len());

    let failed = pictures.len() - scored.len();
    if let Some(path) = &args.embeddings {
        write_embeddings(&names, &scored, path)?;
    }
    let by = sorted.unwrap_or(0);
    if sorted.is_some() {
        scored.sort_by(|a, b| b.scores[by].total_cmp(&a.scores[by]));
    }
    if !at_once {
        print.all(&scored)?;
    }
    if let Some(path) = &args.sheet {
        sheets::save(&sheet(&mut scored, names[by], by)?, path)?;
        note!("sheet       {}", path.display());
    }
    if failed > 0 {
        note!("{failed} of {} pictures could not be scored", pictures.len());
    }
    Ok(())
}

/// A picture and its prompt, where the rewards `readers` want one.
fn read(picture: &Picture, prompt: Option<&str>, readers: &[&str]) -> Result<(RgbImage, Option<String>)> {
    let file = picture.file.display();
    let prompt = match (prompt, readers) {
        (_, []) => None,
        (Some(prompt), _) => Some(prompt.to_owned()),
        (None, _) => pictures::prompt_of(picture).with_context(|| format!("reading the prompt of {file}"))?,
    };
    ensure!(
        prompt.is_some() || readers.is_empty(),
        "{file} has no prompt, which {} reads: give --prompt, a column `prompt` in a list, or a .txt file of the same name",
        readers.join(", ")
    );
    Ok((pictures::read(&picture.file)?, prompt))
}

/// Scores pictures together; where that fails, each alone, so that one does not take the others with it.
fn score(
    rewards: &Rewards,
    images: Vec<RgbImage>,
    asked: &[(&Picture, Option<String>)],
    embeddings: bool,
    device: &Device,
    complain: &mut impl FnMut(anyhow::Error),
) -> Vec<Scored> {
    if images.is_empty() {
        return Vec::new();
    }
    let images = TapedImages::of_pictures(images, device);
    let prompts: Vec<Prompt> = asked.iter().map(|(_, prompt)| prompt.clone().unwrap_or_default().into()).collect();
    let found = rewards.scores_of(&images, &prompts).and_then(|scores| {
        let vectors = if embeddings { vectors(rewards, &images)? } else { vec![Vec::new(); asked.len()] };
        Ok(scores.into_iter().zip(vectors))
    });
    match (found, asked) {
        (Ok(found), _) => asked
            .iter()
            .zip(found)
            .map(|((picture, prompt), (scores, embeddings))| Scored {
                file: picture.file.display().to_string(),
                prompt: prompt.clone(),
                scores,
                embeddings,
            })
            .collect(),
        (Err(error), [(picture, _)]) => {
            complain(error.context(format!("scoring {}", picture.file.display())));
            Vec::new()
        }
        (Err(_), _) => {
            let images = images.into_pictures();
            let alone = images.into_iter().zip(asked.chunks(1));
            alone.flat_map(|(image, asked)| score(rewards, vec![image], asked, embeddings, device, complain)).collect()
        }
    }
}

/// For each image what each reward has as its vector.
fn vectors(rewards: &Rewards, images: &TapedImages) -> Result<Vec<Vec<Option<Vec<f32>>>>> {
    let mut vectors = vec![Vec::new(); images.batch()?];
    for reward in rewards.iter() {
        let embedding = reward.judge.score().embedding(images)?;
        let rows = embedding.map(|embedding| embedding.to_device(&Device::Cpu)?.to_vec2::<f32>()).transpose()?;
        for (i, image) in vectors.iter_mut().enumerate() {
            image.push(rows.as_ref().map(|rows| rows[i].clone()));
        }
    }
    Ok(vectors)
}

/// A tensor (N, D) for each reward that has vectors, by its name; `files` in the header are their N files, as JSON.
fn write_embeddings(names: &[&str], scored: &[Scored], path: &Path) -> Result<()> {
    let mut tensors = Vec::new();
    for (i, name) in names.iter().enumerate() {
        let rows: Option<Vec<f32>> =
            scored.iter().map(|row| row.embeddings[i].as_deref()).collect::<Option<Vec<_>>>().map(|rows| rows.concat());
        if let Some(rows) = rows {
            tensors.push(((*name).to_owned(), Tensor::from_vec(rows, (scored.len(), ()), &Device::Cpu)?));
        }
    }
    ensure!(!tensors.is_empty(), "--embeddings: {} has no vectors", names.join(", "));
    let files: Json = scored.iter().map(|row| Json::from(&*row.file)).collect();
    make_folder_of(path)?;
    save_tensors(path, &BTreeMap::from([("files".to_owned(), files.to_string())]), &tensors, DType::F32)
        .with_context(|| format!("writing the vectors {}", path.display()))?;
    note!("vectors     {}", path.display());
    Ok(())
}

/// The scores on stdout.
struct Printer<'a> {
    format: ScoreFormat,
    columns: Vec<&'a str>,
}

impl Printer<'_> {
    fn heading(&self) -> Result<()> {
        if self.format == ScoreFormat::Csv {
            self.csv(&self.columns)?;
        }
        Ok(())
    }

    fn row(&self, row: &Scored) -> Result<()> {
        if self.format == ScoreFormat::Csv {
            let scores: Vec<String> = row.scores.iter().map(f64::to_string).collect();
            let words = std::iter::once(&row.file).chain(&row.prompt).chain(&scores);
            return self.csv(&words.collect::<Vec<_>>());
        }
        let words = std::iter::once(&row.file).chain(&row.prompt).map(|text| Json::from(&**text));
        let values = words.chain(row.scores.iter().map(|score| Json::from(*score)));
        let row: Map<String, Json> = self.columns.iter().map(|name| (*name).to_owned()).zip(values).collect();
        say!("{}", Json::Object(row));
        Ok(())
    }

    fn csv(&self, cells: &[impl AsRef<[u8]>]) -> Result<()> {
        let mut writer = csv::Writer::from_writer(Vec::new());
        writer.write_record(cells)?;
        let line = writer.into_inner().map_err(|error| error.into_error())?;
        say!("{}", String::from_utf8_lossy(&line).trim_end_matches('\n'));
        Ok(())
    }

    fn all(&self, scored: &[Scored]) -> Result<()> {
        if self.format != ScoreFormat::Table {
            self.heading()?;
            return scored.iter().try_for_each(|row| self.row(row));
        }
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_header(&self.columns);
        for row in scored {
            let words = std::iter::once(&row.file).chain(&row.prompt).map(shown);
            table.add_row(words.chain(row.scores.iter().map(|score| format!("{score:.4}"))).collect::<Vec<_>>());
        }
        say!("{table}");
        Ok(())
    }
}

/// The best and the worst by one reward, each in a white square above its name and its score.
fn sheet(scored: &mut [Scored], name: &str, by: usize) -> Result<RgbImage> {
    scored.sort_by(|a, b| b.scores[by].total_cmp(&a.scores[by]));
    let (best, worst) = match scored.len() {
        few if few <= 2 * SHOWN => (&*scored, &[][..]),
        many => (&scored[..SHOWN], &scored[many - SHOWN..]),
    };
    let (mut squares, mut captions) = (Vec::new(), Vec::new());
    for row in best.iter().chain(worst) {
        let file = Path::new(&row.file);
        squares.push(square(&pictures::read(file)?));
        let file = file.file_name().unwrap_or_default().to_string_lossy();
        captions.push(sheets::caption(&file, &[name], &row.scores[by..=by]));
    }
    sheets::grid(&sheets::captioned(squares, &captions), COLUMNS)
}

fn square(picture: &RgbImage) -> RgbImage {
    let longest = picture.width().max(picture.height());
    let scaled = |side: u32| (u64::from(side) * u64::from(SQUARE) / u64::from(longest)).max(1) as u32;
    let small = imageops::thumbnail(picture, scaled(picture.width()), scaled(picture.height()));
    let mut square = RgbImage::from_pixel(SQUARE, SQUARE, Rgb([255; 3]));
    let middle = |side: u32| i64::from((SQUARE - side) / 2);
    imageops::replace(&mut square, &small, middle(small.width()), middle(small.height()));
    square
}

//! The pictures of a run's sample grids one by one, with their prompts and scores: `samples/step-NNNNNN.jsonl` and
//! `samples/step-NNNNNN-II.png`. From them a run's page has its pairs, before and after.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use image::RgbImage;
use serde::{Deserialize, Serialize};

use super::change::Change;
use super::pictures;
use crate::files::write_bytes;

/// One picture that was drawn of a prompt.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Sample {
    pub prompt: String,
    /// By the rewards' names.
    pub scores: BTreeMap<String, f64>,
    /// Where the picture is.
    #[serde(skip)]
    pub picture: PathBuf,
}

fn list(folder: &Path, step: usize) -> PathBuf {
    folder.join(format!("step-{step:06}.jsonl"))
}

fn picture(folder: &Path, step: usize, number: usize) -> PathBuf {
    folder.join(format!("step-{step:06}-{number:02}.png"))
}

/// Writes the pictures of a step, and then what they are.
///
/// # Errors
/// They cannot be written.
pub fn save(folder: &Path, step: usize, samples: &[Sample], images: &[RgbImage]) -> Result<()> {
    for (number, image) in images.iter().enumerate() {
        pictures::save(image, &picture(folder, step, number))?;
    }
    let lines = samples.iter().map(|sample| Ok(serde_json::to_string(sample)? + "\n"));
    write_bytes(&list(folder, step), lines.collect::<Result<String>>()?.as_bytes())
}

/// The samples of a step, in order; none where the list is absent or not what [`save`] writes.
///
/// # Errors
/// The list is there and cannot be read.
pub fn read(folder: &Path, step: usize) -> Result<Vec<Sample>> {
    let path = list(folder, step);
    let text = match fs::read(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        bytes => bytes.with_context(|| format!("reading {}", path.display()))?,
    };
    let lines = String::from_utf8_lossy(&text);
    let samples = lines.lines().enumerate().map_while(|(number, line)| {
        let sample: Sample = serde_json::from_str(line).ok()?;
        Some(Sample { picture: picture(folder, step, number), ..sample })
    });
    Ok(samples.collect())
}

/// The samples of two steps on the same prompts and noise.
#[derive(Clone, Debug, Default)]
pub struct Pairs {
    /// The first step that was drawn, and the last.
    pub steps: (usize, usize),
    /// Before and, where a later step was drawn, after.
    pub pairs: Vec<(Sample, Option<Sample>)>,
}

impl Pairs {
    /// Of the first and the last of `steps` that have samples.
    ///
    /// # Errors
    /// As [`read`].
    pub fn of(folder: &Path, steps: &[usize]) -> Result<Self> {
        let drawn = |step: &&usize| list(folder, **step).is_file();
        let (Some(&first), Some(&last)) = (steps.iter().find(drawn), steps.iter().rev().find(drawn)) else {
            return Ok(Self::default());
        };
        let mut after = if last > first { read(folder, last)?.into_iter() } else { Vec::new().into_iter() };
        let pairs = read(folder, first)?.into_iter().map(|before| (before, after.next()));
        // a run that goes on with other sample prompts has no pairs of them
        let same = |(before, after): &(Sample, Option<Sample>)| {
            after.as_ref().is_none_or(|after| after.prompt == before.prompt)
        };
        Ok(Self { steps: (first, last), pairs: pairs.filter(same).collect() })
    }

    /// What became of a reward.
    pub fn change(&self, reward: &str) -> Option<Change> {
        let score = |sample: &Sample| sample.scores.get(reward).copied();
        Change::of_pairs(
            self.pairs.iter().filter_map(|(before, after)| Some((score(before)?, score(after.as_ref()?)?))),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_and_the_last_step_are_paired_by_their_prompts() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let image = RgbImage::new(8, 8);
        let save = |step: usize, samples: &[(&str, f64)]| {
            let samples: Vec<Sample> = samples
                .iter()
                .map(|(prompt, score)| Sample {
                    prompt: prompt.to_string(),
                    scores: BTreeMap::from([("a".to_owned(), *score)]),
                    picture: PathBuf::new(),
                })
                .collect();
            super::save(folder, step, &samples, &vec![image.clone(); samples.len()]).unwrap();
        };
        assert!(Pairs::of(folder, &[]).unwrap().pairs.is_empty());
        save(0, &[("a cat", 1.0), ("a dog", 2.0), ("a fox", 5.0)]);
        let alone = Pairs::of(folder, &[0, 5]).unwrap();
        assert!(
            alone.pairs.len() == 3
                && alone.pairs.iter().all(|(_, after)| after.is_none())
                && alone.change("a").is_none()
        );
        save(20, &[("a cat", 9.0)]);
        save(40, &[("a cat", 2.0), ("a dog", 4.0), ("a wolf", 9.0)]);
        let pairs = Pairs::of(folder, &[0, 20, 40, 60]).unwrap();
        assert_eq!((pairs.steps, pairs.pairs.len()), ((0, 40), 2));
        assert!(
            pairs
                .pairs
                .iter()
                .all(|(before, after)| before.picture.is_file() && after.as_ref().unwrap().picture.is_file())
        );
        let change = pairs.change("a").unwrap();
        assert_eq!((change.from, change.to, change.better), (1.5, 3.0, Some((2, 2))));
        assert!(pairs.change("b").is_none());
        // what is no list of samples is none
        fs::write(folder.join("step-000040.jsonl"), "{\"prompt\": 3}\n").unwrap();
        assert!(Pairs::of(folder, &[0, 40]).unwrap().change("a").is_none());
    }
}

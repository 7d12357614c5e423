//! Choices between two pictures, one after the other: which pairs are shown, and what was chosen, on disk at once.

mod server;

use std::collections::{BTreeMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::Deserialize;
use serde_json::json;

use crate::pictures::Rows;

pub use server::{Request, Response, Server};

/// Two pictures by their places among all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Its number, the same in every session with this seed.
    pub id: u64,
    pub left: usize,
    pub right: usize,
}

/// What somebody says of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    Left,
    Right,
    Equal,
    Skip,
}

/// Where the pairs come from.
enum Source {
    /// Any two pictures.
    All,
    /// The pictures of the same name in two folders, each pair once, in an order that tells nothing.
    Twins(Vec<(usize, usize)>),
}

/// How often the first folder's picture was chosen, the second's, and neither.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub first: usize,
    pub second: usize,
    pub draws: usize,
}

impl Tally {
    /// The share of the first folder among the choices that are no draws, with the 95% interval of Wilson (1927).
    pub fn win_rate(&self) -> Option<(f64, f64, f64)> {
        const Z: f64 = 1.959_964;
        let n = (self.first + self.second) as f64;
        if n == 0.0 {
            return None;
        }
        let p = self.first as f64 / n;
        let middle = (p + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
        let half = Z / (1.0 + Z * Z / n) * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
        Some((p, middle - half, middle + half))
    }
}

/// Everything that is chosen in one file of JSON lines, `better`, `worse` and `draw`, which `fit` reads.
pub struct Session {
    pictures: Vec<PathBuf>,
    source: Source,
    seed: u64,
    file: File,
    path: PathBuf,
    /// Pairs that need not be shown any more, the smaller place first.
    seen: HashSet<(usize, usize)>,
    /// The next number to look at.
    cursor: u64,
    /// What was answered since the start, with the file's length before it.
    history: Vec<(Pair, Answer, u64)>,
    tally: Tally,
}

/// Numbers that are tried for a pair that is not known before all pairs count as seen.
const TRIES: u64 = 10_000;

impl Session {
    /// Any two of these pictures; goes on with the file at `path`, where there is one.
    ///
    /// # Errors
    /// There are fewer than two, or the file cannot be read or written.
    pub fn new(pictures: Vec<PathBuf>, path: &Path, seed: u64) -> Result<Self> {
        ensure!(
            pictures.len() >= 2,
            "two pictures at least are needed to choose between, and there are {}",
            pictures.len()
        );
        Self::open(pictures, Source::All, path, seed)
    }

    /// The pictures of the same names in two folders, which are given with their names.
    ///
    /// # Errors
    /// No name is in both, or the file cannot be read or written.
    pub fn blind(
        first: &BTreeMap<String, PathBuf>,
        second: &BTreeMap<String, PathBuf>,
        path: &Path,
        seed: u64,
    ) -> Result<Self> {
        let (mut pictures, mut twins) = (Vec::new(), Vec::new());
        for (name, file) in first {
            if let Some(other) = second.get(name) {
                twins.push((pictures.len(), pictures.len() + 1));
                pictures.extend([file.clone(), other.clone()]);
            }
        }
        ensure!(
            !twins.is_empty(),
            "no picture has the same name in both folders: they must be of the same prompts and noise"
        );
        let mut rng = ChaCha12Rng::seed_from_u64(seed);
        let mut order: Vec<(u64, (usize, usize))> = twins.into_iter().map(|pair| (rng.next_u64(), pair)).collect();
        order.sort_unstable();
        Self::open(pictures, Source::Twins(order.into_iter().map(|(_, pair)| pair).collect()), path, seed)
    }

    fn open(pictures: Vec<PathBuf>, source: Source, path: &Path, seed: u64) -> Result<Self> {
        let opening = || format!("opening the choices {}", path.display());
        let pictures = pictures.into_iter().map(std::path::absolute).collect::<std::io::Result<Vec<_>>>()?;
        let known =
            if path.exists() && path.metadata()?.len() > 0 { Rows::read(path, &["better"])?.rows } else { Vec::new() };
        let file = OpenOptions::new().create(true).append(true).open(path).with_context(opening)?;
        let (seen, tally) = Default::default();
        let mut session =
            Self { pictures, source, seed, file, path: path.to_owned(), seen, cursor: 0, history: Vec::new(), tally };
        for row in known {
            let place = |names: &[&str]| {
                let name = PathBuf::from(row.text(names)?);
                session.pictures.iter().position(|picture| *picture == name)
            };
            if let (Some(better), Some(worse)) = (place(&["better"]), place(&["worse"])) {
                session.note(better, worse, row.number(&["draw"])?.unwrap_or(0.0) != 0.0, 1);
            }
        }
        Ok(session)
    }

    /// How many pairs there are to choose from, where each is shown once.
    pub fn total(&self) -> Option<usize> {
        match &self.source {
            Source::All => None,
            Source::Twins(twins) => Some(twins.len()),
        }
    }

    /// How many choices the file has of these pictures.
    pub fn chosen(&self) -> usize {
        self.tally.first + self.tally.second + self.tally.draws
    }

    /// Only where two folders are compared, and every pair was seen: a blind test tells nothing before.
    pub fn result(&mut self) -> Option<Tally> {
        (self.total().is_some() && self.next().is_none()).then_some(self.tally)
    }

    /// A picture's file.
    pub fn picture(&self, place: usize) -> Option<&Path> {
        self.pictures.get(place).map(PathBuf::as_path)
    }

    /// The pair of a number.
    fn pair(&self, id: u64) -> Option<Pair> {
        let mut rng = ChaCha12Rng::seed_from_u64(self.seed ^ id.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let below = |n: usize, number: u64| (number % n as u64) as usize; // n is small beside 2^64
        let (a, b) = match &self.source {
            Source::Twins(twins) => *twins.get(usize::try_from(id).ok()?)?,
            Source::All => {
                let a = below(self.pictures.len(), rng.next_u64());
                let b = below(self.pictures.len() - 1, rng.next_u64());
                (a, if b >= a { b + 1 } else { b })
            }
        };
        let (left, right) = if rng.next_u64() & 1 == 0 { (a, b) } else { (b, a) };
        Some(Pair { id, left, right })
    }

    /// The pair to show.
    #[allow(
        clippy::should_implement_trait,
        reason = "a session is no iterator: the same pair comes until it is answered"
    )]
    pub fn next(&mut self) -> Option<Pair> {
        for id in self.cursor..self.cursor.saturating_add(TRIES) {
            let pair = self.pair(id)?;
            if !self.seen.contains(&key(pair.left, pair.right)) {
                self.cursor = id;
                return Some(pair);
            }
        }
        None
    }

    /// Notes an answer, on disk before it returns; whether it was one of the pair that is shown: another page may have answered.
    ///
    /// # Errors
    /// The file cannot be written; then nothing is noted.
    pub fn answer(&mut self, id: u64, answer: Answer) -> Result<bool> {
        let Some(pair) = self.next().filter(|pair| pair.id == id) else { return Ok(false) };
        let before = self.file.seek(SeekFrom::End(0))?;
        let (better, worse) = if answer == Answer::Right { (pair.right, pair.left) } else { (pair.left, pair.right) };
        if answer == Answer::Skip {
            self.seen.insert(key(better, worse));
        } else {
            let name = |place: usize| self.pictures[place].to_string_lossy().into_owned();
            let mut line = json!({ "better": name(better), "worse": name(worse) });
            if answer == Answer::Equal {
                line["draw"] = true.into();
            }
            let written = self.file.write_all(format!("{line}\n").as_bytes()).and_then(|()| self.file.sync_data());
            if let Err(error) = written {
                let _ = self.file.set_len(before);
                return Err(error).with_context(|| format!("writing to {}", self.path.display()));
            }
            self.note(better, worse, answer == Answer::Equal, 1);
        }
        self.history.push((pair, answer, before));
        Ok(true)
    }

    /// Takes the last answer since the start back, in the file too; whether there was one.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn undo(&mut self) -> Result<bool> {
        let Some((pair, answer, before)) = self.history.pop() else { return Ok(false) };
        self.file
            .set_len(before)
            .and_then(|()| self.file.sync_data())
            .with_context(|| format!("writing to {}", self.path.display()))?;
        if answer != Answer::Skip {
            let (better, worse) =
                if answer == Answer::Right { (pair.right, pair.left) } else { (pair.left, pair.right) };
            self.note(better, worse, answer == Answer::Equal, -1);
        }
        self.seen.remove(&key(pair.left, pair.right));
        self.cursor = pair.id;
        Ok(true)
    }

    fn note(&mut self, better: usize, worse: usize, draw: bool, count: isize) {
        self.seen.insert(key(better, worse));
        // of twins the first folder's has the smaller place
        let slot = match (draw, better < worse) {
            (true, _) => &mut self.tally.draws,
            (false, true) => &mut self.tally.first,
            (false, false) => &mut self.tally.second,
        };
        *slot = slot.saturating_add_signed(count);
    }
}

fn key(a: usize, b: usize) -> (usize, usize) {
    (a.min(b), a.max(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(count: usize, folder: &str) -> Vec<PathBuf> {
        (0..count).map(|i| PathBuf::from(format!("/{folder}/{i}.png"))).collect()
    }

    #[test]
    fn choices_are_on_disk_at_once_and_undone_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.jsonl");
        let lines = || std::fs::read_to_string(&path).unwrap().lines().map(str::to_owned).collect::<Vec<_>>();
        let mut session = Session::new(names(9, "a"), &path, 1).unwrap();
        let first = session.next().unwrap();
        assert_eq!(session.next(), Some(first), "the same until it is answered");
        assert!(!session.answer(first.id + 1, Answer::Left).unwrap(), "another page's pair");
        assert!(session.answer(first.id, Answer::Right).unwrap());
        assert!(!session.answer(first.id, Answer::Left).unwrap(), "answered already");
        let better = format!("\"better\":\"/a/{}.png\"", first.right);
        assert!(lines().len() == 1 && lines()[0].contains(&better), "{:?}", lines());
        let second = session.next().unwrap();
        session.answer(second.id, Answer::Skip).unwrap();
        let third = session.next().unwrap();
        session.answer(third.id, Answer::Equal).unwrap();
        assert!(lines().len() == 2 && lines()[1].contains("\"draw\":true"));
        assert!(session.undo().unwrap() && lines().len() == 1);
        assert_eq!(session.next(), Some(third));
        assert!(session.undo().unwrap() && session.next() == Some(second));
        assert!(session.undo().unwrap() && lines().is_empty() && session.next() == Some(first));
        assert!(!session.undo().unwrap());
        session.answer(first.id, Answer::Left).unwrap();
        // a session that goes on shows what is not chosen yet
        let mut again = Session::new(names(9, "a"), &path, 1).unwrap();
        assert_eq!((again.chosen(), again.next()), (1, Some(second)));
        assert!(!again.undo().unwrap(), "only what was answered here");
        // all 36 pairs, each once
        let mut seen = HashSet::from([key(first.left, first.right)]);
        while let Some(pair) = again.next() {
            assert!(pair.left != pair.right && seen.insert(key(pair.left, pair.right)));
            again.answer(pair.id, Answer::Left).unwrap();
        }
        assert_eq!((seen.len(), lines().len()), (36, 36));
        assert!(Session::new(names(1, "a"), &path, 1).is_err());
    }

    #[test]
    fn a_blind_test_tells_its_result_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.jsonl");
        let of = |name: &str, count: usize| {
            names(count, name)
                .into_iter()
                .map(|file| (file.file_name().unwrap().to_str().unwrap().to_owned(), file))
                .collect()
        };
        let (first, second): (BTreeMap<_, _>, BTreeMap<_, _>) = (of("first", 20), of("second", 30));
        let mut session = Session::blind(&first, &second, &path, 3).unwrap();
        assert_eq!(session.total(), Some(20));
        let mut on_the_left = 0;
        for i in 0..20 {
            assert_eq!(session.result(), None);
            let pair = session.next().unwrap();
            let is_first = |place: usize| session.picture(place).unwrap().starts_with("/first");
            assert!(is_first(pair.left) != is_first(pair.right));
            on_the_left += usize::from(is_first(pair.left));
            let (wanted, left_is_first) = (i % 4 != 0, is_first(pair.left));
            session.answer(pair.id, if wanted == left_is_first { Answer::Left } else { Answer::Right }).unwrap();
        }
        assert_eq!(session.result(), Some(Tally { first: 15, second: 5, draws: 0 }));
        assert!((4..=16).contains(&on_the_left), "sides are random: {on_the_left}");
        let (rate, low, high) = session.tally.win_rate().unwrap();
        assert!(
            (rate - 0.75).abs() < 1e-12 && (low - 0.5313).abs() < 1e-3 && (high - 0.8881).abs() < 1e-3,
            "{low} {high}"
        );
        // read again from the file
        assert_eq!(Session::blind(&first, &second, &path, 3).unwrap().result().unwrap().first, 15);
        assert!(Session::blind(&of("x", 0), &second, &path, 3).is_err());
    }
}

//! Opinions of pictures, the strength of the penalty that suits them, and what is to be expected of pictures that nobody has judged.
//!
//! Everything is measured on pictures that the head has not seen: the pictures are dealt into folds, near-duplicates together, and a
//! choice between pictures of two folds is in none.

use anyhow::{Context, Result, ensure};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::groups::{joined, largest};
use super::{Head, Matrix, Problem};

/// Of cross-validation.
const FOLDS: usize = 5;

/// The strengths of the penalty that are tried, the strongest first.
const LAMBDAS: [f64; 7] = [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6];

/// From so many pictures on one fold is enough to measure on.
const MANY: usize = 2000;

/// How near to the optimum heads are that only choose λ.
const COARSE: f64 = 1e-3;

/// Parts of what there is to learn from, for the learning curve.
const SHARES: [usize; 4] = [8, 4, 2, 1];

/// Somebody found one picture better than another, or both alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    pub better: usize,
    pub worse: usize,
    /// Neither was better.
    pub draw: bool,
}

/// What is known of pictures, by their rows.
#[derive(Clone, Debug, PartialEq)]
pub enum Opinions {
    Scores(Vec<f64>),
    /// Liked or not.
    Labels(Vec<bool>),
    Choices(Vec<Choice>),
}

/// Pictures with opinions of them.
pub struct Data {
    /// Unit vectors.
    embeddings: Matrix,
    opinions: Opinions,
    /// The fold of each picture.
    folds: Vec<usize>,
}

/// A number measured on pictures that were not learnt from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measure {
    /// The share of choices or labels that a head has right, or Spearman's rank correlation.
    pub value: f64,
    pub stderr: f64,
    /// Choices or pictures.
    pub count: usize,
}

impl Measure {
    /// `right` of `count`. The error is that of one more of either kind (Agresti and Coull 1998), which is not 0 where all are right.
    fn of_share(right: f64, count: usize) -> Self {
        let (n, likely) = (count as f64, (right + 1.0) / (count as f64 + 2.0));
        Self { value: right / n, stderr: (likely * (1.0 - likely) / n).sqrt(), count }
    }
}

/// What was learnt, and what is to be expected of it.
pub struct Learnt {
    pub head: Head,
    pub lambda: f64,
    /// Of heads that were fitted in the same way without the pictures that they are measured on.
    pub held_out: Measure,
    /// What no knowledge gives.
    pub chance: f64,
    /// How many opinions a head had learnt from, and how good it was; from few to many.
    pub curve: Vec<(usize, f64)>,
    /// What the curve says of twice as many opinions.
    pub twice: Option<f64>,
}

impl Data {
    /// `groups` says which pictures are kept together ([`super::near_duplicates`]); `seed` deals the folds.
    ///
    /// # Errors
    /// The opinions are not of these pictures, or too few to measure anything.
    pub fn new(embeddings: Matrix, opinions: Opinions, groups: &[usize], seed: u64) -> Result<Self> {
        let pictures = embeddings.rows();
        let known = match &opinions {
            Opinions::Scores(scores) => scores.len() == pictures,
            Opinions::Labels(labels) => labels.len() == pictures,
            Opinions::Choices(choices) => choices.iter().all(|choice| choice.better.max(choice.worse) < pictures),
        };
        ensure!(known && groups.len() == pictures, "opinions of other pictures than these {pictures}");
        let mut groups = groups.to_vec();
        if let Opinions::Choices(choices) = &opinions {
            // where choices tie few pictures together, as pairs of their own do, none has to be left out
            let ties = choices.iter().map(|choice| (choice.better, choice.worse));
            let tied = joined(pictures, groups.iter().copied().enumerate().chain(ties));
            if largest(&tied) * FOLDS <= pictures {
                groups = tied;
            }
        }
        let folds = deal(&groups, seed);
        Ok(Self { embeddings, opinions, folds })
    }

    /// The opinions of pictures for which `within` holds, as a problem.
    fn problem(&self, within: impl Fn(usize) -> bool) -> Result<Problem> {
        let rows: Vec<usize> = (0..self.embeddings.rows()).filter(|row| within(*row)).collect();
        let x = || Matrix::of_rows(rows.iter().map(|row| self.embeddings.row(*row)), self.embeddings.width());
        match &self.opinions {
            Opinions::Scores(scores) => Problem::ridge(x(), rows.iter().map(|row| scores[*row]).collect()),
            Opinions::Labels(labels) => {
                Problem::logistic(x(), &rows.iter().map(|row| labels[*row]).collect::<Vec<_>>())
            }
            Opinions::Choices(choices) => Problem::choices(&self.embeddings, &inside(choices, &within)),
        }
    }

    /// The λ with the least loss on pictures that were not learnt from, by cross-validation within the folds `among`.
    fn best_lambda(&self, among: &[usize]) -> Result<f64> {
        let enough = if self.embeddings.rows() >= MANY { 1 } else { among.len() };
        let parts = among[..enough].iter().filter_map(|fold| {
            let learn = self.problem(|row| among.contains(&self.folds[row]) && self.folds[row] != *fold).ok()?;
            Some((learn, self.held(*fold)?, None))
        });
        let mut parts: Vec<(Problem, Problem, Option<Head>)> = parts.collect();
        ensure!(!parts.is_empty(), "{TOO_FEW}");
        let (mut best, mut worse) = ((f64::INFINITY, LAMBDAS[0]), 0);
        for lambda in LAMBDAS {
            let mut loss = 0.0;
            for (learn, judge, head) in &mut parts {
                let found = learn.solve_to(lambda, head.as_ref(), COARSE)?;
                loss += judge.mean_loss(&found) * judge.len() as f64;
                *head = Some(found);
            }
            worse = if loss < best.0 { 0 } else { worse + 1 };
            if loss < best.0 {
                best = (loss, lambda);
            }
            // a weaker penalty only fits the noise more closely
            if worse == 2 {
                break;
            }
        }
        Ok(best.1)
    }

    /// What a fold has to judge; also labels that are all alike.
    fn held(&self, fold: usize) -> Option<Problem> {
        match &self.opinions {
            Opinions::Labels(labels) => {
                let rows: Vec<usize> = (0..labels.len()).filter(|row| self.folds[*row] == fold).collect();
                let x = Matrix::of_rows(rows.iter().map(|row| self.embeddings.row(*row)), self.embeddings.width());
                Problem::labelled(x, rows.iter().map(|row| labels[*row])).ok()
            }
            _ => self.problem(|row| self.folds[row] == fold).ok(),
        }
    }

    /// How a score of each picture agrees with the opinions of the pictures for which `judged` holds.
    ///
    /// # Errors
    /// There are too few.
    pub fn measure(&self, scores: &[f64], judged: impl Fn(usize) -> bool) -> Result<Measure> {
        let rows: Vec<usize> = (0..scores.len()).filter(|row| judged(*row)).collect();
        let right: Vec<f64> = match &self.opinions {
            Opinions::Scores(known) => {
                let pairs: Vec<(f64, f64)> = rows.iter().map(|row| (scores[*row], known[*row])).collect();
                return spearman(&pairs).context(TOO_FEW);
            }
            Opinions::Labels(labels) => rows.iter().map(|row| half_or_one(scores[*row], labels[*row])).collect(),
            Opinions::Choices(choices) => inside(choices, &judged)
                .iter()
                .filter(|choice| !choice.draw)
                .map(|choice| half_or_one(scores[choice.better] - scores[choice.worse], true))
                .collect(),
        };
        ensure!(right.len() >= 2, "{TOO_FEW}");
        let count = right.len();
        Ok(Measure::of_share(right.iter().sum(), count))
    }

    /// The folds that are measured on.
    fn outer(&self) -> Vec<usize> {
        if self.embeddings.rows() >= MANY { vec![0] } else { (0..FOLDS).collect() }
    }

    /// Whether a picture is one that heads are measured on.
    pub fn is_measured(&self, row: usize) -> bool {
        self.outer().contains(&self.folds[row])
    }

    /// Fits a head to all opinions, and measures heads that are fitted in the same way to those outside of a fold. `lambda` instead of the one
    /// that cross-validation finds.
    ///
    /// # Errors
    /// Too few opinions, or numbers that are not finite.
    pub fn learn(&self, lambda: Option<f64>) -> Result<Learnt> {
        let all: Vec<usize> = (0..FOLDS).collect();
        // [share][picture]
        let mut scores = vec![vec![f64::NAN; self.embeddings.rows()]; SHARES.len()];
        let mut counts = [0; SHARES.len()];
        for fold in self.outer() {
            let others: Vec<usize> = all.iter().copied().filter(|other| *other != fold).collect();
            let learn = self.problem(|row| self.folds[row] != fold).context(TOO_FEW)?;
            let lambda = lambda.map_or_else(|| self.best_lambda(&others), Ok)?;
            let order = shuffled(learn.len(), fold as u64);
            let mut last = None;
            for ((share, scores), count) in SHARES.iter().zip(&mut scores).zip(&mut counts) {
                let part = learn.part(&order[..learn.len() / share]);
                *count += part.len();
                if part.is_empty() || part.is_one_sided() {
                    continue;
                }
                // the penalty of a mean loss weighs the more against fewer opinions
                let head = part.solve_to(lambda * *share as f64, last.as_ref(), COARSE)?;
                let held = (0..scores.len()).filter(|row| self.folds[*row] == fold).collect::<Vec<_>>();
                held.into_iter().for_each(|row| scores[row] = head.score(self.embeddings.row(row)));
                last = Some(head);
            }
        }
        let mut curve = Vec::new();
        let mut held_out = None;
        for (scores, count) in scores.iter().zip(counts) {
            held_out = self.measure_within_folds(scores).ok();
            if let Some(Measure { value, .. }) = held_out {
                curve.push((count / self.outer().len(), value));
            }
        }
        let lambda = lambda.map_or_else(|| self.best_lambda(&all), Ok)?;
        let head = self.problem(|_| true)?.solve(lambda, None)?;
        let chance = match &self.opinions {
            Opinions::Scores(_) => 0.0,
            Opinions::Choices(_) => 0.5,
            Opinions::Labels(labels) => {
                let liked = labels.iter().filter(|yes| **yes).count() as f64 / labels.len() as f64;
                liked.max(1.0 - liked)
            }
        };
        let twice = extrapolated(&curve);
        Ok(Learnt { head, lambda, held_out: held_out.context(TOO_FEW)?, chance, curve, twice })
    }

    /// [`Self::measure`] where each fold was scored by a head of its own, which compare only within it.
    fn measure_within_folds(&self, scores: &[f64]) -> Result<Measure> {
        if !matches!(self.opinions, Opinions::Choices(_)) {
            return self.measure(scores, |row| !scores[row].is_nan());
        }
        let measures = self
            .outer()
            .into_iter()
            .filter_map(|fold| self.measure(scores, |row| self.folds[row] == fold && !scores[row].is_nan()).ok());
        let (mut right, mut count) = (0.0, 0);
        for measure in measures {
            right += measure.value * measure.count as f64;
            count += measure.count;
        }
        ensure!(count > 0, "{TOO_FEW}");
        Ok(Measure::of_share(right, count))
    }

    /// [`Self::measure`] of another score of every picture, on what heads are measured on.
    ///
    /// # Errors
    /// As there.
    pub fn beside(&self, scores: &[f64]) -> Result<Measure> {
        let measured: Vec<f64> = scores
            .iter()
            .enumerate()
            .map(|(row, score)| if self.is_measured(row) { *score } else { f64::NAN })
            .collect();
        self.measure_within_folds(&measured)
    }
}

const TOO_FEW: &str = "too few opinions to measure anything: give more of them, or of more pictures";

fn inside(choices: &[Choice], within: impl Fn(usize) -> bool) -> Vec<Choice> {
    choices.iter().copied().filter(|choice| within(choice.better) && within(choice.worse)).collect()
}

/// Whether a score's sign is right; half where there is none.
fn half_or_one(score: f64, positive: bool) -> f64 {
    if score == 0.0 { 0.5 } else { f64::from(u8::from((score > 0.0) == positive)) }
}

/// Deals groups into folds of about the same size.
fn deal(groups: &[usize], seed: u64) -> Vec<usize> {
    let mut sizes = std::collections::BTreeMap::<usize, usize>::new();
    groups.iter().for_each(|group| *sizes.entry(*group).or_default() += 1);
    let order = shuffled(sizes.len(), seed);
    let mut sizes: Vec<(usize, usize)> = sizes.into_iter().collect();
    sizes = order.into_iter().map(|place| sizes[place]).collect();
    sizes.sort_by_key(|(_, size)| std::cmp::Reverse(*size)); // large ones first; the others keep their order
    let (mut filled, mut fold_of) = ([0; FOLDS], std::collections::HashMap::new());
    for (group, size) in sizes {
        let least = (0..FOLDS).min_by_key(|fold| filled[*fold]).unwrap_or(0);
        filled[least] += size;
        fold_of.insert(group, least);
    }
    groups.iter().map(|group| fold_of[group]).collect()
}

/// 0..n in an order that the seed decides.
fn shuffled(n: usize, seed: u64) -> Vec<usize> {
    let mut rng = ChaCha12Rng::seed_from_u64(seed);
    let mut order: Vec<(u64, usize)> = (0..n).map(|i| (rng.next_u64(), i)).collect();
    order.sort_unstable();
    order.into_iter().map(|(_, i)| i).collect()
}

/// Spearman's rank correlation, with the standard error of Bonett and Wright (2000).
fn spearman(pairs: &[(f64, f64)]) -> Option<Measure> {
    let count = pairs.len();
    if count < 4 {
        return None;
    }
    let (x, y) = (ranks(pairs.iter().map(|pair| pair.0)), ranks(pairs.iter().map(|pair| pair.1)));
    let middle = (count as f64 - 1.0) / 2.0;
    let sum = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - middle) * (b - middle)).sum::<f64>();
    let value = sum(&x, &y) / (sum(&x, &x) * sum(&y, &y)).sqrt();
    let stderr = ((1.0 + value * value / 2.0) / (count as f64 - 3.0)).sqrt() * (1.0 - value * value);
    value.is_finite().then_some(Measure { value, stderr, count })
}

/// From 0; equal values have the mean of their ranks.
fn ranks(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let values: Vec<f64> = values.collect();
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let mut start = 0;
    for run in order.chunk_by(|a, b| values[*a] == values[*b]) {
        run.iter().for_each(|place| ranks[*place] = start as f64 + (run.len() as f64 - 1.0) / 2.0);
        start += run.len();
    }
    ranks
}

/// What a learning curve a - b / √n, fitted by least squares, has at twice its last n.
fn extrapolated(curve: &[(usize, f64)]) -> Option<f64> {
    let (last, _) = *curve.last()?;
    let points: Vec<(f64, f64)> = curve.iter().map(|(n, value)| (1.0 / (*n as f64).sqrt(), *value)).collect();
    let n = points.len() as f64;
    let mean = |f: &dyn Fn(&(f64, f64)) -> f64| points.iter().map(f).sum::<f64>() / n;
    let (mx, my) = (mean(&|p| p.0), mean(&|p| p.1));
    let (covariance, variance) = (mean(&|p| (p.0 - mx) * (p.1 - my)), mean(&|p| (p.0 - mx).powi(2)));
    let at = my + covariance / variance * (1.0 / (2.0 * last as f64).sqrt() - mx);
    (points.len() >= 3 && at.is_finite()).then_some(at.min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fit::tests::embeddings;

    /// Opinions that follow the first number of an embedding, with some noise.
    fn data(pictures: usize, kind: &str) -> (Data, Matrix) {
        let x = embeddings(pictures, 12, 5);
        let value = |row: usize| 9.0 * (x.row(row)[0] - x.row(row)[1]) + ((row * row) as f64).sin();
        let mut sorted: Vec<f64> = (0..pictures).map(value).collect();
        sorted.sort_by(f64::total_cmp);
        let opinions = match kind {
            "scores" => Opinions::Scores((0..pictures).map(value).collect()),
            "labels" => Opinions::Labels((0..pictures).map(|row| value(row) > sorted[pictures / 2]).collect()),
            _ => {
                let pair = |i: usize| {
                    if kind == "pairs" {
                        (2 * i % pictures, (2 * i + 1) % pictures)
                    } else {
                        (i % pictures, i * 7 % pictures)
                    }
                };
                let pairs = (0..3 * pictures).map(pair).filter(|(a, b)| a != b);
                Opinions::Choices(
                    pairs
                        .map(|(a, b)| if value(a) > value(b) { (a, b) } else { (b, a) })
                        .map(|(better, worse)| Choice { better, worse, draw: better % 10 == 0 })
                        .collect(),
                )
            }
        };
        let groups: Vec<usize> = (0..pictures).map(|row| if row == 1 { 0 } else { row }).collect();
        (Data::new(x.clone(), opinions, &groups, 0).unwrap(), x)
    }

    #[test]
    fn what_can_be_learnt_is_and_noise_is_not() {
        for kind in ["scores", "labels", "choices", "pairs"] {
            let (data, x) = data(200, kind);
            assert_eq!(data.folds[0], data.folds[1], "copies are together");
            let learnt = data.learn(None).unwrap();
            let Measure { value, stderr, count } = learnt.held_out;
            assert!(value > learnt.chance + 4.0 * stderr, "{kind}: {:?}, chance {}", learnt.held_out, learnt.chance);
            assert!(count > if kind == "choices" { 60 } else { 150 }, "{kind}: {count}");
            assert!(learnt.head.weight[0] > 0.0 && learnt.head.weight[1] < 0.0);
            assert!(
                learnt.curve.len() >= 3 && learnt.curve.windows(2).all(|pair| pair[0].0 < pair[1].0),
                "{:?}",
                learnt.curve
            );
            // the same pictures by a score that knows the rule, and by one that knows nothing
            let rule: Vec<f64> = (0..200).map(|row| x.row(row)[0] - x.row(row)[1]).collect();
            let nothing: Vec<f64> = (0..200).map(|row| ((row * 37 + 11) as f64).sin()).collect();
            assert!(data.beside(&nothing).unwrap().value < value - 3.0 * stderr, "{kind}");
            if kind != "labels" {
                assert!(data.beside(&rule).unwrap().value > value - 3.0 * stderr, "{kind}");
            }
        }
        // shuffled opinions
        let x = embeddings(200, 12, 5);
        let labels = (0..200).map(|row| ((row * row * 31 + 7) as f64).sin() > 0.0).collect();
        let groups: Vec<usize> = (0..200).collect();
        let learnt = Data::new(x, Opinions::Labels(labels), &groups, 0).unwrap().learn(None).unwrap();
        assert!(learnt.held_out.value < learnt.chance + 3.0 * learnt.held_out.stderr, "{:?}", learnt.held_out);
    }

    #[test]
    fn too_few_opinions_are_an_error() {
        let x = embeddings(3, 4, 1);
        let few = |opinions| {
            Data::new(x.clone(), opinions, &[0, 1, 2], 0).unwrap().learn(None).err().map(|error| format!("{error:#}"))
        };
        for opinions in [
            Opinions::Scores(vec![1.0, 2.0, 3.0]),
            Opinions::Labels(vec![true, false, true]),
            Opinions::Choices(vec![Choice { better: 0, worse: 1, draw: false }]),
        ] {
            let error = few(opinions.clone()).unwrap_or_default();
            assert!(error.contains("too few") || error.contains("alike"), "{opinions:?}: {error}");
        }
        assert!(Data::new(x, Opinions::Scores(vec![1.0]), &[0, 1, 2], 0).is_err());
    }

    #[test]
    fn ranks_and_curves() {
        assert_eq!(ranks([3.0, 1.0, 3.0, 2.0].into_iter()), [2.5, 0.0, 2.5, 1.0]);
        let line: Vec<(f64, f64)> = (0..9).map(|i| (f64::from(i), f64::from(i).exp())).collect();
        assert!((spearman(&line).unwrap().value - 1.0).abs() < 1e-12);
        let curve: Vec<(usize, f64)> = [25, 100, 400].map(|n| (n, 0.8 - 1.0 / (n as f64).sqrt())).to_vec();
        assert!((extrapolated(&curve).unwrap() - (0.8 - 1.0 / 800f64.sqrt())).abs() < 1e-9);
        assert_eq!(extrapolated(&curve[..2]), None);
    }
}

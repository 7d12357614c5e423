//! Linear heads from people's opinions of pictures: each is the optimum of a convex problem over the pictures' unit embeddings x_i, found
//! in f64 by Newton's method.
//!
//! - scores y (ridge regression): minimise 1/n Σ (w·x_i + b - y_i)² + λ |w|²
//! - labels y, 0 or 1 (logistic regression): minimise 1/n Σ log(1 + exp(-(2 y_i - 1)(w·x_i + b))) + λ/2 |w|²
//! - choices (Bradley and Terry 1952): minimise 1/m Σ log(1 + exp(-w·(x_better - x_worse))) + λ/2 |w|², where a draw counts half in
//!   either direction; b is 0.
//!
//! b is never penalised. With targets t of 1 and 0, and of 1/2 for draws, both logarithms are log(1 + eˢ) - t s of a score s.

mod groups;
mod opinions;

use anyhow::{Result, ensure};
use nalgebra::{DMatrix, DVector};
use rayon::prelude::*;

use crate::ops::gemm::{Threads, View, ViewMut, gemm};

pub use groups::near_duplicates;
pub use opinions::{Choice, Data, Learnt, Measure, Opinions};

/// Rows of f64 numbers, all of one width.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    data: Vec<f64>,
    width: usize,
}

impl Matrix {
    /// # Errors
    /// The numbers do not fill whole rows.
    pub fn new(data: Vec<f64>, width: usize) -> Result<Self> {
        ensure!(width > 0 && data.len().is_multiple_of(width), "{} numbers in rows of {width}", data.len());
        Ok(Self { data, width })
    }

    pub fn rows(&self) -> usize {
        self.data.len() / self.width
    }
    pub fn width(&self) -> usize {
        self.width
    }
    pub fn row(&self, i: usize) -> &[f64] {
        &self.data[i * self.width..(i + 1) * self.width]
    }

    fn of_rows<'a>(rows: impl IntoIterator<Item = &'a [f64]>, width: usize) -> Self {
        Self { data: rows.into_iter().flatten().copied().collect(), width }
    }

    fn view(&self) -> View<'_, f64> {
        View::rows(&self.data, self.rows(), self.width)
    }

    /// `self` times `other`.
    fn times(&self, other: View<f64>, width: usize) -> Self {
        let mut data = vec![0.0; self.rows() * width];
        gemm(self.view(), other, ViewMut::rows(&mut data, self.rows(), width), false, Threads::All);
        Self { data, width }
    }
}

/// w and b of a score w·x + b.
#[derive(Clone, Debug, PartialEq)]
pub struct Head {
    pub weight: Vec<f64>,
    pub bias: f64,
}

impl Head {
    pub fn score(&self, x: &[f64]) -> f64 {
        dot(&self.weight, x) + self.bias
    }
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// What a row's score is held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    /// (s - t)²
    Squared,
    /// log(1 + eˢ) - t s
    Logistic,
}

/// One of the problems above, without its λ.
#[derive(Clone, Debug)]
pub struct Problem {
    /// Embeddings, or differences of embeddings.
    rows: Matrix,
    targets: Vec<f64>,
    loss: Loss,
    /// Whether there is a b.
    bias: bool,
}

impl Problem {
    /// Ridge regression.
    ///
    /// # Errors
    /// Not as many scores as rows, or none.
    pub fn ridge(rows: Matrix, scores: Vec<f64>) -> Result<Self> {
        Self::new(rows, scores, Loss::Squared, true)
    }

    /// Logistic regression.
    ///
    /// # Errors
    /// Not as many labels as rows, or all of them alike: then there is no optimum.
    pub fn logistic(rows: Matrix, labels: &[bool]) -> Result<Self> {
        ensure!(labels.contains(&true) && labels.contains(&false), "all labels are alike: both kinds are needed");
        Self::labelled(rows, labels.iter().copied())
    }

    /// [`Self::logistic`] of labels that may all be alike: to measure a head on.
    fn labelled(rows: Matrix, labels: impl Iterator<Item = bool>) -> Result<Self> {
        Self::new(rows, labels.map(|yes| f64::from(u8::from(yes))).collect(), Loss::Logistic, true)
    }

    /// Whether all labels are alike.
    fn is_one_sided(&self) -> bool {
        self.bias && self.loss == Loss::Logistic && self.targets.iter().all(|target| *target == self.targets[0])
    }

    /// Bradley and Terry's model; choices name rows of `embeddings`.
    ///
    /// # Errors
    /// There is no choice, or one names a row that is not there.
    pub fn choices(embeddings: &Matrix, choices: &[Choice]) -> Result<Self> {
        let rows = embeddings.rows();
        let mut data = Vec::with_capacity(choices.len() * embeddings.width);
        for choice in choices {
            ensure!(
                choice.better.max(choice.worse) < rows,
                "a choice of row {} among {rows}",
                choice.better.max(choice.worse)
            );
            let (better, worse) = (embeddings.row(choice.better), embeddings.row(choice.worse));
            data.extend(better.iter().zip(worse).map(|(x, y)| x - y));
        }
        let targets = choices.iter().map(|choice| if choice.draw { 0.5 } else { 1.0 }).collect();
        Self::new(Matrix { data, width: embeddings.width }, targets, Loss::Logistic, false)
    }

    fn new(rows: Matrix, targets: Vec<f64>, loss: Loss, bias: bool) -> Result<Self> {
        ensure!(
            !targets.is_empty() && rows.rows() == targets.len(),
            "{} rows with {} opinions",
            rows.rows(),
            targets.len()
        );
        Ok(Self { rows, targets, loss, bias })
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.targets.len()
    }
    pub fn is_empty(&self) -> bool {
        self.targets.is_empty()
    }

    /// Some of the rows.
    fn part(&self, rows: &[usize]) -> Self {
        let width = self.rows.width;
        Self {
            rows: Matrix::of_rows(rows.iter().map(|row| self.rows.row(*row)), width),
            targets: rows.iter().map(|row| self.targets[*row]).collect(),
            ..*self
        }
    }

    /// The factor κ of κ/2 |w|².
    fn penalty(&self, lambda: f64) -> f64 {
        if self.loss == Loss::Squared { 2.0 * lambda } else { lambda }
    }

    fn scores(&self, head: &Head) -> Vec<f64> {
        self.rows.data.par_chunks(self.rows.width).map(|row| head.score(row)).collect()
    }

    /// What is minimised, at a head.
    pub fn value(&self, head: &Head, lambda: f64) -> f64 {
        self.mean_loss(head) + self.penalty(lambda) / 2.0 * dot(&head.weight, &head.weight)
    }

    /// Without the penalty.
    pub fn mean_loss(&self, head: &Head) -> f64 {
        let loss = |(score, target): (&f64, &f64)| match self.loss {
            Loss::Squared => (score - target) * (score - target),
            Loss::Logistic => score.max(0.0) + (-score.abs()).exp().ln_1p() - target * score,
        };
        self.scores(head).iter().zip(&self.targets).map(loss).sum::<f64>() / self.len() as f64
    }

    /// The optimum, from `start` (or 0) on.
    ///
    /// # Errors
    /// λ is not more than 0, the numbers are not finite, or it is not found.
    pub fn solve(&self, lambda: f64, start: Option<&Head>) -> Result<Head> {
        self.solve_to(lambda, start, 1e-10)
    }

    /// [`Self::solve`] until a step is no longer than `tolerance` times the head.
    fn solve_to(&self, lambda: f64, start: Option<&Head>, tolerance: f64) -> Result<Head> {
        ensure!(lambda > 0.0 && lambda.is_finite(), "lambda = {lambda}: must be more than 0");
        let width = self.rows.width;
        if self.len() >= width {
            return self.newton(lambda, start, tolerance);
        }
        // w is a sum of rows: the same problem in the coordinates of an orthonormal basis Q (D, n) of them, where |w| is the same
        let basis = DMatrix::from_column_slice(width, self.len(), &self.rows.data).qr().q();
        let columns = View::rows(basis.as_slice(), basis.ncols(), width).t();
        let small = Self { rows: self.rows.times(columns, basis.ncols()), targets: self.targets.clone(), ..*self };
        let into = |head: &Head| Head {
            weight: (basis.tr_mul(&DVector::from_column_slice(&head.weight))).as_slice().to_vec(),
            ..*head
        };
        let head = small.newton(lambda, start.map(into).as_ref(), tolerance)?;
        Ok(Head { weight: (&basis * DVector::from_vec(head.weight)).as_slice().to_vec(), bias: head.bias })
    }

    /// Newton's method with the exact Hessian and a step that is halved until it goes down.
    fn newton(&self, lambda: f64, start: Option<&Head>, tolerance: f64) -> Result<Head> {
        const MOST_STEPS: usize = 100;
        let zero = Head { weight: vec![0.0; self.rows.width], bias: 0.0 };
        let mut head = start.cloned().unwrap_or(zero);
        let mut value = self.value(&head, lambda);
        for _ in 0..MOST_STEPS {
            let step = self.newton_step(&head, lambda)?;
            let moved = |scale: f64| Head {
                weight: head.weight.iter().zip(&step.weight).map(|(w, d)| w - scale * d).collect(),
                bias: head.bias - scale * step.bias,
            };
            let mut scale = 1.0;
            let mut next = moved(scale);
            // what rounding leaves of a difference near the optimum is no reason to halve
            while self.value(&next, lambda) > value + 1e-14 * value.abs() && scale > 1e-9 {
                scale /= 2.0;
                next = moved(scale);
            }
            let norm = |head: &Head| (dot(&head.weight, &head.weight) + head.bias * head.bias).sqrt();
            let settled = scale * norm(&step) <= tolerance * (1.0 + norm(&next));
            (head, value) = (next, self.value(&moved(scale), lambda));
            ensure!(value.is_finite(), "the embeddings or the opinions hold numbers that are not finite");
            if settled {
                return Ok(head);
            }
        }
        anyhow::bail!("no optimum after {MOST_STEPS} steps; a larger lambda has one that is sooner found")
    }

    /// The Hessian's inverse times the gradient.
    fn newton_step(&self, head: &Head, lambda: f64) -> Result<Head> {
        let (n, width, kappa) = (self.len() as f64, self.rows.width, self.penalty(lambda));
        // d loss / d s and d² loss / d s² of each row, of the mean
        let slopes: Vec<(f64, f64)> = self
            .scores(head)
            .iter()
            .zip(&self.targets)
            .map(|(score, target)| match self.loss {
                Loss::Squared => (2.0 * (score - target) / n, 2.0 / n),
                Loss::Logistic => {
                    let p = 1.0 / (1.0 + (-score).exp());
                    ((p - target) / n, p * (1.0 - p) / n)
                }
            })
            .collect();
        // XᵀCX of rows that end in 1 where there is a bias
        let size = width + usize::from(self.bias);
        let extended = |row: &[f64], factor: f64| {
            let one = self.bias.then_some(factor);
            row.iter().map(|x| x * factor).chain(one).collect::<Vec<f64>>()
        };
        let rows = self.rows.data.par_chunks(width).zip(&slopes);
        let scaled: Vec<f64> = rows.flat_map_iter(|(row, (_, curvature))| extended(row, curvature.sqrt())).collect();
        let scaled = Matrix { data: scaled, width: size };
        let mut hessian = vec![0.0; size * size];
        gemm(scaled.view().t(), scaled.view(), ViewMut::rows(&mut hessian, size, size), false, Threads::All);
        drop(scaled);
        let mut gradient = vec![0.0; size];
        for (row, (slope, _)) in self.rows.data.chunks(width).zip(&slopes) {
            gradient.iter_mut().zip(row).for_each(|(g, x)| *g += slope * x);
            if self.bias {
                gradient[width] += slope;
            }
        }
        for (i, w) in head.weight.iter().enumerate() {
            hessian[i * size + i] += kappa;
            gradient[i] += kappa * w;
        }
        // where every label is certain, the bias has next to no curvature
        if self.bias {
            hessian[size * size - 1] += f64::EPSILON * kappa;
        }
        // symmetric, so rows or columns are the same
        let factor = DMatrix::from_vec(size, size, hessian).cholesky();
        let Some(factor) = factor else {
            anyhow::bail!(
                "the embeddings or the opinions hold numbers that are not finite, or lambda = {lambda} is too small"
            )
        };
        let mut step = factor.solve(&DVector::from_vec(gradient)).as_slice().to_vec();
        let bias = if self.bias { step.pop().unwrap_or_default() } else { 0.0 };
        Ok(Head { weight: step, bias })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::ChaCha12Rng;
    use rand_chacha::rand_core::SeedableRng;
    use rand_distr::{Distribution, StandardNormal};

    /// Unit rows that share a part, as CLIP's do.
    pub(super) fn embeddings(rows: usize, width: usize, seed: u64) -> Matrix {
        let mut rng = ChaCha12Rng::seed_from_u64(seed);
        let mut normal = || -> f64 { StandardNormal.sample(&mut rng) };
        let common: Vec<f64> = (0..width).map(|_| normal()).collect();
        let mut data = Vec::new();
        for _ in 0..rows {
            let row: Vec<f64> = common.iter().map(|c| 1.5 * c + normal()).collect();
            let norm = dot(&row, &row).sqrt();
            data.extend(row.iter().map(|x| x / norm));
        }
        Matrix::new(data, width).unwrap()
    }

    fn problems(rows: usize, width: usize) -> Vec<Problem> {
        let x = embeddings(rows, width, 1);
        let value: Vec<f64> = (0..rows).map(|i| x.row(i)[0] - x.row(i)[1] + 0.1 * ((i * i) as f64).sin()).collect();
        let mut sorted = value.clone();
        sorted.sort_by(f64::total_cmp);
        let labels: Vec<bool> = value.iter().map(|v| *v > sorted[rows / 2]).collect();
        let choices: Vec<Choice> = (0..2 * rows)
            .map(|i| (i % rows, (i * 7 + 3) % rows))
            .filter(|(a, b)| a != b)
            .map(|(a, b)| {
                let (better, worse) = if value[a] > value[b] { (a, b) } else { (b, a) };
                Choice { better, worse, draw: (a + b) % 9 == 0 }
            })
            .collect();
        vec![
            Problem::ridge(x.clone(), value.iter().map(|v| 5.0 + v).collect()).unwrap(),
            Problem::logistic(x.clone(), &labels).unwrap(),
            Problem::choices(&x, &choices).unwrap(),
        ]
    }

    #[test]
    fn nothing_near_the_optimum_is_lower() {
        // more rows than numbers, and fewer
        for (rows, width) in [(40, 6), (9, 30)] {
            for problem in problems(rows, width) {
                for lambda in [1e-4, 1e-1] {
                    let head = problem.solve(lambda, None).unwrap();
                    let least = problem.value(&head, lambda);
                    // central differences along each axis: the slope is 0, and both neighbours are higher
                    for i in 0..=width {
                        if i == width && !problem.bias {
                            assert_eq!(head.bias, 0.0);
                            continue;
                        }
                        let at = |step: f64| {
                            let mut near = head.clone();
                            if i < width {
                                near.weight[i] += step
                            } else {
                                near.bias += step
                            }
                            problem.value(&near, lambda)
                        };
                        let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
                        assert!(slope.abs() < 1e-8, "{:?} {lambda}: {slope}", problem.loss);
                        assert!(at(1e-3) > least && at(-1e-3) > least, "{:?} {lambda}", problem.loss);
                    }
                    // from elsewhere to the same place
                    let elsewhere = Head { weight: vec![0.3; width], bias: if problem.bias { -1.0 } else { 0.0 } };
                    let again = problem.solve(lambda, Some(&elsewhere)).unwrap();
                    let apart = head.weight.iter().zip(&again.weight).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
                    assert!(apart < 1e-7, "{apart}");
                }
            }
        }
    }

    #[test]
    fn what_has_no_optimum_is_an_error() {
        let x = embeddings(4, 3, 2);
        assert!(Problem::logistic(x.clone(), &[true; 4]).is_err());
        assert!(Problem::ridge(x.clone(), vec![1.0; 3]).is_err());
        assert!(Problem::choices(&x, &[]).is_err());
        assert!(Problem::choices(&x, &[Choice { better: 0, worse: 4, draw: false }]).is_err());
        let problem = Problem::ridge(x.clone(), vec![1.0, 2.0, 3.0, f64::NAN]).unwrap();
        assert!(problem.solve(1e-3, None).is_err());
        assert!(Problem::ridge(x, vec![1.0; 4]).unwrap().solve(0.0, None).is_err());
    }
}

//! How many things of a class a detector sees, as a distribution: its tokens are trained not to repeat a thing, so the number
//! N of things of class c is the sum of independent yes-or-no draws, one a token (a Poisson binomial).
//!
//! ```text
//! z (Q, C): logits of Q tokens          t_i = z_ic - logsumexp(z_ij, j != c)            log-odds of the class
//! log p_i = -softplus(-t_i)             log q_i = -softplus(t_i)                        p + q = 1
//!
//! exactly n       f = L_n,  where L_0 = 0 and, token by token, L_k <- logaddexp(L_k + log q_i, L_{k-1} + log p_i)
//!                 d f / d t_i = A_i q_i - B_i p_i,  A_i = d L_n / d log p_i,  B_i = d L_n / d log q_i = 1 - A_i
//! at least one    f = log(1 - exp(L_0))                    d f / d t_i = p_i / expm1(-L_0)
//! expected        f = sum p_i                              d f / d t_i = p_i q_i
//!
//! d t_i / d z_ic = 1                    d t_i / d z_ij = -softmax(z_ij, j != c)
//! ```
//!
//! A detector that is sure has logits of 40 and more, where p or q is 1 in any float: so everything goes by the log-odds, in f64.
//! The numbers are few (100 tokens, 92 classes) and are looked at on the host, also where they are on a GPU, which is waited
//! for. The gradient is known when the value is, and kept in place of the logits.

use candle_core::{DType, Device, Result, Tensor, bail};

/// What is asked of the number N of things of a class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// log P(N = n)
    Exactly(usize),
    /// log P(N >= 1)
    AtLeastOne,
    /// `E[N]`
    Expected,
}

/// `asked` of the class with index `class` in one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    pub class: usize,
    pub asked: Asked,
}

/// The answers (B) to one question an image, of logits (B, Q, C), the last class being "none"; and their gradients (B, Q, C).
///
/// # Errors
/// Another number of questions than of images, a class that is not there, more things than tokens.
pub fn detections_fwd(logits: &Tensor, questions: &[Question]) -> Result<(Tensor, Tensor)> {
    let (b, q, c) = logits.dims3()?;
    if questions.len() != b {
        bail!("detections: {} questions for {b} images", questions.len());
    }
    let rows = logits.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec3::<f64>()?;
    let (mut values, mut slopes) = (Vec::with_capacity(b), Vec::with_capacity(b * q * c));
    for (tokens, Question { class, asked }) in rows.iter().zip(questions) {
        if *class + 1 >= c {
            bail!("detections: there is no class {class} among {}", c.saturating_sub(1));
        }
        let odds: Vec<(f64, f64)> = tokens.iter().map(|z| log_odds(z, *class)).collect();
        let (value, d_odds) = answer(&odds.iter().map(|(t, _)| *t).collect::<Vec<_>>(), *asked)?;
        values.push(value);
        for ((z, (_, others)), d) in tokens.iter().zip(&odds).zip(d_odds) {
            slopes.extend(z.iter().enumerate().map(|(j, z)| if j == *class { d } else { -d * (z - others).exp() }));
        }
    }
    let put = |x: Tensor| x.to_dtype(logits.dtype())?.to_device(logits.device());
    Ok((put(Tensor::from_vec(values, b, &Device::Cpu)?)?, put(Tensor::from_vec(slopes, (b, q, c), &Device::Cpu)?)?))
}

/// Gradient of the logits (B, Q, C): cotangent (B), and the gradients that the forward gave.
pub fn detections_bwd(cotangent: &Tensor, slopes: &Tensor) -> Result<Tensor> {
    let b = cotangent.dims1()?;
    slopes.broadcast_mul(&cotangent.reshape((b, 1, 1))?)
}

/// log P(N = 0..=Q) of one image's logits (Q, C).
///
/// # Errors
/// The class is not there.
pub fn count_log_probs(logits: &Tensor, class: usize) -> Result<Vec<f64>> {
    let (q, c) = logits.dims2()?;
    if class + 1 >= c {
        bail!("detections: there is no class {class} among {}", c.saturating_sub(1));
    }
    let rows = logits.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let odds: Vec<f64> = rows.iter().map(|z| log_odds(z, class).0).collect();
    Ok(distributions(&odds, q).pop().unwrap_or_default())
}

/// The log-odds of a class, and the logsumexp of the other logits.
fn log_odds(z: &[f64], class: usize) -> (f64, f64) {
    let others = || z.iter().enumerate().filter(|(j, _)| *j != class).map(|(_, z)| *z);
    let largest = others().fold(f64::NEG_INFINITY, f64::max);
    let others = largest + others().map(|z| (z - largest).exp()).sum::<f64>().ln();
    (z[class] - others, others)
}

/// log(1 + exp(t))
fn softplus(t: f64) -> f64 {
    t.max(0.0) + (-t.abs()).exp().ln_1p()
}

fn log_add(a: f64, b: f64) -> f64 {
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    if high == f64::NEG_INFINITY { high } else { high + (low - high).exp().ln_1p() }
}

/// L_0..=L_most behind each number of tokens, none first.
fn distributions(odds: &[f64], most: usize) -> Vec<Vec<f64>> {
    let mut none = vec![f64::NEG_INFINITY; most + 1];
    none[0] = 0.0;
    let mut rows = vec![none];
    for t in odds {
        let last = &rows[rows.len() - 1];
        let (p, q) = (-softplus(-t), -softplus(*t));
        let more = |k: usize| if k == 0 { f64::NEG_INFINITY } else { last[k - 1] + p };
        let next = (0..=most).map(|k| log_add(last[k] + q, more(k))).collect();
        rows.push(next);
    }
    rows
}

/// The answer for log-odds, and its gradient.
fn answer(odds: &[f64], asked: Asked) -> Result<(f64, Vec<f64>)> {
    let p = |t: &f64| (-softplus(-t)).exp();
    Ok(match asked {
        Asked::Expected => (odds.iter().map(p).sum(), odds.iter().map(|t| p(t) * p(&-t)).collect()),
        Asked::AtLeastOne => {
            let none: f64 = -odds.iter().map(|t| softplus(*t)).sum::<f64>();
            // each of the two is exact where the other is not
            let some = if none > -std::f64::consts::LN_2 { (-none.exp_m1()).ln() } else { (-none.exp()).ln_1p() };
            (some, odds.iter().map(|t| p(t) / (-none).exp_m1()).collect())
        }
        Asked::Exactly(n) => {
            if n > odds.len() {
                bail!("detections: {n} things among {} tokens", odds.len());
            }
            let rows = distributions(odds, n);
            // d f / d L_k behind the tokens that are left, last token first
            let mut d_rows = vec![0.0; n + 1];
            d_rows[n] = 1.0;
            let mut slopes = vec![0.0; odds.len()];
            for (i, t) in odds.iter().enumerate().rev() {
                let (before, after) = (&rows[i], &rows[i + 1]);
                // the share of L_k that came with the token, and without it
                let share = |k: usize, from: f64| {
                    if after[k] == f64::NEG_INFINITY { 0.0 } else { (from - after[k]).exp() * d_rows[k] }
                };
                let without: Vec<f64> = (0..=n).map(|k| share(k, before[k] - softplus(*t))).collect();
                let with: Vec<f64> = (1..=n).map(|k| share(k, before[k - 1] - softplus(-t))).collect();
                slopes[i] = with.iter().sum::<f64>() * p(&-t) - without.iter().sum::<f64>() * p(t);
                d_rows = (0..=n).map(|k| without[k] + with.get(k).unwrap_or(&0.0)).collect();
            }
            (rows[odds.len()][n], slopes)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Case, check};

    fn ask(class: usize, asked: Asked) -> Question {
        Question { class, asked }
    }

    /// P(N = n) as a sum over all sets of tokens, of candle operations.
    fn composed(logits: &Tensor, Question { class, asked }: Question) -> Result<Tensor> {
        let e = logits.exp()?;
        let p = (e.narrow(1, class, 1)?.squeeze(1)? / e.sum(1)?)?;
        let q = p.affine(-1.0, 1.0)?;
        let tokens = p.dims1()?;
        let of_set = |set: usize| {
            let choose = |i: usize| if set >> i & 1 == 1 { p.get(i) } else { q.get(i) };
            (1..tokens).try_fold(choose(0)?, |product, i| product * choose(i)?)
        };
        let sum = |wanted: &dyn Fn(usize) -> bool| {
            let sets = (0..1 << tokens).filter(|set: &usize| wanted(set.count_ones() as usize));
            let terms = sets.map(of_set).collect::<Result<Vec<_>>>()?;
            Tensor::stack(&terms, 0)?.sum(0)
        };
        match asked {
            Asked::Exactly(n) => sum(&|found| found == n)?.log(),
            Asked::AtLeastOne => sum(&|found| found > 0)?.log(),
            Asked::Expected => p.sum(0),
        }
    }

    #[test]
    fn agree_with_all_sets_of_tokens_and_with_finite_differences() {
        for (tokens, classes) in [(1, 2), (5, 4), (6, 9)] {
            for asked in
                [Asked::Exactly(0), Asked::Exactly(1), Asked::Exactly(tokens), Asked::AtLeastOne, Asked::Expected]
            {
                let questions = [ask(0, asked), ask(classes - 2, asked)];
                check(
                    &[Case::normal(&[2, tokens, classes], 1)],
                    |x| Ok(detections_fwd(&x[0], &questions)?.0),
                    |x, d| Ok(vec![detections_bwd(d, &detections_fwd(&x[0], &questions)?.1)?]),
                    |x| {
                        Tensor::stack(
                            &[composed(&x[0].get(0)?, questions[0])?, composed(&x[0].get(1)?, questions[1])?],
                            0,
                        )
                    },
                );
            }
        }
    }

    #[test]
    fn a_detector_that_is_sure_has_exact_numbers_and_a_gradient() {
        // two tokens, log-odds of -60 and 50: the probabilities are 0 and 1 in f32
        let logits = Tensor::new(&[[[-30f64, 30.0], [25.0, -25.0]]], &Device::Cpu).unwrap();
        let answer = |asked| {
            let (value, slopes) = detections_fwd(&logits, &[ask(0, asked)]).unwrap();
            (value.to_vec1::<f64>().unwrap()[0], slopes.to_vec3::<f64>().unwrap()[0].clone())
        };
        let near = |x: f64, y: f64| assert!((x / y - 1.0).abs() < 1e-12, "{x} for {y}");
        let (none, d_none) = answer(Asked::Exactly(0));
        near(none, -50.0);
        near(d_none[1][0], -1.0);
        let (two, d_two) = answer(Asked::Exactly(2));
        near(two, -60.0);
        near(d_two[0][0], 1.0);
        let (one, _) = answer(Asked::Exactly(1));
        near(one, -((-50f64).exp() + (-60f64).exp()));
        let (some, d_some) = answer(Asked::AtLeastOne);
        near(some, -(-50f64).exp());
        near(d_some[1][0], (-50f64).exp());
        let all: f64 = count_log_probs(&logits.get(0).unwrap(), 0).unwrap().iter().map(|l| l.exp()).sum();
        near(all, 1.0);
    }

    #[test]
    fn what_cannot_be_asked_is_an_error() {
        let logits = Case::normal(&[1, 3, 4], 1);
        for question in [ask(3, Asked::Expected), ask(0, Asked::Exactly(4))] {
            assert!(detections_fwd(&logits, &[question]).is_err(), "{question:?}");
        }
        assert!(detections_fwd(&logits, &[]).is_err());
        assert!(count_log_probs(&logits.get(0).unwrap(), 3).is_err());
    }
}

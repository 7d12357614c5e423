//! Which step of a run is the best: defined here and nowhere else.

use super::metrics::{Metrics, names};

/// The best of a run's steps.
#[derive(Clone, Debug, PartialEq)]
pub struct Best {
    /// The optimizer step.
    pub step: usize,
    /// What it was judged by.
    pub metric: String,
    /// The metric's value there.
    pub score: f64,
}

impl Best {
    /// What the score is, in words.
    pub fn by(&self) -> &str {
        match self.metric.as_str() {
            names::GUARD_HELD_OUT => "held-out score",
            names::SAMPLE_LOSS => "loss of the samples",
            other => other,
        }
    }
}

/// The best of the steps `among`: by the guard's held-out score, or without one by the loss of the sample grids, which is
/// best where it is lowest. Of equals the earliest, which is the nearest to the base model. `None` where neither was
/// measured.
pub fn best(metrics: &Metrics, among: impl Fn(usize) -> bool) -> Option<Best> {
    match metrics.history(names::GUARD_HELD_OUT).is_empty() {
        false => extreme(metrics, names::GUARD_HELD_OUT, 1.0, among),
        true => extreme(metrics, names::SAMPLE_LOSS, -1.0, among),
    }
}

/// [`best`] of all steps. A run in which neither of its metrics was measured is shown by the guard's reward, or without one by
/// the first reward of the samples, or of the training batches; `untrained` tells the rewards of no weight.
pub fn best_to_show(metrics: &Metrics, untrained: impl Fn(&str) -> bool) -> Option<Best> {
    let is_score = |name: &str| !names::is_spread(name) && !untrained(names::base(name));
    let first =
        |start: &str| metrics.all().map(|(name, _)| name).find(|name| name.starts_with(start) && is_score(name));
    best(metrics, |_| true).or_else(|| {
        let metric = first(names::GUARD_REWARD).or_else(|| first(names::SAMPLES)).or_else(|| first(names::REWARDS))?;
        extreme(metrics, metric, 1.0, |_| true)
    })
}

/// The earliest step with the largest value of sign times the metric.
fn extreme(metrics: &Metrics, metric: &str, sign: f64, among: impl Fn(usize) -> bool) -> Option<Best> {
    let points = metrics.history(metric).iter().filter(|(step, _)| among(*step));
    // `max_by` gives the last of equals
    let (step, score) = *points.rev().max_by(|(_, x), (_, y)| (sign * x).total_cmp(&(sign * y)))?;
    Some(Best { step, metric: metric.to_owned(), score })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(text: &str) -> Metrics {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        std::fs::write(&path, text).unwrap();
        Metrics::read(&path).unwrap()
    }

    fn place(best: Option<Best>) -> Option<(usize, String, f64)> {
        best.map(|best| (best.step, best.metric, best.score))
    }

    #[test]
    fn the_held_out_score_comes_before_the_loss_of_the_samples() {
        let with_guard = metrics(concat!(
            "{\"step\":0,\"sample/a\":1,\"sample/loss\":3}\n",
            "{\"step\":1,\"guard/reward\":9,\"guard/held_out\":1}\n",
            "{\"step\":2,\"guard/held_out\":4}\n",
            "{\"step\":3,\"sample/loss\":1}\n",
            "{\"step\":3,\"guard/held_out\":4}\n",
        ));
        // the earliest of equals, and among those that are asked for
        assert_eq!(place(best(&with_guard, |_| true)), Some((2, "guard/held_out".into(), 4.0)));
        assert_eq!(place(best(&with_guard, |step| step != 2)), Some((3, "guard/held_out".into(), 4.0)));
        assert_eq!(place(best(&with_guard, |step| step == 0)), None);
        assert_eq!(best_to_show(&with_guard, |_| false), best(&with_guard, |_| true));

        let samples = metrics(concat!(
            "{\"step\":0,\"sample/a\":9,\"sample/loss\":3}\n",
            "{\"step\":2,\"sample/a\":1,\"sample/loss\":1}\n",
            "{\"step\":4,\"sample/a\":1,\"sample/loss\":1,\"guard/reward\":7}\n",
        ));
        let lowest = best(&samples, |_| true).unwrap();
        assert_eq!((lowest.step, lowest.score, lowest.by()), (2, 1.0, "loss of the samples"));
        assert_eq!(best_to_show(&samples, |_| false), Some(lowest));
    }

    #[test]
    fn without_either_there_is_none_and_a_reward_is_shown() {
        let batches = metrics(concat!(
            "{\"step\":1,\"loss\":1,\"reward/a\":9,\"reward/a_std\":99,\"reward/b\":1}\n",
            "{\"step\":2,\"loss\":1,\"reward/a\":9,\"reward/b\":2}\n",
        ));
        assert_eq!(best(&batches, |_| true), None);
        assert_eq!(place(best_to_show(&batches, |_| false)), Some((1, "reward/a".into(), 9.0)));
        assert_eq!(place(best_to_show(&batches, |name| name == "a")), Some((2, "reward/b".into(), 2.0)));
        assert_eq!(best_to_show(&metrics(""), |_| false), None);
    }
}

//! What came of a run, in words: for its page and for the end of `train`.

use super::change::{Change, Verdict};
use super::samples::Pairs;
use super::{Metrics, names};
use crate::config::{Config, shell_word};

/// The findings, a sentence each, and what to do about them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    pub findings: Vec<String>,
    /// Why, and the command.
    pub next: (String, String),
}

/// The summary of the run in `dir` so far.
pub fn summary(config: &Config, metrics: &Metrics, pairs: &Pairs, dir: &str) -> Summary {
    let (mut findings, mut judges) = (Vec::new(), Vec::new());
    // 1 where what was asked for happened, -1 where its opposite did
    let mut learned = None;
    for (name, weight) in config.reward.weights() {
        let (on_samples, in_batches) = (pairs.change(name), Change::of_batches(metrics.history(&names::reward(name))));
        let who = if weight == 0.0 { format!("{name}, which is not trained,") } else { name.to_owned() };
        if let Some(change) = &on_samples {
            findings.push(of_samples(&who, change));
        }
        if let Some(change) = &in_batches {
            findings.push(format!("{who} {} over the training batches: {}.", verb(change), change.in_numbers()));
        }
        let Some(change) = on_samples.or(in_batches) else {
            if let [(_, from), .., (_, to)] = metrics.history(&names::sample(name)) {
                findings.push(format!(
                    "{who} went from {from:.4} to {to:.4} on the samples, too few to tell that from chance."
                ));
            }
            continue;
        };
        match weight {
            0.0 => judges.push(direction(&change)),
            _ => learned = learned.max(Some(direction(&change) * if weight < 0.0 { -1 } else { 1 })),
        }
    }
    if let [(first, from), .., (last, to)] = metrics.history(names::GUARD_HELD_OUT) {
        let verb = if to > from { "rose" } else { "fell" };
        findings.push(format!(
            "The guard's held-out score, which is not trained, {verb}: from {from:.4} at step {first} to {to:.4} at step {last}."
        ));
        judges.push(if to > from { 1 } else { -1 });
    }
    if judges.is_empty() && learned.is_some() {
        findings.push(
            "Nothing else judged the pictures: a reward of weight 0, or one under [guard.reward], says whether they are better or only \
             please this one."
                .to_owned(),
        );
    }
    let dir = shell_word(dir);
    let next = match learned {
        Some(1) if judges.contains(&-1) => (
            "a judge fell while the reward rose, a sign of over-optimisation; see what weaker adapters do",
            format!("alignprop eval --checkpoint {dir} --lora-scale 0,0.25,0.5,1"),
        ),
        Some(0) => (
            "the change is within chance; train longer, or start again with a larger optimizer.lr",
            format!("alignprop train --resume {dir} --set train.steps={}", 2 * config.train.steps),
        ),
        Some(-1) => (
            "the reward went the wrong way; start again with a smaller optimizer.lr",
            format!(
                "alignprop train --config {dir}/config.toml --set run.dir={dir}-again --set optimizer.lr={}",
                config.optimizer.lr / 3.0
            ),
        ),
        _ => ("more pictures, beside those of the base model", format!("alignprop eval --checkpoint {dir}")),
    };
    Summary { findings, next: (next.0.to_owned(), next.1) }
}

/// `clip-score rose on 8 sample pictures: from 0.7814 to 0.7890, +0.0076 ± 0.0031; ..`
fn of_samples(who: &str, change: &Change) -> String {
    let (better, of) = change.better.unwrap_or_default();
    let mut text = format!("{who} {} on {of} sample pictures: {}", verb(change), change.in_numbers());
    if let Some(spread) = change.spread.filter(|spread| *spread > 0.0) {
        text +=
            &format!(", {:.1} times the spread among the pictures before", (change.to - change.from).abs() / spread);
    }
    text + &format!("; {better} of {of} rose.")
}

fn verb(change: &Change) -> &'static str {
    match change.verdict() {
        Verdict::Rose => "rose",
        Verdict::Fell => "fell",
        Verdict::Level => "changed by no more than chance",
    }
}

fn direction(change: &Change) -> i32 {
    match change.verdict() {
        Verdict::Rose => 1,
        Verdict::Level => 0,
        Verdict::Fell => -1,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    use super::super::samples::Sample;
    use super::*;

    /// The summary where `hps` is trained, `pickscore` judges, and they change like this on three pictures.
    fn of(weight: &str, hps: [f64; 3], pickscore: [f64; 3]) -> Summary {
        let text = format!("[reward]\nhps.weight = {weight}\npickscore.weight = 0");
        let config = Config::parse(&text, "test", &[]).unwrap();
        let sample = |by: f64, judge: f64, i: usize| Sample {
            prompt: "a cat".to_owned(),
            scores: BTreeMap::from([("hps".to_owned(), by + i as f64), ("pickscore".to_owned(), judge)]),
            picture: PathBuf::new(),
        };
        let pairs = (0..3).map(|i| (sample(0.0, 0.0, i), Some(sample(hps[i], pickscore[i], i)))).collect();
        let metrics = Metrics::read(&PathBuf::from("no/such/file")).unwrap();
        summary(&config, &metrics, &Pairs { steps: (0, 9), pairs }, "runs/a b")
    }

    #[test]
    fn the_words_follow_the_numbers() {
        let rising = of("1", [0.5, 0.6, 0.7], [0.1, 0.2, 0.3]);
        assert_eq!(
            rising.findings,
            [
                "hps rose on 3 sample pictures: from 1.000 to 1.600, +0.600 ± 0.058, 0.6 times the spread among the pictures before; \
                 3 of 3 rose.",
                "pickscore, which is not trained, rose on 3 sample pictures: from 0.000 to 0.200, +0.200 ± 0.058; 3 of 3 rose."
            ]
        );
        assert_eq!(rising.next.1, "alignprop eval --checkpoint 'runs/a b'");
        for (summary, words) in [
            (of("1", [0.5, 0.6, 0.7], [-0.1, -0.2, -0.3]), "--lora-scale 0,0.25"),
            (of("1", [-0.5, 0.6, 0.1], [0.0; 3]), "--set train.steps=200"),
            (of("1", [-0.5, -0.6, -0.7], [0.0; 3]), "--set optimizer.lr="),
            // less of it was asked for
            (of("-1", [-0.5, -0.6, -0.7], [0.0; 3]), "alignprop eval --checkpoint 'runs/a b'"),
        ] {
            assert!(summary.next.1.contains(words), "{summary:?}");
        }
    }
}

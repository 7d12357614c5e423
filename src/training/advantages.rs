//! How much better than expected an image is: what policy gradients multiply the gradient of its density with.

use std::collections::{BTreeMap, HashMap, VecDeque};

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};

use crate::config::Deviation;

/// Added to a deviation of all rewards of a round, and to one of a prompt's latest rewards, as DDPO's code has them.
const OF_ROUND: f64 = 1e-8;
const OF_PROMPT: f64 = 1e-6;

/// How the names of tensors with a prompt's rewards begin.
const NAMED: &str = "rewards.";

/// (r - mean) / (deviation + 1e-8) of the rewards themselves.
pub fn of_round(rewards: &[f64]) -> Vec<f64> {
    let Moments { mean, deviation } = Moments::of(rewards.iter().copied(), 0);
    rewards.iter().map(|reward| (reward - mean) / (deviation + OF_ROUND)).collect()
}

/// (r - mean of the group) / deviation. Rewards of one group have equal keys.
pub fn of_groups<K: Ord>(groups: &[K], rewards: &[f64], deviation: Deviation) -> Vec<f64> {
    let mut members: BTreeMap<&K, Vec<f64>> = BTreeMap::new();
    for (group, reward) in groups.iter().zip(rewards) {
        members.entry(group).or_default().push(*reward);
    }
    let lost = usize::from(deviation == Deviation::Group);
    let of_members = |members: &Vec<f64>| Moments::of(members.iter().copied(), lost);
    let moments: BTreeMap<&K, Moments> = members.iter().map(|(group, members)| (*group, of_members(members))).collect();
    let of_round = Moments::of(rewards.iter().copied(), 0).deviation;
    let advantage = |(group, reward): (&K, &f64)| {
        let moments = &moments[group];
        let divisor = match deviation {
            Deviation::Group => moments.deviation + 1e-8,
            Deviation::GroupPopulation => moments.deviation + 1e-4,
            Deviation::Round => of_round + 1e-4,
        };
        (reward - moments.mean) / divisor
    };
    groups.iter().zip(rewards).map(advantage).collect()
}

struct Moments {
    mean: f64,
    deviation: f64,
}

impl Moments {
    /// The deviation divides by n - `lost`. Equal numbers have no deviation, whatever their mean is rounded to.
    fn of(values: impl Iterator<Item = f64> + Clone, lost: usize) -> Self {
        let n = values.clone().count();
        let first = values.clone().next().unwrap_or(0.0);
        if values.clone().all(|value| value == first) {
            return Self { mean: first, deviation: 0.0 };
        }
        let mean = values.clone().sum::<f64>() / n as f64;
        let squares = values.map(|value| (value - mean) * (value - mean)).sum::<f64>();
        Self { mean, deviation: (squares / (n - lost) as f64).sqrt() }
    }
}

/// The latest rewards of each prompt: a part of a run's state.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PromptStatistics(BTreeMap<String, VecDeque<f64>>);

impl PromptStatistics {
    /// Takes in the rewards of a round, for each prompt the latest `buffer_size`, and gives their advantages: (r - mean) /
    /// (deviation + 1e-6) of the prompt's, or where it has fewer than `min_count` of the round's.
    pub fn advantages(&mut self, prompts: &[&str], rewards: &[f64], buffer_size: usize, min_count: usize) -> Vec<f64> {
        for (prompt, reward) in prompts.iter().zip(rewards) {
            let latest = self.0.entry((*prompt).to_owned()).or_default();
            latest.push_back(*reward);
            while latest.len() > buffer_size {
                latest.pop_front();
            }
        }
        let of_round = || Moments::of(rewards.iter().copied(), 0);
        let advantage = |(prompt, reward): (&&str, &f64)| {
            let own = self.0.get(*prompt).filter(|latest| latest.len() >= min_count);
            let moments = own.map_or_else(of_round, |latest| Moments::of(latest.iter().copied(), 0));
            (reward - moments.mean) / (moments.deviation + OF_PROMPT)
        };
        prompts.iter().zip(rewards).map(advantage).collect()
    }

    /// As a checkpoint keeps them: for each prompt its rewards (n), f64, oldest first.
    pub fn tensors(&self) -> Result<HashMap<String, Tensor>> {
        let tensor = |(prompt, latest): (&String, &VecDeque<f64>)| {
            let latest: Vec<f64> = latest.iter().copied().collect();
            Ok((format!("{NAMED}{prompt}"), Tensor::new(latest, &Device::Cpu)?))
        };
        self.0.iter().map(tensor).collect()
    }

    /// From there.
    ///
    /// # Errors
    /// A tensor that is none of rewards.
    pub fn from_tensors(tensors: HashMap<String, Tensor>) -> Result<Self> {
        let latest = |(name, rewards): (String, Tensor)| {
            let read = || Some((name.strip_prefix(NAMED)?.to_owned(), rewards.to_vec1::<f64>().ok()?.into()));
            read().with_context(|| format!("`{name}` is no list of a prompt's rewards"))
        };
        Ok(Self(tensors.into_iter().map(latest).collect::<Result<_>>()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_close(found: &[f64], expected: &[f64]) {
        let close = found.iter().zip(expected).all(|(x, y)| (x - y).abs() < 1e-6);
        assert!(found.len() == expected.len() && close, "{found:?}, expected {expected:?}");
    }

    #[test]
    fn a_round_has_mean_zero_and_deviation_one() {
        assert_close(&of_round(&[1.0, 3.0]), &[-1.0, 1.0]);
        assert_eq!(of_round(&[0.1; 3]), [0.0; 3]);
        assert!(of_round(&[]).is_empty());
    }

    #[test]
    fn groups_have_means_of_their_own() {
        let (groups, rewards) = ([0, 1, 0, 1], [1.0, 10.0, 3.0, 14.0]);
        let half = 0.5f64.sqrt();
        assert_close(&of_groups(&groups, &rewards, Deviation::Group), &[-half, -half, half, half]);
        let population = of_groups(&groups, &rewards, Deviation::GroupPopulation);
        assert_close(&population, &[-1.0 / 1.0001, -2.0 / 2.0001, 1.0 / 1.0001, 2.0 / 2.0001]);
        // mean 7, squares 36 + 9 + 16 + 49
        let deviation = 27.5f64.sqrt() + 1e-4;
        assert_close(&of_groups(&groups, &rewards, Deviation::Round), &[-1.0, -2.0, 1.0, 2.0].map(|r| r / deviation));
        // a group without spread, and one of one: nothing to learn, not a division by zero
        assert_eq!(of_groups(&[0, 0, 1], &[0.1, 0.1, 5.0], Deviation::Group), [0.0; 3]);
    }

    #[test]
    fn a_prompt_is_compared_with_itself_as_soon_as_it_is_known() {
        let mut statistics = PromptStatistics::default();
        // too few of both: mean 3, deviation sqrt(14 / 3) of the round
        let deviation = (14.0f64 / 3.0).sqrt();
        let first = statistics.advantages(&["cat", "dog", "cat"], &[1.0, 6.0, 2.0], 3, 3);
        assert_close(&first, &[-2.0, 3.0, -1.0].map(|r| r / deviation));
        // the cat's last three are 2, 4, 6; the dog's two are too few: it is compared with 4, 6, 6
        let second = statistics.advantages(&["cat", "cat", "dog"], &[4.0, 6.0, 6.0], 3, 3);
        let (own, round) = ((8.0f64 / 3.0).sqrt(), (8.0f64 / 9.0).sqrt());
        assert_close(&second, &[0.0, 2.0 / own, (6.0 - 16.0 / 3.0) / round]);
        assert_eq!(PromptStatistics::from_tensors(statistics.tensors().unwrap()).unwrap(), statistics);
    }
}

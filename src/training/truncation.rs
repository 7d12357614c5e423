//! Which denoising steps keep their gradient: the one place that knows the rules.

use anyhow::{Result, ensure};
use rand_distr::{Distribution, Normal};

use crate::config::{Per, Truncation};
use crate::diffusion::noise::below;
use crate::diffusion::{DdimSchedule, DdimStep, Noise, Stream};

/// The chain to run for some samples, and where it is differentiated.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The steps from x_T on. Usually the whole schedule; ReFL ends early, with a prediction of x_0.
    pub steps: Vec<DdimStep>,
    /// `keep[i][s]`: whether step i keeps the gradient of its noise prediction for sample s.
    pub keep: Vec<Vec<bool>>,
    /// The UNet's input is detached: the gradient flows along the DDIM path only (DRTune).
    pub detach_input: bool,
    /// DRaFT-LV: the image is noised to the last step's level and denoised again this often, and those images'
    /// gradients are averaged; zero otherwise.
    pub renoise: usize,
}

impl Plan {
    /// The plan of optimizer step `step` for the samples `samples` of its global batch.
    ///
    /// Drawn from (seed, step, sample), so that another split into micro-batches gives the same plan.
    ///
    /// # Errors
    /// The rule does not fit the number of steps.
    pub fn new(
        rule: &Truncation,
        schedule: &DdimSchedule,
        noise: &Noise,
        step: u64,
        samples: std::ops::Range<u64>,
    ) -> Result<Self> {
        let total = schedule.len();
        // what is drawn once for a batch is drawn as by a sample that does not exist
        let batch = u64::MAX;
        let who = |per: &Per, sample| if *per == Per::Batch { batch } else { sample };
        let count = samples.end.saturating_sub(samples.start) as usize;
        let same =
            |kept: &dyn Fn(usize) -> bool, steps: usize| (0..steps).map(|i| vec![kept(i); count]).collect::<Vec<_>>();
        // the first kept step of each sample, after which all are kept
        let from = |first: &dyn Fn(u64) -> usize| {
            let firsts: Vec<usize> = samples.clone().map(first).collect();
            (0..total).map(|i| firsts.iter().map(|first| i >= *first).collect()).collect::<Vec<Vec<bool>>>()
        };

        let mut plan = Self { steps: schedule.steps().to_vec(), keep: Vec::new(), detach_input: false, renoise: 0 };
        plan.keep = match rule {
            Truncation::Uniform { per } => {
                from(&|sample| total - 1 - noise.below(Stream::Truncation, step, who(per, sample), total))
            }
            Truncation::Fixed { k } => {
                ensure!(
                    (1..=total).contains(k),
                    "truncation.k = {k}: it is 1 to {total}, the number of denoising steps"
                );
                from(&|_| total - k)
            }
            Truncation::Gaussian { mean, std, per } => {
                let normal = Normal::new(*mean, *std)?;
                from(&|sample| {
                    let mut rng = noise.generator(Stream::Truncation, step, who(per, sample));
                    // redrawn until it lies inside, as in the official code; the limit is for a mean far outside
                    (0..10_000)
                        .map(|_| normal.sample(&mut rng))
                        .find(|i| *i >= 1.0 && *i < total as f64)
                        .map_or(total - 1, |i| i as usize)
                })
            }
            Truncation::PerStep { lo, hi } => {
                let mut rng = noise.generator(Stream::Truncation, step, batch);
                let kept: Vec<bool> = (0..total).map(|i| i >= lo + below(&mut rng, hi - lo + 1)).collect();
                same(&|i| kept[i], total)
            }
            Truncation::Full => same(&|_| true, total),
            Truncation::Steps { steps } => {
                ensure!(
                    steps.iter().all(|i| *i < total),
                    "truncation.steps: every one is below {total}, the number of denoising steps"
                );
                same(&|i| steps.contains(&i), total)
            }
            Truncation::DraftLv { n } => {
                plan.renoise = *n;
                same(&|_| false, total)
            }
            Truncation::Refl { lo, hi } => {
                ensure!(
                    lo <= hi && *hi < total,
                    "truncation.lo = {lo}, hi = {hi}: lo <= hi < {total}, the number of denoising steps"
                );
                let stop = lo + noise.below(Stream::Truncation, step, batch, hi - lo + 1);
                plan.steps.truncate(stop);
                plan.steps.push(schedule.predicted_original(stop));
                same(&|i| i == stop, stop + 1)
            }
            Truncation::Drtune { k } => {
                plan.detach_input = true;
                let k = k.unwrap_or(total);
                ensure!(
                    (1..=total).contains(&k),
                    "truncation.k = {k}: it is 1 to {total}, the number of denoising steps"
                );
                // equally spaced steps from a random offset, as in the paper (Wu et al. 2024)
                let spacing = total / k;
                let offset = noise.below(Stream::Truncation, step, batch, total - spacing * (k - 1));
                same(&|i| i >= offset && (i - offset).is_multiple_of(spacing) && (i - offset) / spacing < k, total)
            }
        };
        Ok(plan)
    }

    /// The most steps that a plan under this rule keeps of a chain of `total`.
    pub fn most_kept(rule: &Truncation, total: usize) -> usize {
        match rule {
            Truncation::Uniform { .. }
            | Truncation::Gaussian { .. }
            | Truncation::PerStep { .. }
            | Truncation::Full => total,
            Truncation::Fixed { k } => *k,
            Truncation::Steps { steps } => steps.len(),
            Truncation::DraftLv { .. } | Truncation::Refl { .. } => 1,
            Truncation::Drtune { k } => k.unwrap_or(total),
        }
    }

    /// A plan with the same mask for `samples` samples.
    pub fn with_mask(schedule: &DdimSchedule, keep: &[bool], samples: usize) -> Self {
        Self {
            steps: schedule.steps().to_vec(),
            keep: keep.iter().map(|k| vec![*k; samples]).collect(),
            detach_input: false,
            renoise: 0,
        }
    }

    /// Two plans, of the first `n` steps and of the others.
    pub fn split_at(&self, n: usize) -> (Self, Self) {
        let part = |range: std::ops::Range<usize>| Self {
            steps: self.steps[range.clone()].to_vec(),
            keep: self.keep[range].to_vec(),
            ..self.clone()
        };
        (part(0..n), part(n..self.steps.len()))
    }

    /// The last step alone, which every sample keeps.
    pub fn last_step_alone(&self) -> Self {
        let samples = self.keep.first().map_or(0, Vec::len);
        Self {
            steps: self.steps.last().copied().into_iter().collect(),
            keep: vec![vec![true; samples]],
            detach_input: false,
            renoise: 0,
        }
    }

    /// The samples that keep step `i`, in order.
    pub fn kept_rows(&self, i: usize) -> Vec<usize> {
        (0..).zip(&self.keep[i]).filter(|(_, kept)| **kept).map(|(row, _)| row).collect()
    }

    /// How many steps each sample keeps.
    pub fn kept_by_sample(&self) -> Vec<usize> {
        let samples = self.keep.first().map_or(0, Vec::len);
        (0..samples).map(|sample| self.keep.iter().filter(|kept| kept[sample]).count()).collect()
    }

    /// The earliest step that some sample keeps.
    pub fn first_kept(&self) -> Option<usize> {
        self.keep.iter().position(|kept| kept.iter().any(|k| *k))
    }

    /// The newest steps that every sample keeps, at most `count`: those worth recording, as the way back meets them first.
    /// `recorded[i]` is whether step i is one.
    pub fn recorded(&self, count: usize) -> Vec<bool> {
        let mut left = count;
        let mut recorded: Vec<bool> = self
            .keep
            .iter()
            .rev()
            .map(|kept| {
                let recorded = left > 0 && !kept.is_empty() && kept.iter().all(|k| *k);
                left -= usize::from(recorded);
                recorded
            })
            .collect();
        recorded.reverse();
        recorded
    }

    /// Differentiated steps of all samples together.
    pub fn kept_count(&self) -> usize {
        let kept = self.kept_by_sample();
        kept.iter().sum::<usize>() + self.renoise * kept.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::SchedulerConfig;

    const T: usize = 10;

    fn schedule() -> DdimSchedule {
        let config = SchedulerConfig { clip_sample: Some(false), steps_offset: 1, ..Default::default() };
        DdimSchedule::new(&config, T, 0.0).unwrap()
    }

    fn plan(rule: Truncation, step: u64) -> Plan {
        Plan::new(&rule, &schedule(), &Noise::new(5), step, 0..4).unwrap()
    }

    /// Sample s's mask as text, newest step last.
    fn mask(plan: &Plan, s: usize) -> String {
        plan.keep.iter().map(|kept| if kept[s] { '1' } else { '.' }).collect()
    }

    #[test]
    fn rules_without_chance() {
        assert_eq!(mask(&plan(Truncation::Fixed { k: 1 }, 0), 0), ".........1");
        assert_eq!(mask(&plan(Truncation::Fixed { k: 3 }, 7), 2), ".......111");
        assert_eq!(mask(&plan(Truncation::Full, 0), 3), "1111111111");
        assert_eq!(mask(&plan(Truncation::Steps { steps: vec![0, 2, 9] }, 0), 0), "1.1......1");
        assert!(Plan::new(&Truncation::Fixed { k: 11 }, &schedule(), &Noise::new(0), 0, 0..1).is_err());
        assert!(Plan::new(&Truncation::Steps { steps: vec![10] }, &schedule(), &Noise::new(0), 0, 0..1).is_err());
    }

    #[test]
    fn the_newest_steps_that_all_keep_are_recorded() {
        let recorded = |plan: &Plan, count| -> String {
            plan.recorded(count).into_iter().map(|r| if r { '1' } else { '.' }).collect()
        };
        let mut steps = plan(Truncation::Steps { steps: vec![0, 2, 5, 9] }, 0);
        assert_eq!(recorded(&steps, 0), "..........");
        assert_eq!(recorded(&steps, 2), ".....1...1");
        assert_eq!(recorded(&steps, 99), "1.1..1...1");
        steps.keep[5][2] = false;
        assert_eq!(recorded(&steps, 2), "..1......1");
    }

    #[test]
    fn no_plan_keeps_more_than_its_rule_can() {
        for rule in [
            Truncation::Uniform { per: Per::Sample },
            Truncation::Fixed { k: 4 },
            Truncation::Gaussian { mean: 3.0, std: 2.0, per: Per::Batch },
            Truncation::PerStep { lo: 2, hi: 6 },
            Truncation::Full,
            Truncation::Steps { steps: vec![1, 7] },
            Truncation::Refl { lo: 3, hi: 8 },
            Truncation::Drtune { k: Some(3) },
            Truncation::Drtune { k: None },
        ] {
            let most = (0..200).map(|step| plan(rule.clone(), step).recorded(99).iter().filter(|r| **r).count()).max();
            assert!(most.unwrap() > 0 && most.unwrap() <= Plan::most_kept(&rule, T), "{rule:?}");
        }
    }

    #[test]
    fn uniform_draws_every_depth_and_a_contiguous_end() {
        let mut depths = std::collections::BTreeSet::new();
        for step in 0..100 {
            let plan = plan(Truncation::Uniform { per: Per::Sample }, step);
            for s in 0..4 {
                let mask = mask(&plan, s);
                let depth = mask.matches('1').count();
                assert!(depth >= 1 && mask.ends_with(&"1".repeat(depth)), "{mask}");
                depths.insert(depth);
            }
        }
        assert_eq!(depths, (1..=T).collect());
    }

    #[test]
    fn per_batch_draws_once_and_per_sample_for_each() {
        let masks = |per| {
            (0..20)
                .map(|step| plan(Truncation::Uniform { per }, step))
                .map(|p| (0..4).map(|s| mask(&p, s)).collect::<Vec<_>>())
                .collect::<Vec<_>>()
        };
        assert!(masks(Per::Batch).iter().all(|m| m.iter().all(|x| *x == m[0])));
        assert!(masks(Per::Sample).iter().any(|m| m.iter().any(|x| *x != m[0])));
    }

    #[test]
    fn a_sample_has_the_same_mask_in_any_micro_batch() {
        for rule in [
            Truncation::Uniform { per: Per::Sample },
            Truncation::Gaussian { mean: 6.0, std: 3.0, per: Per::Sample },
            Truncation::PerStep { lo: 0, hi: T },
        ] {
            let whole = plan(rule.clone(), 3);
            let part = Plan::new(&rule, &schedule(), &Noise::new(5), 3, 2..3).unwrap();
            assert_eq!(mask(&part, 0), mask(&whole, 2));
        }
    }

    #[test]
    fn gaussian_first_steps_lie_inside_and_around_the_mean() {
        let firsts: Vec<usize> = (0..200)
            .map(|step| {
                plan(Truncation::Gaussian { mean: 6.0, std: 1.5, per: Per::Sample }, step).first_kept().unwrap()
            })
            .collect();
        assert!(firsts.iter().all(|f| (1..T).contains(f)));
        let mean = firsts.iter().sum::<usize>() as f64 / 200.0;
        // the smallest of four draws of N(6, 1.5), cut to whole numbers
        assert!((3.0..5.5).contains(&mean), "{mean}");
    }

    #[test]
    fn per_step_detaches_each_step_by_its_own_draw() {
        let masks: Vec<String> =
            (0..50).map(|step| mask(&plan(Truncation::PerStep { lo: 0, hi: T }, step), 0)).collect();
        let kept = |i: usize| masks.iter().filter(|m| m.as_bytes()[i] == b'1').count();
        assert!(kept(0) < 15 && kept(9) > 35, "{} and {}", kept(0), kept(9));
        assert!(masks.iter().any(|m| m.contains("1.")), "kept steps need not be contiguous");
        // i < lo is always detached, i >= hi never
        let masks: Vec<String> =
            (0..20).map(|step| mask(&plan(Truncation::PerStep { lo: 3, hi: 6 }, step), 0)).collect();
        assert!(masks.iter().all(|m| m.starts_with("...") && m.ends_with("1111")));
    }

    #[test]
    fn refl_stops_at_one_step_with_a_prediction_of_the_image() {
        let mut stops = std::collections::BTreeSet::new();
        for step in 0..60 {
            let plan = plan(Truncation::Refl { lo: 6, hi: 8 }, step);
            let stop = plan.steps.len() - 1;
            stops.insert(stop);
            assert_eq!(mask(&plan, 0), format!("{}1", ".".repeat(stop)));
            assert_eq!(plan.steps[stop], schedule().predicted_original(stop));
            assert_eq!(plan.steps[..stop], schedule().steps()[..stop]);
        }
        assert_eq!(stops, [6, 7, 8].into());
    }

    #[test]
    fn draft_lv_differentiates_only_its_repetitions() {
        let plan = plan(Truncation::DraftLv { n: 3 }, 0);
        assert_eq!((plan.renoise, plan.first_kept(), plan.kept_count()), (3, None, 12));
    }

    #[test]
    fn drtune_detaches_the_input_and_spaces_its_steps() {
        let all = plan(Truncation::Drtune { k: None }, 0);
        assert!(all.detach_input);
        assert_eq!(mask(&all, 0), "1111111111");
        for step in 0..30 {
            let mask = mask(&plan(Truncation::Drtune { k: Some(3) }, step), 0);
            let places: Vec<usize> = mask.match_indices('1').map(|(i, _)| i).collect();
            assert_eq!(places.len(), 3, "{mask}");
            assert!(places.windows(2).all(|w| w[1] - w[0] == 3), "{mask}");
        }
    }
}

//! Sets of the kind `policy`: densities of denoising steps, advantages, the clipped objective and its updates, reward-weighted regression, images moved against
//! the reward (RSA-FT), lean adjoints (Adjoint Matching).

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::{Distance, Report, Subject, unequal};
use crate::config::{Baseline, Deviation, OptimizerConfig, Policy};
use crate::diffusion::DdimSchedule;
use crate::lora::{Adapters, formats};
use crate::ops::Ledger;
use crate::optim::AdamW;
use crate::rewards::ImageScores;
use crate::sampling::{Denoiser, Trajectory};
use crate::training::Plan;
use crate::training::adjoint_matching::{MatchingTerm, Target, lean_adjoints};
use crate::training::advantages::{PromptStatistics, of_groups, of_round};
use crate::training::ddpo::{Chain, densities};
use crate::training::rwr::{best, one_step_each, percentile, weights};
use crate::training::step::{Tally, credit_moved, differentiate, sample, update};
use crate::training::terms::{ClippedObjective, KlTerm, Ratio, RegressionTerm, StepTerm};

/// Of plain arithmetic in f64.
const ARITHMETIC: f64 = 1e-9;
/// Of σ, which is f64 arithmetic on the schedule's f32 numbers.
const SIGMA: f64 = 1e-6;
/// Of log-densities; of ratios and mean losses, absolute. PyTorch's own f32 is at 6e-7.
const DENSITY: f64 = 1e-5;
/// Of factors after updates. Adam's first steps are nearly the gradient's sign, so gradients near 0 count: PyTorch's f32 is at 4e-6.
const FACTORS: f64 = 2e-5;

/// What `reference.json` has beside the fields of every set.
#[derive(Deserialize)]
struct Reference {
    eta: f64,
    guidance_scale: f64,
    advantages: Advantages,
    objectives: BTreeMap<String, Objective>,
    update: Updates,
    rwr: Rwr,
    rwr_sparse: Vec<Sparse>,
    rsa: Rsa,
    adjoint_matching: Matching,
}

#[derive(Deserialize)]
struct Advantages {
    per_prompt: PerPrompt,
    whole_batch: Vec<Epoch>,
    groups: Groups,
}

#[derive(Deserialize)]
struct PerPrompt {
    buffer_size: usize,
    min_count: usize,
    epochs: Vec<Epoch>,
}

#[derive(Deserialize)]
struct Epoch {
    #[serde(default)]
    prompts: Vec<String>,
    rewards: Vec<f64>,
    advantages: Vec<f64>,
}

#[derive(Deserialize)]
struct Groups {
    prompts: Vec<String>,
    rewards: Vec<f64>,
    group_unbiased: Vec<f64>,
    group_batch: Vec<f64>,
    group_population: Vec<f64>,
}

/// A clipped objective, or without a clip range the mean of -A log p.
#[derive(Deserialize)]
struct Objective {
    adapter: String,
    advantages: Vec<f64>,
    advantage_clip: f64,
    clip_range: Option<f64>,
    #[serde(default)]
    beta: f64,
    loss: f64,
    /// Where they are made of these, group by group of equal prompts.
    rewards: Option<Vec<f64>>,
}

#[derive(Deserialize)]
struct Updates {
    adapter: String,
    advantages: Vec<f64>,
    advantage_clip: f64,
    clip_range: f64,
    lr: f64,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
    max_grad_norm: f64,
    log: Vec<UpdateLog>,
}

/// Reward-weighted regression on the chain's images.
#[derive(Deserialize)]
struct Rwr {
    adapter: String,
    rewards: Vec<f64>,
    prompts: Vec<String>,
    inverse_temperature: f64,
    guidance_scale: f64,
    all: Weighted,
    prompt: Weighted,
}

#[derive(Deserialize)]
struct Weighted {
    weights: Vec<f64>,
    loss: f64,
}

#[derive(Deserialize)]
struct Sparse {
    rewards: Vec<f64>,
    percentile: f64,
    threshold: f64,
    selected: Vec<bool>,
}

/// RSA-FT's image part.
#[derive(Deserialize)]
struct Rsa {
    adapter: String,
    eta: f64,
    guidance_scale: f64,
    backprop_steps: usize,
    samples: usize,
    cases: BTreeMap<String, RsaCase>,
}

#[derive(Deserialize)]
struct RsaCase {
    reward: String,
    rho: f64,
    loss: f64,
}

#[derive(Deserialize)]
struct Matching {
    adapter: String,
    lambda: f64,
    adjoint: MatchingCase,
    adjoint_kept: MatchingCase,
}

#[derive(Deserialize)]
struct MatchingCase {
    loss: f64,
    root_below: Option<f64>,
}

#[derive(Deserialize)]
struct UpdateLog {
    loss: f64,
    grad_norm: f64,
}

pub(super) fn compare(subject: &Subject, text: &str) -> Result<Report> {
    ensure!(
        subject.compute.dtype() == DType::F32,
        "a set of the kind `policy` is compared in f32: leave --precision out"
    );
    let reference: Reference = serde_json::from_str(text).context("reading reference.json")?;
    let mut report = Report::default();
    advantages(&reference.advantages, &mut report)?;
    let set = Set::load(subject, &reference, &mut report)?;
    for (name, objective) in &reference.objectives {
        set.objective(name, objective, &mut report)?;
    }
    set.updates(&reference.update, &mut report)?;
    set.regression(&reference.rwr, &mut report)?;
    set.moved_images(&reference.rsa, &mut report)?;
    set.matching(&reference.adjoint_matching, &mut report)?;
    for (number, case) in reference.rwr_sparse.iter().enumerate() {
        let name = format!("rwr-sparse {number}");
        let threshold = percentile(&case.rewards, case.percentile);
        report.push(&name, "threshold", (threshold - case.threshold).abs(), ARITHMETIC);
        let selected = best(&case.rewards, case.percentile);
        let unequal = selected.iter().zip(&case.selected).filter(|(found, expected)| found != expected).count();
        report.push(&name, "selected", (unequal + selected.len().abs_diff(case.selected.len())) as f64, 0.0);
    }
    Ok(report)
}

fn advantages(expected: &Advantages, report: &mut Report) -> Result<()> {
    let mut row = |what: &str, found: Vec<f64>, expected: &[f64]| -> Result<()> {
        report.compare("advantages", what, &tensor(&found)?, &tensor(expected)?, ARITHMETIC)
    };
    let PerPrompt { buffer_size, min_count, epochs } = &expected.per_prompt;
    let mut statistics = PromptStatistics::default();
    for (number, epoch) in epochs.iter().enumerate() {
        let prompts: Vec<&str> = epoch.prompts.iter().map(String::as_str).collect();
        let found = statistics.advantages(&prompts, &epoch.rewards, *buffer_size, *min_count);
        row(&format!("per prompt, epoch {number}"), found, &epoch.advantages)?;
    }
    for (number, epoch) in expected.whole_batch.iter().enumerate() {
        row(&format!("whole batch, epoch {number}"), of_round(&epoch.rewards), &epoch.advantages)?;
    }
    let Groups { prompts, rewards, group_unbiased, group_batch, group_population } = &expected.groups;
    for (what, deviation, expected) in [
        ("groups, deviation of n - 1", Deviation::Group, group_unbiased),
        ("groups, deviation of the batch", Deviation::Round, group_batch),
        ("groups, deviation of n", Deviation::GroupPopulation, group_population),
    ] {
        row(what, of_groups(prompts, rewards, deviation), expected)?;
    }
    Ok(())
}

fn tensor(values: &[f64]) -> Result<Tensor> {
    Ok(Tensor::new(values, &Device::Cpu)?)
}

/// The largest absolute difference, f64 on the CPU.
fn largest_difference(found: &[f64], expected: &Tensor) -> Result<f64> {
    let expected = numbers(expected)?;
    ensure!(found.len() == expected.len(), "{} numbers instead of {}", found.len(), expected.len());
    Ok(found
        .iter()
        .zip(&expected)
        .map(|(x, y)| (x - y).abs())
        .fold(0.0, |most, x| if x > most || x.is_nan() { x } else { most }))
}

fn numbers(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?)
}

/// The recorded chain, and what its steps are to the two adapters.
struct Set<'a> {
    subject: &'a Subject<'a>,
    guidance_scale: f64,
    chain: Chain,
    /// x_T, .., x_0, each (B, C, h, w).
    latents: Vec<Tensor>,
    adapters: BTreeMap<String, Adapters>,
    /// Of each step and sample, with the adapters that sampled: this program's own.
    log_probs: Vec<Vec<f64>>,
    /// How much wider the bounds are than on a CPU.
    wider: f64,
}

impl<'a> Set<'a> {
    fn load(subject: &'a Subject<'a>, reference: &Reference, report: &mut Report) -> Result<Self> {
        let expected = subject.tensors("trajectory.safetensors")?;
        let part = |name: &str| expected.get(name).with_context(|| format!("trajectory.safetensors has no `{name}`"));
        let (wider, parts) = (subject.bounds.parts / super::CPU.parts, subject.bounds.parts);
        let conditioning = subject.conditioning(reference.guidance_scale, 0.0)?;
        report.compare("text encoder", "text_embeds", &conditioning.prompt_embeds, part("text_embeds")?, parts)?;
        report.compare(
            "text encoder",
            "uncond_embeds",
            &conditioning.negative_prompt_embeds,
            part("uncond_embeds")?,
            parts,
        )?;

        let schedule = DdimSchedule::load(&subject.pipeline.source, subject.reference.steps, reference.eta)?;
        let timesteps: Vec<f64> = schedule.steps().iter().map(|step| step.timestep).collect();
        report.push("scheduler", "timesteps", unequal(&timesteps, part("timesteps")?)?, 0.0);
        let chain = Chain::of(&all_steps(), &schedule, 0)?;
        for (i, (step, expected)) in chain.steps.iter().zip(numbers(part("sigma")?)?).enumerate() {
            report.push("scheduler", format!("sigma of step {i}"), (step.noise / expected - 1.0).abs(), SIGMA);
        }

        let mut adapters = BTreeMap::new();
        for name in ["lora_start", "lora_moved"] {
            let loaded = formats::load(&subject.dir.join(format!("{name}.safetensors")))?.adapters;
            adapters.insert(name.to_owned(), subject.with_alpha(&loaded)?.to_device(subject.compute.device())?);
        }
        let (x, noises) = (part("x")?, part("noises")?);
        let latents = (0..=chain.steps.len()).map(|k| x.get(k)).collect::<candle_core::Result<Vec<_>>>()?;
        let guidance_scale = reference.guidance_scale;
        let mut set = Self { subject, guidance_scale, chain, latents, adapters, log_probs: Vec::new(), wider };

        // the chain itself, from x_T
        let start = set.adapters("lora_start")?;
        let denoiser = set.denoiser(start)?;
        let mut ledger = Ledger::default();
        let plan = Plan::with_mask(&schedule, &vec![false; schedule.len()], set.latents[0].dims4()?.0);
        let noise = |i: usize| Ok(noises.get(i)?);
        let trajectory = sample(&denoiser, &plan, set.latents[0].clone(), noise, 0, &mut ledger)?;
        let own = densities(&set.chain, &trajectory, &mut ledger)?;
        let readings = ledger.read()?;
        report.compare("trajectory", "x", &Tensor::stack(&trajectory.into_latents(), 0)?, x, parts)?;
        let own: Vec<f64> = own.into_iter().flatten().map(|number| readings.get(number)).collect();
        report.compare(
            "trajectory",
            "log_prob, of its own chain",
            &tensor(&own)?,
            &flat(part("log_prob")?)?,
            wider * DENSITY,
        )?;

        // each step at the recorded latents
        let (means, log_probs) = set.steps_of(start)?;
        report.compare("trajectory", "mean", &means, part("mean")?, parts)?;
        report.compare(
            "trajectory",
            "log_prob",
            &tensor(&log_probs.concat())?,
            &flat(part("log_prob")?)?,
            wider * DENSITY,
        )?;
        let (moved_means, moved) = set.steps_of(set.adapters("lora_moved")?)?;
        report.compare("trajectory", "mean_moved", &moved_means, part("mean_moved")?, parts)?;
        report.compare(
            "trajectory",
            "log_prob_moved",
            &tensor(&moved.concat())?,
            &flat(part("log_prob_moved")?)?,
            wider * DENSITY,
        )?;
        let ratios: Vec<f64> =
            moved.concat().iter().zip(log_probs.concat()).map(|(new, old)| (new - old).exp()).collect();
        report.push("trajectory", "ratio, absolute", largest_difference(&ratios, part("ratio")?)?, wider * DENSITY);
        let (base_means, _) = set.steps_of(&Adapters::default())?;
        report.compare("trajectory", "mean_base", &base_means, part("mean_base")?, parts)?;
        set.log_probs = log_probs;
        Ok(set)
    }

    fn adapters(&self, name: &str) -> Result<&Adapters> {
        self.adapters.get(name).with_context(|| format!("reference.json names the adapter `{name}`, which no set has"))
    }

    fn denoiser<'b>(&'b self, adapters: &'b Adapters) -> Result<Denoiser<'b>> {
        Ok(self.subject.denoiser(adapters, &self.subject.conditioning(self.guidance_scale, 0.0)?))
    }

    /// μ of each step at the recorded x_t, (T, B, C, h, w), and the log-density of the recorded x_{t-1} of each sample.
    fn steps_of(&self, adapters: &Adapters) -> Result<(Tensor, Vec<Vec<f64>>)> {
        let denoiser = self.denoiser(adapters)?;
        let (mut means, mut log_probs) = (Vec::new(), Vec::new());
        for (step, pair) in self.chain.steps.iter().zip(self.latents.windows(2)) {
            let out = denoiser.predict(&pair[0], step.timestep)?;
            means.push(step.mean(&pair[0], &out)?);
            log_probs.push(numbers(&step.log_prob(&step.noise_of(&pair[0], &out, &pair[1])?)?)?);
        }
        Ok((Tensor::stack(&means, 0)?, log_probs))
    }

    /// The gradient of an objective over the steps of each sample that `keep` marks, with what it saw.
    fn back(
        &self,
        denoiser: &Denoiser,
        latents: Vec<Tensor>,
        keep: Vec<Vec<bool>>,
        objective: &mut ClippedObjective,
        mut kl: Option<&mut KlTerm>,
        tally: &mut Tally,
    ) -> Result<()> {
        let plan = Plan { steps: self.chain.steps.clone(), keep, detach_input: false, renoise: 0 };
        let mut terms: Vec<&mut dyn StepTerm> = vec![objective];
        terms.extend(kl.as_mut().map(|kl| *kl as &mut dyn StepTerm));
        differentiate(denoiser, &plan, &mut Trajectory::of_latents(latents), None, &mut terms, tally)
    }

    /// The gradient of one objective, and what it is made of.
    fn objective(&self, name: &str, case: &Objective, report: &mut Report) -> Result<()> {
        let expected = self.subject.tensors(&format!("{name}.safetensors"))?;
        let part = |what: &str| expected.get(what).with_context(|| format!("{name}.safetensors has no `{what}`"));
        let (steps, batch) = (self.chain.steps.len(), self.latents[0].dims4()?.0);
        if let Some(rewards) = &case.rewards {
            let found = of_groups(&self.subject.reference.prompts, rewards, Deviation::Group);
            report.compare(name, "advantages", &tensor(&found)?, &tensor(&case.advantages)?, ARITHMETIC)?;
        }
        let advantages: Vec<f64> =
            case.advantages.iter().map(|a| a.clamp(-case.advantage_clip, case.advantage_clip)).collect();
        // the step of each row and sample; without a clip range all of them
        let index: Vec<Vec<usize>> = match case.clip_range {
            Some(_) => {
                let (rows, samples) = part("step_index")?.dims2()?;
                ensure!(samples == batch, "{name}: step_index has {samples} samples, the chain {batch}");
                let index: Vec<usize> = numbers(part("step_index")?)?.into_iter().map(|step| step as usize).collect();
                ensure!(
                    index.iter().all(|step| *step < steps),
                    "{name}: step_index names a step that the chain has not"
                );
                index.chunks(samples).take(rows).map(<[usize]>::to_vec).collect()
            }
            None => (0..steps).map(|step| vec![step; batch]).collect(),
        };
        let mut keep = vec![vec![false; batch]; steps];
        for row in &index {
            row.iter().enumerate().for_each(|(sample, step)| keep[*step][sample] = true);
        }
        let adapters = self.adapters(&case.adapter)?;
        let denoiser = self.denoiser(adapters)?;
        let own;
        let mut objective = ClippedObjective {
            scale: 1.0 / (index.len() * batch) as f64,
            clip_range: case.clip_range.unwrap_or(f64::INFINITY),
            advantages: &advantages,
            // where nothing is clipped, the ratio is to these adapters themselves: 1
            log_probs: match case.clip_range {
                Some(_) => &self.log_probs,
                None => {
                    own = self.steps_of(adapters)?.1;
                    &own
                }
            },
            ratios: Vec::new(),
        };
        let plan = Plan { steps: self.chain.steps.clone(), keep: keep.clone(), detach_input: false, renoise: 0 };
        let mut kl = (case.beta > 0.0).then(|| KlTerm::of_densities(case.beta / batch as f64, &plan));
        let mut tally = Tally::new(adapters);
        self.back(&denoiser, self.latents.clone(), keep, &mut objective, kl.as_mut(), &mut tally)?;
        let gradients = tally.take_gradients(adapters)?;
        let readings = tally.ledger.read()?;

        let ratio_of: BTreeMap<(usize, usize), f64> =
            objective.ratios.iter().map(|ratio| ((ratio.index, ratio.row), readings.get(ratio.value))).collect();
        let mut loss = 0.0;
        if let Some(clip_range) = case.clip_range {
            let each = index.iter().flat_map(|row| row.iter().enumerate());
            let ratios: Vec<f64> = each.clone().map(|(sample, step)| ratio_of[&(*step, sample)]).collect();
            let losses: Vec<(f64, bool)> = each
                .zip(&ratios)
                .map(|((sample, _), ratio)| Ratio::loss(*ratio, advantages[sample], clip_range))
                .collect();
            report.push(name, "ratio, absolute", largest_difference(&ratios, part("ratio")?)?, self.wider * DENSITY);
            let cut: Vec<f64> = losses.iter().map(|(_, cut)| f64::from(u8::from(*cut))).collect();
            report.push(name, "without_gradient", unequal(&cut, part("without_gradient")?)?, 0.0);
            let of_each: Vec<f64> = losses.iter().map(|(loss, _)| *loss).collect();
            report.compare(name, "losses", &tensor(&of_each)?, &flat(part("losses")?)?, self.subject.bounds.parts)?;
            loss += of_each.iter().sum::<f64>() / of_each.len() as f64;
        } else {
            let of_step =
                |log_probs: &Vec<f64>| -> f64 { log_probs.iter().zip(&advantages).map(|(p, a)| -a * p).sum() };
            loss += objective.log_probs.iter().map(of_step).sum::<f64>() / (steps * batch) as f64;
        }
        if let Some(kl) = &kl {
            let divergence = kl.distances(&readings).iter().sum::<f64>() / batch as f64;
            let expected = numbers(part("kl")?)?;
            let expected = expected.iter().sum::<f64>() / expected.len() as f64;
            report.push(name, "kl", (divergence / expected - 1.0).abs(), self.subject.bounds.parts);
            loss += case.beta * divergence;
        }
        report.push(name, "loss, absolute", (loss - case.loss).abs(), self.wider * DENSITY);
        self.subject.compare_gradients(name, adapters, &gradients, &expected, report)
    }

    /// The gradient of the weighted regression on the chain's images.
    fn regression(&self, case: &Rwr, report: &mut Report) -> Result<()> {
        let inputs = self.subject.tensors("rwr_inputs.safetensors")?;
        let input = |what: &str| inputs.get(what).with_context(|| format!("rwr_inputs.safetensors has no `{what}`"));
        let timesteps: Vec<usize> = numbers(input("timesteps")?)?.into_iter().map(|t| t as usize).collect();
        let schedule = DdimSchedule::load(&self.subject.pipeline.source, self.chain.steps.len(), 1.0)?;
        ensure!(
            timesteps.iter().all(|t| *t < schedule.train_timesteps()),
            "rwr_inputs.safetensors: a timestep that the schedule has not"
        );
        let parts = self.subject.bounds.parts;
        let (x_t, targets) = schedule.noised(&timesteps, input("x_0")?, input("noise")?)?;
        report.compare("rwr", "x_t", &x_t, input("x_t")?, parts)?;
        let adapters = self.adapters(&case.adapter)?;
        let denoiser = self.subject.denoiser(adapters, &self.subject.conditioning(case.guidance_scale, 0.0)?);
        for (name, expected, keys) in [("rwr_all", &case.all, None), ("rwr_prompt", &case.prompt, Some(&case.prompts))]
        {
            let weights = match keys {
                None => weights(&case.rewards, &[()], case.inverse_temperature),
                Some(prompts) => weights(&case.rewards, prompts, case.inverse_temperature),
            };
            report.compare(name, "weights", &tensor(&weights)?, &tensor(&expected.weights)?, ARITHMETIC)?;
            let recorded = self.subject.tensors(&format!("{name}.safetensors"))?;
            let images = weights.len() as f64;
            let mut term = RegressionTerm::new(weights.iter().map(|w| w / images).collect(), targets.clone());
            let mut tally = Tally::new(adapters);
            let mut trajectory = Trajectory::of_latents(vec![x_t.clone(); timesteps.len() + 1]);
            differentiate(&denoiser, &one_step_each(&timesteps), &mut trajectory, None, &mut [&mut term], &mut tally)?;
            let gradients = tally.take_gradients(adapters)?;
            let readings = tally.ledger.read()?;
            let losses: Vec<f64> = term.losses(&readings).into_iter().map(|(_, loss)| loss).collect();
            let mse = recorded.get("mse").with_context(|| format!("{name}.safetensors has no `mse`"))?;
            report.compare(name, "mse", &tensor(&losses)?, mse, parts)?;
            let loss = losses.iter().zip(&weights).map(|(loss, w)| w * loss).sum::<f64>() / images;
            report.push(name, "loss", (loss / expected.loss - 1.0).abs(), parts);
            self.subject.compare_gradients(name, adapters, &gradients, &recorded, report)?;
        }
        Ok(())
    }

    /// RSA-FT's gradients, of images moved against the reward.
    fn moved_images(&self, case: &Rsa, report: &mut Report) -> Result<()> {
        let Self { subject, .. } = self;
        let (parts, steps) = (subject.bounds.parts, self.chain.steps.len());
        let schedule = DdimSchedule::load(&subject.pipeline.source, steps, case.eta)?;
        let keep: Vec<bool> = (0..steps).map(|i| i + case.backprop_steps >= steps).collect();
        let plan = Plan::with_mask(&schedule, &keep, case.samples);
        let adapters = self.adapters(&case.adapter)?;
        let rows = Tensor::arange(0, case.samples as u32, subject.compute.device())?;
        let conditioning = subject.conditioning(case.guidance_scale, 0.0)?.select(&rows)?;
        let denoiser = subject.denoiser(adapters, &conditioning);
        let prompts = &subject.prompts()[..case.samples];
        for (name, RsaCase { reward, rho, loss }) in &case.cases {
            let name = format!("rsa_{name}");
            let Some(rewards) = subject.rewards(reward, 10.0)? else {
                report.skipped.push(format!("{name}: no aesthetic head"));
                continue;
            };
            let (of_case, of_reward) = (
                subject.tensors(&format!("{name}.safetensors"))?,
                subject.tensors(&format!("rsa_{reward}.safetensors"))?,
            );
            let of = |tensors: &HashMap<String, Tensor>, what: &str| {
                tensors.get(what).cloned().with_context(|| format!("the tensors of {name} have no `{what}`"))
            };
            let mut tally = Tally::new(adapters);
            let x_t = self.latents[0].narrow(0, 0, case.samples)?;
            let no_noise = |_| anyhow::bail!("eta is 0");
            let mut trajectory = sample(&denoiser, &plan, x_t, no_noise, 0, &mut tally.ledger)?;
            report.compare(&name, "latents", trajectory.latents(), &of(&of_reward, "latents")?, parts)?;
            // the images one by one, as training has them
            let (mut gradients, mut moved) = (Vec::new(), Vec::new());
            for (row, prompt) in prompts.iter().enumerate() {
                let image = subject.pipeline.vae.decode(&trajectory.latents().narrow(0, row, 1)?)?;
                let judge = |ledger: &mut Ledger| rewards.judge(&image, std::slice::from_ref(prompt), ledger);
                // d loss / d image is -1/2 of d score / d (image in [0, 1]): all these scores are to rise
                gradients.push((Ledger::around(judge)?.0.pull(1.0)? * -2.0)?);
                moved.push(Ledger::around(judge)?.0.moved_against(*rho)?);
            }
            let expected = of(&of_reward, "reward_gradient")?;
            report.compare(
                &name,
                "reward_gradient",
                &Tensor::cat(&gradients, 0)?,
                &expected,
                subject.bounds.image_gradients,
            )?;
            if let Some(expected) = of_case.get("perturbed") {
                report.compare(&name, "perturbed", &Tensor::cat(&moved, 0)?, expected, parts)?;
            }
            let critic = subject.critic(&rewards);
            let scale = 1.0 / case.samples as f64;
            let credit = credit_moved(&critic, trajectory.latents(), prompts, *rho, scale, &mut tally)?;
            differentiate(&denoiser, &plan, &mut trajectory, Some(&credit.d_latents), &mut [], &mut tally)?;
            let gradients = tally.take_gradients(adapters)?;
            let readings = tally.ledger.read()?;
            let scores = |scores: &[ImageScores]| scores.iter().map(|s| s.get(&readings)[0]).collect::<Vec<f64>>();
            let (plain, moved) = (scores(&credit.scores), scores(&credit.moved));
            report.compare(&name, "scores", &tensor(&plain)?, &of(&of_reward, "scores")?, parts)?;
            report.compare(&name, "perturbed_scores", &tensor(&moved)?, &of(&of_case, "perturbed_scores")?, parts)?;
            let s1: Vec<f64> = plain.iter().zip(&moved).map(|(plain, moved)| plain - moved).collect();
            let largest = plain.iter().fold(1.0, |most: f64, score| most.max(score.abs()));
            let error = largest_difference(&s1, &of(&of_case, "s1")?)?;
            report.push(&name, "s1, of the score", error / largest, self.wider * DENSITY);
            let found = credit.moved.iter().map(|s| s.loss(&rewards, &readings)).sum::<f64>() * scale;
            report.push(&name, "loss", (found / loss - 1.0).abs(), parts);
            subject.compare_gradients(&name, adapters, &gradients, &of_case, report)?;
        }
        Ok(())
    }

    /// Lean adjoints, and the gradients of the matching with them.
    fn matching(&self, case: &Matching, report: &mut Report) -> Result<()> {
        let recorded = self.subject.tensors("adjoint.safetensors")?;
        let part = |what: &str| recorded.get(what).with_context(|| format!("adjoint.safetensors has no `{what}`"));
        let (steps, parts, batch) = (&self.chain.steps, self.subject.bounds.parts, self.latents[0].dims4()?.0);
        let adapters = self.adapters(&case.adapter)?;
        let denoiser = self.denoiser(adapters)?.unguided();
        let every: Vec<usize> = (0..steps.len()).collect();
        let trajectory = Trajectory::of_latents(self.latents.clone());
        let start = (part("d_reward")? * -case.lambda)?;
        let targets = |wanted: &[usize]| {
            let mut tally = Tally::new(adapters);
            let targets = lean_adjoints(&denoiser, steps, &trajectory, start.clone(), wanted, &mut tally)?;
            tally.ledger.read().map(|_| targets)
        };
        let mut all = targets(&every)?;
        all.reverse();
        let adjoints: Vec<&Tensor> = all.iter().map(|target| &target.adjoint).chain([&start]).collect();
        report.compare("adjoint", "adjoint", &Tensor::stack(&adjoints, 0)?, part("adjoint")?, parts)?;
        let mean = |target: &Target| steps[target.index].mean(&self.latents[target.index], &target.prediction);
        let means = all.iter().map(mean).collect::<candle_core::Result<Vec<_>>>()?;
        report.compare("adjoint", "mean_base", &Tensor::stack(&means, 0)?, part("mean_base")?, parts)?;

        let chosen: Vec<usize> = numbers(part("steps")?)?.into_iter().map(|step| step as usize).collect();
        ensure!(chosen.iter().all(|step| *step < steps.len()), "adjoint.safetensors: a step that the chain has not");
        let own = |i: &usize| -> Result<Tensor> {
            Ok(steps[*i].mean(&self.latents[*i], &denoiser.predict(&self.latents[*i], steps[*i].timestep)?)?)
        };
        let means = chosen.iter().map(own).collect::<Result<Vec<_>>>()?;
        report.compare("adjoint", "mean_lora", &Tensor::stack(&means, 0)?, part("mean_lora")?, parts)?;
        for (name, MatchingCase { loss, root_below }) in
            [("adjoint", &case.adjoint), ("adjoint_kept", &case.adjoint_kept)]
        {
            let recorded = self.subject.tensors(&format!("{name}.safetensors"))?;
            let part = |what: &str| recorded.get(what).with_context(|| format!("{name}.safetensors has no `{what}`"));
            let entries = chosen.len() * batch;
            let mut term = MatchingTerm {
                scale: 1.0 / entries as f64,
                below: *root_below,
                targets: targets(&chosen)?,
                losses: Vec::new(),
            };
            let keep = every.iter().map(|i| vec![chosen.contains(i); batch]).collect();
            let plan = Plan { steps: steps.clone(), keep, detach_input: false, renoise: 0 };
            let mut tally = Tally::new(adapters);
            let mut trajectory = Trajectory::of_latents(self.latents.clone());
            differentiate(&denoiser, &plan, &mut trajectory, None, &mut [&mut term], &mut tally)?;
            let gradients = tally.take_gradients(adapters)?;
            let readings = tally.ledger.read()?;
            let losses: BTreeMap<(usize, usize), f64> =
                term.losses.iter().map(|loss| ((loss.index, loss.row), readings.get(loss.value))).collect();
            let losses: Vec<f64> = losses.into_values().collect();
            report.compare(name, "losses", &tensor(&losses)?, &flat(part("losses")?)?, parts)?;
            let kept = |loss: &&f64| root_below.is_none_or(|below| loss.sqrt() < below);
            let found: Vec<f64> = losses.iter().map(|loss| f64::from(u8::from(kept(&loss)))).collect();
            report.push(name, "kept", unequal(&found, part("kept")?)?, 0.0);
            let found = losses.iter().filter(kept).sum::<f64>() / entries as f64;
            report.push(name, "loss", (found / loss - 1.0).abs(), parts);
            self.subject.compare_gradients(name, adapters, &gradients, &recorded, report)?;
        }
        Ok(())
    }

    /// One inner epoch of two updates.
    fn updates(&self, case: &Updates, report: &mut Report) -> Result<()> {
        let expected = self.subject.tensors("update.safetensors")?;
        let part = |what: &str| expected.get(what).with_context(|| format!("update.safetensors has no `{what}`"));
        let order: Vec<usize> = numbers(part("order")?)?.into_iter().map(|row| row as usize).collect();
        let steps = self.chain.steps.len();
        let mut adapters = self.adapters(&case.adapter)?.clone();
        let config = OptimizerConfig {
            betas: case.betas,
            eps: case.eps,
            weight_decay: case.weight_decay,
            ..OptimizerConfig::default()
        };
        let mut optimizer = AdamW::new(&config, &adapters.tensors())?;
        // as torch.chunk has it
        let shares = order.chunks(order.len().div_ceil(case.log.len().max(1)).max(1));
        for ((number, rows), log) in (1..).zip(shares).zip(&case.log) {
            let name = format!("update {number}");
            let numbers: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
            let of_rows = Tensor::new(numbers, self.subject.compute.device())?;
            let latents =
                self.latents.iter().map(|x| x.index_select(&of_rows, 0)).collect::<candle_core::Result<_>>()?;
            let advantages: Vec<f64> =
                rows.iter().map(|row| case.advantages[*row].clamp(-case.advantage_clip, case.advantage_clip)).collect();
            let log_probs: Vec<Vec<f64>> =
                self.log_probs.iter().map(|of_step| rows.iter().map(|row| of_step[*row]).collect()).collect();
            let mut objective = ClippedObjective {
                scale: 1.0 / (steps * rows.len()) as f64,
                clip_range: case.clip_range,
                advantages: &advantages,
                log_probs: &log_probs,
                ratios: Vec::new(),
            };
            let mut tally = Tally::new(&adapters);
            let denoiser = self.denoiser(&adapters)?.select(&of_rows)?;
            let keep = vec![vec![true; rows.len()]; steps];
            self.back(&denoiser, latents, keep, &mut objective, None, &mut tally)?;
            let updated = update(&mut tally, &adapters, &optimizer, case.max_grad_norm, case.lr)?;
            let readings = tally.ledger.read()?;
            let ratios: BTreeMap<(usize, usize), f64> =
                objective.ratios.iter().map(|ratio| ((ratio.index, ratio.row), readings.get(ratio.value))).collect();
            let loss =
                |((_, row), ratio): (&(usize, usize), &f64)| Ratio::loss(*ratio, advantages[*row], case.clip_range).0;
            let loss = ratios.iter().map(loss).sum::<f64>() / ratios.len() as f64;
            report.push(&name, "loss, absolute", (loss - log.loss).abs(), self.wider * DENSITY);
            let norm = readings.get(updated.grad_norm);
            report.push(&name, "gradient norm", (norm / log.grad_norm - 1.0).abs(), self.subject.bounds.parts);
            if number == 2 {
                let ratios: Vec<f64> = ratios.into_values().collect();
                report.push(
                    &name,
                    "ratio, absolute",
                    largest_difference(&ratios, part("ratio")?)?,
                    self.wider * DENSITY,
                );
            }
            (adapters, optimizer) = (updated.adapters, updated.optimizer);
            let mut together = Distance::default();
            for (tensor, found) in adapters.named_tensors() {
                together = together.plus(Distance::between(&found, part(&format!("lora{number}.{tensor}"))?)?);
            }
            report.push(&name, "all LoRA factors", together.relative(), self.wider * FACTORS);
        }
        Ok(())
    }
}

fn flat(t: &Tensor) -> Result<Tensor> {
    Ok(t.flatten_all()?)
}

/// Every step with noise is trained.
fn all_steps() -> Policy {
    Policy {
        updates: 1,
        inner_epochs: 1,
        clip_range: f64::INFINITY,
        advantage_clip: f64::INFINITY,
        timestep_fraction: 1.0,
        drop_last: false,
        window: None,
        baseline: Baseline::Round,
    }
}

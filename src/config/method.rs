//! `[method]`: how the adapters learn from the rewards.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::Config;
use super::validate::{at_least_one, more_than_zero, zero_or_more};

/// `[method]`: how the adapters learn from the rewards. `kind` names the variant, the other keys are its fields.
///
/// `alignprop` and `adjoint-matching` need the reward's gradient. The others need scores only. A step of theirs is a round: the images of the global batch
/// are sampled and scored, and the adapters then updated `updates` times for each of the `inner_epochs`.
/// `[truncation]` is read by `alignprop` alone.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Method {
    /// The reward's gradient goes back through the denoising chain, as far as `[truncation]` says.
    Alignprop(AlignpropConfig),
    /// Policy gradients (Black et al. 2023, DDPO-IS): each denoising step is an action, its density the policy.
    /// With `updates = 1` it is DDPO-SF: the ratio of the densities is then 1 and the clip does nothing.
    Ddpo(DdpoConfig),
    /// As `ddpo`, with advantages relative to images of the same prompt (DanceGRPO, Flow-GRPO, MixGRPO).
    Grpo(GrpoConfig),
    /// Reward-weighted regression (Black et al. 2023): training on the model's own images, the better ones with more weight.
    Rwr(RwrConfig),
    /// The same on the best images of each prompt alone.
    RwrSparse(RwrSparseConfig),
    /// Adjoint Matching (Domingo-Enrich et al. 2024): the reward's gradient goes back through the base model along the whole chain, and
    /// the adapted model is drawn towards it at a few steps.
    AdjointMatching(AdjointMatchingConfig),
}

impl Default for Method {
    fn default() -> Self {
        Self::Alignprop(AlignpropConfig::default())
    }
}

super::table! {
    /// `kind = "alignprop"`.
    pub struct AlignpropConfig {
        /// RSA-FT, its image part (arXiv 2603.21175): the reward's gradient is taken at the image moved against the reward by this much,
        /// an L2 distance over the image in [0, 1]; 0 or more, the paper's is 0.01. It costs one more pass through the rewards, and
        /// keeps away from scores that a small change undoes. 0: off.
        rho: f64 = 0.0,
    }
}

super::table! {
    /// `kind = "ddpo"`.
    pub struct DdpoConfig {
        /// Optimizer updates of one inner epoch, each on an equal share of the round's images; 1 or more, a divisor of the global
        /// batch.
        updates: usize = 1,
        /// How often the round's images are trained on; 1 or more.
        inner_epochs: usize = 1,
        /// The ratio of new to old density counts from 1 - this to 1 + this; more than 0, `inf` never clips. The log-density is
        /// the mean over a latent's elements, as in the official code, so the range depends on their number: 1e-4 is for
        /// 16,384 (512x512). Like for like is 1e-4 sqrt(16384 / elements): 4e-4 for 1,024 of them.
        clip_range: f64 = 1e-4,
        /// Advantages are cut to plus or minus this; more than 0.
        advantage_clip: f64 = 5.0,
        /// The share of each image's denoising steps that is trained, drawn anew for each image and inner epoch; more than 0, up to 1.
        timestep_fraction: f64 = 1.0,
        /// Leave out the last denoising step, whose gradient is a large one.
        drop_last: bool = false,
        /// A prompt's latest rewards whose mean and deviation make its advantages. 0: those of the round, for all prompts alike.
        buffer_size: usize = 16,
        /// With fewer rewards of a prompt than these, the round's mean and deviation stand in; 1 or more.
        min_count: usize = 16,
    }
}

super::table! {
    /// `kind = "grpo"`.
    pub struct GrpoConfig {
        /// As `ddpo`'s.
        updates: usize = 1,
        /// As `ddpo`'s.
        inner_epochs: usize = 1,
        /// As `ddpo`'s.
        clip_range: f64 = 1e-4,
        /// As `ddpo`'s.
        advantage_clip: f64 = 5.0,
        /// As `ddpo`'s.
        timestep_fraction: f64 = 1.0,
        /// As `ddpo`'s; DanceGRPO leaves it out.
        drop_last: bool = true,
        /// Images of one prompt that are compared with each other; 2 or more, a divisor of the global batch.
        group_size: usize = 16,
        /// Whether the images of a group begin with the same noise x_T (DanceGRPO) or each with its own (Flow-GRPO).
        shared_noise: bool = true,
        /// What divides a reward's distance from its group's mean.
        deviation: Deviation = Deviation::Group,
        /// MixGRPO: only a window of steps has noise (`sampler.eta`) and is trained, the others are deterministic. Absent: all steps.
        window: Option<WindowConfig> = None,
    }
}

/// A standard deviation of rewards, and what is added to it.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Deviation {
    /// The group's, with n - 1, + 1e-8 (DanceGRPO).
    #[default]
    Group,
    /// The group's, with n, + 1e-4 (Flow-GRPO).
    GroupPopulation,
    /// The whole round's, with n, + 1e-4 (Flow-GRPO with `global_std`).
    Round,
}

super::table! {
    /// `kind = "rwr"`.
    pub struct RwrConfig {
        /// As `ddpo`'s.
        updates: usize = 1,
        /// As `ddpo`'s.
        inner_epochs: usize = 1,
        /// Of the softmax of the rewards that weighs the images; more than 0. It has the rewards' own unit: the paper's 0.2 is for kB and
        /// aesthetic points.
        inverse_temperature: f64 = 0.2,
        /// Whether the softmax is over the images of each prompt, or over all.
        per_prompt: bool = false,
    }
}

super::table! {
    /// `kind = "rwr-sparse"`.
    pub struct RwrSparseConfig {
        /// As `ddpo`'s, on equal shares of the images that are kept.
        updates: usize = 1,
        /// As `ddpo`'s.
        inner_epochs: usize = 1,
        /// Images of one prompt that are compared with each other; 2 or more, a divisor of the global batch.
        group_size: usize = 32,
        /// Images with at least this percentile of their group's rewards are kept; 0 or more and less than 100.
        percentile: f64 = 90.0,
    }
}

super::table! {
    /// `kind = "adjoint-matching"`.
    pub struct AdjointMatchingConfig {
        /// How much the reward counts against the distance from the base model; more than 0. It has the rewards' own unit: the paper's 100
        /// is for ImageReward.
        lambda: f64 = 100.0,
        /// Denoising steps of each chain that are matched; 2 or more. Half are drawn from the first 60 %, half from the others.
        steps: usize = 4,
        /// Steps whose root loss is above a moving average of this quantile are left out; more than 0, up to 1, which keeps all.
        quantile: f64 = 0.9,
    }
}

super::table! {
    /// `method.window`: where a run trains.
    pub struct WindowConfig {
        /// Denoising steps in the window; 1 or more.
        size: usize = 4,
        /// Rounds after which it moves towards the image; 1 or more.
        every: usize = 25,
        /// By how many steps; 0 or more. It stays where it touches the last step.
        stride: usize = 1,
    }
}

impl WindowConfig {
    /// The window of a round, among `total` denoising steps.
    pub fn at(&self, round: usize, total: usize) -> std::ops::Range<usize> {
        let start = (round / self.every).saturating_mul(self.stride).min(total.saturating_sub(self.size));
        start..(start + self.size).min(total)
    }
}

/// What the policy gradients of [`DdpoConfig`] and [`GrpoConfig`] are made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    pub updates: usize,
    pub inner_epochs: usize,
    pub clip_range: f64,
    pub advantage_clip: f64,
    pub timestep_fraction: f64,
    pub drop_last: bool,
    pub window: Option<WindowConfig>,
    pub baseline: Baseline,
}

/// What a reward is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Baseline {
    /// The latest rewards of the same prompt.
    Prompt { buffer_size: usize, min_count: usize },
    /// All rewards of the round.
    Round,
    /// The rewards of `size` images of the same prompt.
    Group { size: usize, deviation: Deviation, shared_noise: bool },
}

/// What the regressions of [`RwrConfig`] and [`RwrSparseConfig`] are made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Regression {
    pub updates: usize,
    pub inner_epochs: usize,
    pub selection: Selection,
}

/// How much images count.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Selection {
    Weighted { inverse_temperature: f64, per_prompt: bool },
    Best { group_size: usize, percentile: f64 },
}

impl Method {
    /// As `kind` has it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Alignprop(_) => "alignprop",
            Self::Ddpo(_) => "ddpo",
            Self::Grpo(_) => "grpo",
            Self::Rwr(_) => "rwr",
            Self::RwrSparse(_) => "rwr-sparse",
            Self::AdjointMatching(_) => "adjoint-matching",
        }
    }

    /// The policy gradient, of methods that are one.
    pub fn policy(&self) -> Option<Policy> {
        match self {
            Self::Alignprop(_) | Self::Rwr(_) | Self::RwrSparse(_) | Self::AdjointMatching(_) => None,
            Self::Ddpo(c) => Some(Policy {
                updates: c.updates,
                inner_epochs: c.inner_epochs,
                clip_range: c.clip_range,
                advantage_clip: c.advantage_clip,
                timestep_fraction: c.timestep_fraction,
                drop_last: c.drop_last,
                window: None,
                baseline: match c.buffer_size {
                    0 => Baseline::Round,
                    buffer_size => Baseline::Prompt { buffer_size, min_count: c.min_count },
                },
            }),
            Self::Grpo(c) => Some(Policy {
                updates: c.updates,
                inner_epochs: c.inner_epochs,
                clip_range: c.clip_range,
                advantage_clip: c.advantage_clip,
                timestep_fraction: c.timestep_fraction,
                drop_last: c.drop_last,
                window: c.window.clone(),
                baseline: Baseline::Group { size: c.group_size, deviation: c.deviation, shared_noise: c.shared_noise },
            }),
        }
    }

    /// The regression, of methods that are one.
    pub fn regression(&self) -> Option<Regression> {
        match self {
            Self::Alignprop(_) | Self::Ddpo(_) | Self::Grpo(_) | Self::AdjointMatching(_) => None,
            Self::Rwr(RwrConfig { updates, inner_epochs, inverse_temperature, per_prompt }) => Some(Regression {
                updates: *updates,
                inner_epochs: *inner_epochs,
                selection: Selection::Weighted { inverse_temperature: *inverse_temperature, per_prompt: *per_prompt },
            }),
            Self::RwrSparse(RwrSparseConfig { updates, inner_epochs, group_size, percentile }) => Some(Regression {
                updates: *updates,
                inner_epochs: *inner_epochs,
                selection: Selection::Best { group_size: *group_size, percentile: *percentile },
            }),
        }
    }

    /// How often a round's images are trained on; 0 of a method without rounds.
    pub fn inner_epochs(&self) -> usize {
        let policy = self.policy().map(|policy| policy.inner_epochs);
        policy.or(self.regression().map(|regression| regression.inner_epochs)).unwrap_or(0)
    }

    /// Latents of each image that wait until the round is sampled, of a chain of `steps`.
    pub fn kept_latents(&self, steps: usize) -> usize {
        match self {
            Self::Alignprop(_) | Self::AdjointMatching(_) => 0,
            Self::Ddpo(_) | Self::Grpo(_) => steps + 1,
            Self::Rwr(_) | Self::RwrSparse(_) => 1,
        }
    }

    /// How far images are moved against the rewards before these are differentiated.
    pub fn rho(&self) -> f64 {
        match self {
            Self::Alignprop(config) => config.rho,
            _ => 0.0,
        }
    }

    /// Whether it needs the gradient of the rewards with respect to the image.
    pub fn differentiates_rewards(&self) -> bool {
        matches!(self, Self::Alignprop(_) | Self::AdjointMatching(_))
    }

    /// The ranges, and what it demands of other tables.
    pub(super) fn validate(&self, config: &Config) -> Result<()> {
        let images = config.train.batch_size * config.train.gradient_accumulation_steps;
        let divides = |key: &str, value: usize| {
            at_least_one(&format!("method.{key}"), value)?;
            ensure!(
                images.is_multiple_of(value),
                "method.{key} = {value} does not divide the global batch of {images} images (train.batch_size x \
                 train.gradient_accumulation_steps), which is one round"
            );
            Ok(())
        };
        let group = |size: usize| {
            ensure!(
                size >= 2,
                "method.group_size = {size}: must be 2 or more, or no image has another to be compared with"
            );
            divides("group_size", size)
        };
        zero_or_more("method.rho", self.rho())?;
        let kind = self.name();
        if let Some(policy) = self.policy() {
            divides("updates", policy.updates)?;
            let clip_range = policy.clip_range;
            ensure!(clip_range > 0.0, "method.clip_range = {clip_range}: must be more than 0; inf turns clipping off");
            more_than_zero("method.advantage_clip", policy.advantage_clip)?;
            let fraction = policy.timestep_fraction;
            ensure!(
                fraction > 0.0 && fraction <= 1.0,
                "method.timestep_fraction = {fraction}: must be more than 0, up to 1"
            );
            match policy.baseline {
                Baseline::Prompt { min_count, .. } => at_least_one("method.min_count", min_count)?,
                Baseline::Group { size, .. } => group(size)?,
                Baseline::Round => {}
            }
            if let Some(window) = &policy.window {
                at_least_one("method.window.size", window.size)?;
                at_least_one("method.window.every", window.every)?;
            }
            ensure!(
                config.sampler.eta > 0.0,
                "sampler.eta = 0 with method.kind = \"{kind}\": a denoising step without noise has no density; set sampler.eta to 1"
            );
        }
        if let Some(Regression { updates, selection, .. }) = self.regression() {
            match selection {
                Selection::Weighted { inverse_temperature, .. } => {
                    divides("updates", updates)?;
                    more_than_zero("method.inverse_temperature", inverse_temperature)?;
                }
                Selection::Best { group_size, percentile } => {
                    at_least_one("method.updates", updates)?;
                    group(group_size)?;
                    ensure!(
                        (0.0..100.0).contains(&percentile),
                        "method.percentile = {percentile}: must be 0 or more and less than 100"
                    );
                }
            }
        }
        if let Self::AdjointMatching(AdjointMatchingConfig { lambda, steps, quantile }) = self {
            more_than_zero("method.lambda", *lambda)?;
            let total = config.sampler.num_inference_steps;
            ensure!(
                (2..=total).contains(steps),
                "method.steps = {steps}: must be 2 or more, and no more than sampler.num_inference_steps = {total}"
            );
            ensure!(*quantile > 0.0 && *quantile <= 1.0, "method.quantile = {quantile}: must be more than 0, up to 1");
            ensure!(
                config.sampler.eta > 0.0,
                "sampler.eta = 0 with method.kind = \"{kind}\": a denoising step without noise cannot be matched; set sampler.eta to 1"
            );
        } else if !matches!(self, Self::Alignprop(_)) {
            at_least_one("method.inner_epochs", self.inner_epochs())?;
        }
        if !matches!(self, Self::Alignprop(_)) {
            ensure!(
                config.train.stored_steps == 0,
                "train.stored_steps = {} with method.kind = \"{kind}\": no step of its chains is differentiated as it is sampled; leave it out",
                config.train.stored_steps
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_moves_to_the_last_step_and_stays() {
        let window = WindowConfig { size: 4, every: 2, stride: 3 };
        let at = |round| window.at(round, 10);
        assert_eq!([0, 1, 2, 4, 6, 1000].map(at), [0..4, 0..4, 3..7, 6..10, 6..10, 6..10]);
        assert_eq!(window.at(0, 3), 0..3);
    }

    #[test]
    fn presets_are_the_published_runs() {
        let preset = |name: &str| {
            let path =
                std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs").join(name).with_extension("toml");
            let config = Config::load(&path, &[]).unwrap();
            config.require_trained().unwrap();
            let images = config.train.batch_size * config.train.gradient_accumulation_steps;
            (config.method, images, config.train.steps)
        };
        for (name, updates, images, steps) in [
            ("ddpo-compressibility", 4, 256, 100),
            ("ddpo-aesthetic", 2, 256, 200),
            ("ddpo-sf", 1, 256, 100),
            ("grpo", 2, 512, 100),
        ] {
            let (method, of_round, rounds) = preset(name);
            let policy = method.policy().unwrap();
            assert_eq!((policy.updates, of_round, rounds), (updates, images, steps), "{name}");
            assert_eq!((policy.clip_range, policy.advantage_clip, policy.inner_epochs), (1e-4, 5.0, 1), "{name}");
        }
        for (name, updates, inner_epochs) in [("rwr", 80, 5), ("rwr-sparse", 8, 50)] {
            let (method, images, rounds) = preset(name);
            let regression = method.regression().unwrap();
            let found = (regression.updates, regression.inner_epochs, images, rounds);
            assert_eq!(found, (updates, inner_epochs, 10_240, 10), "{name}");
        }
        assert_eq!(preset("rsa").0.rho(), 0.01);
        assert!(matches!(
            preset("adjoint-matching").0,
            Method::AdjointMatching(AdjointMatchingConfig { steps: 4, .. })
        ));
    }

    #[test]
    fn every_kind_reads_and_writes() {
        for (text, name) in [
            ("kind = 'alignprop'", "alignprop"),
            ("rho = 0.01", "alignprop"),
            ("kind = 'ddpo', buffer_size = 0, clip_range = inf", "ddpo"),
            ("kind = 'grpo', group_size = 2, deviation = 'round', window = { size = 2 }", "grpo"),
            ("kind = 'rwr', per_prompt = true, inverse_temperature = 1", "rwr"),
            ("kind = 'rwr-sparse', group_size = 4, inner_epochs = 50", "rwr-sparse"),
            ("kind = 'adjoint-matching', lambda = 12.5, quantile = 1", "adjoint-matching"),
        ] {
            let text = format!("method = {{ {text} }}\nsampler.eta = 1\ntrain.batch_size = 4");
            let config = Config::parse(&text, "x.toml", &[]).unwrap();
            assert_eq!(config.method.name(), name);
            let written = config.to_toml().unwrap();
            assert_eq!(Config::parse(&written, "written", &[]).unwrap(), config, "{written}");
        }
        assert_eq!(Config::parse("", "x.toml", &[]).unwrap().method, Method::default());
    }

    #[test]
    fn bad_values_are_named() {
        for (text, start) in [
            ("kind = 'alignprop', rho = -1", "method.rho = -1: must be a finite number, 0 or more"),
            ("kind = 'ddpo', updates = 3", "method.updates = 3 does not divide the global batch of 4 images"),
            ("kind = 'ddpo', updates = 0", "method.updates = 0: must be 1 or more"),
            ("kind = 'ddpo', inner_epochs = 0", "method.inner_epochs = 0: must be 1"),
            ("kind = 'ddpo', clip_range = 0", "method.clip_range = 0: must be more than 0"),
            ("kind = 'ddpo', clip_range = nan", "method.clip_range = NaN: must be more than 0"),
            ("kind = 'ddpo', advantage_clip = 0", "method.advantage_clip = 0: must be a finite number, more"),
            ("kind = 'ddpo', timestep_fraction = 0", "method.timestep_fraction = 0: must be more than 0"),
            ("kind = 'ddpo', timestep_fraction = 1.5", "method.timestep_fraction = 1.5: must be more than 0"),
            ("kind = 'ddpo', min_count = 0", "method.min_count = 0: must be 1 or more"),
            ("kind = 'grpo', group_size = 1", "method.group_size = 1: must be 2 or more"),
            ("kind = 'grpo', group_size = 3", "method.group_size = 3 does not divide the global batch of 4"),
            ("kind = 'grpo', group_size = 2, window = { size = 0 }", "method.window.size = 0: must be 1"),
            ("kind = 'rwr', inverse_temperature = 0", "method.inverse_temperature = 0: must be a finite number, more"),
            ("kind = 'adjoint-matching', steps = 1", "method.steps = 1: must be 2 or more"),
            ("kind = 'adjoint-matching', steps = 51", "method.steps = 51: must be 2 or more, and no more than"),
            ("kind = 'adjoint-matching', quantile = 0", "method.quantile = 0: must be more than 0"),
            ("kind = 'rwr', updates = 3", "method.updates = 3 does not divide"),
            ("kind = 'rwr-sparse', group_size = 3", "method.group_size = 3 does not divide"),
            ("kind = 'rwr-sparse', group_size = 4, percentile = 100", "method.percentile = 100: must be 0 or more"),
        ] {
            let text = format!("method = {{ {text} }}\nsampler.eta = 1\ntrain.batch_size = 4");
            let error = format!("{:#}", Config::parse(&text, "x.toml", &[]).unwrap_err());
            assert!(error.starts_with(&format!("in x.toml: {start}")), "{text}\n{error}");
        }
        let error = |text: &str| format!("{:#}", Config::parse(text, "x.toml", &[]).unwrap_err());
        assert!(error("method.kind = 'ddpo'").contains("sampler.eta = 0 with method.kind = \"ddpo\""));
        let stored = "method.kind = 'ddpo'\nsampler.eta = 1\ntrain = { stored_steps = 1, checkpointing = 'step' }";
        assert!(error(stored).contains("train.stored_steps = 1 with method.kind = \"ddpo\""));
        assert!(error("method = { kind = 'ddpo', group_size = 2 }").contains("the kind \"ddpo\" takes"));
        assert!(error("method = { kind = 'grpo', window = { sizee = 2 } }").contains("did you mean `size`?"));
        assert!(
            error("method.kind = 'ppo'")
                .contains("`ppo`, expected `alignprop`, `ddpo`, `grpo`, `rwr`, `rwr-sparse`, `adjoint-matching`")
        );
        assert!(error("method.rule = 'ddpo'").contains("unknown key `method.rule`"));
    }
}

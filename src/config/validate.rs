//! The ranges of the config: what a type cannot say. One line per rule, the key's full name in every text.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::{
    CheckpointingChoice, Config, GuardConfig, HeadLayer, REWARD_KINDS, RegularizationConfig, RewardsConfig,
    SamplerKind, ServerConfig, Truncation, VlmAnswer,
};

/// Pixels of an image's side, adapters' rank, images of one optimizer step: what lies beyond is a typing error.
const MAX_SIDE: usize = 16_384;
const MAX_RANK: usize = 4096;
const MAX_BATCH: usize = 1 << 20;

impl Config {
    /// Checks the ranges and what one table demands of another. What only the model knows (its image size, its
    /// layers) is checked where the model is loaded.
    pub fn validate(&self) -> Result<()> {
        let Config {
            model,
            lora,
            sampler,
            method,
            truncation,
            reward,
            prompts,
            optimizer,
            train,
            regularization,
            run,
            guard,
        } = self;

        ensure!(!model.path.is_empty(), "model.path is empty: give a folder or a hub id");
        ensure!(model.variant.as_deref() != Some(""), "model.variant is empty: leave it out for the plain files");

        if let Some(rank) = lora.rank {
            at_least_one("lora.rank", rank)?;
            ensure!(rank <= MAX_RANK, "lora.rank = {rank}: at most {MAX_RANK}; ranks of 4 to 128 are usual");
        }
        if let Some(alpha) = lora.alpha {
            more_than_zero("lora.alpha", alpha)?;
        }
        if let Some(targets) = &lora.target_modules {
            ensure!(
                !targets.is_empty() && targets.iter().all(|name| !name.is_empty()),
                "lora.target_modules = {targets:?}: name at least one layer, for example \"to_q\""
            );
        }
        ensure!(
            lora.init_from.as_deref() != Some(Path::new("")),
            "lora.init_from is empty: leave it out for fresh factors"
        );
        for (key, value) in [("config", &model.config), ("tokenizer", &model.tokenizer)] {
            ensure!(value.as_deref() != Some(""), "model.{key} is empty: give a folder or a hub id, or leave it out");
        }

        at_least_one("sampler.num_inference_steps", sampler.num_inference_steps)?;
        zero_or_more("sampler.guidance_scale", sampler.guidance_scale)?;
        let rescale = sampler.guidance_rescale;
        ensure!(
            (0.0..=1.0).contains(&rescale),
            "sampler.guidance_rescale = {rescale}: must be from 0 (off) to 1; 0.7 is usual"
        );
        let eta = sampler.eta;
        ensure!((0.0..=1.0).contains(&eta), "sampler.eta = {eta}: must be from 0 (DDIM) to 1 (DDPM)");
        ensure!(
            sampler.karras != Some(true) || sampler.kind != SamplerKind::Ddim,
            "sampler.karras = true: that goes with another sampler.kind than \"ddim\": euler, euler-ancestral or dpmpp-2m"
        );
        for (key, size) in [("sampler.height", sampler.height), ("sampler.width", sampler.width)] {
            ensure!(size != Some(0), "{key} = 0: give pixels, or leave it out for the model's own size");
            ensure!(size.is_none_or(|n| n <= MAX_SIDE), "{key} = {}: at most {MAX_SIDE} pixels", size.unwrap_or(0));
        }
        truncation.validate(sampler.num_inference_steps)?;
        reward.validate()?;
        prompts.validate()?;

        more_than_zero("optimizer.lr", optimizer.lr)?;
        let [beta1, beta2] = optimizer.betas;
        ensure!(
            (0.0..1.0).contains(&beta1) && (0.0..1.0).contains(&beta2),
            "optimizer.betas = [{beta1}, {beta2}]: each must be 0 or more and less than 1"
        );
        more_than_zero("optimizer.eps", optimizer.eps)?;
        zero_or_more("optimizer.weight_decay", optimizer.weight_decay)?;
        let max_grad_norm = optimizer.max_grad_norm;
        ensure!(
            max_grad_norm > 0.0,
            "optimizer.max_grad_norm = {max_grad_norm}: must be more than 0; inf turns clipping off"
        );
        more_than_zero("optimizer.loss_coeff", optimizer.loss_coeff)?;

        at_least_one("train.steps", train.steps)?;
        at_least_one("train.batch_size", train.batch_size)?;
        at_least_one("train.gradient_accumulation_steps", train.gradient_accumulation_steps)?;
        let batch = train.batch_size.checked_mul(train.gradient_accumulation_steps);
        ensure!(
            batch.is_some_and(|batch| batch <= MAX_BATCH),
            "train.batch_size = {} and train.gradient_accumulation_steps = {}: at most {MAX_BATCH} images a step",
            train.batch_size,
            train.gradient_accumulation_steps
        );
        ensure!(
            train.stored_steps == 0 || train.checkpointing == CheckpointingChoice::Step,
            "train.stored_steps = {}: that goes with train.checkpointing = \"step\"; \"auto\" chooses it by itself, and \"block\" stores none",
            train.stored_steps
        );
        ensure!(
            optimizer.warmup_steps <= train.steps,
            "optimizer.warmup_steps = {} but train.steps = {}: the warm-up would not end",
            optimizer.warmup_steps,
            train.steps
        );

        method.validate(self)?;
        if let Some(budget) = train.memory_budget {
            more_than_zero("train.memory_budget", budget)?;
        }
        regularization.validate(reward)?;
        guard.validate()?;
        ensure!(
            guard.max_sharpness.is_none() || method.differentiates_rewards(),
            "guard.max_sharpness with method.kind = \"{}\": sharpness is of the reward's gradient, which this method does not ask for",
            method.name()
        );

        ensure!(
            run.dir.as_ref().is_none_or(|dir| !dir.as_os_str().is_empty()),
            "run.dir is empty: give the run a folder, for example runs/mine"
        );
        ensure!(i64::try_from(run.seed).is_ok(), "run.seed = {}: must be less than 2^63, TOML's limit", run.seed);
        if let Err(error) = parse_device(&run.device) {
            bail!("run.device = \"{}\": {error}", run.device);
        }
        if let Some(prompts) = &run.sample_prompts {
            prompts.validate().context("in run.sample_prompts")?;
        }
        at_least_one("run.num_samples", run.num_samples)
    }

    /// Training needs a reward to follow, and differentiates DDIM alone.
    pub fn require_trained(&self) -> Result<()> {
        ensure!(
            self.sampler.kind == SamplerKind::Ddim,
            "sampler.kind: training goes with \"ddim\"; the others draw images in `sample` and `eval` (--sampler)"
        );
        let weights = self.reward.weights();
        if weights.iter().any(|(_, weight)| *weight != 0.0) {
            return Ok(());
        }
        if weights.is_empty() {
            bail!(
                "the config has no reward to train: add a table [reward.KIND], or --set reward.KIND.weight=1; KIND is one of \
                 {}",
                REWARD_KINDS.join(", ")
            );
        }
        let kinds: Vec<&str> = weights.iter().map(|(kind, _)| *kind).collect();
        bail!(
            "the weight of every reward ({}) is 0, so nothing would be trained: set reward.{}.weight to 1",
            kinds.join(", "),
            kinds[0]
        )
    }
}

impl Truncation {
    fn validate(&self, num_inference_steps: usize) -> Result<()> {
        let total = num_inference_steps;
        let against =
            |key: &str, value: String| format!("truncation.{key} = {value} but sampler.num_inference_steps = {total}");
        let ordered = |lo: usize, hi: usize| {
            ensure!(lo <= hi, "truncation.lo = {lo} is more than truncation.hi = {hi}: swap them");
            Ok(())
        };
        match self {
            Truncation::Uniform { .. } | Truncation::Full | Truncation::Drtune { k: None } => {}
            Truncation::Fixed { k } | Truncation::Drtune { k: Some(k) } => {
                at_least_one("truncation.k", *k)?;
                ensure!(
                    *k <= total,
                    "{}: only as many steps as there are can keep their gradient",
                    against("k", k.to_string())
                );
            }
            Truncation::Gaussian { mean, std, .. } => {
                ensure!(
                    (1.0..total as f64).contains(mean),
                    "{}: it is the first step that keeps its gradient, and must be 1 or more and less than that",
                    against("mean", mean.to_string())
                );
                zero_or_more("truncation.std", *std)?;
            }
            Truncation::PerStep { lo, hi } => {
                ordered(*lo, *hi)?;
                ensure!(*hi <= total, "{}: give at most {total}", against("hi", hi.to_string()));
                ensure!(*lo < total, "{}: no step would keep its gradient", against("lo", lo.to_string()));
            }
            Truncation::Steps { steps } => {
                ensure!(!steps.is_empty(), "truncation.steps is empty: no step would keep its gradient");
                for (position, step) in steps.iter().enumerate() {
                    ensure!(
                        *step < total,
                        "{}: steps are counted from 0 (the noisiest) to {}",
                        against("steps", format!("{steps:?}")),
                        total - 1
                    );
                    ensure!(!steps[..position].contains(step), "truncation.steps names {step} twice: once is enough");
                }
            }
            Truncation::DraftLv { n } => at_least_one("truncation.n", *n)?,
            Truncation::Refl { lo, hi } => {
                ordered(*lo, *hi)?;
                ensure!(
                    *hi < total,
                    "{}: steps are counted from 0 (the noisiest) to {}",
                    against("hi", hi.to_string()),
                    total - 1
                );
            }
        }
        Ok(())
    }
}

impl RegularizationConfig {
    fn validate(&self, rewards: &RewardsConfig) -> Result<()> {
        zero_or_more("regularization.kl_weight", self.kl_weight)?;
        let decay = self.ema_decay;
        ensure!(
            (0.0..1.0).contains(&decay),
            "regularization.ema_decay = {decay}: must be 0 or more and less than 1; 0.99 averages about 100 steps"
        );
        let kinds: Vec<&str> = rewards.weights().into_iter().map(|(kind, _)| kind).collect();
        for (kind, cap) in &self.reward_cap {
            ensure!(
                kinds.contains(&kind.as_str()),
                "regularization.reward_cap.{kind}: the config has no such reward; it has {}",
                if kinds.is_empty() { "none".to_owned() } else { kinds.join(", ") }
            );
            ensure!(cap.is_finite(), "regularization.reward_cap.{kind} = {cap}: must be a finite number");
        }
        Ok(())
    }
}

impl GuardConfig {
    fn validate(&self) -> Result<()> {
        at_least_one("guard.num_prompts", self.num_prompts)?;
        at_least_one("guard.seeds", self.seeds)?;
        if let Some(sharpness) = self.max_sharpness {
            ensure!(sharpness > 0.0, "guard.max_sharpness = {sharpness}: must be more than 0; inf never stops");
        }
        if let Some(prompts) = &self.prompts {
            prompts.validate().context("in guard")?;
        }
        self.reward.validate().context("in guard")
    }
}

impl RewardsConfig {
    fn validate(&self) -> Result<()> {
        for (kind, weight) in self.weights() {
            ensure!(weight.is_finite(), "reward.{kind}.weight = {weight}: must be a finite number");
        }
        let mut named = Vec::new();
        let mut targets = Vec::new();
        if let Some(aesthetic) = &self.aesthetic {
            named.extend([("aesthetic.clip", &aesthetic.clip), ("aesthetic.head", &aesthetic.head)]);
            targets.push(("aesthetic", aesthetic.target));
        }
        if let Some(clip_head) = &self.clip_head {
            named.push(("clip-head.head", &clip_head.head));
            named.extend(clip_head.clip.iter().map(|clip| ("clip-head.clip", clip)));
            targets.push(("clip-head", clip_head.target));
            ensure!(
                clip_head.layers.is_empty()
                    || clip_head.layers.iter().any(|layer| matches!(layer, HeadLayer::Linear(_))),
                "reward.clip-head.layers has no linear layer: list the head's layers in order, for example \
                 [{{ linear = \"layers.0\" }}, {{ activation = \"relu\" }}, {{ linear = \"layers.2\" }}]"
            );
        }
        if let Some(hps) = &self.hps {
            named.extend([("hps.model", &hps.model), ("hps.file", &hps.file)]);
        }
        named.extend(self.clip_score.iter().map(|reward| ("clip-score.model", &reward.model)));
        named.extend(self.pickscore.iter().map(|reward| ("pickscore.model", &reward.model)));
        if let Some(reward) = &self.image_reward {
            named.extend([("image-reward.model", &reward.model), ("image-reward.file", &reward.file)]);
            targets.push(("image-reward", reward.target));
        }
        named.extend(self.object.iter().filter_map(|reward| Some(("object.object", reward.object.as_ref()?))));
        let detectors = self
            .count
            .iter()
            .map(|reward| ("count", &reward.model, reward.size, reward.threshold))
            .chain(self.object.iter().map(|reward| ("object", &reward.model, reward.size, reward.threshold)));
        for (kind, model, size, threshold) in detectors {
            ensure!(!model.is_empty(), "reward.{kind}.model is empty: say where it is");
            if let Some(size) = size {
                ensure!(
                    (1..=MAX_SIDE).contains(&size),
                    "reward.{kind}.size = {size}: must be from 1 to {MAX_SIDE} pixels"
                );
            }
            ensure!(
                (0.0..=1.0).contains(&threshold),
                "reward.{kind}.threshold = {threshold}: must be a probability, from 0 to 1; 0.5 is usual"
            );
        }
        if let Some(command) = &self.command {
            targets.push(("command", command.target));
            ensure!(
                command.program.first().is_some_and(|word| !word.is_empty()),
                "reward.command.program is empty: name the program and its arguments, such as [\"python\", \"reward.py\"]"
            );
            seconds("reward.command.timeout", command.timeout)?;
            seconds("reward.command.start_timeout", command.start_timeout)?;
        }
        if let Some(http) = &self.http {
            http.server.validate("reward.http.server")?;
            at_least_one("reward.http.batch", http.batch)?;
        }
        if let Some(vlm) = &self.vlm {
            vlm.server.validate("reward.vlm.server")?;
            named.push(("vlm.model", &vlm.model));
            named.push(("vlm.question", &vlm.question));
            at_least_one("reward.vlm.max_tokens", vlm.max_tokens)?;
            ensure!(
                (vlm.answer == VlmAnswer::Words) != vlm.words.is_empty(),
                "reward.vlm.words: list what must occur in the answer with `answer = \"words\"`, and nothing with other answers"
            );
            ensure!(vlm.otherwise.is_none_or(f64::is_finite), "reward.vlm.otherwise must be a finite number");
        }
        for (key, name) in named {
            ensure!(!name.is_empty(), "reward.{key} is empty: say where it is");
        }
        for (kind, target) in targets {
            ensure!(
                target.is_none_or(f64::is_finite),
                "reward.{kind}.target must be a finite number; leave it out for plain maximisation"
            );
        }
        Ok(())
    }
}

/// Accepts `cpu`, `cuda` and `cuda:N`, for the config and for `--device`.
pub fn parse_device(device: &str) -> Result<String, String> {
    let ordinal = device.strip_prefix("cuda:");
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if matches!(device, "cpu" | "cuda") || ordinal.is_some_and(is_number) {
        Ok(device.to_string())
    } else {
        Err("must be cpu, cuda or cuda:N".to_string())
    }
}

impl ServerConfig {
    fn validate(&self, key: &str) -> Result<()> {
        ensure!(
            !self.url.is_empty(),
            "{key}.url is empty: give the address of the server, such as http://127.0.0.1:8000/"
        );
        ensure!(self.key_env.as_deref() != Some(""), "{key}.key_env is empty: name a variable, or leave it out");
        seconds(&format!("{key}.timeout"), self.timeout)?;
        at_least_one(&format!("{key}.concurrency"), self.concurrency)
    }
}

/// A time that somebody would wait for.
fn seconds(key: &str, value: f64) -> Result<()> {
    ensure!(value > 0.0 && value <= 1e6, "{key} = {value}: must be seconds, more than 0 and at most a million");
    Ok(())
}

pub(super) fn at_least_one(key: &str, value: usize) -> Result<()> {
    ensure!(value >= 1, "{key} = {value}: must be 1 or more");
    Ok(())
}

pub(super) fn more_than_zero(key: &str, value: f64) -> Result<()> {
    ensure!(value > 0.0 && value.is_finite(), "{key} = {value}: must be a finite number, more than 0");
    Ok(())
}

pub(super) fn zero_or_more(key: &str, value: f64) -> Result<()> {
    ensure!(value >= 0.0 && value.is_finite(), "{key} = {value}: must be a finite number, 0 or more");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        format!("{:#}", Config::parse(text, "x.toml", &[]).unwrap_err())
    }

    #[test]
    fn bad_values_are_named() {
        for (text, start) in [
            ("model.path = ''", "model.path is empty"),
            ("model.variant = ''", "model.variant is empty"),
            ("lora.rank = 0", "lora.rank = 0: must be 1 or more"),
            ("lora.alpha = 0.0", "lora.alpha = 0: must be a finite number, more than 0"),
            ("lora.target_modules = []", "lora.target_modules = []: name at least one layer"),
            ("sampler.num_inference_steps = 0", "sampler.num_inference_steps = 0: must be 1"),
            ("sampler.guidance_scale = nan", "sampler.guidance_scale = NaN: must be"),
            ("sampler.guidance_rescale = 1.5", "sampler.guidance_rescale = 1.5: must be from 0 (off) to 1"),
            ("sampler.guidance_rescale = -0.1", "sampler.guidance_rescale = -0.1: must be from 0 (off) to 1"),
            ("sampler.guidance_rescale = nan", "sampler.guidance_rescale = NaN: must be from 0 (off) to 1"),
            ("sampler.eta = -0.1", "sampler.eta = -0.1: must be from 0"),
            ("sampler.eta = 1.1", "sampler.eta = 1.1: must be from 0"),
            ("sampler.karras = true", "sampler.karras = true: that goes with another sampler.kind"),
            ("sampler.height = 0", "sampler.height = 0: give pixels"),
            ("reward.hps.weight = inf", "reward.hps.weight = inf: must be a finite number"),
            ("reward.hps.file = ''", "reward.hps.file is empty"),
            ("reward.aesthetic.target = nan", "reward.aesthetic.target must be a finite number"),
            (
                "reward.clip-head = { head = 'h', layers = [{ activation = 'relu' }] }",
                "reward.clip-head.layers has no linear layer",
            ),
            ("reward.clip-head.layers = [{ linear = '0' }]", "reward.clip-head.head is empty"),
            ("reward.image-reward.file = ''", "reward.image-reward.file is empty"),
            ("reward.image-reward.target = inf", "reward.image-reward.target must be a finite number"),
            ("reward.count.size = 0", "reward.count.size = 0: must be from 1 to"),
            ("reward.count.model = ''", "reward.count.model is empty"),
            ("reward.object.threshold = 1.5", "reward.object.threshold = 1.5: must be a probability"),
            ("reward.object.object = ''", "reward.object.object is empty"),
            ("reward.command = {}", "reward.command.program is empty: name the program"),
            ("reward.command = { program = ['a'], timeout = 0 }", "reward.command.timeout = 0: must be seconds"),
            (
                "reward.command = { program = ['a'], start_timeout = inf }",
                "reward.command.start_timeout = inf: must be",
            ),
            ("reward.command = { program = ['a'], target = nan }", "reward.command.target must be a finite number"),
            ("reward.http = {}", "reward.http.server.url is empty: give the address"),
            ("reward.http = { server.url = 'http://a', batch = 0 }", "reward.http.batch = 0: must be 1 or more"),
            (
                "reward.http.server = { url = 'http://a', concurrency = 0 }",
                "reward.http.server.concurrency = 0: must be",
            ),
            ("reward.http.server = { url = 'http://a', timeout = -1 }", "reward.http.server.timeout = -1: must be"),
            ("reward.vlm.server.url = 'http://a'", "reward.vlm.model is empty"),
            ("reward.vlm = { server.url = 'http://a', model = 'm', answer = 'words' }", "reward.vlm.words: list what"),
            ("reward.vlm = { server.url = 'http://a', model = 'm', words = ['a'] }", "reward.vlm.words: list what"),
            ("prompts = { builtin = 'animals', file = 'p' }", "prompts.file and prompts.builtin are both given"),
            ("optimizer.lr = 0", "optimizer.lr = 0: must be a finite number, more than 0"),
            ("optimizer.betas = [0.9, 1.0]", "optimizer.betas = [0.9, 1]: each must be"),
            ("optimizer.eps = 0", "optimizer.eps = 0: must be"),
            ("optimizer.weight_decay = -1", "optimizer.weight_decay = -1: must be"),
            ("optimizer.max_grad_norm = 0", "optimizer.max_grad_norm = 0: must be more than 0; inf turns"),
            ("optimizer.loss_coeff = inf", "optimizer.loss_coeff = inf: must be"),
            ("optimizer.warmup_steps = 101", "optimizer.warmup_steps = 101 but train.steps = 100"),
            ("train.steps = 0", "train.steps = 0: must be 1 or more"),
            ("train.batch_size = 0", "train.batch_size = 0: must be 1 or more"),
            ("train.gradient_accumulation_steps = 0", "train.gradient_accumulation_steps = 0"),
            ("train.stored_steps = 2", "train.stored_steps = 2: that goes with train.checkpointing = \"step\""),
            ("train.memory_budget = 0", "train.memory_budget = 0: must be a finite number, more than 0"),
            ("regularization.kl_weight = -1", "regularization.kl_weight = -1: must be"),
            ("regularization.ema_decay = 1", "regularization.ema_decay = 1: must be 0 or more and less than 1"),
            (
                "reward.hps = {}\nregularization.reward_cap.clip-score = 1",
                "regularization.reward_cap.clip-score: the config has no such reward; it has hps",
            ),
            ("guard.seeds = 0", "guard.seeds = 0: must be 1 or more"),
            ("guard.max_sharpness = 0", "guard.max_sharpness = 0: must be more than 0"),
            ("guard.num_prompts = 0", "guard.num_prompts = 0: must be 1 or more"),
            ("guard.reward.hps.file = ''", "in guard: reward.hps.file is empty"),
            ("guard.prompts.list = []", "in guard: prompts.list is empty"),
            ("run.dir = ''", "run.dir is empty"),
            ("run.device = 'cuda:'", "run.device = \"cuda:\": must be cpu, cuda or cuda:N"),
            ("run.num_samples = 0", "run.num_samples = 0: must be 1 or more"),
            ("run.sample_prompts.list = []", "in run.sample_prompts: prompts.list is empty"),
        ] {
            let error = error(text);
            assert!(error.starts_with(&format!("in x.toml: {start}")), "{text}\n{error}");
        }
    }

    #[test]
    fn truncation_fits_the_steps() {
        for (text, start) in [
            ("rule = 'fixed', k = 0", "truncation.k = 0: must be 1 or more"),
            ("rule = 'fixed', k = 60", "truncation.k = 60 but sampler.num_inference_steps = 50: only as"),
            ("rule = 'drtune', k = 51", "truncation.k = 51 but sampler.num_inference_steps = 50: only as"),
            ("rule = 'gaussian', mean = 50, std = 5", "truncation.mean = 50 but sampler.num_inference"),
            ("rule = 'gaussian', mean = 42, std = -5", "truncation.std = -5: must be"),
            ("rule = 'per-step', lo = 3, hi = 2", "truncation.lo = 3 is more than truncation.hi = 2: swap"),
            ("rule = 'per-step', lo = 3, hi = 51", "truncation.hi = 51 but sampler.num_inference_steps = 50"),
            ("rule = 'per-step', lo = 50, hi = 50", "truncation.lo = 50 but sampler.num_inference_steps = 50"),
            ("rule = 'steps', steps = []", "truncation.steps is empty"),
            ("rule = 'steps', steps = [50]", "truncation.steps = [50] but sampler.num_inference_steps = 50"),
            ("rule = 'steps', steps = [1, 1]", "truncation.steps names 1 twice"),
            ("rule = 'draft-lv', n = 0", "truncation.n = 0: must be 1 or more"),
            ("rule = 'refl', lo = 30, hi = 50", "truncation.hi = 50 but sampler.num_inference_steps = 50"),
            ("rule = 'refl', lo = 3, hi = 2", "truncation.lo = 3 is more than truncation.hi = 2: swap"),
        ] {
            let error = error(&format!("truncation = {{ {text} }}"));
            assert!(error.starts_with(&format!("in x.toml: {start}")), "{text}\n{error}");
        }
    }

    #[test]
    fn training_needs_a_reward() {
        let error = |text| Config::parse(text, "x.toml", &[]).unwrap().require_trained().unwrap_err().to_string();
        assert!(error("").starts_with("the config has no reward to train: add a table [reward.KIND]"));
        assert!(error("sampler.kind = 'dpmpp-2m'\nreward.hps = {}").starts_with("sampler.kind: training goes with"));
        assert_eq!(
            error("reward = { hps.weight = 0, pickscore.weight = 0.0 }"),
            "the weight of every reward (hps, pickscore) is 0, so nothing would be trained: set reward.hps.weight to 1"
        );
    }

    #[test]
    fn devices() {
        for device in ["cpu", "cuda", "cuda:0", "cuda:12"] {
            assert_eq!(parse_device(device).as_deref(), Ok(device));
        }
        for device in ["", "gpu", "cuda:", "cuda:a", "cuda:-1", "cpu:0"] {
            assert!(parse_device(device).is_err(), "{device}");
        }
    }
}

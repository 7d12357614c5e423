//! `alignprop verify DIR`: recomputes recorded float64 numbers of PyTorch with the code that trains, and compares.
//!
//! What DIR holds is said by `kind` in its `reference.json`; a set of another kind is a file here. Without a kind it is a pipeline
//! (`model/`), reward models (`clip/`, `hps/`), `reference.json` and tensors: the parts of the pipeline by themselves, the
//! gradients of whole chains, and the adapters after three optimizer steps.

mod fit;
mod image_reward;
mod policy;
mod score;
mod siglip;
mod yolos;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use comfy_table::{Table, presets};
use serde::{Deserialize, Serialize};

use crate::cli::VerifyArgs;
use crate::config::{
    AestheticConfig, Checkpointing, ClipScoreConfig, HpsConfig, ModelConfig, OptimizerConfig, Preprocess, Prompt,
    RewardsConfig,
};
use crate::diffusion::DdimSchedule;
use crate::lora::{Adapters, formats};
use crate::models::Pipeline;
use crate::models::clip::PixelStatistics;
use crate::nn::lora::LoraGradients;
use crate::nn::{Tape, Value};
use crate::ops::device::Compute;
use crate::optim::AdamW;
use crate::rewards::{Judge, Objective, Preprocessor, Rewards, TapedImages};
use crate::sampling::{Conditioning, Denoiser};
use crate::training::Plan;
use crate::training::loss_scale::LossScale;
use crate::training::step::{Critic, Tally, credit, differentiate, sample, update};

/// Relative errors (L2) that a computation must stay below.
struct Bounds {
    /// Of the pipeline's parts, and in whole chains of latents, images, scores and losses.
    parts: f64,
    /// Of a reward's scores of given images. Of a cosine in half precision the absolute error, because those of the sets' random
    /// towers are near 0.
    scores: f64,
    /// Of the scores' gradients with respect to the images.
    image_gradients: f64,
    /// All LoRA gradients of a case together.
    all_gradients: f64,
    /// The worst single LoRA gradient; `None` where a single one may be mostly rounding.
    one_gradient: Option<f64>,
    /// How far below 1 the cosine of a LoRA gradient with the reference's may be, where its norm is not negligible.
    cosine: f64,
    /// The adapters after three optimizer steps.
    adapters: f64,
}

/// f32 on the CPU. PyTorch's own f32 is at about 4e-6 for all gradients of a case together and at up to 1e-4 for a single
/// tensor.
const CPU: Bounds = Bounds {
    parts: 1e-4,
    scores: 1e-4,
    image_gradients: 1e-4,
    all_gradients: 1e-4,
    one_gradient: Some(1e-3),
    cosine: 1e-6,
    adapters: 1e-5,
};

/// f32 on a GPU, whose sums are of other lengths and orders.
const GPU: Bounds = Bounds {
    parts: 1e-3,
    scores: 1e-3,
    image_gradients: 1e-3,
    all_gradients: 1e-3,
    one_gradient: Some(1e-2),
    cosine: 1e-4,
    adapters: 1e-3,
};

/// bf16, f16, and f32 with inputs rounded to TF32: 8 to 11 bits of mantissa. On the CPU, rounding every operation to bf16 leaves
/// the weighty LoRA gradients of a single evaluation cosines of 0.996 and more in the first small set, 0.988 and more in the
/// second, and the rewards of four sets errors of 0.007 and less in their scores and of 0.046 and less in the images' gradients.
/// [`loosen`] makes the bounds of chains wider.
const ROUNDED: Bounds = Bounds {
    parts: 5e-2,
    scores: 2e-2,
    image_gradients: 1e-1,
    all_gradients: 5e-2,
    one_gradient: None,
    cosine: 2e-2,
    adapters: 5e-2,
};

/// f16 has three bits more than bf16: in the same rewards 0.0005 and 0.0053.
const F16: Bounds = Bounds { scores: 2e-3, image_gradients: 2e-2, ..ROUNDED };

/// A LoRA tensor whose gradient is less than this share of all gradients' norm is mostly rounding in half precision.
const NEGLIGIBLE: f64 = 1e-2;

/// How many times as far from the reference as with rounded weights alone half precision may be.
const OF_ROUNDED_WEIGHTS: f64 = 5.0;

impl Bounds {
    fn of(compute: &Compute, allow_tf32: bool) -> &'static Self {
        match (compute.dtype(), compute.device().is_cpu()) {
            (DType::F32, true) => &CPU,
            (DType::F32, false) if !allow_tf32 => &GPU,
            (DType::F16, _) => &F16,
            _ => &ROUNDED,
        }
    }
}

/// What a `reference.json` is about.
#[derive(Deserialize)]
struct Kind {
    kind: Option<String>,
}

/// `reference.json` of a pipeline.
#[derive(Deserialize)]
struct Reference {
    size: [usize; 2],
    steps: usize,
    lora_alpha: f64,
    prompts: Vec<String>,
    #[serde(default)]
    cases: BTreeMap<String, Case>,
    train3: Option<Train>,
}

#[derive(Deserialize)]
struct Case {
    eta: f64,
    guidance_scale: f64,
    #[serde(default)]
    guidance_rescale: f64,
    keep: Vec<bool>,
    reward: String,
    loss: f64,
}

#[derive(Deserialize)]
struct Train {
    log: Vec<TrainLog>,
    lr: f64,
    weight_decay: f64,
    max_grad_norm: f64,
    loss_coeff: f64,
    aesthetic_target: f64,
    eta: f64,
    guidance_scale: f64,
    #[serde(default)]
    guidance_rescale: f64,
    backprop_steps: usize,
}

#[derive(Deserialize)]
struct TrainLog {
    loss: f64,
    reward_mean: f64,
    grad_norm: f64,
}

/// One compared quantity.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub case: String,
    pub what: String,
    /// Relative L2 error; the number of unequal entries for ids.
    pub error: f64,
    pub bound: f64,
    pub pass: bool,
    /// Whether it is a number of a whole chain.
    #[serde(skip)]
    chain: bool,
}

/// The comparison.
#[derive(Default, Serialize)]
pub struct Report {
    pub rows: Vec<Row>,
    /// Cases that could not be computed, and why.
    pub skipped: Vec<String>,
    /// Whether what comes now is about whole chains.
    #[serde(skip)]
    in_chains: bool,
}

impl Report {
    pub fn passed(&self) -> bool {
        !self.rows.is_empty() && self.rows.iter().all(|row| row.pass)
    }
    fn push(&mut self, case: &str, what: impl Into<String>, error: f64, bound: f64) {
        // a NaN compares as a failure
        let pass = error <= bound;
        self.rows.push(Row { case: case.into(), what: what.into(), error, bound, pass, chain: self.in_chains });
    }
    fn compare(&mut self, case: &str, what: &str, found: &Tensor, expected: &Tensor, bound: f64) -> Result<()> {
        let error = Distance::between(found, expected).with_context(|| format!("comparing {case}: {what}"))?;
        self.push(case, what, error.relative(), bound);
        Ok(())
    }
    fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_header(["case", "what", "error", "bound", ""]);
        for row in &self.rows {
            let number = |x: f64| if row.bound == 0.0 { format!("{x}") } else { format!("{x:.1e}") };
            let verdict = if row.pass { "pass" } else { "FAIL" };
            table.add_row([row.case.clone(), row.what.clone(), number(row.error), number(row.bound), verdict.into()]);
        }
        table
    }
}

/// Squared L2 distance and norm.
#[derive(Clone, Copy, Default)]
struct Distance {
    difference: f64,
    norm: f64,
    found_norm: f64,
    product: f64,
}

impl Distance {
    fn between(found: &Tensor, expected: &Tensor) -> Result<Self> {
        anyhow::ensure!(found.dims() == expected.dims(), "shape {:?} instead of {:?}", found.dims(), expected.dims());
        let (found, expected) = (numbers(found)?, numbers(expected)?);
        Ok(Self {
            difference: found.iter().zip(&expected).map(|(x, y)| (x - y) * (x - y)).sum(),
            norm: expected.iter().map(|y| y * y).sum(),
            found_norm: found.iter().map(|x| x * x).sum(),
            product: found.iter().zip(&expected).map(|(x, y)| x * y).sum(),
        })
    }
    fn plus(self, other: Self) -> Self {
        Self {
            difference: self.difference + other.difference,
            norm: self.norm + other.norm,
            found_norm: self.found_norm + other.found_norm,
            product: self.product + other.product,
        }
    }
    fn relative(self) -> f64 {
        if self.difference == 0.0 { 0.0 } else { (self.difference / self.norm).sqrt() }
    }
    /// 1 minus the cosine of the two.
    fn angle(self) -> f64 {
        if self.difference == 0.0 { 0.0 } else { 1.0 - self.product / (self.norm * self.found_norm).sqrt() }
    }
}

pub fn run(args: &VerifyArgs) -> Result<bool> {
    let compute = Compute::open_any(&args.device, args.precision, args.allow_tf32)?;
    let report = if args.allow_tf32 {
        compare(&args.dir, args.head.as_deref(), &compute, Bounds::of(&compute, true))?
    } else {
        verify_on(&args.dir, args.head.as_deref(), &compute)?
    };
    if !args.json {
        say!("{}, {}", compute.describe(), compute.precision_name());
    }
    if args.json {
        say!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        say!("{}", report.table());
        report.skipped.iter().for_each(|reason| say!("skipped: {reason}"));
        let failed = report.rows.iter().filter(|row| !row.pass).count();
        say!("{} compared, {failed} failed, {} skipped", report.rows.len(), report.skipped.len());
    }
    Ok(report.passed())
}

/// Compares everything in `dir`. `head` is the aesthetic head, which is otherwise looked for in `dir`
/// (`aesthetic_head.safetensors`) and in the folders above it (`sac+logos+ava1-l14-linearMSE.pth`).
pub fn verify(dir: &Path, head: Option<&Path>) -> Result<Report> {
    verify_on(dir, head, &Compute::cpu())
}

/// As [`verify`], on another device or in another number format. Half precision has wider bounds.
pub fn verify_on(dir: &Path, head: Option<&Path>, compute: &Compute) -> Result<Report> {
    let mut report = compare(dir, head, compute, Bounds::of(compute, false))?;
    if compute.dtype() != DType::F32 {
        loosen(&mut report, &compare(dir, head, &compute.in_f32_with_rounded_weights(), &ROUNDED)?);
    }
    Ok(report)
}

/// Chains of tiny models with guidance amplify what rounding does: rounding the weights to bf16 and computing in f32 moves
/// the gradients of these cases by up to 0.17 (docs/log.md). So what half precision may do to a chain is a multiple of what
/// rounded weights do to any chain of the set, where that is more than the plain bound; an angle's goes with the square. A
/// gradient's norm is off by no more than the gradient.
fn loosen(report: &mut Report, rounded_weights: &Report) {
    let kind = |what: &str| match what {
        angle if angle.starts_with(ANGLE) => ANGLE.to_owned(),
        "gradient norm" => GRADIENTS.to_owned(),
        other => other.to_owned(),
    };
    for row in report.rows.iter_mut().filter(|row| row.bound > 0.0 && row.chain) {
        let alike = rounded_weights.rows.iter().filter(|other| other.chain && kind(&other.what) == kind(&row.what));
        let worst = alike.map(|other| other.error).fold(0.0, f64::max);
        let (times, least) = match kind(&row.what).as_str() {
            ANGLE => (OF_ROUNDED_WEIGHTS.powi(2), 5e-2),
            GRADIENTS => (OF_ROUNDED_WEIGHTS, 1e-1),
            _ => (OF_ROUNDED_WEIGHTS, row.bound),
        };
        row.bound = least.max(times * worst);
        row.pass = row.error <= row.bound;
    }
}

/// What rows are about that are treated alike.
const ANGLE: &str = "1 - cosine";
const GRADIENTS: &str = "all LoRA gradients";

fn compare(dir: &Path, head: Option<&Path>, compute: &Compute, bounds: &'static Bounds) -> Result<Report> {
    let text = std::fs::read_to_string(dir.join("reference.json"))
        .with_context(|| format!("{} holds no reference.json", dir.display()))?;
    let place = || format!("reading {}/reference.json", dir.display());
    let head = head.map(Path::to_owned).or_else(|| find_head(dir));
    match serde_json::from_str::<Kind>(&text).with_context(place)?.kind.as_deref() {
        None => Subject::load(dir, &text, head, compute, bounds)?.compare(),
        Some("fit") => fit::compare(dir, &text).with_context(place),
        Some("imagereward") => image_reward::compare(dir, &text, compute, bounds),
        Some("policy") => policy::compare(&Subject::load(dir, &text, head, compute, bounds)?, &text),
        Some("score") => score::compare(dir, &text, head.as_deref(), compute, bounds).with_context(place),
        Some("siglip") => siglip::compare(dir, compute, bounds),
        Some("yolos") => yolos::compare(dir, &text, compute, bounds),
        Some(other) => {
            bail!(
                "{} is of kind `{other}`: none (a pipeline), fit, imagereward, policy, score, siglip and yolos are known",
                dir.display()
            )
        }
    }
}

/// The tensors of a set's file.
fn tensors(dir: &Path, name: &str, compute: &Compute) -> Result<HashMap<String, Tensor>> {
    let path = dir.join(name);
    candle_core::safetensors::load(&path, compute.device()).with_context(|| format!("reading {}", path.display()))
}

fn find_head(dir: &Path) -> Option<PathBuf> {
    let own = dir.join("aesthetic_head.safetensors");
    let absolute = dir.canonicalize().ok()?;
    let above = absolute.ancestors().map(|folder| folder.join("sac+logos+ava1-l14-linearMSE.pth"));
    std::iter::once(own).chain(above).find(|path| path.is_file())
}

struct Subject<'a> {
    dir: &'a Path,
    reference: Reference,
    pipeline: Pipeline,
    head: Option<PathBuf>,
    compute: &'a Compute,
    bounds: &'static Bounds,
}

impl<'a> Subject<'a> {
    fn load(
        dir: &'a Path,
        text: &str,
        head: Option<PathBuf>,
        compute: &'a Compute,
        bounds: &'static Bounds,
    ) -> Result<Self> {
        let reference =
            serde_json::from_str(text).with_context(|| format!("reading {}/reference.json", dir.display()))?;
        let pipeline = Pipeline::load_on(&ModelConfig::at(dir.join("model").to_string_lossy()), compute)?;
        Ok(Self { dir, reference, pipeline, head, compute, bounds })
    }

    /// The pipeline, its rewards and the gradients of its chains.
    fn compare(&self) -> Result<Report> {
        let mut report = Report::default();
        self.parts(&mut report)?;
        let start = formats::load(&self.dir.join("lora_start.safetensors"))?.adapters;
        let start = self.with_alpha(&start)?.to_device(self.compute.device())?;
        if self.compute.dtype() != DType::F32 {
            self.one_evaluation(&start, &mut report)?;
        }
        report.in_chains = true;
        for (name, case) in &self.reference.cases {
            self.chain(name, case, &start, &mut report)?;
        }
        if let Some(train) = &self.reference.train3 {
            self.train(train, &start, &mut report)?;
        }
        Ok(report)
    }

    fn tensors(&self, name: &str) -> Result<HashMap<String, Tensor>> {
        tensors(self.dir, name, self.compute)
    }

    fn with_alpha(&self, adapters: &Adapters) -> Result<Adapters> {
        let mut factors = adapters.factors().to_vec();
        factors.iter_mut().for_each(|factor| factor.alpha = self.reference.lora_alpha);
        Adapters::new(factors)
    }

    /// The scale that a run would start with.
    fn loss_scale(&self) -> f64 {
        LossScale::new(self.compute.dtype()).map_or(1.0, |scale| scale.get())
    }

    /// The rewards by their names in reference.json; `None` where the aesthetic head is missing.
    fn rewards(&self, kind: &str, target: f64) -> Result<Option<Rewards>> {
        let path = |name: &str| self.dir.join(name).to_string_lossy().into_owned();
        let mut config = RewardsConfig::default();
        match (kind, &self.head) {
            ("aesthetic", None) => return Ok(None),
            ("aesthetic", Some(head)) => {
                config.aesthetic = Some(AestheticConfig {
                    clip: path("clip"),
                    head: head.to_string_lossy().into_owned(),
                    target: Some(target),
                    ..Default::default()
                });
            }
            ("clip-score", _) => {
                config.clip_score = Some(ClipScoreConfig { model: path("clip"), ..Default::default() });
            }
            _ => {
                // the pickle where there is one, else safetensors: both forms that people have
                let pickle = std::fs::read_dir(self.dir.join("hps"))?
                    .flatten()
                    .map(|entry| entry.file_name().to_string_lossy().into_owned())
                    .find(|name| name.ends_with(".pt"));
                config.hps = Some(HpsConfig {
                    model: path("hps"),
                    file: pickle.unwrap_or("model.safetensors".into()),
                    ..Default::default()
                });
            }
        }
        Rewards::load_on(&config, &self.pipeline.tokenizer, self.compute).map(Some)
    }

    fn conditioning(&self, guidance_scale: f64, guidance_rescale: f64) -> Result<Conditioning> {
        let prompts = &self.reference.prompts;
        let prompt_embeds = self.pipeline.encode_prompts(prompts)?;
        let negative_prompt_embeds = self.pipeline.encode_prompts(&vec![String::new(); prompts.len()])?;
        let conditioning = Conditioning::new(prompt_embeds, negative_prompt_embeds, guidance_scale, self.compute);
        Ok(conditioning.rescaled(guidance_rescale))
    }

    fn prompts(&self) -> Vec<Prompt> {
        self.reference.prompts.iter().map(|text| Prompt::from(text.as_str())).collect()
    }

    fn denoiser<'b>(&'b self, adapters: &'b Adapters, conditioning: &Conditioning) -> Denoiser<'b> {
        let checkpointing = Checkpointing::Step;
        Denoiser { unet: &self.pipeline.unet, adapters, conditioning: conditioning.clone(), checkpointing }
    }

    fn critic<'b>(&'b self, rewards: &'b Rewards) -> Critic<'b> {
        Critic { vae: &self.pipeline.vae, rewards, checkpointing: Checkpointing::Step }
    }

    /// The pipeline's parts by themselves.
    fn parts(&self, report: &mut Report) -> Result<()> {
        let expected = self.tensors("parts.safetensors")?;
        let part = |name: &str| expected.get(name).with_context(|| format!("parts.safetensors has no `{name}`"));
        let Pipeline { tokenizer, unet, vae, source, .. } = &self.pipeline;
        let prompts = &self.reference.prompts;
        let empty = vec![String::new(); prompts.len()];

        for (name, texts, open_clip) in
            [("input_ids", prompts, false), ("uncond_ids", &empty, false), ("open_clip_ids", prompts, true)]
        {
            let ids = texts
                .iter()
                .map(|text| if open_clip { tokenizer.encode_open_clip(text) } else { tokenizer.encode(text) })
                .collect::<Result<Vec<_>>>()?;
            let ids: Vec<f64> = ids.into_iter().flatten().map(f64::from).collect();
            report.push("tokenizer", name, unequal(&ids, part(name)?)?, 0.0);
        }
        let conditioning = self.conditioning(1.0, 0.0)?;
        report.compare(
            "text encoder",
            "text_embeds",
            &conditioning.prompt_embeds,
            part("text_embeds")?,
            self.bounds.parts,
        )?;
        report.compare(
            "text encoder",
            "uncond_embeds",
            &conditioning.negative_prompt_embeds,
            part("uncond_embeds")?,
            self.bounds.parts,
        )?;

        let schedule = DdimSchedule::load(source, self.reference.steps, 0.0)?;
        let timesteps: Vec<f64> = schedule.steps().iter().map(|step| step.timestep).collect();
        report.push("scheduler", "timesteps", unequal(&timesteps, part("timesteps")?)?, 0.0);

        let t = part("unet_t")?.to_device(&Device::Cpu)?.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?[0];
        let (x, dy) = (part("unet_x")?, part("unet_dy")?);
        let none = Adapters::default();
        let y = unet.forward(x, t, &conditioning.prompt_embeds, &none)?;
        report.compare("UNet", "output", &y, part("unet_y")?, self.bounds.parts)?;
        for (checkpointing, what) in
            [(Checkpointing::Step, "gradient of x"), (Checkpointing::Block, "gradient of x, per block")]
        {
            let trace = unet.trace(x, t, &conditioning.prompt_embeds, &none, checkpointing)?;
            let dx = trace.pull(dy, &mut LoraGradients::new(&none))?;
            report.compare("UNet", what, &dx, part("unet_dx")?, self.bounds.parts)?;
        }
        let decoded = vae.trace(part("vae_z")?, Checkpointing::Step)?;
        report.compare("VAE", "image", decoded.image(), part("vae_image")?, self.bounds.parts)?;
        report.compare(
            "VAE",
            "gradient of z",
            &decoded.pull(part("vae_dimage")?)?,
            part("vae_dz")?,
            self.bounds.parts,
        )?;

        let images = part("reward_image")?;
        let side = part("clip_input")?.dims4()?.2;
        let preprocessor =
            Preprocessor::new(Preprocess::Alignprop, side, &PixelStatistics::OPENAI, self.compute.device())?;
        let pixels = preprocessor.apply(&Value::constant(images))?.into_tensor();
        report.compare("preprocessing", "clip_input", &pixels, part("clip_input")?, self.bounds.parts)?;
        for (kind, scores, gradient) in [
            ("aesthetic", "aesthetic", Some("aesthetic_dimage")),
            ("hps", "hps", Some("hps_dimage")),
            ("clip-score", "clip_score_cosine", None),
        ] {
            let Some(expected_scores) = expected.get(scores) else { continue };
            let Some(rewards) = self.rewards(kind, 10.0)? else {
                report.skipped.push(format!(
                    "the reward `{kind}`: no aesthetic head in {} or above it; give one with --head FILE",
                    self.dir.display()
                ));
                continue;
            };
            let Some(Judge::Differentiable(reward)) = rewards.iter().next().map(|reward| &reward.judge) else {
                bail!("the reward `{kind}` has no gradient");
            };
            let tape = Tape::new();
            let leaf = tape.leaf(images);
            let score = reward.on_tape(&TapedImages::new(leaf.clone()), &self.prompts())?;
            let distance = Distance::between(score.tensor(), expected_scores)?;
            let cosine = reward.objective() == Objective::OneMinus;
            let (what, error) = match self.compute.for_rewards().dtype() {
                DType::BF16 | DType::F16 if cosine => ("score, absolute", distance.difference.sqrt()),
                _ => ("score", distance.relative()),
            };
            report.push(kind, what, error, self.bounds.scores);
            let mut gradients = tape.backward(&[(&score, &score.tensor().ones_like()?)])?;
            if let Some(name) = gradient {
                let what = "gradient of the image";
                let distance = Distance::between(&gradients.take(&leaf, "the image")?, part(name)?)?;
                report.push(kind, what, distance.relative(), self.bounds.image_gradients);
                report.push(kind, format!("{ANGLE}: {what}"), distance.angle(), self.bounds.cosine);
            }
        }
        Ok(())
    }

    /// The gradients of a whole chain.
    fn chain(&self, name: &str, case: &Case, start: &Adapters, report: &mut Report) -> Result<()> {
        let Some(rewards) = self.rewards(&case.reward, 10.0)? else {
            report.skipped.push(format!("{name}: no aesthetic head"));
            return Ok(());
        };
        let (inputs, expected) =
            (self.tensors("chain_inputs.safetensors")?, self.tensors(&format!("chain_{name}.safetensors"))?);
        let x_t = inputs.get("x_T").context("chain_inputs.safetensors has no `x_T`")?;
        let noises = inputs.get("noises").context("chain_inputs.safetensors has no `noises`")?;
        let batch = x_t.dims()[0];
        let steps = self.reference.steps;
        ensure!(
            case.keep.len() == steps,
            "reference.json: {name} has {} in `keep`, for {steps} steps",
            case.keep.len()
        );
        let schedule = DdimSchedule::load(&self.pipeline.source, steps, case.eta)?;
        let plan = Plan::with_mask(&schedule, &case.keep, batch);
        let denoiser = self.denoiser(start, &self.conditioning(case.guidance_scale, case.guidance_rescale)?);
        self.pipeline.latent_shape(self.reference.size[0], self.reference.size[1])?;

        let mut tally = Tally::scaled(start, self.loss_scale());
        let noise = |i: usize| Ok(noises.get(i)?);
        let mut trajectory = sample(&denoiser, &plan, x_t.clone(), noise, 0, &mut tally.ledger)?;
        report.compare(
            name,
            "latents",
            trajectory.latents(),
            expected.get("latents").context("no `latents`")?,
            self.bounds.parts,
        )?;
        let image = self.pipeline.vae.decode(trajectory.latents())?;
        report.compare(name, "image", &image, expected.get("image").context("no `image`")?, self.bounds.parts)?;
        let (critic, prompts, scale) = (self.critic(&rewards), self.prompts(), 1.0 / batch as f64);
        let credit = credit(&critic, trajectory.latents(), &prompts, scale, &mut tally)?;
        differentiate(&denoiser, &plan, &mut trajectory, Some(&credit.d_latents), &mut [], &mut tally)?;
        let gradients = tally.take_gradients(start)?;
        let readings = tally.ledger.read()?;
        let scores: Vec<f32> = credit.scores.iter().map(|s| s.get(&readings)[0] as f32).collect();
        report.compare(
            name,
            "rewards",
            &Tensor::new(scores, &Device::Cpu)?,
            expected.get("rewards").context("no `rewards`")?,
            self.bounds.parts,
        )?;
        let loss = credit.scores.iter().map(|s| s.loss(&rewards, &readings)).sum::<f64>() / batch as f64;
        report.push(name, "loss", (loss / case.loss - 1.0).abs(), self.bounds.parts);

        self.compare_gradients(name, start, &gradients, &expected, report)
    }

    /// Compares the gradients of adapters with the tensors `grad.*` of a file.
    fn compare_gradients(
        &self,
        case: &str,
        adapters: &Adapters,
        gradients: &[Tensor],
        expected: &HashMap<String, Tensor>,
        report: &mut Report,
    ) -> Result<()> {
        let mut distances = Vec::with_capacity(gradients.len());
        for ((tensor, _), gradient) in adapters.named_tensors().iter().zip(gradients) {
            let expected = expected
                .get(&format!("grad.{tensor}"))
                .with_context(|| format!("the tensors of {case} have no `grad.{tensor}`"))?;
            distances.push((tensor.clone(), Distance::between(gradient, expected)?));
        }
        self.gradients(case, &distances, report);
        Ok(())
    }

    /// Whether the LoRA gradients are near the expected ones, together and each.
    fn gradients(&self, case: &str, distances: &[(String, Distance)], report: &mut Report) {
        let together = distances.iter().fold(Distance::default(), |sum, (_, distance)| sum.plus(*distance));
        report.push(case, GRADIENTS, together.relative(), self.bounds.all_gradients);
        if let Some(bound) = self.bounds.one_gradient {
            let (error, tensor) = largest(distances.iter().map(|(tensor, d)| (d.relative(), tensor)));
            report.push(case, format!("worst: {tensor}"), error, bound);
        }
        let weighty = distances.iter().filter(|(_, d)| d.norm >= NEGLIGIBLE.powi(2) * together.norm);
        let (angle, tensor) = largest(weighty.map(|(tensor, d)| (d.angle(), tensor)));
        report.push(case, format!("{ANGLE}: {tensor}"), angle, self.bounds.cosine);
    }

    /// The LoRA gradients of one evaluation of the UNet beside this program's own in f32 on the CPU, which are themselves
    /// compared with PyTorch's in whole chains.
    fn one_evaluation(&self, start: &Adapters, report: &mut Report) -> Result<()> {
        let parts = self.tensors("parts.safetensors")?;
        let part = |name: &str| parts.get(name).with_context(|| format!("parts.safetensors has no `{name}`"));
        let t = part("unet_t")?.to_device(&Device::Cpu)?.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?[0];
        let gradients = |pipeline: &Pipeline| -> Result<Vec<Tensor>> {
            let device = pipeline.unet.compute().device();
            let (x, dy) = (part("unet_x")?.to_device(device)?, part("unet_dy")?.to_device(device)?);
            let (context, adapters) = (pipeline.encode_prompts(&self.reference.prompts)?, start.to_device(device)?);
            let mut sum = LoraGradients::new(&adapters);
            pipeline.unet.trace(&x, t, &context, &adapters, Checkpointing::Step)?.pull(&dy, &mut sum)?;
            sum.finish(&adapters)
        };
        let reference = Pipeline::load(&ModelConfig::at(self.dir.join("model").to_string_lossy()))?;
        let (found, expected) = (gradients(&self.pipeline)?, gradients(&reference)?);
        let names = start.named_tensors().into_iter().map(|(name, _)| name);
        let distances = names.zip(found.iter().zip(&expected));
        let distances = distances.map(|(name, (found, expected))| Ok((name, Distance::between(found, expected)?)));
        self.gradients("UNet", &distances.collect::<Result<Vec<_>>>()?, report);
        Ok(())
    }

    /// Three optimizer steps.
    fn train(&self, train: &Train, start: &Adapters, report: &mut Report) -> Result<()> {
        let Some(rewards) = self.rewards("aesthetic", train.aesthetic_target)? else {
            report.skipped.push("train3: no aesthetic head".into());
            return Ok(());
        };
        let expected = self.tensors("train3.safetensors")?;
        let x_t = expected.get("x_T").context("train3.safetensors has no `x_T`")?;
        let batch = x_t.dims()[1];
        let steps = self.reference.steps;
        let schedule = DdimSchedule::load(&self.pipeline.source, steps, train.eta)?;
        let keep: Vec<bool> = (0..steps).map(|i| i + train.backprop_steps >= steps).collect();
        let plan = Plan::with_mask(&schedule, &keep, batch);
        let conditioning = self.conditioning(train.guidance_scale, train.guidance_rescale)?;
        let (critic, prompts) = (self.critic(&rewards), self.prompts());

        let mut adapters = start.clone();
        let config = OptimizerConfig { lr: train.lr, weight_decay: train.weight_decay, ..Default::default() };
        let mut optimizer = AdamW::new(&config, &adapters.tensors())?;
        for (i, log) in train.log.iter().enumerate() {
            let mut tally = Tally::scaled(&adapters, self.loss_scale());
            let no_noise = |_| anyhow::bail!("no noise is recorded for these steps");
            let denoiser = self.denoiser(&adapters, &conditioning);
            // with every kept step stored, where the cases above evaluate each again
            let mut trajectory = sample(&denoiser, &plan, x_t.get(i)?, no_noise, steps, &mut tally.ledger)?;
            let scale = train.loss_coeff / batch as f64;
            let credit = credit(&critic, trajectory.latents(), &prompts, scale, &mut tally)?;
            differentiate(&denoiser, &plan, &mut trajectory, Some(&credit.d_latents), &mut [], &mut tally)?;
            drop(trajectory);
            let update = update(&mut tally, &adapters, &optimizer, train.max_grad_norm, train.lr)?;
            let readings = tally.ledger.read()?;
            let norm = update.grad_norm;
            (adapters, optimizer) = (update.adapters, update.optimizer);

            let case = format!("train3, step {i}");
            let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / batch as f64;
            report.push(
                &case,
                "loss",
                (mean(&mut credit.scores.iter().map(|s| s.loss(&rewards, &readings))) * train.loss_coeff / log.loss
                    - 1.0)
                    .abs(),
                self.bounds.parts,
            );
            report.push(
                &case,
                "mean reward",
                (mean(&mut credit.scores.iter().map(|s| s.get(&readings)[0])) / log.reward_mean - 1.0).abs(),
                self.bounds.parts,
            );
            report.push(&case, "gradient norm", (readings.get(norm) / log.grad_norm - 1.0).abs(), self.bounds.parts);
        }
        let mut together = Distance::default();
        for (name, tensor) in adapters.named_tensors() {
            let expected = expected
                .get(&format!("lora.{name}"))
                .with_context(|| format!("train3.safetensors has no `lora.{name}`"))?;
            together = together.plus(Distance::between(&tensor, expected)?);
        }
        report.push("train3", "all LoRA factors", together.relative(), self.bounds.adapters);
        Ok(())
    }
}

/// The largest number, or the first that is none, and whose it is.
fn largest<'a>(values: impl Iterator<Item = (f64, &'a String)>) -> (f64, &'a str) {
    values.fold((0.0, ""), |worst, (value, name)| if value > worst.0 || value.is_nan() { (value, name) } else { worst })
}

/// A tensor's numbers, on the host.
fn numbers(x: &Tensor) -> Result<Vec<f64>> {
    Ok(x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// The largest difference of two entries, or the first that is none.
fn farthest(found: &[f64], expected: &[f64]) -> f64 {
    let apart = found.iter().zip(expected).map(|(x, y)| (x - y).abs());
    apart.fold(0.0, |most, x| if x > most || x.is_nan() { x } else { most })
}

/// How many entries differ.
fn unequal(found: &[f64], expected: &Tensor) -> Result<f64> {
    let expected = numbers(expected)?;
    let differing = found.iter().zip(&expected).filter(|(x, y)| x != y).count();
    Ok((differing + found.len().abs_diff(expected.len())) as f64)
}

//! The experiment file: one TOML file is one experiment, and everything it may say is in this file.
//!
//! Each table is a struct; a field's doc comment gives its meaning and its range, its default stands beside its type.
//! `read` turns text and `--set` overrides into a [`Config`] and words the complaints about keys and types; `validate`
//! checks the ranges. A path in a config is relative to the current directory, as in diffusers; a run's own
//! config has whole paths (`paths`).

mod method;
mod paths;
mod prompt_file;
mod prompts;
mod read;
mod text;
mod validate;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Deserializer, Serialize};

pub use crate::ops::activation::Activation;
pub use method::{
    AdjointMatchingConfig, AlignpropConfig, Baseline, DdpoConfig, Deviation, GrpoConfig, Method, Policy, Regression,
    RwrConfig, RwrSparseConfig, Selection, WindowConfig,
};
pub use prompts::{Prompt, PromptsConfig};
pub use read::{concerns, nearest};
pub use text::{decode, shell_word, shown, shown_lines};
pub use validate::parse_device;

/// A table of the config: `field: type = default`, every key optional, an unknown key an error.
macro_rules! table {
    (
        $(#[$meta:meta])*
        pub struct $name:ident {
            $($(#[$field_meta:meta])* $field:ident: $type:ty = $default:expr,)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            $(
                $(#[$field_meta])*
                #[doc = concat!("\n\nDefault: `", stringify!($default), "`")]
                pub $field: $type,
            )*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }
    };
}
use table;

/// One experiment. The order of the fields is the order of the tables in [`Config::to_toml`].
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    pub model: ModelConfig,
    pub lora: LoraConfig,
    pub sampler: SamplerConfig,
    pub method: Method,
    pub truncation: Truncation,
    pub reward: RewardsConfig,
    pub prompts: PromptsConfig,
    pub optimizer: OptimizerConfig,
    pub train: TrainConfig,
    pub regularization: RegularizationConfig,
    pub run: RunConfig,
    pub guard: GuardConfig,
}

impl Config {
    /// Reads a config file and applies `--set section.key=value` overrides to it.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Config> {
        let read = || text::decode(&std::fs::read(path)?);
        let text = read().with_context(|| format!("reading the config {}", path.display()))?;
        Config::parse(&text, &path.display().to_string(), overrides)
    }

    /// Reads a config from `text`; `name` is what error messages call it. The result is valid and says where its
    /// prompts come from.
    pub fn parse(text: &str, name: &str, overrides: &[String]) -> Result<Config> {
        let mut config = read::read(text, name, overrides)?;
        config.prompts.resolve();
        config.lora.resolve();
        config.validate().with_context(|| format!("in {name}"))?;
        Ok(config)
    }

    /// The resolved config, as a run folder keeps it: reading it gives the same config.
    /// Fails only for a path that is not Unicode, which no config file can hold.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).context("writing the config as TOML")
    }
}

table! {
    /// `[model]`: the Stable Diffusion pipeline to train, in the folder layout of diffusers or in a single file.
    pub struct ModelConfig {
        /// A local folder or a model id on the hub; or a single file in the original layout (.safetensors, .ckpt), local or
        /// on the hub as `owner/name:file`.
        path: String = "stable-diffusion-v1-5/stable-diffusion-v1-5".into(),
        /// The weight files' variant, as in diffusers: `fp16` reads `diffusion_pytorch_model.fp16.safetensors`.
        variant: Option<String> = None,
        /// For a single file: a folder or hub id whose configs (and tokenizer) count, as `config` of diffusers'
        /// `from_single_file`. Absent: what the file's shapes say.
        config: Option<String> = None,
        /// For a single file: a folder or hub id with a CLIP tokenizer. Absent: the one of `config`, else one beside the
        /// file, else CLIP's own from the hub.
        tokenizer: Option<String> = None,
        /// For a single file: `epsilon` or `v_prediction`. Absent: what the file says, else epsilon for 1.x and v for 2.x.
        prediction_type: Option<PredictionType> = None,
    }
}

impl ModelConfig {
    /// The pipeline at a path, a hub id or in a file, with the other keys at their defaults.
    pub fn at(path: impl Into<String>) -> Self {
        Self { path: path.into(), ..Self::default() }
    }
}

/// What the UNet's output means.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum PredictionType {
    Epsilon,
    VPrediction,
}

table! {
    /// `[lora]`: the factors to train.
    pub struct LoraConfig {
        /// Rank of each pair of factors; 1 or more. Higher fits more and costs memory in proportion. Absent: 4, or that of
        /// `init_from`.
        rank: Option<usize> = None,
        /// The product of the factors is scaled by alpha / rank; more than 0. Absent: alpha = rank, a scale of 1, or that
        /// of `init_from`.
        alpha: Option<f64> = None,
        /// The layers of the UNet's transformers that get factors, by the last parts of their names: `ff.net.2`, `proj_in`.
        /// Absent: to_q, to_k, to_v and to_out.0, or those of `init_from`.
        target_modules: Option<Vec<String>> = None,
        /// A LoRA, file or folder, that training starts from, in any format that is read; only read when a run begins.
        /// The keys above must agree with it or be absent. Absent: fresh factors, whose product is 0.
        init_from: Option<PathBuf> = None,
    }
}

impl LoraConfig {
    /// Fills in what nothing else decides.
    fn resolve(&mut self) {
        if self.init_from.is_none() {
            self.rank = Some(self.rank_or_default());
            self.target_modules = Some(self.target_modules_or_default());
        }
    }

    /// `rank`, or 4.
    pub fn rank_or_default(&self) -> usize {
        self.rank.unwrap_or(4)
    }

    /// `alpha`, or the rank.
    pub fn alpha_or_rank(&self) -> f64 {
        self.alpha.unwrap_or(self.rank_or_default() as f64)
    }

    /// `target_modules`, or the projections of every attention.
    pub fn target_modules_or_default(&self) -> Vec<String> {
        self.target_modules.clone().unwrap_or_else(|| ["to_q", "to_k", "to_v", "to_out.0"].map(String::from).to_vec())
    }
}

table! {
    /// `[sampler]`: how images are made, in training and in evaluation.
    pub struct SamplerConfig {
        /// How the noise is taken away: `ddim`, or `euler`, `euler-ancestral`, `dpmpp-2m` as diffusers' EulerDiscrete,
        /// EulerAncestralDiscrete and DPMSolverMultistep schedulers do it. Training goes with `ddim`; `sample` and `eval`
        /// with all of them.
        kind: SamplerKind = SamplerKind::Ddim,
        /// Noise levels as Karras et al. 2022 space them, for the others than `ddim`. Absent: as the pipeline's scheduler says.
        karras: Option<bool> = None,
        /// Denoising steps of one image; 1 or more. Time grows in proportion.
        num_inference_steps: usize = 50,
        /// Classifier-free guidance; 0 or more. 1 or less turns it off and halves the work.
        guidance_scale: f64 = 7.5,
        /// How far guidance's overexposure is undone, as diffusers' `guidance_rescale` (Lin et al. 2023, section 3.4): from 0
        /// (not at all) to 1 (the guided prediction has the standard deviation of the prompt's). 0.7 is the paper's. Its
        /// gradient goes through the standard deviations.
        guidance_rescale: f64 = 0.0,
        /// Noise of the DDIM step, for `ddim` alone: from 0 (deterministic) to 1 (ancestral, as DDPM).
        eta: f64 = 0.0,
        /// Image height in pixels. Absent: the size that the model was trained on.
        height: Option<usize> = None,
        /// Image width in pixels. Absent: the size that the model was trained on.
        width: Option<usize> = None,
        /// What guidance moves away from.
        negative_prompt: String = String::new(),
    }
}

/// How images are denoised.
#[derive(Serialize, Deserialize, clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum SamplerKind {
    /// DDIM: what is trained
    #[default]
    Ddim,
    /// Euler
    Euler,
    /// Euler ancestral, "Euler a": adds noise in each step
    EulerAncestral,
    /// DPM-Solver++ 2M
    #[serde(rename = "dpmpp-2m")]
    #[value(name = "dpmpp-2m")]
    Dpmpp2m,
}

/// `[truncation]`: which denoising steps keep their gradient. `rule` names the variant, the other keys are its fields.
///
/// T is `sampler.num_inference_steps`. Steps are counted in sampling order: step 0 is the noisiest, step T-1 the last.
/// "K steps" are always the last K.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(tag = "rule", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Truncation {
    /// K steps, K drawn from 1..=T: the paper's rule, and the default.
    Uniform {
        #[serde(default)]
        per: Per,
    },
    /// The last `k` steps, always; 1..=T. k = 1 is the cheapest and changes style more than content.
    Fixed { k: usize },
    /// The official code of 2024: a draw from N(mean, std), cut to a whole number and drawn again until it is in
    /// 1..T, is the first step that keeps its gradient.
    Gaussian {
        /// Index of a step, 1 or more and less than T.
        mean: f64,
        /// In steps; 0 or more.
        std: f64,
        #[serde(default)]
        per: Per,
    },
    /// The official code of 2023: each step i draws its own r from lo..=hi and is detached where i < r, so the kept
    /// steps need not be contiguous. lo <= hi <= T, lo < T.
    PerStep { lo: usize, hi: usize },
    /// Every step.
    #[serde(deserialize_with = "no_more_keys")]
    Full,
    /// Just these steps, 0..T, each once.
    Steps { steps: Vec<usize> },
    /// DRaFT-LV: `n` noised repetitions of the last step, their gradients averaged; 1 or more.
    DraftLv { n: usize },
    /// ReFL: stop at one step drawn from lo..=hi and reward its prediction of x_0. lo <= hi < T.
    Refl { lo: usize, hi: usize },
    /// DRTune: the UNet's input is detached, the gradient flows along the DDIM path only.
    Drtune {
        /// How many steps keep their gradient; 1..=T. Absent: all.
        #[serde(default)]
        k: Option<usize>,
    },
}

impl Default for Truncation {
    fn default() -> Self {
        Truncation::Uniform { per: Per::default() }
    }
}

/// Keeps `deny_unknown_fields` for a rule without fields; serde skips the check for a unit variant.
fn no_more_keys<'de, D: Deserializer<'de>>(deserializer: D) -> Result<(), D::Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct NoKeys {}
    NoKeys::deserialize(deserializer).map(|NoKeys {}| ())
}

/// How often a random truncation is drawn.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Per {
    /// For each image: the gradients of one batch mix all depths.
    #[default]
    Sample,
    /// Once for all images of an optimizer step.
    Batch,
}

/// The kinds of reward, as `[reward.KIND]` and `--reward KIND` name them, in the order of [`RewardsConfig`].
pub const REWARD_KINDS: [&str; 13] = [
    "aesthetic",
    "clip-head",
    "hps",
    "clip-score",
    "pickscore",
    "compressibility",
    "incompressibility",
    "image-reward",
    "count",
    "object",
    "command",
    "http",
    "vlm",
];

/// `[reward.KIND]`: the rewards, each absent unless its table is there. Their weighted losses add up.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct RewardsConfig {
    pub aesthetic: Option<AestheticConfig>,
    pub clip_head: Option<ClipHeadConfig>,
    pub hps: Option<HpsConfig>,
    pub clip_score: Option<ClipScoreConfig>,
    pub pickscore: Option<PickscoreConfig>,
    pub compressibility: Option<CompressibilityConfig>,
    pub incompressibility: Option<CompressibilityConfig>,
    pub image_reward: Option<ImageRewardConfig>,
    pub count: Option<CountConfig>,
    pub object: Option<ObjectConfig>,
    pub command: Option<CommandConfig>,
    pub http: Option<HttpConfig>,
    pub vlm: Option<VlmConfig>,
}

impl RewardsConfig {
    /// Only the named kinds; one that has no table gets its defaults.
    pub fn select(&self, kinds: &[String]) -> Self {
        let wanted = |kind: &str| kinds.iter().any(|name| name == kind);
        fn pick<T: Clone + Default>(wanted: bool, table: &Option<T>) -> Option<T> {
            wanted.then(|| table.clone().unwrap_or_default())
        }
        Self {
            aesthetic: pick(wanted("aesthetic"), &self.aesthetic),
            clip_head: pick(wanted("clip-head"), &self.clip_head),
            hps: pick(wanted("hps"), &self.hps),
            clip_score: pick(wanted("clip-score"), &self.clip_score),
            pickscore: pick(wanted("pickscore"), &self.pickscore),
            compressibility: pick(wanted("compressibility"), &self.compressibility),
            incompressibility: pick(wanted("incompressibility"), &self.incompressibility),
            image_reward: pick(wanted("image-reward"), &self.image_reward),
            count: pick(wanted("count"), &self.count),
            object: pick(wanted("object"), &self.object),
            command: pick(wanted("command"), &self.command),
            http: pick(wanted("http"), &self.http),
            vlm: pick(wanted("vlm"), &self.vlm),
        }
    }

    /// The same rewards with the preprocessings that their scores are published with.
    pub fn as_published(mut self) -> Self {
        let clip = Preprocess::ClipOfficial;
        self.aesthetic.iter_mut().for_each(|reward| reward.preprocess = clip);
        self.hps.iter_mut().for_each(|reward| reward.preprocess = Preprocess::Hpsv2Official);
        self.clip_score.iter_mut().for_each(|reward| reward.preprocess = clip);
        self.pickscore.iter_mut().for_each(|reward| reward.preprocess = clip);
        self
    }

    /// The configured rewards: kind and weight, in the order of [`REWARD_KINDS`].
    pub fn weights(&self) -> Vec<(&'static str, f64)> {
        let weights = [
            self.aesthetic.as_ref().map(|reward| reward.weight),
            self.clip_head.as_ref().map(|reward| reward.weight),
            self.hps.as_ref().map(|reward| reward.weight),
            self.clip_score.as_ref().map(|reward| reward.weight),
            self.pickscore.as_ref().map(|reward| reward.weight),
            self.compressibility.as_ref().map(|reward| reward.weight),
            self.incompressibility.as_ref().map(|reward| reward.weight),
            self.image_reward.as_ref().map(|reward| reward.weight),
            self.count.as_ref().map(|reward| reward.weight),
            self.object.as_ref().map(|reward| reward.weight),
            self.command.as_ref().map(|reward| reward.weight),
            self.http.as_ref().map(|reward| reward.weight),
            self.vlm.as_ref().map(|reward| reward.weight),
        ];
        let kinds = REWARD_KINDS.into_iter().zip(weights);
        kinds.filter_map(|(kind, weight)| Some((kind, weight?))).collect()
    }
}

table! {
    /// `[reward.aesthetic]`: the LAION aesthetic predictor on CLIP's image embedding. Needs no prompt.
    pub struct AestheticConfig {
        /// Factor of its loss; finite. 0: logged, not trained.
        weight: f64 = 1.0,
        /// How the image becomes CLIP's input.
        preprocess: Preprocess = Preprocess::Alignprop,
        /// CLIP with the 768-wide embedding that the head was trained on: a folder or a hub id.
        clip: String = "openai/clip-vit-large-patch14".into(),
        /// The head: a .pth or .safetensors file, a hub id (its `aesthetic-model.pth`), or `owner/name:file`.
        head: String = "trl-lib/ddpo-aesthetic-predictor".into(),
        /// The loss is |score - target|; finite. Absent: the loss is -score, plain maximisation.
        target: Option<f64> = None,
    }
}

table! {
    /// `[reward.clip-head]`: any small network on CLIP's image embedding. What `alignprop fit` writes says all but `head` itself.
    pub struct ClipHeadConfig {
        /// Factor of its loss; finite. 0: logged, not trained.
        weight: f64 = 1.0,
        /// How the image becomes CLIP's input. Absent: as the head's file says, else `alignprop`.
        preprocess: Option<Preprocess> = None,
        /// The CLIP that the head was trained on: a folder or a hub id. Absent: as the head's file says, else
        /// openai/clip-vit-large-patch14.
        clip: Option<String> = None,
        /// The head's weights: a .pth or .safetensors file, or `owner/name:file`. Must be given.
        head: String = String::new(),
        /// The head's layers in order: `{ linear = "layers.0" }` (its name in the file), `{ activation = "relu" }`.
        /// At least one is linear. Empty: as the head's file says.
        layers: Vec<HeadLayer> = Vec::new(),
        /// Scale the embedding to unit norm before the head.
        normalize: bool = true,
        /// The loss is |score - target|; finite. Absent: the loss is -score, plain maximisation.
        target: Option<f64> = None,
    }
}

/// One layer of a [`ClipHeadConfig`].
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum HeadLayer {
    /// A linear layer: its name in the file, without `.weight` and `.bias`.
    Linear(String),
    Activation(Activation),
}

table! {
    /// `[reward.hps]`: Human Preference Score v2, how well an image suits its prompt. The loss is 1 - cosine.
    pub struct HpsConfig {
        /// Factor of its loss; finite. 0: logged, not trained.
        weight: f64 = 1.0,
        /// How the image becomes the model's input.
        preprocess: Preprocess = Preprocess::Alignprop,
        /// A folder or a hub id.
        model: String = "xswu/HPSv2".into(),
        /// The weights inside `model`, or the path of a file, which needs no `model`.
        file: String = "HPS_v2_compressed.pt".into(),
        /// Path of an `open_clip_config.json`. Absent: ViT-H-14.
        config: Option<String> = None,
        /// A `tokenizer.json`, or a folder or hub id that has one. Absent: the pipeline's.
        tokenizer: Option<String> = None,
    }
}

table! {
    /// `[reward.clip-score]`: cosine of CLIP's image and text embeddings.
    pub struct ClipScoreConfig {
        /// Factor of its loss; finite. 0: logged, not trained.
        weight: f64 = 1.0,
        /// How the image becomes CLIP's input.
        preprocess: Preprocess = Preprocess::Alignprop,
        /// A folder or a hub id.
        model: String = "openai/clip-vit-large-patch14".into(),
        /// A `tokenizer.json`, or a folder or hub id that has one. Absent: the one beside the
        /// model, else the pipeline's.
        tokenizer: Option<String> = None,
    }
}

table! {
    /// `[reward.pickscore]`: PickScore, a CLIP trained on people's choices between two images.
    pub struct PickscoreConfig {
        /// Factor of its loss; finite. 0: logged, not trained.
        weight: f64 = 1.0,
        /// How the image becomes the model's input.
        preprocess: Preprocess = Preprocess::Alignprop,
        /// A folder or a hub id.
        model: String = "yuvalkirstain/PickScore_v1".into(),
        /// A `tokenizer.json`, or a folder or hub id that has one. Absent: the one beside the
        /// model, else the pipeline's.
        tokenizer: Option<String> = None,
    }
}

table! {
    /// `[reward.compressibility]`: minus the image's size in kB (1000 bytes) as a JPEG of quality 95, as in DDPO; and
    /// `[reward.incompressibility]`, its opposite. Scores are exact sizes; the loss is that of a smooth stand-in, ∓size.
    pub struct CompressibilityConfig {
        /// Factor of its loss; finite. 0: logged, not trained.
        weight: f64 = 1.0,
    }
}

table! {
    /// `[reward.image-reward]`: ImageReward, what people would think of an image for its prompt; scores are those of the
    /// original, about -2 to 2.
    pub struct ImageRewardConfig {
        /// Factor of its loss; finite. 0: logged, not trained.
        weight: f64 = 1.0,
        /// A folder or a hub id, with the weights and, where it is not BERT-base, a `med_config.json`.
        model: String = "THUDM/ImageReward".into(),
        /// The weights inside `model` (a `.pt` or safetensors), or the path of a file, which needs no `model`.
        file: String = "ImageReward.pt".into(),
        /// The `vocab.txt` of bert-base-uncased: a file, or a folder or hub id that has one. Absent: the one beside the
        /// weights, else google-bert/bert-base-uncased.
        vocab: Option<String> = None,
        /// The loss is |score - target|; finite. Absent: the loss is -score, plain maximisation. (ReFL's relu(2 - score) is
        /// a target of 2 with `regularization.reward_cap` at 2.)
        target: Option<f64> = None,
    }
}

table! {
    /// `[reward.count]`: log P(N = n) for the number N of things that a detector sees and the number n that the prompt asks
    /// for. Class and number are the prompt's fields `object` and `count`, else what its text says ("three cats"). The loss is
    /// -score. Logged beside it: the expected count (`count-expected`) and the thresholded one (`count-detected`).
    pub struct CountConfig {
        /// Factor of its loss; finite. 0: logged, not trained.
        weight: f64 = 1.0,
        /// A YOLOS detector in the layout of transformers: a folder or a hub id.
        model: String = "hustvl/yolos-tiny".into(),
        /// Pixels of the image's short side in front of the detector; 1 or more. Absent: the image's own. Either way both
        /// sides become multiples of the detector's patch.
        size: Option<usize> = None,
        /// The probability above which `count-detected` counts a thing; from 0 to 1.
        threshold: f64 = 0.5,
    }
}

table! {
    /// `[reward.object]`: log P(N >= 1), whether a detector sees a thing of the class, or its opposite, log P(N = 0). The loss
    /// is -score. Logged beside it: `object-expected` and `object-detected`, as for `[reward.count]`.
    pub struct ObjectConfig {
        /// Factor of its loss; finite. 0: logged, not trained.
        weight: f64 = 1.0,
        /// A YOLOS detector in the layout of transformers: a folder or a hub id.
        model: String = "hustvl/yolos-tiny".into(),
        /// Pixels of the image's short side in front of the detector; 1 or more. Absent: the image's own.
        size: Option<usize> = None,
        /// The probability above which `object-detected` counts a thing; from 0 to 1.
        threshold: f64 = 0.5,
        /// The class, whatever the prompts say. Absent: the prompt's field `object`, else what its text names.
        object: Option<String> = None,
        /// Whether the object is to be absent: the score is log P(N = 0), as for removing a concept.
        remove: bool = false,
    }
}

table! {
    /// `[reward.command]`: a program of the user's, which gets lines of JSON with pictures and prompts and answers with scores,
    /// and with their gradients where it has some. docs/rewards.md has the lines and an example in PyTorch.
    pub struct CommandConfig {
        /// Factor of its loss; finite. 0: logged, not trained.
        weight: f64 = 1.0,
        /// The program and its arguments: `["python", "reward.py"]`. It is started once, in the current folder. Must be given.
        program: Vec<String> = Vec::new(),
        /// Whether it gets f32 tensors and returns gradients of its scores with respect to them: what AlignProp trains with.
        /// Otherwise it gets PNG files and gives scores alone.
        gradient: bool = false,
        /// Compare, at the start, a returned gradient with a difference of two scores, and stop where they disagree.
        check_gradient: bool = true,
        /// The loss is |score - target|; finite. Absent: the loss is -score, plain maximisation.
        target: Option<f64> = None,
        /// Seconds that an answer may take; more than 0.
        timeout: f64 = 120.0,
        /// Seconds that the first answer of a started program may take, which may have a model to load; more than 0.
        start_timeout: f64 = 1800.0,
        /// How often the program is started again for one question, where it ended or was silent for too long.
        restarts: usize = 1,
    }
}

table! {
    /// A server that scores ask: `[reward.http.server]`, `[reward.vlm.server]`. A failure that may pass (no connection, no answer in
    /// time, half of one, status 429 or 500 and more) is tried again after a pause, which doubles.
    pub struct ServerConfig {
        /// Its address: `http://127.0.0.1:8000/score`, or `http://127.0.0.1:8000/v1/chat/completions`. Must be given.
        url: String = String::new(),
        /// The environment variable that holds a key, which is sent as `Authorization: Bearer ..`. Absent: none is sent.
        key_env: Option<String> = None,
        /// Seconds that an answer may take; more than 0.
        timeout: f64 = 120.0,
        /// How often a question is asked again.
        retries: usize = 5,
        /// Questions at a time; 1 or more. Training by gradients judges one picture after another, so it has one at a time.
        concurrency: usize = 4,
    }
}

table! {
    /// `[reward.http]`: a server of the user's, which gets pictures and prompts and answers with scores. docs/rewards.md has the
    /// lines and an example.
    pub struct HttpConfig {
        /// Factor of its loss; finite. It has no gradient, so with AlignProp 0: logged, not trained.
        weight: f64 = 1.0,
        server: ServerConfig = ServerConfig::default(),
        /// Pictures in one question; 1 or more.
        batch: usize = 8,
    }
}

table! {
    /// `[reward.vlm]`: a vision-language model behind an OpenAI-compatible server (vLLM, llama.cpp, Ollama, ..) is asked a question
    /// of each picture, and its answer becomes a number.
    pub struct VlmConfig {
        /// Factor of its loss; finite. It has no gradient, so with AlignProp 0: logged, not trained.
        weight: f64 = 1.0,
        server: ServerConfig = ServerConfig::default(),
        /// The model's name on the server. Must be given.
        model: String = String::new(),
        /// What it is asked. `{prompt}` is the prompt, `{count}` the prompt's field `count`.
        question: String = "Does this picture show \"{prompt}\"? Answer with yes or no alone.".into(),
        /// How the answer becomes a number.
        answer: VlmAnswer = VlmAnswer::YesNo,
        /// For `answer = "words"`: what must occur; `{count}|{word}` is one of two. Fields as in `question`.
        words: Vec<String> = Vec::new(),
        /// The score of an answer without a number, or without yes and no; finite. Absent: such an answer is an error.
        otherwise: Option<f64> = None,
        /// The longest answer, in tokens; 1 or more. A model that thinks first needs more.
        max_tokens: usize = 64,
    }
}

/// How the answer of a [`VlmConfig`] becomes a score.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum VlmAnswer {
    /// The first number in it.
    Number,
    /// 1 for yes, 0 for no, whichever word comes first.
    #[default]
    YesNo,
    /// The share of `words` that occur in it, as whole words in any case.
    Words,
}

/// How an image in [0, 1] becomes the square input of a reward model, 224 by 224 for most. Scores made differently do not compare.
#[derive(Serialize, Deserialize, clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Preprocess {
    /// Short side to the tower's size, antialiased bilinear, then the centre: what AlignProp trains with.
    #[default]
    Alignprop,
    /// Short side to the tower's size, bicubic, then the centre: what CLIP scores, PickScore and the LAION predictor are
    /// published with.
    ClipOfficial,
    /// Longest side to the tower's size, bicubic, zeros around: what HPSv2 reports its scores with.
    Hpsv2Official,
    /// Both sides to the tower's size, whatever the aspect ratio.
    Squash,
}

table! {
    /// `[optimizer]`: AdamW on the LoRA factors.
    pub struct OptimizerConfig {
        /// Learning rate; more than 0.
        lr: f64 = 1e-3,
        /// Decay of the two moments; each 0 or more and less than 1.
        betas: [f64; 2] = [0.9, 0.999],
        /// Added to the root of the second moment; more than 0.
        eps: f64 = 1e-8,
        /// Decoupled weight decay; 0 or more. It pulls the factors towards the base model.
        weight_decay: f64 = 0.1,
        /// The gradient is scaled down to this norm; more than 0, `inf` never clips.
        max_grad_norm: f64 = 5.0,
        /// How the learning rate moves after the warm-up.
        lr_schedule: LrSchedule = LrSchedule::Constant,
        /// Optimizer steps over which the learning rate rises from 0; at most `train.steps`.
        warmup_steps: usize = 0,
        /// Factor of the whole loss; more than 0. AdamW cancels it; `max_grad_norm` and `eps` see it.
        loss_coeff: f64 = 0.01,
    }
}

/// The learning rate over the optimizer steps.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum LrSchedule {
    #[default]
    Constant,
    /// Straight down to 0 at `train.steps`.
    Linear,
    /// Half a cosine down to 0 at `train.steps`.
    Cosine,
}

table! {
    /// `[train]`: the loop. The global batch is `batch_size` x `gradient_accumulation_steps` images.
    pub struct TrainConfig {
        /// Optimizer steps; 1 or more. Of `ddpo`, `grpo` and `rwr`: rounds.
        steps: usize = 100,
        /// Images of one micro-batch; 1 or more. More is faster where memory allows.
        batch_size: usize = 1,
        /// Micro-batches of one optimizer step; 1 or more. Costs time, not memory.
        gradient_accumulation_steps: usize = 1,
        /// What the backward pass recomputes: `step`, `block`, or `auto`, the least that fits `memory_budget`.
        checkpointing: CheckpointingChoice = CheckpointingChoice::Auto,
        /// How many of the steps that keep their gradient, the last ones of the chain, stay in memory with their
        /// activations, so that the backward pass need not evaluate them again. `auto` chooses by itself; with `block` 0.
        stored_steps: usize = 0,
        /// Memory that the run may take, in GiB; more than 0. A run that does not fit by its estimate is not started.
        /// Absent: what the machine has free, which only `checkpointing = "auto"` looks at.
        memory_budget: Option<f64> = None,
        /// Consecutive optimizer steps that may be skipped because some number in them was not finite; one more stops
        /// the run, with the last good state saved. 0: the first one does.
        max_skipped_steps: usize = 3,
    }
}

/// `train.checkpointing`.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum CheckpointingChoice {
    Step,
    Block,
    /// `step` if its estimate fits the budget, with as many stored steps as there is room for, else `block`, with smaller
    /// micro-batches if need be. The run's own config keeps the choice, so that a resumed run computes as the run did.
    #[default]
    Auto,
}

impl From<CheckpointingChoice> for Checkpointing {
    /// Where nothing has chosen, `auto` is the one that is fast.
    fn from(choice: CheckpointingChoice) -> Self {
        match choice {
            CheckpointingChoice::Block => Self::Block,
            CheckpointingChoice::Step | CheckpointingChoice::Auto => Self::Step,
        }
    }
}

/// Memory against time.
#[derive(Serialize, Deserialize, clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Checkpointing {
    /// One UNet evaluation is kept in memory: each kept step that is not stored is evaluated once more.
    #[default]
    Step,
    /// One UNet block is kept in memory: each kept step is evaluated once more, and each of its blocks again.
    Block,
}

table! {
    /// `[regularization]`: what keeps the model near its start; all of it is off by default.
    pub struct RegularizationConfig {
        /// Weight of the mean squared difference of the noise predictions from the base model's, over the steps that
        /// keep their gradient (the KL term of DRaFT+); 0 or more. Each such step then evaluates the base model too.
        /// With `ddpo` and `grpo` the weight of the KL divergence of each trained step from the base model's, a mean over the
        /// latent's elements (Flow-GRPO).
        kl_weight: f64 = 0.0,
        /// Decay of an exponential moving average of the adapters, d in `average <- d average + (1 - d) adapters`;
        /// 0 or more and less than 1. 0: none. It is saved beside the adapters.
        ema_decay: f64 = 0.0,
        /// For each kind of reward, the score above which its loss pulls no more: `{ clip-score = 0.9 }`.
        reward_cap: BTreeMap<String, f64> = BTreeMap::new(),
    }
}

table! {
    /// `[guard]`: watches for over-optimisation, on prompts and noise of its own.
    ///
    /// An evaluation scores images with the training rewards and with the held-out ones, and measures the distance of
    /// the noise predictions from the base model's and the diversity of one prompt's images. It comes with a
    /// checkpoint; the one with the best held-out score is kept.
    pub struct GuardConfig {
        /// Optimizer steps between evaluations; 0: no guard.
        every: usize = 0,
        /// Stop after so many evaluations in a row in which the training reward rose while the held-out score fell;
        /// 0: never.
        patience: usize = 3,
        /// Stop where the training rewards are sharper than this on the guard's images: how much the loss rises where an image is moved
        /// against them (RSA-FT's S1; by `method.rho`, or 0.01); more than 0. Absent: never.
        max_sharpness: Option<f64> = None,
        /// The first prompts of the list to evaluate on; 1 or more.
        num_prompts: usize = 8,
        /// Images of each prompt; 1 or more, and 2 or more for a diversity.
        seeds: usize = 2,
        /// What the images are of. Absent: the training prompts.
        prompts: Option<PromptsConfig> = None,
        /// The held-out rewards, as under `[reward]`: `[guard.reward.clip-score]`. Their score is the weighted sum.
        reward: RewardsConfig = RewardsConfig::default(),
    }
}

table! {
    /// `[run]`: where the run goes and what it runs on.
    pub struct RunConfig {
        /// The run's folder: config, metrics, samples, checkpoints. Absent: `runs/NAME` with the name of the config file, or the
        /// first of `runs/NAME-2`, `runs/NAME-3` and so on that no run has.
        dir: Option<PathBuf> = None,
        /// Every random number of the run follows from it; up to 2^63 - 1, the largest TOML integer.
        seed: u64 = 0,
        /// `cpu`, or `cuda` or `cuda:N` in a build with GPU kernels (`--features cuda`).
        device: String = "cpu".into(),
        /// Weights and activations: `f32`, `bf16` or `f16`; LoRA factors, latents, optimizer and scores stay in f32. Absent:
        /// f32 on the CPU, which has no other, and bf16 on a GPU. In f16 the gradients are scaled up while they are in f16.
        precision: Option<Precision> = None,
        /// The same for the CLIP towers of the rewards, also of the guard's held-out ones; their pixels, embeddings, heads and
        /// scores stay in f32. Absent: that of the run. Whatever a run reports (batches, sample grids, the guard) is scored by
        /// the same towers; scores of another precision differ by its roundings, so give `f32` to compare runs of several.
        reward_precision: Option<Precision> = None,
        /// Whether products of f32 may round their inputs to TF32 (10 bits of mantissa) on a GPU.
        allow_tf32: bool = false,
        /// Whether the denoising steps without gradient are one CUDA graph, recorded once a chain and launched for each step,
        /// instead of some 700 launches each. The numbers are the same.
        cuda_graphs: bool = false,
        /// Optimizer steps between checkpoints; 0: only at the end.
        save_every: usize = 25,
        /// Optimizer steps between sample grids; 0: never.
        sample_every: usize = 25,
        /// Pictures in a sample grid; 1 or more.
        num_samples: usize = 4,
        /// What they are of. Absent: the first training prompts.
        sample_prompts: Option<PromptsConfig> = None,
        /// The last checkpoints to keep; 0: all.
        keep_checkpoints: usize = 3,
        /// Keep the best checkpoint too: by the guard's held-out score, or else by the loss of the sample grids.
        keep_best: bool = true,
    }
}

/// The number format of weights and activations.
#[derive(Serialize, Deserialize, clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub enum Precision {
    #[default]
    F32,
    Bf16,
    F16,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn preset(name: &str) -> Config {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs").join(name);
        Config::load(&path, &[]).unwrap()
    }

    #[test]
    fn presets_name_no_folder_so_that_each_run_gets_one() {
        for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("configs")).unwrap() {
            let file = entry.unwrap().file_name();
            assert_eq!(preset(file.to_str().unwrap()).run.dir, None, "{}", file.display());
        }
    }

    #[test]
    fn presets_are_the_official_runs() {
        for name in ["aesthetic", "aesthetic-k1", "hps", "hps-k1"] {
            let config = preset(&format!("{name}.toml"));
            config.require_trained().unwrap();
            assert_eq!(config.train.batch_size * config.train.gradient_accumulation_steps, 128);
            assert_eq!(config.optimizer, OptimizerConfig::default());
            assert_eq!(config.sampler, SamplerConfig::default());
            let mut lora = LoraConfig::default();
            lora.resolve();
            assert_eq!(config.lora, lora);
            let truncation = if name.ends_with("-k1") { Truncation::Fixed { k: 1 } } else { Truncation::default() };
            assert_eq!(config.truncation, truncation);
            let reward = name.trim_end_matches("-k1");
            assert_eq!(config.reward.weights(), [(reward, 1.0)]);
        }
        let aesthetic = preset("aesthetic.toml").reward.aesthetic.unwrap();
        assert_eq!(aesthetic, AestheticConfig { target: Some(10.0), ..Default::default() });
    }

    #[test]
    fn refl_has_its_published_settings_and_the_count_preset_is_whole() {
        let Config { sampler, truncation, reward, regularization, optimizer, train, .. } = preset("refl.toml");
        assert_eq!((sampler.num_inference_steps, sampler.guidance_scale, sampler.eta), (40, 1.0, 1.0));
        assert_eq!(truncation, Truncation::Refl { lo: 30, hi: 39 });
        assert_eq!(reward.weights(), [("image-reward", 1.0)]);
        // relu(2 - score) / 1000
        assert_eq!(reward.image_reward.unwrap().target, Some(2.0));
        assert_eq!(regularization.reward_cap, [("image-reward".to_owned(), 2.0)].into());
        assert_eq!((optimizer.weight_decay, optimizer.max_grad_norm, optimizer.loss_coeff), (0.01, 1.0, 0.001));
        assert_eq!((train.steps, train.batch_size * train.gradient_accumulation_steps), (100, 64));
        assert_eq!(preset("count.toml").reward.weights(), [("count", 1.0)]);
    }

    #[test]
    fn an_empty_file_is_the_defaults() {
        let mut defaults = Config::default();
        defaults.prompts.resolve();
        defaults.lora.resolve();
        assert_eq!(Config::parse("", "empty.toml", &[]).unwrap(), defaults);
        assert_eq!(defaults.lora.alpha_or_rank(), 4.0);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Config::load(Path::new("no/such.toml"), &[]).unwrap_err();
        assert_eq!(error.to_string(), "reading the config no/such.toml");
    }

    #[test]
    fn to_toml_round_trips() {
        let everything = r#"
            [model]
            path = 'a "quoted" folder'
            variant = "fp16"
            config = "configs/folder"
            tokenizer = "openai/clip-vit-large-patch14"
            prediction_type = "v_prediction"
            [lora]
            alpha = 8
            init_from = "lora.safetensors"
            [sampler]
            height = 64
            width = 96
            negative_prompt = "line\nbreak"
            [truncation]
            rule = "steps"
            steps = [0, 49]
            [reward.clip-head]
            head = "head.pth"
            preprocess = "hpsv2-official"
            layers = [{ linear = "layers.0" }, { activation = "relu" }, { linear = "layers.2" }]
            target = 3
            [reward.hps]
            weight = -0.5
            tokenizer = "tok.json"
            [prompts]
            list = ["a cat", ""]
            [optimizer]
            max_grad_norm = inf
            lr_schedule = "cosine"
            [run]
            seed = 9223372036854775807
            precision = "bf16"
            reward_precision = "f32"
        "#;
        for text in ["", everything] {
            let config = Config::parse(text, "x.toml", &[]).unwrap();
            let written = config.to_toml().unwrap();
            assert_eq!(Config::parse(&written, "written", &[]).unwrap(), config, "{written}");
        }
    }

    #[test]
    fn to_toml_has_its_tables_in_order() {
        let text = Config::parse("reward.hps = {}", "x.toml", &[]).unwrap().to_toml().unwrap();
        let tables: Vec<&str> = text.lines().filter(|line| line.starts_with('[')).collect();
        let order = "[model] [lora] [sampler] [method] [truncation] [reward.hps] [prompts] [optimizer] [train] [regularization] \
                     [regularization.reward_cap] [run] [guard] [guard.reward]";
        assert_eq!(tables.join(" "), order, "{text}");
        assert!(text.contains("betas = [0.9, 0.999]\n"), "{text}");
    }

    #[test]
    fn every_truncation_rule_reads_and_writes() {
        let per = Per::Batch;
        for (text, rule) in [
            (r#"rule = "uniform""#, Truncation::default()),
            (r#"per = "batch""#, Truncation::Uniform { per }),
            (r#"rule = "fixed", k = 2"#, Truncation::Fixed { k: 2 }),
            (
                r#"rule = "gaussian", mean = 42, std = 5, per = "batch""#,
                Truncation::Gaussian { mean: 42.0, std: 5.0, per },
            ),
            (r#"rule = "per-step", lo = 0, hi = 50"#, Truncation::PerStep { lo: 0, hi: 50 }),
            (r#"rule = "full""#, Truncation::Full),
            (r#"rule = "steps", steps = [1, 3]"#, Truncation::Steps { steps: vec![1, 3] }),
            (r#"rule = "draft-lv", n = 2"#, Truncation::DraftLv { n: 2 }),
            (r#"rule = "refl", lo = 30, hi = 39"#, Truncation::Refl { lo: 30, hi: 39 }),
            (r#"rule = "drtune""#, Truncation::Drtune { k: None }),
            (r#"rule = "drtune", k = 5"#, Truncation::Drtune { k: Some(5) }),
        ] {
            let config = Config::parse(&format!("truncation = {{ {text} }}"), "x.toml", &[]).unwrap();
            assert_eq!(config.truncation, rule);
            let written = config.to_toml().unwrap();
            assert_eq!(Config::parse(&written, "written", &[]).unwrap().truncation, rule);
        }
    }

    #[test]
    fn reward_kinds_are_the_keys_of_the_table() {
        for kind in REWARD_KINDS {
            let rewards: RewardsConfig = toml::from_str(&format!("{kind} = {{}}")).unwrap();
            assert_eq!(rewards.weights(), [(kind, 1.0)]);
        }
    }
}

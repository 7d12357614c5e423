//! The command line: clap structs and the parsers of single arguments, nothing that acts.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use toml::Value;

use crate::config::{Checkpointing, Precision, Preprocess, REWARD_KINDS, SamplerKind, parse_device};

/// Align Stable Diffusion with differentiable rewards: LoRA training by backpropagation through the denoising chain.
#[derive(Parser, Debug)]
#[command(name = "alignprop", version, arg_required_else_help = true, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Train a LoRA on the rewards of a config
    Train(TrainArgs),
    /// Score a checkpoint beside the base model, on the same prompts and noise
    Eval(EvalArgs),
    /// Score pictures that exist with any rewards
    Score(ScoreArgs),
    /// Learn a reward of your own from opinions of pictures: a head on a CLIP's image tower
    Fit(FitArgs),
    /// Average LoRAs into one, or mix them with the base model
    Soup(SoupArgs),
    /// Write a LoRA for another program, or a whole model with the LoRA folded in
    Export(ExportArgs),
    /// Make images, with or without a LoRA
    Sample(SampleArgs),
    /// Print a preset, to start an experiment from, or list them
    Config(PresetArgs),
    /// List the runs in a folder: their best rewards, steps, time and settings
    Runs(RunsArgs),
    /// Compare this program's numbers with recorded ones of the reference implementation
    Verify(VerifyArgs),
    /// Time one optimizer step, with its memory and its arithmetic
    Bench(BenchArgs),
    /// Print the completions of a shell
    Completions(CompletionArgs),
    /// Write the manual as man pages
    Man(ManArgs),
}

/// Where the experiment's settings come from.
#[derive(Args, Debug)]
pub struct ConfigArgs {
    /// The experiment: a file or a preset's name; without it, the defaults, and for train the preset emoji
    #[arg(long, value_name = "FILE_OR_PRESET")]
    pub config: Option<PathBuf>,

    /// Change one setting, for example optimizer.lr=1e-4; may be given again
    ///
    /// The value is read as TOML and, where that fails, taken as a string: model.path=DIR needs no quotes.
    /// A new truncation.rule or source of prompts takes the place of the config's.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// What it runs on, instead of what the config's `[run]` says.
#[derive(Args, Debug)]
pub struct DeviceArgs {
    /// cpu, cuda or cuda:N; instead of run.device
    #[arg(long, value_name = "DEVICE", value_parser = parse_device)]
    pub device: Option<String>,

    /// Format of weights and activations; instead of run.precision
    #[arg(long, value_name = "PRECISION")]
    pub precision: Option<Precision>,
}

impl DeviceArgs {
    fn given(&self) -> [Given; 2] {
        let device = self.device.as_deref().map(Value::from);
        [("run.device", device), ("run.precision", self.precision.map(name))]
    }
}

/// How images are denoised, instead of what the config's `[sampler]` says.
#[derive(Args, Debug)]
pub struct SolverArgs {
    /// How images are denoised; instead of sampler.kind
    #[arg(long, value_name = "KIND")]
    pub sampler: Option<SamplerKind>,

    /// Noise levels as Karras et al. space them, for another sampler than ddim; as sampler.karras = true
    #[arg(long)]
    pub karras: bool,
}

impl SolverArgs {
    fn given(&self) -> [Given; 2] {
        [("sampler.kind", self.sampler.map(name)), ("sampler.karras", self.karras.then(|| true.into()))]
    }
}

/// A setting that a flag gives, where it is there.
type Given = (&'static str, Option<Value>);

/// The settings of `--set`, and those that flags give, as `--set` takes them.
fn settings(set: &[String], given: impl IntoIterator<Item = Given>) -> Vec<String> {
    let given = given.into_iter().filter_map(|(key, value)| Some(format!("{key}={}", value?)));
    set.iter().cloned().chain(given).collect()
}

/// A value as the command line spells it.
fn name(value: impl ValueEnum) -> Value {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default().into()
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  alignprop train --config aesthetic
  alignprop train --config aesthetic --set truncation.rule=fixed --set truncation.k=1
  alignprop train --config hps --set reward.aesthetic.weight=0 --set run.dir=runs/hps-2
  alignprop train --resume runs/aesthetic --set train.steps=200")]
pub struct TrainArgs {
    #[command(flatten)]
    pub config: ConfigArgs,

    /// Go on from the last checkpoint of this run folder, with its config
    #[arg(long, value_name = "RUN")]
    pub resume: Option<PathBuf>,

    /// Stop after this optimizer step, with a checkpoint; the learning-rate schedule keeps its length
    #[arg(long, value_name = "STEP", value_parser = at_least_one)]
    pub stop_at: Option<usize>,

    /// Check the config and the models, say what would run, and stop
    #[arg(long)]
    pub dry_run: bool,

    #[command(flatten)]
    pub device: DeviceArgs,

    /// Format of the rewards' towers; instead of run.reward_precision, and without both that of the rest
    #[arg(long, value_name = "PRECISION")]
    pub reward_precision: Option<Precision>,
}

impl TrainArgs {
    /// All settings of the command line, as `--set` takes them.
    pub fn settings(&self) -> Vec<String> {
        let rewards = ("run.reward_precision", self.reward_precision.map(name));
        // a run's folder may have been moved
        let dir = ("run.dir", self.resume.as_ref().map(|dir| dir.display().to_string().into()));
        settings(&self.config.set, self.device.given().into_iter().chain([rewards, dir]))
    }
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  alignprop eval --checkpoint runs/aesthetic
  alignprop eval --checkpoint runs/aesthetic --prompts held-out.txt --seeds 8 --out eval/held-out
  alignprop eval --checkpoint runs/aesthetic --lora-scale 0,0.25,0.5,1 --lora-start 700
  alignprop eval --checkpoint runs/aesthetic --sampler dpmpp-2m --karras
  alignprop eval --checkpoint lora.safetensors --config hps --reward hps --lora-scale 0.5")]
pub struct EvalArgs {
    /// A run folder (its last checkpoint, its config) or a LoRA file
    #[arg(long, value_name = "RUN_OR_FILE")]
    pub checkpoint: PathBuf,

    #[command(flatten)]
    pub config: ConfigArgs,

    /// A file of prompts as prompts.file may name it: text, .csv, .tsv, .json, .jsonl; instead of the config's prompts
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,

    /// Images per prompt, from the seeds 0 to N-1
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = at_least_one)]
    pub seeds: usize,

    /// Rewards to score with: of the config, or with their default models; without it, all of the config
    #[arg(long, value_name = "KIND", num_args = 1.., value_parser = REWARD_KINDS)]
    pub reward: Vec<String>,

    /// Strength of the LoRA: 0 is the base model, 1 the LoRA as trained; several, as in 0,0.5,1, are a sweep
    #[arg(
        long,
        value_name = "S,...",
        default_value = "1",
        allow_negative_numbers = true,
        value_delimiter = ',',
        value_parser = finite
    )]
    pub lora_scale: Vec<f64>,

    /// Use the LoRA only below this timestep (of 1000 in most models), the base model before
    #[arg(long, value_name = "T")]
    pub lora_start: Option<usize>,

    /// Use the moving average of the adapters (regularization.ema_decay) that the run kept
    #[arg(long)]
    pub ema: bool,

    #[command(flatten)]
    pub solver: SolverArgs,

    /// Folder for the images and the scores as JSON
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,

    #[command(flatten)]
    pub device: DeviceArgs,

    /// Format of the rewards' towers; instead of run.reward_precision, and without both that of the rest
    #[arg(long, value_name = "PRECISION")]
    pub reward_precision: Option<Precision>,
}

impl EvalArgs {
    /// All settings of the command line, as `--set` takes them.
    pub fn settings(&self) -> Vec<String> {
        let rewards = ("run.reward_precision", self.reward_precision.map(name));
        settings(&self.config.set, self.device.given().into_iter().chain([rewards]).chain(self.solver.given()))
    }
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  alignprop config
  alignprop config aesthetic > mine.toml")]
pub struct PresetArgs {
    /// The preset to print; without it, their list
    #[arg(value_name = "NAME")]
    pub name: Option<PathBuf>,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  alignprop score pictures --reward aesthetic --sort aesthetic
  alignprop score a.png b.jpg --reward hps pickscore --prompt \"a cat\"
  alignprop score list.csv --config configs/hps.toml --format jsonl --sheet sheet.png
  alignprop score pictures --reward clip-score --embeddings vectors.safetensors

A prompt is that of --prompt, else the list's, else that of a .txt file of the picture's name, else what AUTOMATIC1111 or
ComfyUI wrote into a PNG. A picture that cannot be scored is named on stderr, and the others are scored.")]
pub struct ScoreArgs {
    /// Pictures (PNG, JPEG, WebP), folders of them, or lists (.csv, .tsv, .json, .jsonl) with a column `file`, relative to
    /// the list, and perhaps `prompt`
    #[arg(value_name = "PICTURES", required = true)]
    pub pictures: Vec<PathBuf>,

    /// Rewards to score with: of the config, or with their default models; without it, all of the config
    #[arg(long, value_name = "KIND", num_args = 1.., value_parser = REWARD_KINDS)]
    pub reward: Vec<String>,

    /// What all pictures are to show; instead of each one's own prompt
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,

    #[command(flatten)]
    pub config: ConfigArgs,

    /// Prepare the pictures as the config's rewards do in training; without it, as the packages do that the scores come from
    #[arg(long)]
    pub as_trained: bool,

    /// How the scores are printed
    #[arg(long, value_enum, default_value_t)]
    pub format: ScoreFormat,

    /// The highest of this reward first
    #[arg(long, value_name = "KIND", value_parser = REWARD_KINDS)]
    pub sort: Option<String>,

    /// Write a picture of the best and the worst, by --sort or the first reward
    #[arg(long, value_name = "FILE")]
    pub sheet: Option<PathBuf>,

    /// Write the towers' unit vectors of the pictures that were scored, as safetensors: a tensor for each reward that has one
    #[arg(long, value_name = "FILE")]
    pub embeddings: Option<PathBuf>,

    /// Pictures that a tower takes at once
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    pub batch: usize,

    #[command(flatten)]
    pub device: DeviceArgs,

    /// Format of the towers; instead of run.reward_precision, and without both that of the rest
    #[arg(long, value_name = "PRECISION")]
    pub reward_precision: Option<Precision>,
}

impl ScoreArgs {
    /// All settings of the command line, as `--set` takes them.
    pub fn settings(&self) -> Vec<String> {
        let rewards = ("run.reward_precision", self.reward_precision.map(name));
        settings(&self.config.set, self.device.given().into_iter().chain([rewards]))
    }
}

/// How `score` prints.
#[derive(ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScoreFormat {
    /// For eyes
    #[default]
    Table,
    /// For spreadsheets, and for `fit`
    Csv,
    /// An object on each line
    Jsonl,
}

#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("opinions").required(true).args(["scores", "like", "choices"]))]
#[command(after_help = "\
Examples:
  alignprop fit --like liked --dislike others -o mine.safetensors
  alignprop fit --scores scores.csv -o mine.safetensors
  alignprop fit --choices choices.jsonl --embeddings vectors.safetensors -o mine.safetensors

Lists are .csv, .tsv, .json or .jsonl, with files relative to the list. It says how good such a head is on pictures that it has
not seen, beside chance and beside the LAION head, and writes one file, which is the whole configuration of a reward:
[reward.clip-head] head = \"mine.safetensors\".")]
pub struct FitArgs {
    /// A list with the columns `file` and `score`: ridge regression
    #[arg(long, value_name = "LIST")]
    pub scores: Option<PathBuf>,

    /// The column of the scores
    #[arg(long, value_name = "NAME", default_value = "score", requires = "scores")]
    pub column: String,

    /// Pictures, folders or lists of pictures that are liked: logistic regression
    #[arg(long, value_name = "PICTURES", num_args = 1.., requires = "dislike")]
    pub like: Vec<PathBuf>,

    /// And of pictures that are not
    #[arg(long, value_name = "PICTURES", num_args = 1.., requires = "like")]
    pub dislike: Vec<PathBuf>,

    /// A list with the columns `better` and `worse`, and perhaps `draw` (1: neither was better): Bradley and Terry's model
    #[arg(long, value_name = "LIST")]
    pub choices: Option<PathBuf>,

    /// The CLIP whose image tower the head is on: a folder or a hub id
    #[arg(long, value_name = "DIR_OR_ID", default_value = "openai/clip-vit-large-patch14")]
    pub clip: String,

    /// How pictures become the tower's input, in training too
    #[arg(long, value_enum, default_value_t = Preprocess::ClipOfficial)]
    pub preprocess: Preprocess,

    /// Strength of the penalty on the weights; without it, the one that cross-validation finds
    #[arg(long, value_name = "LAMBDA", value_parser = positive)]
    pub lambda: Option<f64>,

    /// Decides which pictures are measured on together
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// A file that keeps the pictures' vectors: those that are in it are not computed again
    #[arg(long, value_name = "FILE")]
    pub embeddings: Option<PathBuf>,

    /// Pictures that the tower takes at once
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    pub batch: usize,

    /// The head to write
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,

    #[command(flatten)]
    pub config: ConfigArgs,

    #[command(flatten)]
    pub device: DeviceArgs,
}

impl FitArgs {
    /// All settings of the command line, as `--set` takes them.
    pub fn settings(&self) -> Vec<String> {
        settings(&self.config.set, self.device.given())
    }
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  alignprop runs
  alignprop runs runs/sweep

Best is the guard's held-out score where the run has one, else the score of its samples, else that of a batch.")]
pub struct RunsArgs {
    /// A folder of runs; they may lie deeper in it, or be linked into it
    #[arg(value_name = "DIR", default_value = "runs")]
    pub dir: PathBuf,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  alignprop soup aesthetic.safetensors=0.5 hps.safetensors=0.5 -o soup.safetensors
  alignprop soup aesthetic.safetensors=0.7 --with-base -o weaker.safetensors
  alignprop soup a.safetensors=0.3 b.safetensors=0.7 --rank 4 -o soup.safetensors")]
pub struct SoupArgs {
    /// A LoRA file and its weight; the weights sum to 1
    #[arg(value_name = "FILE=WEIGHT", required = true, value_parser = parse_part)]
    pub parts: Vec<(PathBuf, f64)>,

    /// Let the weights sum to less than 1: the rest is the base model
    #[arg(long)]
    pub with_base: bool,

    /// What is averaged
    #[arg(long, value_enum, default_value_t = Average::Product)]
    pub average: Average,

    /// Cut the result back to this rank (truncated SVD); without it, the ranks of the parts add up
    #[arg(long, value_name = "R", value_parser = at_least_one)]
    pub rank: Option<usize>,

    /// The LoRA file to write
    #[arg(short, long, value_name = "OUT")]
    pub output: PathBuf,
}

/// What a soup averages.
#[derive(ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Average {
    /// The products B A, which is what changes the model
    #[default]
    Product,
    /// The factors A and B, each alone, as the AlignProp paper does; all of one rank
    Factors,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  alignprop export runs/aesthetic --format kohya --out aesthetic.safetensors
  alignprop export runs/aesthetic --format merged --precision f16 --out models/aesthetic
  alignprop export lora.safetensors --format peft --lora-scale 0.8 --out adapter")]
pub struct ExportArgs {
    /// A run folder (its last checkpoint, its config) or a LoRA file of any format that is read
    #[arg(value_name = "RUN_OR_FILE")]
    pub checkpoint: PathBuf,

    /// Who is to read it
    #[arg(long, value_enum)]
    pub format: ExportFormat,

    /// The file or folder to write; without it, in `export` in the run's folder or here
    #[arg(long, value_name = "PATH")]
    pub out: Option<PathBuf>,

    /// The base model: a folder, a hub id or a single file; instead of model.path
    #[arg(long, value_name = "DIR_FILE_OR_ID")]
    pub model: Option<String>,

    /// Strength of the LoRA: 1 is the LoRA as trained
    #[arg(long, value_name = "S", default_value_t = 1.0, allow_negative_numbers = true, value_parser = finite)]
    pub lora_scale: f64,

    /// Number format of the file; without it, f32 for a LoRA, and for a merged model its own
    #[arg(long, value_name = "PRECISION")]
    pub precision: Option<Precision>,

    #[command(flatten)]
    pub config: ConfigArgs,
}

/// The formats that `export` writes.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportFormat {
    /// A file for `load_lora_weights` of diffusers
    Diffusers,
    /// A folder for `PeftModel.from_pretrained`
    Peft,
    /// A file for AUTOMATIC1111, ComfyUI and kohya's scripts
    Kohya,
    /// A whole pipeline in the diffusers layout, the LoRA folded into its UNet
    Merged,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  alignprop sample --prompt \"a hippopotamus\" -o out.png
  alignprop sample --prompt \"a cat\" \"a dog\" --lora lora.safetensors --seed 7 -o grid.png
  alignprop sample --prompt \"a cat\" --model some/folder --steps 30 --guidance-scale 5 -o out.png")]
pub struct SampleArgs {
    /// What to paint; several make a grid
    #[arg(long, value_name = "TEXT", num_args = 1.., required = true)]
    pub prompt: Vec<String>,

    /// What to stay away from; instead of sampler.negative_prompt
    #[arg(long, value_name = "TEXT")]
    pub negative_prompt: Option<String>,

    /// A LoRA file; without it, the base model
    #[arg(long, value_name = "FILE")]
    pub lora: Option<PathBuf>,

    /// Strength of the LoRA: 0 is the base model, 1 the LoRA as trained
    #[arg(long, value_name = "S", default_value_t = 1.0, allow_negative_numbers = true, value_parser = finite)]
    pub lora_scale: f64,

    /// Use the LoRA only below this timestep (of 1000 in most models), the base model before
    #[arg(long, value_name = "T", requires = "lora")]
    pub lora_start: Option<usize>,

    #[command(flatten)]
    pub config: ConfigArgs,

    /// The pipeline's folder or hub id, or a single file; instead of model.path
    #[arg(long, value_name = "DIR_FILE_OR_ID")]
    pub model: Option<String>,

    /// Denoising steps; instead of sampler.num_inference_steps
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub steps: Option<usize>,

    /// Classifier-free guidance, 1 turns it off; instead of sampler.guidance_scale
    #[arg(long, value_name = "G", value_parser = finite)]
    pub guidance_scale: Option<f64>,

    #[command(flatten)]
    pub solver: SolverArgs,

    /// DDIM noise, from 0 to 1; instead of sampler.eta
    #[arg(long, value_name = "ETA", value_parser = finite)]
    pub eta: Option<f64>,

    /// The image is a function of the seed and the settings
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// Pixels; instead of sampler.height
    #[arg(long, value_name = "PIXELS", value_parser = at_least_one)]
    pub height: Option<usize>,

    /// Pixels; instead of sampler.width
    #[arg(long, value_name = "PIXELS", value_parser = at_least_one)]
    pub width: Option<usize>,

    /// The picture to write: .png, .jpg or .webp
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,

    /// Also write the initial latents, the embeddings and the unrounded images, as safetensors
    #[arg(long, value_name = "FILE")]
    pub save_tensors: Option<PathBuf>,

    #[command(flatten)]
    pub device: DeviceArgs,
}

impl SampleArgs {
    /// All settings of the command line, as `--set` takes them.
    pub fn settings(&self) -> Vec<String> {
        let whole = |value: Option<usize>| value.map(|value| Value::from(value as i64));
        let given = [
            ("model.path", self.model.as_deref().map(Value::from)),
            ("sampler.negative_prompt", self.negative_prompt.as_deref().map(Value::from)),
            ("sampler.num_inference_steps", whole(self.steps)),
            ("sampler.guidance_scale", self.guidance_scale.map(Value::from)),
            ("sampler.eta", self.eta.map(Value::from)),
            ("sampler.height", whole(self.height)),
            ("sampler.width", whole(self.width)),
        ];
        settings(&self.config.set, given.into_iter().chain(self.solver.given()).chain(self.device.given()))
    }
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  alignprop verify fixtures
  alignprop verify fixtures --json
  alignprop verify fixtures --device cuda --precision f32
  alignprop verify fixtures --precision bf16")]
pub struct VerifyArgs {
    /// Folder with models and recorded numbers
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,

    /// The aesthetic head's weights, where DIR has none
    #[arg(long, value_name = "FILE")]
    pub head: Option<PathBuf>,

    /// cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = parse_device)]
    pub device: String,

    /// Format of weights and activations, the rewards' too; without it f32 on the CPU and bf16 on a GPU. The CPU can round
    /// to bf16 and f16 after every operation, as a GPU does
    #[arg(long, value_name = "PRECISION")]
    pub precision: Option<Precision>,

    /// Let products of f32 round their inputs to TF32 on a GPU
    #[arg(long)]
    pub allow_tf32: bool,

    /// Print the comparison as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  alignprop bench --arch sd15-quarter --random-weights --size 256x256 --steps 10 --backprop-steps 2
  alignprop bench --model some/folder --batch 4 --steps 20 --backprop-steps 5 --json
  alignprop bench --arch sd15 --random-weights --device cuda --precision bf16 --size 512x512 --steps 50")]
pub struct BenchArgs {
    /// A pipeline's folder or hub id, or a single file
    #[arg(long, value_name = "DIR_OR_ID", conflicts_with = "arch", required_unless_present = "arch")]
    pub model: Option<String>,

    /// An architecture by name, instead of a model
    #[arg(long, value_enum, requires = "random_weights")]
    pub arch: Option<Architecture>,

    /// Fill the architecture with random numbers: time and memory do not depend on them
    #[arg(long)]
    pub random_weights: bool,

    /// A CLIP folder for the reward; without it, the shapes of CLIP ViT-L/14
    #[arg(long, value_name = "DIR_OR_ID")]
    pub clip: Option<String>,

    /// Image size; without it, the model's own, or 512x512
    #[arg(long, value_name = "HxW", value_parser = parse_size)]
    pub size: Option<(usize, usize)>,

    /// Images of one optimizer step
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub batch: usize,

    /// Denoising steps
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = at_least_one)]
    pub steps: usize,

    /// Denoising steps that keep their gradient, the last ones
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = at_least_one)]
    pub backprop_steps: usize,

    /// Classifier-free guidance; 1 turns it off
    #[arg(long, value_name = "G", default_value_t = 7.5, value_parser = finite)]
    pub cfg: f64,

    /// Rank of the adapters
    #[arg(long, value_name = "R", default_value_t = 4, value_parser = at_least_one)]
    pub rank: usize,

    /// What a backward pass recomputes
    #[arg(long, value_enum, default_value_t = Checkpointing::Step)]
    pub checkpointing: Checkpointing,

    /// Of the steps that keep their gradient, how many stay in memory instead of being evaluated again
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub stored_steps: usize,

    /// cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = parse_device)]
    pub device: String,

    /// Format of weights and activations; without it f32 on the CPU and bf16 on a GPU
    #[arg(long, value_name = "PRECISION")]
    pub precision: Option<Precision>,

    /// Format of the rewards' towers; without it that of the rest
    #[arg(long, value_name = "PRECISION")]
    pub reward_precision: Option<Precision>,

    /// Let products of f32 round their inputs to TF32 on a GPU
    #[arg(long)]
    pub allow_tf32: bool,

    /// Launch the denoising steps without gradient as one CUDA graph each
    #[arg(long)]
    pub cuda_graphs: bool,

    /// Measured steps, of which the median is taken; one more comes before them
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = at_least_one)]
    pub reps: usize,

    /// Print one line of JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  alignprop completions bash > ~/.local/share/bash-completion/completions/alignprop
  alignprop completions zsh > ~/.zfunc/_alignprop
  alignprop completions fish > ~/.config/fish/completions/alignprop.fish")]
pub struct CompletionArgs {
    /// The shell that reads them
    #[arg(value_name = "SHELL")]
    pub shell: Shell,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  alignprop man ~/.local/share/man/man1")]
pub struct ManArgs {
    /// The folder to write them in; missing ones are made
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
}

/// An architecture whose shapes are known without files.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Stable Diffusion 1.5
    Sd15,
    /// Stable Diffusion 1.5 with a quarter of its channels
    Sd15Quarter,
}

/// Parses `512x768`, height first.
fn parse_size(text: &str) -> Result<(usize, usize), String> {
    let sides = text.split_once('x').and_then(|(h, w)| Some((h.parse().ok()?, w.parse().ok()?)));
    sides.ok_or_else(|| "is not HEIGHTxWIDTH in pixels, for example 512x512".to_string())
}

/// Parses `FILE=WEIGHT`; the last `=` counts, so a file name may have one.
fn parse_part(text: &str) -> Result<(PathBuf, f64), String> {
    let Some((file, weight)) = text.rsplit_once('=') else {
        return Err("expected FILE=WEIGHT, for example lora.safetensors=0.5".to_string());
    };
    if file.is_empty() {
        return Err("the file before `=` is missing; expected FILE=WEIGHT".to_string());
    }
    let weight = finite(weight).map_err(|error| format!("the weight `{weight}` after `=` {error}"))?;
    Ok((PathBuf::from(file), weight))
}

fn finite(text: &str) -> Result<f64, String> {
    let number: Option<f64> = text.parse().ok();
    number.filter(|number| number.is_finite()).ok_or_else(|| "is not a finite number".to_string())
}

fn positive(text: &str) -> Result<f64, String> {
    let number: Option<f64> = text.parse().ok();
    number
        .filter(|number| number.is_finite() && *number > 0.0)
        .ok_or_else(|| "is not a number, more than 0".to_string())
}

fn at_least_one(text: &str) -> Result<usize, String> {
    let number: Option<usize> = text.parse().ok();
    number.filter(|number| *number >= 1).ok_or_else(|| "is not a whole number, 1 or more".to_string())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Command, String> {
        match Cli::try_parse_from(line.split_whitespace()) {
            Ok(cli) => Ok(cli.command),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_examples_in_the_help_parse() {
        let mut count = 0;
        for command in Cli::command().get_subcommands() {
            let help = command.get_after_help().unwrap().to_string();
            for line in help.lines().filter(|line| line.starts_with("  alignprop")) {
                // what the shell does with the output aside, and a quoted prompt as one word
                let (line, _) = line.split_once(" > ").unwrap_or((line, ""));
                let line: String = line
                    .split('"')
                    .enumerate()
                    .map(|(i, part)| if i % 2 == 1 { part.replace(' ', "_") } else { part.into() })
                    .collect();
                parse(&line).unwrap();
                count += 1;
            }
        }
        assert_eq!(count, 40);
    }

    #[test]
    fn train_takes_settings() {
        let line = "alignprop train --config c.toml --set a.b=1 --set c=d --device cuda:1 --precision bf16 --dry-run";
        let Ok(Command::Train(train)) = parse(line) else { panic!("not train") };
        assert_eq!(train.config.config, Some(PathBuf::from("c.toml")));
        assert_eq!(train.config.set, ["a.b=1", "c=d"]);
        assert_eq!((train.device.device.as_deref(), train.device.precision), (Some("cuda:1"), Some(Precision::Bf16)));
        assert!(train.dry_run && train.resume.is_none());
    }

    #[test]
    fn flags_are_settings_of_the_config() {
        let line = ["alignprop", "sample", "--prompt", "a", "-o", "x.png", "--set", "sampler.eta=0.5", "--steps", "7"];
        let odd = ["--negative-prompt", "a \"b\" = 'c',\n[d]", "--model", "C:\\models\\x", "--guidance-scale", "3"];
        let line = line.iter().chain(&odd).chain(&["--precision", "bf16", "--device", "cuda:1"]);
        let Ok(Cli { command: Command::Sample(sample) }) = Cli::try_parse_from(line) else { panic!("not sample") };
        let config = crate::config::Config::parse("[run]\ndevice = 'cpu'", "test", &sample.settings()).unwrap();
        let sampler = config.sampler;
        assert_eq!((sampler.negative_prompt.as_str(), config.model.path.as_str()), (odd[1], odd[3]));
        assert_eq!((sampler.num_inference_steps, sampler.guidance_scale, sampler.eta), (7, 3.0, 0.5));
        assert_eq!((config.run.device.as_str(), config.run.precision), ("cuda:1", Some(Precision::Bf16)));
        assert_eq!(sampler.height, None);
    }

    #[test]
    fn eval_has_defaults() {
        let Ok(Command::Eval(eval)) = parse("alignprop eval --checkpoint run --reward hps --reward aesthetic") else {
            panic!("not eval")
        };
        assert_eq!((eval.seeds, eval.lora_scale, eval.lora_start, eval.ema), (4, vec![1.0], None, false));
        assert_eq!(eval.reward, ["hps", "aesthetic"]);
    }

    #[test]
    fn eval_takes_a_sweep_of_scales() {
        let Ok(Command::Eval(eval)) = parse("alignprop eval --checkpoint run --lora-scale=-1,0,0.25 --lora-start 500")
        else {
            panic!("not eval")
        };
        assert_eq!((eval.lora_scale, eval.lora_start), (vec![-1.0, 0.0, 0.25], Some(500)));
    }

    #[test]
    fn soup_takes_parts() {
        let Ok(Command::Soup(soup)) = parse("alignprop soup a=b.safetensors=0.25 c=.75 -o out --average factors")
        else {
            panic!("not soup")
        };
        assert_eq!(soup.parts, [(PathBuf::from("a=b.safetensors"), 0.25), (PathBuf::from("c"), 0.75)]);
        assert_eq!((soup.average, soup.rank, soup.with_base), (Average::Factors, None, false));
    }

    #[test]
    fn wrong_arguments_say_what_was_expected() {
        for (line, expected) in [
            ("alignprop soup a -o out", "expected FILE=WEIGHT, for example lora.safetensors=0.5"),
            ("alignprop soup =1 -o out", "the file before `=` is missing"),
            ("alignprop soup a=half -o out", "the weight `half` after `=` is not a finite number"),
            ("alignprop soup a=nan -o out", "the weight `nan` after `=` is not a finite number"),
            ("alignprop train --device gpu", "must be cpu, cuda or cuda:N"),
            ("alignprop train --precision fp16", "a similar value exists: 'f16'"),
            (
                "alignprop eval --checkpoint r --reward hpsv2",
                "[possible values: aesthetic, clip-head, hps, clip-score, pickscore, compressibility, incompressibility, image-reward, count, object, command, http, vlm]",
            ),
            ("alignprop eval --checkpoint r --seeds 0", "is not a whole number, 1 or more"),
            ("alignprop sample -o out.png", "--prompt <TEXT>..."),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(expected), "{line}\n{error}");
        }
    }
}

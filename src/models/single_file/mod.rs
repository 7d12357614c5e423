//! A whole pipeline in one file: the layout of the original Stable Diffusion code, in which models are mostly shared.
//!
//! ```text
//! model.diffusion_model.*            the UNet: input_blocks, middle_block, output_blocks
//! first_stage_model.*                the VAE
//! cond_stage_model.transformer.*     the text encoder of 1.x (transformers' names)
//! cond_stage_model.model.*           the text encoder of 2.x (open_clip's names); the last layer is not used
//! conditioner.embedders.0.transformer.*, conditioner.embedders.1.model.*     both of XL, in these two layouts
//! ```
//!
//! The file is shown as the folder that diffusers would have: the tensors under diffusers' names, its configs made from
//! the shapes. What shapes do not tell is the same for all Stable Diffusion 1.x (8 heads), 2.x and XL (heads of 64
//! channels) models, or comes from `model.config`. A tokenizer is never in such a file.

mod names;
mod prediction;

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value as Json, json};

use super::weights::{Renamed, warn_of_pickle};
use super::{Source, Weights};
use crate::config::{ModelConfig, PredictionType};
use crate::models::clip::open_clip;
use prediction::prediction_type;

const UNET: &str = "model.diffusion_model";
const VAE: &str = "first_stage_model";
const CLIP: &str = "cond_stage_model.transformer";
const OPEN_CLIP: &str = "cond_stage_model.model";
const XL_CLIP: &str = "conditioner.embedders.0.transformer";
const XL_OPEN_CLIP: &str = "conditioner.embedders.1.model";

/// Where CLIP's tokenizer is published, which both generations use.
const TOKENIZER: &str = "openai/clip-vit-large-patch14";

/// What a file is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Generation {
    V1,
    V2,
    Xl,
}
use Generation::{V1, V2, Xl};

/// The parts of the file, as a folder would have them.
pub(super) struct SingleFile {
    label: String,
    /// By path: `unet/config.json`.
    configs: HashMap<&'static str, Json>,
    /// By folder: `unet`.
    parts: HashMap<&'static str, Weights>,
    pub(super) tokenizer: Option<Source>,
    generation: Generation,
}

impl fmt::Debug for SingleFile {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.label)
    }
}

impl SingleFile {
    /// Reads the names and shapes of the file, and finds a tokenizer for it.
    ///
    /// # Errors
    /// The file is no whole Stable Diffusion 1.x, 2.x or XL model, or there is no tokenizer.
    pub(super) fn open(path: &Path, model: &ModelConfig) -> Result<Self> {
        let label = path.display().to_string();
        if path.extension().is_some_and(|extension| extension == "ckpt") {
            warn_of_pickle(path, &path.with_extension("safetensors").display().to_string());
        }
        let weights = Weights::open_file(path).with_context(|| {
            format!(
                "`{label}` is a file, so it is read as a single-file model in the original layout of Stable Diffusion; of a \
                 pipeline in the diffusers layout give the folder"
            )
        })?;
        let vae = vae_beside(path)?.unwrap_or_else(|| weights.pp(VAE));
        check_is_whole(&weights, &vae)?;
        let generation = match (has(&weights.pp(XL_OPEN_CLIP)), has(&weights.pp(OPEN_CLIP))) {
            (true, _) => Xl,
            (false, true) => V2,
            (false, false) => V1,
        };
        let v2 = generation == V2;
        let folder = model.config.as_deref().map(Source::open).transpose().context("model.config")?;

        let mut configs = recognise(&weights, &vae, generation)?;
        let prediction = prediction_type(path, &weights, v2)?;
        let guessed = prediction.unwrap_or(if v2 { "v_prediction" } else { "epsilon" });
        configs.insert("scheduler/scheduler_config.json", scheduler(guessed));
        if let Some(folder) = &folder {
            replace_configs(&mut configs, folder)?;
        }
        let scheduler = configs.get_mut("scheduler/scheduler_config.json").context("a scheduler")?;
        let class = scheduler["_class_name"].clone();
        match (&model.prediction_type, &prediction) {
            (Some(asked), found) => {
                let asked = asked.as_str();
                if let Some(found) = found.filter(|found| *found != asked) {
                    note!("warning: {label} says of itself {found}; model.prediction_type = {asked} counts");
                }
                scheduler["prediction_type"] = asked.into();
            }
            (None, None) if v2 && folder.is_none() => note!(
                "warning: {label} does not say whether it predicts v (Stable Diffusion 2.x for 768x768) or epsilon (2.x-base for \
                 512x512); v is assumed; model.prediction_type = \"epsilon\" says otherwise"
            ),
            _ => {}
        }
        let v = scheduler["prediction_type"] == "v_prediction";
        if v && folder.is_none() && weights.contains("ztsnr") {
            note!(
                "warning: {label} has the mark `ztsnr`: its betas are rescaled to zero terminal SNR and its timesteps spaced `trailing`"
            );
            scheduler["rescale_betas_zero_snr"] = true.into();
            scheduler["timestep_spacing"] = "trailing".into();
        }
        if let Some(index) = configs.get_mut("model_index.json").filter(|_| class.is_string()) {
            index["scheduler"][1] = class;
        }
        if folder.is_none()
            && let Some(unet) = configs.get_mut("unet/config.json")
        {
            let side = match generation {
                Xl => 128,
                V2 if v => 96,
                _ => 64,
            };
            unet["sample_size"] = side.into();
            unet["upcast_attention"] = (v2 && v).into(); // needed in half precision only
        }
        complete(&configs, &label)?;
        let parts = rename(&weights, &vae, generation, &configs)?;
        let tokenizer = find_tokenizer(path, model, folder.as_ref())?;
        Ok(Self { label, configs, parts, tokenizer: Some(tokenizer), generation })
    }

    /// The VAE in a file of its own, or in that of a whole model. `config` is another's, which counts where the shapes say
    /// nothing: the scaling factor, the groups of the norms.
    ///
    /// # Errors
    /// The file has no VAE.
    pub(super) fn vae(path: &Path, config: Json) -> Result<Self> {
        let (label, mut config) = (path.display().to_string(), config);
        let weights = Weights::open_file(path)?;
        let inner = weights.pp(VAE);
        let weights = if has(&inner) { inner } else { weights };
        let weights = if weights.contains("decoder.up.0.block.0.conv1.weight") {
            let seen = vae_config(&weights)?;
            for (key, seen) in seen.as_object().into_iter().flatten() {
                if !["scaling_factor", "sample_size", "norm_num_groups"].contains(&key.as_str()) {
                    config[key] = seen.clone();
                }
            }
            weights.renamed(&vae_names(&weights)?)?
        } else {
            ensure!(
                weights.contains("decoder.up_blocks.0.resnets.0.conv1.weight"),
                "{label} has no VAE: neither `decoder.up.0.*` of the original layout nor `decoder.up_blocks.0.*` of diffusers"
            );
            weights
        };
        Ok(Self {
            label,
            configs: HashMap::from([("vae/config.json", config)]),
            parts: HashMap::from([("vae", weights)]),
            tokenizer: None,
            generation: V1,
        })
    }

    pub(super) fn label(&self) -> &str {
        &self.label
    }

    /// A config by its path in the folder.
    pub(super) fn config(&self, path: &str) -> Option<&Json> {
        self.configs.get(path)
    }

    /// The weights of a folder.
    pub(super) fn weights(&self, folder: &str) -> Option<&Weights> {
        self.parts.get(folder)
    }

    /// What prompts are padded with in `tokenizer` or `tokenizer_2`, where the tokenizer's own files do not count.
    pub(super) fn pad_token(&self, folder: &str) -> Option<&'static str> {
        (self.generation == V2 || folder == "tokenizer_2").then_some("!")
    }
}

fn has(weights: &Weights) -> bool {
    !weights.names().is_empty()
}

/// # Errors
/// Says what the file is instead, or which part it lacks.
fn check_is_whole(w: &Weights, vae: &Weights) -> Result<()> {
    let file = w.file();
    let names = w.names();
    let any = |text: &str| names.iter().any(|name| name.starts_with(text) || name.contains(&format!(".{text}")));
    let unet = w.pp(UNET);
    if any("lora_A") || any("lora_down") || any("lora_unet_") || any("hada_w1_a") {
        bail!("{file} is a LoRA and no model: give it with --lora, and a model with --model");
    }
    let xl = has(&w.pp(XL_OPEN_CLIP));
    if any("double_blocks") || any("joint_blocks") || (unet.contains("label_emb.0.0.weight") && !xl) {
        bail!(
            "{file} is a model of another generation, or a refiner of Stable Diffusion XL; only 1.x, 2.x and XL are supported"
        );
    }
    if !unet.contains("input_blocks.0.0.weight") {
        let first = names.first().map_or("nothing", String::as_str);
        if any("down_blocks.0") {
            bail!(
                "{file} is one part of a pipeline in the diffusers layout: give the pipeline's folder (the one with model_index.json)"
            );
        }
        bail!(
            "{file} is no Stable Diffusion model in the original layout: it has no `{UNET}.*`, but for example `{first}`"
        );
    }
    ensure!(
        vae.contains("decoder.conv_in.weight"),
        "{file} has no VAE (`{VAE}.*`): it is only a part of a model; take the whole checkpoint, or put its VAE beside it, under the same \
         name with `.vae.safetensors` at its end"
    );
    ensure!(
        has(&w.pp(CLIP)) || has(&w.pp(OPEN_CLIP)) || (xl && has(&w.pp(XL_CLIP))),
        "{file} has no text encoder (`cond_stage_model.*`): it is only a part of a model; take the whole checkpoint"
    );
    Ok(())
}

/// Length of a tensor's axis.
fn axis(w: &Weights, name: &str, axis: usize) -> Result<usize> {
    let shape = w.shape(name).with_context(|| format!("{}: there is no `{}.{name}`", w.file(), w.prefix()))?;
    shape.get(axis).copied().with_context(|| format!("{}: `{}.{name}` has shape {shape:?}", w.file(), w.prefix()))
}

/// How many of `pattern(0)`, `pattern(1)`, ... there are.
fn count(w: &Weights, pattern: impl Fn(usize) -> String) -> usize {
    (0..).take_while(|&i| w.contains(&pattern(i))).count()
}

/// The configs as far as the shapes and the generation tell; a key that they do not tell is left out.
fn recognise(w: &Weights, vae: &Weights, generation: Generation) -> Result<HashMap<&'static str, Json>> {
    let mut index = json!({
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [null, null],
        "requires_safety_checker": false,
        "safety_checker": [null, null],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    });
    let text_encoder = match generation {
        V1 => clip_config(&names::clip_root(w, CLIP))?,
        V2 => open_clip_config(&w.pp(OPEN_CLIP), true)?,
        Xl => clip_config(&names::clip_root(w, XL_CLIP))?,
    };
    let (mut unet, mut vae) = (unet_config(&w.pp(UNET), generation)?, vae_config(vae)?);
    let mut configs = HashMap::new();
    if generation == Xl {
        let w = w.pp(XL_OPEN_CLIP);
        let (mut second, features) = (open_clip_config(&w, false)?, axis(&w, "text_projection", 1)?);
        second["architectures"] = json!(["CLIPTextModelWithProjection"]);
        second["projection_dim"] = features.into();
        configs.insert("text_encoder_2/config.json", second);
        let all = unet["projection_class_embeddings_input_dim"].as_u64().unwrap_or_default() as usize;
        unet["addition_time_embed_dim"] = (all.saturating_sub(features) / 6).into();
        vae["scaling_factor"] = 0.13025.into();
        vae["force_upcast"] = true.into();
        index["_class_name"] = "StableDiffusionXLPipeline".into();
        index["force_zeros_for_empty_prompt"] = true.into();
        index["text_encoder_2"] = json!(["transformers", "CLIPTextModelWithProjection"]);
        index["tokenizer_2"] = index["tokenizer"].clone();
        for idle in ["safety_checker", "requires_safety_checker"] {
            index.as_object_mut().map(|index| index.remove(idle));
        }
    }
    configs.extend([
        ("model_index.json", index),
        ("unet/config.json", unet),
        ("vae/config.json", vae),
        ("text_encoder/config.json", text_encoder),
    ]);
    Ok(configs)
}

fn unet_config(w: &Weights, generation: Generation) -> Result<Json> {
    // (channels, layers, transformer layers) of each block on the way down
    let mut blocks: Vec<(usize, usize, usize)> = Vec::new();
    let mut new_block = true;
    for i in 1.. {
        if w.contains(&format!("input_blocks.{i}.0.op.weight")) {
            new_block = true;
            continue;
        }
        let convolution = format!("input_blocks.{i}.0.in_layers.2.weight");
        if !w.contains(&convolution) {
            break;
        }
        let channels = axis(w, &convolution, 0)?;
        let depth = count(w, |j| format!("input_blocks.{i}.1.transformer_blocks.{j}.attn1.to_q.weight"));
        match blocks.last_mut() {
            Some(block) if !new_block => block.1 += 1,
            _ => blocks.push((channels, 1, depth)),
        }
        new_block = false;
    }
    let attending = blocks.iter().position(|block| block.2 > 0);
    let (Some(attending), Some(&(_, layers, _))) = (attending, blocks.first()) else {
        bail!("{}: the UNet attends to no text: this is no Stable Diffusion 1.x, 2.x or XL model", w.file());
    };
    ensure!(
        blocks.iter().all(|block| block.1 == layers),
        "{}: the UNet's blocks have different numbers of layers: this is no Stable Diffusion 1.x, 2.x or XL model",
        w.file()
    );
    let first: usize = 1 + attending * (layers + 1);
    let transformer = format!("input_blocks.{first}.1");
    let channels: Vec<usize> = blocks.iter().map(|block| block.0).collect();
    let kinds = |with: &str, without: &str| -> Vec<String> {
        blocks.iter().map(|block| if block.2 > 0 { with } else { without }.to_owned()).collect()
    };
    let up_block_types: Vec<String> = kinds("CrossAttnUpBlock2D", "UpBlock2D").into_iter().rev().collect();
    // a block without attention says 1, as in diffusers' configs
    let depths: Vec<usize> = blocks.iter().map(|block| block.2.max(1)).collect();
    let depth = if generation == Xl { json!(depths) } else { json!(blocks[attending].2) };
    let mut config = json!({
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "block_out_channels": channels,
        "center_input_sample": false,
        "cross_attention_dim": axis(w, &format!("{transformer}.transformer_blocks.0.attn2.to_k.weight"), 1)?,
        "down_block_types": kinds("CrossAttnDownBlock2D", "DownBlock2D"),
        "downsample_padding": 1,
        "flip_sin_to_cos": true,
        "freq_shift": 0,
        "in_channels": axis(w, "input_blocks.0.0.weight", 1)?,
        "layers_per_block": layers,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "out_channels": axis(w, "out.2.weight", 0)?,
        "transformer_layers_per_block": depth,
        "up_block_types": up_block_types,
        "use_linear_projection": w.shape(&format!("{transformer}.proj_in.weight")).is_some_and(|shape| shape.len() == 2),
    });
    if channels.iter().all(|c| c.is_multiple_of(32)) {
        config["norm_num_groups"] = 32.into();
    }
    // diffusers calls the number of heads so
    if generation == V1 && channels.iter().all(|c| c.is_multiple_of(8)) {
        config["attention_head_dim"] = 8.into();
    }
    if generation != V1 && channels.iter().all(|c| c.is_multiple_of(64)) {
        config["attention_head_dim"] = channels.iter().map(|c| c / 64).collect();
    }
    if generation == Xl {
        config["addition_embed_type"] = "text_time".into();
        config["projection_class_embeddings_input_dim"] = axis(w, "label_emb.0.0.weight", 1)?.into();
    }
    Ok(config)
}

fn vae_config(w: &Weights) -> Result<Json> {
    let levels = count(w, |i| format!("decoder.up.{i}.block.0.conv1.weight"));
    let channels: Vec<usize> =
        (0..levels).map(|i| axis(w, &format!("decoder.up.{i}.block.0.conv1.weight"), 0)).collect::<Result<_>>()?;
    let layers = count(w, |i| format!("decoder.up.0.block.{i}.conv1.weight")).saturating_sub(1);
    let mut config = json!({
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": channels,
        "down_block_types": vec!["DownEncoderBlock2D"; levels],
        "in_channels": 3,
        "latent_channels": axis(w, "decoder.conv_in.weight", 1)?,
        "layers_per_block": layers,
        "mid_block_add_attention": names::has_attention(w),
        "out_channels": axis(w, "decoder.conv_out.weight", 0)?,
        "sample_size": 64 << levels.saturating_sub(1),
        "scaling_factor": 0.18215,
        "up_block_types": vec!["UpDecoderBlock2D"; levels],
        "use_post_quant_conv": w.contains("post_quant_conv.weight"),
        "use_quant_conv": w.contains("quant_conv.weight"),
    });
    if channels.iter().all(|c| c.is_multiple_of(32)) {
        config["norm_num_groups"] = 32.into();
    }
    Ok(config)
}

/// `w` is at `text_model`.
fn clip_config(w: &Weights) -> Result<Json> {
    let layers = count(w, |i| format!("encoder.layers.{i}.layer_norm1.weight"));
    let mlp = axis(w, "encoder.layers.0.mlp.fc1.weight", 0)?;
    text_config(
        w,
        "embeddings.token_embedding.weight",
        "embeddings.position_embedding.weight",
        layers,
        mlp,
        "quick_gelu",
    )
}

/// `cut`: without the last layer of a whole tower, which ends in a projection; Stable Diffusion 2.x reads the one before.
fn open_clip_config(w: &Weights, cut: bool) -> Result<Json> {
    let all = count(w, |i| format!("transformer.resblocks.{i}.ln_1.weight"));
    let layers = if cut && w.contains("text_projection") { all.saturating_sub(1) } else { all };
    let mlp = axis(w, "transformer.resblocks.0.mlp.c_fc.weight", 0)?;
    text_config(w, "token_embedding.weight", "positional_embedding", layers, mlp, "gelu")
}

fn text_config(w: &Weights, tokens: &str, positions: &str, layers: usize, mlp: usize, act: &str) -> Result<Json> {
    let (vocabulary, width) = (axis(w, tokens, 0)?, axis(w, tokens, 1)?);
    ensure!(layers > 0 && vocabulary > 1, "{}: the text encoder has {layers} layers", w.file());
    let mut config = json!({
        "architectures": ["CLIPTextModel"],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "hidden_act": act,
        "hidden_size": width,
        "intermediate_size": mlp,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": axis(w, positions, 0)?,
        "model_type": "clip_text_model",
        "num_hidden_layers": layers,
        "projection_dim": width,
        "vocab_size": vocabulary,
    });
    if width.is_multiple_of(64) {
        config["num_attention_heads"] = (width / 64).into();
    }
    Ok(config)
}

fn scheduler(prediction_type: &str) -> Json {
    json!({
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": false,
        "num_train_timesteps": 1000,
        "prediction_type": prediction_type,
        "set_alpha_to_one": false,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    })
}

/// Takes the configs of another pipeline's folder, and says where they are not what the file looks like.
fn replace_configs(configs: &mut HashMap<&'static str, Json>, folder: &Source) -> Result<()> {
    for (path, recognised) in configs.iter_mut() {
        if *path == "model_index.json" {
            continue;
        }
        let config: Map<String, Json> = folder.read_json(path).context("model.config")?;
        for (key, said) in &config {
            let seen = &recognised[key.as_str()];
            // the file is one size for all, and the class of a scheduler does not matter
            if !seen.is_null() && !key.starts_with('_') && key != "sample_size" && said != seen && !is_text_detail(key)
            {
                note!(
                    "warning: model.config has `{key}` = {said} in {path}, the file looks like {seen}; the config counts"
                );
            }
        }
        *recognised = Json::Object(config);
    }
    Ok(())
}

/// Keys that this program writes into a text encoder's config for completeness, and that change no hidden state.
fn is_text_detail(key: &str) -> bool {
    ["bos_token_id", "eos_token_id", "architectures", "projection_dim", "model_type"].contains(&key)
}

/// # Errors
/// Names the keys that only `model.config` can give.
fn complete(configs: &HashMap<&'static str, Json>, label: &str) -> Result<()> {
    for (path, key) in [
        ("unet/config.json", "attention_head_dim"),
        ("unet/config.json", "norm_num_groups"),
        ("vae/config.json", "norm_num_groups"),
        ("text_encoder/config.json", "num_attention_heads"),
        ("text_encoder_2/config.json", "num_attention_heads"),
    ] {
        ensure!(
            configs.get(path).is_none_or(|config| !config[key].is_null()),
            "{label} is not of Stable Diffusion 1.x's, 2.x's or XL's size, so its `{key}` ({path}) cannot be told from the shapes: \
             set model.config to a pipeline's folder or hub id with the configs of this model"
        );
    }
    Ok(())
}

/// The tensors of each part under diffusers' names.
fn rename(
    w: &Weights,
    vae: &Weights,
    generation: Generation,
    configs: &HashMap<&'static str, Json>,
) -> Result<HashMap<&'static str, Weights>> {
    let number =
        |path: &str, key: &str| configs.get(path).and_then(|config| config[key].as_u64()).unwrap_or(1) as usize;
    // the file's own layers, which a wrong config does not rename
    let unet_layers = unet_config(&w.pp(UNET), generation)?["layers_per_block"].as_u64().unwrap_or(2) as usize;
    let unet = names::all(&w.pp(UNET), |name| Some(names::unet(name, unet_layers)))?;
    let clip = |prefix: &str| {
        let w = names::clip_root(w, prefix);
        let names = w.names().into_iter().filter(|name| !name.ends_with("position_ids"));
        let renamed = |from: String| Renamed { to: format!("text_model.{from}"), from, ..Default::default() };
        w.renamed(&names.map(renamed).collect::<Vec<_>>())
    };
    let open_clip = |prefix: &str, folder: &str| {
        let w = w.pp(prefix);
        let mut names = open_clip::text(&w, number(&format!("{folder}/config.json"), "num_hidden_layers"))?;
        names.extend((generation == Xl).then(open_clip::text_projection));
        w.renamed(&names)
    };
    let text_encoder = match generation {
        V1 => clip(CLIP)?,
        V2 => open_clip(OPEN_CLIP, "text_encoder")?,
        Xl => clip(XL_CLIP)?,
    };
    let mut parts = HashMap::from([
        ("unet", w.pp(UNET).renamed(&unet)?),
        ("vae", vae.renamed(&vae_names(vae)?)?),
        ("text_encoder", text_encoder),
    ]);
    if generation == Xl {
        parts.insert("text_encoder_2", open_clip(XL_OPEN_CLIP, "text_encoder_2")?);
    }
    Ok(parts)
}

/// diffusers' names of a VAE's tensors.
fn vae_names(vae: &Weights) -> Result<Vec<Renamed>> {
    let levels = count(vae, |i| format!("decoder.up.{i}.block.0.conv1.weight"));
    let names = names::all(vae, |name| names::vae(name, levels))?;
    Ok(names.into_iter().map(|renamed| names::attention_as_linear(vae, renamed)).collect())
}

/// The VAE in a file beside the model's, which counts before the one inside: `x.vae.safetensors` for `x.safetensors`, as in
/// AUTOMATIC1111's web interface. Says so.
///
/// # Errors
/// It is no VAE in the original layout.
fn vae_beside(path: &Path) -> Result<Option<Weights>> {
    let names = ["safetensors", "pt", "ckpt"].map(|extension| path.with_extension(format!("vae.{extension}")));
    let Some(file) = names.into_iter().find(|file| file.is_file()) else { return Ok(None) };
    let place = || format!("{} is taken for the VAE of {}; move it away if it is none", file.display(), path.display());
    let weights = Weights::open_file(&file).with_context(place)?;
    let inner = weights.pp(VAE);
    let vae = if has(&inner) { inner } else { weights };
    let is_vae = vae.contains("decoder.conv_in.weight") && vae.contains("decoder.up.0.block.0.conv1.weight");
    ensure!(is_vae, "{}: it is no VAE in the original layout (`decoder.up.0.*`)", place());
    note!(
        "warning: the VAE in {} is used, which lies beside {}; move it away to use the one inside, if there is one",
        file.display(),
        path.display()
    );
    Ok(Some(vae))
}

/// Of `model.tokenizer`, of `model.config`, beside the file, or CLIP's own from the hub.
fn find_tokenizer(path: &Path, model: &ModelConfig, folder: Option<&Source>) -> Result<Source> {
    let is_tokenizer = |source: &Source| -> Result<bool> {
        Ok(source.find("tokenizer.json")?.is_some() || source.find("vocab.json")?.is_some())
    };
    if let Some(spec) = &model.tokenizer {
        let source = Source::open(spec).context("model.tokenizer")?;
        let inner = source.sub("tokenizer");
        return Ok(if !is_tokenizer(&source)? && is_tokenizer(&inner)? { inner } else { source });
    }
    if let Some(folder) = folder {
        let inner = folder.sub("tokenizer");
        if is_tokenizer(&inner)? {
            return Ok(inner);
        }
    }
    let beside = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if let Some(beside) = beside.to_str() {
        let beside = Source::open(beside)?;
        for source in [beside.sub("tokenizer"), beside] {
            if is_tokenizer(&source)? {
                return Ok(source);
            }
        }
    }
    let hub = Source::open(TOKENIZER)?;
    let found =
        is_tokenizer(&hub).and_then(|found| if found { Ok(hub.clone()) } else { Err(hub.missing("vocab.json")) });
    found.with_context(|| {
        format!(
            "{} has no tokenizer, as no single file has: set model.tokenizer to a folder with CLIP's vocab.json and \
             merges.txt (any Stable Diffusion pipeline's `tokenizer`), or put that folder beside the file, or let \
             {TOKENIZER} be downloaded",
            path.display()
        )
    })
}

impl PredictionType {
    fn as_str(self) -> &'static str {
        match self {
            Self::Epsilon => "epsilon",
            Self::VPrediction => "v_prediction",
        }
    }
}

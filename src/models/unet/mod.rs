//! `UNet2DConditionModel`: the noise prediction of Stable Diffusion 1.x and 2.x.
//!
//! Rombach et al. 2022; the structure and every key are diffusers'. The weights are frozen; the adapters of the
//! attention layers are an argument.

mod blocks;
mod config;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use candle_core::Tensor;

pub(super) use blocks::Resnet;
pub use config::{PerBlock, UnetConfig};

use super::parameters::{conv2d, from_inside, group_norm, linear, to_inside};
use super::staged::{Staged, Step, Trace};
use super::{Source, Weights};
use crate::config::Checkpointing;
use crate::lora::{Adapters, Target};
use crate::nn::lora::LoraGradients;
use crate::nn::{Linear, LoraValues, Value};
use crate::ops::activation::{Activation, activation_fwd};
use crate::ops::conv2d::Images;
use crate::ops::device::Compute;
use crate::ops::replay::Replay;
pub use blocks::Text;
use blocks::{Evaluation, Transformer, UnetStage};

/// A frozen UNet.
pub struct Unet {
    config: UnetConfig,
    compute: Compute,
    time_embedding: [Linear; 2],
    /// SiLU of the time embedding by the timestep's bits, as far as it was asked for; on a GPU only.
    times: Mutex<HashMap<u64, Tensor>>,
    stages: Staged<UnetStage>,
}

impl Unet {
    /// Loads `config.json` and `diffusion_pytorch_model*.safetensors` of a `unet` folder.
    ///
    /// # Errors
    /// A missing or unreadable file, a configuration that is not a Stable Diffusion UNet's, a tensor of another shape.
    pub fn load(source: &Source, variant: Option<&str>, compute: &Compute) -> Result<Self> {
        let mut config: UnetConfig = source.read_json("config.json")?;
        config.repair(&source.label());
        config.no_mid_block = source.has_null("config.json", "mid_block_type")?;
        let weights = Weights::open(source, "diffusion_pytorch_model", variant)?.on(compute);
        Self::new(config, &weights)
    }

    pub fn new(config: UnetConfig, w: &Weights) -> Result<Self> {
        config.check()?;
        let channels = &config.block_out_channels;
        let time_dim = config.time_embedding_dim.unwrap_or(4 * channels[0]);
        let time_embedding = [
            linear(&w.pp("time_embedding.linear_1"), channels[0], time_dim, true)?,
            linear(&w.pp("time_embedding.linear_2"), time_dim, time_dim, true)?,
        ];
        let steps = build(&config, w, time_dim)?;
        Ok(Self {
            config,
            compute: w.compute().clone(),
            time_embedding,
            times: Mutex::default(),
            stages: Staged { steps },
        })
    }

    pub fn config(&self) -> &UnetConfig {
        &self.config
    }

    /// What it computes on. Latents, predictions and cotangents are f32 all the same.
    pub fn compute(&self) -> &Compute {
        &self.compute
    }

    /// The layers that can be adapted: all linear layers and 1x1 convolutions of the transformers.
    pub fn targets(&self) -> Vec<Target> {
        let mut targets = Vec::new();
        for step in &self.stages.steps {
            let UnetStage::Transformer(transformer) = &step.stage else { continue };
            for (module, layer) in transformer.adaptable() {
                let convolution = !self.config.use_linear_projection
                    && (module.ends_with(".proj_in") || module.ends_with(".proj_out"));
                let (in_features, out_features) = (layer.in_features(), layer.out_features());
                targets.push(Target { module, in_features, out_features, convolution });
            }
        }
        targets
    }

    /// The prediction: x (B, C, h, w) latents, one timestep for all, context (B, tokens, D) -> (B, C, h, w).
    pub fn forward(&self, x: &Tensor, timestep: f64, context: &Tensor, adapters: &Adapters) -> Result<Tensor> {
        self.forward_with(x, timestep, &Text::of(context), adapters)
    }

    /// What the attentions make of prompt embeddings (B, tokens, D) under these adapters, for the steps of a chain.
    pub fn project_text(&self, context: &Tensor, adapters: &Adapters) -> Result<Text> {
        self.check_text(context)?;
        let (context_value, lora) = (Value::constant(context), LoraValues::constant(adapters));
        let transformers = self.stages.steps.iter().filter_map(|step| match &step.stage {
            UnetStage::Transformer(transformer) => Some(transformer),
            _ => None,
        });
        let projected = transformers.flat_map(|transformer| transformer.project(&context_value, &lora));
        Ok(Text { projected: Arc::new(projected.collect::<Result<_>>()?), ..Text::of(context) })
    }

    /// [`Self::forward`] with the text as [`Self::project_text`] gave it for the same adapters.
    pub fn forward_with(&self, x: &Tensor, timestep: f64, text: &Text, adapters: &Adapters) -> Result<Tensor> {
        let evaluation = self.evaluation(x, timestep, text)?;
        let x = to_inside(x, &self.compute)?;
        let y = match &text.replay {
            Some(replay) => replay.run(&[&x, &evaluation.time]),
            None => self.stages.forward(x, &evaluation, adapters),
        };
        Ok(from_inside(&y.context("in the UNet")?)?)
    }

    /// Records the evaluation of latents like x (B, C, h, w) on a GPU, so that [`Self::forward_with`] launches it as one
    /// with the text that is returned. The same evaluation must have run before.
    ///
    /// # Errors
    /// The driver's.
    pub fn capture(&self, x: &Tensor, timestep: f64, text: &Text, adapters: &Adapters) -> Result<Text> {
        let evaluation = self.evaluation(x, timestep, text)?;
        let x = to_inside(x, &self.compute)?;
        let (b, h, w, _) = x.dims4()?;
        let projected = text.projected.values().flat_map(|(k, v)| [k.clone(), v.clone()]);
        let keep = projected.chain(adapters.tensors()).chain([text.context.clone()]).collect();
        let replay = Replay::capture(&[&x, &evaluation.time], (b, h, w, self.config.out_channels), keep, |inputs| {
            let evaluation = Evaluation { time: inputs[1].clone(), text: text.clone() };
            self.stages.forward(inputs[0].clone(), &evaluation, adapters)
        })?;
        Ok(Text { replay: Some(Arc::new(replay)), ..text.clone() })
    }

    /// [`Self::forward`], keeping what its pullback needs.
    pub fn trace<'a>(
        &'a self,
        x: &Tensor,
        timestep: f64,
        context: &Tensor,
        adapters: &'a Adapters,
        checkpointing: Checkpointing,
    ) -> Result<UnetTrace<'a>> {
        let evaluation = self.evaluation(x, timestep, &Text::of(context))?;
        let trace = self
            .stages
            .trace(to_inside(x, &self.compute)?, &evaluation, adapters, checkpointing)
            .context("in the UNet")?;
        let prediction = from_inside(trace.output())?;
        Ok(UnetTrace { trace, prediction, compute: &self.compute })
    }

    /// The batch size of prompt embeddings that fit this UNet.
    fn check_text(&self, context: &Tensor) -> Result<usize> {
        let (batch, _, context_dim) = context.dims3()?;
        if let PerBlock::One(expected) = self.config.cross_attention_dim
            && expected != context_dim
        {
            bail!(
                "the UNet attends to text of {expected} features, the text encoder gives {context_dim}: they belong to different models"
            );
        }
        Ok(batch)
    }

    fn evaluation(&self, x: &Tensor, timestep: f64, text: &Text) -> Result<Evaluation> {
        let (batch, channels, _, _) = x.dims4()?;
        let context_batch = self.check_text(&text.context)?;
        if channels != self.config.in_channels {
            bail!("the UNet takes latents of {} channels, got {channels}", self.config.in_channels);
        }
        if context_batch != batch {
            bail!("{batch} latents with {context_batch} prompt embeddings");
        }
        Ok(Evaluation { time: self.time(timestep)?, text: text.clone() })
    }

    /// SiLU of the time embedding, (1, time_dim). On a GPU it is kept: what is uploaded may wait for what was launched.
    fn time(&self, timestep: f64) -> Result<Tensor> {
        if self.compute.device().is_cpu() {
            return self.embed_time(timestep);
        }
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(time) = times.get(&timestep.to_bits()) {
            return Ok(time.clone());
        }
        let time = self.embed_time(timestep)?;
        times.insert(timestep.to_bits(), time.clone());
        Ok(time)
    }

    fn embed_time(&self, timestep: f64) -> Result<Tensor> {
        let embedding = timestep_embedding(
            timestep,
            self.config.block_out_channels[0],
            self.config.flip_sin_to_cos,
            self.config.freq_shift,
        )?;
        let [first, second] = &self.time_embedding;
        let hidden = first.forward(&Value::from(self.compute.put(&embedding)?))?.into_tensor();
        let embedding = second.forward(&Value::from(activation_fwd(&hidden, Activation::Silu)?))?.into_tensor();
        // every resnet applies SiLU to it before its own projection
        Ok(activation_fwd(&embedding, Activation::Silu)?)
    }
}

/// A prediction that can be pulled back once.
pub struct UnetTrace<'a> {
    trace: Trace<'a, UnetStage>,
    prediction: Tensor,
    compute: &'a Compute,
}

impl UnetTrace<'_> {
    /// (B, C, h, w)
    pub fn prediction(&self) -> &Tensor {
        &self.prediction
    }

    /// The gradient with respect to x of <cotangent, prediction>; those of the adapters are added to `sum`.
    pub fn pull(self, cotangent: &Tensor, sum: &mut LoraGradients) -> Result<Tensor> {
        let dx = self.trace.pull(to_inside(cotangent, self.compute)?, sum).context("in the UNet")?;
        Ok(from_inside(&dx)?)
    }
}

/// Sinusoidal embedding of a timestep, (1, dim), in f32 as diffusers computes it (Vaswani et al. 2017).
fn timestep_embedding(timestep: f64, dim: usize, flip_sin_to_cos: bool, freq_shift: f64) -> Result<Tensor> {
    let half = dim / 2;
    let angle = |i: usize| {
        let exponent = -(10_000f64.ln() as f32) * i as f32 / (half as f64 - freq_shift) as f32;
        timestep as f32 * (f64::from(exponent).exp() as f32)
    };
    let sin = (0..half).map(|i| f64::from(angle(i)).sin() as f32);
    let cos = (0..half).map(|i| f64::from(angle(i)).cos() as f32);
    let mut embedding: Vec<f32> = if flip_sin_to_cos { cos.chain(sin).collect() } else { sin.chain(cos).collect() };
    embedding.resize(dim, 0.0); // an odd dimension ends in a zero
    Ok(Tensor::from_vec(embedding, (1, dim), &candle_core::Device::Cpu)?)
}

/// The stages in the order in which diffusers runs them.
fn build(config: &UnetConfig, w: &Weights, time_dim: usize) -> Result<Vec<Step<UnetStage>>> {
    let channels = &config.block_out_channels;
    let blocks = channels.len();
    let mut steps = Vec::new();
    let mut push = |name: String, stage, pops, pushes| steps.push(Step { name, stage, pops, pushes });
    let at = |name: &str, block: usize| w.pp(name).for_images(images(block));
    let resnet = |name: &str, block, inputs, outputs| -> Result<UnetStage> {
        let w = at(name, block);
        let resnet = Resnet::load(&w, inputs, outputs, Some(time_dim), config.norm_num_groups, config.norm_eps);
        Ok(UnetStage::Resnet(resnet?))
    };
    let transformer = |name: &str, channels, block| -> Result<UnetStage> {
        let depth = config.transformer_layers_per_block.at(block).unwrap_or(1);
        let context = config.cross_attention_dim.at(block).unwrap_or(1280);
        Ok(UnetStage::Transformer(Transformer::load(
            &w.pp(name),
            name,
            channels,
            context,
            config.heads(block),
            depth,
            config.norm_num_groups,
        )?))
    };

    push(
        "conv_in".into(),
        UnetStage::Conv(conv2d(&w.pp("conv_in"), config.in_channels, channels[0], 3, 1, 1)?),
        false,
        true,
    );
    // channels of the skip connections, in the order in which they are pushed
    let mut skips = vec![channels[0]];
    let mut current = channels[0];
    for (block, kind) in config.down_block_types.iter().enumerate() {
        let cross = has_attention(kind, "CrossAttnDownBlock2D", "DownBlock2D")?;
        for layer in 0..config.layers_per_block.at(block).unwrap_or(2) {
            let name = format!("down_blocks.{block}.resnets.{layer}");
            push(name.clone(), resnet(&name, block, current, channels[block])?, false, !cross);
            current = channels[block];
            if cross {
                let name = format!("down_blocks.{block}.attentions.{layer}");
                push(name.clone(), transformer(&name, current, block)?, false, true);
            }
            skips.push(current);
        }
        if block + 1 < blocks {
            let name = format!("down_blocks.{block}.downsamplers.0.conv");
            let conv = conv2d(&w.pp(&name), current, current, 3, 2, config.downsample_padding)?;
            push(name, UnetStage::Conv(conv), false, true);
            skips.push(current);
        }
    }

    let last = blocks - 1;
    let depth = config.transformer_layers_per_block.at(last).unwrap_or(1);
    // distilled models have none (BK-SDM's small and tiny ones)
    if !config.no_mid_block {
        push("mid_block.resnets.0".into(), resnet("mid_block.resnets.0", last, current, current)?, false, false);
        if depth > 0 {
            push("mid_block.attentions.0".into(), transformer("mid_block.attentions.0", current, last)?, false, false);
        }
        push("mid_block.resnets.1".into(), resnet("mid_block.resnets.1", last, current, current)?, false, false);
    }

    for (up, kind) in config.up_block_types.iter().enumerate() {
        let block = last - up;
        let cross = has_attention(kind, "CrossAttnUpBlock2D", "UpBlock2D")?;
        for layer in 0..=config.layers_per_block.at(block).unwrap_or(2) {
            let skip = skips.pop().context("unet/config.json: more layers on the way up than on the way down")?;
            let name = format!("up_blocks.{up}.resnets.{layer}");
            push(name.clone(), resnet(&name, block, current + skip, channels[block])?, true, false);
            current = channels[block];
            if cross {
                let name = format!("up_blocks.{up}.attentions.{layer}");
                push(name.clone(), transformer(&name, current, block)?, false, false);
            }
        }
        if up + 1 < blocks {
            let name = format!("up_blocks.{up}.upsamplers.0.conv");
            let conv = conv2d(&at(&name, block - 1), current, current, 3, 1, 1)?;
            push(name, UnetStage::Upsample(conv), false, false);
        }
    }
    let norm = group_norm(&w.pp("conv_norm_out"), current, config.norm_num_groups, config.norm_eps, true)?;
    let conv = conv2d(&w.pp("conv_out"), current, config.out_channels, 3, 1, 1)?;
    push("conv_out".into(), UnetStage::Out(norm, conv), false, false);
    Ok(steps)
}

/// What the convolutions of a block meet: from the third block on, a sixteenth of the latents' pixels or less.
fn images(block: usize) -> Images {
    if block < 2 { Images::Any } else { Images::Small }
}

fn has_attention(kind: &str, with: &str, without: &str) -> Result<bool> {
    match kind {
        kind if kind == with => Ok(true),
        kind if kind == without => Ok(false),
        other => bail!("unet/config.json: block type `{other}` is not supported (only {with} and {without})"),
    }
}

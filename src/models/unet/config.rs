//! `unet/config.json` of a diffusers pipeline.

use anyhow::{Result, bail};
use serde::Deserialize;
use serde_json::Value as Json;

/// A number for all blocks, or one for each.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(untagged)]
pub enum PerBlock {
    One(usize),
    Each(Vec<usize>),
}

impl PerBlock {
    pub fn at(&self, block: usize) -> Option<usize> {
        match self {
            Self::One(n) => Some(*n),
            Self::Each(list) => list.get(block).copied(),
        }
    }
    fn check(&self, blocks: usize, key: &str) -> Result<()> {
        match self {
            Self::Each(list) if list.len() != blocks => {
                bail!("unet/config.json: `{key}` has {} entries for {blocks} blocks", list.len())
            }
            _ => Ok(()),
        }
    }
}

/// Numbers that Stable Diffusion XL is told of a picture's size.
pub(super) const SIZES: usize = 6;

/// The keys that shape a `UNet2DConditionModel`, with diffusers' defaults.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct UnetConfig {
    pub sample_size: Option<PerBlock>,
    pub in_channels: usize,
    pub out_channels: usize,
    pub down_block_types: Vec<String>,
    pub up_block_types: Vec<String>,
    pub block_out_channels: Vec<usize>,
    pub layers_per_block: PerBlock,
    pub transformer_layers_per_block: PerBlock,
    pub cross_attention_dim: PerBlock,
    /// In Stable Diffusion's configs this is the number of heads, whatever its name says.
    pub attention_head_dim: PerBlock,
    pub num_attention_heads: Option<PerBlock>,
    pub use_linear_projection: bool,
    pub norm_num_groups: usize,
    pub norm_eps: f64,
    pub downsample_padding: usize,
    pub flip_sin_to_cos: bool,
    pub freq_shift: f64,
    pub time_embedding_dim: Option<usize>,
    /// `text_time`: Stable Diffusion XL's pooled text and sizes, added to the time embedding.
    pub addition_embed_type: Option<String>,
    /// Features of the sinusoids of each size.
    pub addition_time_embed_dim: Option<usize>,
    /// Of the pooled text and of the sinusoids of six sizes together.
    pub projection_class_embeddings_input_dim: Option<usize>,
    /// Whether there is no middle block: `"mid_block_type": null`, which is not the same as no such key.
    #[serde(skip)]
    pub no_mid_block: bool,
    /// Everything else, to refuse what would change the computation.
    #[serde(flatten)]
    pub rest: serde_json::Map<String, Json>,
}

impl Default for UnetConfig {
    fn default() -> Self {
        let names = |list: &[&str]| list.iter().map(ToString::to_string).collect();
        Self {
            sample_size: None,
            in_channels: 4,
            out_channels: 4,
            down_block_types: names(&[
                "CrossAttnDownBlock2D",
                "CrossAttnDownBlock2D",
                "CrossAttnDownBlock2D",
                "DownBlock2D",
            ]),
            up_block_types: names(&["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]),
            block_out_channels: vec![320, 640, 1280, 1280],
            layers_per_block: PerBlock::One(2),
            transformer_layers_per_block: PerBlock::One(1),
            cross_attention_dim: PerBlock::One(1280),
            attention_head_dim: PerBlock::One(8),
            num_attention_heads: None,
            use_linear_projection: false,
            norm_num_groups: 32,
            norm_eps: 1e-5,
            downsample_padding: 1,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            time_embedding_dim: None,
            addition_embed_type: None,
            addition_time_embed_dim: None,
            projection_class_embeddings_input_dim: None,
            no_mid_block: false,
            rest: serde_json::Map::new(),
        }
    }
}

impl UnetConfig {
    /// Heads of the attention in block `block`, counted from the top of the way down.
    pub fn heads(&self, block: usize) -> usize {
        self.num_attention_heads.as_ref().unwrap_or(&self.attention_head_dim).at(block).unwrap_or(1)
    }

    /// Features of what is added to the time embedding, and those of each size's sinusoids in it; nothing but in Stable
    /// Diffusion XL.
    ///
    /// # Errors
    /// The two are not given, or do not fit together.
    pub fn added(&self) -> Result<Option<(usize, usize)>> {
        if self.addition_embed_type.is_none() {
            return Ok(None);
        }
        let (input, sinusoids) = (self.projection_class_embeddings_input_dim, self.addition_time_embed_dim);
        match (input, sinusoids) {
            (Some(input), Some(size)) if size > 0 && size.checked_mul(SIZES).is_some_and(|all| all < input) => {
                Ok(Some((input, size)))
            }
            _ => bail!(
                "unet/config.json: `projection_class_embeddings_input_dim` = {input:?} must be more than six times `addition_time_embed_dim` = {sinusoids:?}"
            ),
        }
    }

    /// diffusers before 0.9 wrote the default of its class, 32, for models of 64 x 64 latents; its later pipelines take 64
    /// instead, and so does this. `label` is the folder.
    pub fn repair(&mut self, label: &str) {
        let version = self.rest.get("_diffusers_version").and_then(Json::as_str).unwrap_or_default();
        if let Some(PerBlock::One(size)) = self.sample_size
            && size < 64
            && is_before_0_9(version)
        {
            note!(
                "warning: {label}: config.json says sample_size = {size}, and was written by diffusers {version}, which did not know better; \
                 64 is taken, as diffusers does (sampler.height and sampler.width choose another size)"
            );
            self.sample_size = Some(PerBlock::One(64));
        }
    }

    /// # Errors
    /// A key whose value asks for a computation that is not implemented, or lists that do not fit together.
    pub fn check(&self) -> Result<()> {
        let blocks = self.block_out_channels.len();
        if blocks == 0 || self.down_block_types.len() != blocks || self.up_block_types.len() != blocks {
            bail!(
                "unet/config.json: {} block_out_channels, {} down_block_types, {} up_block_types: they must be equally many",
                blocks,
                self.down_block_types.len(),
                self.up_block_types.len()
            );
        }
        if self.downsample_padding != 1 {
            bail!("unet/config.json: `downsample_padding` = {} is not supported (only 1)", self.downsample_padding);
        }
        self.layers_per_block.check(blocks, "layers_per_block")?;
        self.transformer_layers_per_block.check(blocks, "transformer_layers_per_block")?;
        self.cross_attention_dim.check(blocks, "cross_attention_dim")?;
        self.attention_head_dim.check(blocks, "attention_head_dim")?;
        if let Some(heads) = &self.num_attention_heads {
            heads.check(blocks, "num_attention_heads")?;
        }
        match self.addition_embed_type.as_deref() {
            None | Some("text_time") => {}
            Some(other) => bail!("unet/config.json: `addition_embed_type` = {other} is not supported (only text_time)"),
        }
        if (0..blocks).any(|block| self.heads(block) == 0) {
            bail!("unet/config.json: `attention_head_dim` (the number of heads) contains 0");
        }
        let plain = [
            ("_class_name", Json::from("UNet2DConditionModel")),
            ("act_fn", Json::from("silu")),
            ("attention_type", Json::from("default")),
            ("center_input_sample", Json::from(false)),
            ("class_embed_type", Json::Null),
            ("num_class_embeds", Json::Null),
            ("conv_in_kernel", Json::from(3)),
            ("conv_out_kernel", Json::from(3)),
            ("cross_attention_norm", Json::Null),
            ("dual_cross_attention", Json::from(false)),
            ("encoder_hid_dim", Json::Null),
            ("encoder_hid_dim_type", Json::Null),
            ("mid_block_only_cross_attention", Json::Null),
            ("mid_block_type", Json::from("UNetMidBlock2DCrossAttn")),
            ("only_cross_attention", Json::from(false)),
            ("resnet_skip_time_act", Json::from(false)),
            ("resnet_time_scale_shift", Json::from("default")),
            ("reverse_transformer_layers_per_block", Json::Null),
            ("time_cond_proj_dim", Json::Null),
            ("time_embedding_act_fn", Json::Null),
            ("time_embedding_type", Json::from("positional")),
            ("timestep_post_act", Json::Null),
        ];
        for (key, supported) in plain {
            if let Some(found) = self.rest.get(key)
                && !found.is_null()
                && *found != supported
                && !(supported == "silu" && *found == "swish")
                && !((supported.is_null() || supported == false) && all_false(found))
            {
                bail!(
                    "unet/config.json: `{key}` = {found} is not supported (only {supported}): this is not the UNet of a Stable Diffusion 1.x, 2.x or XL model"
                );
            }
        }
        for key in ["mid_block_scale_factor", "resnet_out_scale_factor"] {
            if let Some(factor) = self.rest.get(key).and_then(Json::as_f64)
                && factor != 1.0
            {
                bail!("unet/config.json: `{key}` = {factor} is not supported (only 1)");
            }
        }
        Ok(())
    }
}

/// Whether a version such as `0.6.0` or `0.7.0.dev0` is below 0.9; what is no version is not.
fn is_before_0_9(version: &str) -> bool {
    let mut parts = version.trim_start_matches('v').split('.').map(|part| part.parse::<u32>().ok());
    let (major, minor) = (parts.next().flatten(), parts.next().flatten());
    major == Some(0) && minor.is_some_and(|minor| minor < 9)
}

/// Whether an option is off, for all blocks or block by block.
fn all_false(value: &Json) -> bool {
    match value {
        Json::Array(list) => list.iter().all(all_false),
        other => *other == false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_of_an_old_config_is_64() {
        let repaired = |version: &str, size: &str| {
            let text = format!(r#"{{"_diffusers_version": {version}, "sample_size": {size}}}"#);
            let mut config: UnetConfig = serde_json::from_str(&text).unwrap();
            config.repair("unet");
            config.sample_size.unwrap()
        };
        for (version, size, expected) in [
            ("0.2.4", 32, 64),
            ("0.8.1", 16, 64),
            ("0.7.0.dev0", 63, 64),
            ("0.8.0", 96, 96),
            ("0.9.0", 32, 32),
            ("0.9.0.dev0", 32, 32),
            ("0.14.0", 32, 32),
            ("1.2.0", 32, 32),
            ("unknown", 32, 32),
        ] {
            let found = repaired(&format!("\"{version}\""), &size.to_string());
            assert_eq!(found, PerBlock::One(expected), "{version} {size}");
        }
        assert_eq!(repaired("\"0.6.0\"", "[32, 48]"), PerBlock::Each(vec![32, 48]));
        assert_eq!(repaired("null", "32"), PerBlock::One(32));
    }
}

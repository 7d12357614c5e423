//! diffusers' and transformers' names for the tensors of the original layout.

use anyhow::{Context, Result};

use crate::models::Weights;
use crate::models::weights::Renamed;

/// Renames all tensors of a part. `rename` gives nothing for those to leave out, and no name for unknown ones.
///
/// # Errors
/// Names the first tensor that is not known.
pub(super) fn all(w: &Weights, rename: impl Fn(&str) -> Option<Option<String>>) -> Result<Vec<Renamed>> {
    let known = w.names().into_iter().filter_map(|from| {
        let to = rename(&from)?;
        let to = to.with_context(|| {
            format!(
                "{}: `{}.{from}` is not known: this is no Stable Diffusion 1.x, 2.x or XL model",
                w.file(),
                w.prefix()
            )
        });
        Some(to.map(|to| Renamed { from, to, ..Default::default() }))
    });
    known.collect()
}

/// `input_blocks.1.0.in_layers.0.weight` -> `down_blocks.0.resnets.0.norm1.weight`, for `layers` layers a block.
pub(super) fn unet(name: &str, layers: usize) -> Option<String> {
    let fixed = [
        ("time_embed.0.", "time_embedding.linear_1."),
        ("time_embed.2.", "time_embedding.linear_2."),
        ("label_emb.0.0.", "add_embedding.linear_1."),
        ("label_emb.0.2.", "add_embedding.linear_2."),
        ("input_blocks.0.0.", "conv_in."),
        ("out.0.", "conv_norm_out."),
        ("out.2.", "conv_out."),
        ("middle_block.1.", "mid_block.attentions.0."),
    ];
    if let Some((old, new)) = fixed.iter().find(|(old, _)| name.starts_with(old)) {
        return Some(name.replacen(old, new, 1));
    }
    let mut parts = name.splitn(4, '.');
    let (side, index) = (parts.next()?, parts.next()?.parse::<usize>().ok()?);
    let rest = &name[side.len() + 1..].split_once('.')?.1;
    if side == "middle_block" {
        return Some(format!("mid_block.resnets.{}.{}", index / 2, resnet(rest)?));
    }
    let (place, layer) = rest.split_once('.')?;
    let (blocks, index) = match side {
        "input_blocks" => ("down_blocks", index.checked_sub(1)?),
        "output_blocks" => ("up_blocks", index),
        _ => return None,
    };
    let (block, number) = (index / (layers + 1), index % (layers + 1));
    if let Some(convolution) = layer.strip_prefix("op.") {
        return Some(format!("{blocks}.{block}.downsamplers.0.conv.{convolution}"));
    }
    if let Some(convolution) = layer.strip_prefix("conv.") {
        return Some(format!("{blocks}.{block}.upsamplers.0.conv.{convolution}"));
    }
    match place {
        "0" => Some(format!("{blocks}.{block}.resnets.{number}.{}", resnet(layer)?)),
        "1" => Some(format!("{blocks}.{block}.attentions.{number}.{layer}")),
        _ => None,
    }
}

fn resnet(name: &str) -> Option<String> {
    let names = [
        ("in_layers.0.", "norm1."),
        ("in_layers.2.", "conv1."),
        ("emb_layers.1.", "time_emb_proj."),
        ("out_layers.0.", "norm2."),
        ("out_layers.3.", "conv2."),
        ("skip_connection.", "conv_shortcut."),
    ];
    names.iter().find_map(|(old, new)| Some(format!("{new}{}", name.strip_prefix(old)?)))
}

/// `decoder.up.3.block.0.nin_shortcut.weight` -> `decoder.up_blocks.0.resnets.0.conv_shortcut.weight`; nothing for what is
/// no part of the network (the loss of its training, averages), no name for what is not known.
pub(super) fn vae(name: &str, levels: usize) -> Option<Option<String>> {
    if name.starts_with("quant_conv.") || name.starts_with("post_quant_conv.") {
        return Some(Some(name.to_owned()));
    }
    let (side, rest) = name.split_once('.')?;
    if side != "encoder" && side != "decoder" {
        return None;
    }
    Some(vae_layer(rest, levels).map(|layer| format!("{side}.{layer}")))
}

fn vae_layer(name: &str, levels: usize) -> Option<String> {
    let fixed = [
        ("conv_in.", "conv_in."),
        ("conv_out.", "conv_out."),
        ("norm_out.", "conv_norm_out."),
        ("mid.block_1.", "mid_block.resnets.0."),
        ("mid.block_2.", "mid_block.resnets.1."),
    ];
    if let Some((old, new)) = fixed.iter().find(|(old, _)| name.starts_with(old)) {
        return Some(name.replacen(old, new, 1).replace("nin_shortcut", "conv_shortcut"));
    }
    if let Some(rest) = name.strip_prefix("mid.attn_1.") {
        let (layer, tensor) = rest.rsplit_once('.')?;
        let layer = match layer {
            "norm" | "group_norm" => "group_norm",
            "q" | "to_q" | "query" => "to_q",
            "k" | "to_k" | "key" => "to_k",
            "v" | "to_v" | "value" => "to_v",
            "proj_out" | "to_out.0" | "proj_attn" => "to_out.0",
            _ => return None,
        };
        return Some(format!("mid_block.attentions.0.{layer}.{tensor}"));
    }
    let mut parts = name.splitn(4, '.');
    let (side, level, kind, rest) = (parts.next()?, parts.next()?.parse::<usize>().ok()?, parts.next()?, parts.next()?);
    let blocks = match side {
        "down" => format!("down_blocks.{level}"),
        "up" => format!("up_blocks.{}", levels.checked_sub(level + 1)?),
        _ => return None,
    };
    match kind {
        "block" => Some(format!("{blocks}.resnets.{}", rest.replace("nin_shortcut", "conv_shortcut"))),
        "downsample" => Some(format!("{blocks}.downsamplers.0.{rest}")),
        "upsample" => Some(format!("{blocks}.upsamplers.0.{rest}")),
        _ => None,
    }
}

/// Whether the VAE has its attention, under any of the names that programs have given it.
pub(super) fn has_attention(w: &Weights) -> bool {
    w.names().iter().any(|name| name.starts_with("decoder.mid.attn_1."))
}

/// The projections of the VAE's attention are 1x1 convolutions in the original and linear layers in diffusers.
pub(super) fn attention_as_linear(w: &Weights, mut renamed: Renamed) -> Renamed {
    if renamed.to.contains(".mid_block.attentions.0.")
        && let Some([rows, columns, 1, 1]) = w.shape(&renamed.from).as_deref()
    {
        renamed.shape = Some(vec![*rows, *columns]);
    }
    renamed
}

/// transformers' text encoder at `text_model`, which some files leave out.
pub(super) fn clip_root(w: &Weights, prefix: &str) -> Weights {
    let inner = w.pp(prefix).pp("text_model");
    if inner.names().is_empty() { w.pp(prefix) } else { inner }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_unet_follow_its_layers() {
        for (old, new) in [
            ("time_embed.2.bias", "time_embedding.linear_2.bias"),
            ("label_emb.0.2.bias", "add_embedding.linear_2.bias"),
            ("input_blocks.0.0.weight", "conv_in.weight"),
            ("input_blocks.1.0.in_layers.0.weight", "down_blocks.0.resnets.0.norm1.weight"),
            ("input_blocks.2.1.proj_in.weight", "down_blocks.0.attentions.1.proj_in.weight"),
            ("input_blocks.3.0.op.weight", "down_blocks.0.downsamplers.0.conv.weight"),
            ("input_blocks.4.0.skip_connection.bias", "down_blocks.1.resnets.0.conv_shortcut.bias"),
            ("middle_block.0.emb_layers.1.weight", "mid_block.resnets.0.time_emb_proj.weight"),
            ("middle_block.1.norm.weight", "mid_block.attentions.0.norm.weight"),
            ("middle_block.2.out_layers.3.bias", "mid_block.resnets.1.conv2.bias"),
            ("output_blocks.2.1.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
            ("output_blocks.5.2.conv.weight", "up_blocks.1.upsamplers.0.conv.weight"),
            (
                "output_blocks.5.1.transformer_blocks.0.ff.net.2.bias",
                "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.2.bias",
            ),
            ("out.0.weight", "conv_norm_out.weight"),
        ] {
            assert_eq!(unet(old, 2).as_deref(), Some(new), "{old}");
        }
        for unknown in ["label_emb.1.0.weight", "input_blocks.1.3.weight", "input_blocks.x.0.weight", "out"] {
            assert_eq!(unet(unknown, 2), None, "{unknown}");
        }
    }

    #[test]
    fn names_of_the_vae_turn_its_levels_around() {
        for (old, new) in [
            ("post_quant_conv.weight", "post_quant_conv.weight"),
            ("decoder.up.3.block.2.nin_shortcut.weight", "decoder.up_blocks.0.resnets.2.conv_shortcut.weight"),
            ("decoder.up.1.upsample.conv.bias", "decoder.up_blocks.2.upsamplers.0.conv.bias"),
            ("encoder.down.3.block.0.norm1.weight", "encoder.down_blocks.3.resnets.0.norm1.weight"),
            ("encoder.down.0.downsample.conv.weight", "encoder.down_blocks.0.downsamplers.0.conv.weight"),
            ("encoder.mid.attn_1.proj_out.weight", "encoder.mid_block.attentions.0.to_out.0.weight"),
            ("decoder.mid.attn_1.norm.bias", "decoder.mid_block.attentions.0.group_norm.bias"),
            ("decoder.mid.attn_1.query.bias", "decoder.mid_block.attentions.0.to_q.bias"),
            ("decoder.norm_out.weight", "decoder.conv_norm_out.weight"),
        ] {
            assert_eq!(vae(old, 4), Some(Some(new.to_owned())), "{old}");
        }
        assert_eq!(vae("loss.logvar", 4), None);
        assert_eq!(vae("decoder.what.1", 4), Some(None));
    }
}

//! The keys of LoRA files: which layer and which factor each stands for.

use super::Format;
use crate::files::unwrapped;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    A,
    B,
    Alpha,
}

/// What a key stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// A factor of a layer inside the UNet, as diffusers names it.
    Unet {
        format: Format,
        module: String,
        part: Part,
    },
    /// Something of an adapter of a text encoder.
    TextEncoder,
    /// A word of textual inversion, which kohya's scripts can put into the same file.
    Embedding,
    /// Something of an adapter that is no plain LoRA; its kind.
    Other(&'static str),
    Unknown,
}

/// How adapters other than plain LoRA are recognised.
const OTHERS: [(&str, &str); 9] = [
    (".hada_", "LoHa (Hadamard products)"),
    (".lokr_", "LoKr (Kronecker products)"),
    (".dora_scale", "DoRA (its `dora_scale` rescales the weights)"),
    (".lora_magnitude_vector", "DoRA (its `lora_magnitude_vector` rescales the weights)"),
    (".lora_mid.", "LoCon with a core tensor (Tucker decomposition)"),
    (".oft_", "OFT (orthogonal matrices)"),
    (".diff", "whole differences of weights"),
    (".on_input", "IA3"),
    (".glora_", "GLoRA"),
];

/// The prefixes of text encoders' adapters: diffusers, then kohya for Stable Diffusion 1.x and 2.x, then for XL.
const TEXT_ENCODERS: [&str; 5] = ["text_encoder.", "text_encoder_2.", "lora_te_", "lora_te1_", "lora_te2_"];

pub(super) fn parse(key: &str) -> Key {
    let key = &unwrapped(key);
    // the whole original model around the UNet
    let key = key.strip_prefix("model.").filter(|rest| rest.starts_with("diffusion_model.")).unwrap_or(key);
    if key.starts_with("bundle_emb.") {
        return Key::Embedding;
    }
    if TEXT_ENCODERS.iter().any(|prefix| key.starts_with(prefix)) {
        return Key::TextEncoder;
    }
    if let Some((_, kind)) = OTHERS.iter().find(|(part, _)| key.contains(part)) {
        return Key::Other(kind);
    }
    let found = kohya(key).or_else(|| attention_processor(key)).or_else(|| peft(key));
    found.map_or(Key::Unknown, |(format, module, part)| Key::Unet { format, module, part })
}

/// The key of a layer's tensor in kohya's files, without `.lora_down.weight`, `.lora_up.weight` or `.alpha`. For Stable
/// Diffusion XL kohya's scripts keep the `original` layout's names.
pub(super) fn kohya_name(module: &str, original: bool) -> String {
    let name = if original { to_original(module) } else { None };
    format!("lora_unet_{}", name.as_deref().unwrap_or(module).replace('.', "_"))
}

/// `down_blocks.1.attentions.0.proj_in` -> `input_blocks.4.1.proj_in`: [`from_original`] for a transformer's layers.
fn to_original(module: &str) -> Option<String> {
    if let Some(layer) = module.strip_prefix("mid_block.attentions.0.") {
        return Some(format!("middle_block.1.{layer}"));
    }
    let (side, rest) = module.split_once("_blocks.")?;
    let (block, rest) = rest.split_once(".attentions.")?;
    let (number, layer) = rest.split_once('.')?;
    let index = 3 * block.parse::<usize>().ok()? + number.parse::<usize>().ok()?;
    match side {
        "down" => Some(format!("input_blocks.{}.1.{layer}", index + 1)),
        "up" => Some(format!("output_blocks.{index}.1.{layer}")),
        _ => None,
    }
}

/// The endings that name a factor; the first two are peft's.
const ENDINGS: [(&str, Part); 12] = [
    (".lora_A.weight", Part::A),
    (".lora_B.weight", Part::B),
    (".lora.down.weight", Part::A),
    (".lora.up.weight", Part::B),
    // the modules of older diffusers
    (".lora_layer.down.weight", Part::A),
    (".lora_layer.up.weight", Part::B),
    (".lora_linear_layer.down.weight", Part::A),
    (".lora_linear_layer.up.weight", Part::B),
    (".lora_down.weight", Part::A),
    (".lora_up.weight", Part::B),
    (".network_alpha", Part::Alpha),
    (".alpha", Part::Alpha),
];

fn ending<'a>(key: &'a str, endings: &[(&str, Part)]) -> Option<(&'a str, Part)> {
    endings.iter().find_map(|&(suffix, part)| Some((key.strip_suffix(suffix)?, part)))
}

/// kohya's scripts (`lora_unet_down_blocks_0_..`), LyCORIS for diffusers (`lycoris_`), and ComfyUI with the original names (`diffusion_model.input_blocks.1..`).
fn kohya(key: &str) -> Option<(Format, String, Part)> {
    let (name, part) = ending(key, &ENDINGS)?;
    let name = match ["lora_unet_", "lycoris_"].iter().find_map(|prefix| name.strip_prefix(prefix)) {
        Some(name) => dotted(name),
        None => name.strip_prefix("diffusion_model.")?.to_owned(),
    };
    Some((Format::Kohya, from_original(&name).unwrap_or(name), part))
}

/// `down_blocks_0_attentions_1_..._attn1_to_out_0` -> `down_blocks.0.attentions.1. ... .attn1.to_out.0`.
fn dotted(name: &str) -> String {
    /// The names that have an underscore themselves.
    const WORDS: [&str; 24] = [
        "down_blocks",
        "mid_block",
        "up_blocks",
        "transformer_blocks",
        "proj_in",
        "proj_out",
        "to_q",
        "to_k",
        "to_v",
        "to_out",
        "conv_in",
        "conv_out",
        "conv_shortcut",
        "time_emb_proj",
        "time_embedding",
        "linear_1",
        "linear_2",
        "input_blocks",
        "middle_block",
        "output_blocks",
        "in_layers",
        "out_layers",
        "emb_layers",
        "skip_connection",
    ];
    let (mut out, mut rest) = (String::new(), name);
    while !rest.is_empty() {
        let ends = |word: &str| rest.strip_prefix(word).is_some_and(|tail| tail.is_empty() || tail.starts_with('_'));
        let length = WORDS.iter().find(|word| ends(word)).map(|word| word.len());
        let (word, tail) = rest.split_at(length.or_else(|| rest.find('_')).unwrap_or(rest.len()));
        out.push_str(word);
        rest = match tail.strip_prefix('_') {
            Some(tail) => {
                out.push('.');
                tail
            }
            None => tail,
        };
    }
    out
}

/// `input_blocks.4.1.proj_in` -> `down_blocks.1.attentions.0.proj_in`, for two layers a block as Stable Diffusion has;
/// nothing for names that are diffusers' already.
fn from_original(name: &str) -> Option<String> {
    let mut parts = name.splitn(4, '.');
    let (side, block, place, layer) =
        (parts.next()?, parts.next()?.parse::<usize>().ok()?, parts.next()?, parts.next());
    // the middle has no number of its own: `middle_block.1.transformer_blocks..`
    if side == "middle_block" {
        let rest = layer.map_or(place.to_owned(), |layer| format!("{place}.{layer}"));
        let stage = ["resnets.0", "attentions.0", "resnets.1"].get(block)?;
        return Some(format!("mid_block.{stage}.{rest}"));
    }
    let (side, index) = match side {
        "input_blocks" => ("down_blocks", block.checked_sub(1)?),
        "output_blocks" => ("up_blocks", block),
        _ => return None,
    };
    let kind = match place {
        "0" => "resnets",
        "1" => "attentions",
        _ => return None,
    };
    Some(format!("{side}.{}.{kind}.{}.{}", index / 3, index % 3, layer?))
}

/// diffusers' older attention processors: `..attn1.processor.to_q_lora.down.weight`.
fn attention_processor(key: &str) -> Option<(Format, String, Part)> {
    const OLD: [(&str, Part); 4] = [
        ("_lora.down.weight", Part::A),
        ("_lora.up.weight", Part::B),
        ("_lora.network_alpha", Part::Alpha),
        ("_lora.alpha", Part::Alpha),
    ];
    let (_, rest) = without_prefix(key);
    let (module, part) = ending(rest, &OLD)?;
    let module = module.replace(".processor.", ".");
    let index = if module.ends_with(".to_out") { ".0" } else { "" };
    Some((Format::AttnProcs, module + index, part))
}

/// diffusers with `unet.` in front, peft without.
fn peft(key: &str) -> Option<(Format, String, Part)> {
    let (format, rest) = without_prefix(key);
    let rest = without_adapter_name(rest);
    let (module, part) = ending(&rest, &ENDINGS)?;
    Some((format, module.replace(".processor.", "."), part))
}

fn without_prefix(key: &str) -> (Format, &str) {
    let (format, rest) = match key.strip_prefix("unet.") {
        Some(rest) => (Format::Diffusers, rest),
        None => (Format::Peft, key),
    };
    (format, rest.strip_prefix("base_model.model.").unwrap_or(rest))
}

/// `to_q.lora_A.default.weight` -> `to_q.lora_A.weight`.
fn without_adapter_name(key: &str) -> String {
    let stripped = key.strip_suffix(".weight").and_then(|head| head.rsplit_once('.')).map(|(head, _)| head);
    match stripped {
        Some(head) if head.ends_with(".lora_A") || head.ends_with(".lora_B") => format!("{head}.weight"),
        _ => key.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::formats::Format::*;
    use Part::*;

    #[test]
    fn keys_are_parsed_in_every_spelling() {
        let attn = "down_blocks.0.attentions.0.transformer_blocks.0.attn1";
        let under = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1";
        let original = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1";
        for (key, format, layer, part) in [
            (format!("unet.{attn}.to_q.lora_A.weight"), Diffusers, "to_q", A),
            (format!("unet.{attn}.to_out.0.lora.up.weight"), Diffusers, "to_out.0", B),
            (format!("unet.{attn}.processor.to_v.lora.down.weight"), Diffusers, "to_v", A),
            (format!("unet.{attn}.to_q.alpha"), Diffusers, "to_q", Alpha),
            (format!("unet.base_model.model.{attn}.to_q.lora_A.weight"), Diffusers, "to_q", A),
            (format!("{attn}.to_q.lora_B.weight"), Peft, "to_q", B),
            (format!("{attn}.to_q.lora_B.default.weight"), Peft, "to_q", B),
            (format!("base_model.model.{attn}.to_out.0.lora_A.weight"), Peft, "to_out.0", A),
            (format!("{attn}.processor.to_q_lora.down.weight"), AttnProcs, "to_q", A),
            (format!("{attn}.processor.to_out_lora.up.weight"), AttnProcs, "to_out.0", B),
            (format!("unet.{attn}.processor.to_k_lora.network_alpha"), AttnProcs, "to_k", Alpha),
            (format!("{under}_to_q.lora_down.weight"), Kohya, "to_q", A),
            (format!("{under}_to_out_0.lora_up.weight"), Kohya, "to_out.0", B),
            (format!("{under}_to_k.alpha"), Kohya, "to_k", Alpha),
            (format!("{original}.to_v.lora_down.weight"), Kohya, "to_v", A),
            (format!("{original}.to_out.0.lora_B.weight"), Kohya, "to_out.0", B),
            (format!("model.{original}.to_out.0.lora_up.weight"), Kohya, "to_out.0", B),
            (format!("{}_to_v.lora_down.weight", under.replace("lora_unet", "lycoris")), Kohya, "to_v", A),
            (format!("unet.{attn}.to_q.lora_linear_layer.down.weight"), Diffusers, "to_q", A),
            (format!("{attn}.to_out.0.lora_layer.up.weight"), Peft, "to_out.0", B),
            (format!("_orig_mod.unet.{attn}.to_q.lora_A.weight"), Diffusers, "to_q", A),
            (format!("unet._orig_mod.{attn}.to_q.lora_A.weight"), Diffusers, "to_q", A),
            (format!("module._orig_mod.{attn}.to_q.lora_A.weight"), Peft, "to_q", A),
            (format!("base_model.model._orig_mod.{attn}._orig_mod.to_q.lora_B.weight"), Peft, "to_q", B),
            (format!("{}_to_q.lora_down.weight", under.replace("unet_", "unet__orig_mod_")), Kohya, "to_q", A),
        ] {
            assert_eq!(parse(&key), Key::Unet { format, module: format!("{attn}.{layer}"), part }, "{key}");
        }
    }

    #[test]
    fn names_of_kohya_and_of_the_original_layout_are_those_of_diffusers() {
        for (name, module) in [
            ("mid_block_attentions_0_proj_in", "mid_block.attentions.0.proj_in"),
            (
                "up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj",
                "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj",
            ),
            ("down_blocks_0_resnets_1_time_emb_proj", "down_blocks.0.resnets.1.time_emb_proj"),
            ("down_blocks_0_downsamplers_0_conv", "down_blocks.0.downsamplers.0.conv"),
            ("time_embedding_linear_1", "time_embedding.linear_1"),
            ("input_blocks_4_1_proj_in", "down_blocks.1.attentions.0.proj_in"),
            (
                "input_blocks_8_1_transformer_blocks_0_ff_net_2",
                "down_blocks.2.attentions.1.transformer_blocks.0.ff.net.2",
            ),
            (
                "middle_block_1_transformer_blocks_0_attn2_to_k",
                "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
            ),
            ("output_blocks_11_1_proj_out", "up_blocks.3.attentions.2.proj_out"),
            ("output_blocks_3_1_proj_out", "up_blocks.1.attentions.0.proj_out"),
        ] {
            let key = format!("lora_unet_{name}.lora_down.weight");
            assert_eq!(parse(&key), Key::Unet { format: Kohya, module: module.into(), part: A }, "{key}");
        }
    }

    #[test]
    fn kohyas_names_for_xl_are_the_original_ones() {
        for (module, name) in [
            (
                "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
                "input_blocks_4_1_transformer_blocks_1_attn1_to_q",
            ),
            ("down_blocks.2.attentions.1.proj_in", "input_blocks_8_1_proj_in"),
            (
                "mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0",
                "middle_block_1_transformer_blocks_9_attn2_to_out_0",
            ),
            (
                "up_blocks.0.attentions.2.transformer_blocks.0.ff.net.2",
                "output_blocks_2_1_transformer_blocks_0_ff_net_2",
            ),
            ("up_blocks.1.attentions.0.proj_out", "output_blocks_3_1_proj_out"),
        ] {
            assert_eq!(kohya_name(module, true), format!("lora_unet_{name}"));
            let key = format!("lora_unet_{name}.lora_down.weight");
            assert_eq!(parse(&key), Key::Unet { format: Kohya, module: module.into(), part: A });
        }
        assert_eq!(kohya_name("mid_block.attentions.0.proj_in", false), "lora_unet_mid_block_attentions_0_proj_in");
    }

    #[test]
    fn other_kinds_of_adapters_and_text_encoders_are_told_apart() {
        for key in ["text_encoder.x.lora_A.weight", "lora_te_x.hada_w1_a", "lora_te1_x.alpha", "lora_te2_x.alpha"] {
            assert_eq!(parse(key), Key::TextEncoder, "{key}");
        }
        for (key, kind) in [
            ("lora_unet_x.hada_w1_a", "LoHa"),
            ("lora_unet_x.lokr_w1", "LoKr"),
            ("lora_unet_x.dora_scale", "DoRA"),
            ("unet.x.to_q.lora_magnitude_vector", "DoRA"),
            ("lora_unet_x.lora_mid.weight", "LoCon"),
            ("lora_unet_x.diff_b", "differences"),
        ] {
            assert!(matches!(parse(key), Key::Other(found) if found.contains(kind)), "{key}");
        }
        assert_eq!(parse("bundle_emb.word.string_to_param.*"), Key::Embedding);
        for key in ["unet.x.to_q.weight", "unet.x.lora_B.bias", "what"] {
            assert_eq!(parse(key), Key::Unknown, "{key}");
        }
    }
}

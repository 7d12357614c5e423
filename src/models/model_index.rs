//! `model_index.json`: whether a pipeline is one of Stable Diffusion 1.x, 2.x or XL, by its parts more than by its name.

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value as Json};

use super::Source;

/// Parts that pipelines of other generations have and these have not.
const FOREIGN: [&str; 7] = ["text_encoder_3", "transformer", "prior", "prior_prior", "movq", "vqvae", "motion_adapter"];

/// Classes of other generations, whatever their index says of the parts.
const OTHERS: [&str; 2] = ["StableDiffusion3", "StableCascade"];

/// Stable Diffusion XL's second text encoder and tokenizer.
const SECOND: [&str; 2] = ["text_encoder_2", "tokenizer_2"];

/// The parts that are read; and those that change no picture here.
const READ: [&str; 7] = ["scheduler", "text_encoder", "tokenizer", "unet", "vae", SECOND[0], SECOND[1]];
const IDLE: [&str; 4] = ["safety_checker", "feature_extractor", "image_encoder", "watermark"];

/// What the index says of how a pipeline is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Index {
    /// Two text encoders, and sizes that the UNet is told of.
    pub xl: bool,
    /// diffusers' `force_zeros_for_empty_prompt`.
    pub zeros_for_no_prompt: bool,
}

/// Reads the index; a pipeline of another class with the usual parts is taken, with a warning.
///
/// # Errors
/// There is no index, or it is one of a model that this program does not compute; names the class and the part.
pub(super) fn check(source: &Source) -> Result<Index> {
    const FILE: &str = "model_index.json";
    let index: Map<String, Json> =
        source.read_json(FILE).context("a pipeline in the diffusers layout has a model_index.json")?;
    let place = format!("{}: {FILE}", source.label());
    let part = |name: &str| index.get(name).and_then(named);
    // a pipeline from a file of its own is [module, class]
    let class = index.get("_class_name").and_then(|said| said.as_str().or_else(|| named(said))).unwrap_or_default();
    let is_xl = class.starts_with("StableDiffusionXL");
    let xl = is_xl || part(SECOND[0]).is_some();
    // diffusers' own default is true
    let zeros = index.get("force_zeros_for_empty_prompt").and_then(Json::as_bool).unwrap_or(is_xl);
    let found = Index { xl, zeros_for_no_prompt: xl && zeros };
    if class.is_empty() {
        return Ok(found);
    }
    let only = "only Stable Diffusion 1.x, 2.x and XL is supported";
    if OTHERS.iter().any(|other| class.starts_with(other)) {
        bail!("{place}: it is a {class}; {only}");
    }
    if let Some((name, model)) = FOREIGN.iter().find_map(|name| Some((name, part(name)?))) {
        bail!("{place}: it is a {class} with a `{name}` ({model}); {only}");
    }
    for (name, usual) in [
        ("unet", &["UNet2DConditionModel"][..]),
        ("text_encoder", &["CLIPTextModel", "CLIPTextModelWithProjection"]),
        (SECOND[0], &["CLIPTextModelWithProjection", "CLIPTextModel"]),
    ] {
        let model = part(name).map(|model| model.strip_prefix("Flax").unwrap_or(model));
        if let Some(model) = model.filter(|model| !usual.contains(model)) {
            bail!("{place}: the `{name}` of this {class} is a {model}, not a {}; {only}", usual[0]);
        }
    }
    let needed = ["unet", "vae", "text_encoder"].into_iter().chain(SECOND.into_iter().filter(|_| xl));
    if let Some(name) = needed.into_iter().find(|name| part(name).is_none())
        && (xl || !is_usual(class))
    {
        let refiner =
            if xl && name == "text_encoder" { " (a refiner has none, and trains nothing by itself)" } else { "" };
        bail!("{place}: it is a {class} without a `{name}`{refiner}; {only}");
    }
    if is_usual(class) || class == "StableDiffusionXLPipeline" {
        return Ok(found);
    }
    let known = |name: &&String| READ.contains(&name.as_str()) || IDLE.contains(&name.as_str());
    let unread: Vec<&str> =
        index.iter().filter(|(name, said)| !known(name) && named(said).is_some()).map(|(name, _)| &**name).collect();
    let unread = if unread.is_empty() { String::new() } else { format!("; not read: {}", unread.join(", ")) };
    let usual = if xl { "StableDiffusionXLPipeline" } else { "StableDiffusionPipeline" };
    note!("warning: {place}: it is a {class}, whose parts are read as those of a {usual}{unread}");
    Ok(found)
}

fn is_usual(class: &str) -> bool {
    class.starts_with("StableDiffusionPipeline") || class == "AlignPropPipeline"
}

/// The class of `[module, class]`; nothing for `[null, null]` and for settings.
fn named(said: &Json) -> Option<&str> {
    said.as_array().filter(|pair| pair.len() == 2)?[1].as_str()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(class: &str, parts: &str) -> Result<(), String> {
        index(class, parts).map(drop)
    }

    fn index(class: &str, parts: &str) -> Result<Index, String> {
        let folder = tempfile::tempdir().unwrap();
        let usual = r#""scheduler": ["diffusers", "DDIMScheduler"], "tokenizer": ["transformers", "CLIPTokenizer"], "safety_checker": [null, null],
            "text_encoder": ["transformers", "CLIPTextModel"], "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]"#;
        let text = format!(r#"{{"_class_name": {class}, {usual}{parts}}}"#);
        std::fs::write(folder.path().join("model_index.json"), text).unwrap();
        check(&Source::open(folder.path().to_str().unwrap()).unwrap()).map_err(|e| format!("{e:#}"))
    }

    #[test]
    fn pipelines_of_the_usual_parts_are_taken_whatever_their_class() {
        for class in [
            r#""StableDiffusionPipeline""#,
            r#""StableDiffusionImg2ImgPipeline""#,
            r#""StableDiffusionInpaintPipeline""#,
            r#"["some_module", "SomePipeline"]"#,
            "null",
        ] {
            assert_eq!(judge(class, ""), Ok(()), "{class}");
        }
        assert_eq!(
            judge(r#""StableDiffusionControlNetPipeline""#, r#", "controlnet": ["diffusers", "ControlNetModel"]"#),
            Ok(())
        );
        assert_eq!(judge(r#""StableDiffusionPipeline""#, r#", "text_encoder_2": [null, null]"#), Ok(()));
    }

    #[test]
    fn two_text_encoders_are_those_of_xl() {
        let second = r#", "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "tokenizer_2": ["transformers", "CLIPTokenizer"]"#;
        let of = |zeros_for_no_prompt| Ok(Index { xl: true, zeros_for_no_prompt });
        assert_eq!(index(r#""StableDiffusionXLPipeline""#, second), of(true));
        for (said, expected) in [("true", true), ("false", false)] {
            let said = format!(r#"{second}, "force_zeros_for_empty_prompt": {said}"#);
            assert_eq!(index(r#""StableDiffusionXLInpaintPipeline""#, &said), of(expected));
        }
        assert_eq!(index(r#""StableDiffusionPipeline""#, ""), Ok(Index::default()));
    }

    #[test]
    fn models_of_other_generations_are_refused_by_name() {
        for (class, parts, words) in [
            (r#""StableDiffusion3Pipeline""#, "", ["StableDiffusion3Pipeline", "2.x and XL"]),
            (r#""StableDiffusionXLImg2ImgPipeline""#, "", ["StableDiffusionXLImg2ImgPipeline", "text_encoder_2"]),
            (
                r#"["own", "Own"]"#,
                r#", "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]"#,
                ["Own", "tokenizer_2"],
            ),
            (
                r#""StableDiffusionXLPipeline""#,
                r#", "text_encoder": [null, null], "text_encoder_2": ["x", "CLIPTextModelWithProjection"]"#,
                ["text_encoder", "refiner"],
            ),
            (
                r#""StableDiffusionXLPipeline""#,
                r#", "text_encoder_2": ["transformers", "T5EncoderModel"]"#,
                ["text_encoder_2", "T5EncoderModel"],
            ),
            (
                r#""FluxPipeline""#,
                r#", "transformer": ["diffusers", "FluxTransformer2DModel"]"#,
                ["FluxPipeline", "transformer"],
            ),
            (
                r#""SomePipeline""#,
                r#", "unet": ["diffusers", "UNet3DConditionModel"]"#,
                ["unet", "UNet3DConditionModel"],
            ),
            (
                r#""StableDiffusionPipeline""#,
                r#", "text_encoder": ["x", "RobertaModel"]"#,
                ["text_encoder", "RobertaModel"],
            ),
            (r#""SomePipeline""#, r#", "vae": [null, null]"#, ["SomePipeline", "vae"]),
        ] {
            let error = judge(class, parts).unwrap_err();
            assert!(words.iter().chain(&["model_index.json"]).all(|word| error.contains(word)), "{error}");
        }
    }
}

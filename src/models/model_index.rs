//! `model_index.json`: whether a pipeline is one of Stable Diffusion 1.x and 2.x, by its parts more than by its name.

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value as Json};

use super::Source;

/// Parts that pipelines of other generations have and these have not.
const FOREIGN: [&str; 9] = [
    "text_encoder_2",
    "text_encoder_3",
    "tokenizer_2",
    "transformer",
    "prior",
    "prior_prior",
    "movq",
    "vqvae",
    "motion_adapter",
];

/// Classes of other generations, whatever their index says of the parts.
const OTHERS: [&str; 3] = ["StableDiffusionXL", "StableDiffusion3", "StableCascade"];

/// The parts that are read; and those that change no picture here.
const READ: [&str; 5] = ["scheduler", "text_encoder", "tokenizer", "unet", "vae"];
const IDLE: [&str; 3] = ["safety_checker", "feature_extractor", "image_encoder"];

/// Reads the index; a pipeline of another class with the usual parts is taken, with a warning.
///
/// # Errors
/// There is no index, or it is one of a model that this program does not compute; names the class and the part.
pub(super) fn check(source: &Source) -> Result<()> {
    const FILE: &str = "model_index.json";
    let index: Map<String, Json> =
        source.read_json(FILE).context("a pipeline in the diffusers layout has a model_index.json")?;
    let place = format!("{}: {FILE}", source.label());
    // a pipeline from a file of its own is [module, class]
    let Some(class) = index.get("_class_name").and_then(|said| said.as_str().or_else(|| named(said))) else {
        return Ok(());
    };
    let only = "only Stable Diffusion 1.x and 2.x is supported";
    if OTHERS.iter().any(|other| class.starts_with(other)) {
        bail!("{place}: it is a {class}; {only}");
    }
    let part = |name: &str| index.get(name).and_then(named);
    if let Some((name, model)) = FOREIGN.iter().find_map(|name| Some((name, part(name)?))) {
        bail!("{place}: it is a {class} with a `{name}` ({model}); {only}");
    }
    for (name, usual) in
        [("unet", &["UNet2DConditionModel"][..]), ("text_encoder", &["CLIPTextModel", "CLIPTextModelWithProjection"])]
    {
        let model = part(name).map(|model| model.strip_prefix("Flax").unwrap_or(model));
        if let Some(model) = model.filter(|model| !usual.contains(model)) {
            bail!("{place}: the `{name}` of this {class} is a {model}, not a {}; {only}", usual[0]);
        }
    }
    if class.starts_with("StableDiffusionPipeline") || class == "AlignPropPipeline" {
        return Ok(());
    }
    if let Some(name) = ["unet", "vae", "text_encoder"].into_iter().find(|name| part(name).is_none()) {
        bail!("{place}: it is a {class} without a `{name}`; {only}");
    }
    let known = |name: &&String| READ.contains(&name.as_str()) || IDLE.contains(&name.as_str());
    let unread: Vec<&str> =
        index.iter().filter(|(name, said)| !known(name) && named(said).is_some()).map(|(name, _)| &**name).collect();
    let unread = if unread.is_empty() { String::new() } else { format!("; not read: {}", unread.join(", ")) };
    note!("warning: {place}: it is a {class}, whose parts are read as those of a StableDiffusionPipeline{unread}");
    Ok(())
}

/// The class of `[module, class]`; nothing for `[null, null]` and for settings.
fn named(said: &Json) -> Option<&str> {
    said.as_array().filter(|pair| pair.len() == 2)?[1].as_str()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(class: &str, parts: &str) -> Result<(), String> {
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
    fn models_of_other_generations_are_refused_by_name() {
        for (class, parts, words) in [
            (r#""StableDiffusionXLImg2ImgPipeline""#, "", ["StableDiffusionXLImg2ImgPipeline", "1.x and 2.x"]),
            (
                r#"["own", "Own"]"#,
                r#", "text_encoder_2": ["transformers", "CLIPTextModel"]"#,
                ["Own", "text_encoder_2"],
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

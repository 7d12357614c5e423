//! What a single file predicts: epsilon, v or the sample.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value as Json;

use super::Weights;

/// What the file says of its prediction: by an empty tensor for a mark (ComfyUI), in its header (kohya's scripts), in a
/// `.yaml` beside it (AUTOMATIC1111), by the training step at which 2.x-base was published (diffusers knows it so). 1.x
/// predicts epsilon unless it says otherwise.
///
/// # Errors
/// The `.yaml` cannot be read, or one of them names a prediction that is not known.
pub(super) fn prediction_type(path: &Path, w: &Weights, v2: bool) -> Result<Option<&'static str>> {
    let label = path.display();
    if let Some(mark) = ["edm_vpred.sigma_max", "edm_mean"].into_iter().find(|mark| w.contains(mark)) {
        bail!(
            "{label} has the mark `{mark}` of an EDM model, which DDIM cannot sample; take a model that predicts epsilon or v"
        );
    }
    let mut said: Vec<(String, &str)> = Vec::new();
    if w.contains("v_pred") {
        said.push((format!("the mark `v_pred` in {label}"), "v_prediction"));
    }
    if let Some(text) = w.metadata().get("modelspec.prediction_type") {
        let place = format!("modelspec.prediction_type in the header of {label}");
        let named = named_prediction(text, &place)?;
        said.push((place, named));
    }
    let yaml = path.with_extension("yaml");
    if let Some(named) = prediction_of_yaml(&yaml)? {
        said.push((yaml.display().to_string(), named));
    }
    if v2 && w.integer("global_step") == Some(875_000) {
        said.push((format!("global_step in {label}"), "epsilon"));
    }
    let Some((first, prediction)) = said.first() else { return Ok(None) };
    if let Some((other, another)) = said.iter().find(|(_, named)| named != prediction) {
        note!(
            "warning: {other} says {another} and {first} says {prediction}; {prediction} is taken (model.prediction_type says otherwise)"
        );
    }
    Ok(Some(prediction))
}

/// `model.params.parameterization` of the config that the original code trained with: `eps` where it says nothing. `None`
/// where there is no such file, or it is no config of a model.
fn prediction_of_yaml(yaml: &Path) -> Result<Option<&'static str>> {
    let bytes = match std::fs::read(yaml) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(|| format!("reading {}", yaml.display())),
    };
    let place = || format!("{} (what it says of the prediction counts: mend it, or move it away)", yaml.display());
    let text = String::from_utf8(bytes).with_context(place)?;
    let config: Json = serde_saphyr::from_str(text.trim_start_matches('\u{feff}')).with_context(place)?;
    let params = &config["model"]["params"];
    match &params["parameterization"] {
        Json::Null => Ok(params.is_object().then_some("epsilon")),
        Json::String(word) => named_prediction(word, &format!("parameterization in {}", yaml.display())).map(Some),
        other => bail!("parameterization in {} is {other}, not `eps` or `v`", yaml.display()),
    }
}

/// diffusers' name of a prediction under any of its names.
fn named_prediction(word: &str, place: &str) -> Result<&'static str> {
    match word.trim().to_lowercase().as_str() {
        "v" | "v_prediction" | "v-prediction" | "v_pred" | "velocity" => Ok("v_prediction"),
        "eps" | "epsilon" => Ok("epsilon"),
        "x0" | "sample" => Ok("sample"),
        _ => bail!("{place} is `{word}`, which is not known: `eps` (epsilon) and `v` (v_prediction) are"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prediction_is_read_from_any_yaml_of_a_model() {
        let folder = tempfile::tempdir().unwrap();
        let yaml = folder.path().join("x.yaml");
        assert_eq!(prediction_of_yaml(&yaml).unwrap(), None);
        let read = |text: &str| {
            std::fs::write(&yaml, text).unwrap();
            prediction_of_yaml(&yaml).map_err(|e| format!("{e:#}"))
        };
        for text in [
            "model:\n  params:\n    parameterization: v\n",
            "model:\n  params:\n    linear_end: 1.2e-2\n    parameterization: 'v' # it was eps\n",
            "# eps\nmodel: {target: x.LatentDiffusion, params: {parameterization: v, scale_factor: 0.18215}}\n",
            "model:\r\n    params:\r\n        \"parameterization\" : \"v\"\r\n",
            "\u{feff}model:\n  params:\n    parameterization: >-\n      v\n",
            "base: &base\n  parameterization: v\nmodel:\n  params: *base\n",
            "base: &base\n  parameterization: v\nmodel:\n  params:\n    <<: *base\n    timesteps: 1000\n",
            "---\nmodel: {\"params\": {\"parameterization\": \"v\"}}\n",
        ] {
            assert_eq!(read(text).unwrap(), Some("v_prediction"), "{text}");
        }
        for text in [
            "model:\n  params:\n    parameterization: eps  # not v\n",
            "model:\n  params:\n    timesteps: 1000\n    # parameterization: v\n",
            "model:\n  params:\n    unet_config:\n      params: {parameterization: v}\n    text: |\n      parameterization: v\n",
        ] {
            assert_eq!(read(text).unwrap(), Some("epsilon"), "{text}");
        }
        for text in ["", "- 1\n", "name: a\nparameterization: v\n", "just words\n"] {
            assert_eq!(read(text).unwrap(), None, "{text}");
        }
        for text in [
            "model: {params: {parameterization: q}}\n",
            "model: {params: [\n",
            "model: {params: {parameterization: 2}}",
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains("x.yaml"), "{error}");
        }
    }
}

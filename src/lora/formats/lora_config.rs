//! What a peft `LoraConfig` says of an adapter: alpha, and whether it is a plain LoRA at all.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Map, Value};

use crate::files::unwrapped;

/// What a peft `LoraConfig` says about alpha.
#[derive(Debug, Default)]
pub(super) struct AlphaRule {
    alpha: Option<f64>,
    /// A layer's name, or its end behind a dot, and its alpha. The first that matches counts.
    pattern: Vec<(String, f64)>,
    /// Rank-stabilised: the product is scaled by alpha / sqrt(rank).
    rslora: bool,
}

impl AlphaRule {
    /// Reads `lora_alpha`, `alpha_pattern` and `use_rslora`, with or without diffusers' `unet.` in front.
    pub fn parse(config: &str, file: &Path) -> Result<Self> {
        let config: Map<String, Value> = serde_json::from_str(config)?;
        check_is_plain(&config, file)?;
        let field = |name: &str| {
            config.get(&format!("unet.{name}")).or_else(|| config.get(name)).filter(|value| !value.is_null())
        };
        let number =
            |name: &str, value: &Value| value.as_f64().with_context(|| format!("`{name}` is {value}, not a number"));
        let mut pattern = Vec::new();
        for (layer, alpha) in field("alpha_pattern").and_then(Value::as_object).into_iter().flatten() {
            // peft takes the keys for regular expressions; diffusers writes `^` and the layer's name.
            let name = unwrapped(&layer.replace("\\.", ".").replace("^_orig_mod.", "^"));
            let plain = name.strip_prefix('^').unwrap_or(&name);
            if !plain.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')) {
                bail!("the alpha_pattern `{layer}` is a regular expression; only names of layers are understood");
            }
            let alpha = number(layer, alpha)?;
            pattern.push((name, alpha));
        }
        Ok(Self {
            alpha: field("lora_alpha").map(|value| number("lora_alpha", value)).transpose()?,
            pattern,
            rslora: field("use_rslora").and_then(Value::as_bool).unwrap_or(false),
        })
    }

    /// Says which alphas of single layers are of no layer in the file.
    pub fn warn_of_unused<'a>(&self, modules: impl Iterator<Item = &'a String> + Clone, file: &Path) {
        let is_unused = |name: &str| !modules.clone().any(|module| matches(name, module));
        let unused: Vec<&str> = self.pattern.iter().map(|(name, _)| &**name).filter(|name| is_unused(name)).collect();
        if let Some(first) = unused.first() {
            note!(
                "warning: {}: {} entries of its alpha_pattern match no layer of the file and count for nothing, for example `{first}`",
                file.display(),
                unused.len()
            );
        }
    }

    pub fn alpha(&self, module: &str, rank: usize) -> f64 {
        let special = self.pattern.iter().find(|(name, _)| matches(name, module)).map(|&(_, alpha)| alpha);
        match special.or(self.alpha) {
            Some(alpha) if self.rslora => alpha * (rank as f64).sqrt(),
            Some(alpha) => alpha,
            None => rank as f64,
        }
    }
}

/// Whether an entry of `alpha_pattern` is of this layer.
fn matches(name: &str, module: &str) -> bool {
    match name.strip_prefix('^') {
        Some(name) => module == name,
        None => module == name || module.strip_suffix(name).is_some_and(|head| head.ends_with('.')),
    }
}

/// # Errors
/// A setting of a `LoraConfig` by which the adapter is more than the product of its factors, whether the tensors show it or not.
fn check_is_plain(config: &Map<String, Value>, file: &Path) -> Result<()> {
    for (name, value) in config {
        let key = name.strip_prefix("unet.").unwrap_or(name);
        let is_off = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            Value::Bool(true) | Value::Number(_) | Value::String(_) => false,
        };
        let word = value.as_str().unwrap_or_default().to_lowercase();
        match key {
            _ if is_off => {}
            "peft_type" if word == "lora" => {}
            // the starts that leave the base weights as they are
            "init_lora_weights" if *value == true || ["gaussian", "eva", "orthogonal"].contains(&&*word) => {}
            "init_lora_weights" => bail!(
                "`init_lora_weights` = {value}: this start changed the base weights (PiSSA, OLoRA, LoftQ and others do), and the file does \
                 not hold that; save the adapter again with peft's save_pretrained(.., path_initial_model_for_weight_conversion=..), \
                 which makes a plain LoRA of it"
            ),
            "bias" if word == "none" => {}
            "bias" => note!(
                "warning: {}: `bias` = {value}: biases were trained too, and none are in the file; the model's own are used",
                file.display()
            ),
            "use_rslora" => {}
            "peft_type"
            | "lora_bias"
            | "layer_replication"
            | "modules_to_save"
            | "alora_invocation_tokens"
            | "arrow_config"
            | "target_parameters"
            | "trainable_token_indices" => return Err(not_plain(key, value)),
            key if key.starts_with("use_") => return Err(not_plain(key, value)),
            _ => {}
        }
    }
    Ok(())
}

fn not_plain(key: &str, value: &Value) -> anyhow::Error {
    anyhow!(
        "`{key}` = {value}: this is no plain LoRA, and only those are supported; merge it into its model with peft (merge_and_unload), \
         or take `{key}` out if the two factors of each layer are all that was trained"
    )
}

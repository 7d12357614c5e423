//! The base model of a LoRA, by the name that its file gives it.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value as Json;

use crate::config::{Config, concerns, shown};
use crate::files::located;
use crate::lora::formats::LoadedLora;
use crate::models::hub::parse_hub_id;

/// What the file at `path` says that the LoRA was made for: in its header, as this program and kohya's scripts write it, or in
/// peft's config beside it.
pub(super) fn named_by(metadata: &HashMap<String, String>, path: &Path) -> Option<String> {
    let in_header = ["base_model", "ss_sd_model_name"].into_iter().find_map(|key| metadata.get(key).cloned());
    let beside = || {
        let folder = if path.is_dir() { path } else { path.parent()? };
        let config = std::fs::read(folder.join("adapter_config.json")).ok()?;
        let config: Json = serde_json::from_slice(&config).ok()?;
        Some(config.get("base_model_name_or_path")?.as_str()?.to_owned())
    };
    in_header.or_else(beside).filter(|name| !name.is_empty())
}

/// Takes the base model that the LoRA names where nothing else is said, neither in a config nor in `settings`; says which.
pub(super) fn take(config: &mut Config, has_config: bool, settings: &[String], lora: &LoadedLora, path: &Path) {
    let is_said = has_config || settings.iter().any(|setting| concerns(setting, "model.path"));
    let Some(name) = named_by(&lora.metadata, path).filter(|_| !is_said) else { return };
    if is_here(&name) || is_on_hub(&name) {
        note!("model       {}, which {} names as its base", shown(&name), path.display());
        config.model.path = name;
    } else {
        note!(
            "warning: {} was made for `{}`, which is not here; {} is taken, unless another is given with --model or \
             --set model.path",
            path.display(),
            shown(&name),
            config.model.path
        );
    }
}

fn is_here(name: &str) -> bool {
    located(Path::new(name)).is_ok_and(|path| path.exists())
}

/// `owner/name`, or `owner/name:file`.
fn is_on_hub(name: &str) -> bool {
    parse_hub_id(name.split(':').next().unwrap_or_default()).is_some()
}

/// What a file for others calls a model: a repository by its name, and a local one by the last part of its path, which tells
/// nothing of this machine.
pub(super) fn public_name(name: &str) -> String {
    if is_on_hub(name) && !is_here(name) {
        return name.to_owned();
    }
    let last = name.trim_end_matches(['/', '\\']).rsplit(['/', '\\']).next().unwrap_or_default();
    last.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_names_have_no_folders() {
        for (name, public) in [
            ("owner/name", "owner/name"),
            ("owner/name:file.safetensors", "owner/name:file.safetensors"),
            ("/home/me/base/", "base"),
            ("../base.safetensors", "base.safetensors"),
            (r"C:\models\base.ckpt", "base.ckpt"),
            ("src/commands", "commands"), // a folder that is there
            ("base", "base"),
        ] {
            assert_eq!(public_name(name), public);
        }
    }
}

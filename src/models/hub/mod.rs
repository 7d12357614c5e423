//! Where the files of a model come from: a local folder, or a repository on the Hugging Face hub.

mod cache;
mod remote;
mod repository;
mod settings;
#[cfg(test)]
mod testing;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use serde::de::DeserializeOwned;

pub(crate) use remote::{bare, is_loopback, root_certs_of_environment};
use repository::{Hub, check_link};

use super::Weights;
use super::single_file::SingleFile;
use crate::config::ModelConfig;
use crate::files::{kind_of, located};

/// A model folder, local or on the hub, and the sub-folder of it that is being read.
///
/// Cheap to clone; the clones share one listing of the repository.
#[derive(Clone, Debug)]
pub struct Source {
    root: Root,
    /// `""` or `"unet/"`.
    prefix: String,
}

#[derive(Clone, Debug)]
enum Root {
    Local(PathBuf),
    Hub(Arc<Hub>),
    /// A file that is shown as a folder.
    File(Arc<SingleFile>),
}

impl Source {
    /// An existing folder, else a hub id `owner/name[@revision]`. Touches no network.
    ///
    /// # Errors
    /// When `spec` is a file, or is neither a folder nor a hub id.
    pub fn open(spec: &str) -> Result<Self> {
        let path = located(Path::new(spec))?;
        let root = if path.is_dir() {
            Root::Local(path.into_owned())
        } else if path.is_file() {
            bail!(
                "`{spec}` is a file; give the folder of the model (the one with its config and weights) or a hub id `owner/name`"
            );
        } else if let Some((id, revision)) = parse_hub_id(spec) {
            Root::Hub(Arc::new(Hub::from_env(id, revision)?))
        } else {
            return Err(no_such_path(spec, "folder"));
        };
        Ok(Self { root, prefix: String::new() })
    }

    /// The pipeline of `[model]`: a folder, a hub id, or a single file (a path, or `owner/name:file` on the hub).
    ///
    /// # Errors
    /// As [`Source::open`]; for a single file, when it is no whole model; for others, when `[model]` has keys that are for
    /// single files.
    pub fn pipeline(model: &ModelConfig) -> Result<Self> {
        let on_hub = model.path.split_once(':').is_some_and(|(repo, file)| {
            parse_hub_id(repo).is_some() && [".safetensors", ".ckpt", ".pt"].iter().any(|end| file.ends_with(end))
        });
        if Path::new(&model.path).is_file() || on_hub {
            let file = resolve_file(&model.path, "")?;
            return Ok(Self { root: Root::File(Arc::new(SingleFile::open(&file, model)?)), prefix: String::new() });
        }
        let source = Self::open(&model.path)?;
        for (key, given) in [
            ("config", model.config.is_some()),
            ("tokenizer", model.tokenizer.is_some()),
            ("prediction_type", model.prediction_type.is_some()),
        ] {
            if given {
                bail!(
                    "model.{key} is for a single file; {} is a pipeline with files of its own: leave the key out",
                    source.label()
                );
            }
        }
        Ok(source)
    }

    /// The weights of this folder where it is part of a single file.
    pub(super) fn weights_in_single_file(&self) -> Option<Result<Weights>> {
        let Root::File(file) = &self.root else { return None };
        let folder = self.prefix.trim_end_matches('/');
        Some(file.weights(folder).cloned().with_context(|| format!("{} has no {folder}", file.label())))
    }

    /// The tokenizer of a single file, which lies elsewhere, where this is its `tokenizer` folder.
    fn tokenizer_elsewhere(&self) -> Option<&Source> {
        match &self.root {
            Root::File(file) if self.prefix == "tokenizer/" => Some(&file.tokenizer),
            _ => None,
        }
    }

    /// What prompts are padded with, whatever the tokenizer's files say: `!` for a single file of Stable Diffusion 2.x,
    /// whose tokenizer may be 1.x's.
    pub fn pad_token(&self) -> Option<&'static str> {
        match &self.root {
            Root::File(file) => file.pad_token(),
            _ => None,
        }
    }

    /// The same source, one folder further in: `source.sub("unet")`.
    pub fn sub(&self, folder: &str) -> Self {
        Self { root: self.root.clone(), prefix: format!("{}{}/", self.prefix, folder.trim_matches('/')) }
    }

    /// The local path of `file`, downloaded where needed; `None` when the source has no such file.
    ///
    /// # Errors
    /// When the hub refuses the repository, or cannot be reached and the cache knows nothing of it.
    pub fn find(&self, file: &str) -> Result<Option<PathBuf>> {
        if let Some(tokenizer) = self.tokenizer_elsewhere() {
            return tokenizer.find(file);
        }
        let file = format!("{}{file}", self.prefix);
        match &self.root {
            Root::File(_) => Ok(None),
            Root::Hub(hub) => hub.find(&file),
            Root::Local(folder) => {
                let path = folder.join(file);
                match path.metadata() {
                    Ok(meta) if meta.is_file() => Ok(Some(path)),
                    Ok(_) => Ok(None),
                    Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                        check_link(&path).map(|()| None)
                    }
                    Err(e) => Err(e).with_context(|| format!("looking at {}", path.display())),
                }
            }
        }
    }

    /// The local path of a file that must be there.
    ///
    /// # Errors
    /// As [`Source::find`], and when there is no such file: names the source, the file and what to do.
    pub fn require(&self, file: &str) -> Result<PathBuf> {
        self.find(file)?.ok_or_else(|| self.missing(&format!("`{file}`")))
    }

    /// Whether there is such a text, a file or a config that a single file stands for.
    ///
    /// # Errors
    /// As [`Source::find`].
    pub(crate) fn has_text(&self, file: &str) -> Result<bool> {
        Ok(self.config_of_single_file(file).is_some() || self.find(file)?.is_some())
    }

    /// A text file as it is.
    ///
    /// # Errors
    /// As [`Source::require`], and when it cannot be read.
    pub(super) fn read_text(&self, file: &str) -> Result<String> {
        if let Some(config) = self.config_of_single_file(file) {
            return Ok(serde_json::to_string_pretty(config)?);
        }
        let path = self.require(file)?;
        std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    fn config_of_single_file(&self, file: &str) -> Option<&serde_json::Value> {
        match &self.root {
            Root::File(single) => single.config(&format!("{}{file}", self.prefix)),
            _ => None,
        }
    }

    /// Reads and parses a JSON file.
    ///
    /// # Errors
    /// As [`Source::require`]; a parse error names file, line and column, a value of the wrong type its key.
    ///
    /// A null counts as absent, as Python's configs mean it.
    pub fn read_json<T: DeserializeOwned>(&self, file: &str) -> Result<T> {
        if let Some(config) = self.config_of_single_file(file) {
            return serde_path_to_error::deserialize(config.clone())
                .map_err(|e| anyhow!("{}: `{}`: {}", self.label(), e.path(), e.inner()));
        }
        let path = self.require(file)?;
        let bytes = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        let mut json: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| {
            match kind_of(&bytes).filter(|kind| !kind.starts_with("JSON")) {
                Some(kind) => anyhow!("{} is {kind}", path.display()),
                None => anyhow!("{}: {e}", path.display()),
            }
        })?;
        drop_nulls(&mut json);
        serde_path_to_error::deserialize(json).map_err(|e| match e.path().to_string() {
            key if key == "." => anyhow!("{}: {}", path.display(), e.inner()),
            key => anyhow!("{}: `{key}`: {}", path.display(), e.inner()),
        })
    }

    /// Whether a JSON file has this key with a null, where that is not as good as no key.
    ///
    /// # Errors
    /// As [`Source::read_json`].
    pub(super) fn has_null(&self, file: &str, key: &str) -> Result<bool> {
        let text = self.read_text(file)?;
        let json: serde_json::Value =
            serde_json::from_str(&text).map_err(|e| anyhow!("{}: {file}: {e}", self.label()))?;
        Ok(json.get(key).is_some_and(serde_json::Value::is_null))
    }

    /// Whether there is such a file. Downloads nothing.
    pub(super) fn has(&self, file: &str) -> Result<bool> {
        match &self.root {
            Root::Hub(hub) => Ok(hub.has(&format!("{}{file}", self.prefix))),
            Root::Local(_) | Root::File(_) => Ok(self.find(file)?.is_some()),
        }
    }

    /// The folder, or `owner/name[@revision][:folder]`: for messages.
    pub fn label(&self) -> String {
        let folder = self.prefix.trim_end_matches('/');
        match &self.root {
            Root::File(_) if self.prefix == "tokenizer/" => {
                self.tokenizer_elsewhere().map_or_else(String::new, Self::label)
            }
            Root::File(file) => file.label().to_owned(),
            Root::Local(root) if folder.is_empty() => root.display().to_string(),
            Root::Local(root) => root.join(folder).display().to_string(),
            Root::Hub(hub) if folder.is_empty() => hub.label(),
            Root::Hub(hub) => format!("{}:{folder}", hub.label()),
        }
    }

    /// The error for files that are not there; says so when that may only be because the hub was not asked.
    pub(crate) fn missing(&self, what: &str) -> anyhow::Error {
        let label = self.label();
        match &self.root {
            Root::File(_) => anyhow!("{what} not found in {label}"),
            Root::Local(root) if !root.join(&self.prefix).is_dir() => {
                anyhow!("{what} not found: there is no folder {label}")
            }
            Root::Local(_) => anyhow!("{what} not found in {label}"),
            Root::Hub(hub) => anyhow!("{what} not found in {}", hub.looked_at(&label)),
        }
    }
}

/// Takes the null entries out of all objects.
fn drop_nulls(json: &mut serde_json::Value) {
    match json {
        serde_json::Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        serde_json::Value::Array(list) => list.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// A single file: a local path, a folder that holds `default_file`, `owner/name[@revision]:path/in/repo`, or
/// `owner/name[@revision]` for its `default_file`.
///
/// # Errors
/// When there is no such file, or the hub does not give it.
pub fn resolve_file(spec: &str, default_file: &str) -> Result<PathBuf> {
    let path = located(Path::new(spec))?;
    if path.is_file() {
        return Ok(path.into_owned());
    }
    let (repo, file) = match spec.split_once(':') {
        Some((repo, file)) if parse_hub_id(repo).is_some() && !file.is_empty() => (repo, file),
        _ => (spec, default_file),
    };
    if !path.is_dir() && parse_hub_id(repo).is_none() {
        return Err(no_such_path(spec, "file"));
    }
    Source::open(repo)?.require(file)
}

/// `owner/name[@revision]` as (id, revision). A name that ends like a weight file is a mistyped path, not an id.
pub(crate) fn parse_hub_id(spec: &str) -> Option<(&str, &str)> {
    let (id, revision) = spec.split_once('@').unwrap_or((spec, "main"));
    let (owner, name) = id.split_once('/')?;
    let allowed = |s: &str, more: &str| {
        !s.is_empty()
            && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c) || more.contains(c))
            && !s.starts_with(['.', '-', '/'])
            && !s.ends_with('/')
            && !s.contains("..")
    };
    let extension = Path::new(name).extension().and_then(|e| e.to_str()).unwrap_or_default();
    let is_file = ["safetensors", "ckpt", "pt", "pth", "bin", "json", "toml", "txt"].contains(&extension);
    (allowed(owner, "") && allowed(name, "") && allowed(revision, "/") && !is_file).then_some((id, revision))
}

fn no_such_path(spec: &str, kind: &str) -> anyhow::Error {
    let near = nearby(Path::new(spec));
    anyhow!("`{spec}` does not exist{near}; give an existing {kind} or a hub id `owner/name[@revision]`")
}

/// " (did you mean ..?)" from the existing folder next to a path that does not exist; empty when nothing is near.
fn nearby(path: &Path) -> String {
    let mut missing = path;
    while let Some(parent) = missing.parent() {
        let folder = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        if let Ok(entries) = folder.read_dir() {
            let wanted = missing.file_name().unwrap_or_default().to_string_lossy();
            let close = entries
                .flatten()
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .map(|name| (strsim::jaro_winkler(&name, &wanted), name))
                .filter(|(score, _)| *score > 0.8)
                .max_by(|a, b| a.0.total_cmp(&b.0));
            return match close {
                Some((_, name)) => format!(" (did you mean `{}`?)", parent.join(name).display()),
                None if parent.as_os_str().is_empty() => String::new(),
                None => format!(" (`{}` exists, but has no `{wanted}`)", parent.display()),
            };
        }
        missing = parent;
    }
    String::new()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_local_folder_gives_its_files_and_names_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("unet")).unwrap();
        fs::write(dir.path().join("unet/config.json"), "{\n \"a\": }").unwrap();
        let unet = Source::open(dir.path().to_str().unwrap()).unwrap().sub("unet");
        assert!(unet.find("config.json").unwrap().is_some());
        assert!(unet.find("none.json").unwrap().is_none());
        let e = unet.read_json::<serde_json::Value>("config.json").unwrap_err().to_string();
        assert!(e.contains("config.json") && e.contains("line 2"), "{e}");
        let e = unet.require("none.json").unwrap_err().to_string();
        assert!(e.contains("`none.json`") && e.contains(&unet.label()), "{e}");
        let e = unet.sub("deeper").require("none.json").unwrap_err().to_string();
        assert!(e.contains("there is no folder"), "{e}");
    }

    #[cfg(unix)]
    #[test]
    fn a_link_of_a_folder_whose_file_is_gone_is_named() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("../blobs/gone", dir.path().join("config.json")).unwrap();
        let e = Source::open(dir.path().to_str().unwrap()).unwrap().find("config.json").unwrap_err().to_string();
        assert!(e.contains("config.json") && e.contains("is gone"), "{e}");
    }

    #[test]
    fn a_mistyped_path_is_an_error_that_names_its_neighbour() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("stable-diffusion")).unwrap();
        let typed = dir.path().join("stable-difusion");
        let e = Source::open(typed.to_str().unwrap()).unwrap_err().to_string();
        assert!(e.contains("does not exist") && e.contains("did you mean") && e.contains("stable-diffusion"), "{e}");
        fs::write(&typed, "x").unwrap();
        assert!(Source::open(typed.to_str().unwrap()).unwrap_err().to_string().contains("is a file"));
        assert!(
            resolve_file("weights/no-such-head.safetensors", "x").unwrap_err().to_string().contains("does not exist")
        );
    }

    #[test]
    fn hub_ids_are_told_from_paths() {
        assert_eq!(parse_hub_id("owner/name-1.5"), Some(("owner/name-1.5", "main")));
        assert_eq!(parse_hub_id("owner/name@refs/pr/1"), Some(("owner/name", "refs/pr/1")));
        for path in [
            "name",
            "./a/b",
            "/a/b",
            "a/b/c",
            "a/",
            "~/b",
            "../b",
            "a/..",
            "a/b@",
            "a/b@../x",
            "a/head.pth",
            "a b/c",
            "",
        ] {
            assert_eq!(parse_hub_id(path), None, "{path}");
        }
    }

    #[test]
    fn a_file_is_found_in_a_folder_or_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("head.pth");
        fs::write(&file, "x").unwrap();
        assert_eq!(resolve_file(file.to_str().unwrap(), "other").unwrap(), file);
        assert_eq!(resolve_file(dir.path().to_str().unwrap(), "head.pth").unwrap(), file);
        assert!(resolve_file(dir.path().to_str().unwrap(), "other").is_err());
    }
}

//! The variables that `huggingface_hub` reads, so that a job that works with Python works here.

use std::fs;
use std::path::{Path, PathBuf};

/// Where the hub and its cache are, and what is allowed.
#[derive(Clone, Debug)]
pub struct Settings {
    pub endpoint: String,
    pub cache: PathBuf,
    pub token: Option<String>,
    pub offline: bool,
}

impl Settings {
    pub fn from_env() -> Self {
        let home = std::env::home_dir().unwrap_or_default();
        Self::of(&home, |name| std::env::var(name).ok())
    }

    /// `HF_HUB_CACHE`, else `HUGGINGFACE_HUB_CACHE`, else `hub` in `HF_HOME`, else in `huggingface` in `XDG_CACHE_HOME`, else
    /// in `~/.cache`. An empty variable counts as absent.
    fn of(home: &Path, variable: impl Fn(&str) -> Option<String>) -> Self {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let first = |names: &[&str]| names.iter().find_map(|name| set(name));
        let folder = |names: &[&str]| first(names).map(|value| expand(&value, home, &variable));
        let hf_home = folder(&["HF_HOME"]).unwrap_or_else(|| {
            let caches = folder(&["XDG_CACHE_HOME"]).unwrap_or_else(|| home.join(".cache"));
            caches.join("huggingface")
        });
        let saved = || {
            let file = folder(&["HF_TOKEN_PATH"]).unwrap_or_else(|| hf_home.join("token"));
            fs::read_to_string(file).ok().map(|token| token.trim().to_owned()).filter(|token| !token.is_empty())
        };
        let yes = |value: String| ["1", "on", "yes", "true"].contains(&&*value.to_lowercase());
        Self {
            endpoint: set("HF_ENDPOINT")
                .map_or_else(|| "https://huggingface.co".into(), |url| url.trim_end_matches('/').to_owned()),
            cache: folder(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]).unwrap_or_else(|| hf_home.join("hub")),
            token: first(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
                .map(|token| token.trim().to_owned())
                .filter(|token| !token.is_empty())
                .or_else(saved),
            offline: first(&["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]).is_some_and(yes),
        }
    }
}

/// A path with `~`, `$NAME` and `${NAME}` replaced, as no shell does in a job file; a name without a value stays.
fn expand(path: &str, home: &Path, variable: &impl Fn(&str) -> Option<String>) -> PathBuf {
    let mut path = match path.strip_prefix('~') {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => format!("{}{rest}", home.display()),
        _ => path.to_owned(),
    };
    let mut from = 0;
    while let Some(at) = path[from..].find('$').map(|at| from + at) {
        let rest = &path[at + 1..];
        let (name, length) = match rest.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some((name, _)) => (name, name.len() + 3),
            None => {
                let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
                (&rest[..end], end + 1)
            }
        };
        let value = if name.is_empty() { None } else { variable(name) };
        from = at + value.as_ref().map_or(1, String::len);
        if let Some(value) = value {
            path.replace_range(at..at + length, &value);
        }
    }
    path.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Settings {
        Settings::of(Path::new("/home/me"), |name| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_cache_is_looked_for_where_python_looks() {
        let mut variables = vec![("SCRATCH", "/scratch/me"), ("HF_HUB_CACHE", "")];
        for (name, value, cache) in [
            ("", "", "/home/me/.cache/huggingface/hub"),
            ("XDG_CACHE_HOME", "/big", "/big/huggingface/hub"),
            ("HF_HOME", "~/models", "/home/me/models/hub"),
            ("HUGGINGFACE_HUB_CACHE", "${SCRATCH}/old", "/scratch/me/old"),
        ] {
            variables.push((name, value));
            assert_eq!(settings(&variables).cache, Path::new(cache), "{name}");
        }
        variables[1].1 = "$SCRATCH/$NOBODY/~/$";
        assert_eq!(settings(&variables).cache, Path::new("/scratch/me/$NOBODY/~/$"));
    }

    #[test]
    fn a_token_and_a_hub_are_taken_as_python_takes_them() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("token"), "hf_saved\n").unwrap();
        let home = folder.path().to_str().unwrap();
        let read =
            settings(&[("HF_HOME", home), ("HF_ENDPOINT", "http://mirror/hf/"), ("TRANSFORMERS_OFFLINE", "yes")]);
        assert_eq!(
            (read.token.as_deref(), &*read.endpoint, read.offline),
            (Some("hf_saved"), "http://mirror/hf", true)
        );
        let read = settings(&[("HF_HOME", home), ("HF_TOKEN", "hf_given"), ("HF_HUB_OFFLINE", "0")]);
        assert_eq!((read.token.as_deref(), read.offline), (Some("hf_given"), false));
    }
}

//! What the local models behind the names in a run's config were when the run began.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::config::{Config, shown};
use crate::files::write_bytes;

/// Where a run keeps this.
const FILE: &str = "sources.json";
/// What decides the numbers of a model.
const ENDINGS: [&str; 8] = ["json", "txt", "yaml", "safetensors", "bin", "ckpt", "pt", "pth"];
/// Folders of a model within each other.
const DEPTH: usize = 3;
/// Of a larger file, this many blocks are read.
const BLOCKS: u64 = 64;
const BLOCK: u64 = 4096;

/// A file's size, and a checksum of it or of parts of it.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
struct Mark {
    bytes: u64,
    crc32: u32,
}

/// The marks of the files at each local path.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(transparent)]
pub struct Sources(BTreeMap<String, BTreeMap<PathBuf, Mark>>);

impl Sources {
    /// Those of a config that begins a run, or goes on with the one in a folder: then what was there when the run began
    /// stays, and a warning tells of each path where something else is now.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn of(config: &Config, resumed: Option<&Path>) -> Result<Self> {
        let earlier = resumed.map_or(Ok(Self::default()), Self::read)?;
        let mut sources = Self::default();
        for path in config.local_models() {
            let now = marks(Path::new(&path)).with_context(|| format!("looking at the files of {path}"))?;
            let marks = match earlier.0.get(&path) {
                Some(then) => {
                    warn_of_changes(&path, then, &now);
                    then.clone()
                }
                None => now,
            };
            sources.0.insert(path, marks);
        }
        Ok(sources)
    }

    /// None of an older run, which has no such file.
    fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE);
        if !path.is_file() {
            return Ok(Self::default());
        }
        let read = || -> Result<Self> { Ok(serde_json::from_slice(&fs::read(&path)?)?) };
        read()
            .with_context(|| format!("reading {}; without it the run goes on, and looks at no changes", path.display()))
    }

    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        write_bytes(&dir.join(FILE), serde_json::to_string_pretty(self)?.as_bytes())
    }
}

fn warn_of_changes(path: &str, then: &BTreeMap<PathBuf, Mark>, now: &BTreeMap<PathBuf, Mark>) {
    let names: std::collections::BTreeSet<&PathBuf> = then.keys().chain(now.keys()).collect();
    let changed: Vec<&PathBuf> = names.into_iter().filter(|name| then.get(*name) != now.get(*name)).collect();
    let Some(first) = changed.first() else { return };
    let others = if changed.len() > 1 { format!(" and {} more", changed.len() - 1) } else { String::new() };
    note!(
        "warning: {} has changed since the run began ({}{others}): the run goes on with what is there now, as another experiment",
        shown(path),
        shown(first.display().to_string())
    );
}

/// The marks of a file, or of the files in a folder, by their paths in it.
fn marks(path: &Path) -> Result<BTreeMap<PathBuf, Mark>> {
    let mut files = BTreeMap::new();
    if path.is_file() {
        files.insert(path.file_name().unwrap_or_default().into(), mark(path)?);
    } else {
        mark_folder(path, Path::new(""), DEPTH, &mut files)?;
    }
    Ok(files)
}

fn mark_folder(root: &Path, folder: &Path, depth: usize, files: &mut BTreeMap<PathBuf, Mark>) -> Result<()> {
    for entry in fs::read_dir(root.join(folder))? {
        let name = folder.join(entry?.file_name());
        let path = root.join(&name);
        let ending = name.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        if path.is_dir() && depth > 1 {
            mark_folder(root, &name, depth - 1, files)?;
        } else if path.is_file() && ENDINGS.contains(&ending) {
            // one that cannot be read is for whoever needs it to complain about
            files.extend(mark(&path).ok().map(|mark| (name, mark)));
        }
    }
    Ok(())
}

fn mark(path: &Path) -> Result<Mark> {
    let mut file = File::open(path)?;
    let bytes = file.metadata()?.len();
    let mut crc32 = crc32fast::Hasher::new();
    let mut block = Vec::new();
    let blocks = if bytes <= BLOCKS * BLOCK { bytes.div_ceil(BLOCK) } else { BLOCKS };
    for i in 0..blocks {
        // from the first to the last
        let start = if blocks < BLOCKS { i * BLOCK } else { (bytes - BLOCK) / (BLOCKS - 1) * i };
        block.clear();
        file.seek(SeekFrom::Start(start))?;
        file.by_ref().take(BLOCK).read_to_end(&mut block)?;
        crc32.update(&block);
    }
    Ok(Mark { bytes, crc32: crc32.finalize() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_byte_is_seen_in_a_small_file_and_a_changed_weight_in_a_large_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("unet/weights.bin");
        fs::create_dir(path.parent().unwrap()).unwrap();
        fs::write(folder.path().join("README.md"), "no model").unwrap();
        let marks_of = |content: &[u8]| {
            fs::write(&path, content).unwrap();
            marks(folder.path()).unwrap()
        };
        for size in [1, 4096, 10_000, (BLOCKS * BLOCK) as usize] {
            let mut content = vec![7; size];
            let before = marks_of(&content);
            assert_eq!(before.keys().collect::<Vec<_>>(), [Path::new("unet/weights.bin")]);
            for place in [0, size / 2, size - 1] {
                content[place] = 8;
                assert_ne!(marks_of(&content), before, "byte {place} of {size}");
                content[place] = 7;
            }
            assert_eq!(marks_of(&content), before);
        }
        let mut content = vec![7; 5_000_000];
        let before = marks_of(&content);
        content[2_000_000..2_200_000].fill(8);
        assert_ne!(marks_of(&content), before);
    }
}

//! The files that the program carries: the embedded model, its rewards, prompts and experiments, found from any folder.
//!
//! They have the repository's relative names. Where there is no such file, it is unpacked into the user's cache on its first use.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

use super::replace_file;

/// Where the files are unpacked, if not in the user's cache.
const VARIABLE: &str = "ALIGNPROP_DATA";

/// What a program carries.
#[derive(Clone, Copy, Debug)]
pub struct Bundle {
    /// Tells these files from those of another version.
    pub mark: &'static str,
    /// Relative names and contents.
    pub files: &'static [(&'static str, &'static [u8])],
}

static BUNDLE: OnceLock<Bundle> = OnceLock::new();

impl Bundle {
    /// Makes the files known to [`located`], for as long as the process lives. Only programs carry them: a library that did would put a
    /// copy into everything that is linked with it.
    pub fn provide(self) {
        let _ = BUNDLE.set(self);
    }

    fn below(&self, path: &Path) -> impl Iterator<Item = &(&'static str, &'static [u8])> {
        self.files.iter().filter(move |(name, _)| path != Path::new("") && Path::new(name).starts_with(path))
    }

    /// Whether the files that lie at `path` below `root` are those that are carried under this name.
    fn is_at(&self, root: &Path, path: &Path) -> bool {
        let mut files = self.below(path).peekable();
        files.peek().is_some()
            && files.all(|(name, content)| fs::read(root.join(name)).is_ok_and(|there| there == *content))
    }

    /// `path`, unpacked below `place`; nothing where no such file is carried.
    fn unpack(&self, path: &Path, place: impl FnOnce() -> Result<PathBuf>) -> Result<Option<PathBuf>> {
        // a whole path of the current folder means the same as a relative one
        let here = std::env::current_dir().unwrap_or_default();
        let path = [Path::new("."), &here].iter().find_map(|start| path.strip_prefix(start).ok()).unwrap_or(path);
        if self.below(path).next().is_none() {
            return Ok(None);
        }
        let place = place()?.join(self.mark);
        for (name, content) in self.below(path) {
            let file = place.join(name);
            write(&file, content).with_context(|| {
                format!(
                    "unpacking {}, which the program carries; set {VARIABLE} to a folder that can be written",
                    file.display()
                )
            })?;
        }
        Ok(Some(place.join(path)))
    }
}

/// The path of a file or folder: as it is where there is one, else of the one of this name that the program carries.
///
/// # Errors
/// What is carried cannot be unpacked; names the way out.
pub fn located(path: &Path) -> Result<Cow<'_, Path>> {
    let unpacked = match BUNDLE.get() {
        Some(bundle) if !path.exists() => bundle.unpack(path, place)?,
        _ => None,
    };
    Ok(unpacked.map_or(Cow::Borrowed(path), Cow::Owned))
}

/// The names of the files that the program carries in a folder, and in folders there.
pub fn carried_in(folder: &str) -> Vec<&'static str> {
    BUNDLE.get().map_or(Vec::new(), |bundle| bundle.below(Path::new(folder)).map(|(name, _)| *name).collect())
}

/// Whether a relative path means here what it means in every folder: what the program carries under this name.
pub fn is_carried(path: &Path) -> bool {
    BUNDLE.get().is_some_and(|bundle| bundle.is_at(Path::new(""), path))
}

/// `$ALIGNPROP_DATA`, else `alignprop` in the user's cache, where the hub's library has its own.
fn place() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = || set("XDG_CACHE_HOME").or_else(|| Some(std::env::home_dir()?.join(".cache")));
    set(VARIABLE).or_else(|| Some(cache()?.join("alignprop"))).with_context(|| {
        format!(
            "there is no home folder to unpack the embedded model in: set {VARIABLE} to a folder that can be written"
        )
    })
}

/// What a file that was unpacked and not touched since has as its time of change; its content is then not looked at.
fn untouched() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_600_000_000)
}

/// Writes the file if it is not there whole. Other processes may do the same: each puts a whole file in its place.
fn write(file: &Path, content: &[u8]) -> Result<()> {
    if let Ok(there) = file.metadata()
        && there.len() == content.len() as u64
        && (there.modified()? == untouched() || fs::read(file)? == content)
    {
        return Ok(());
    }
    fs::create_dir_all(file.parent().unwrap_or(Path::new(".")))?;
    replace_file(file, |out| Ok(out.write_all(content)?))?;
    // where times cannot be set, the content is compared on each use
    let _ = File::options().write(true).open(file).and_then(|file| file.set_modified(untouched()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUNDLE: Bundle =
        Bundle { mark: "m", files: &[("assets/a/x", b"one"), ("assets/a/b/y", b"two"), ("assets/c", b"three")] };

    fn unpack(path: &str, place: &Path) -> Result<Option<PathBuf>> {
        BUNDLE.unpack(Path::new(path), || Ok(place.to_owned()))
    }

    #[test]
    fn what_is_asked_for_is_unpacked_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let whole = std::env::current_dir().unwrap().join("assets/a");
        for path in ["assets/a", "./assets/a/", "assets/a", whole.to_str().unwrap()] {
            let found = unpack(path, folder.path()).unwrap().unwrap();
            assert_eq!(fs::read(found.join("x")).unwrap(), b"one");
            assert_eq!(fs::read(found.join("b/y")).unwrap(), b"two");
        }
        assert!(!folder.path().join("m/assets/c").exists());
        assert_eq!(fs::read(unpack("assets/c", folder.path()).unwrap().unwrap()).unwrap(), b"three");
        for other in ["", ".", "assets/a/z", "a", "assets/aa", "/assets/a", "../assets/a"] {
            assert_eq!(unpack(other, folder.path()).unwrap(), None, "{other}");
        }
    }

    #[test]
    fn a_changed_copy_is_not_what_is_carried() {
        let folder = tempfile::tempdir().unwrap();
        let is_at = |path: &str| BUNDLE.is_at(folder.path(), Path::new(path));
        for (name, content) in BUNDLE.files {
            let file = folder.path().join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, content).unwrap();
        }
        assert!(is_at("assets/a") && is_at("assets/a/x") && is_at("assets"));
        assert!(!is_at("") && !is_at("assets/d") && !is_at(folder.path().join("assets/a").to_str().unwrap()));
        fs::write(folder.path().join("assets/a/b/y"), "twO").unwrap();
        assert!(!is_at("assets/a") && is_at("assets/a/x") && is_at("assets/c"));
        fs::remove_file(folder.path().join("assets/c")).unwrap();
        assert!(!is_at("assets/c"));
    }

    #[test]
    fn what_was_changed_since_is_put_right() {
        let folder = tempfile::tempdir().unwrap();
        let file = unpack("assets/c", folder.path()).unwrap().unwrap();
        for damage in [&b"thr"[..], b"", b"THREE"] {
            fs::write(&file, damage).unwrap();
            unpack("assets/c", folder.path()).unwrap();
            assert_eq!(fs::read(&file).unwrap(), b"three");
        }
        let first = file.metadata().unwrap().modified().unwrap();
        assert_eq!(first, untouched());
    }

    #[test]
    fn processes_at_once_leave_whole_files() {
        let folder = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        let found = unpack("assets", folder.path()).unwrap().unwrap();
                        assert_eq!(fs::read(found.join("a/x")).unwrap(), b"one");
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(folder.path().join("m/assets")).unwrap().count(), 2);
    }

    #[test]
    fn a_place_that_cannot_be_written_is_said_with_the_way_out() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let error = format!("{:#}", unpack("assets/c", &file).unwrap_err());
        assert!(error.contains(VARIABLE) && error.contains("assets/c"), "{error}");
    }
}

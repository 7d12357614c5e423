//! The Hugging Face cache as `huggingface_hub` keeps it, so that Python and this program share every download.
//!
//! ```text
//! models--owner--name/refs/main                  the commit of a revision
//! models--owner--name/snapshots/COMMIT/a/file    a link to the blob, or the file itself where links are refused
//! models--owner--name/blobs/ETAG                 the bytes; ETAG.incomplete while they come
//! .locks/models--owner--name/ETAG.lock           held by whoever downloads
//! ```

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A repository's part of the cache.
#[derive(Clone, Debug)]
pub struct Cached {
    cache: PathBuf,
    folder: String,
}

impl Cached {
    pub fn new(cache: &Path, id: &str) -> Self {
        // absolute: links are told from their folder
        let cache = std::path::absolute(cache).unwrap_or_else(|_| cache.to_owned());
        Self { cache, folder: format!("models--{}", id.replace('/', "--")) }
    }

    fn path(&self) -> PathBuf {
        self.cache.join(&self.folder)
    }

    /// The cache of all repositories.
    pub fn root(&self) -> &Path {
        &self.cache
    }

    /// The commit that the cache holds for a revision.
    pub fn commit(&self, revision: &str) -> Option<String> {
        match fs::read_to_string(self.path().join("refs").join(revision)) {
            Ok(commit) => Some(commit.trim().to_owned()),
            // no ref is written for a commit hash
            Err(_) => self.path().join("snapshots").join(revision).is_dir().then(|| revision.to_owned()),
        }
    }

    /// Where a commit's file lies, or would lie.
    pub fn snapshot(&self, commit: &str, file: &str) -> PathBuf {
        self.path().join("snapshots").join(commit).join(file)
    }

    /// A file of a commit that is there.
    pub fn find(&self, commit: &str, file: &str) -> Option<PathBuf> {
        Some(self.snapshot(commit, file)).filter(|path| path.is_file())
    }

    /// The file of a commit, whose bytes `fetch` writes to the path that it is given; it may find a part of them there.
    ///
    /// # Errors
    /// The cache cannot be written, or what `fetch` returns.
    pub fn add(
        &self,
        commit: &str,
        file: &str,
        etag: &str,
        fetch: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let snapshot = self.snapshot(commit, file);
        let blobs = self.path().join("blobs");
        for folder in [Some(&*blobs), snapshot.parent()].into_iter().flatten() {
            fs::create_dir_all(folder).with_context(|| {
                format!("making {} in the Hugging Face cache; HF_HOME names another place", folder.display())
            })?;
        }
        let lock = self.lock(file, etag);
        if snapshot.is_file() {
            return Ok(snapshot);
        }
        let blob = blobs.join(etag);
        let fresh = !blob.is_file();
        if fresh {
            // without a lock another process may write there at the same time
            let part = if lock.is_some() { String::new() } else { format!(".{}", std::process::id()) };
            let part = blobs.join(format!("{etag}{part}.incomplete"));
            fetch(&part)?;
            fs::rename(&part, &blob).with_context(|| format!("renaming {}", part.display()))?;
        }
        show(&blob, &snapshot, fresh, file, link).with_context(|| format!("writing {}", snapshot.display()))?;
        Ok(snapshot)
    }

    /// Writes which commit a revision is.
    ///
    /// # Errors
    /// The cache cannot be written.
    pub fn set_commit(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.path().join("refs").join(revision);
        path.parent()
            .map_or(Ok(()), fs::create_dir_all)
            .and_then(|()| fs::write(&path, commit))
            .with_context(|| format!("writing {}", path.display()))
    }

    /// Waits for other downloads of a file to end; `None` where the file system locks nothing.
    fn lock(&self, name: &str, etag: &str) -> Option<File> {
        let folder = self.cache.join(".locks").join(&self.folder);
        fs::create_dir_all(&folder).ok()?;
        let path = folder.join(format!("{etag}.lock"));
        let mut told = false;
        loop {
            let file = File::options().create(true).append(true).open(&path).ok()?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    if !told {
                        note!("waiting for another process that downloads `{name}` (it holds {})", path.display());
                        told = true;
                    }
                    match file.lock() {
                        Ok(()) => {}
                        Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                        Err(_) => return None,
                    }
                }
                Err(TryLockError::Error(_)) => return None,
            }
            // whoever held it may have removed the file: then the next one locks another
            if is_at(&file, &path) {
                return Some(file);
            }
        }
    }
}

#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |meta: &fs::Metadata| (meta.dev(), meta.ino());
    matches!((file.metadata(), fs::metadata(path)), (Ok(a), Ok(b)) if id(&a) == id(&b))
}

#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> bool {
    true
}

/// Makes a symbolic link to the first path at the second.
type Link = fn(&Path, &Path) -> io::Result<()>;

/// Makes the snapshot's file: a link to the blob; where links are refused, the blob itself if nobody else can know of it, or
/// else a copy.
fn show(blob: &Path, snapshot: &Path, fresh: bool, file: &str, link: Link) -> io::Result<()> {
    if snapshot.is_file() {
        return Ok(());
    }
    // a link whose blob is gone
    if snapshot.symlink_metadata().is_ok() {
        fs::remove_file(snapshot)?;
    }
    let up: PathBuf = std::iter::repeat_n("..", Path::new(file).components().count() + 1).collect();
    let target = up.join("blobs").join(blob.file_name().unwrap_or_default());
    if link(&target, snapshot).is_ok() {
        if snapshot.is_file() {
            return Ok(());
        }
        fs::remove_file(snapshot)?;
    }
    if fresh && fs::rename(blob, snapshot).is_ok() {
        return Ok(());
    }
    let part = snapshot.with_added_extension(format!("{}.incomplete", std::process::id()));
    fs::copy(blob, &part).and_then(|_| fs::rename(&part, snapshot)).inspect_err(|_| {
        let _ = fs::remove_file(&part);
    })
}

#[cfg(unix)]
fn link(target: &Path, at: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, at)
}

#[cfg(not(unix))]
fn link(_: &Path, _: &Path) -> io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(text: &str) -> impl Fn(&Path) -> Result<()> {
        move |path| Ok(fs::write(path, text)?)
    }

    #[test]
    fn a_link_without_a_target_is_made_anew() {
        let cache = tempfile::tempdir().unwrap();
        let repository = Cached::new(cache.path(), "owner/name");
        let path = repository.add("c1", "unet/deep/a.json", "e1", write("{}")).unwrap();
        assert!(path.is_symlink() && fs::read_to_string(&path).unwrap() == "{}");
        fs::remove_file(repository.path().join("blobs/e1")).unwrap();
        assert_eq!(repository.find("c1", "unet/deep/a.json"), None);
        repository.add("c1", "unet/deep/a.json", "e1", write("{ }")).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{ }");
        // the same bytes in another commit come from the cache
        let never = |_: &Path| anyhow::bail!("asked for");
        let other = repository.add("c2", "b.json", "e1", never).unwrap();
        assert_eq!(fs::read_to_string(other).unwrap(), "{ }");
    }

    #[test]
    fn where_links_are_refused_or_lead_nowhere_the_file_itself_is_put_there() {
        let refuses: Link = |_, _| Err(ErrorKind::PermissionDenied.into());
        let leads_nowhere: Link = |_, at| link(Path::new("nowhere"), at);
        for link in [refuses, leads_nowhere] {
            let folder = tempfile::tempdir().unwrap();
            let [blob, first, second] = ["blob", "first", "second"].map(|name| folder.path().join(name));
            fs::write(&blob, "{}").unwrap();
            // others may know the blob: a copy
            show(&blob, &first, false, "first", link).unwrap();
            assert!(blob.is_file());
            show(&blob, &second, true, "second", link).unwrap();
            assert!(!blob.exists());
            for path in [first, second] {
                assert!(!path.is_symlink() && fs::read_to_string(path).unwrap() == "{}");
            }
        }
    }

    #[test]
    fn a_download_waits_for_that_of_another_process() {
        let cache = tempfile::tempdir().unwrap();
        let repository = Cached::new(cache.path(), "owner/name");
        let held = repository.lock("a.json", "e1").unwrap();
        let (send, receive) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let path = repository.add("c1", "a.json", "e1", |_| anyhow::bail!("downloaded twice")).unwrap();
                send.send(fs::read_to_string(path).unwrap()).unwrap();
            });
            assert!(receive.recv_timeout(std::time::Duration::from_millis(500)).is_err());
            let blob = repository.path().join("blobs/e1");
            fs::write(&blob, "theirs").unwrap();
            drop(held);
            assert_eq!(receive.recv().unwrap(), "theirs");
        });
    }
}

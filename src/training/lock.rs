//! One process trains a run: whoever writes in its folder holds `run.lock` there.
//!
//! The lock is the operating system's and ends with the process that holds it; the file that a killed process leaves
//! means nothing.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Once;

use anyhow::{Context, Error, Result, anyhow};

/// The file in a run's folder.
const NAME: &str = "run.lock";
/// How often the file, or the folder, may be removed by its last holder between two looks.
const ATTEMPTS: usize = 100;

/// A folder that another run has: says which, and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Taken(pub String);

/// The right to write in a run's folder, until it is dropped.
pub struct RunLock {
    path: PathBuf,
    file: File,
    /// The folders that were made for it, outermost first; they go with it if nothing else is in them.
    made: Vec<PathBuf>,
}

impl RunLock {
    /// Takes the lock of a folder that is there.
    ///
    /// # Errors
    /// Another process has it, or the folder cannot be written to.
    pub fn take(dir: &Path) -> Result<Self> {
        Self::acquire(dir, false)
    }

    /// Takes the lock of a folder, which is made if it is absent.
    ///
    /// # Errors
    /// As [`Self::take`], or the folder cannot be made.
    pub fn take_new(dir: &Path) -> Result<Self> {
        Self::acquire(dir, true)
    }

    /// That another process has the folder's lock, if one has.
    ///
    /// # Errors
    /// One has.
    pub fn check_free(dir: &Path) -> Result<()> {
        // shared, so that two that look at once do not see each other
        match File::open(dir.join(NAME)).map(|file| file.try_lock_shared()) {
            Ok(Err(TryLockError::WouldBlock)) => Err(held(dir)),
            _ => Ok(()),
        }
    }

    fn acquire(dir: &Path, make: bool) -> Result<Self> {
        let path = dir.join(NAME);
        let mut made: Vec<PathBuf> = Vec::new();
        for _ in 0..ATTEMPTS {
            if make {
                let missing = dir.ancestors().filter(|folder| !folder.as_os_str().is_empty() && !folder.exists());
                let mut missing: Vec<PathBuf> =
                    missing.map(Path::to_owned).filter(|path| !made.contains(path)).collect();
                missing.reverse();
                match fs::create_dir_all(dir) {
                    Err(error) if error.kind() == ErrorKind::NotFound => continue,
                    made => made.with_context(|| format!("making the run folder {}", dir.display()))?,
                }
                made.append(&mut missing);
            }
            let mut file = match File::options().read(true).write(true).create(true).truncate(false).open(&path) {
                Err(error) if make && error.kind() == ErrorKind::NotFound => continue,
                file => file.with_context(|| format!("writing {}", path.display()))?,
            };
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(held(dir)),
                Err(TryLockError::Error(error)) if cannot_lock(&error) => warn(dir, &error),
                Err(TryLockError::Error(error)) => {
                    return Err(error).with_context(|| format!("locking {}", path.display()));
                }
            }
            // its last holder may have removed the file after it was opened here
            if is_at(&file, &path) {
                // for the message of the next one that wants it; it is not needed
                let _ = file
                    .set_len(0)
                    .and_then(|()| file.rewind())
                    .and_then(|()| writeln!(file, "{}", std::process::id()));
                return Ok(Self { path, file, made });
            }
        }
        Err(anyhow!(
            "{} comes and goes: other processes are starting runs there; try again, or choose another folder by `--set run.dir=DIR`",
            path.display()
        ))
    }
}

impl Drop for RunLock {
    /// Removes the file while the lock is held, so that nobody can have it meanwhile.
    fn drop(&mut self) {
        // elsewhere than on Unix it cannot be told whether the file is still the one that is held: it stays
        if cfg!(unix) && is_at(&self.file, &self.path) && fs::remove_file(&self.path).is_ok() {
            // a folder with something in it is not removed
            self.made.iter().rev().for_each(|folder| drop(fs::remove_dir(folder)));
        }
    }
}

/// That the run is another process', and what to do.
fn held(dir: &Path) -> Error {
    let process = fs::read_to_string(dir.join(NAME)).ok().and_then(|text| text.trim().parse::<u32>().ok());
    let process = process.map_or("another process".to_owned(), |id| format!("another process (id {id})"));
    Taken(format!(
        "{process} is training the run in {}; wait until it has ended, or stop it; for another run, choose another folder by `--set run.dir=DIR`",
        dir.display()
    ))
    .into()
}

/// Whether a path still leads to the opened file.
fn is_at(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let id = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let opened = file.metadata().map(id).ok();
        opened.is_some() && opened == fs::metadata(path).map(id).ok()
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        path.exists()
    }
}

/// Whether the file system has no locks, as some network file systems.
fn cannot_lock(error: &io::Error) -> bool {
    error.kind() == ErrorKind::Unsupported || (cfg!(unix) && error.raw_os_error() == Some(libc::ENOLCK))
}

/// Says once that two processes would not see each other.
fn warn(dir: &Path, error: &io::Error) {
    static WARNED: Once = Once::new();
    WARNED.call_once(|| {
        note!(
            "warning: the file system of {} has no locks ({error}): nothing keeps a second process from training this run",
            dir.display()
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_holder_and_is_left_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("runs/one");
        let first = RunLock::take_new(&dir).unwrap();
        for refused in [RunLock::take(&dir).err(), RunLock::take_new(&dir).err(), RunLock::check_free(&dir).err()] {
            let message = refused.unwrap().to_string();
            let id = format!("another process (id {})", std::process::id());
            assert!(message.contains(&id) && message.contains("runs/one"), "{message}");
        }
        drop(first);
        assert!(!folder.path().join("runs").exists());
        assert!(RunLock::take(&dir).is_err() && !dir.exists(), "a folder that is not there is not made");

        // what a killed process leaves
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(NAME), "1\n").unwrap();
        RunLock::check_free(&dir).unwrap();
        let second = RunLock::take(&dir).unwrap();
        drop(second);
        assert!(dir.exists() && !dir.join(NAME).exists());
    }

    #[test]
    fn a_folder_that_was_moved_away_does_not_take_the_lock_of_the_new_one_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("run");
        let first = RunLock::take_new(&dir).unwrap();
        fs::rename(&dir, folder.path().join("elsewhere")).unwrap();
        let second = RunLock::take_new(&dir).unwrap();
        drop(first);
        assert!(RunLock::take(&dir).is_err());
        drop(second);
        assert!(!dir.exists());
    }

    #[test]
    fn of_many_that_begin_at_once_one_holds_the_folder_at_a_time() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("runs/one");
        let (holders, held) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..300 {
                        let Ok(lock) = RunLock::take_new(&dir) else { continue };
                        assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                        held.fetch_add(1, Ordering::SeqCst);
                        assert_eq!(holders.fetch_sub(1, Ordering::SeqCst), 1);
                        drop(lock);
                    }
                });
            }
        });
        assert!(held.load(Ordering::SeqCst) > 0);
    }
}

//! The bytes of a file that is read here and there: mapped where that can be.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

use anyhow::{Context, Result, bail};
use memmap2::Mmap;

/// The bytes of a weight file.
pub enum FileBytes {
    /// Only what is asked for is read.
    Mapped(Mmap),
    /// Where the file system maps nothing (FUSE, 9p, some network mounts).
    Read(Vec<u8>),
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Read(bytes) => bytes,
        }
    }
}

impl FileBytes {
    /// # Errors
    /// The file is missing, empty or unreadable; names it.
    pub fn open(path: &Path) -> Result<Self> {
        // SAFETY: the map is read-only. Weight files are replaced by renaming, here and in the hub's cache, never written
        // in place; whoever truncates one while it is read gets a bus error, as with every program that maps weights.
        Self::open_by(path, |file| unsafe { Mmap::map(file) })
    }

    fn open_by(path: &Path, map: impl Fn(&File) -> io::Result<Mmap>) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        if file.metadata().with_context(|| format!("opening {}", path.display()))?.len() == 0 {
            bail!("{} is empty; download or copy it again", path.display());
        }
        match map(&file) {
            Ok(map) => Ok(Self::Mapped(map)),
            Err(refused) => std::fs::read(path)
                .map(Self::Read)
                .with_context(|| format!("reading {}, which cannot be mapped ({refused})", path.display())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_cannot_be_mapped_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        std::fs::write(&path, [7, 8, 9]).unwrap();
        let refuse = |_: &File| Err(io::Error::from(io::ErrorKind::Unsupported));
        let read = FileBytes::open_by(&path, refuse).unwrap();
        let mapped = FileBytes::open(&path).unwrap();
        assert!(matches!((&read, &mapped), (FileBytes::Read(_), FileBytes::Mapped(_))));
        assert_eq!((&read[..], &mapped[..]), (&[7, 8, 9][..], &[7, 8, 9][..]));
    }
}

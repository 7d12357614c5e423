//! Writing whole or not at all: under another name first, then renamed.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor};
use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::{Map, json};

/// How the names of files and folders begin that are not finished: whoever may write beside them removes them when the
/// process that made them is gone.
pub const UNFINISHED: &str = ".unfinished-";

/// Replaces a file: a reader, also after a crash, sees the old one or the new one.
///
/// # Errors
/// The folder is absent or cannot be written, or what `write` returns; the old file is then as it was.
pub fn replace_file(path: &Path, write: impl FnOnce(&mut BufWriter<&File>) -> Result<()>) -> Result<()> {
    let folder = folder_of(path);
    // `make_in`: the umask decides who may read; the default is a file for its owner alone.
    let temporary = tempfile::Builder::new().prefix(UNFINISHED).make_in(folder, |name| File::create_new(name))?;
    let mut out = BufWriter::new(temporary.as_file());
    write(&mut out)?;
    out.flush()?;
    drop(out);
    temporary.as_file().sync_all()?;
    temporary.persist(path)?;
    sync_folder(folder)
}

/// Replaces a file by these bytes, as [`replace_file`] does.
///
/// # Errors
/// The file cannot be written; the error names it.
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    replace_file(path, |out| Ok(out.write_all(bytes)?)).with_context(|| format!("writing {}", path.display()))
}

/// Makes the folder that a file goes into.
///
/// # Errors
/// It cannot be made; the error names the file.
pub fn make_folder_of(path: &Path) -> Result<()> {
    fs::create_dir_all(folder_of(path)).with_context(|| format!("making the folder of {}", path.display()))
}

/// Looks whether a file can be written, in a folder that may have to be made; leaves nothing.
///
/// # Errors
/// It cannot; the error names it.
pub fn check_writable(path: &Path) -> Result<()> {
    ensure!(!path.is_dir(), "{} is a folder: name a file", path.display());
    let folders = path.ancestors().skip(1).map(|folder| if folder == Path::new("") { Path::new(".") } else { folder });
    let folder = folders.into_iter().find(|folder| folder.exists()).unwrap_or(Path::new("."));
    let made = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(folder);
    made.map(drop).with_context(|| format!("{} cannot be written", path.display()))
}

/// Makes a folder: `fill` writes into one of another name, which is renamed when all of it is on disk.
///
/// # Errors
/// There is something else at `path` already, it cannot be written, or what `fill` returns; nothing is left then.
pub fn new_folder(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    check_free(path)?;
    let parent = folder_of(path);
    fs::create_dir_all(parent).with_context(|| format!("making the folder {}", parent.display()))?;
    let temporary = tempfile::Builder::new().prefix(UNFINISHED).tempdir_in(parent)?;
    let unfinished = temporary.path().join("folder"); // the temporary one is for its owner alone
    fs::create_dir(&unfinished)?;
    fill(&unfinished)?;
    sync_all(&unfinished)?;
    check_free(path)?;
    fs::rename(&unfinished, path)?;
    sync_folder(parent)
}

/// # Errors
/// `path` is a file or a folder that holds something: it is not replaced.
fn check_free(path: &Path) -> Result<()> {
    let empty = path.is_dir() && fs::read_dir(path)?.next().is_none();
    ensure!(empty || !path.exists(), "{} exists already; remove it or give another --out", path.display());
    Ok(())
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn sync_all(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path: PathBuf = entry?.path();
        if path.is_dir() {
            sync_all(&path)?;
        } else {
            File::open(&path)?.sync_all()?;
        }
    }
    sync_folder(folder)
}

/// Waits until what was renamed in a folder is on disk, where the file system can say so.
///
/// # Errors
/// The folder is gone or the disk fails.
pub fn sync_folder(folder: &Path) -> Result<()> {
    // elsewhere a folder cannot be opened; the rename itself is then the best there is
    #[cfg(unix)]
    if let Err(error) = File::open(folder)?.sync_all() {
        // CIFS and some FUSE file systems sync files but no folders: the same holds for them
        let cannot = [libc::EINVAL, libc::ENOTSUP, libc::EBADF];
        ensure!(error.raw_os_error().is_some_and(|code| cannot.contains(&code)), error);
    }
    Ok(())
}

/// One tensor of a safetensors file that is to be written.
#[derive(Clone, Debug)]
pub struct SafetensorsEntry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

/// Length of the header, header, data: one tensor after another, so that a model larger than memory can be written.
/// `data` gives the little-endian bytes of an entry.
///
/// Not the crate's own writer: it sorts the tensors, but `__metadata__` follows the random order of a `HashMap`, so two
/// equal runs would give different files; and it wants all tensors at once.
///
/// # Errors
/// `data` fails or gives bytes of another number than the entry has, or the file cannot be written.
pub fn write_safetensors<'a>(
    out: &mut impl Write,
    metadata: &BTreeMap<String, String>,
    entries: &[SafetensorsEntry],
    mut data: impl FnMut(usize) -> Result<Cow<'a, [u8]>>,
) -> Result<()> {
    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), json!(metadata));
    }
    let size = |entry: &SafetensorsEntry| entry.shape.iter().product::<usize>() * entry.dtype.bitsize() / 8;
    let mut start = 0;
    for entry in entries {
        let end = start + size(entry);
        header.insert(
            entry.name.clone(),
            json!({"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, end]}),
        );
        start = end;
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' '); // so that the data can be mapped aligned
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for (i, entry) in entries.iter().enumerate() {
        let bytes = data(i)?;
        ensure!(bytes.len() == size(entry), "{} bytes for `{}` of {}", bytes.len(), entry.name, size(entry));
        out.write_all(&bytes)?;
    }
    Ok(())
}

/// Replaces a safetensors file by these tensors, as f32, f16 or bf16.
///
/// # Errors
/// As [`replace_file`] and [`float_bytes`]; a tensor has a number that is too large for `dtype`, or is zero in it and was not.
pub fn save_tensors(
    path: &Path,
    metadata: &BTreeMap<String, String>,
    tensors: &[(String, Tensor)],
    dtype: DType,
) -> Result<()> {
    let stored = match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        other => bail!("tensors cannot be saved as {other:?}"),
    };
    let entry = |(name, tensor): &(String, Tensor)| SafetensorsEntry {
        name: name.clone(),
        dtype: stored,
        shape: tensor.dims().to_vec(),
    };
    let entries: Vec<_> = tensors.iter().map(entry).collect();
    for (name, tensor) in tensors {
        check_fits(name, tensor, dtype)?;
    }
    replace_file(path, |out| {
        write_safetensors(out, metadata, &entries, |i| Ok(Cow::Owned(float_bytes(&tensors[i].1, dtype)?)))
    })
}

fn check_fits(name: &str, tensor: &Tensor, dtype: DType) -> Result<()> {
    if tensor.dtype() == dtype {
        return Ok(());
    }
    let largest = |tensor: &Tensor| -> Result<f64> {
        let sizes = tensor.flatten_all()?.to_dtype(DType::F64)?.abs()?;
        Ok(if sizes.elem_count() == 0 { 0.0 } else { sizes.max(0)?.to_scalar()? })
    };
    let (before, after) = (largest(tensor)?, largest(&tensor.to_dtype(dtype)?)?);
    let better = if dtype == DType::F16 { "bf16 or f32" } else { "f32" };
    ensure!(
        after.is_finite() || !before.is_finite(),
        "`{name}` has a number of size {before:.4e}, which is infinite as {}: choose {better}",
        dtype.as_str()
    );
    ensure!(
        after > 0.0 || before == 0.0 || before.is_nan(),
        "all numbers of `{name}`, of size {before:.4e} at most, are zero as {}: choose {better}",
        dtype.as_str()
    );
    Ok(())
}

/// The elements of a tensor in the order of its axes, converted and little-endian.
///
/// # Errors
/// `dtype` is none of f32, f16, bf16 and f64.
pub fn float_bytes(tensor: &Tensor, dtype: DType) -> Result<Vec<u8>> {
    let values = tensor.flatten_all()?.to_dtype(dtype)?;
    Ok(match dtype {
        DType::F32 => values.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect(),
        DType::F16 => values.to_vec1::<f16>()?.into_iter().flat_map(f16::to_le_bytes).collect(),
        DType::BF16 => values.to_vec1::<bf16>()?.into_iter().flat_map(bf16::to_le_bytes).collect(),
        DType::F64 => values.to_vec1::<f64>()?.into_iter().flat_map(f64::to_le_bytes).collect(),
        other => bail!("floats cannot be written as {other:?}"),
    })
}

//! PyTorch's files (`.bin`, `.pt`, `.pth`, `.ckpt`): the tensors of a state dict, without running what a pickle says.
//!
//! Since 1.6 torch.save writes a zip archive with a pickle and the storages of the tensors; before, and on demand still, five pickles
//! in a row with the storages behind them. Pickles of every binary protocol are read. Their objects are plain ones
//! (`objects`), and are read here with their arity and their ranges checked, so a malformed file is an error.

mod legacy;
mod objects;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::io::Cursor;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use safetensors::Dtype;
use zip::{CompressionMethod, ZipArchive};

use objects::{Id, Object, Objects};

/// How zip archives begin.
const ZIP: &[u8] = b"PK\x03\x04";

/// Whether torch.save may have written the file, by how it begins.
pub fn is_archive(file: &[u8]) -> bool {
    file.starts_with(ZIP) || legacy::is_legacy(file)
}

/// Names that training scripts give the state dict inside of what they save.
const NESTED: [&str; 4] = ["state_dict", "model", "module", "model_state_dict"];

/// What a state dict holds.
#[derive(Debug, Default)]
pub struct Archive {
    pub tensors: BTreeMap<String, PickledTensor>,
    /// The whole numbers that were saved beside the state dict, such as `global_step`.
    pub integers: BTreeMap<String, i64>,
}

/// Where a tensor lies in the archive.
#[derive(Debug)]
pub struct PickledTensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Bytes of the archive, from the tensor's first element to behind its last.
    pub range: Range<usize>,
    /// In elements; absent: the elements follow each other in the order of the axes.
    pub stride: Option<Vec<usize>>,
}

impl PickledTensor {
    /// The elements in the order of the axes, out of the archive that the tensor was found in.
    pub fn bytes<'a>(&self, archive: &'a [u8]) -> Cow<'a, [u8]> {
        gather(&archive[self.range.clone()], self.dtype, &self.shape, self.stride.as_deref())
    }
}

/// The elements of a strided tensor in the order of its axes.
pub fn gather<'a>(bytes: &'a [u8], dtype: Dtype, shape: &[usize], stride: Option<&[usize]>) -> Cow<'a, [u8]> {
    let Some(stride) = stride else { return Cow::Borrowed(bytes) };
    let width = dtype.bitsize() / 8;
    let mut out = Vec::with_capacity(shape.iter().product::<usize>() * width);
    let mut index = vec![0; shape.len()];
    for _ in 0..shape.iter().product::<usize>() {
        let start = width * index.iter().zip(stride).map(|(i, s)| i * s).sum::<usize>();
        out.extend_from_slice(&bytes[start..start + width]);
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            if index[axis] < shape[axis] {
                break;
            }
            index[axis] = 0;
        }
    }
    Cow::Owned(out)
}

/// Finds the tensors of a file: of a bare state dict, or of one under `state_dict`, `model`, `module` or `model_state_dict`.
///
/// # Errors
/// Not such a file, a truncated or malformed one, or one that holds no named tensors.
pub fn read(file: &[u8]) -> Result<Archive> {
    if legacy::is_legacy(file) {
        return legacy::read(file);
    }
    let files = storages(file)?;
    let name = files.keys().find(|name| *name == "data.pkl" || name.ends_with("/data.pkl"));
    let name = name.context("the archive has no data.pkl: it was not written by torch.save")?;
    let folder = name.strip_suffix("data.pkl").unwrap_or_default();
    let order = files.get(&format!("{folder}byteorder")).map(|range| &file[range.clone()]);
    ensure!(order.is_none_or(|order| order != b"big"), BIG_ENDIAN);
    let objects = Objects::read(&file[files[name].clone()])?;
    tensors(&objects, |name| files.get(&format!("{folder}data/{name}")).cloned())
}

const BIG_ENDIAN: &str = "its numbers are big-endian; save it again on another machine";

/// The tensors that the objects describe, out of the storages of these names.
fn tensors(objects: &Objects, storage: impl Fn(&str) -> Option<Range<usize>>) -> Result<Archive> {
    let entries = state_dict(objects).context("it holds no state dict; save a model's state_dict()")?;
    let mut found = Archive::default();
    for &(key, value) in entries {
        let Some(key) = objects.text(key) else { continue };
        if let Some(tensor) = tensor(objects, value, &storage).with_context(|| format!("the tensor `{key}`"))? {
            found.tensors.insert(key.to_owned(), tensor);
        }
    }
    ensure!(!found.tensors.is_empty(), "it holds no named tensors; save a model's state_dict()");
    for &(key, value) in objects.dict(objects.root).unwrap_or_default() {
        if let (Some(key), Some(n)) = (objects.text(key), objects.int(value)) {
            found.integers.insert(key.to_owned(), n);
        }
    }
    Ok(found)
}

/// The files of the archive: PyTorch stores them without compression, so each is a range of bytes.
fn storages(archive: &[u8]) -> Result<HashMap<String, Range<usize>>> {
    const DAMAGED: &str = "truncated or not a PyTorch archive (1.6 or later)";
    let mut zip = ZipArchive::new(Cursor::new(archive)).context(DAMAGED)?;
    let mut files = HashMap::new();
    for i in 0..zip.len() {
        let file = zip.by_index_raw(i).context(DAMAGED)?;
        let name = file.name().context(DAMAGED)?.into_owned();
        let stored = file.compression() == CompressionMethod::Stored && !file.encrypted();
        ensure!(stored, "the archive's `{name}` is compressed, which torch.save never does");
        let start = file.data_start().context(DAMAGED)?;
        let end = start.checked_add(file.size()).filter(|&end| end <= archive.len() as u64).context(DAMAGED)?;
        files.insert(name, start as usize..end as usize);
    }
    Ok(files)
}

fn state_dict<'o>(objects: &'o Objects) -> Option<&'o [(Id, Id)]> {
    let outer = objects.dict(objects.root)?;
    let holds_tensors =
        |entries: &&[(Id, Id)]| entries.iter().any(|&(_, value)| matches!(objects.get(value), Object::Call { .. }));
    let named = |name: &str| {
        let (_, value) = outer.iter().find(|&&(key, _)| objects.text(key) == Some(name))?;
        objects.dict(*value).filter(holds_tensors)
    };
    NESTED.iter().find_map(|name| named(name)).or(Some(outer))
}

/// A storage as a pickle names it.
struct Storage<'a> {
    /// `FloatStorage`
    class: &'a str,
    name: &'a str,
}

impl<'a> Storage<'a> {
    fn of(objects: &Objects<'a>, id: Id) -> Result<Self> {
        let storage = objects.tuple(id, 5, "the storage")?;
        let (&Object::Class { name: class, .. }, Some(name)) = (objects.get(storage[1]), objects.text(storage[2]))
        else {
            bail!("malformed: a storage without a type or a name");
        };
        let is_view = storage.get(5).is_some_and(|&view| !matches!(objects.get(view), Object::Other));
        ensure!(!is_view, "the storage `{name}` is a part of another; load the file with PyTorch and save it again");
        Ok(Self { class, name })
    }
}

/// What `torch._utils._rebuild_tensor_v2(storage, offset, size, stride, ..)` would rebuild; nothing for other objects.
fn tensor(
    objects: &Objects,
    value: Id,
    storage: impl Fn(&str) -> Option<Range<usize>>,
) -> Result<Option<PickledTensor>> {
    let &Object::Call { callable, args, .. } = objects.get(value) else { return Ok(None) };
    let (callable, args) = if objects.is_class(callable, "torch._tensor", "_rebuild_from_type_v2") {
        let args = objects.tuple(args, 3, "the tensor of a subclass")?;
        (args[0], args[2])
    } else if objects.is_class(callable, "torch._utils", "_rebuild_parameter") {
        let args = objects.tuple(args, 1, "the parameter")?;
        let &Object::Call { callable, args, .. } = objects.get(args[0]) else {
            bail!("malformed: a parameter without a tensor");
        };
        (callable, args)
    } else {
        (callable, args)
    };
    if !objects.is_class(callable, "torch._utils", "_rebuild_tensor_v2") {
        return Ok(None);
    }
    let args = objects.tuple(args, 4, "the tensor's description")?;
    let &Object::Stored(stored) = objects.get(args[0]) else { bail!("malformed: a tensor without a storage") };
    let stored = Storage::of(objects, stored)?;
    let dtype = match stored.class {
        "FloatStorage" => Dtype::F32,
        "DoubleStorage" => Dtype::F64,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::BF16,
        "LongStorage" => Dtype::I64,
        "IntStorage" => Dtype::I32,
        "ShortStorage" => Dtype::I16,
        "CharStorage" => Dtype::I8,
        "ByteStorage" => Dtype::U8,
        "BoolStorage" => Dtype::BOOL,
        _ => return Ok(None),
    };
    let size = |&id: &Id| {
        let n = objects.int(id).context("malformed: a size is not a whole number")?;
        usize::try_from(n).context("malformed: a size is negative")
    };
    let sizes = |id, what| objects.tuple(id, 0, what)?.iter().map(size).collect::<Result<Vec<usize>>>();
    let (offset, shape, stride) = (size(&args[1])?, sizes(args[2], "the shape")?, sizes(args[3], "the stride")?);
    ensure!(shape.len() == stride.len(), "malformed: {} axes with {} strides", shape.len(), stride.len());
    let file = storage(stored.name)
        .with_context(|| format!("the archive has no storage `{}`; download or save it again", stored.name))?;
    let (range, stride) =
        place(dtype, offset, &shape, stride, file).context("malformed: it lies outside of its storage")?;
    Ok(Some(PickledTensor { dtype, shape, range, stride }))
}

/// The bytes that a tensor spans, and its stride where it matters; nothing if they are not all in `storage`.
fn place(
    dtype: Dtype,
    offset: usize,
    shape: &[usize],
    stride: Vec<usize>,
    storage: Range<usize>,
) -> Option<(Range<usize>, Option<Vec<usize>>)> {
    let width = dtype.bitsize() / 8;
    let (mut next, mut last, mut contiguous) = (1usize, 0usize, true);
    for (&length, &step) in shape.iter().zip(&stride).rev() {
        contiguous &= length == 1 || step == next;
        next = next.checked_mul(length)?;
        last = last.checked_add(length.saturating_sub(1).checked_mul(step)?)?;
    }
    let length = if next == 0 { 0 } else { last.checked_add(1)?.checked_mul(width)? };
    let start = storage.start.checked_add(offset.checked_mul(width)?)?;
    let end = start.checked_add(length)?;
    // the elements of a tensor that reads its storage more than once may be many more than the bytes
    let fits = end <= storage.end && next.checked_mul(width)? <= storage.len();
    fits.then_some((start..end, if contiguous || next == 0 { None } else { Some(stride) }))
}

#[cfg(test)]
pub(crate) mod testing {
    /// A zip archive without compression: all that PyTorch's format needs.
    pub(crate) fn zip(files: &[(&str, &[u8])]) -> Vec<u8> {
        let crc = |data: &[u8]| {
            !data.iter().fold(!0u32, |crc, &byte| {
                (0..8).fold(crc ^ u32::from(byte), |c, _| if c & 1 == 1 { c >> 1 ^ 0xEDB8_8320 } else { c >> 1 })
            })
        };
        let (mut out, mut directory) = (Vec::new(), Vec::new());
        for (name, data) in files {
            let offset = out.len() as u32;
            let mut fields = vec![20, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            fields.extend([crc(data), data.len() as u32, data.len() as u32].iter().flat_map(|x| x.to_le_bytes()));
            fields.extend([name.len() as u8, 0, 0, 0]);
            out.extend([b"PK\x03\x04", &fields[..], name.as_bytes(), data].concat());
            directory.extend(
                [b"PK\x01\x02\x14\x00", &fields[..], &[0; 10], &offset.to_le_bytes(), name.as_bytes()].concat(),
            );
        }
        let n = files.len() as u8;
        let (size, offset) = (directory.len() as u32, out.len() as u32);
        out.extend([&directory[..], b"PK\x05\x06\0\0\0\0", &[n, 0, n, 0]].concat());
        out.extend([&size.to_le_bytes()[..], &offset.to_le_bytes(), &[0, 0]].concat());
        out
    }

    /// A file of the old format that holds [`state_dict`]: floats from 0 on.
    pub(crate) fn legacy(protocol: u8) -> Vec<u8> {
        let system = [b"}", &text("little_endian")[..], b"\x88s"].concat();
        legacy_of(protocol, [b"M\xe9\x03", &system, &state_dict(), &[b"]", &text("0")[..], b"a"].concat()])
    }

    /// As [`legacy`], of the version, the facts, the object and the names given.
    pub(crate) fn legacy_of(protocol: u8, parts: [&[u8]; 4]) -> Vec<u8> {
        let mut file = Vec::new();
        for part in [&b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"[..]].into_iter().chain(parts) {
            file.extend([0x80, protocol]);
            if protocol >= 4 {
                file.extend([&[0x95][..], &(part.len() as u64 + 1).to_le_bytes()].concat());
            }
            file.extend([part, b"."].concat());
        }
        file.extend(6u64.to_le_bytes());
        file.extend((0..6u8).flat_map(|i| f32::from(i).to_le_bytes()));
        file
    }

    /// The opcode for a string.
    pub(crate) fn text(s: &str) -> Vec<u8> {
        [b"X", &(s.len() as u32).to_le_bytes()[..], s.as_bytes()].concat()
    }

    /// {"w": a float tensor of shape (2, 3)}
    pub(crate) fn state_dict() -> Vec<u8> {
        tensor(b"K\0", b"K\x02K\x03\x86", b"K\x03K\x01\x86")
    }

    /// {"w": a float tensor in a storage of six}
    pub(crate) fn tensor(offset: &[u8], shape: &[u8], stride: &[u8]) -> Vec<u8> {
        let storage = [&text("storage")[..], b"ctorch\nFloatStorage\n", &text("0"), &text("cpu"), b"K\x06tQ"].concat();
        let end = b"\x89ccollections\nOrderedDict\n)RtRs";
        [b"}", &text("w")[..], b"ctorch._utils\n_rebuild_tensor_v2\n((", &storage, offset, shape, stride, end].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{state_dict, tensor, text, zip};
    use super::*;

    fn archive(pickle: &[u8]) -> Vec<u8> {
        let data: Vec<u8> = (0..6u8).flat_map(|i| f32::from(i).to_le_bytes()).collect();
        zip(&[("archive/data.pkl", &[b"\x80\x02", pickle, b"."].concat()), ("archive/data/0", &data)])
    }

    fn values(archive: &[u8], tensor: &PickledTensor) -> Vec<f32> {
        tensor.bytes(archive).as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
    }

    #[test]
    fn tensors_are_read_whatever_their_stride() {
        for (offset, shape, stride, expected) in [
            (&b"K\0"[..], &b"K\x02K\x03\x86"[..], &b"K\x03K\x01\x86"[..], &[0., 1., 2., 3., 4., 5.][..]),
            (b"K\0", b"K\x03K\x02\x86", b"K\x01K\x03\x86", &[0., 3., 1., 4., 2., 5.]), // a transposed one
            (b"K\x02", b"K\x02\x85", b"K\x02\x85", &[2., 4.]),
            (b"K\x05", b")", b")", &[5.]),
            (b"K\0", b"K\0K\x03\x86", b"K\x03K\x01\x86", &[]),
        ] {
            let archive = archive(&tensor(offset, shape, stride));
            let found = read(&archive).unwrap();
            assert_eq!(values(&archive, &found.tensors["w"]), expected, "{shape:?}");
        }
    }

    #[test]
    fn newer_protocols_say_the_same_in_other_opcodes() {
        let short = |s: &str| [&[0x8c, s.len() as u8], s.as_bytes(), b"\x94"].concat();
        let long = |s: &str| [b"\x8d", &(s.len() as u64).to_le_bytes()[..], s.as_bytes(), b"\x94"].concat();
        // {"w": a tensor in a storage of six, "v": the same storage's last two}, with strings and classes out of the memo
        let parts: [&[u8]; 16] = [
            b"}\x94(",
            &short("w"),                                                        // 1
            &[short("torch._utils"), short("_rebuild_tensor_v2")].concat(),     // 2, 3
            b"\x93\x94((",                                                      // 4
            &[short("storage"), long("torch"), short("FloatStorage")].concat(), // 5, 6, 7
            b"\x93\x94",                                                        // 8
            &[short("0"), short("cpu")].concat(),                               // 9, 10
            b"K\x06t\x94QK\0K\x02K\x03\x86\x94K\x03K\x01\x86\x94\x89",          // 11, 12, 13
            &[short("collections"), short("OrderedDict")].concat(),             // 14, 15
            b"\x93\x94)R\x94t\x94R\x94",                                        // 16, 17, 18, 19
            &short("v"),                                                        // 20
            b"h\x04((h\x05h\x08h\x09h\x0aK\x06tQK\x04K\x02\x85K\x01\x85\x89h\x11tR",
            &short("other"),
            b"\x8f(K\x01\x90",
            &short("bytes"),
            b"C\x02ab\x96\x01\0\0\0\0\0\0\0z0u",
        ];
        let frame = |pickle: &[u8]| [b"\x95", &(pickle.len() as u64 + 1).to_le_bytes()[..], pickle].concat();
        for pickle in [parts.concat(), frame(&parts.concat())] {
            let archive = archive(&pickle);
            let found = read(&archive).unwrap();
            assert_eq!(values(&archive, &found.tensors["w"]), [0., 1., 2., 3., 4., 5.]);
            assert_eq!(values(&archive, &found.tensors["v"]), [4., 5.]);
        }
    }

    #[test]
    fn numbers_of_protocol_1_are_texts() {
        let shape = tensor(b"I0\n", b"(L2L\nI3\nt", b"(I3\nL1L\nt");
        let archive = archive(
            &shape.iter().flat_map(|&b| if b == 0x89 { b"I00\n".to_vec() } else { vec![b] }).collect::<Vec<_>>(),
        );
        assert_eq!(values(&archive, &read(&archive).unwrap().tensors["w"]), [0., 1., 2., 3., 4., 5.]);
    }

    #[test]
    fn an_opcode_without_a_meaning_here_is_named_with_the_way_out() {
        let e = read(&archive(b"\x82\x01")).unwrap_err().to_string();
        assert!(e.contains("0x82") && e.contains("torch.save(torch.load("), "{e}");
    }

    #[test]
    fn objects_that_hold_each_other_cost_what_they_weigh() {
        // a list in itself; a tuple of two of the tuple before it, a hundred times
        let nested: Vec<u8> = (0..100).flat_map(|i| [b'q', i, b'h', i, 0x86]).collect();
        let pickle =
            [b"}", &text("x")[..], b"]q\xc8h\xc8as", &text("y"), b")", &nested, b"s", &state_dict()[1..]].concat();
        assert_eq!(read(&archive(&pickle)).unwrap().tensors.len(), 1);
    }

    #[test]
    fn what_lies_around_the_state_dict_is_told_apart() {
        let whole =
            [b"}", &text("global_step")[..], b"J\x78\x0d\0\0s", &text("state_dict"), &state_dict(), b"s"].concat();
        let found = read(&archive(&whole)).unwrap();
        assert_eq!((found.tensors.len(), found.integers["global_step"]), (1, 3448));
        let e = read(&archive(&[b"}", &text("x")[..], b"K\x01s"].concat())).unwrap_err().to_string();
        assert!(e.contains("no named tensors"), "{e}");
    }

    #[test]
    fn no_change_of_an_archive_makes_it_panic() {
        let whole = archive(&[b"}", &text("state_dict")[..], &state_dict(), b"s"].concat());
        let expected = values(&whole, &read(&whole).unwrap().tensors["w"]);
        assert_eq!(expected, [0., 1., 2., 3., 4., 5.]);
        let mut refused = 0;
        for position in 0..whole.len() {
            for value in [0x00, 0x01, 0x28, 0x52, 0x71, 0x74, 0x7f, 0x80, 0x85, 0xff] {
                let mut changed = whole.clone();
                changed[position] = value;
                match read(&changed) {
                    Ok(found) => found.tensors.values().for_each(|tensor| drop(tensor.bytes(&changed))),
                    Err(_) => refused += 1,
                }
            }
            refused += usize::from(read(&whole[..position]).is_err());
        }
        assert!(refused > whole.len(), "{refused} of {} changes were refused", whole.len());
    }
}

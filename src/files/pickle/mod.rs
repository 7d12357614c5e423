//! PyTorch's zip archives (`.bin`, `.pt`, `.pth`, `.ckpt`): the tensors of a state dict, without running what a pickle says.
//!
//! candle's unpickler makes plain objects of the opcodes. It trusts them in three ways, which `check` rules out before:
//! deep nesting (a recursion that ends the process), objects that copy each other (memory), and lengths without bytes
//! behind them. The objects are then read with their arity and their ranges checked, so a malformed file is an error.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::io::Cursor;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use candle_core::pickle::{Object, Stack};
use safetensors::Dtype;
use zip::{CompressionMethod, ZipArchive};

/// How zip archives begin.
pub const MAGIC: &[u8] = b"PK\x03\x04";

/// Names that training scripts give the state dict inside of what they save.
const NESTED: [&str; 3] = ["state_dict", "model", "module"];

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

/// Finds the tensors of an archive: of a bare state dict, or of one under `state_dict`, `model` or `module`.
///
/// # Errors
/// Not such an archive, a truncated or malformed one, or one that holds no named tensors.
pub fn read(archive: &[u8]) -> Result<Archive> {
    let storages = storages(archive)?;
    let name = storages.keys().find(|name| *name == "data.pkl" || name.ends_with("/data.pkl"));
    let name = name.context("the archive has no data.pkl: it was not written by torch.save")?;
    let folder = name.strip_suffix("data.pkl").unwrap_or_default();
    let pickle = &archive[storages[name].clone()];
    check(pickle)?;
    let mut stack = Stack::empty();
    stack.read_loop(&mut &*pickle)?;
    let root = stack.finalize()?;

    let entries = state_dict(&root).context("it holds no state dict; save a model's state_dict()")?;
    let mut found = Archive::default();
    for (key, value) in entries {
        let Object::Unicode(key) = key else { continue };
        let tensor = tensor(value, |file| storages.get(&format!("{folder}data/{file}")).cloned());
        if let Some(tensor) = tensor.with_context(|| format!("the tensor `{key}`"))? {
            found.tensors.insert(key.clone(), tensor);
        }
    }
    ensure!(!found.tensors.is_empty(), "it holds no named tensors; save a model's state_dict()");
    for (key, value) in dict(&root).unwrap_or_default() {
        match (key, value) {
            (Object::Unicode(key), Object::Int(n)) => found.integers.insert(key.clone(), i64::from(*n)),
            (Object::Unicode(key), Object::Long(n)) => found.integers.insert(key.clone(), *n),
            _ => None,
        };
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

type Entries = [(Object, Object)];

fn dict(object: &Object) -> Option<&Entries> {
    match object {
        Object::Dict(entries) => Some(entries),
        // a TorchScript module: its attributes
        Object::Build { args, .. } => dict(args),
        _ => None,
    }
}

fn state_dict(root: &Object) -> Option<&Entries> {
    let outer = dict(root)?;
    let named = |name: &str| {
        let (_, value) = outer.iter().find(|(key, _)| matches!(key, Object::Unicode(key) if key == name))?;
        dict(value).filter(|entries| entries.iter().any(|(_, value)| matches!(value, Object::Reduce { .. })))
    };
    NESTED.iter().find_map(|name| named(name)).or(Some(outer))
}

fn tuple<'a>(object: &'a Object, at_least: usize, what: &str) -> Result<&'a [Object]> {
    match object {
        Object::Tuple(items) if items.len() >= at_least => Ok(items),
        _ => bail!("malformed: {what} is not a tuple of {at_least} or more"),
    }
}

fn is_class(object: &Object, module: &str, class: &str) -> bool {
    matches!(object, Object::Class { module_name, class_name } if module_name == module && class_name == class)
}

fn size(object: &Object) -> Result<usize> {
    let number = match object {
        Object::Int(n) => i64::from(*n),
        Object::Long(n) => *n,
        _ => bail!("malformed: a size is not a whole number"),
    };
    usize::try_from(number).context("malformed: a size is negative")
}

/// What `torch._utils._rebuild_tensor_v2(storage, offset, size, stride, ..)` would rebuild; nothing for other objects.
fn tensor(value: &Object, file: impl Fn(&str) -> Option<Range<usize>>) -> Result<Option<PickledTensor>> {
    let Object::Reduce { callable, args } = value else { return Ok(None) };
    let (callable, args) = match &**callable {
        class if is_class(class, "torch._tensor", "_rebuild_from_type_v2") => {
            let args = tuple(args, 3, "the tensor of a subclass")?;
            (&args[0], &args[2])
        }
        class if is_class(class, "torch._utils", "_rebuild_parameter") => match &tuple(args, 1, "the parameter")?[0] {
            Object::Reduce { callable, args } => (&**callable, &**args),
            _ => bail!("malformed: a parameter without a tensor"),
        },
        class => (class, &**args),
    };
    if !is_class(callable, "torch._utils", "_rebuild_tensor_v2") {
        return Ok(None);
    }
    let args = tuple(args, 4, "the tensor's description")?;
    let Object::PersistentLoad(storage) = &args[0] else { bail!("malformed: a tensor without a storage") };
    let storage = tuple(storage, 5, "the storage")?;
    let (Object::Class { class_name, .. }, Object::Unicode(name)) = (&storage[1], &storage[2]) else {
        bail!("malformed: a storage without a type or a name");
    };
    let dtype = match class_name.as_str() {
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
    let sizes = |object, what| tuple(object, 0, what)?.iter().map(size).collect::<Result<Vec<usize>>>();
    let (offset, shape, stride) = (size(&args[1])?, sizes(&args[2], "the shape")?, sizes(&args[3], "the stride")?);
    ensure!(shape.len() == stride.len(), "malformed: {} axes with {} strides", shape.len(), stride.len());
    let file = file(name).with_context(|| format!("the archive has no storage `{name}`; download or save it again"))?;
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

/// How deep objects may lie in each other; a state dict needs about ten.
const MAX_DEPTH: u32 = 100;

/// Size of one object on the unpickler's stack.
#[derive(Clone, Copy)]
struct Item {
    mark: bool,
    depth: u32,
    /// About 32 bytes each.
    nodes: u64,
}

/// Runs the opcodes on sizes instead of objects.
///
/// # Errors
/// An opcode that candle's unpickler does not know, one without its operands, or objects that are too deep or too large
/// for the length of the pickle.
fn check(pickle: &[u8]) -> Result<()> {
    const LEAF: Item = Item { mark: false, depth: 1, nodes: 1 };
    const ENDS: &str = "malformed: the pickle ends within an opcode";
    const EMPTY: &str = "malformed: an opcode of the pickle has no operand";
    let mut rest = pickle;
    let mut stack: Vec<Item> = Vec::new();
    let mut memo: HashMap<u32, Item> = HashMap::new();
    // every copy from and to the memo is a deep one
    let mut budget = 64 * pickle.len() as u64 + (1 << 20);
    let mut spend = |nodes: u64| -> Result<()> {
        budget = budget.checked_sub(nodes).context("malformed: the pickle's objects copy each other without end")?;
        Ok(())
    };
    fn bytes<'a>(rest: &mut &'a [u8], n: usize) -> Result<&'a [u8]> {
        rest.split_off(..n).context(ENDS)
    }
    fn number(rest: &mut &[u8], width: usize) -> Result<u32> {
        Ok(bytes(rest, width)?.iter().rev().fold(0, |n, &byte| n << 8 | u32::from(byte)))
    }
    fn joined(parts: &[Item]) -> Result<Item> {
        let depth = 1 + parts.iter().map(|item| item.depth).max().unwrap_or(0);
        ensure!(depth <= MAX_DEPTH, "malformed: the pickle's objects lie more than {MAX_DEPTH} deep in each other");
        Ok(Item { mark: false, depth, nodes: 1 + parts.iter().map(|item| item.nodes).sum::<u64>() })
    }
    loop {
        let opcode = number(&mut rest, 1)? as u8;
        // how many objects on top of the stack are joined into one
        let join = match opcode {
            b'.' => {
                ensure!(!stack.is_empty(), EMPTY);
                return Ok(());
            }
            0x80 => {
                bytes(&mut rest, 1)?;
                continue;
            }
            b'(' => {
                stack.push(Item { mark: true, ..LEAF });
                continue;
            }
            b'q' | b'r' => {
                let id = number(&mut rest, if opcode == b'q' { 1 } else { 4 })?;
                let item = *stack.last().context(EMPTY)?;
                spend(item.nodes)?;
                memo.insert(id, item);
                continue;
            }
            b'h' | b'j' => {
                let id = number(&mut rest, if opcode == b'h' { 1 } else { 4 })?;
                let item = *memo.get(&id).with_context(|| format!("malformed: nothing is stored under {id}"))?;
                spend(item.nodes)?;
                stack.push(item);
                continue;
            }
            b'X' => {
                let length = number(&mut rest, 4)? as usize;
                bytes(&mut rest, length)?;
                stack.push(Item { nodes: 1 + length as u64 / 32, ..LEAF });
                continue;
            }
            b'c' => {
                for _ in 0..2 {
                    let line = rest.iter().position(|&byte| byte == b'\n').context(ENDS)?;
                    bytes(&mut rest, line + 1)?;
                }
                stack.push(Item { nodes: 4, ..LEAF });
                continue;
            }
            b'K' | b'M' | b'J' | b'G' | 0x8a => {
                let width = match opcode {
                    b'K' => 1,
                    b'M' => 2,
                    b'J' => 4,
                    b'G' => 8,
                    _ => number(&mut rest, 1)? as usize,
                };
                ensure!(width <= 8, "malformed: a whole number of {width} bytes");
                bytes(&mut rest, width)?;
                stack.push(LEAF);
                continue;
            }
            // an empty tuple, list, dict; candle takes `d` for an empty dict too
            b')' | b']' | b'}' | b'd' | b'N' | 0x88 | 0x89 => 0,
            b'Q' | 0x85 => 1,
            // reduce, build, newobj; append puts the second into the first
            b'R' | b'b' | 0x81 | b'a' | 0x86 => 2,
            // setitem: the dict, a key and a value
            0x87 | b's' => 3,
            b't' | b'e' | b'u' => {
                let mark = stack.iter().rposition(|item| item.mark).context("malformed: a mark is missing")?;
                stack.remove(mark);
                stack.len() - mark + usize::from(opcode != b't') // appends, setitems: the container too
            }
            other => bail!("the pickle has the opcode {other:#04x}, which no state dict of plain tensors needs"),
        };
        let from = stack.len().checked_sub(join).context(EMPTY)?;
        let item = match (opcode, &stack[from..]) {
            // what goes into a container does not put the container itself deeper
            (b'a' | b's' | b'e' | b'u', [container, parts @ ..]) => {
                let parts = joined(parts)?;
                Item { mark: false, depth: container.depth.max(parts.depth), nodes: container.nodes + parts.nodes }
            }
            (_, parts) => joined(parts)?,
        };
        stack.truncate(from);
        stack.push(item);
    }
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

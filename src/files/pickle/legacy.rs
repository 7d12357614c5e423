//! The files of PyTorch before 1.6, which torch.save still writes on demand: five pickles in a row (a magic number, the format's version,
//! facts on the machine, the object, the names of the storages), then the storages, each with its number of elements in front.

use std::collections::HashMap;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};

use super::objects::{Object, Objects};
use super::{Archive, BIG_ENDIAN, Storage, tensors};

/// The number that the files begin with, as a pickle holds it, and as one of protocol 1 does.
const MAGIC: &[u8] = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
const MAGIC_IN_TEXT: &[u8] = b"L119547037146038801333356L\n.";

/// By how the file begins: the protocol's number is before the magic one, and from protocol 4 on a frame's length.
pub(super) fn is_legacy(file: &[u8]) -> bool {
    file.starts_with(MAGIC_IN_TEXT)
        || file.starts_with(b"\x80")
            && [2, 11].iter().any(|&at| file.get(at..).is_some_and(|rest| rest.starts_with(MAGIC)))
}

pub(super) fn read(file: &[u8]) -> Result<Archive> {
    let mut at = 0;
    let mut next = || -> Result<Objects> {
        let objects = Objects::read(&file[at..])?;
        at += objects.length;
        Ok(objects)
    };
    let [_, version, system, objects, names] = [next()?, next()?, next()?, next()?, next()?];
    ensure!(
        version.int(version.root) == Some(1001),
        "its format is older than PyTorch 0.4; load it with PyTorch and save it again"
    );
    let mut facts = system.dict(system.root).unwrap_or_default().iter();
    let is_big = facts.any(|&(fact, said)| {
        system.text(fact) == Some("little_endian") && matches!(system.get(said), Object::Bool(false))
    });
    ensure!(!is_big, BIG_ENDIAN);

    let storages = storages(file, at, &objects, &names)?;
    tensors(&objects, |name| storages.get(name).cloned())
}

/// Where the storages lie, from the byte `at` on.
fn storages<'a>(
    file: &[u8],
    mut at: usize,
    objects: &Objects<'a>,
    names: &Objects<'a>,
) -> Result<HashMap<&'a str, Range<usize>>> {
    const CUT: &str = "truncated: it ends within its storages";
    let mut widths = HashMap::new();
    for object in objects.all() {
        let Object::Stored(storage) = object else { continue };
        let storage = Storage::of(objects, *storage)?;
        widths.insert(storage.name, width(storage.class).with_context(|| format!("a {} is not known", storage.class))?);
    }
    let Object::List(list) = names.get(names.root) else { bail!("malformed: the storages have no names") };
    let mut found = HashMap::new();
    for &name in list {
        let name = names.text(name).context("malformed: a storage's name is no text")?;
        let length = file.get(at..).and_then(|rest| rest.first_chunk()).context(CUT)?;
        let width = *widths.get(name).with_context(|| format!("malformed: no tensor has the storage `{name}`"))?;
        let start = at + length.len();
        let length = usize::try_from(u64::from_le_bytes(*length)).ok().and_then(|n| n.checked_mul(width));
        let end = length.and_then(|n| start.checked_add(n)).filter(|&end| end <= file.len()).context(CUT)?;
        found.insert(name, start..end);
        at = end;
    }
    Ok(found)
}

/// Bytes of an element.
fn width(class: &str) -> Option<usize> {
    Some(match class.strip_suffix("Storage")? {
        "Byte" | "Char" | "Bool" | "QInt8" | "QUInt8" => 1,
        "Short" | "Half" | "BFloat16" => 2,
        "Int" | "Float" | "QInt32" => 4,
        "Long" | "Double" | "ComplexFloat" => 8,
        "ComplexDouble" => 16,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::read;
    use super::super::testing::{legacy, legacy_of, state_dict, text};

    #[test]
    fn a_file_of_the_old_format_is_read_in_every_protocol() {
        for protocol in [2, 4] {
            let file = legacy(protocol);
            let found = read(&file).unwrap();
            let values: Vec<f32> =
                found.tensors["w"].bytes(&file).as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect();
            assert_eq!(values, [0., 1., 2., 3., 4., 5.], "{protocol}");
            for length in 0..file.len() {
                assert!(read(&file[..length]).is_err(), "{length}");
            }
        }
    }

    #[test]
    fn what_is_not_read_of_the_old_format_is_named() {
        let system = |little: u8| [b"}", &text("little_endian")[..], &[little, b's']].concat();
        let names = [b"]", &text("0")[..], b"a"].concat();
        let error = |version: &[u8], little: u8, names: &[u8]| {
            let parts = [version, &system(little), &state_dict(), names];
            read(&legacy_of(2, parts)).unwrap_err().to_string()
        };
        assert!(error(b"M\xe8\x03", 0x88, &names).contains("0.4"));
        assert!(error(b"M\xe9\x03", 0x89, &names).contains("big-endian"));
        assert!(error(b"M\xe9\x03", 0x88, &[b"]", &text("1")[..], b"a"].concat()).contains("`1`"));
    }
}

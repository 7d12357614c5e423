//! The header of a safetensors file: read also where its free texts are not by the letter of the format, and named where it is none.

use std::collections::HashMap;

use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{SafeTensorError, SafeTensors};
use serde_json::{Map, Value as Json};

use super::kind_of;

const FREE_TEXTS: &str = "__metadata__";

/// What a file's header says.
pub struct Header {
    pub tensors: HashMap<String, TensorInfo>,
    /// The free texts, `__metadata__`.
    pub texts: HashMap<String, String>,
    /// Where the tensors' bytes begin.
    pub data: usize,
    /// The keys of free texts that are no texts in the file; their JSON is taken as text.
    pub repaired: Vec<String>,
}

impl Header {
    /// Reads the header of a whole file; all ranges in it then lie inside the file.
    ///
    /// # Errors
    /// Says what the file is instead, in words that follow its name.
    pub fn read(file: &[u8]) -> Result<Self, String> {
        let (data, metadata, repaired) = match SafeTensors::read_metadata(file) {
            Ok((length, metadata)) => (8 + length, metadata, Vec::new()),
            Err(cause) => {
                let fits = |(data, metadata, _): &(usize, Metadata, _)| {
                    data.checked_add(metadata.data_len()) == Some(file.len())
                };
                repaired(file).filter(fits).ok_or_else(|| why_not(file, &cause))?
            }
        };
        let tensors = metadata.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
        Ok(Self { tensors, texts: metadata.metadata().clone().unwrap_or_default(), data, repaired })
    }

    /// Says that the header of `file` was not by the letter.
    pub fn warn(&self, file: &impl std::fmt::Display) {
        if !self.repaired.is_empty() {
            note!(
                "warning: {file}: `{FREE_TEXTS}` may hold texts only, and {} of it are none; they are read as JSON text",
                self.repaired.join(", ")
            );
        }
    }
}

/// Where the tensors' bytes begin, the header with all free texts as texts, and the keys of those that were none.
fn repaired(file: &[u8]) -> Option<(usize, Metadata, Vec<String>)> {
    let data = end_of_header(file)?;
    let mut header: Map<String, Json> = serde_json::from_slice(&file[8..data]).ok()?;
    let (mut kept, mut repaired) = (Map::new(), Vec::new());
    match header.remove(FREE_TEXTS) {
        None | Some(Json::Null) => {}
        Some(Json::Object(texts)) => {
            for (key, value) in texts {
                if !value.is_string() {
                    repaired.push(key.clone());
                }
                match value {
                    Json::Null => {}
                    Json::String(_) => drop(kept.insert(key, value)),
                    other => drop(kept.insert(key, other.to_string().into())),
                }
            }
        }
        Some(_) => repaired.push(FREE_TEXTS.to_owned()),
    }
    header.insert(FREE_TEXTS.to_owned(), Json::Object(kept));
    let metadata: Metadata = serde_json::from_value(Json::Object(header)).ok()?;
    Some((data, metadata, repaired))
}

/// Where the header ends by its length in the first eight bytes; nothing where the file ends before.
fn end_of_header(file: &[u8]) -> Option<usize> {
    let length = u64::from_le_bytes(*file.first_chunk()?);
    8usize.checked_add(usize::try_from(length).ok()?).filter(|&end| end <= file.len())
}

fn why_not(file: &[u8], cause: &SafeTensorError) -> String {
    const AGAIN: &str = "download or copy it again";
    if file.is_empty() {
        return format!("is empty or truncated; {AGAIN}");
    }
    if let Some(kind) = kind_of(file) {
        return format!("is {kind}");
    }
    let promised = repaired(file).and_then(|(data, metadata, _)| data.checked_add(metadata.data_len()));
    match promised {
        Some(promised) if promised > file.len() => {
            format!("is truncated: it has {} of {promised} bytes; {AGAIN}", file.len())
        }
        Some(promised) => format!(
            "is not a safetensors file that can be read: behind the {promised} bytes of its tensors are {} more; {AGAIN}",
            file.len() - promised
        ),
        None if file.len() >= 8 && file.get(8) == Some(&b'{') && end_of_header(file).is_some() => {
            format!(
                "is a safetensors file whose header cannot be read ({cause}); save it again with the safetensors library"
            )
        }
        None => format!(
            "is neither a safetensors file nor an archive of torch.save, or a truncated one ({cause}); {AGAIN}, or save it as safetensors"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of one tensor of two floats, with this before it in the header.
    fn file(before: &str) -> Vec<u8> {
        let header = format!(r#"{{{before}"x": {{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}}}"#);
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[1; 8]].concat()
    }

    #[test]
    fn free_texts_that_are_none_are_read_as_json() {
        let header = Header::read(&file(r#""__metadata__": {"a": "b"},"#)).unwrap();
        assert_eq!((&*header.texts["a"], header.repaired.len()), ("b", 0));
        let header = Header::read(&file(r#""__metadata__": {"a": "b", "n": 3, "o": {"p": "q"}, "z": null},"#)).unwrap();
        assert_eq!(["a", "n", "o"].map(|key| &*header.texts[key]), ["b", "3", r#"{"p":"q"}"#]);
        assert_eq!(header.repaired, ["n", "o", "z"]);
        assert_eq!(header.tensors["x"].shape, [2]);
        for odd in [r#""__metadata__": [1],"#, r#""__metadata__": "words","#] {
            assert_eq!(Header::read(&file(odd)).unwrap().repaired, [FREE_TEXTS], "{odd}");
        }
        assert!(Header::read(&file("")).unwrap().texts.is_empty());
    }

    #[test]
    fn what_is_no_safetensors_file_is_named() {
        let whole = file(r#""__metadata__": {"n": 3},"#);
        let error = |file: &[u8]| Header::read(file).err().unwrap();
        for length in 0..whole.len() {
            let error = error(&whole[..length]);
            assert!(error.contains("truncated"), "{length}: {error}");
        }
        assert!(error(&[&whole[..], b"more"].concat()).contains("4 more"));
        assert!(error(&file(r#""y": {"dtype": "F7", "shape": [], "data_offsets": [8, 8]},"#)).contains("F7"));
        assert!(error(b"version https://git-lfs.github.com/spec/v1\n").contains("git lfs pull"));
    }
}

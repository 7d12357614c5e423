//! The named tensors of one component, memory-mapped: a component is read once, into the layers that hold it.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Display;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::{Device, Tensor};
use safetensors::Dtype;

use crate::files::{FileBytes, Header, pickle, unwrapped};
use crate::models::hub::Source;
use crate::models::numbers::{random, to_f32};
use crate::ops::conv2d::Images;
use crate::ops::device::Compute;

/// Variants to try, in this order, when none is asked for and there is no plain file.
const VARIANTS: [&str; 4] = ["fp16", "bf16", "fp32", "non_ema"];

/// Named tensors under a key prefix. Cheap to clone.
#[derive(Clone)]
pub struct Weights {
    files: Arc<Files>,
    prefix: String,
    /// Where tensors go, and in what number format.
    compute: Compute,
    /// What the layers under this prefix will meet.
    images: Images,
}

struct Files {
    label: String,
    maps: Vec<Arc<FileBytes>>,
    entries: BTreeMap<String, Entry>,
    metadata: HashMap<String, String>,
    /// Whole numbers saved beside a pickled state dict.
    integers: BTreeMap<String, i64>,
    /// Numbers from this seed instead of a file's.
    random: Option<u64>,
}

/// A tensor's place in a memory-mapped file.
#[derive(Clone)]
struct Entry {
    map: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
    /// In elements, where a pickled tensor is not stored in the order of its axes.
    stride: Option<Vec<usize>>,
}

/// A tensor under another name: [`Weights::renamed`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Renamed {
    pub from: String,
    pub to: String,
    /// Another shape of as many elements.
    pub shape: Option<Vec<usize>>,
    /// Only these rows (of the first axis).
    pub rows: Option<Range<usize>>,
    /// A matrix's rows become columns.
    pub transposed: bool,
}

impl Weights {
    /// The weights called `stem` (`model`, `diffusion_pytorch_model`) in a folder, as transformers and diffusers lay
    /// them out: one safetensors file or the shards of an index, else pickles in the same two ways.
    ///
    /// A component without the asked `variant` gives its plain files, as in diffusers, where pipelines mix the two;
    /// without an asked variant, a folder that has only a variant gives that.
    ///
    /// # Errors
    /// When nothing of this is there (lists what was looked for), or a file is unreadable.
    pub fn open(source: &Source, stem: &str, variant: Option<&str>) -> Result<Self> {
        if let Some(weights) = source.weights_in_single_file() {
            return weights;
        }
        let variants = match variant {
            Some(asked) => vec![Some(asked), None],
            None => std::iter::once(None).chain(VARIANTS.map(Some)).collect(),
        };
        let dots: Vec<String> = variants.iter().map(|v| v.map_or(String::new(), |v| format!(".{v}"))).collect();
        let mut tried = Vec::new();
        // transformers calls its pickles otherwise than its safetensors
        for (name, extension) in [(stem, "safetensors"), (stem, "bin"), ("pytorch_model", "bin")] {
            for dot in &dots {
                let whole = format!("{name}{dot}.{extension}");
                let mut index = format!("{name}.{extension}.index{dot}.json");
                let older = format!("{whole}.index.json");
                if source.find(&index)?.is_none() && source.find(&older)?.is_some() {
                    index = older;
                }
                let Some(file) = whole_or_index(source, &whole, &index)? else {
                    tried.extend([whole, index]);
                    continue;
                };
                let path = source.require(&file)?;
                if extension == "bin" {
                    warn_of_pickle(&path, &format!("{stem}.safetensors"));
                }
                return if file == index { Self::open_shards(source, &index) } else { Self::open_file(&path) };
            }
        }
        Err(source.missing(&format!("weights (looked for {})", tried.join(", "))))
    }

    /// One file: safetensors, or a PyTorch zip pickle (.pt, .pth, .bin; no code in it runs), told apart by content.
    /// A top-level `state_dict` of a pickle is unwrapped.
    ///
    /// # Errors
    /// When the file is missing, empty, truncated, or of another format; names the file.
    pub fn open_file(path: &Path) -> Result<Self> {
        let mut files = Files::new(path);
        if !path.is_file() {
            bail!("there is no weight file {}", path.display());
        }
        files.add(path)?;
        files.unwrap_names();
        Ok(Self { files: Arc::new(files), prefix: String::new(), compute: Compute::cpu(), images: Images::Any })
    }

    /// Weights of any name and shape, without a file: uniform numbers of variance 1 / fan-in, norms near one. For
    /// measuring an architecture's time and memory, which do not depend on the numbers.
    pub fn random(seed: u64) -> Self {
        let files = Files { random: Some(seed), ..Files::new(Path::new("random weights")) };
        Self { files: Arc::new(files), prefix: String::new(), compute: Compute::cpu(), images: Images::Any }
    }

    fn open_shards(source: &Source, index: &str) -> Result<Self> {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let Index { weight_map } = source.read_json(index)?;
        let mut files = Files::new(&source.require(index)?);
        for shard in weight_map.values().collect::<BTreeSet<_>>() {
            let path = source.require(shard).with_context(|| {
                format!("a shard named in {} (delete that index if another file holds the weights)", files.label)
            })?;
            files.add(&path)?;
        }
        if let Some((key, shard)) = weight_map.iter().find(|(key, _)| !files.entries.contains_key(*key)) {
            bail!("{}: `{key}` should be in {shard}, and is not; download the shards again", files.label);
        }
        files.unwrap_names();
        Ok(Self { files: Arc::new(files), prefix: String::new(), compute: Compute::cpu(), images: Images::Any })
    }

    /// The tensors under `prefix.`: `weights.pp("down_blocks").pp(0)`.
    pub fn pp(&self, prefix: impl Display) -> Self {
        Self { prefix: self.key(&prefix.to_string()), ..self.clone() }
    }

    /// The same tensors for another device, in another number format.
    pub fn on(&self, compute: &Compute) -> Self {
        Self { compute: compute.clone(), ..self.clone() }
    }

    /// The same tensors, for convolutions of such images.
    pub fn for_images(&self, images: Images) -> Self {
        Self { images, ..self.clone() }
    }

    pub fn images(&self) -> Images {
        self.images
    }

    /// Where the tensors go.
    pub fn compute(&self) -> &Compute {
        &self.compute
    }

    /// The dotted prefix, without a trailing dot.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    fn key(&self, name: &str) -> String {
        match (&*self.prefix, name) {
            ("", name) => name.to_owned(),
            (prefix, "") => prefix.to_owned(),
            (prefix, name) => format!("{prefix}.{name}"),
        }
    }

    /// Whether there is a tensor `name` under the prefix.
    pub fn contains(&self, name: &str) -> bool {
        self.files.entries.contains_key(&self.key(name)) || (self.files.random.is_some() && name.ends_with("bias"))
    }

    /// All names under the prefix, relative to it, sorted.
    pub fn names(&self) -> Vec<String> {
        let dotted = if self.prefix.is_empty() { String::new() } else { format!("{}.", self.prefix) };
        self.files.entries.keys().filter_map(|key| key.strip_prefix(&dotted)).map(str::to_owned).collect()
    }

    /// The shape of a tensor, read from the header alone.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.files.entries.get(&self.key(name)).map(|entry| entry.shape.clone())
    }

    /// A tensor of a known shape, contiguous, whatever float type the file has: f32 on the CPU, unless [`Self::on`] said
    /// otherwise.
    ///
    /// # Errors
    /// When the key is missing (names the nearest key), has another shape, or is not of a float type.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        if let Some(seed) = self.files.random {
            return Ok(self.compute.put(&random(seed, &self.key(name), shape)?)?);
        }
        if let Some(found) = self.shape(name).filter(|found| found != shape) {
            bail!(
                "{}: `{}` has shape {found:?}, expected {shape:?}; do the config and the weights belong together?",
                self.file(),
                self.key(name)
            );
        }
        self.get_any(name)
    }

    /// As [`Weights::get`], of any shape.
    ///
    /// # Errors
    /// When the key is missing, or is not of a float type.
    pub fn get_any(&self, name: &str) -> Result<Tensor> {
        let key = self.key(name);
        let entry = self.files.entries.get(&key).ok_or_else(|| self.files.missing(&key))?;
        let read = || -> Result<Tensor> { Ok(self.compute.put(&self.files.read(entry)?)?) };
        read().with_context(|| format!("{}: reading `{key}`", self.file()))
    }

    /// The type and the shape of a tensor in the file.
    ///
    /// # Errors
    /// When the key is missing.
    pub fn stored(&self, name: &str) -> Result<(Dtype, Vec<usize>)> {
        let key = self.key(name);
        let entry = self.files.entries.get(&key).ok_or_else(|| self.files.missing(&key))?;
        Ok((entry.dtype, entry.shape.clone()))
    }

    /// The elements of a tensor as little-endian bytes of the file's type, in the order of the axes.
    ///
    /// # Errors
    /// When the key is missing.
    pub fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        let key = self.key(name);
        let entry = self.files.entries.get(&key).ok_or_else(|| self.files.missing(&key))?;
        Ok(self.files.bytes(entry))
    }

    /// The same tensors, or some of them, under other names. Nothing is read.
    ///
    /// # Errors
    /// When a tensor is missing, or has another number of elements than its new shape, or fewer rows than wanted.
    pub fn renamed(&self, names: &[Renamed]) -> Result<Self> {
        let old = &self.files;
        let mut entries = BTreeMap::new();
        for Renamed { from, to, shape, rows, transposed } in names {
            let key = self.key(from);
            let mut entry = old.entries.get(&key).ok_or_else(|| old.missing(&key))?.clone();
            if let Some(rows) = rows {
                let inside = entry.shape.first().is_some_and(|&length| rows.start <= rows.end && rows.end <= length);
                ensure!(inside, "{}: `{key}` of shape {:?} has no rows {rows:?}", self.file(), entry.shape);
                let step = match &entry.stride {
                    Some(stride) => stride[0],
                    None => entry.shape[1..].iter().product(),
                } * entry.dtype.bitsize()
                    / 8;
                entry.range.start += rows.start * step;
                if entry.stride.is_none() {
                    entry.range.end = entry.range.start + rows.len() * step;
                }
                entry.shape[0] = rows.len();
            }
            if *transposed {
                ensure!(entry.shape.len() == 2, "{}: `{key}` of shape {:?} is no matrix", self.file(), entry.shape);
                let mut stride = entry.stride.unwrap_or_else(|| vec![entry.shape[1], 1]);
                stride.reverse();
                entry.shape.reverse();
                entry.stride = Some(stride);
            }
            if let Some(shape) = shape.as_ref().filter(|shape| **shape != entry.shape) {
                let fits =
                    shape.iter().product::<usize>() == entry.shape.iter().product::<usize>() && entry.stride.is_none();
                ensure!(fits, "{}: `{key}` has shape {:?}, expected {shape:?}", self.file(), entry.shape);
                entry.shape.clone_from(shape);
            }
            entries.insert(to.clone(), entry);
        }
        let files = Files {
            label: old.label.clone(),
            maps: old.maps.clone(),
            entries,
            metadata: old.metadata.clone(),
            integers: old.integers.clone(),
            random: None,
        };
        Ok(Self { files: Arc::new(files), prefix: String::new(), compute: Compute::cpu(), images: Images::Any })
    }

    /// A whole number that was saved beside a pickled state dict: `global_step`.
    pub fn integer(&self, name: &str) -> Option<i64> {
        self.files.integers.get(name).copied()
    }

    /// The `__metadata__` of a safetensors file (of the first shard); empty for pickles.
    pub fn metadata(&self) -> &HashMap<String, String> {
        &self.files.metadata
    }

    /// The file, or the index of the shards: for messages.
    pub fn file(&self) -> String {
        self.files.label.clone()
    }
}

impl Files {
    fn new(path: &Path) -> Self {
        Self {
            label: path.display().to_string(),
            maps: Vec::new(),
            entries: BTreeMap::new(),
            metadata: HashMap::new(),
            integers: BTreeMap::new(),
            random: None,
        }
    }

    /// Adds the tensors of a file, whose format its content tells.
    fn add(&mut self, path: &Path) -> Result<()> {
        let map = FileBytes::open(path)?;
        if pickle::is_archive(&map) { self.add_pickle(path, map) } else { self.add_safetensors(path, map) }
    }

    fn add_safetensors(&mut self, path: &Path, map: FileBytes) -> Result<()> {
        let header = Header::read(&map).map_err(|what| anyhow!("{} {what}", path.display()))?;
        header.warn(&path.display());
        for (key, info) in header.tensors {
            let range = header.data + info.data_offsets.0..header.data + info.data_offsets.1;
            let (map, shape) = (self.maps.len(), info.shape);
            self.entries.insert(key, Entry { map, dtype: info.dtype, shape, range, stride: None });
        }
        if self.maps.is_empty() {
            self.metadata = header.texts;
        }
        self.maps.push(Arc::new(map));
        Ok(())
    }

    fn add_pickle(&mut self, path: &Path, map: FileBytes) -> Result<()> {
        let found = pickle::read(&map).with_context(|| {
            format!("{} is not a PyTorch weight file that can be read; download or save it again", path.display())
        })?;
        for (key, tensor) in found.tensors {
            let pickle::PickledTensor { dtype, shape, range, stride } = tensor;
            self.entries.insert(key, Entry { map: self.maps.len(), dtype, shape, range, stride });
        }
        self.integers = found.integers;
        self.maps.push(Arc::new(map));
        Ok(())
    }

    /// Drops from all names what wrappers of the model put before them: nothing was renamed otherwise.
    fn unwrap_names(&mut self) {
        let entries: BTreeMap<_, _> = self.entries.iter().map(|(key, entry)| (unwrapped(key), entry.clone())).collect();
        // unless the names could then not be told apart
        if entries.len() == self.entries.len() {
            self.entries = entries;
        }
    }

    fn bytes(&self, entry: &Entry) -> Cow<'_, [u8]> {
        let bytes = &self.maps[entry.map][entry.range.clone()];
        pickle::gather(bytes, entry.dtype, &entry.shape, entry.stride.as_deref())
    }

    fn read(&self, entry: &Entry) -> Result<Tensor> {
        let values = to_f32(entry.dtype, &self.bytes(entry))?;
        Ok(Tensor::from_vec(values, &*entry.shape, &Device::Cpu)?)
    }

    fn missing(&self, key: &str) -> anyhow::Error {
        let near = self
            .entries
            .keys()
            .max_by(|a, b| strsim::normalized_levenshtein(key, a).total_cmp(&strsim::normalized_levenshtein(key, b)));
        match near {
            Some(near) => anyhow!("{}: there is no `{key}`; the nearest key is `{near}`", self.label),
            None => anyhow!("{}: there is no `{key}`; the file holds no tensors", self.label),
        }
    }
}

/// Which of two names counts; nothing where there is neither. Where there are both, one is older: diffusers takes the index,
/// transformers (`model`, `pytorch_model`) the whole file, and so does this, with a warning.
fn whole_or_index(source: &Source, whole: &str, index: &str) -> Result<Option<String>> {
    let indexed = source.find(index)?.is_some();
    if indexed && source.has(whole)? {
        let of_transformers = whole.starts_with("model.") || whole.starts_with("pytorch_model.");
        let (taken, left, tool) =
            if of_transformers { (whole, index, "transformers") } else { (index, whole, "diffusers") };
        note!(
            "warning: {} holds both {taken} and {left}; {taken} is read, as {tool} does; delete what is out of date",
            source.label()
        );
        return Ok(Some(taken.to_owned()));
    }
    let found = if indexed { Some(index) } else { source.find(whole)?.map(|_| whole) };
    Ok(found.map(str::to_owned))
}

/// Says that a pickle is read, and what would be better.
pub(super) fn warn_of_pickle(path: &Path, better: &str) {
    note!(
        "warning: {} is a pickle: its tensors are read and no code in it runs; other programs do run it, so prefer {better}",
        path.display()
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::pickle::testing::{state_dict, text, zip};
    use candle_core::DType;
    use std::fs;

    fn save(path: &Path, tensors: &[(&str, Tensor)]) {
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize_to_file(tensors.iter().map(|(k, t)| (*k, t)), Some(metadata), path).unwrap();
    }

    fn counted(shape: &[usize]) -> Tensor {
        let n: usize = shape.iter().product();
        Tensor::from_vec((0..n).map(|i| i as f32 - 1.5).collect::<Vec<_>>(), shape, &Device::Cpu).unwrap()
    }

    fn error(result: Result<impl Sized>) -> String {
        format!("{:#}", result.err().expect("an error"))
    }

    fn values(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn every_float_type_reads_as_f32() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        // Longer than two chunks of the conversion; f16 and bf16 hold these quarters exactly.
        let x = (0..70_007).map(|i| (i % 64) as f32 * 0.25 - 4.0).collect::<Vec<_>>();
        let x = Tensor::from_vec(x, (7, 10_001), &Device::Cpu).unwrap();
        let types = [("f16", DType::F16), ("bf16", DType::BF16), ("f32", DType::F32), ("f64", DType::F64)];
        let mut tensors = types.map(|(name, dtype)| (name, x.to_dtype(dtype).unwrap())).to_vec();
        tensors.push(("ids", Tensor::zeros(3, DType::I64, &Device::Cpu).unwrap()));
        tensors.push(("scalar", counted(&[])));
        save(&path, &tensors);
        let weights = Weights::open_file(&path).unwrap();
        for (name, _) in types {
            let read = weights.get(name, x.dims()).unwrap();
            assert_eq!((read.dtype(), values(&read)), (DType::F32, values(&x)), "{name}");
        }
        assert_eq!(weights.get("scalar", &[]).unwrap().to_scalar::<f32>().unwrap(), -1.5);
        assert!(error(weights.get_any("ids")).contains("I64"));
        assert_eq!(weights.metadata()["format"], "pt");
    }

    #[test]
    fn prefixes_join_and_errors_name_the_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        save(&path, &[("a.0.to_q.weight", counted(&[2, 3])), ("a.0.bias", counted(&[2])), ("ab", counted(&[1]))]);
        let weights = Weights::open_file(&path).unwrap();
        let a0 = weights.pp("").pp("a").pp(0);
        assert_eq!((a0.prefix(), a0.pp("to_q.weight").prefix()), ("a.0", "a.0.to_q.weight"));
        assert_eq!(weights.pp("a").names(), ["0.bias", "0.to_q.weight"]);
        assert_eq!(weights.names().len(), 3);
        assert!(a0.contains("bias") && !a0.contains("to_q") && a0.shape("nothing").is_none());
        let e = error(a0.get("to_q.weight", &[3, 2]));
        assert!(["x.safetensors", "a.0.to_q.weight", "[2, 3]", "[3, 2]"].iter().all(|part| e.contains(part)), "{e}");
        let e = error(a0.get("to_k.weight", &[3, 2]));
        assert!(e.contains("`a.0.to_k.weight`") && e.contains("`a.0.to_q.weight`"), "{e}");
    }

    #[test]
    fn broken_files_are_errors_that_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let (good, bad) = (dir.path().join("good.safetensors"), dir.path().join("bad.safetensors"));
        save(&good, &[("x", counted(&[64]))]);
        let bytes = fs::read(&good).unwrap();
        for length in [0, 1, 7, 8, 20, bytes.len() - 1] {
            fs::write(&bad, &bytes[..length]).unwrap();
            let e = error(Weights::open_file(&bad));
            assert!(e.contains("bad.safetensors") && (e.contains("truncated") || e.contains("empty")), "{length}: {e}");
        }
        fs::write(&bad, [&bytes[..], b"more"].concat()).unwrap();
        assert!(error(Weights::open_file(&bad)).contains("not a safetensors file"));
        fs::write(&bad, "version https://git-lfs.github.com/spec/v1\n").unwrap();
        assert!(error(Weights::open_file(&bad)).contains("git lfs pull"));
        fs::write(&bad, "PK\x03\x04 and then nothing").unwrap();
        assert!(error(Weights::open_file(&bad)).contains("not a PyTorch weight file"));
        assert!(error(Weights::open_file(&dir.path().join("none.pt"))).contains("none.pt"));
    }

    #[test]
    fn the_file_of_a_component_is_found_by_stem_and_variant() {
        let dir = tempfile::tempdir().unwrap();
        let source = Source::open(dir.path().to_str().unwrap()).unwrap();
        let first = |variant| {
            let weights = Weights::open(&source, "model", variant).unwrap();
            weights.names()[0].clone()
        };
        let e = error(Weights::open(&source, "model", Some("fp16")));
        assert!(
            ["model.fp16.safetensors", "model.safetensors.index.json", "model.bin"].iter().all(|f| e.contains(f)),
            "{e}"
        );

        save(&dir.path().join("model.fp16.safetensors"), &[("half", counted(&[1]))]);
        assert_eq!(
            (first(None), first(Some("fp16")), first(Some("fp16"))),
            ("half".into(), "half".into(), "half".into())
        );
        save(&dir.path().join("model.safetensors"), &[("full", counted(&[1]))]);
        assert_eq!(
            (first(None), first(Some("fp16")), first(Some("bf16"))),
            ("full".into(), "half".into(), "full".into())
        );
    }

    #[test]
    fn shards_read_as_one_and_a_missing_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let source = Source::open(dir.path().to_str().unwrap()).unwrap();
        save(&dir.path().join("model-1.safetensors"), &[("a", counted(&[2]))]);
        let index = |map: &str| {
            let text = format!(r#"{{"metadata": {{}}, "weight_map": {{{map}}}}}"#);
            fs::write(dir.path().join("model.safetensors.index.fp16.json"), text).unwrap();
        };
        index(r#""a": "model-1.safetensors", "b": "model-2.safetensors""#);
        assert!(error(Weights::open(&source, "model", None)).contains("model-2.safetensors"));
        save(&dir.path().join("model-2.safetensors"), &[("b", counted(&[3]))]);
        let weights = Weights::open(&source, "model", None).unwrap();
        assert_eq!(weights.names(), ["a", "b"]);
        assert_eq!(values(&weights.get("b", &[3]).unwrap()), values(&counted(&[3])));
        index(r#""a": "model-1.safetensors", "c": "model-1.safetensors""#);
        assert!(error(Weights::open(&source, "model", None)).contains("`c` should be in model-1.safetensors"));
    }

    #[test]
    fn of_a_whole_file_and_an_index_the_one_counts_that_the_tools_take() {
        for (stem, taken) in [("diffusion_pytorch_model", 3), ("model", 5)] {
            let dir = tempfile::tempdir().unwrap();
            let source = Source::open(dir.path().to_str().unwrap()).unwrap();
            let file = |name: &str| dir.path().join(name);
            save(&file("shard.safetensors"), &[("x", counted(&[3]))]);
            save(&file(&format!("{stem}.safetensors")), &[("x", counted(&[5]))]);
            let index = r#"{"weight_map": {"x": "shard.safetensors"}}"#;
            fs::write(file(&format!("{stem}.safetensors.index.json")), index).unwrap();
            let weights = Weights::open(&source, stem, None).unwrap();
            assert_eq!(weights.shape("x"), Some(vec![taken]), "{stem}");
            if taken == 3 {
                fs::remove_file(file("shard.safetensors")).unwrap();
                let e = error(Weights::open(&source, stem, None));
                assert!(e.contains("index.json") && e.contains("shard.safetensors"), "{e}");
            }
        }
    }

    #[test]
    fn pickles_are_read_and_their_state_dict_unwrapped() {
        let dir = tempfile::tempdir().unwrap();
        let data: Vec<u8> = (0..6).flat_map(|i| (i as f32 - 1.5).to_le_bytes()).collect();
        let state = state_dict();
        let nested = [b"}", &text("epoch")[..], b"K\x03s", &text("state_dict"), &state, b"s"].concat();
        for (name, object) in [("pytorch_model.bin", &state), ("nested.pt", &nested)] {
            let pickle = [b"\x80\x02", &object[..], b"."].concat();
            fs::write(dir.path().join(name), zip(&[("archive/data.pkl", &pickle), ("archive/data/0", &data)])).unwrap();
            let weights = Weights::open_file(&dir.path().join(name)).unwrap();
            assert_eq!(weights.names(), ["w"], "{name}");
            assert_eq!(values(&weights.get("w", &[2, 3]).unwrap()), values(&counted(&[2, 3])), "{name}");
        }
        let source = Source::open(dir.path().to_str().unwrap()).unwrap();
        assert!(Weights::open(&source, "model", None).unwrap().contains("w"));
    }

    #[test]
    fn shards_may_be_pickles_and_a_variant() {
        let data: Vec<u8> = (0..6).flat_map(|i| (i as f32 - 1.5).to_le_bytes()).collect();
        let pickle = [b"\x80\x02", &state_dict()[..], b"."].concat();
        let shard = zip(&[("archive/data.pkl", &pickle), ("archive/data/0", &data)]);
        for (stem, index) in [
            ("diffusion_pytorch_model", "diffusion_pytorch_model.bin.index.json"),
            ("diffusion_pytorch_model", "diffusion_pytorch_model.bin.index.fp16.json"),
            ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16.bin.index.json"),
            ("model", "pytorch_model.bin.index.json"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let source = Source::open(dir.path().to_str().unwrap()).unwrap();
            fs::write(dir.path().join("one.bin"), &shard).unwrap();
            save(&dir.path().join("two.bin"), &[("x", counted(&[3]))]);
            fs::write(dir.path().join(index), r#"{"weight_map": {"w": "one.bin", "x": "two.bin"}}"#).unwrap();
            let weights = Weights::open(&source, stem, None).unwrap();
            assert_eq!(values(&weights.get("w", &[2, 3]).unwrap()), values(&counted(&[2, 3])), "{index}");
            assert_eq!(weights.shape("x"), Some(vec![3]), "{index}");
        }
    }

    #[test]
    fn names_are_those_before_the_model_was_wrapped() {
        let dir = tempfile::tempdir().unwrap();
        let names = |keys: &[&str]| {
            let path = dir.path().join("x.safetensors");
            save(&path, &keys.iter().map(|key| (*key, counted(&[1]))).collect::<Vec<_>>());
            Weights::open_file(&path).unwrap().names()
        };
        assert_eq!(names(&["_orig_mod.a", "_orig_mod.b._orig_mod.c"]), ["a", "b.c"]);
        assert_eq!(names(&["module.a", "b"]), ["a", "b"]);
        assert_eq!(names(&["module.a", "a"]), ["a", "module.a"]);
    }
}

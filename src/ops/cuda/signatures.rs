//! What the kernels of `*.cu` take, read from their sources, and whether arguments are that.
//!
//! `build.rs` includes this file and writes the table that [`Kernel`](super::cuda::Kernel) checks every launch against; the
//! tests read the same sources, with no nvcc and no GPU. Kernels are made by macros, so [`read`] expands macros as a C
//! preprocessor does, as far as the kernels go: all branches of `#if` count, and a macro is defined once a file.

use std::collections::HashMap;
use std::path::Path;

/// What a pointer points to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Element {
    F32,
    BF16,
    F16,
    F64,
    I64,
}

/// What a kernel takes in one place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// `const T*`
    Input(Element),
    /// `T*`
    Output(Element),
    /// `i64`
    Int,
    /// `float`
    Float,
}

/// A kernel's name and its parameters in their order.
pub type Signature = (String, Vec<(String, Kind)>);

/// Compares what is given, by name and kind, with what a kernel takes.
///
/// # Errors
/// The first difference: the kernel, the place, and the parameter's name.
pub fn check<'a>(
    kernel: &str,
    parameters: &[(impl AsRef<str>, Kind)],
    given: impl ExactSizeIterator<Item = (&'a str, Kind)>,
) -> Result<(), String> {
    let count = given.len();
    for (place, ((name, kind), (given_name, given_kind))) in parameters.iter().zip(given).enumerate() {
        let (place, name) = (place + 1, name.as_ref());
        if name != given_name {
            return Err(format!(
                "the CUDA kernel {kernel} takes `{name}` in place {place}, it was given `{given_name}`: give the arguments \
                 in the order of its parameters, by their names"
            ));
        }
        if *kind != given_kind {
            return Err(format!(
                "the CUDA kernel {kernel} takes {kind:?} as `{name}` (place {place}), it was given {given_kind:?}"
            ));
        }
    }
    if let Some((name, kind)) = parameters.get(count) {
        let name = name.as_ref();
        return Err(format!("the CUDA kernel {kernel} was given {count} arguments: `{name}` ({kind:?}) comes next"));
    }
    if count > parameters.len() {
        return Err(format!("the CUDA kernel {kernel} was given {count} arguments, it takes {}", parameters.len()));
    }
    Ok(())
}

/// The kernels of one `.cu` file, with the headers beside it.
///
/// # Errors
/// A file that cannot be read, one without a kernel, and a kernel that no launch can be checked against.
pub fn read(path: &Path) -> Result<Vec<Signature>, String> {
    let mut source = Source::default();
    source.add(path)?;
    let mut text = Vec::new();
    let kernels = source.expand(&source.text, 0, &mut text).and_then(|()| kernels(&text));
    kernels.map_err(|e| format!("{}: {e}", path.display()))
}

/// The word that stands before every kernel: `extern "C" __global__ void`.
const KERNEL: &str = "KERNEL";

#[derive(Default)]
struct Source {
    macros: HashMap<String, Macro>,
    /// What is not a directive.
    text: Vec<String>,
}

struct Macro {
    /// `None`: it is used without parentheses.
    parameters: Option<Vec<String>>,
    body: Vec<String>,
}

impl Source {
    fn add(&mut self, path: &Path) -> Result<(), String> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        if text.contains("/*") {
            return Err(format!("{}: write comments with `//`: others are not read", path.display()));
        }
        for line in text.replace("\\\n", " ").lines() {
            let line = line.split("//").next().unwrap_or_default().trim();
            if let Some(include) = line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix(".cuh\"")) {
                self.add(&path.with_file_name(format!("{include}.cuh")))?;
            } else if let Some(definition) = line.strip_prefix("#define ") {
                self.define(definition);
            } else if !line.starts_with('#') {
                self.text.extend(tokens(line));
            }
        }
        Ok(())
    }

    fn define(&mut self, definition: &str) {
        let end = definition.find(|c: char| !is_word(c)).unwrap_or(definition.len());
        let (name, rest) = definition.split_at(end);
        let (parameters, body) = match rest.strip_prefix('(').and_then(|rest| rest.split_once(')')) {
            Some((list, body)) => (Some(list.split(',').map(|word| word.trim().to_owned()).collect()), body),
            None => (None, rest),
        };
        if name != KERNEL {
            self.macros.insert(name.to_owned(), Macro { parameters, body: tokens(body) });
        }
    }

    fn expand(&self, text: &[String], depth: usize, out: &mut Vec<String>) -> Result<(), String> {
        if depth > 16 {
            return Err("macros that expand to themselves".into());
        }
        let mut at = 0;
        while let Some(word) = text.get(at) {
            at += 1;
            match self.macros.get(word) {
                Some(Macro { parameters: None, body }) => self.expand(body, depth + 1, out)?,
                Some(Macro { parameters: Some(parameters), body }) if text.get(at).is_some_and(|next| next == "(") => {
                    let end = closing(text, at)?;
                    self.expand(&substituted(body, parameters, &split(&text[at + 1..end])), depth + 1, out)?;
                    at = end + 1;
                }
                _ => out.push(word.clone()),
            }
        }
        Ok(())
    }
}

/// A macro's body with the arguments in the places of its parameters, and `##` done.
fn substituted(body: &[String], parameters: &[String], arguments: &[&[String]]) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    let mut paste = false;
    for word in body {
        if word == "##" {
            paste = true;
            continue;
        }
        let wanted = if word == "__VA_ARGS__" { "..." } else { word };
        let piece = match parameters.iter().position(|parameter| parameter == wanted) {
            Some(index) if wanted == "..." => arguments.get(index..).unwrap_or_default().join(&",".to_owned()),
            Some(index) => arguments.get(index).copied().unwrap_or_default().to_vec(),
            None => vec![word.clone()],
        };
        let mut piece = piece.into_iter();
        if let (true, Some(last)) = (paste, out.last_mut()) {
            last.extend(piece.next());
        }
        out.extend(piece);
        paste = false;
    }
    out
}

fn kernels(text: &[String]) -> Result<Vec<Signature>, String> {
    if text.iter().any(|word| word == "__global__") {
        return Err(format!("a kernel without `{KERNEL}` before it, which would be left out of the table"));
    }
    let mut all: Vec<Signature> = Vec::new();
    for (start, _) in text.iter().enumerate().filter(|(_, word)| *word == KERNEL) {
        let mut at = start + 1;
        if text.get(at).is_some_and(|word| word == "__launch_bounds__") {
            at = closing(text, at + 1)? + 1;
        }
        let name = text.get(at).ok_or_else(|| format!("`{KERNEL}` at the end"))?.clone();
        let parameters = split(&text[at + 2..closing(text, at + 1)?]).into_iter().map(|parameter| {
            kind(parameter).ok_or_else(|| {
                format!(
                    "the kernel {name} takes `{}`, which is none of the kinds that a launch passes: i64, float, pointers to \
                     float, bf16, f16, double, i64, and structs of doubles named in `element` of signatures.rs",
                    parameter.join(" ")
                )
            })
        });
        let parameters = parameters.collect::<Result<_, _>>()?;
        if all.iter().any(|(other, _)| *other == name) {
            return Err(format!("two kernels named {name}"));
        }
        all.push((name, parameters));
    }
    if all.is_empty() { Err("no kernel in it".into()) } else { Ok(all) }
}

/// A parameter's name and kind.
fn kind(parameter: &[String]) -> Option<(String, Kind)> {
    let words: Vec<&str> = parameter.iter().map(String::as_str).filter(|word| *word != "__restrict__").collect();
    let (name, kind) = match words[..] {
        ["const", of, "*", name] => (name, Kind::Input(element(of)?)),
        [of, "*", name] => (name, Kind::Output(element(of)?)),
        ["i64", name] => (name, Kind::Int),
        ["float", name] => (name, Kind::Float),
        _ => return None,
    };
    Some((name.to_owned(), kind))
}

fn element(name: &str) -> Option<Element> {
    Some(match name {
        "float" => Element::F32,
        "bf16" => Element::BF16,
        "f16" => Element::F16,
        // Jpeg: a struct of doubles and nothing else, which is passed as a tensor of them
        "double" | "Jpeg" => Element::F64,
        "i64" => Element::I64,
        _ => return None,
    })
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Words and numbers, `##`, strings, and every other character by itself.
fn tokens(mut text: &str) -> Vec<String> {
    let mut all = Vec::new();
    loop {
        text = text.trim_start();
        let Some(first) = text.chars().next() else { return all };
        let length = match first {
            '"' => text[1..].find('"').map_or(text.len(), |end| end + 2),
            _ if text.starts_with("##") => 2,
            _ if is_word(first) => text.find(|c| !is_word(c)).unwrap_or(text.len()),
            _ => first.len_utf8(),
        };
        all.push(text[..length].to_owned());
        text = &text[length..];
    }
}

/// The place of the parenthesis that closes the one at `open`.
fn closing(text: &[String], open: usize) -> Result<usize, String> {
    let mut depth = 0;
    for (at, word) in text.iter().enumerate().skip(open) {
        match word.as_str() {
            "(" => depth += 1,
            ")" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return if at == open { Err(format!("`{word}` where a `(` belongs")) } else { Ok(at) };
        }
    }
    Err("a parenthesis that is not closed".into())
}

/// What the commas outside of parentheses divide.
fn split(text: &[String]) -> Vec<&[String]> {
    let mut depth = 0;
    text.split(|word| {
        match word.as_str() {
            "(" => depth += 1,
            ")" => depth -= 1,
            _ => {}
        }
        depth == 0 && word == ","
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    use super::*;

    fn folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ops/cuda")
    }

    /// All kernels of all sources.
    fn kernels() -> BTreeMap<String, Vec<(String, Kind)>> {
        let mut all = BTreeMap::new();
        for entry in std::fs::read_dir(folder()).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "cu") {
                for (name, parameters) in read(&path).unwrap() {
                    assert!(all.insert(name.clone(), parameters).is_none(), "{name} twice");
                }
            }
        }
        all
    }

    fn read_text(text: &str) -> Result<Vec<Signature>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("some.cu");
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn every_kernel_of_the_sources_has_one() {
        let all = kernels();
        // in three formats: 10 elementwise and the check of numbers, 5 of JPEG, 3 of LoRA, 6 norms, 2 softmaxes, attention's
        // two and three for each of 7 heads; in f32 alone: LoRA's sum and 5 of the optimizer
        assert_eq!(all.len(), 3 * (11 + 5 + 3 + 6 + 2 + 2 + 3 * 7) + 1 + 5);
        for name in all.keys() {
            assert!(["_f32", "_bf16", "_f16"].iter().any(|format| name.ends_with(format)), "{name}");
        }
        use Element::*;
        use Kind::*;
        let expect = |name: &str, expected: &[(&str, Kind)]| {
            check(name, &all[name], expected.iter().copied()).unwrap();
        };
        expect("add_f16", &[("y", Output(F16)), ("a", Input(F16)), ("b", Input(F16)), ("n", Int), ("vector", Int)]);
        expect(
            "jpeg_total_f32",
            &[("sizes", Output(F32)), ("parts", Input(F64)), ("jpeg", Input(F64)), ("count", Int)],
        );
        expect("square_sums_f32", &[("parts", Output(F64)), ("table", Input(I64))]);
        expect(
            "layer_norm_bwd_bf16",
            &[
                ("dx", Output(BF16)),
                ("dy", Input(BF16)),
                ("x", Input(BF16)),
                ("weight", Input(BF16)),
                ("rows", Int),
                ("channels", Int),
                ("eps", Float),
                ("vector", Int),
            ],
        );
        assert_eq!(all["attention_bwd_kv_160_bf16"].len(), 17);
    }

    /// Whatever is done to a kernel's arguments, the check sees it.
    #[test]
    fn other_arguments_than_a_kernels_are_refused() {
        for (kernel, parameters) in kernels() {
            let right: Vec<(&str, Kind)> = parameters.iter().map(|(name, kind)| (name.as_str(), *kind)).collect();
            let refused = |given: &[(&str, Kind)], says: &str| {
                let message = check(&kernel, &parameters, given.iter().copied()).unwrap_err();
                assert!(message.contains(&kernel) && message.contains(&format!("`{says}`")), "{message}");
            };
            check(&kernel, &parameters, right.iter().copied()).unwrap();
            refused(&right[..right.len() - 1], right[right.len() - 1].0);
            let more = [&right[..], &[("more", Kind::Int)]].concat();
            assert!(
                check(&kernel, &parameters, more.into_iter()).unwrap_err().ends_with(&format!("takes {}", right.len()))
            );
            for place in 0..right.len() {
                let mut given = right.clone();
                given.remove(place);
                refused(&given, right[place].0);
                for other in 0..place {
                    let mut given = right.clone();
                    given.swap(place, other);
                    refused(&given, right[other].0);
                }
                use Element::*;
                let kinds = [F32, BF16, F16, F64, I64].map(|of| [Kind::Input(of), Kind::Output(of)]);
                for kind in
                    kinds.concat().into_iter().chain([Kind::Int, Kind::Float]).filter(|kind| *kind != right[place].1)
                {
                    let mut given = right.clone();
                    given[place].1 = kind;
                    refused(&given, right[place].0);
                }
            }
        }
    }

    #[test]
    fn a_source_that_cannot_be_checked_is_an_error_that_says_why() {
        for (text, says) in [
            ("KERNEL a_f32(float* y, int n) {}", "the kernel a_f32 takes `int n`, which is none of"),
            ("KERNEL a_f32(float* y, double x) {}", "takes `double x`"),
            ("KERNEL a_f32(const u32* y) {}", "takes `const u32 * y`"),
            ("KERNEL a_f32() {}", "takes ``"),
            ("extern \"C\" __global__ void a_f32(float* y) {}", "a kernel without `KERNEL`"),
            ("KERNEL a_f32(float* y) {} KERNEL a_f32(float* y) {}", "two kernels named a_f32"),
            ("__device__ void f() {}", "no kernel in it"),
            ("#define A A\nKERNEL a_f32(A)", "expand to themselves"),
            ("KERNEL a_f32(float* y", "not closed"),
            ("#include \"none.cuh\"\n", "none.cuh"),
            ("/* KERNEL */", "write comments with `//`"),
        ] {
            let message = read_text(text).unwrap_err();
            assert!(message.contains(says) && message.contains("some.cu") | message.contains("none.cuh"), "{message}");
        }
        // pasted names, macros for parameters, names of macros as arguments
        let text = "#define REST i64 n, float scale // the end\n#define ONE(T, NAME, ...) \\\n KERNEL __launch_bounds__(F<T, 3>()) \
                    \\\n f_##__VA_ARGS__##_##NAME(const T* __restrict__ x, T* y, REST) { \"KERNEL (\"; }\n\
                    #define EACH(MACRO) MACRO(float, f32, 8) MACRO(bf16, bf16, 8)\nEACH(ONE)";
        let found = read_text(text).unwrap();
        assert_eq!(found[1].0, "f_8_bf16");
        let expected = [
            ("x", Kind::Input(Element::BF16)),
            ("y", Kind::Output(Element::BF16)),
            ("n", Kind::Int),
            ("scale", Kind::Float),
        ];
        check("f", &found[1].1, expected.into_iter()).unwrap();
    }

    /// The launches as they are written, up to the first helper that adds arguments: what is given by its name is how the
    /// kernel's parameters begin. The rest is seen by the tests that want a GPU.
    #[test]
    fn the_launches_begin_as_their_kernels_do() {
        let all = kernels();
        let mut seen = 0;
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let rooms = std::fs::read_dir(src.join("ops")).unwrap().map(|entry| entry.unwrap().path());
        for room in rooms.chain([src.join("optim")]) {
            for path in ["cuda.rs", "large.rs"].map(|file| room.join(file)).iter().filter(|path| path.exists()) {
                for launch in std::fs::read_to_string(path).unwrap().split("Kernel::of(").skip(1) {
                    let words = tokens(launch);
                    let own = words.iter().take_while(|word| *word != ")");
                    let name = own.filter_map(|word| word.strip_prefix('"')?.strip_suffix('"')).last().unwrap_or("");
                    // a name that is chosen at run time is not found
                    let Some(parameters) = all.get(&format!("{name}_f32")) else { continue };
                    let helper = |pair: &[String]| {
                        pair[1] == "(" && (pair[0].starts_with("launch") || ["sizes", "inputs"].contains(&&*pair[0]))
                    };
                    let end = words.windows(2).position(helper).unwrap_or(words.len());
                    let given: Vec<(&str, &str)> = words[..end]
                        .windows(4)
                        .filter(|call| call[0] == "." && call[2] == "(" && call[3].starts_with('"'))
                        .map(|call| (call[1].as_str(), call[3].trim_matches('"')))
                        .collect();
                    for (index, (method, argument)) in given.iter().enumerate() {
                        let methods: &[&str] =
                            match parameters.get(index).unwrap_or_else(|| panic!("{path:?}: {name}")).1 {
                                Kind::Input(_) => &["input", "addresses"],
                                Kind::Output(_) => &["output", "output_if_any"],
                                Kind::Int => &["int", "flag"],
                                Kind::Float => &["float"],
                            };
                        let expected = &parameters[index].0;
                        assert!(
                            expected == argument && methods.contains(method),
                            "{path:?}: {name} takes `{expected}` by one of {methods:?} in place {index}, not .{method}({argument})"
                        );
                    }
                    seen += usize::from(!given.is_empty());
                }
            }
        }
        assert!(seen >= 28, "only {seen} launches were found");
    }
}

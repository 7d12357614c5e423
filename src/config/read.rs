//! From text and `--set` overrides to a [`Config`], with complaints that name the key, the line and the remedy.
//!
//! serde knows every key and type, but not where a value stood. So each value is first read alone, in a config that
//! has nothing else: what fails then is that value, and its path is known. Only then is the whole read at once.

use std::collections::BTreeMap;

use anyhow::{Context, Result, anyhow, bail};
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::Config;

/// Where a value came from.
#[derive(Clone)]
enum Origin {
    /// Line of the file, from 1.
    Line(usize),
    /// The text of a `--set`.
    Set(String),
}

/// A key with the tables around it: `["optimizer", "lr"]`.
type KeyPath = Vec<String>;

/// A table whose keys depend on the variant that one of them names.
struct Tagged {
    section: &'static str,
    /// The key that names the variant.
    key: &'static str,
    default: &'static str,
}

const TRUNCATION: Tagged = Tagged { section: "truncation", key: "rule", default: "uniform" };
const METHOD: Tagged = Tagged { section: "method", key: "kind", default: "alignprop" };
static TAGGED: [Tagged; 2] = [TRUNCATION, METHOD];

impl Tagged {
    fn path(&self) -> [String; 2] {
        [self.section, self.key].map(String::from)
    }
}

struct Source<'a> {
    /// What messages call the file.
    name: &'a str,
    table: Table,
    origins: BTreeMap<KeyPath, Origin>,
}

/// Reads `text`, applies the overrides, and checks keys and types; the ranges are not checked yet.
pub(super) fn read(text: &str, name: &str, overrides: &[String]) -> Result<Config> {
    let mut source = Source::new(text, name)?;
    let old_tags = TAGGED.each_ref().map(|tagged| source.tag(tagged));
    for text in overrides {
        source.set(text)?;
    }
    for (tagged, old) in TAGGED.iter().zip(&old_tags) {
        source.replace_tag(tagged, old);
        source.name_tag(tagged);
    }
    source.replace_prompts();
    source.check()?;
    source.into_config()
}

/// Whether a setting `section.key=value` says something of `key`: of itself, of a table that holds it, or of a key inside.
pub fn concerns(setting: &str, key: &str) -> bool {
    let given = setting.split('=').next().unwrap_or_default().split('.').map(str::trim);
    given.zip(key.split('.')).all(|(given, key)| given == key)
}

impl<'a> Source<'a> {
    fn new(text: &str, name: &'a str) -> Result<Self> {
        let table: Table = toml::from_str(text).with_context(|| format!("reading {name}"))?;
        let spans = DeTable::parse(text).with_context(|| format!("reading {name}"))?;
        let mut origins = BTreeMap::new();
        record_lines(text, spans.get_ref(), &mut Vec::new(), &mut origins);
        Ok(Self { name, table, origins })
    }

    /// Applies `section.key=value`. The value is TOML, or else a string as it stands.
    fn set(&mut self, text: &str) -> Result<()> {
        let Some((key, value)) = text.split_once('=') else {
            bail!("--set {text}: expected section.key=value, for example --set optimizer.lr=1e-4");
        };
        let path: KeyPath = key.split('.').map(|part| part.trim().to_string()).collect();
        if path.iter().any(String::is_empty) {
            bail!(
                "--set {text}: `{key}` is not a key; expected section.key=value, for example --set optimizer.lr=1e-4"
            );
        }
        insert(&mut self.table, &path, value.parse().unwrap_or_else(|_| Value::String(value.to_string())));
        self.origins.retain(|old, _| !old.starts_with(&path));
        self.origins.insert(path, Origin::Set(text.to_string()));
        Ok(())
    }

    /// The variant of a tagged table as things stand, or the default's.
    fn tag(&self, tagged: &Tagged) -> Value {
        let given = self.table.get(tagged.section).and_then(|section| section.get(tagged.key));
        given.cloned().unwrap_or_else(|| Value::from(tagged.default))
    }

    /// The tagged table that a path begins with, and its variant.
    fn tag_of(&self, path: &[String]) -> Option<(&'static Tagged, Value)> {
        let tagged = TAGGED.iter().find(|tagged| tagged.section == path[0])?;
        Some((tagged, self.tag(tagged)))
    }

    /// A tagged table that names no variant is about the default's.
    fn name_tag(&mut self, tagged: &Tagged) {
        let tag = self.tag(tagged);
        if let Some(Value::Table(section)) = self.table.get_mut(tagged.section) {
            section.entry(tagged.key).or_insert(tag);
        }
    }

    /// A variant given by `--set` replaces the file's: keys that only the old one has go with it.
    fn replace_tag(&mut self, tagged: &'static Tagged, old: &Value) {
        if !self.is_set(tagged.section, tagged.key) {
            return;
        }
        let new = self.tag(tagged);
        let knows = |tag: &Value, key: &str, value: &Value| knows(tagged, tag, key, value);
        self.drop_file_keys(tagged.section, |key, value| {
            key != tagged.key && knows(old, key, value) && !knows(&new, key, value)
        });
    }

    /// Prompts given by `--set` replace the file's.
    fn replace_prompts(&mut self) {
        let sources = ["list", "file", "builtin"];
        if sources.into_iter().any(|key| self.is_set("prompts", key)) {
            self.drop_file_keys("prompts", |key, _| sources.contains(&key));
        }
    }

    fn is_set(&self, section: &str, key: &str) -> bool {
        matches!(self.origin(&[section, key].map(String::from)), Some(Origin::Set(_)))
    }

    fn drop_file_keys(&mut self, section: &str, goes: impl Fn(&str, &Value) -> bool) {
        let Some(Value::Table(table)) = self.table.get_mut(section) else { return };
        let origins = &self.origins;
        table.retain(|key, value| {
            let from_file = matches!(origin_of(origins, &[section, key].map(String::from)), Some(Origin::Line(_)));
            !(from_file && goes(key, value))
        });
    }

    /// Reads every value alone and reports all that fail, in the order of the file.
    fn check(&mut self) -> Result<()> {
        let mut leaves = Vec::new();
        collect_leaves(&self.table, &mut Vec::new(), &mut leaves);
        let mut complaints = Vec::new();
        for leaf in leaves {
            let Some(error) = self.error_at(&leaf) else { continue };
            // A wrong variant is one complaint, not one for each key beside it.
            let tag = self.tag_of(&leaf).map(|(tagged, _)| tagged.path());
            if tag.is_some_and(|tag| leaf != tag && self.error_at(&tag).as_ref() == Some(&error)) {
                continue;
            }
            if !self.take_as_string(&leaf) {
                let line = match self.origin(&leaf) {
                    Some(Origin::Line(line)) => *line,
                    _ => usize::MAX,
                };
                complaints.push((line, self.complain(&leaf, &error)));
            }
        }
        if complaints.is_empty() {
            return Ok(());
        }
        complaints.sort_by_key(|(line, _)| *line);
        let complaints: Vec<String> = complaints.into_iter().map(|(_, text)| text).collect();
        bail!("{}", complaints.join("\n"))
    }

    /// What serde says about one value alone. A missing key is no error of this value.
    fn error_at(&self, leaf: &[String]) -> Option<String> {
        let value = leaf[1..].iter().try_fold(self.table.get(&leaf[0])?, |value, key| value.get(key))?;
        let error = only(leaf, value.clone(), self.tag_of(leaf)).try_into::<Config>().err()?;
        let message = error.message().to_string();
        (!message.starts_with("missing field")).then_some(message)
    }

    /// `--set run.dir=2024-01-01` is a date in TOML; where a string fits instead, the string was meant.
    fn take_as_string(&mut self, leaf: &[String]) -> bool {
        let Some(Origin::Set(text)) = self.origins.get(leaf) else { return false };
        let Some((_, value)) = text.split_once('=') else { return false };
        let value = Value::String(value.to_string());
        if only(leaf, value.clone(), self.tag_of(leaf)).try_into::<Config>().is_err() {
            return false;
        }
        insert(&mut self.table, leaf, value);
        true
    }

    fn complain(&self, leaf: &[String], error: &str) -> String {
        if let Some(rest) = error.strip_prefix("unknown field `") {
            let unknown = rest.split('`').next().unwrap_or_default();
            return self.complain_unknown(leaf, unknown, &known_names(error));
        }
        let text = match error.strip_prefix("unknown variant `") {
            Some(rest) => {
                let given = rest.split('`').next().unwrap_or_default();
                let known = known_names(error);
                let hint = nearest(given, &known).map(|name| format!("; did you mean `{name}`?"));
                format!("`{given}`, expected {}{}", one_of(&known), hint.unwrap_or_default())
            }
            None => in_words(error),
        };
        format!("bad value for `{}` ({}): {text}", leaf.join("."), self.place(leaf))
    }

    fn complain_unknown(&self, leaf: &[String], unknown: &str, known: &[String]) -> String {
        // The first part of the path that fails as a table of its own; none: a key inside a list of tables.
        let tag = self.tag_of(leaf);
        let fails = |depth: usize| {
            let empty = only(&leaf[..=depth], Value::Table(Table::new()), tag.clone());
            let error = empty.try_into::<Config>().err();
            leaf[depth] == unknown && error.is_some_and(|error| error.message().starts_with("unknown field"))
        };
        let (key, place) = match (0..leaf.len()).find(|depth| fails(*depth)) {
            // A table that only --set made has no place of its own.
            Some(depth) => match self.origin(&leaf[..=depth]) {
                Some(_) => (leaf[..=depth].join("."), self.place(&leaf[..=depth])),
                None => (leaf[..=depth].join("."), self.place(leaf)),
            },
            None => (format!("{}.{unknown}", leaf.join(".")), self.place(leaf)),
        };
        // A key at home in another section, exactly, before a key of this section that only looks like it.
        let elsewhere = if leaf.len() <= 2 && tag.is_none() { section_with(unknown) } else { None };
        let hint = match (elsewhere, nearest(unknown, known), &tag) {
            (Some(section), ..) => format!("did you mean `{section}.{unknown}`?"),
            (None, Some(name), _) => format!("did you mean `{name}`?"),
            (None, None, None) => format!("expected {}", one_of(known)),
            (None, None, Some((Tagged { key, .. }, tag))) if known.is_empty() => {
                format!("the {key} {tag} takes no keys")
            }
            (None, None, Some((Tagged { key, .. }, tag))) => format!("the {key} {tag} takes {}", one_of(known)),
        };
        format!("unknown key `{key}` ({place}); {hint}")
    }

    /// Only a truncation rule has keys that must be given; the rest has defaults.
    fn into_config(self) -> Result<Config> {
        self.table.clone().try_into().map_err(|error: toml::de::Error| {
            let rule = TRUNCATION.path();
            match error.message().strip_prefix("missing field ") {
                Some(key) => anyhow!(
                    "missing key `truncation.{}`: truncation.rule = {} ({}) needs it",
                    key.trim_matches('`'),
                    self.tag(&TRUNCATION),
                    self.place(&rule)
                ),
                None => anyhow!("{}: {}", self.name, error.message()),
            }
        })
    }

    fn origin(&self, path: &[String]) -> Option<&Origin> {
        origin_of(&self.origins, path)
    }

    fn place(&self, path: &[String]) -> String {
        match self.origin(path) {
            Some(Origin::Line(line)) => format!("{} line {line}", self.name),
            Some(Origin::Set(text)) => format!("--set {text}"),
            None => self.name.to_string(),
        }
    }
}

/// The origin of the value or of the nearest table around it.
fn origin_of<'a>(origins: &'a BTreeMap<KeyPath, Origin>, path: &[String]) -> Option<&'a Origin> {
    (1..=path.len()).rev().find_map(|depth| origins.get(&path[..depth]))
}

fn record_lines(text: &str, table: &DeTable<'_>, path: &mut KeyPath, origins: &mut BTreeMap<KeyPath, Origin>) {
    for (key, value) in table {
        path.push(key.get_ref().to_string());
        let line = 1 + text.as_bytes()[..key.span().start].iter().filter(|byte| **byte == b'\n').count();
        origins.insert(path.clone(), Origin::Line(line));
        if let DeValue::Table(table) = value.get_ref() {
            record_lines(text, table, path, origins);
        }
        path.pop();
    }
}

/// Puts a value at a path; tables on the way are made, and a value on the way gives place to a table.
fn insert(table: &mut Table, path: &[String], value: Value) {
    match path {
        [] => {}
        [key] => {
            table.insert(key.clone(), value);
        }
        [key, rest @ ..] => {
            let mut inner = match table.remove(key) {
                Some(Value::Table(inner)) => inner,
                _ => Table::new(),
            };
            insert(&mut inner, rest, value);
            table.insert(key.clone(), Value::Table(inner));
        }
    }
}

/// The paths of all values that are not tables, and of empty tables.
fn collect_leaves(table: &Table, path: &mut KeyPath, leaves: &mut Vec<KeyPath>) {
    for (key, value) in table {
        path.push(key.clone());
        match value {
            Value::Table(inner) if !inner.is_empty() => collect_leaves(inner, path, leaves),
            _ => leaves.push(path.clone()),
        }
        path.pop();
    }
}

/// A config with this one value, and with the variant of the tagged table that it belongs to.
fn only(path: &[String], value: Value, tag: Option<(&Tagged, Value)>) -> Table {
    let mut table = Table::new();
    if let Some((tagged, tag)) = tag.filter(|_| path.len() > 1) {
        insert(&mut table, &tagged.path(), tag);
    }
    insert(&mut table, path, value);
    table
}

/// Whether the variant `tag` has this key.
fn knows(tagged: &Tagged, tag: &Value, key: &str, value: &Value) -> bool {
    let table = only(&[tagged.section, key].map(String::from), value.clone(), Some((tagged, tag.clone())));
    let error = table.try_into::<Config>().err();
    error.is_none_or(|error| !error.message().starts_with("unknown field"))
}

/// The names that serde lists: "..., expected one of `a`, `b`".
fn known_names(error: &str) -> Vec<String> {
    let Some((_, expected)) = error.split_once(", expected ") else { return Vec::new() };
    expected.split('`').skip(1).step_by(2).map(String::from).collect()
}

/// The known name that a typing error may have meant.
pub fn nearest<'a>(given: &str, known: &'a [String]) -> Option<&'a str> {
    let scored = known.iter().map(|name| (strsim::jaro_winkler(given, name), name));
    // 0.8: `lrr` is 0.9 from `lr`, `epsilon` 0.87 from `eps`; unrelated names stay below 0.7.
    let close = scored.filter(|(score, _)| *score >= 0.8);
    close.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, name)| name.as_str())
}

/// The top-level table that has this key.
fn section_with(key: &str) -> Option<String> {
    let mut defaults = Config::default();
    defaults.lora.resolve(); // an absent key is not in the table
    let sections = Table::try_from(defaults).unwrap_or_default();
    sections.into_iter().find(|(_, section)| section.get(key).is_some()).map(|(name, _)| name)
}

fn one_of(names: &[String]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// serde's message about a type, without the names of Rust's types.
fn in_words(error: &str) -> String {
    let text = ["invalid type: ", "invalid value: "].iter().find_map(|start| error.strip_prefix(start));
    let text = text.unwrap_or(error);
    if text.starts_with("unit variant, ") {
        return "expected one of its names, a string".to_string();
    }
    if text.starts_with("wanted exactly 1 element") {
        return "expected one key in each table, as in { linear = \"layers.0\" }".to_string();
    }
    let Some((given, expected)) = text.rsplit_once(", expected ") else { return text.to_string() };
    let expected = match expected {
        "usize" | "u64" => "a whole number, 0 or more",
        "f64" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        "an array of length 2" => "a list of 2 numbers",
        "path string" => "a string",
        other if other.starts_with("struct ") || other.starts_with("internally tagged enum ") => "a table",
        "variant identifier" => "one of its names, a string",
        other => other,
    };
    format!("{given}, expected {expected}")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::{HpsConfig, Per, Precision, Truncation};
    use super::*;

    fn parse(text: &str, overrides: &[&str]) -> Result<Config> {
        let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
        Config::parse(text, "x.toml", &overrides)
    }

    #[test]
    fn settings_concern_keys_tables_and_what_is_in_them() {
        for setting in ["model.path=a", " model = {path='a'}", "model . path=a=b"] {
            assert!(concerns(setting, "model.path"), "{setting}");
        }
        assert!(concerns("prompts.file=x", "prompts") && concerns("guard={every=5}", "guard.prompts"));
        assert!(!concerns("model.variant=fp16", "model.path") && !concerns("lora.rank=4", "model.path"));
        assert!(!concerns("guard.every=5", "guard.prompts") && !concerns("prompts.file=x", "guard.prompts"));
    }

    #[track_caller]
    fn assert_error(text: &str, overrides: &[&str], expected: &str) {
        assert_eq!(format!("{:#}", parse(text, overrides).unwrap_err()), expected);
    }

    #[test]
    fn unknown_keys() {
        for (text, expected) in [
            (
                "# a typing error\n[optimizer]\nlr = 1e-4\nlrr = 1\n",
                "unknown key `optimizer.lrr` (x.toml line 4); did you mean `lr`?",
            ),
            ("[optimiser]\nlr = 1", "unknown key `optimiser` (x.toml line 1); did you mean `optimizer`?"),
            ("[optimiser]", "unknown key `optimiser` (x.toml line 1); did you mean `optimizer`?"),
            (
                "[run]\nmodel = 'x'",
                "unknown key `run.model` (x.toml line 2); expected `dir`, `seed`, `device`, `precision`, `reward_precision`, `allow_tf32`, `cuda_graphs`, `save_every`, `sample_every`, `num_samples`, `sample_prompts`, `keep_checkpoints`, `keep_best`",
            ),
            (
                "[optimizer]\neps = 1e-8\nepsilon = 1",
                "unknown key `optimizer.epsilon` (x.toml line 3); did you mean `eps`?",
            ),
            (
                "[optimizer]\nbatch_size = 1",
                "unknown key `optimizer.batch_size` (x.toml line 2); did you mean `train.batch_size`?",
            ),
            ("lr = 1", "unknown key `lr` (x.toml line 1); did you mean `optimizer.lr`?"),
            ("[reward.hps]\nweigth = 1", "unknown key `reward.hps.weigth` (x.toml line 2); did you mean `weight`?"),
            ("[reward.hpsv2]\nweight = 1", "unknown key `reward.hpsv2` (x.toml line 1); did you mean `hps`?"),
            (
                "reward.clip_score.weight = 1",
                "unknown key `reward.clip_score` (x.toml line 1); did you mean `clip-score`?",
            ),
            ("[truncation]\nk = 1", "unknown key `truncation.k` (x.toml line 2); the rule \"uniform\" takes `per`"),
            (
                "[truncation]\nrule = 'full'\nk = 1",
                "unknown key `truncation.k` (x.toml line 3); the rule \"full\" takes no keys",
            ),
            ("[truncation]\nrule = 'fixed'\nkk = 1", "unknown key `truncation.kk` (x.toml line 3); did you mean `k`?"),
        ] {
            assert_error(text, &[], expected);
        }
    }

    #[test]
    fn all_complaints_at_once() {
        assert_error(
            "[train]\nstep = 2\n[optimizer]\nlrr = 1\n",
            &["run.sed=1"],
            "unknown key `train.step` (x.toml line 2); did you mean `steps`?\n\
             unknown key `optimizer.lrr` (x.toml line 4); did you mean `lr`?\n\
             unknown key `run.sed` (--set run.sed=1); did you mean `seed`?",
        );
    }

    #[test]
    fn types() {
        for (text, expected) in [
            (
                "[optimizer]\nlr = 'fast'",
                "bad value for `optimizer.lr` (x.toml line 2): string \"fast\", expected a number",
            ),
            (
                "[lora]\nrank = -1",
                "bad value for `lora.rank` (x.toml line 2): integer `-1`, expected a whole number, 0 or more",
            ),
            (
                "[lora]\nrank = 1.5",
                "bad value for `lora.rank` (x.toml line 2): floating point `1.5`, expected a whole number, 0 or more",
            ),
            ("run.dir = 3", "bad value for `run.dir` (x.toml line 1): integer `3`, expected a string"),
            (
                "optimizer.betas = [0.9]",
                "bad value for `optimizer.betas` (x.toml line 1): invalid length 1, expected a list of 2 numbers",
            ),
            ("prompts.list = 'cat'", "bad value for `prompts.list` (x.toml line 1): string \"cat\", expected a list"),
            ("lora = 4", "bad value for `lora` (x.toml line 1): integer `4`, expected a table"),
            ("truncation = 'full'", "bad value for `truncation` (x.toml line 1): string \"full\", expected a table"),
            ("optimizer.lr.x = 1", "bad value for `optimizer.lr.x` (x.toml line 1): map, expected a number"),
            (
                "reward.clip-head.normalize = 1",
                "bad value for `reward.clip-head.normalize` (x.toml line 1): integer `1`, expected true or false",
            ),
            (
                "[truncation]\nrule = 'fixed'\nk = 'x'",
                "bad value for `truncation.k` (x.toml line 3): string \"x\", expected a whole number, 0 or more",
            ),
        ] {
            assert_error(text, &[], expected);
        }
    }

    #[test]
    fn names_of_variants() {
        for (text, expected) in [
            ("run.precision = 3", "bad value for `run.precision` (x.toml line 1): expected one of its names, a string"),
            (
                "truncation.rule = 3",
                "bad value for `truncation.rule` (x.toml line 1): integer `3`, expected one of its names, a string",
            ),
            (
                "reward.clip-head.layers = [{ linear = 'a', activation = 'relu' }]",
                "bad value for `reward.clip-head.layers` (x.toml line 1): expected one key in each table, as in { linear = \"layers.0\" }",
            ),
            (
                "reward.clip-head.layers = [{ liner = 'a' }]",
                "bad value for `reward.clip-head.layers` (x.toml line 1): `liner`, expected `linear`, `activation`; did you mean `linear`?",
            ),
            (
                "optimizer.lr_schedule = 'cosin'",
                "bad value for `optimizer.lr_schedule` (x.toml line 1): `cosin`, expected `constant`, `linear`, `cosine`; did you mean `cosine`?",
            ),
            (
                "[run]\nprecision = 'fp16'",
                "bad value for `run.precision` (x.toml line 2): `fp16`, expected `f32`, `bf16`, `f16`; did you mean `f16`?",
            ),
            (
                "truncation = { per = 'image' }",
                "bad value for `truncation.per` (x.toml line 1): `image`, expected `sample`, `batch`",
            ),
            (
                "[truncation]\nrule = 'fixd'\nk = 1",
                "bad value for `truncation.rule` (x.toml line 2): `fixd`, expected `uniform`, `fixed`, `gaussian`, `per-step`, `full`, `steps`, `draft-lv`, `refl`, `drtune`; did you mean `fixed`?",
            ),
            (
                "[reward.clip-head]\nlayers = [{ activation = 'rel' }]",
                "bad value for `reward.clip-head.layers` (x.toml line 2): `rel`, expected `identity`, `relu`, `silu`, `gelu`, `quick_gelu`, `tanh`, `sigmoid`, `gelu_tanh`; did you mean `relu`?",
            ),
        ] {
            assert_error(text, &[], expected);
        }
    }

    #[test]
    fn a_rule_says_what_it_needs() {
        assert_error(
            "[truncation]\nrule = 'fixed'",
            &[],
            "missing key `truncation.k`: truncation.rule = \"fixed\" (x.toml line 2) needs it",
        );
        assert_error(
            "",
            &["truncation.rule=refl", "truncation.lo=1"],
            "missing key `truncation.hi`: truncation.rule = \"refl\" (--set truncation.rule=refl) needs it",
        );
    }

    #[test]
    fn broken_toml_shows_its_line() {
        let error = format!("{:#}", parse("[run]\nseed = = 1", &[]).unwrap_err());
        assert!(error.starts_with("reading x.toml: TOML parse error at line 2"), "{error}");
    }

    #[test]
    fn overrides() {
        let file = "[optimizer]\nlr = 1e-3\n[truncation]\nrule = 'uniform'\nper = 'batch'\n";
        let config = parse(
            file,
            &[
                "optimizer.lr=1e-4",
                "model.path=some/folder",
                "run.dir=2024-01-01",
                "sampler.negative_prompt=7",
                "run.precision=bf16",
                "optimizer.betas=[0.8, 0.9]",
                "reward.hps.weight=0.5",
                "prompts.list=[\"a=b\"]",
            ],
        )
        .unwrap();
        assert_eq!(config.optimizer.lr, 1e-4);
        assert_eq!(config.model.path, "some/folder");
        assert_eq!(config.run.dir.as_deref(), Some(Path::new("2024-01-01")));
        assert_eq!(config.sampler.negative_prompt, "7");
        assert_eq!(config.run.precision, Some(Precision::Bf16));
        assert_eq!(config.optimizer.betas, [0.8, 0.9]);
        assert_eq!(config.reward.hps, Some(HpsConfig { weight: 0.5, ..Default::default() }));
        assert_eq!(config.prompts.load().unwrap(), ["a=b".into()]);
        assert_eq!(config.truncation, Truncation::Uniform { per: Per::Batch });
    }

    #[test]
    fn a_new_rule_takes_the_old_ones_place() {
        let uniform = "[truncation]\nrule = 'uniform'\nper = 'batch'\n";
        for overrides in [
            ["truncation.rule=fixed", "truncation.k=1"],
            ["truncation.k=1", "truncation.rule=fixed"],
            ["truncation={rule=\"full\"}", "truncation={rule=\"fixed\", k=1}"],
        ] {
            assert_eq!(parse(uniform, &overrides).unwrap().truncation, Truncation::Fixed { k: 1 });
        }
        let per_step = "[truncation]\nrule = 'per-step'\nlo = 3\nhi = 9";
        let refl = parse(per_step, &["truncation.rule=refl"]).unwrap().truncation;
        assert_eq!(refl, Truncation::Refl { lo: 3, hi: 9 });
        assert_eq!(parse("", &["truncation.per=batch"]).unwrap().truncation, Truncation::Uniform { per: Per::Batch });
    }

    #[test]
    fn a_new_rule_forgives_no_wrong_key() {
        assert_error(
            "[truncation]\nrule = 'uniform'\npre = 'batch'",
            &["truncation.rule=full"],
            "unknown key `truncation.pre` (x.toml line 3); the rule \"full\" takes no keys",
        );
        assert_error(
            "",
            &["truncation.rule=full", "truncation.k=1"],
            "unknown key `truncation.k` (--set truncation.k=1); the rule \"full\" takes no keys",
        );
    }

    #[test]
    fn new_prompts_take_the_old_ones_place() {
        let config = parse("prompts.builtin = 'animals'", &["prompts.file=mine.txt"]).unwrap();
        assert_eq!(config.prompts.file.as_deref(), Some(Path::new("mine.txt")));
        assert_eq!(config.prompts.builtin, None);
        assert_error(
            "",
            &["prompts.file=mine.txt", "prompts.builtin=animals"],
            "in x.toml: prompts.file and prompts.builtin are both given: keep one source of prompts",
        );
    }

    #[test]
    fn wrong_overrides_name_themselves() {
        for (text, expected) in [
            ("optimizer.lrr=1", "unknown key `optimizer.lrr` (--set optimizer.lrr=1); did you mean `lr`?"),
            (
                "optimizer.lr=fast",
                "bad value for `optimizer.lr` (--set optimizer.lr=fast): string \"fast\", expected a number",
            ),
            ("optimizer.lr", "--set optimizer.lr: expected section.key=value, for example --set optimizer.lr=1e-4"),
            (
                "optimizer..lr=1",
                "--set optimizer..lr=1: `optimizer..lr` is not a key; expected section.key=value, for example --set optimizer.lr=1e-4",
            ),
            ("lr.x=1", "unknown key `lr` (--set lr.x=1); did you mean `optimizer.lr`?"),
            ("model=x", "bad value for `model` (--set model=x): string \"x\", expected a table"),
        ] {
            assert_error("[optimizer]\nlr = 1e-3", &[text], expected);
        }
    }
}

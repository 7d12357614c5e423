//! Lists of prompts in files, as people's tools write them: lines of text, tables (CSV, TSV), JSON and JSON lines.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Map, Value as Json};

use super::prompts::Prompt;
use super::text::{decode, shown};

/// What the key or column with the texts may be called, the first that is there.
const TEXT_KEYS: [&str; 5] = ["prompt", "prompts", "text", "caption", "captions"];

/// Files that cannot hold lines of text, and formats that are not read.
const UNREADABLE: [&str; 31] = [
    "7z",
    "arrow",
    "bz2",
    "db",
    "doc",
    "docx",
    "feather",
    "gz",
    "htm",
    "html",
    "npy",
    "npz",
    "ods",
    "odt",
    "parquet",
    "pdf",
    "pickle",
    "pkl",
    "pt",
    "rtf",
    "safetensors",
    "sqlite",
    "tar",
    "toml",
    "xls",
    "xlsx",
    "xml",
    "xz",
    "yaml",
    "yml",
    "zip",
];

const EXAMPLE: &str = r#"{"prompt": "two cats", "count": 2}"#;

/// The prompts of a file, and what was noticed in it that may not be meant.
#[derive(Default)]
pub(super) struct Found {
    pub prompts: Vec<Prompt>,
    pub warnings: Vec<String>,
}

/// Reads a list by the file's ending; what is JSON all through is read as JSON under any other name too.
///
/// # Errors
/// The file is not there, no text, of a format that is not read, or damaged; names the file and the place.
pub(super) fn read(path: &Path) -> Result<Found> {
    let path = &*crate::files::located(path)?;
    let ending = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    let name = path.display();
    if UNREADABLE.contains(&&*ending) {
        bail!(
            "{name} (prompts.file): .{ending} files are not read; save the prompts as text with one on each line, or as .csv, \
             .tsv, .json or .jsonl"
        );
    }
    let bytes = std::fs::read(path).with_context(|| format!("reading the prompts from {name} (prompts.file)"))?;
    let read = |text: String| match &*ending {
        "csv" => table(&text, b",;\t"),
        "tsv" | "tab" => table(&text, b"\t"),
        "json" => json(&text),
        "jsonl" | "ndjson" => json_lines(&text),
        _ if is_json(&text)? => json(&text),
        _ => Ok(lines(&text)),
    };
    let mut found = decode(&bytes).and_then(read).map_err(|error| match error.downcast::<AtLine>() {
        Ok(AtLine(line, error)) => error.context(format!("{name}, line {line} (prompts.file)")),
        Err(error) => error.context(format!("{name} (prompts.file)")),
    })?;
    ensure!(
        !found.prompts.is_empty(),
        "{name} (prompts.file) has no prompt: {}",
        match &*ending {
            "csv" | "tsv" | "tab" => "put one in each row, below a line that names the column `prompt`".to_owned(),
            "json" | "jsonl" | "ndjson" => format!("put an object on each line, such as {EXAMPLE}"),
            _ => "put one on each line; empty lines and lines that start with # are skipped".to_owned(),
        }
    );
    found.warn_of_options();
    Ok(found)
}

/// An error with its line, which the message names beside the file.
#[derive(Debug, thiserror::Error)]
#[error("line {0}")]
struct AtLine(usize, anyhow::Error);

/// One prompt a line.
pub(super) fn lines(text: &str) -> Found {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let (skipped, lines): (Vec<&str>, Vec<&str>) = lines.partition(|line| line.starts_with('#'));
    let (all, mut warnings) = (skipped.len() + lines.len(), Vec::new());
    // `# about this list` is a comment wherever there are comments, `#1 dad` may be a prompt
    if let Some(first) = skipped.iter().find(|line| line[1..].starts_with(|c: char| c.is_alphanumeric())) {
        warnings.push(format!(
            "{} of {all} lines start with # and were skipped as comments, such as `{}`; give prompts that start with # as JSON lines (.jsonl)",
            skipped.len(),
            shown(first)
        ));
    } else if !skipped.is_empty() {
        warnings.push(format!("{} of {all} lines start with # and were skipped as comments", skipped.len()));
    }
    if let Some(heading) = lines.first().filter(|line| heading_of_a_table(line)) {
        warnings.push(format!(
            "its first line, `{}`, looks like the heading of a table, and is taken as a prompt; call the file .csv or .tsv to \
             have it read as one",
            shown(heading)
        ));
    }
    if !lines.is_empty() && lines.iter().all(|line| is_quoted(line)) {
        warnings.push("every line stands in quotes, which are taken as part of the prompts; take them out".to_owned());
    }
    if lines.len() > 1 && lines.iter().all(|line| is_list_item(line)) {
        warnings.push("every line begins with a number or a dash, as parts of the prompts; take them out".to_owned());
    }
    Found { prompts: lines.into_iter().map(Prompt::from).collect(), warnings }
}

fn heading_of_a_table(line: &str) -> bool {
    line.split([',', ';', '\t']).any(|cell| is_text_key(cell.trim().trim_matches('"')))
}

fn is_quoted(line: &str) -> bool {
    let line = line.trim_end_matches(',');
    let between = |open, close| line.len() > 1 && line.starts_with(open) && line.ends_with(close);
    between('"', '"') || between('\'', '\'') || between('“', '”')
}

/// `- a cat`, `2. a dog`, `3) a cow`.
fn is_list_item(line: &str) -> bool {
    let (mark, _) = line.split_once(' ').unwrap_or_default();
    let number = mark.strip_suffix(['.', ')']).unwrap_or_default();
    ["-", "*"].contains(&mark) || (!number.is_empty() && number.chars().all(|c| c.is_ascii_digit()))
}

impl Found {
    /// Options of other programs' prompt lines, which are words here.
    fn warn_of_options(&mut self) {
        let option = |prompt: &Prompt| {
            let option =
                |word: &&str| word.strip_prefix("--").is_some_and(|o| o.starts_with(|c: char| c.is_alphabetic()));
            prompt.text.split_whitespace().find(option).map(shown)
        };
        let options: Vec<String> = self.prompts.iter().filter_map(option).collect();
        if let Some(first) = options.first() {
            self.warnings.push(format!(
                "{} of {} prompts hold options as kohya's scripts and others read them (`{first}`); here they are words of the prompt: \
                 take them out",
                options.len(),
                self.prompts.len()
            ));
        }
    }
}

/// A table with a heading; of the delimiters the one that shows a column of texts.
fn table(text: &str, delimiters: &[u8]) -> Result<Found> {
    let reader = |delimiter: &u8| csv::ReaderBuilder::new().delimiter(*delimiter).from_reader(text.as_bytes());
    let headings = |delimiter: &u8| reader(delimiter).headers().cloned().unwrap_or_default();
    let column_of = |delimiter: &u8| text_key(headings(delimiter).iter());
    let Some((delimiter, column)) = delimiters.iter().find_map(|delimiter| Some((delimiter, column_of(delimiter)?)))
    else {
        if text.trim().is_empty() {
            return Ok(Found::default());
        }
        bail!(
            "its first line names no column {}, but {}: call the column of the texts `prompt`",
            TEXT_KEYS.map(|key| format!("`{key}`")).join(", "),
            headings(&delimiters[0]).iter().map(|cell| format!("`{}`", shown(cell))).collect::<Vec<_>>().join(", ")
        );
    };
    let headings = headings(delimiter);
    let (mut found, mut empty) = (Found::default(), 0);
    for row in reader(delimiter).into_records() {
        let row = row.context("put a text that has the table's delimiter in it in double quotes")?;
        let text = row.get(column).unwrap_or_default().trim();
        if text.is_empty() {
            empty += 1;
            continue;
        }
        let others = headings.iter().zip(&row).enumerate().filter(|(i, _)| *i != column);
        let fields = others.map(|(_, (heading, cell))| (heading.trim().to_owned(), Json::from(cell)));
        found.prompts.push(Prompt { text: text.to_owned(), fields: fields.collect() });
    }
    // a quote that is not closed takes what follows into its cell
    let open = !text.matches('"').count().is_multiple_of(2);
    if let Some(prompt) = found.prompts.iter().find(|prompt| open && prompt.text.contains('\n')) {
        let start = prompt.text.lines().next().unwrap_or_default();
        bail!("a double quote is not closed, before `{}`: close it", shown(start));
    }
    if empty > 0 {
        found.warnings.push(format!("{empty} of {} rows have no text and were skipped", empty + found.prompts.len()));
    }
    Ok(found)
}

fn is_text_key(key: &str) -> bool {
    TEXT_KEYS.iter().any(|known| known.eq_ignore_ascii_case(key))
}

/// The place of the texts among keys.
fn text_key<'a>(keys: impl Iterator<Item = &'a str> + Clone) -> Option<usize> {
    let place = |known: &&str| {
        let exactly = keys.clone().position(|key| key == *known);
        exactly.or_else(|| keys.clone().position(|key| key.trim().eq_ignore_ascii_case(known)))
    };
    TEXT_KEYS.iter().find_map(place)
}

/// Whether the text is JSON, one value or one on each line.
///
/// # Errors
/// It begins like JSON and is none.
fn is_json(text: &str) -> Result<bool> {
    let start = text.trim_start();
    if !start.starts_with(['[', '{']) {
        return Ok(false);
    }
    let Err(error) = serde_json::from_str::<Json>(text) else { return Ok(true) };
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    if lines.all(|line| serde_json::from_str::<Map<String, Json>>(line).is_ok()) {
        return Ok(true);
    }
    let first = start.lines().next().unwrap_or_default().trim_end();
    let begins = ["[", "{"].contains(&first) || ["[\"", "[{\"", "{\""].iter().any(|open| first.starts_with(open));
    ensure!(!begins, "it begins like JSON, but is none ({error}): mend it, or put one prompt on each line");
    Ok(false)
}

/// A list of texts or of objects, an object of columns or of objects, or JSON lines under the name of JSON.
fn json(text: &str) -> Result<Found> {
    if text.trim().is_empty() {
        return Ok(Found::default());
    }
    let value = match serde_json::from_str(text) {
        Ok(value) => value,
        Err(_) if text.lines().next().is_some_and(|line| serde_json::from_str::<Json>(line).is_ok()) => {
            return json_lines(text);
        }
        Err(error) => bail!("not JSON ({error})"),
    };
    let items = match value {
        Json::Array(items) => items,
        Json::Object(map) => items_of(map)?,
        other => bail!("JSON, but no list: it holds {other}"),
    };
    let prompts = (1..).zip(items).map(|(number, item)| prompt(item).with_context(|| format!("item {number}")));
    Ok(Found { prompts: prompts.collect::<Result<_>>()?, warnings: Vec::new() })
}

/// What an object lists: `{"prompt": [..], "count": [..]}`, `{"1": {"prompt": ..}}`, or itself.
fn items_of(map: Map<String, Json>) -> Result<Vec<Json>> {
    let Some(place) = text_key(map.keys().map(String::as_str)) else {
        let keys = map.keys().take(5).map(|key| format!("`{}`", shown(key))).collect::<Vec<_>>().join(", ");
        let values: Vec<Json> = map.into_iter().map(|(_, value)| value).collect();
        ensure!(
            values.iter().all(Json::is_object),
            "JSON, but no list of prompts: it has the keys {keys}; give a list of texts, or of objects such as {EXAMPLE}"
        );
        return Ok(values);
    };
    let Some(Json::Array(texts)) = map.values().nth(place).cloned() else { return Ok(vec![map.into()]) };
    let item = |(row, text): (usize, Json)| {
        if text.is_object() {
            return text;
        }
        let others = map.iter().enumerate().filter(|(i, _)| *i != place);
        let others = others.filter_map(|(_, (key, column))| Some((key.clone(), column.get(row)?.clone())));
        std::iter::once((TEXT_KEYS[0].to_owned(), text)).chain(others).collect::<Map<_, _>>().into()
    };
    Ok(texts.into_iter().enumerate().map(item).collect())
}

fn json_lines(text: &str) -> Result<Found> {
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    let read = |(number, line): (usize, &str)| -> Result<Prompt> {
        let value = serde_json::from_str(line).map_err(|error| anyhow!("not JSON ({error}): write {EXAMPLE}"));
        value.and_then(prompt).map_err(|error| AtLine(number, error).into())
    };
    Ok(Found { prompts: lines.map(read).collect::<Result<_>>()?, warnings: Vec::new() })
}

/// A text, or an object with one.
fn prompt(value: Json) -> Result<Prompt> {
    let mut fields = match value {
        Json::String(text) => return Ok(text.into()),
        Json::Object(fields) => fields,
        _ => bail!("neither a text nor an object: write {EXAMPLE}"),
    };
    let Some(key) = text_key(fields.keys().map(String::as_str)).and_then(|place| fields.keys().nth(place).cloned())
    else {
        bail!("no `prompt`: it is the text of the prompt, as in {EXAMPLE}")
    };
    match fields.shift_remove(&key) {
        Some(Json::String(text)) => Ok(Prompt { text, fields }),
        other => bail!("`{}` is {}: it must be a text, as in {EXAMPLE}", shown(&key), other.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// What `read` makes of a file with this content.
    fn of(name: &str, content: impl AsRef<[u8]>) -> Result<Found> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        read(&path)
    }

    #[track_caller]
    fn texts(name: &str, content: impl AsRef<[u8]>, expected: &[&str]) -> Vec<String> {
        let found = of(name, content).unwrap();
        assert_eq!(found.prompts.iter().map(|prompt| prompt.text.as_str()).collect::<Vec<_>>(), expected);
        found.warnings
    }

    #[track_caller]
    fn fails(name: &str, content: impl AsRef<[u8]>, words: &[&str]) {
        let error = format!("{:#}", of(name, content).err().unwrap());
        assert!(error.contains(name) && words.iter().all(|word| error.contains(word)), "{error}");
    }

    #[test]
    fn marks_encodings_and_line_ends_are_no_part_of_prompts() {
        let two = ["a mule", "a yak"];
        texts("p.txt", "\u{feff}a mule\r\na yak\r\n", &two);
        texts("p.txt", "a mule\ra yak\r", &two);
        texts("p.txt", "a mule\n\u{feff}a yak", &two);
        texts("p.csv", "\u{feff}prompt\r\na mule\r\na yak\r\n", &two);
        texts("p.json", "\u{feff}[\"a mule\", \"a yak\"]", &two);
        let utf16 =
            |order: fn(u16) -> [u8; 2]| "\u{feff}a mule\r\na yäk\n".encode_utf16().flat_map(order).collect::<Vec<u8>>();
        texts("p.txt", utf16(u16::to_le_bytes), &["a mule", "a yäk"]);
        texts("p.txt", utf16(u16::to_be_bytes), &["a mule", "a yäk"]);
        fails("p.txt", &utf16(u16::to_le_bytes)[..7], &["UTF-16", "save it as UTF-8"]);
        fails("p.txt", &utf16(u16::to_le_bytes)[2..], &["save", "UTF-8"]);
        fails("p.txt", b"a mule\na y\xe4k\n", &["line 2", "byte 10 (0xe4)", "save the file as UTF-8"]);
    }

    #[test]
    fn comments_are_counted() {
        assert_eq!(texts("p.txt", "a mule\n", &["a mule"]), [""; 0]);
        let warnings = texts("p.txt", "# mine\n\n## old\na mule\n", &["a mule"]);
        assert_eq!(warnings, ["2 of 3 lines start with # and were skipped as comments"]);
        let warnings = texts("p.txt", "# mine\n#2 pencil\na mule\n", &["a mule"]);
        assert!(warnings[0].starts_with("2 of 3 lines start with # and were skipped as comments, such as `#2 pencil`"));
    }

    #[test]
    fn lines_of_other_programs_are_warned_of() {
        let warning = |content: &str| of("p.txt", content).unwrap().warnings.join("\n");
        assert!(warning("a mule --n ugly --w 512\na yak\n").starts_with("1 of 2 prompts hold options"));
        assert!(warning("\"a mule\"\n'a yak',\n").contains("every line stands in quotes"));
        assert!(warning("1. a mule\n2. a yak\n").contains("every line begins with a number"));
        assert!(warning("id;Prompt\n1;a mule\n").contains("`id;Prompt`, looks like the heading of a table"));
        assert_eq!(warning("a mule -- well-fed\n\"yak\" on a wall\n"), "");
    }

    #[test]
    fn tables_give_their_column_of_texts_and_fields() {
        let found = of("p.csv", "id,Prompt,count\n7,\"two mules, \"\"tired\"\"\",2\n8,a yak,\n").unwrap();
        assert_eq!(found.prompts[0].text, "two mules, \"tired\"");
        assert_eq!(Json::Object(found.prompts[0].fields.clone()), json!({ "id": "7", "count": "2" }));
        assert_eq!(found.prompts[1].text, "a yak");
        texts("p.csv", "text;note\na mule, tired;x\n", &["a mule, tired"]);
        texts("p.TSV", "caption\turl\na mule, tired\tx\n", &["a mule, tired"]);
        assert_eq!(texts("p.csv", "prompt,a\nx,1\n,2\n", &["x"]), ["1 of 2 rows have no text and were skipped"]);
        fails("p.csv", "a mule\na yak\n", &["names no column `prompt`", "but `a mule`"]);
        fails("p.csv", "prompt,count\na mule, tired,2\n", &["line: 2", "double quotes"]);
        fails("p.csv", "prompt\n\"a mule\na yak\n", &["not closed", "a mule"]);
        fails("p.csv", "prompt\n", &["has no prompt"]);
    }

    #[test]
    fn json_is_a_list_of_prompts() {
        let two = ["a mule, tired", "a yak"];
        texts("p.json", r#"["a mule, tired", "a yak"]"#, &two);
        texts("p.json", "[\n \"a mule, tired\",\n \"a yak\"\n]\n", &two);
        texts("p.json", r#"[{"caption": "a mule, tired"}, {"text": "a yak"}]"#, &two);
        texts("p.json", r#"{"prompts": ["a mule, tired", "a yak"]}"#, &two);
        texts("p.json", r#"{"0": {"prompt": "a mule, tired"}, "1": {"prompt": "a yak"}}"#, &two);
        texts("p.json", "{\"prompt\": \"a mule, tired\"}\n{\"prompt\": \"a yak\"}\n", &two);
        texts("p.ndjson", "\"a mule, tired\"\n{\"Prompt\": \"a yak\"}\n", &two);
        texts("p.txt", r#"["a mule, tired", "a yak"]"#, &two);
        texts("p", "{\"prompt\": \"a mule, tired\"}\n{\"prompt\": \"a yak\"}\n", &two);
        let columns = of("p.json", r#"{"prompt": ["a", "b"], "count": [1, 2]}"#).unwrap().prompts;
        assert_eq!(Json::Object(columns[1].fields.clone()), json!({ "count": 2 }));
        texts("p.txt", "[a mule]\n{red|blue} yak\n", &["[a mule]", "{red|blue} yak"]);
        fails("p.json", "[\"a mule\",]", &["not JSON"]);
        fails("p.json", "[1]", &["item 1", "neither a text nor an object"]);
        fails("p.json", r#"{"animals": ["a mule"]}"#, &["JSON", "`animals`"]);
        fails("p.txt", "[\n\"a mule\",\n]\n", &["begins like JSON"]);
        fails("p.json", "[]", &["has no prompt"]);
    }

    #[test]
    fn formats_that_are_not_read_are_named() {
        for name in ["p.parquet", "p.xlsx", "p.YAML", "p.txt.gz"] {
            fails(name, "PAR1", &["files are not read", ".csv"]);
        }
        fails("p.txt", "PK\0\0", &["UTF-8"]);
    }
}

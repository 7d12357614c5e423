//! Lists in files: tables (CSV, TSV), JSON and JSON lines, as rows of named values.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Map, Value as Json};

use crate::config::{decode, shown};

/// One row.
#[derive(Clone, Debug)]
pub struct Row {
    /// The line of the file, from 1; of a JSON list, the place in it.
    pub place: usize,
    values: Map<String, Json>,
}

/// The rows of a list, and where they are from.
pub struct Rows {
    pub file: PathBuf,
    pub rows: Vec<Row>,
}

impl Row {
    /// The value of the first of these names that is there, in any case.
    fn get(&self, names: &[&str]) -> Option<&Json> {
        let named = |name: &&str| self.values.iter().find(|(key, _)| key.trim().eq_ignore_ascii_case(name));
        names.iter().find_map(named).map(|(_, value)| value).filter(|value| !value.is_null())
    }

    /// A text that is not empty.
    pub fn text(&self, names: &[&str]) -> Option<&str> {
        self.get(names)?.as_str().map(str::trim).filter(|text| !text.is_empty())
    }

    /// A number, which a table has as text.
    ///
    /// # Errors
    /// There is something else.
    pub fn number(&self, names: &[&str]) -> Result<Option<f64>> {
        let Some(value) = self.get(names) else { return Ok(None) };
        let number = match value {
            Json::String(text) if text.trim().is_empty() => return Ok(None),
            Json::String(text) => text.trim().parse().ok(),
            Json::Bool(yes) => Some(f64::from(u8::from(*yes))),
            other => other.as_f64(),
        };
        let number = number.filter(|number: &f64| number.is_finite());
        Ok(Some(number.with_context(|| format!("`{}` of `{}` is no number", shown(value.to_string()), names[0]))?))
    }
}

impl Rows {
    /// Whether a file is a list by its name.
    pub fn is_list(path: &Path) -> bool {
        ["csv", "tsv", "json", "jsonl", "ndjson"].contains(&&*ending(path))
    }

    /// Reads a list by the ending of its name. In a table the delimiter is the one with which the heading has one of `columns`.
    ///
    /// # Errors
    /// Names the file and the place.
    pub fn read(path: &Path, columns: &[&str]) -> Result<Self> {
        let read = || -> Result<Vec<Row>> {
            let text = decode(&std::fs::read(path)?)?;
            match &*ending(path) {
                "csv" => table(&text, b",;\t", columns),
                "tsv" => table(&text, b"\t", columns),
                "json" => json(&text),
                _ => json_lines(&text),
            }
        };
        let rows = read().with_context(|| format!("reading the list {}", path.display()))?;
        ensure!(!rows.is_empty(), "the list {} has no rows", path.display());
        Ok(Self { file: path.to_owned(), rows })
    }

    /// A file that a row names, which is relative to the list's folder.
    pub fn located(&self, name: &str) -> PathBuf {
        self.file.parent().unwrap_or(Path::new("")).join(name)
    }

    /// What an error about a row begins with.
    pub fn at(&self, row: &Row) -> String {
        format!("{}, row {}", self.file.display(), row.place)
    }
}

fn ending(path: &Path) -> String {
    path.extension().unwrap_or_default().to_string_lossy().to_lowercase()
}

fn table(text: &str, delimiters: &[u8], columns: &[&str]) -> Result<Vec<Row>> {
    let reader = |delimiter: u8| csv::ReaderBuilder::new().delimiter(delimiter).from_reader(text.as_bytes());
    let has_column = |delimiter: &u8| -> bool {
        let mut reader = reader(*delimiter);
        let is_column = |cell: &str| columns.iter().any(|column| column.eq_ignore_ascii_case(cell.trim()));
        reader.headers().is_ok_and(|headings| headings.iter().any(is_column))
    };
    let Some(delimiter) = delimiters.iter().copied().find(has_column) else {
        bail!(
            "its first line, `{}`, names none of the columns {}",
            shown(text.lines().next().unwrap_or_default()),
            columns.iter().map(|column| format!("`{column}`")).collect::<Vec<_>>().join(", ")
        );
    };
    let mut reader = reader(delimiter);
    let headings = reader.headers()?.clone();
    let mut rows = Vec::new();
    for row in reader.into_records() {
        let row = row.context("put a text that has the table's delimiter in it in double quotes")?;
        let place = row.position().map_or(0, |position| position.line() as usize);
        let cells = headings.iter().zip(&row).map(|(heading, cell)| (heading.trim().to_owned(), Json::from(cell)));
        rows.push(Row { place, values: cells.collect() });
    }
    Ok(rows)
}

fn json(text: &str) -> Result<Vec<Row>> {
    match serde_json::from_str(text) {
        Ok(Json::Array(items)) => (1..).zip(items).map(|(place, item)| row(place, item)).collect(),
        Ok(Json::Object(_)) if text.trim().lines().count() > 1 => bail!("it is JSON, but no list of objects"),
        _ => json_lines(text),
    }
}

fn json_lines(text: &str) -> Result<Vec<Row>> {
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    let read = |(place, line): (usize, &str)| {
        let value = serde_json::from_str(line).map_err(|error| anyhow!("line {place} is not JSON ({error})"))?;
        row(place, value)
    };
    lines.map(read).collect()
}

fn row(place: usize, value: Json) -> Result<Row> {
    match value {
        Json::Object(values) => Ok(Row { place, values }),
        other => bail!("row {place} is no object, but {}", shown(other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str, content: &str) -> Result<Rows> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        Rows::read(&path, &["file", "score"])
    }

    #[test]
    fn tables_and_json_give_the_same_rows() {
        for (name, content) in [
            ("l.csv", "file,Score\na.png,2.5\n\"b,c.png\",-1\n"),
            ("l.csv", "File;score\na.png;2.5\nb,c.png;-1\n"),
            ("l.tsv", "score\tfile\n2.5\ta.png\n-1\tb,c.png\n"),
            ("l.jsonl", "{\"file\": \"a.png\", \"score\": 2.5}\n\n{\"file\": \"b,c.png\", \"score\": \"-1\"}\n"),
            ("l.json", "[{\"file\": \"a.png\", \"score\": 2.5}, {\"file\": \"b,c.png\", \"score\": -1}]"),
        ] {
            let rows = of(name, content).unwrap();
            let files: Vec<_> = rows.rows.iter().map(|row| row.text(&["path", "file"]).unwrap()).collect();
            let scores: Vec<_> = rows.rows.iter().map(|row| row.number(&["score"]).unwrap().unwrap()).collect();
            assert_eq!((files, scores), (vec!["a.png", "b,c.png"], vec![2.5, -1.0]), "{name}");
            assert_eq!(rows.rows[0].text(&["other"]), None);
            assert_eq!(rows.located("a.png"), rows.file.with_file_name("a.png"));
        }
    }

    #[test]
    fn what_is_no_list_is_named_with_its_place() {
        for (name, content, words) in [
            ("l.csv", "a.png,2\n", &["l.csv", "`a.png,2`", "`file`"][..]),
            ("l.csv", "file,score\na.png,1,2\n", &["line: 2", "double quotes"]),
            ("l.csv", "file\n", &["no rows"]),
            ("l.jsonl", "{\"file\": \"a\"}\nwords\n", &["line 2 is not JSON"]),
            ("l.json", "[1]", &["row 1 is no object, but 1"]),
            ("l.json", "{\n}", &["no list of objects"]),
        ] {
            let error = format!("{:#}", of(name, content).err().unwrap());
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
        let rows = of("l.csv", "file,score\na,x\nb,\n").unwrap();
        assert!(rows.rows[0].number(&["score"]).is_err());
        assert_eq!(rows.rows[1].number(&["score"]).unwrap(), None);
        assert!(rows.at(&rows.rows[1]).ends_with("l.csv, row 3"));
    }
}

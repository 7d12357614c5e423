//! The pictures that a command line names: files, folders, and lists of files.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::{Picture, Rows, is_picture};

/// What a list may call the column of the pictures.
pub const FILE: [&str; 6] = ["file", "path", "image", "picture", "file_name", "filename"];

/// What a list may call the column of the prompts.
pub(super) const PROMPT: [&str; 3] = ["prompt", "text", "caption"];

/// The pictures of files, folders (with the folders in them, by their names) and lists (CSV, TSV, JSON, JSON lines, with a column `file`, relative
/// to the list's folder, and perhaps `prompt`). A file that is no list is a picture, whatever its name.
///
/// # Errors
/// A path is not there, a list cannot be read, a folder has no picture in it.
pub fn collect(paths: &[PathBuf]) -> Result<Vec<Picture>> {
    let mut found = Vec::new();
    for path in paths {
        if path.is_dir() {
            let before = found.len();
            walk(path, &mut found, 0).with_context(|| format!("looking for pictures in {}", path.display()))?;
            ensure!(
                found.len() > before,
                "there is no picture (.png, .jpg, .jpeg, .webp) in the folder {}",
                path.display()
            );
            continue;
        }
        ensure!(path.is_file(), "there is no picture, folder or list {}", path.display());
        if !Rows::is_list(path) {
            found.push(Picture { file: path.clone(), prompt: None });
            continue;
        }
        let rows = Rows::read(path, &FILE)?;
        for row in &rows.rows {
            let name = row.text(&FILE).with_context(|| format!("{} has no `file`", rows.at(row)))?;
            found.push(Picture { file: rows.located(name), prompt: row.text(&PROMPT).map(str::to_owned) });
        }
    }
    Ok(found)
}

/// Folders inside folders; links that lead in a circle end somewhere.
const DEEPEST: usize = 16;

fn walk(folder: &Path, found: &mut Vec<Picture>, depth: usize) -> Result<()> {
    let mut paths = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.sort();
    for path in paths {
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if path.is_dir() && depth < DEEPEST && !hidden {
            walk(&path, found, depth + 1)?;
        } else if path.is_file() && is_picture(&path) && !hidden {
            found.push(Picture { file: path, prompt: None });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_folders_and_lists_are_pictures_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir_all(at("set/10_cat")).unwrap();
        for name in ["set/b.PNG", "set/a.jpg", "set/a.txt", "set/.hidden.png", "set/10_cat/c.webp", "odd"] {
            std::fs::write(at(name), "").unwrap();
        }
        std::fs::write(at("list.csv"), "file,prompt\nset/a.jpg,a cat\nnew.png,\n").unwrap();
        let found = collect(&[at("odd"), at("set"), at("list.csv")]).unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|picture| {
                let file = picture.file.strip_prefix(folder.path()).unwrap();
                (file.to_str().unwrap(), picture.prompt.as_deref())
            })
            .collect();
        let expected = [
            ("odd", None),
            ("set/10_cat/c.webp", None),
            ("set/a.jpg", None),
            ("set/b.PNG", None),
            ("set/a.jpg", Some("a cat")),
            ("new.png", None),
        ];
        assert_eq!(found, expected);
        std::fs::create_dir(at("empty")).unwrap();
        std::fs::write(at("bad.jsonl"), "{\"prompt\": \"x\"}\n").unwrap();
        for (name, words) in
            [("empty", "no picture"), ("absent", "no picture, folder or list"), ("bad.jsonl", "row 1 has no `file`")]
        {
            assert!(format!("{:#}", collect(&[at(name)]).unwrap_err()).contains(words), "{name}");
        }
    }
}

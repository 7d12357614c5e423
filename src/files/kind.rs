//! What a file is that does not hold what it should, by its first bytes.

/// How well-known formats begin.
const BEGINNINGS: [(&[u8], &str); 16] = [
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, or download the file",
    ),
    (b"# xet version", "a pointer of git-xet, not the file itself; download the file"),
    (b"PK\x03\x04", "a zip archive"),
    (b"GGUF", "a GGUF file, a format that is not supported; take the same weights as safetensors"),
    (b"\x89HDF\r\n", "an HDF5 file (Keras), a format that is not supported; take the same weights as safetensors"),
    (b"\x93NUMPY", "an array of NumPy; save the tensors under their names, as safetensors"),
    (b"\x1f\x8b", "compressed by gzip; unpack it first"),
    (b"\xfd7zXZ", "compressed by xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"\x89PNG", "an image (PNG)"),
    (b"\xff\xd8\xff", "an image (JPEG)"),
    (b"%PDF", "a PDF"),
    (b"#!", "a script"),
    (b"\x80\x02\x8a", "of a very old format of PyTorch; load it with PyTorch and save it again"),
];

/// What the bytes are the beginning of, in words that follow "it is"; nothing where they do not tell.
pub fn kind_of(bytes: &[u8]) -> Option<String> {
    let start = &bytes[..bytes.len().min(4096)];
    if let Some((_, kind)) = BEGINNINGS.iter().find(|(beginning, _)| start.starts_with(beginning)) {
        return Some((*kind).to_owned());
    }
    if start.get(257..262) == Some(b"ustar") {
        return Some("a tar archive; unpack it, or load it with PyTorch and save it again".to_owned());
    }
    if let [0x80, 1..=5, ..] = start {
        return Some(
            "a bare pickle, which torch.save did not write; load it with Python and save its tensors as safetensors"
                .to_owned(),
        );
    }
    if start.len() >= 16 && start.iter().all(|&byte| byte == 0) {
        return Some("filled with zeros: its download was not finished; download it again".to_owned());
    }
    let text = beginning_of_text(start)?;
    let lower = text.to_lowercase();
    Some(if ["<!doctype", "<html", "<?xml", "<head"].iter().any(|tag| lower.starts_with(tag)) {
        "a web page, not the file itself; use the link that downloads the file, and log in where it asks for that"
            .to_owned()
    } else {
        let line: String = text.lines().next().unwrap_or_default().chars().take(60).collect();
        let what = if text.starts_with(['{', '[']) { "JSON" } else { "text" };
        format!("{what}, not the file itself; it begins with `{}`", line.trim())
    })
}

/// The bytes without what is before the first word, if they are text.
fn beginning_of_text(start: &[u8]) -> Option<&str> {
    let text = match std::str::from_utf8(start) {
        Ok(text) => text,
        // a character that the end cuts
        Err(e) if e.error_len().is_none() => std::str::from_utf8(&start[..e.valid_up_to()]).ok()?,
        Err(_) => return None,
    };
    let is_text = text.chars().all(|c| !c.is_control() || c.is_whitespace());
    Some(text.trim_start_matches('\u{feff}').trim_start()).filter(|text| is_text && text.len() >= 2)
}

#[cfg(test)]
mod tests {
    use super::kind_of;

    #[test]
    fn files_are_told_by_how_they_begin() {
        for (bytes, word) in [
            (&b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"[..], "git lfs pull"),
            (b"<!DOCTYPE html>\n<html>", "web page"),
            (b"\n  <HTML><body>404", "web page"),
            (
                b"{\"error\": \"Invalid username or password.\"}",
                "JSON, not the file itself; it begins with `{\"error\"",
            ),
            (b"\xef\xbb\xbf[1]", "JSON"),
            (b"Access to model is restricted", "text, not the file itself; it begins with `Access"),
            (b"GGUF\x03\0\0\0", "GGUF"),
            (b"PK\x03\x04", "zip"),
            (b"\x80\x04\x95\x01", "bare pickle"),
            (b"\x89PNG\r\n", "image"),
            (&[0; 64], "zeros"),
        ] {
            let kind = kind_of(bytes).unwrap();
            assert!(kind.contains(word), "{kind}");
        }
        for bytes in [&b""[..], b"\x10\0\0\0\0\0\0\0{\"x\": 1}        ", b"\xff\xfe\0", b"x"] {
            assert_eq!(kind_of(bytes), None, "{bytes:?}");
        }
    }
}

//! Texts from files: how they are read, and how a terminal shows them.

use anyhow::{Result, anyhow, bail, ensure};

/// Text in UTF-8 or, where its mark says so, in UTF-16; without marks, with `\n` at the ends of lines.
///
/// # Errors
/// It is none; names the place.
pub fn decode(bytes: &[u8]) -> Result<String> {
    let text = match bytes {
        [0xFF, 0xFE, rest @ ..] => utf16(rest, u16::from_le_bytes)?,
        [0xFE, 0xFF, rest @ ..] => utf16(rest, u16::from_be_bytes)?,
        _ => utf8(bytes)?,
    };
    ensure!(!text.contains('\0'), "it holds zeros, so it is no text, or not in UTF-8: save it as text in UTF-8");
    Ok(text.replace('\u{feff}', "").replace("\r\n", "\n").replace('\r', "\n"))
}

fn utf8(bytes: &[u8]) -> Result<String> {
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|error| {
        let at = error.valid_up_to();
        let line = 1 + bytes[..at].iter().filter(|byte| **byte == b'\n').count();
        anyhow!("line {line}: byte {at} (0x{:02x}) is not UTF-8: save the file as UTF-8", bytes[at])
    })
}

fn utf16(bytes: &[u8], unit: impl Fn([u8; 2]) -> u16) -> Result<String> {
    let (pairs, rest) = bytes.as_chunks::<2>();
    let text = String::from_utf16(&pairs.iter().map(|pair| unit(*pair)).collect::<Vec<_>>());
    match text {
        Ok(text) if rest.is_empty() => Ok(text),
        _ => bail!("it is marked as UTF-16 and is damaged: save it as UTF-8"),
    }
}

/// A text with its control characters spelled out (`\u{1b}`, `\n`): a terminal obeys those that reach it. So are the marks
/// that change the order of what is read.
pub fn shown(text: impl AsRef<str>) -> String {
    let commands = |c: char| {
        c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let mut shown = String::with_capacity(text.as_ref().len());
    for c in text.as_ref().chars() {
        if commands(c) { shown.extend(c.escape_default()) } else { shown.push(c) }
    }
    shown
}

/// As [`shown`], for a message of several lines: their ends and tabs stay.
pub fn shown_lines(text: impl AsRef<str>) -> String {
    text.as_ref()
        .split_inclusive(['\n', '\t'])
        .map(|part| {
            let end = part.len() - usize::from(part.ends_with(['\n', '\t']));
            shown(&part[..end]) + &part[end..]
        })
        .collect()
}

/// A text as one word of a command line.
pub fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-+=:,@".contains(c) || (cfg!(windows) && c == '\\');
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_spelled_out() {
        let text = "a \u{1b}]0;title\u{7}y\u{e4}k\r\nred\u{9b}31m\u{202e}";
        assert_eq!(shown(text), r"a \u{1b}]0;title\u{7}yäk\r\nred\u{9b}31m\u{202e}");
        assert_eq!(shown_lines("one\u{1b}[2J\n\ttwo\r\n"), "one\\u{1b}[2J\n\ttwo\\r\n");
    }
}

//! Texts from files on a terminal.

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

//! Images as files.

use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::Tensor;
use font8x8::{BASIC_FONTS, GREEK_FONTS, HIRAGANA_FONTS, LATIN_FONTS, UnicodeFonts};
use image::codecs::jpeg::JpegEncoder;
use image::{ImageFormat, Rgb, RgbImage, imageops};

use crate::files::{make_folder_of, write_bytes};
use crate::rewards::to_bytes;

/// Pixels between the pictures of a grid.
const GAP: u32 = 4;

/// One image (3, H, W) in [-1, 1] as bytes, rounded as diffusers rounds.
pub fn to_rgb(image: &Tensor) -> Result<RgbImage> {
    let (_, height, width) = image.dims3()?;
    let bytes = to_bytes(image)?;
    RgbImage::from_raw(width as u32, height as u32, bytes).context("pixels that do not fill the image")
}

/// Pictures of one size in rows of `columns`, white between them.
pub fn grid(pictures: &[RgbImage], columns: usize) -> Result<RgbImage> {
    let first = pictures.first().context("a grid of no pictures")?;
    let (w, h) = first.dimensions();
    let columns = columns.clamp(1, pictures.len()) as u32;
    let rows = (pictures.len() as u32).div_ceil(columns);
    let mut grid = RgbImage::from_pixel(columns * (w + GAP) - GAP, rows * (h + GAP) - GAP, Rgb([255; 3]));
    for (i, picture) in (0..).zip(pictures) {
        imageops::replace(&mut grid, picture, i64::from(i % columns * (w + GAP)), i64::from(i / columns * (h + GAP)));
    }
    Ok(grid)
}

/// Small pictures enlarged by a whole factor, so that a grid of them can be looked at.
pub fn enlarge(picture: RgbImage, at_least: u32) -> RgbImage {
    let factor = at_least.div_ceil(picture.width().max(1)).max(1);
    if factor == 1 {
        return picture;
    }
    imageops::resize(&picture, picture.width() * factor, picture.height() * factor, imageops::FilterType::Nearest)
}

/// Pictures of one size with a text under each, in 8x8 letters: prompt and score. Lines too many are cut off.
pub fn captioned(pictures: Vec<RgbImage>, captions: &[String]) -> Vec<RgbImage> {
    let scale = pictures.first().map_or(1, |picture| (picture.width() / 256).max(1));
    let letters = pictures.first().map_or(1, |picture| (picture.width() / (PITCH * scale)).max(2) - 1) as usize;
    let lines: Vec<Vec<String>> = captions.iter().map(|caption| wrap(caption, letters)).collect();
    let height = lines.iter().map(Vec::len).max().unwrap_or(0) as u32 * LINE * scale + GAP * scale;
    let with_text = |(picture, lines): (RgbImage, &Vec<String>)| {
        let mut cell = RgbImage::from_pixel(picture.width(), picture.height() + height, Rgb([255; 3]));
        imageops::replace(&mut cell, &picture, 0, 0);
        for (row, line) in (0..).zip(lines) {
            let top = picture.height() + (GAP + row * LINE) * scale;
            for (column, letter) in (0..).zip(line.chars()) {
                draw_letter(&mut cell, letter, column * PITCH * scale, top, scale);
            }
        }
        cell
    };
    pictures.into_iter().zip(&lines).map(with_text).collect()
}

/// A prompt with its scores, a line each.
pub fn caption(prompt: &str, rewards: &[&str], scores: &[f64]) -> String {
    let scores = rewards.iter().zip(scores).map(|(name, score)| format!("\n{name} {score:.3}"));
    std::iter::once(prompt.replace('\n', " ")).chain(scores).collect()
}

/// Pixels from one letter to the next: most leave the last of their eight columns empty.
const PITCH: u32 = 7;
/// Pixels from one line of text to the next.
const LINE: u32 = 10;
/// Lines of a caption's paragraph, at most.
const MAX_LINES: usize = 4;

/// Each line of the text in lines of at most `letters` letters, at spaces where it can be.
fn wrap(text: &str, letters: usize) -> Vec<String> {
    let mut all = Vec::new();
    for paragraph in text.lines() {
        let mut lines: Vec<String> = Vec::new();
        for word in paragraph.split_whitespace() {
            let word: Vec<char> = word.chars().collect();
            for part in word.chunks(letters) {
                let part: String = part.iter().collect();
                match lines.last_mut() {
                    Some(line) if line.chars().count() + 1 + part.chars().count() <= letters => {
                        *line += &format!(" {part}")
                    }
                    _ => lines.push(part),
                }
            }
        }
        if lines.len() > MAX_LINES {
            lines.truncate(MAX_LINES);
            let last = &mut lines[MAX_LINES - 1];
            *last = last.chars().take(letters.saturating_sub(2)).chain("..".chars()).collect();
        }
        all.extend(lines);
    }
    all
}

fn draw_letter(picture: &mut RgbImage, letter: char, left: u32, top: u32, scale: u32) {
    let fonts: [&dyn UnicodeFonts; 4] = [&BASIC_FONTS, &LATIN_FONTS, &GREEK_FONTS, &HIRAGANA_FONTS];
    let glyph = fonts.iter().find_map(|font| font.get(letter)).or_else(|| BASIC_FONTS.get('?')).unwrap_or_default();
    for (row, bits) in (0..).zip(glyph) {
        for column in (0..8u32).filter(|column| bits >> column & 1 == 1) {
            for (dx, dy) in (0..scale).flat_map(|dx| (0..scale).map(move |dy| (dx, dy))) {
                let (x, y) = (left + column * scale + dx, top + row * scale + dy);
                if x < picture.width() && y < picture.height() {
                    picture.put_pixel(x, y, Rgb([40; 3]));
                }
            }
        }
    }
}

/// The quality of JPEG files, that of the `compressibility` reward.
const JPEG_QUALITY: u8 = 95;

/// The format that a picture's name asks for.
///
/// # Errors
/// It asks for one that is not written, or for none.
pub fn format_of(path: &Path) -> Result<ImageFormat> {
    match path.extension().unwrap_or_default().to_string_lossy().to_lowercase().as_str() {
        "png" => Ok(ImageFormat::Png),
        "jpg" | "jpeg" => Ok(ImageFormat::Jpeg),
        "webp" => Ok(ImageFormat::WebP),
        _ => bail!(
            "{}: pictures are written as .png, .jpg or .webp, by the ending of their name: choose one of these",
            path.display()
        ),
    }
}

/// Writes a picture in the format of the file's name: PNG and WebP without loss, JPEG in a high quality. Whole or
/// not at all; missing folders are made.
///
/// # Errors
/// As [`format_of`], or it cannot be written; the error names it.
pub fn save(picture: &RgbImage, path: &Path) -> Result<()> {
    let format = format_of(path)?;
    let encode = || -> Result<_> {
        let mut bytes = std::io::Cursor::new(Vec::new());
        match format {
            ImageFormat::Jpeg => picture.write_with_encoder(JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY))?,
            format => picture.write_to(&mut bytes, format)?,
        }
        Ok(bytes.into_inner())
    };
    make_folder_of(path)?;
    write_bytes(path, &encode().with_context(|| format!("writing {}", path.display()))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_has_the_format_of_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let picture = RgbImage::from_fn(16, 8, |x, y| Rgb([(16 * x) as u8, (16 * y) as u8, 90]));
        for (name, start) in [
            ("a.png", &b"\x89PNG"[..]),
            ("A.PNG", b"\x89PNG"),
            ("a.jpg", b"\xff\xd8"),
            ("a.JPeG", b"\xff\xd8"),
            ("new/a.webp", b"RIFF"),
        ] {
            let path = folder.path().join(name);
            save(&picture, &path).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            assert!(bytes.starts_with(start), "{name}");
            let back = image::load_from_memory(&bytes).unwrap().to_rgb8();
            let largest = back.iter().zip(picture.iter()).map(|(a, b)| a.abs_diff(*b)).max();
            assert!(largest <= Some(if start == b"\xff\xd8" { 40 } else { 0 }), "{name}: {largest:?}");
        }
        for name in ["a", "a.gif", "a.png.tmp"] {
            assert!(
                save(&picture, &folder.path().join(name)).unwrap_err().to_string().contains(".png, .jpg"),
                "{name}"
            );
        }
    }

    #[test]
    fn captions_wrap_at_spaces_and_end_in_dots() {
        assert_eq!(
            wrap("a retro cat on a pink background\nclip-score 0.71", 16),
            ["a retro cat on a", "pink background", "clip-score 0.71"]
        );
        assert_eq!(wrap("incomprehensibilities", 8), ["incompre", "hensibil", "ities"]);
        assert_eq!(wrap("a b c d e f", 1), ["a", "b", "c", ".."]);
        assert!(wrap("", 16).is_empty());
    }

    #[test]
    fn captions_add_the_same_height_to_every_picture() {
        let blank = || RgbImage::from_pixel(64, 32, Rgb([9; 3]));
        let cells = captioned(vec![blank(), blank()], &["one line and more".to_owned(), "é\u{1f600}".to_owned()]);
        assert_eq!(cells[0].dimensions(), cells[1].dimensions());
        assert_eq!(cells[0].width(), 64);
        let ink = |cell: &RgbImage| cell.rows().skip(32).flatten().filter(|pixel| pixel.0 == [40; 3]).count();
        assert!(ink(&cells[0]) > ink(&cells[1]) && ink(&cells[1]) > 10);
        assert_eq!(cells[1].get_pixel(5, 5).0, [9; 3]);
    }
}

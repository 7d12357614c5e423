//! Pictures that exist: files, folders and lists of them, what they were painted from, and their pixels.

mod list;
mod prompt;
mod rows;

use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;

use anyhow::{Context, Result, bail};
use image::{DynamicImage, ImageReader, RgbImage};
use rayon::prelude::*;

pub use list::{FILE, collect};
pub use prompt::{prompt_of, text_in_png};
pub use rows::{Row, Rows};

/// The endings of files that are taken for pictures in folders.
const ENDINGS: [&str; 4] = ["png", "jpg", "jpeg", "webp"];

/// A picture that was named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    pub file: PathBuf,
    /// What its list says that it shows.
    pub prompt: Option<String>,
}

fn is_picture(path: &Path) -> bool {
    let ending = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    ENDINGS.contains(&&*ending)
}

/// Reads a picture as PIL's `convert("RGB")` gives it: transparency is dropped and not blended, of 16 bits the upper 8 count. Its kind is
/// told by its first bytes. It is not turned as its EXIF data may say, which PIL does not do either.
///
/// # Errors
/// Names the file: it is not there, of another kind, or damaged.
pub fn read(path: &Path) -> Result<RgbImage> {
    let decode = || -> Result<DynamicImage> {
        let reader = ImageReader::open(path)?.with_guessed_format()?;
        if reader.format().is_none() {
            bail!("it is no PNG, JPEG or WebP");
        }
        Ok(reader.decode()?)
    };
    let decoded = decode().with_context(|| format!("reading the picture {}", path.display()))?;
    let upper = |values: Vec<u16>| values.into_iter().map(|value| (value >> 8) as u8);
    let (width, height) = (decoded.width(), decoded.height());
    let bytes: Vec<u8> = match decoded {
        DynamicImage::ImageRgb16(picture) => upper(picture.into_raw()).collect(),
        DynamicImage::ImageRgba16(picture) => chunks(upper(picture.into_raw()).collect(), 4),
        DynamicImage::ImageLuma16(picture) => upper(picture.into_raw()).flat_map(|grey| [grey; 3]).collect(),
        DynamicImage::ImageLumaA16(picture) => {
            upper(picture.into_raw()).step_by(2).flat_map(|grey| [grey; 3]).collect()
        }
        // these drop the alpha channel, as PIL does
        other => return Ok(other.into_rgb8()),
    };
    RgbImage::from_raw(width, height, bytes).context("pixels that do not fill the picture")
}

/// The first three of every `n` bytes.
fn chunks(bytes: Vec<u8>, n: usize) -> Vec<u8> {
    bytes.chunks_exact(n).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect()
}

/// Reads pictures in their order, `batch` at a time, while `take` is busy with those before: at most three batches are in memory.
///
/// # Errors
/// What `take` returns.
pub fn in_batches<'a, T: Send>(
    pictures: &'a [Picture],
    batch: usize,
    read: impl Fn(&Picture) -> T + Sync,
    mut take: impl FnMut(&'a [Picture], Vec<T>) -> Result<()>,
) -> Result<()> {
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel(1);
        scope.spawn(|| {
            let sender = sender; // dropped when all are read
            for chunk in pictures.chunks(batch.max(1)) {
                let found = chunk.par_iter().map(&read).collect::<Vec<T>>();
                if sender.send((chunk, found)).is_err() {
                    return; // nobody wants more
                }
            }
        });
        for (chunk, found) in receiver {
            take(chunk, found)?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{ImageBuffer, Luma, LumaA, Rgb, Rgba};

    #[test]
    fn every_kind_of_picture_is_read_as_rgb_without_blending() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let first = |name: &str| read(&path(name)).unwrap().get_pixel(0, 0).0;
        ImageBuffer::from_pixel(2, 3, Rgba([200u8, 100, 50, 0])).save(path("a.png")).unwrap();
        ImageBuffer::from_pixel(2, 3, Luma([77u8])).save(path("b.png")).unwrap();
        ImageBuffer::from_pixel(2, 3, LumaA([77u8, 1])).save(path("c.png")).unwrap();
        ImageBuffer::from_pixel(2, 3, Rgb([0x12ffu16, 0x3480, 0x5600])).save(path("d.png")).unwrap();
        ImageBuffer::from_pixel(2, 3, Rgba([0x12ffu16, 0x3480, 0x5600, 9])).save(path("e.png")).unwrap();
        ImageBuffer::from_pixel(2, 3, Luma([0x77f0u16])).save(path("f.png")).unwrap();
        assert_eq!((first("a.png"), first("b.png"), first("c.png")), ([200, 100, 50], [77; 3], [77; 3]));
        assert_eq!(
            (first("d.png"), first("e.png"), first("f.png")),
            ([0x12, 0x34, 0x56], [0x12, 0x34, 0x56], [0x77; 3])
        );
        // by its content, whatever its name
        std::fs::rename(path("a.png"), path("a.jpg")).unwrap();
        assert_eq!(first("a.jpg"), [200, 100, 50]);
        std::fs::write(path("g.png"), "words").unwrap();
        for name in ["g.png", "absent.png"] {
            assert!(format!("{:#}", read(&path(name)).unwrap_err()).contains(name));
        }
    }

    #[test]
    fn batches_come_in_order_and_an_error_ends_them() {
        let pictures: Vec<Picture> = (0..7).map(|i| Picture { file: i.to_string().into(), prompt: None }).collect();
        let mut seen = Vec::new();
        let name = |picture: &Picture| picture.file.display().to_string();
        in_batches(&pictures, 3, name, |chunk, found| {
            assert_eq!(chunk.iter().map(name).collect::<Vec<_>>(), found);
            seen.push(found.concat());
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, ["012", "345", "6"]);
        let mut calls = 0;
        let stopped = in_batches(&pictures, 1, name, |_, _| {
            calls += 1;
            bail!("enough")
        });
        assert_eq!((stopped.unwrap_err().to_string(), calls), ("enough".to_owned(), 1));
    }
}

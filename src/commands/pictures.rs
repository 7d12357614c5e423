//! Images as PNG files.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::Tensor;
use image::{ImageFormat, Rgb, RgbImage, imageops};

use crate::rewards::to_bytes;

/// Pixels between the pictures of a grid.
const GAP: u32 = 4;

/// One image (3, H, W) in [-1, 1] as bytes, rounded as diffusers rounds.
pub(super) fn to_rgb(image: &Tensor) -> Result<RgbImage> {
    let (_, height, width) = image.dims3()?;
    let bytes = to_bytes(image)?;
    RgbImage::from_raw(width as u32, height as u32, bytes).context("pixels that do not fill the image")
}

/// Pictures of one size in rows of `columns`, white between them.
pub(super) fn grid(pictures: &[RgbImage], columns: usize) -> Result<RgbImage> {
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
pub(super) fn enlarge(picture: RgbImage, at_least: u32) -> RgbImage {
    let factor = at_least.div_ceil(picture.width().max(1)).max(1);
    if factor == 1 {
        return picture;
    }
    imageops::resize(&picture, picture.width() * factor, picture.height() * factor, imageops::FilterType::Nearest)
}

/// Writes a PNG whole or not at all; missing folders are made.
pub(super) fn save_png(picture: &RgbImage, path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let write = || -> Result<()> {
        std::fs::create_dir_all(folder)?;
        let mut bytes = std::io::Cursor::new(Vec::new());
        picture.write_to(&mut bytes, ImageFormat::Png)?;
        let mut file =
            tempfile::Builder::new().prefix(".picture-").make_in(folder, |path| std::fs::File::create(path))?;
        file.write_all(bytes.get_ref())?;
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| format!("writing {}", path.display()))
}

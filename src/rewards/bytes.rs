//! Pictures of 8-bit values: PIL's resize, byte for byte, and their way into tensors.

use std::ops::Range;

use candle_core::{Device, Tensor};
use image::RgbImage;

use super::preprocess::{Filter, taps};
use crate::ops::device::upload;

/// The bits behind the point of PIL's weights (`PRECISION_BITS` in its `Resample.c`).
const BITS: u32 = 32 - 8 - 2;

/// PIL's `resize` to (width, height), of which `window` (columns, rows) is made. Each of its two passes rounds to bytes. It goes along the rows
/// first, unless it takes away rows, and more than twice as many as columns: so does Pillow 13, where older ones always went along the rows.
/// An axis that keeps its length is not touched.
pub(super) fn resize(
    picture: &RgbImage,
    (width, height): (usize, usize),
    (columns, rows): (Range<usize>, Range<usize>),
    filter: Filter,
) -> RgbImage {
    let (w, h) = (picture.width() as usize, picture.height() as usize);
    let (width_out, height_out) = (columns.len(), rows.len());
    let rows_first = height >= h || h - height + 2 * width <= 2 * w;
    let along_rows = whole_taps(w, width, columns, filter);
    let mut along_columns = whole_taps(h, height, rows, filter);
    // only what the rows of the window are made of
    let first = along_columns.iter().map(|(first, _)| *first).min().unwrap_or(0);
    let end = along_columns.iter().map(|(first, weights)| first + weights.len()).max().unwrap_or(0);
    along_columns.iter_mut().for_each(|(start, _)| *start -= first);
    let part = &picture.as_raw()[first * w * 3..end * w * 3];
    let resized = if rows_first {
        pass_columns(&pass_rows(part, w, &along_rows), width_out, &along_columns)
    } else {
        pass_rows(&pass_columns(part, w, &along_columns), w, &along_rows)
    };
    // as many bytes as the window has
    RgbImage::from_raw(width_out as u32, height_out as u32, resized).unwrap_or_default()
}

/// Every row of `width` pixels by itself.
fn pass_rows(bytes: &[u8], width: usize, taps: &[(usize, Vec<i32>)]) -> Vec<u8> {
    let mut resized = Vec::with_capacity(bytes.len() / width * taps.len());
    for row in bytes.chunks_exact(width * 3) {
        for (first, weights) in taps {
            let mut sum = [1i32 << (BITS - 1); 3];
            for (pixel, weight) in row[first * 3..].chunks_exact(3).zip(weights) {
                (0..3).for_each(|c| sum[c] += i32::from(pixel[c]) * weight);
            }
            resized.extend(sum.map(clipped));
        }
    }
    resized
}

/// Sums of rows of `width` pixels.
fn pass_columns(bytes: &[u8], width: usize, taps: &[(usize, Vec<i32>)]) -> Vec<u8> {
    let stride = width * 3;
    let (mut resized, mut sums) = (Vec::with_capacity(taps.len() * stride), vec![0i32; stride]);
    for (first, weights) in taps {
        sums.fill(1 << (BITS - 1));
        for (row, weight) in bytes[first * stride..].chunks_exact(stride).zip(weights) {
            for (sum, byte) in sums.iter_mut().zip(row) {
                *sum += i32::from(*byte) * weight;
            }
        }
        resized.extend(sums.iter().copied().map(clipped));
    }
    resized
}

fn clipped(sum: i32) -> u8 {
    (sum >> BITS).clamp(0, 255) as u8
}

/// Weights as PIL rounds them; of an axis that keeps its length, each value as it is.
fn whole_taps(inputs: usize, outputs: usize, window: Range<usize>, filter: Filter) -> Vec<(usize, Vec<i32>)> {
    if inputs == outputs {
        return window.map(|i| (i, vec![1 << BITS])).collect();
    }
    let whole = |weight: f64| (weight * f64::from(1 << BITS)).round() as i32;
    taps(inputs, outputs, window, filter)
        .map(|(first, weights)| (first, weights.into_iter().map(whole).collect()))
        .collect()
}

/// The values of a picture in [0, 1], one colour after the other.
pub(super) fn planes(picture: &RgbImage) -> impl Iterator<Item = f32> + use<> {
    let raw = picture.as_raw();
    let plane = |c: usize| raw.iter().skip(c).step_by(3).map(|byte| f32::from(*byte) / 255.0).collect::<Vec<_>>();
    [plane(0), plane(1), plane(2)].into_iter().flatten()
}

/// A picture as rewards see images: (1, 3, H, W) in [-1, 1].
pub(super) fn to_tensor(picture: &RgbImage, device: &Device) -> candle_core::Result<Tensor> {
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    let values: Vec<f32> = planes(picture).map(|value| value * 2.0 - 1.0).collect();
    upload(&Tensor::from_vec(values, (1, 3, height, width), &Device::Cpu)?, device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    fn picture(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| Rgb([0, 1, 2].map(|c| ((x * 37 + y * 101 + c * 59) * 7 % 256) as u8)))
    }

    /// What Pillow 13 makes of the pictures above: `Image.fromarray(a).resize((4, 3), Image.BICUBIC)`, (5, 4) and (3, 3).
    const PIL: [u8; 36] = [
        115, 106, 107, 121, 112, 65, 129, 120, 76, 135, 126, 82, 87, 158, 126, 93, 164, 127, 101, 172, 135, 107, 178,
        141, 146, 102, 92, 152, 108, 99, 160, 116, 107, 166, 122, 113,
    ];
    const PIL_ENLARGED: [u8; 60] = [
        0, 162, 41, 0, 163, 50, 0, 165, 66, 0, 167, 69, 0, 168, 69, 40, 144, 99, 41, 145, 81, 43, 147, 48, 45, 149, 50,
        46, 150, 51, 155, 109, 214, 156, 110, 142, 158, 112, 13, 160, 114, 13, 161, 115, 16, 212, 91, 255, 213, 92,
        173, 215, 94, 0, 217, 96, 0, 218, 97, 0,
    ];

    const PIL_LOWER: [u8; 27] = [
        104, 122, 143, 108, 126, 89, 111, 129, 95, 111, 143, 104, 115, 147, 111, 118, 150, 114, 130, 139, 114, 134,
        143, 118, 137, 146, 121,
    ];

    #[test]
    fn bytes_are_those_of_pil() {
        let resized = resize(&picture(9, 7), (4, 3), (0..4, 0..3), Filter::Bicubic);
        assert_eq!(resized.as_raw()[..], PIL);
        let enlarged = resize(&picture(3, 2), (5, 4), (0..5, 0..4), Filter::Bicubic);
        assert_eq!(enlarged.as_raw()[..], PIL_ENLARGED);
        let lower = resize(&picture(4, 11), (3, 3), (0..3, 0..3), Filter::Bicubic);
        assert_eq!(lower.as_raw()[..], PIL_LOWER);
    }

    #[test]
    fn a_window_is_a_part_of_the_whole() {
        let picture = picture(40, 23);
        let whole = resize(&picture, (29, 31), (0..29, 0..31), Filter::Bicubic);
        let part = resize(&picture, (29, 31), (5..20, 11..12), Filter::Bicubic);
        assert_eq!(part, image::imageops::crop_imm(&whole, 5, 11, 15, 1).to_image());
        let same = resize(&picture, (40, 23), (0..40, 0..23), Filter::Bicubic);
        assert_eq!(same, picture);
    }
}

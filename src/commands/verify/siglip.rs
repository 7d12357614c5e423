//! A set of kind `siglip`: both towers' embeddings of pixels and ids, their cosines, and the gradient of the pixels.

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Tensor};

use super::{Bounds, Report, numbers, tensors};
use crate::models::Source;
use crate::models::clip::Clip;
use crate::nn::Tape;
use crate::nn::layers::unit_norm;
use crate::ops::device::Compute;

pub(super) fn compare(dir: &Path, compute: &Compute, bounds: &Bounds) -> Result<Report> {
    let compute = &compute.for_rewards();
    let clip = Clip::load_transformers(&Source::open(&dir.join("model").to_string_lossy())?, true, compute)?;
    let parts = tensors(dir, "parts.safetensors", compute)?;
    let part = |name: &str| parts.get(name).with_context(|| format!("parts.safetensors has no `{name}`"));
    let mut report = Report::default();

    let length = part("input_ids")?.dims2()?.1;
    let ids: Vec<u32> = numbers(part("input_ids")?)?.into_iter().map(|id| id as u32).collect();
    let ids: Vec<Vec<u32>> = ids.chunks(length.max(1)).map(<[u32]>::to_vec).collect();
    let tower = clip.text.as_ref().context("the model has no text tower")?;
    let text = tower.pooled(&ids)?.to_dtype(DType::F32)?;
    report.compare("text tower", "embeddings", &text, part("text_embeds")?, bounds.parts)?;

    let tape = Tape::new();
    let pixels = tape.leaf(part("pixels")?);
    let image = clip.vision.forward(&pixels)?;
    report.compare("vision tower", "embeddings", image.tensor(), part("image_embeds")?, bounds.parts)?;
    let (unit, text) = (unit_norm(&image)?, clip.text_embeds(&ids)?);
    let cosines = (unit.tensor() * &text)?.sum(1)?;
    report.compare("cosine", "of image and text", &cosines, part("cosine")?, bounds.scores)?;
    // d (u . t) / d u = t
    let mut gradients = tape.backward(&[(&unit, &text)])?;
    let gradient: Tensor = gradients.take(&pixels, "the pixels")?;
    report.compare("cosine", "gradient of the pixels", &gradient, part("d_pixels")?, bounds.image_gradients)?;
    Ok(report)
}

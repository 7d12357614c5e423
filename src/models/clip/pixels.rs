//! How the pixels of a CLIP, or of a detector, are normalised: as its own files say, as OpenAI's CLIP where they say nothing.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value as Json;

use crate::models::Source;

/// What pixels in [0, 1] become in front of a vision tower: (factor · x - mean) / std for each colour.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PixelStatistics {
    /// 1, unless a file rescales bytes by another number than 1 / 255.
    factor: f32,
    mean: [f32; 3],
    std: [f32; 3],
}

impl PixelStatistics {
    /// OpenAI's, with which most CLIPs were trained.
    pub const OPENAI: Self = Self {
        factor: 1.0,
        mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
        std: [0.268_629_55, 0.261_302_6, 0.275_777_1],
    };
    /// ImageNet's, with which detectors were trained.
    const IMAGENET: Self = Self { factor: 1.0, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] };
    /// The defaults of transformers' processors for ViT and SigLIP.
    const HALVES: Self = Self { factor: 1.0, mean: [0.5; 3], std: [0.5; 3] };

    /// (scale, offset) of each colour of pixels in [0, 1].
    pub fn affine(&self) -> ([f32; 3], [f32; 3]) {
        (self.std.map(|std| self.factor / std), [0, 1, 2].map(|c| -self.mean[c] / self.std[c]))
    }

    /// Of a folder in transformers' layout, where an `open_clip_config.json` counts last.
    ///
    /// # Errors
    /// Names the file and the key that cannot be read.
    pub fn of_transformers(source: &Source) -> Result<Self> {
        let found = Self::in_image_processor(source)?;
        Ok(found.map_or_else(|| Self::in_open_clip(source), |found| Ok(Some(found)))?.unwrap_or(Self::OPENAI))
    }

    /// Of a detector in transformers' layout; ImageNet's where its files say nothing.
    ///
    /// # Errors
    /// As [`Self::of_transformers`].
    pub fn of_detector(source: &Source) -> Result<Self> {
        Ok(Self::in_image_processor(source)?.unwrap_or(Self::IMAGENET))
    }

    /// Of a SigLIP in transformers' layout; 1/2 where its files say nothing.
    ///
    /// # Errors
    /// As [`Self::of_transformers`].
    pub fn of_siglip(source: &Source) -> Result<Self> {
        Ok(Self::in_image_processor(source)?.unwrap_or(Self::HALVES))
    }

    /// Of a folder in open_clip's layout, where transformers' files count last.
    ///
    /// # Errors
    /// As [`Self::of_transformers`].
    pub fn of_open_clip(source: &Source) -> Result<Self> {
        let found = Self::in_open_clip(source)?;
        Ok(found.map_or_else(|| Self::in_image_processor(source), |found| Ok(Some(found)))?.unwrap_or(Self::OPENAI))
    }

    /// What an `open_clip_config.json` says under `preprocess_cfg`.
    ///
    /// # Errors
    /// Names the key.
    pub fn parse_open_clip(text: &str) -> Result<Option<Self>> {
        let json: Json = serde_json::from_str(text)?;
        let said = &json["preprocess_cfg"];
        Self::new(1.0, per_channel(said, "mean")?, per_channel(said, "std")?, Self::OPENAI)
    }

    fn in_open_clip(source: &Source) -> Result<Option<Self>> {
        const FILE: &str = "open_clip_config.json";
        if source.find(FILE)?.is_none() {
            return Ok(None);
        }
        Self::parse_open_clip(&source.read_text(FILE)?).with_context(|| format!("{}: {FILE}", source.label()))
    }

    /// transformers' newer files hold all processors in one, its older ones are of the image's alone.
    fn in_image_processor(source: &Source) -> Result<Option<Self>> {
        for (file, whole) in [("processor_config.json", false), ("preprocessor_config.json", true)] {
            if source.find(file)?.is_none() {
                continue;
            }
            let json: Json = source.read_json(file)?;
            let Some(processor) = (if whole { Some(&json) } else { json.get("image_processor") }) else { continue };
            return Self::of_image_processor(processor).with_context(|| format!("{}: {file}", source.label()));
        }
        Ok(None)
    }

    fn of_image_processor(json: &Json) -> Result<Option<Self>> {
        let on = |key: &str| json[key].as_bool().unwrap_or(true);
        let factor = if on("do_rescale") { json["rescale_factor"].as_f64().unwrap_or(1.0 / 255.0) } else { 1.0 };
        let (mean, std) = if on("do_normalize") {
            (per_channel(json, "image_mean")?, per_channel(json, "image_std")?)
        } else {
            (Some([0.0; 3]), Some([1.0; 3]))
        };
        let kind = ["image_processor_type", "feature_extractor_type"].iter().find_map(|key| json[*key].as_str());
        let default = match kind {
            None => Self::OPENAI,
            Some(kind) if kind.starts_with("CLIP") || kind.starts_with("Bit") => Self::OPENAI,
            Some(kind) if kind.starts_with("ViT") || kind.to_lowercase().starts_with("siglip") => Self::HALVES,
            Some(kind) if kind.starts_with("Yolos") => Self::IMAGENET,
            Some(_) if mean.is_some() && std.is_some() => Self::OPENAI,
            Some(kind) => {
                bail!("there is no image_mean and image_std, and the defaults of a {kind} are not known: add them")
            }
        };
        // a byte of 255 is the 1 of this program
        Self::new((factor * 255.0) as f32, mean.or(Some(default.mean)), std, default)
    }

    fn new(factor: f32, mean: Option<[f32; 3]>, std: Option<[f32; 3]>, default: Self) -> Result<Option<Self>> {
        if mean.is_none() && std.is_none() {
            return Ok(None);
        }
        let (mean, std) = (mean.unwrap_or(default.mean), std.unwrap_or(default.std));
        ensure!(
            std.iter().all(|std| std.is_finite() && *std > 0.0) && factor.is_finite() && factor > 0.0,
            "the standard deviation of the pixels is {std:?} and their factor {factor}: they must be above 0"
        );
        Ok(Some(Self { factor, mean, std }))
    }
}

/// Three numbers, or one for all colours.
fn per_channel(json: &Json, key: &str) -> Result<Option<[f32; 3]>> {
    let value = &json[key];
    let numbers: Option<Vec<f64>> = match value {
        Json::Null => return Ok(None),
        Json::Array(list) => list.iter().map(Json::as_f64).collect(),
        one => one.as_f64().map(|n| vec![n; 3]),
    };
    match numbers.as_deref() {
        Some([r, g, b]) => Ok(Some([*r as f32, *g as f32, *b as f32])),
        _ => bail!("`{key}` = {value} is not three numbers, one for each colour"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn folder(files: &[(&str, &str)]) -> (tempfile::TempDir, Source) {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let source = Source::open(folder.path().to_str().unwrap()).unwrap();
        (folder, source)
    }

    #[test]
    fn the_files_of_a_clip_say_how_its_pixels_are_normalised() {
        let numbers = |factor, mean: [f32; 3], std: [f32; 3]| PixelStatistics { factor, mean, std };
        let openai = r#"{"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
            "do_rescale": true, "rescale_factor": 0.00392156862745098, "image_processor_type": "CLIPImageProcessor"}"#;
        let own = r#"{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}"#;
        let nested = r#"{"image_processor": {"image_mean": 0.25, "image_std": 0.75}}"#;
        let open_clip = r#"{"model_cfg": {}, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}"#;
        let (own_numbers, open_numbers) =
            (numbers(1.0, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]), numbers(1.0, [0.5; 3], [0.25; 3]));
        let (pre, all, open) = ("preprocessor_config.json", "processor_config.json", "open_clip_config.json");
        for (files, transformers, of_open_clip) in [
            (&[][..], PixelStatistics::OPENAI, PixelStatistics::OPENAI),
            (&[(pre, openai)], PixelStatistics::OPENAI, PixelStatistics::OPENAI),
            (&[(pre, own)], own_numbers, own_numbers),
            (&[(open, open_clip)], open_numbers, open_numbers),
            (&[(pre, own), (open, open_clip)], own_numbers, open_numbers),
            (&[(pre, own), (open, "{}")], own_numbers, own_numbers),
            (&[(pre, own), (all, nested)], numbers(1.0, [0.25; 3], [0.75; 3]), numbers(1.0, [0.25; 3], [0.75; 3])),
            (&[(pre, own), (all, "{}")], own_numbers, own_numbers),
            (
                &[(pre, r#"{"image_processor_type": "SiglipImageProcessor"}"#)],
                PixelStatistics::HALVES,
                PixelStatistics::HALVES,
            ),
            (
                &[(pre, r#"{"do_normalize": false}"#)],
                numbers(1.0, [0.0; 3], [1.0; 3]),
                numbers(1.0, [0.0; 3], [1.0; 3]),
            ),
            (
                &[(pre, r#"{"image_mean": 0, "image_std": 1, "do_rescale": false}"#)],
                numbers(255.0, [0.0; 3], [1.0; 3]),
                numbers(255.0, [0.0; 3], [1.0; 3]),
            ),
        ] {
            let (_folder, source) = folder(files);
            assert_eq!(PixelStatistics::of_transformers(&source).unwrap(), transformers, "{files:?}");
            assert_eq!(PixelStatistics::of_open_clip(&source).unwrap(), of_open_clip, "{files:?}");
        }
    }

    #[test]
    fn a_detector_has_the_numbers_of_imagenet_where_its_files_say_nothing() {
        let (pre, own) = ("preprocessor_config.json", r#"{"image_mean": 0.25, "image_std": 0.75}"#);
        let silent = r#"{"feature_extractor_type": "YolosFeatureExtractor"}"#;
        let of_own = PixelStatistics { factor: 1.0, mean: [0.25; 3], std: [0.75; 3] };
        let imagenet = PixelStatistics::IMAGENET;
        for (files, expected) in [(&[][..], imagenet), (&[(pre, silent)], imagenet), (&[(pre, own)], of_own)] {
            let (_folder, source) = folder(files);
            assert_eq!(PixelStatistics::of_detector(&source).unwrap(), expected, "{files:?}");
        }
    }

    #[test]
    fn what_cannot_be_a_normalisation_is_named() {
        for (text, word) in [
            (r#"{"image_mean": [0.5, 0.5]}"#, "`image_mean`"),
            (r#"{"image_mean": 0.5, "image_std": [0.5, 0, 0.5]}"#, "standard deviation"),
            (r#"{"image_processor_type": "OtherImageProcessor"}"#, "OtherImageProcessor"),
        ] {
            let (_folder, source) = folder(&[("preprocessor_config.json", text)]);
            let message = format!("{:#}", PixelStatistics::of_transformers(&source).unwrap_err());
            assert!(message.contains(word) && message.contains("preprocessor_config.json"), "{message}");
        }
    }
}

//! DDPO's alignment reward (Black et al. 2023, section 4.3): how much of the prompt is in a model's description of the picture.

use std::sync::Arc;

use anyhow::Result;

use super::bertscore::BertScore;
use super::vlm::{Chat, fill};
use super::{Judge, Score, TapedImages, to_bytes};
use crate::config::{BertscorePart, Prompt, VlmBertscoreConfig};
use crate::models::Source;
use crate::models::captioner::Captioner;
use crate::ops::{Ledger, Number};

struct VlmBertscore {
    describer: Describer,
    reference: String,
    scorer: BertScore,
    part: BertscorePart,
}

#[allow(clippy::large_enum_variant, reason = "one of a run")]
enum Describer {
    Chat { chat: Chat, question: String },
    Captioner { captioner: Captioner, max_tokens: usize },
}

/// The score that the config describes.
pub(super) fn vlm_bertscore(config: &VlmBertscoreConfig) -> Result<Judge> {
    let VlmBertscoreConfig { model, question, max_tokens, .. } = config;
    let describer = match &config.server {
        Some(server) => Describer::Chat {
            chat: Chat::new(server, model, *max_tokens, "reward.vlm-bertscore.server")?,
            question: question.clone(),
        },
        None => Describer::Captioner {
            captioner: Captioner::load(&Source::open(&config.captioner)?)?,
            max_tokens: *max_tokens,
        },
    };
    let scorer = BertScore::load(&config.scorer, config.layers)?;
    Ok(Judge::Score(Arc::new(VlmBertscore {
        describer,
        reference: config.reference.clone(),
        scorer,
        part: config.score,
    })))
}

impl Score for VlmBertscore {
    fn scores(&self, images: &TapedImages, prompts: &[Prompt], _: &mut Ledger) -> Result<Vec<Number>> {
        let descriptions = self.describe(images, prompts)?;
        let score = |(description, prompt): (&String, &Prompt)| -> Result<Number> {
            let found = self.scorer.compare(description, &fill(&self.reference, prompt)?)?;
            Ok(match self.part {
                BertscorePart::Precision => found.precision,
                BertscorePart::Recall => found.recall,
                BertscorePart::F1 => found.f1,
            }
            .into())
        };
        descriptions.iter().zip(prompts).map(score).collect()
    }

    fn reads_prompts(&self) -> bool {
        self.reference.contains("{prompt}")
    }

    /// Its models are loaded before memory is measured, and what they compute is small beside a step.
    fn is_elsewhere(&self) -> bool {
        true
    }
}

impl VlmBertscore {
    fn describe(&self, images: &TapedImages, prompts: &[Prompt]) -> Result<Vec<String>> {
        match &self.describer {
            Describer::Chat { chat, question } => {
                let questions = prompts.iter().map(|prompt| fill(question, prompt)).collect::<Result<Vec<_>>>()?;
                chat.answers(images, &questions)
            }
            Describer::Captioner { captioner, max_tokens } => {
                let images = images.tensor()?;
                let (_, _, height, width) = images.dims4()?;
                let describe =
                    |row: usize| captioner.describe(to_bytes(&images.get(row)?)?, width, height, *max_tokens);
                (0..prompts.len()).map(describe).collect()
            }
        }
    }
}

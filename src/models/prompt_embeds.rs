//! What a UNet is told of the prompts of a batch.

use candle_core::{Result, Tensor};

/// Embeddings of prompts.
#[derive(Clone, Debug)]
pub struct PromptEmbeds {
    /// The hidden states that are attended to, (B, tokens, D); those of both text encoders side by side in Stable Diffusion XL.
    pub hidden: Tensor,
    /// Stable Diffusion XL: the pooled embedding of the text and the sinusoids of six sizes, (B, P + 6 S), as
    /// [`super::unet::Unet::added`] makes them.
    pub added: Option<Tensor>,
}

impl PromptEmbeds {
    /// Number of prompts.
    pub fn batch(&self) -> usize {
        self.hidden.dims()[0]
    }

    /// These rows of the batch.
    pub fn select(&self, rows: &Tensor) -> Result<Self> {
        self.each(|tensor| tensor.index_select(rows, 0))
    }

    /// The first prompt's, `times` times.
    pub fn first(&self, times: usize) -> Result<Self> {
        self.each(|tensor| Tensor::cat(&vec![tensor.narrow(0, 0, 1)?; times], 0))
    }

    /// One batch after another.
    pub fn cat(batches: &[Self]) -> Result<Self> {
        let hidden = Tensor::cat(&batches.iter().map(|batch| &batch.hidden).collect::<Vec<_>>(), 0)?;
        let added: Vec<&Tensor> = batches.iter().filter_map(|batch| batch.added.as_ref()).collect();
        Ok(Self { hidden, added: if added.is_empty() { None } else { Some(Tensor::cat(&added, 0)?) } })
    }

    fn each(&self, change: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self { hidden: change(&self.hidden)?, added: self.added.as_ref().map(&change).transpose()? })
    }
}

/// The sizes that Stable Diffusion XL was told of each picture it was trained on, height before width, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SizeConditioning {
    /// Of the picture before it was scaled.
    pub original: [usize; 2],
    /// Where the crop begins: top, left.
    pub crop: [usize; 2],
    /// What it was scaled to.
    pub target: [usize; 2],
}

impl SizeConditioning {
    /// A whole picture of this size.
    pub fn of(height: usize, width: usize) -> Self {
        Self { original: [height, width], crop: [0, 0], target: [height, width] }
    }

    /// diffusers' `add_time_ids`.
    pub fn time_ids(&self) -> [usize; 6] {
        let ([h, w], [top, left], [target_h, target_w]) = (self.original, self.crop, self.target);
        [h, w, top, left, target_h, target_w]
    }
}

//! BERTScore (Zhang et al. 2020): how much of one text's meaning is in another.
//!
//! ```text
//! sim[i, j] = <c_i, r_j> / |c_i| |r_j|        tokens of the candidate and of the reference, special ones too
//! precision = mean over i of max_j sim,  recall = mean over j of max_i sim      special tokens left out of the means
//! F1 = 2 P R / (P + R)
//! ```
//!
//! As the bert-score package computes it for one pair, without idf weights and without rescaling.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Tensor};

use crate::models::Source;
use crate::models::text_model::TextModel;

/// The layer that the bert-score package takes of a model, by its correlation with people's judgements (its `model2layers`).
const LAYERS: [(&str, usize); 13] = [
    ("bert-base-uncased", 9),
    ("bert-large-uncased", 18),
    ("bert-base-cased-finetuned-mrpc", 9),
    ("bert-base-multilingual-cased", 9),
    ("bert-base-chinese", 8),
    ("deberta-v2-xlarge", 10),
    ("deberta-v2-xlarge-mnli", 17),
    ("deberta-v2-xxlarge", 21),
    ("deberta-v2-xxlarge-mnli", 22),
    ("deberta-v3-xsmall", 10),
    ("deberta-v3-small", 4),
    ("deberta-v3-base", 9),
    ("deberta-v3-large", 12),
];

/// What of the reference is in the candidate, and the other way.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Match {
    pub precision: f64,
    pub recall: f64,
    pub f1: f64,
}

/// Compares texts.
pub struct BertScore {
    model: TextModel,
    /// What the tokenizer puts around every text.
    special: Vec<u32>,
}

impl BertScore {
    /// On a model's hidden states after so many layers; absent: the bert-score package's for this model.
    ///
    /// # Errors
    /// The model cannot be read, or is none that the package knows.
    pub fn load(model: &str, layers: Option<usize>) -> Result<Self> {
        let name = model.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
        let known = || LAYERS.iter().find(|(known, _)| *known == name).map(|(_, layers)| *layers);
        let layers = layers.or_else(known).with_context(|| {
            format!("how many layers of `{model}` count is not known: give `layers`; the bert-score package takes half to three quarters of a model's")
        })?;
        Self::of(&Source::open(model)?, layers)
    }

    /// As [`Self::load`], from where the files are.
    ///
    /// # Errors
    /// As there.
    pub fn of(source: &Source, layers: usize) -> Result<Self> {
        let model = TextModel::load(source, layers)?;
        let (special, _) = model.encode("")?;
        Ok(Self { model, special })
    }

    /// Ids and hidden states (T, D) of a text.
    ///
    /// # Errors
    /// Those of the model.
    pub fn embed(&self, text: &str) -> Result<(Vec<u32>, Tensor)> {
        self.model.encode(text.trim())
    }

    /// All zeros where one of the two has no words.
    ///
    /// # Errors
    /// Those of the model.
    pub fn compare(&self, candidate: &str, reference: &str) -> Result<Match> {
        let ((c_ids, c), (r_ids, r)) = (self.embed(candidate)?, self.embed(reference)?);
        let unit = |x: &Tensor| x.broadcast_div(&x.sqr()?.sum_keepdim(1)?.sqrt()?);
        let similarities = unit(&c)?.matmul(&unit(&r)?.t()?)?.to_dtype(DType::F64)?;
        ensure!(similarities.dims() == [c_ids.len(), r_ids.len()], "{:?} similarities", similarities.dims());
        let counts = |id: &u32| !self.special.contains(id);
        let mean = |best: Vec<f64>, ids: &[u32]| {
            let counted: Vec<f64> =
                best.into_iter().zip(ids).filter(|(_, id)| counts(id)).map(|(best, _)| best).collect();
            counted.iter().sum::<f64>() / counted.len() as f64
        };
        let precision = mean(similarities.max(1)?.to_vec1()?, &c_ids);
        let recall = mean(similarities.max(0)?.to_vec1()?, &r_ids);
        if c_ids.len() <= self.special.len() || r_ids.len() <= self.special.len() {
            return Ok(Match::default());
        }
        let or_zero = |x: f64| if x.is_nan() { 0.0 } else { x };
        let f1 = 2.0 * precision * recall / (precision + recall);
        Ok(Match { precision: or_zero(precision), recall: or_zero(recall), f1: or_zero(f1) })
    }
}

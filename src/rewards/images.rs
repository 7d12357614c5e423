//! The images that are judged, and what the rewards make of them together.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use anyhow::Result;
use candle_core::Tensor;

use super::Preprocessor;
use crate::config::{Preprocess, RewardsConfig};
use crate::models::Source;
use crate::models::clip::Clip;
use crate::nn::Value;
use crate::ops::device::Compute;

/// A vision tower with what comes before it.
pub struct Tower {
    pub clip: Arc<Clip>,
    pub preprocessor: Preprocessor,
}

impl Tower {
    /// # Errors
    /// The device's.
    pub(super) fn new(clip: Arc<Clip>, preprocess: Preprocess, compute: &Compute) -> Result<Arc<Self>> {
        let preprocessor = Preprocessor::new(preprocess, clip.vision.image_size(), compute.device())?;
        Ok(Arc::new(Self { clip, preprocessor }))
    }
}

/// A batch of finished images, (B, 3, H, W) in [-1, 1]: constants, or on a tape. What a tower makes of them is computed once,
/// however many rewards ask for it; on a tape its backward pass runs once too, for the sum of their cotangents.
pub struct Images<'a> {
    value: Value,
    embeddings: RefCell<HashMap<*const Tower, Value>>,
    /// The same images on a tape, whose embeddings serve here as constants.
    taped: Option<&'a Images<'a>>,
}

impl From<Value> for Images<'_> {
    fn from(value: Value) -> Self {
        Self { value, embeddings: RefCell::default(), taped: None }
    }
}

impl Images<'_> {
    /// The same images as constants.
    pub fn detached(&self) -> Images<'_> {
        Images { value: Value::constant(self.tensor()), embeddings: RefCell::default(), taped: Some(self) }
    }

    pub fn value(&self) -> &Value {
        &self.value
    }

    pub fn tensor(&self) -> &Tensor {
        self.value.tensor()
    }

    /// Number of images.
    pub fn count(&self) -> usize {
        self.value.dims()[0]
    }

    /// What a tower makes of the images, (B, D), not normalised.
    pub fn embedding(&self, tower: &Arc<Tower>) -> Result<Value> {
        let key = Arc::as_ptr(tower);
        if let Some(embedding) = self.embeddings.borrow().get(&key) {
            return Ok(embedding.clone());
        }
        let taped = self.taped.and_then(|taped| taped.embeddings.borrow().get(&key).cloned());
        let embedding = match taped {
            Some(taped) => Value::constant(taped.tensor()),
            None => tower.clip.vision.forward(&tower.preprocessor.apply(&self.value)?)?,
        };
        self.embeddings.borrow_mut().insert(key, embedding.clone());
        Ok(embedding)
    }
}

/// The CLIP models of an experiment's rewards: each is loaded once, and two rewards that prepare its pixels alike share what
/// it computes.
pub(super) struct Towers {
    /// Models of which some reward reads the text tower.
    with_text: Vec<String>,
    loaded: HashMap<String, Arc<Clip>>,
    towers: Vec<(String, Preprocess, Arc<Tower>)>,
    pub compute: Compute,
}

impl Towers {
    pub fn new(config: &RewardsConfig, compute: &Compute) -> Self {
        let with_text =
            [config.clip_score.as_ref().map(|c| c.model.clone()), config.pickscore.as_ref().map(|c| c.model.clone())];
        let with_text = with_text.into_iter().flatten().collect();
        Self { with_text, loaded: HashMap::new(), towers: Vec::new(), compute: compute.clone() }
    }

    /// A transformers CLIP with this preprocessing.
    pub fn get(&mut self, model: &str, preprocess: Preprocess) -> Result<Arc<Tower>> {
        if let Some((.., tower)) = self.towers.iter().find(|(of, how, _)| of == model && *how == preprocess) {
            return Ok(tower.clone());
        }
        let clip = match self.loaded.get(model) {
            Some(clip) => clip.clone(),
            None => {
                let text = self.with_text.iter().any(|wanted| wanted == model);
                Arc::new(Clip::load_transformers(&Source::open(model)?, text, &self.compute)?)
            }
        };
        self.loaded.insert(model.to_owned(), clip.clone());
        let tower = Tower::new(clip, preprocess, &self.compute)?;
        self.towers.push((model.to_owned(), preprocess, tower.clone()));
        Ok(tower)
    }
}

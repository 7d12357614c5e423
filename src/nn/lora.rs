//! Adapters as values: constants in the rollout, leaves of a tape where a gradient is wanted.

use anyhow::{Context, Result};
use candle_core::Tensor;

use super::{Gradients, Linear, Tape, Value};
use crate::lora::Adapters;
use crate::ops::linear::{Adapter, lora_bwd};
use crate::optim::add_all;

/// The factors of all adapters as values, in the order of [`Adapters::factors`].
#[derive(Clone)]
pub struct LoraValues<'a> {
    adapters: &'a Adapters,
    /// Leaves (A, B); empty when the adapters are constants.
    leaves: Vec<(Value, Value)>,
}

impl<'a> LoraValues<'a> {
    /// No gradient wanted.
    pub fn constant(adapters: &'a Adapters) -> Self {
        Self { adapters, leaves: Vec::new() }
    }

    /// A gradient is wanted for every factor.
    pub fn on_tape(adapters: &'a Adapters, tape: &Tape) -> Self {
        let leaves = adapters.factors().iter().map(|f| (tape.leaf(&f.a), tape.leaf(&f.b))).collect();
        Self { adapters, leaves }
    }

    /// The layer with the adapter of `module`, if there is one, onto a residual, if there is one:
    /// residual + x Wᵀ + b + scale (x Aᵀ) Bᵀ.
    pub fn forward(
        &self,
        module: &str,
        layer: &Linear,
        x: &Value,
        residual: Option<&Value>,
    ) -> candle_core::Result<Value> {
        let Some(index) = self.adapters.position(module) else {
            return residual.map_or_else(|| layer.forward(x), |residual| layer.forward_onto(x, residual));
        };
        let factor = &self.adapters.factors()[index];
        let scale = factor.scale();
        let output = layer.adapted(x, Some(Adapter { a: &factor.a, b: &factor.b, scale }), residual)?;
        // the layer first, whose part of the result nobody asks for by itself
        let y = layer.record(x, residual, output.clone());
        let (a, b) = match self.leaves.get(index) {
            Some((a, b)) => (a.clone(), b.clone()),
            None => (Value::constant(&factor.a), Value::constant(&factor.b)),
        };
        let (x_data, a_data, b_data) = (x.tensor().clone(), factor.a.clone(), factor.b.clone());
        Ok(Value::step([x, &a, &b, &y], output, move |d| {
            let (dx, da, db) = lora_bwd(d, &x_data, &a_data, &b_data, scale)?;
            Ok([Some(dx), Some(da), Some(db), Some(d.clone())])
        }))
    }

    /// Adds the gradients that a backward pass found to `sum`.
    pub(crate) fn collect(&self, gradients: &mut Gradients, sum: &mut LoraGradients) -> Result<()> {
        let mut found = Vec::with_capacity(2 * self.leaves.len());
        for (index, (a, b)) in self.leaves.iter().enumerate() {
            for (slot, leaf) in [(2 * index, a), (2 * index + 1, b)] {
                if let Some(gradient) = gradients.take_if_any(leaf) {
                    found.push((slot, gradient));
                }
            }
        }
        sum.add(found)
    }
}

/// Sums of gradients, one for each tensor of [`Adapters::named_tensors`], in that order.
#[derive(Clone, Default)]
pub struct LoraGradients {
    sums: Vec<Option<Tensor>>,
}

impl From<Vec<Tensor>> for LoraGradients {
    /// Gradients of all tensors, in their order.
    fn from(gradients: Vec<Tensor>) -> Self {
        Self { sums: gradients.into_iter().map(Some).collect() }
    }
}

impl LoraGradients {
    pub fn new(adapters: &Adapters) -> Self {
        Self { sums: vec![None; 2 * adapters.factors().len()] }
    }

    /// Adds gradients to their slots, all of them at once: on a GPU that is one launch.
    fn add(&mut self, gradients: Vec<(usize, Tensor)>) -> Result<()> {
        let (mut slots, mut sums, mut added) = (Vec::new(), Vec::new(), Vec::new());
        for (slot, gradient) in gradients {
            match self.sums[slot].take() {
                Some(sum) => {
                    slots.push(slot);
                    sums.push(sum);
                    added.push(gradient);
                }
                None => self.sums[slot] = Some(gradient),
            }
        }
        for (slot, sum) in slots.into_iter().zip(add_all(&sums, &added)?) {
            self.sums[slot] = Some(sum);
        }
        Ok(())
    }

    /// Adds the sums of another backward pass over the same adapters.
    pub fn merge(&mut self, other: Self) -> Result<()> {
        self.add(other.sums.into_iter().enumerate().filter_map(|(slot, sum)| Some((slot, sum?))).collect())
    }

    /// Whether no gradient has arrived at all: every step was detached.
    pub fn is_empty(&self) -> bool {
        self.sums.iter().all(Option::is_none)
    }

    /// The gradients, complete.
    ///
    /// # Errors
    /// Names the first tensor that none reached.
    pub fn finish(self, adapters: &Adapters) -> Result<Vec<Tensor>> {
        let names = adapters.named_tensors();
        self.sums
            .into_iter()
            .zip(names)
            .map(|(sum, (name, _))| {
                sum.with_context(|| {
                    format!("no gradient reached the LoRA tensor `{name}`: a path through the UNet is cut")
                })
            })
            .collect()
    }
}

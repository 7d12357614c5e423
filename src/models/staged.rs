//! A network as a sequence of stages with a stack of skip connections, and its pullback with either of two memories.
//!
//! Every stage is differentiated on a tape of its own, so a stage's activations are gone as soon as the cotangent has
//! passed it. With [`Checkpointing::Block`] they do not even exist before: only each stage's input is kept and the stage
//! is computed again.

use anyhow::{Context, Result};
use candle_core::Tensor;

use crate::config::Checkpointing;
use crate::lora::Adapters;
use crate::nn::lora::LoraGradients;
use crate::nn::{LoraValues, Tape, Value};
use crate::ops::sum::add;

/// One stage: hidden activations (B, H, W, C) to hidden activations.
pub(super) trait Stage {
    /// What all stages share in one evaluation (the time embedding, the text).
    type Inputs: Clone;

    /// `skip` is the skip connection that the stage consumes, `next_skip` the height and width of the one that the
    /// following stages will.
    fn forward(
        &self,
        hidden: &Value,
        skip: Option<&Value>,
        next_skip: Option<(usize, usize)>,
        inputs: &Self::Inputs,
        lora: &LoraValues,
    ) -> Result<Value>;
}

pub(super) struct Step<S> {
    /// For messages: `down_blocks.0.resnets.1`.
    pub name: String,
    pub stage: S,
    /// Takes a skip connection from the stack.
    pub pops: bool,
    /// Leaves its output on the stack.
    pub pushes: bool,
}

pub(super) struct Staged<S> {
    pub steps: Vec<Step<S>>,
}

/// What a stage was computed from.
struct StageInput {
    hidden: Tensor,
    skip: Option<Tensor>,
    next_skip: Option<(usize, usize)>,
}

/// A stage's recording, ready for its backward.
struct Recorded<'a> {
    tape: Tape,
    hidden: Value,
    skip: Option<Value>,
    lora: LoraValues<'a>,
    output: Value,
}

impl<S: Stage> Staged<S> {
    /// The network's output without anything kept.
    pub fn forward(&self, x: Tensor, inputs: &S::Inputs, adapters: &Adapters) -> Result<Tensor> {
        let lora = LoraValues::constant(adapters);
        self.walk(x, |step, input| {
            let (hidden, skip) = (Value::from(input.hidden), input.skip.map(Value::from));
            Ok(step.stage.forward(&hidden, skip.as_ref(), input.next_skip, inputs, &lora)?.into_tensor())
        })
    }

    /// Runs the network and keeps what a backward pass needs.
    pub fn trace<'a>(
        &'a self,
        x: Tensor,
        inputs: &S::Inputs,
        adapters: &'a Adapters,
        checkpointing: Checkpointing,
    ) -> Result<Trace<'a, S>> {
        let mut kept = Vec::with_capacity(self.steps.len());
        let constant = LoraValues::constant(adapters);
        let output = self.walk(x, |step, input| match checkpointing {
            Checkpointing::Step => {
                let record = record(step, input, inputs, adapters)?;
                let output = record.output.tensor().clone();
                kept.push(Kept::Recorded(record));
                Ok(output)
            }
            Checkpointing::Block => {
                let (hidden, skip) = (Value::constant(&input.hidden), input.skip.as_ref().map(Value::constant));
                let output =
                    step.stage.forward(&hidden, skip.as_ref(), input.next_skip, inputs, &constant)?.into_tensor();
                kept.push(Kept::Input(input));
                Ok(output)
            }
        })?;
        Ok(Trace { network: self, inputs: inputs.clone(), adapters, kept, output })
    }

    /// Runs the stages in order, the skip connections on a stack.
    fn walk(&self, x: Tensor, mut run: impl FnMut(&Step<S>, StageInput) -> Result<Tensor>) -> Result<Tensor> {
        let mut hidden = x;
        let mut skips: Vec<Tensor> = Vec::new();
        for step in &self.steps {
            let skip = if step.pops {
                Some(skips.pop().context("a skip connection for every stage that consumes one")?)
            } else {
                None
            };
            let next_skip = skips.last().map(|skip| (skip.dims()[1], skip.dims()[2]));
            hidden =
                run(step, StageInput { hidden, skip, next_skip }).with_context(|| format!("in `{}`", step.name))?;
            if step.pushes {
                skips.push(hidden.clone());
            }
        }
        Ok(hidden)
    }
}

fn record<'a, S: Stage>(
    step: &Step<S>,
    input: StageInput,
    inputs: &S::Inputs,
    adapters: &'a Adapters,
) -> Result<Recorded<'a>> {
    let tape = Tape::new();
    let (hidden, skip) = (tape.leaf(&input.hidden), input.skip.as_ref().map(|skip| tape.leaf(skip)));
    let lora = LoraValues::on_tape(adapters, &tape);
    let output = step.stage.forward(&hidden, skip.as_ref(), input.next_skip, inputs, &lora)?;
    Ok(Recorded { tape, hidden, skip, lora, output })
}

enum Kept<'a> {
    Input(StageInput),
    Recorded(Recorded<'a>),
}

/// A forward pass that can be pulled back once.
pub(super) struct Trace<'a, S: Stage> {
    network: &'a Staged<S>,
    inputs: S::Inputs,
    adapters: &'a Adapters,
    kept: Vec<Kept<'a>>,
    output: Tensor,
}

impl<S: Stage> Trace<'_, S> {
    pub fn output(&self) -> &Tensor {
        &self.output
    }

    /// The gradient with respect to the network's input of <cotangent, output>; those of the adapters are added to `sum`.
    pub fn pull(self, cotangent: Tensor, sum: &mut LoraGradients) -> Result<Tensor> {
        let mut d_hidden = cotangent;
        let mut d_skips: Vec<Tensor> = Vec::new();
        for (step, kept) in self.network.steps.iter().zip(self.kept).rev() {
            if step.pushes {
                d_hidden = add(&d_hidden, &d_skips.pop().context("a gradient for every skip connection")?)?;
            }
            let Recorded { tape, hidden, skip, lora, output } = match kept {
                Kept::Recorded(recorded) => recorded,
                Kept::Input(input) => record(step, input, &self.inputs, self.adapters)?,
            };
            let mut gradients = tape
                .backward(&[(&output, &d_hidden)])
                .with_context(|| format!("in the backward of `{}`", step.name))?;
            lora.collect(&mut gradients, sum)?;
            if let Some(skip) = skip {
                d_skips.push(gradients.take(&skip, &format!("the skip connection into `{}`", step.name))?);
            }
            d_hidden = gradients.take(&hidden, &format!("the input of `{}`", step.name))?;
        }
        Ok(d_hidden)
    }
}

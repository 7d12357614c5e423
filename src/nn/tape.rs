//! Reverse-mode differentiation: a tape of closures.
//!
//! Each recorded step owns what its backward needs and nothing else (a frozen linear layer: the weight; a residual
//! addition: nothing), and its memory is given back the moment the backward has used it. No gradient slot is filled
//! with zeros, no operand that is frozen gets a gradient, and nothing recurses.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{Result, Tensor, bail};

use crate::ops;

type Backward = Box<dyn FnOnce(&Tensor) -> Result<Vec<Option<Tensor>>> + Send>;

struct Step {
    /// The nodes of the inputs, in the order in which `backward` returns their gradients.
    inputs: Vec<Option<usize>>,
    output: usize,
    backward: Backward,
}

#[derive(Default)]
struct Record {
    nodes: usize,
    steps: Vec<Step>,
}

/// A recording of one differentiable computation. It may be made on one thread and pulled back on another.
#[derive(Clone, Default)]
pub struct Tape(Arc<Mutex<Record>>);

impl Tape {
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a tensor on the tape: a gradient with respect to it can be asked for.
    pub fn leaf(&self, tensor: &Tensor) -> Value {
        Value { tensor: tensor.clone(), node: Some(Node { tape: self.clone(), id: self.new_node() }) }
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn new_node(&self) -> usize {
        let mut record = self.record();
        record.nodes += 1;
        record.nodes - 1
    }

    /// Pulls cotangents of outputs back to everything on the tape; the recording is used up.
    ///
    /// # Errors
    /// An output that is not of this tape, a cotangent of another shape.
    pub fn backward(self, outputs: &[(&Value, &Tensor)]) -> Result<Gradients> {
        let Record { nodes, steps } = std::mem::take(&mut *self.record());
        let mut gradients: Vec<Option<Tensor>> = vec![None; nodes];
        for (value, cotangent) in outputs {
            let Some(node) = value.node.as_ref().filter(|node| Arc::ptr_eq(&node.tape.0, &self.0)) else {
                bail!("backward: the output does not depend on anything on this tape");
            };
            if value.tensor.dims() != cotangent.dims() {
                bail!(
                    "backward: a cotangent of shape {:?} for an output of shape {:?}",
                    cotangent.dims(),
                    value.tensor.dims()
                );
            }
            add_to(&mut gradients[node.id], cotangent.contiguous()?)?;
        }
        for step in steps.into_iter().rev() {
            // An output that nothing used has no cotangent; its step is dropped with what it kept.
            let Some(cotangent) = gradients[step.output].take() else { continue };
            let pulled = (step.backward)(&cotangent)?;
            if pulled.len() != step.inputs.len() {
                bail!("backward: {} gradients for {} inputs", pulled.len(), step.inputs.len());
            }
            for (input, gradient) in step.inputs.into_iter().zip(pulled) {
                if let (Some(input), Some(gradient)) = (input, gradient) {
                    add_to(&mut gradients[input], gradient)?;
                }
            }
        }
        Ok(Gradients(gradients))
    }
}

fn add_to(slot: &mut Option<Tensor>, gradient: Tensor) -> Result<()> {
    *slot = Some(match slot.take() {
        Some(sum) => ops::sum::add(&sum, &gradient)?,
        None => gradient,
    });
    Ok(())
}

#[derive(Clone)]
struct Node {
    tape: Tape,
    id: usize,
}

/// A tensor, and its place on a tape if it has one.
#[derive(Clone)]
pub struct Value {
    tensor: Tensor,
    node: Option<Node>,
}

impl From<Tensor> for Value {
    /// A constant: nothing is recorded for it.
    fn from(tensor: Tensor) -> Self {
        Self { tensor, node: None }
    }
}

impl Value {
    pub fn constant(tensor: &Tensor) -> Self {
        tensor.clone().into()
    }
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }
    pub fn into_tensor(self) -> Tensor {
        self.tensor
    }
    pub fn dims(&self) -> &[usize] {
        self.tensor.dims()
    }
    pub fn is_on_tape(&self) -> bool {
        self.node.is_some()
    }

    /// The result `output` of a step with these inputs. `backward` takes the cotangent of the output and returns the
    /// gradient of each input; it is not recorded (and what it captured is dropped) if no input is on a tape.
    pub fn step<const N: usize>(
        inputs: [&Value; N],
        output: Tensor,
        backward: impl FnOnce(&Tensor) -> Result<[Option<Tensor>; N]> + Send + 'static,
    ) -> Value {
        let Some(tape) = inputs.iter().find_map(|value| value.node.as_ref()).map(|node| node.tape.clone()) else {
            return output.into();
        };
        let id = tape.new_node();
        tape.record().steps.push(Step {
            inputs: inputs.iter().map(|value| value.node.as_ref().map(|node| node.id)).collect(),
            output: id,
            backward: Box::new(move |cotangent| Ok(backward(cotangent)?.into_iter().collect())),
        });
        Value { tensor: output, node: Some(Node { tape, id }) }
    }

    /// Elementwise sum of two values of the same shape.
    pub fn add(&self, other: &Value) -> Result<Value> {
        let sum = ops::sum::add(&self.tensor, &other.tensor)?;
        Ok(Self::step([self, other], sum, |d| Ok([Some(d.clone()), Some(d.clone())])))
    }

    /// `self * factor + offset`.
    pub fn affine(&self, factor: f64, offset: f64) -> Result<Value> {
        let y = self.tensor.affine(factor, offset)?;
        Ok(Self::step([self], y, move |d| Ok([Some(d.affine(factor, 0.0)?)])))
    }

    /// Elementwise product with a constant that broadcasts to this value's shape.
    pub fn mul_constant(&self, factor: &Tensor) -> Result<Value> {
        let y = self.tensor.broadcast_mul(factor)?;
        let factor = factor.clone();
        Ok(Self::step([self], y, move |d| Ok([Some(d.broadcast_mul(&factor)?)])))
    }

    /// The sum with one constant number a channel, (C), (1, C) or (B, C) to (B, ..., C).
    pub fn add_channels(&self, shift: &Tensor) -> Result<Value> {
        let y = ops::sum::add_channels(&self.tensor, shift)?;
        Ok(Self::step([self], y, |d| Ok([Some(d.clone())])))
    }

    /// The sum with a constant that broadcasts to this value's shape.
    pub fn add_constant(&self, offset: &Tensor) -> Result<Value> {
        Ok(Self::step([self], self.tensor.broadcast_add(offset)?, |d| Ok([Some(d.clone())])))
    }

    /// The same numbers in another shape.
    pub fn reshape(&self, dims: impl Into<candle_core::Shape>) -> Result<Value> {
        let before = self.tensor.shape().clone();
        Ok(Self::step([self], self.tensor.reshape(dims.into())?, move |d| Ok([Some(d.reshape(before)?)])))
    }

    /// Axes reordered, contiguous.
    pub fn permute(&self, axes: &[usize]) -> Result<Value> {
        let mut inverse = vec![0; axes.len()];
        for (to, from) in axes.iter().enumerate() {
            inverse[*from] = to;
        }
        let y = self.tensor.permute(axes)?.contiguous()?;
        Ok(Self::step([self], y, move |d| Ok([Some(d.permute(inverse)?.contiguous()?)])))
    }

    /// `length` elements of axis `axis` from `start` on.
    pub fn narrow(&self, axis: usize, start: usize, length: usize) -> Result<Value> {
        let whole = self.tensor.dims()[axis];
        let y = self.tensor.narrow(axis, start, length)?.contiguous()?;
        Ok(Self::step([self], y, move |d| {
            Ok([Some(d.pad_with_zeros(axis, start, whole - start - length)?.contiguous()?)])
        }))
    }

    /// Two values side by side along the last axis.
    pub fn concat_last(&self, other: &Value) -> Result<Value> {
        let last = self.tensor.rank() - 1;
        let (n, m) = (self.tensor.dims()[last], other.tensor.dims()[last]);
        let y = ops::concat::concat_last_fwd(&self.tensor, &other.tensor)?;
        Ok(Self::step([self, other], y, move |d| {
            let (d_self, d_other) = ops::concat::concat_last_bwd(d, n, m)?;
            Ok([Some(d_self), Some(d_other)])
        }))
    }
}

/// The gradients that a backward pass found.
pub struct Gradients(Vec<Option<Tensor>>);

impl Gradients {
    /// The gradient with respect to a leaf.
    ///
    /// # Errors
    /// None reached it: a path is cut. The error names `what`.
    pub fn take(&mut self, leaf: &Value, what: &str) -> Result<Tensor> {
        match leaf.node.as_ref().and_then(|node| self.0.get_mut(node.id)?.take()) {
            Some(gradient) => Ok(gradient),
            None => bail!("no gradient reached {what}: the computation between it and the loss is cut"),
        }
    }
    /// The gradient with respect to a leaf that the outputs need not depend on.
    pub fn take_if_any(&mut self, leaf: &Value) -> Option<Tensor> {
        leaf.node.as_ref().and_then(|node| self.0.get_mut(node.id)?.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn vector(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    #[test]
    fn a_value_used_twice_gets_both_gradients() {
        let tape = Tape::new();
        let x = tape.leaf(&vector(&[1.0, 2.0]));
        let y = x.affine(3.0, 1.0).unwrap().add(&x).unwrap();
        assert_eq!(y.tensor().to_vec1::<f32>().unwrap(), [5.0, 9.0]);
        let mut gradients = tape.backward(&[(&y, &vector(&[1.0, 10.0]))]).unwrap();
        assert_eq!(gradients.take(&x, "x").unwrap().to_vec1::<f32>().unwrap(), [4.0, 40.0]);
    }

    #[test]
    fn constants_are_not_recorded() {
        let x = Value::constant(&vector(&[1.0]));
        let y = x.affine(2.0, 0.0).unwrap();
        assert!(!y.is_on_tape());
        assert!(Tape::new().backward(&[(&y, &vector(&[1.0]))]).is_err());
    }

    #[test]
    fn a_missing_gradient_is_an_error_that_names_the_leaf() {
        let tape = Tape::new();
        let (x, unused) = (tape.leaf(&vector(&[1.0])), tape.leaf(&vector(&[1.0])));
        let y = x.affine(2.0, 0.0).unwrap();
        let mut gradients = tape.backward(&[(&y, &vector(&[1.0]))]).unwrap();
        let message = gradients.take(&unused, "`mid_block.to_q`").unwrap_err().to_string();
        assert!(message.contains("no gradient reached `mid_block.to_q`"), "{message}");
    }

    #[test]
    fn shape_steps_route_gradients_back() {
        let tape = Tape::new();
        let x = tape.leaf(&vector(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).reshape((2, 3)).unwrap());
        let y = x.permute(&[1, 0]).unwrap().narrow(0, 1, 2).unwrap().concat_last(&x.narrow(1, 0, 2).unwrap()).unwrap();
        assert_eq!(y.tensor().to_vec2::<f32>().unwrap(), [[2.0, 5.0, 1.0, 2.0], [3.0, 6.0, 4.0, 5.0]]);
        let d = vector(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]).reshape((2, 4)).unwrap();
        let mut gradients = tape.backward(&[(&y, &d)]).unwrap();
        assert_eq!(gradients.take(&x, "x").unwrap().to_vec2::<f32>().unwrap(), [[3.0, 5.0, 5.0], [7.0, 10.0, 6.0]]);
    }
}

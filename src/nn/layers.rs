//! The layers: frozen parameters, and `forward` on values.

use candle_core::{Result, Tensor};

use super::{LoraValues, Value};
use crate::ops;
use crate::ops::activation::{Activation, activation_bwd, activation_fwd};
use crate::ops::attention::{Heads, attention_bwd_kept, attention_fwd_kept};
use crate::ops::detections::{Question, detections_bwd, detections_fwd};
use crate::ops::linear::{Adapter, adapted_fwd};

/// A frozen linear layer; a 1x1 convolution is one too, channels-last.
#[derive(Clone, Debug)]
pub struct Linear {
    /// (out, in)
    weight: ops::linear::Weight,
    /// (out)
    bias: Option<Tensor>,
}

impl Linear {
    /// weight (out, in), bias (out).
    pub fn new(weight: &Tensor, bias: Option<Tensor>) -> Result<Self> {
        Ok(Self { weight: ops::linear::Weight::new(weight)?, bias })
    }
    /// x (..., in) -> (..., out).
    pub fn forward(&self, x: &Value) -> Result<Value> {
        Ok(self.record(x, None, self.adapted(x, None, None)?))
    }
    /// residual + the result of [`Self::forward`]; residual (..., out).
    pub fn forward_onto(&self, x: &Value, residual: &Value) -> Result<Value> {
        Ok(self.record(x, Some(residual), self.adapted(x, None, Some(residual))?))
    }
    /// The result with an adapter and onto a residual, not recorded.
    pub(super) fn adapted(&self, x: &Value, adapter: Option<Adapter>, residual: Option<&Value>) -> Result<Tensor> {
        adapted_fwd(x.tensor(), &self.weight, self.bias.as_ref(), adapter, residual.map(Value::tensor))
    }
    /// Records the layer, without the adapter, with the result `y`.
    pub(super) fn record(&self, x: &Value, residual: Option<&Value>, y: Tensor) -> Value {
        let weight = self.weight.clone();
        match residual {
            Some(residual) => Value::step([x, residual], y, move |d| {
                Ok([Some(ops::linear::linear_bwd(d, &weight)?), Some(d.clone())])
            }),
            None => Value::step([x], y, move |d| Ok([Some(ops::linear::linear_bwd(d, &weight)?)])),
        }
    }
    pub fn in_features(&self) -> usize {
        self.weight.in_features()
    }
    pub fn out_features(&self) -> usize {
        self.weight.out_features()
    }
}

/// A frozen convolution on (B, H, W, C).
#[derive(Clone, Debug)]
pub struct Conv2d(pub ops::conv2d::Kernel);

impl Conv2d {
    pub fn forward(&self, x: &Value) -> Result<Value> {
        let (_, height, width, _) = x.tensor().dims4()?;
        let y = ops::conv2d::conv2d_fwd(x.tensor(), &self.0)?;
        let kernel = self.0.clone();
        Ok(Value::step([x], y, move |d| Ok([Some(ops::conv2d::conv2d_bwd(d, &kernel, height, width)?)])))
    }
    /// residual + the result of [`Self::forward`]; residual (B, H', W', out).
    pub fn forward_onto(&self, x: &Value, residual: &Value) -> Result<Value> {
        let (_, height, width, _) = x.tensor().dims4()?;
        let y = ops::conv2d::conv2d_onto_fwd(x.tensor(), &self.0, residual.tensor())?;
        let kernel = self.0.clone();
        Ok(Value::step([x, residual], y, move |d| {
            Ok([Some(ops::conv2d::conv2d_bwd(d, &kernel, height, width)?), Some(d.clone())])
        }))
    }
}

/// Group normalisation, with SiLU behind it or not, as its parameters say.
#[derive(Clone, Debug)]
pub struct GroupNorm(pub ops::group_norm::GroupNorm);

impl GroupNorm {
    pub fn forward(&self, x: &Value) -> Result<Value> {
        let y = ops::group_norm::group_norm_fwd(x.tensor(), &self.0)?;
        let (norm, input) = (self.0.clone(), x.tensor().clone());
        Ok(Value::step([x], y, move |d| Ok([Some(ops::group_norm::group_norm_bwd(d, &input, &norm)?)])))
    }
}

/// Layer normalisation over the last axis.
#[derive(Clone, Debug)]
pub struct LayerNorm(pub ops::layer_norm::LayerNorm);

impl LayerNorm {
    pub fn forward(&self, x: &Value) -> Result<Value> {
        let y = ops::layer_norm::layer_norm_fwd(x.tensor(), &self.0)?;
        let (norm, input) = (self.0.clone(), x.tensor().clone());
        Ok(Value::step([x], y, move |d| Ok([Some(ops::layer_norm::layer_norm_bwd(d, &input, &norm)?)])))
    }
}

/// f(x), elementwise.
pub fn activation(x: &Value, function: Activation) -> Result<Value> {
    if function == Activation::Identity {
        return Ok(x.clone());
    }
    let y = activation_fwd(x.tensor(), function)?;
    let input = x.tensor().clone();
    Ok(Value::step([x], y, move |d| Ok([Some(activation_bwd(d, &input, function)?)])))
}

/// Nearest-neighbour upsampling of (B, h, w, C) to (B, height, width, C).
pub fn upsample_nearest(x: &Value, height: usize, width: usize) -> Result<Value> {
    let (_, h, w, _) = x.tensor().dims4()?;
    let y = ops::upsample::upsample_nearest_fwd(x.tensor(), height, width)?;
    Ok(Value::step([x], y, move |d| Ok([Some(ops::upsample::upsample_nearest_bwd(d, h, w)?)])))
}

/// About the size in bytes, as a JPEG of quality 95, of each of the pixels (B, 3, H, W) in [0, 1].
pub fn jpeg_size(pixels: &Value) -> Result<Value> {
    let y = ops::jpeg_size::jpeg_size_fwd(pixels.tensor())?;
    let input = pixels.tensor().clone();
    Ok(Value::step([pixels], y, move |d| Ok([Some(ops::jpeg_size::jpeg_size_bwd(d, &input)?)])))
}

/// The answers (B) to one question an image, of a detector's logits (B, Q, C).
pub fn detections(logits: &Value, questions: &[Question]) -> Result<Value> {
    let (y, slopes) = detections_fwd(logits.tensor(), questions)?;
    Ok(Value::step([logits], y, move |d| Ok([Some(detections_bwd(d, &slopes)?)])))
}

/// Scaled dot-product attention; q (B, N, C), k and v (B, M, C).
pub fn dot_product_attention(q: &Value, k: &Value, v: &Value, heads: Heads) -> Result<Value> {
    let (y, kept) = attention_fwd_kept(q.tensor(), k.tensor(), v.tensor(), heads)?;
    let (q_data, k_data, v_data) = (q.tensor().clone(), k.tensor().clone(), v.tensor().clone());
    Ok(Value::step([q, k, v], y, move |d| {
        let (dq, dk, dv) = attention_bwd_kept(d, &q_data, &k_data, &v_data, heads, &kept)?;
        Ok([Some(dq), Some(dk), Some(dv)])
    }))
}

/// GEGLU: (..., 2 F) -> (..., F).
pub fn geglu(x: &Value) -> Result<Value> {
    let y = ops::geglu::geglu_fwd(x.tensor())?;
    let input = x.tensor().clone();
    Ok(Value::step([x], y, move |d| Ok([Some(ops::geglu::geglu_bwd(d, &input)?)])))
}

/// x / ||x|| along the last axis, x (B, D).
///
/// ```text
/// y = x / n      d_x = (d_y - y <y, d_y>) / n
/// ```
pub fn unit_norm(x: &Value) -> Result<Value> {
    let norm = x.tensor().sqr()?.sum_keepdim(candle_core::D::Minus1)?.sqrt()?;
    let y = x.tensor().broadcast_div(&norm)?;
    let unit = y.clone();
    Ok(Value::step([x], y, move |d| {
        let along = (&unit * d)?.sum_keepdim(candle_core::D::Minus1)?;
        Ok([Some((d - unit.broadcast_mul(&along)?)?.broadcast_div(&norm)?)])
    }))
}

/// Attention with its projections: `to_q`, `to_k`, `to_v`, `to_out.0` of diffusers, each of which may be adapted.
#[derive(Clone, Debug)]
pub struct Attention {
    /// The name that adapters know it by: `...transformer_blocks.0.attn1`.
    pub module: String,
    pub to_q: Linear,
    pub to_k: Linear,
    pub to_v: Linear,
    pub to_out: Linear,
    pub heads: Heads,
}

impl Attention {
    /// residual (B, N, C) plus what x (B, N, C) finds where it attends to `keys` and `values` (B, M, C).
    pub fn forward_onto(
        &self,
        x: &Value,
        (keys, values): &(Value, Value),
        residual: &Value,
        lora: &LoraValues,
    ) -> Result<Value> {
        let queries = self.project("to_q", &self.to_q, x, lora)?;
        let attended = dot_product_attention(&queries, keys, values, self.heads)?;
        lora.forward(&format!("{}.to_out.0", self.module), &self.to_out, &attended, Some(residual))
    }

    /// What is attended to, (B, M, C), of x itself or of a context (B, M, C').
    pub fn keys_and_values(&self, context: &Value, lora: &LoraValues) -> Result<(Value, Value)> {
        Ok((self.project("to_k", &self.to_k, context, lora)?, self.project("to_v", &self.to_v, context, lora)?))
    }

    fn project(&self, name: &str, layer: &Linear, x: &Value, lora: &LoraValues) -> Result<Value> {
        lora.forward(&format!("{}.{name}", self.module), layer, x, None)
    }
}

/// The transformer block's feed-forward: a GEGLU and a linear layer; `net.0.proj` and `net.2` of diffusers, each of which
/// may be adapted.
#[derive(Clone, Debug)]
pub struct FeedForward {
    /// The name that adapters know it by: `...transformer_blocks.0.ff`.
    pub module: String,
    pub proj: Linear,
    pub out: Linear,
}

impl FeedForward {
    /// residual + the block's result; both (B, N, C), as x is.
    pub fn forward_onto(&self, x: &Value, residual: &Value, lora: &LoraValues) -> Result<Value> {
        let projected = lora.forward(&format!("{}.net.0.proj", self.module), &self.proj, x, None)?;
        let hidden = geglu(&projected)?;
        lora.forward(&format!("{}.net.2", self.module), &self.out, &hidden, Some(residual))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::Tape;
    use crate::ops::testing::{Case, check};

    #[test]
    fn unit_norm_agrees_with_autograd_and_finite_differences() {
        check(
            &[Case::normal(&[3, 7], 1)],
            |x| Ok(unit_norm(&x[0].clone().into())?.into_tensor()),
            |x, d| {
                let tape = Tape::new();
                let leaf = tape.leaf(&x[0]);
                let y = unit_norm(&leaf)?;
                Ok(vec![tape.backward(&[(&y, d)])?.take(&leaf, "x")?])
            },
            |x| x[0].broadcast_div(&x[0].sqr()?.sum_keepdim(1)?.sqrt()?),
        );
    }
}

//! Low-rank adapters (Hu et al. 2021): the factors, which layers get them, how they start; files and mixtures.
//!
//! An adapter on a linear layer with weight W (out, in) adds `alpha / rank * B A` to it, A (rank, in), B (out, rank).

pub mod formats;
mod init_from;
pub mod soup;

use std::collections::HashMap;

use anyhow::{Result, bail};
use candle_core::{Device, Tensor};

pub use init_from::take_over;

/// The two factors of one adapted layer, f32.
#[derive(Clone, Debug)]
pub struct Factor {
    /// The layer inside the UNet, as diffusers names it: `down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`.
    pub module: String,
    /// `lora_A.weight`, (rank, in).
    pub a: Tensor,
    /// `lora_B.weight`, (out, rank).
    pub b: Tensor,
    /// The product B A is scaled by `alpha / rank`.
    pub alpha: f64,
    /// The layer is a 1x1 convolution (proj_in and proj_out of Stable Diffusion 1.x): files hold its factors as kernels.
    pub convolution: bool,
}

impl Factor {
    /// # Errors
    /// The two factors do not belong together: not matrices, or of different rank.
    pub fn new(module: impl Into<String>, a: Tensor, b: Tensor, alpha: f64) -> Result<Self> {
        let module = module.into();
        match (a.dims(), b.dims()) {
            ([rank, _], [_, rank_b]) if rank == rank_b && *rank > 0 => {
                Ok(Self { module, a, b, alpha, convolution: false })
            }
            (a, b) => bail!(
                "the LoRA factors of `{module}` do not fit together: A is {a:?}, B is {b:?}; expected A (rank, in) and B (out, rank)"
            ),
        }
    }
    pub fn rank(&self) -> usize {
        self.a.dims()[0]
    }
    pub fn in_features(&self) -> usize {
        self.a.dims()[1]
    }
    pub fn out_features(&self) -> usize {
        self.b.dims()[0]
    }
    /// alpha / rank.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank() as f64
    }
}

/// A linear layer that may be adapted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub module: String,
    pub in_features: usize,
    pub out_features: usize,
    /// A 1x1 convolution, applied as a linear layer.
    pub convolution: bool,
}

impl Target {
    /// Whether the layer's name ends in one of `target_modules` at a dot (`to_out.0` matches `...attn1.to_out.0`), as in peft.
    pub fn matches(&self, target_modules: &[String]) -> bool {
        target_modules.iter().any(|wanted| {
            self.module == *wanted || self.module.strip_suffix(wanted.as_str()).is_some_and(|head| head.ends_with('.'))
        })
    }
}

/// All adapters of one UNet, ordered by module name.
#[derive(Clone, Debug, Default)]
pub struct Adapters {
    factors: Vec<Factor>,
    index: HashMap<String, usize>,
}

impl Adapters {
    /// # Errors
    /// Two factors for the same module.
    pub fn new(mut factors: Vec<Factor>) -> Result<Self> {
        factors.sort_by(|x, y| x.module.cmp(&y.module));
        if let Some(pair) = factors.windows(2).find(|pair| pair[0].module == pair[1].module) {
            bail!("two LoRA adapters for the same layer `{}`", pair[0].module);
        }
        let index = factors.iter().enumerate().map(|(i, factor)| (factor.module.clone(), i)).collect();
        Ok(Self { factors, index })
    }

    /// Fresh adapters for every layer of `targets` that `target_modules` names: A ~ N(0, 1/rank²), B = 0, so that the
    /// adapted model starts as the base model (peft's `init_lora_weights="gaussian"`).
    ///
    /// `normal(i, n)` gives n standard normal numbers for the i-th adapter.
    ///
    /// # Errors
    /// No layer matches, or an entry of `target_modules` matches none.
    pub fn init(
        targets: &[Target],
        target_modules: &[String],
        rank: usize,
        alpha: f64,
        mut normal: impl FnMut(usize, usize) -> Vec<f32>,
    ) -> Result<Self> {
        if rank == 0 {
            bail!("lora.rank must be at least 1");
        }
        for wanted in target_modules {
            if !targets.iter().any(|target| target.matches(std::slice::from_ref(wanted))) {
                bail!(
                    "lora.target_modules: no layer of this UNet that can be adapted ends in `{wanted}`; the layers of its attention end in to_q, to_k, to_v, to_out.0, the others in ff.net.0.proj, ff.net.2, proj_in, proj_out"
                );
            }
        }
        let mut chosen: Vec<&Target> = targets.iter().filter(|target| target.matches(target_modules)).collect();
        if chosen.is_empty() {
            bail!("lora.target_modules is empty: name at least one of to_q, to_k, to_v, to_out.0");
        }
        chosen.sort_by(|x, y| x.module.cmp(&y.module));
        let mut factors = Vec::with_capacity(chosen.len());
        for (i, target) in chosen.into_iter().enumerate() {
            let a: Vec<f32> = normal(i, rank * target.in_features).into_iter().map(|x| x / rank as f32).collect();
            let a = Tensor::from_vec(a, (rank, target.in_features), &Device::Cpu)?;
            let b = Tensor::zeros((target.out_features, rank), candle_core::DType::F32, &Device::Cpu)?;
            let factor = Factor::new(target.module.clone(), a, b, alpha)?;
            factors.push(Factor { convolution: target.convolution, ..factor });
        }
        Self::new(factors)
    }

    pub fn factors(&self) -> &[Factor] {
        &self.factors
    }
    pub fn get(&self, module: &str) -> Option<&Factor> {
        self.index.get(module).map(|&i| &self.factors[i])
    }
    /// The place of a module's factors in [`Self::factors`].
    pub fn position(&self, module: &str) -> Option<usize> {
        self.index.get(module).copied()
    }
    pub fn is_empty(&self) -> bool {
        self.factors.is_empty()
    }
    /// Number of trainable numbers.
    pub fn parameter_count(&self) -> usize {
        self.factors.iter().map(|f| f.a.elem_count() + f.b.elem_count()).sum()
    }
    /// The same factors on another device; f32, as everywhere.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let mut moved = self.clone();
        for factor in &mut moved.factors {
            factor.a = factor.a.to_device(device)?;
            factor.b = factor.b.to_device(device)?;
        }
        Ok(moved)
    }

    /// Every factor with its alpha multiplied: `lora_scale` of diffusers.
    pub fn scaled(&self, scale: f64) -> Self {
        let mut scaled = self.clone();
        for factor in &mut scaled.factors {
            factor.alpha *= scale;
        }
        scaled
    }

    /// The tensors in a fixed order with their peft names: `<module>.lora_A.weight`, `<module>.lora_B.weight`, ...
    pub fn named_tensors(&self) -> Vec<(String, Tensor)> {
        self.factors
            .iter()
            .flat_map(|f| {
                [
                    (format!("{}.lora_A.weight", f.module), f.a.clone()),
                    (format!("{}.lora_B.weight", f.module), f.b.clone()),
                ]
            })
            .collect()
    }

    /// The tensors alone, in that order.
    pub fn tensors(&self) -> Vec<Tensor> {
        self.factors.iter().flat_map(|f| [f.a.clone(), f.b.clone()]).collect()
    }

    /// The same adapters with other tensors, in the order of [`Self::named_tensors`].
    ///
    /// # Errors
    /// Another number of tensors, or another shape.
    pub fn with_tensors(&self, tensors: Vec<Tensor>) -> Result<Self> {
        if tensors.len() != 2 * self.factors.len() {
            bail!("{} tensors for {} adapters", tensors.len(), self.factors.len());
        }
        let mut replaced = self.clone();
        let mut tensors = tensors.into_iter();
        for factor in &mut replaced.factors {
            for slot in [&mut factor.a, &mut factor.b] {
                let tensor = tensors.next().expect("counted above");
                if tensor.dims() != slot.dims() {
                    bail!("a tensor of shape {:?} for `{}`, which has {:?}", tensor.dims(), factor.module, slot.dims());
                }
                *slot = tensor;
            }
        }
        Ok(replaced)
    }

    /// `4`, or `2 to 8`: for messages.
    pub fn ranks(&self) -> String {
        let ranks = || self.factors.iter().map(Factor::rank);
        match (ranks().min().unwrap_or(0), ranks().max().unwrap_or(0)) {
            (low, high) if low == high => low.to_string(),
            (low, high) => format!("{low} to {high}"),
        }
    }

    /// The same adapters as those of this UNet's layers, which are linear or convolutions whatever a file held.
    ///
    /// # Errors
    /// As [`Self::check_fits`].
    pub fn fitted(mut self, targets: &[Target]) -> Result<Self> {
        self.check_fits(targets)?;
        let known: HashMap<&str, &Target> = targets.iter().map(|t| (t.module.as_str(), t)).collect();
        for factor in &mut self.factors {
            factor.convolution = known.get(factor.module.as_str()).is_some_and(|target| target.convolution);
        }
        Ok(self)
    }

    /// Whether the same layers are adapted with the same ranks and alphas.
    pub fn same_shape(&self, other: &Self) -> bool {
        let shape = |factor: &Factor| (factor.module.clone(), factor.rank(), factor.alpha);
        self.factors.iter().map(shape).eq(other.factors.iter().map(shape))
    }

    /// Checks that every adapter belongs to a layer of this UNet and has its shape.
    ///
    /// # Errors
    /// Names the first layer that is absent or differs: the adapters are for another model.
    pub fn check_fits(&self, targets: &[Target]) -> Result<()> {
        let known: HashMap<&str, &Target> = targets.iter().map(|t| (t.module.as_str(), t)).collect();
        for factor in &self.factors {
            let Some(target) = known.get(factor.module.as_str()) else {
                bail!("this LoRA is for another model: it adapts `{}`, which this UNet does not have", factor.module);
            };
            if (factor.in_features(), factor.out_features()) != (target.in_features, target.out_features) {
                bail!(
                    "this LoRA is for another model: `{}` is a {} -> {} layer there and {} -> {} in this UNet",
                    factor.module,
                    factor.in_features(),
                    factor.out_features(),
                    target.in_features,
                    target.out_features
                );
            }
        }
        Ok(())
    }
}

//! What an optimizer step must satisfy before it counts.

use anyhow::{Result, ensure};
use candle_core::Tensor;

use crate::lora::Adapters;
use crate::ops::{Ledger, NotANumber};
use crate::report::{Metrics, names};

/// Whether a step failed because some number was not finite: it can be skipped.
pub fn is_not_a_number(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.is::<NotANumber>())
}

/// Notes that all of the tensors, one for each of the adapters', must be finite; `what` says what they are.
///
/// # Errors
/// [`NotANumber`], which names the first tensor that has one: here or when the ledger is read.
pub fn ensure_finite(what: &str, adapters: &Adapters, tensors: &[Tensor], ledger: &mut Ledger) -> Result<()> {
    for ((name, _), tensor) in adapters.named_tensors().into_iter().zip(tensors) {
        let what = what.to_owned();
        ledger.finite(tensor, move |_| format!("{what} of `{name}` is not finite"))?;
    }
    Ok(())
}

/// After the first update: some factor B must have moved. Otherwise the model is what it was at the start, and would stay it.
///
/// # Errors
/// None has moved.
pub fn ensure_moved(before: &Adapters, after: &Adapters, grad_norm: f64) -> Result<()> {
    let mut moved = false;
    for (old, new) in before.factors().iter().zip(after.factors()) {
        moved |= old.b.flatten_all()?.to_vec1::<f32>()? != new.b.flatten_all()?.to_vec1::<f32>()?;
    }
    let cause = if grad_norm == 0.0 {
        "every gradient is zero: the loss is flat there (each score above its cap or at its target, or an image \
         that is clamped everywhere)"
    } else {
        "the gradient is not zero, the update is: optimizer.lr is too small, or optimizer.max_grad_norm or \
         optimizer.loss_coeff is so small that optimizer.eps swallows the gradient"
    };
    ensure!(
        moved,
        "the adapters did not move in the first optimizer step (gradient norm {grad_norm:e}), so the run was stopped; {cause}"
    );
    Ok(())
}

/// How many steps up to `step` were skipped in a row, by the run's metrics.
pub fn skipped_in_a_row(metrics: &Metrics, step: usize) -> usize {
    (1..=step).rev().take_while(|step| metrics.has(names::SKIPPED, *step)).count()
}

use candle_core::{Result, Tensor};

use super::thin::Factors;
use super::{Weight, rows_of};
use crate::ops::frozen::Same;
use crate::ops::{Host, Real, buffer, tensor_from};

fn with_last(x: &Tensor, last: usize) -> Vec<usize> {
    let mut dims = x.dims().to_vec();
    if let Some(end) = dims.last_mut() {
        *end = last;
    }
    dims
}

pub(super) fn linear_fwd<T: Real>(x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
    let (rows, _) = rows_of(x)?;
    let outputs = weight.outputs;
    let x_data = Host::<T>::read(x)?;
    let bias = bias.map(Host::<T>::read).transpose()?;
    let mut y = buffer(rows * outputs);
    weight.on_host()?.forward(&x_data, &Same, rows, bias.as_deref(), &mut y)?;
    tensor_from(y, with_last(x, outputs))
}

pub(super) fn linear_bwd<T: Real>(cotangent: &Tensor, weight: &Weight) -> Result<Tensor> {
    let (rows, _) = rows_of(cotangent)?;
    let dy = Host::<T>::read(cotangent)?;
    let mut dx = buffer(rows * weight.inputs);
    weight.on_host()?.backward(&dy, &Same, rows, &mut dx)?;
    tensor_from(dx, with_last(cotangent, weight.inputs))
}

pub(super) fn lora_fwd<T: Real>(x: &Tensor, a: &Tensor, b: &Tensor, scale: f64, y: &Tensor) -> Result<Tensor> {
    let (x, y_data) = (Host::<T>::read(x)?, Host::<T>::read(y)?);
    let (a_data, b_data) = (Host::<T>::read(a)?, Host::<T>::read(b)?);
    let factors = Factors::new(&a_data, &b_data, a.dims()[0], T::lit(scale));
    tensor_from(factors.forward(&x, &y_data), y.dims())
}

pub(super) fn lora_bwd<T: Real>(
    cotangent: &Tensor,
    x: &Tensor,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (dy, x_data) = (Host::<T>::read(cotangent)?, Host::<T>::read(x)?);
    let (a_data, b_data) = (Host::<T>::read(a)?, Host::<T>::read(b)?);
    let factors = Factors::new(&a_data, &b_data, a.dims()[0], T::lit(scale));
    let (dx, da, db) = factors.backward(&dy, &x_data);
    Ok((tensor_from(dx, x.dims())?, tensor_from(da, a.dims())?, tensor_from(db, b.dims())?))
}

use candle_core::{Result, Tensor};

use super::{Weight, rows_of};
use crate::ops::frozen::Same;
use crate::ops::gemm::{Threads, View, ViewMut, gemm, scaled_gemm};
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
    let ((rows, inputs), (rank, _), (outputs, _)) = (rows_of(x)?, a.dims2()?, b.dims2()?);
    let (x, a, b, y_data) = (Host::<T>::read(x)?, Host::<T>::read(a)?, Host::<T>::read(b)?, Host::<T>::read(y)?);
    let mut low = buffer(rows * rank);
    gemm(
        View::rows(&x, rows, inputs),
        View::rows(&a, rank, inputs).t(),
        ViewMut::rows(&mut low, rows, rank),
        false,
        Threads::All,
    );
    let mut sum = y_data.to_vec();
    scaled_gemm(
        T::lit(scale),
        View::rows(&low, rows, rank),
        View::rows(&b, outputs, rank).t(),
        ViewMut::rows(&mut sum, rows, outputs),
        true,
        Threads::All,
    );
    tensor_from(sum, y.dims())
}

pub(super) fn lora_bwd<T: Real>(
    cotangent: &Tensor,
    x: &Tensor,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
) -> Result<(Tensor, Tensor, Tensor)> {
    let ((rows, inputs), (rank, _), (outputs, _)) = (rows_of(x)?, a.dims2()?, b.dims2()?);
    let (dy, x_data) = (Host::<T>::read(cotangent)?, Host::<T>::read(x)?);
    let (a_data, b_data) = (Host::<T>::read(a)?, Host::<T>::read(b)?);
    let (dy, x_view) = (View::rows(&dy, rows, outputs), View::rows(&x_data, rows, inputs));
    let (a_view, b_view) = (View::rows(&a_data, rank, inputs), View::rows(&b_data, outputs, rank));

    // low = x Aᵀ, d_low = s d_y B: both (rows, rank)
    let mut low = buffer(rows * rank);
    gemm(x_view, a_view.t(), ViewMut::rows(&mut low, rows, rank), false, Threads::All);
    let mut d_low = buffer(rows * rank);
    scaled_gemm(T::lit(scale), dy, b_view, ViewMut::rows(&mut d_low, rows, rank), false, Threads::All);

    let mut dx = buffer(rows * inputs);
    gemm(View::rows(&d_low, rows, rank), a_view, ViewMut::rows(&mut dx, rows, inputs), false, Threads::All);
    let mut da = buffer(rank * inputs);
    gemm(View::rows(&d_low, rows, rank).t(), x_view, ViewMut::rows(&mut da, rank, inputs), false, Threads::All);
    let mut db = buffer(outputs * rank);
    scaled_gemm(
        T::lit(scale),
        dy.t(),
        View::rows(&low, rows, rank),
        ViewMut::rows(&mut db, outputs, rank),
        false,
        Threads::All,
    );
    Ok((tensor_from(dx, x.dims())?, tensor_from(da, a.dims())?, tensor_from(db, b.dims())?))
}

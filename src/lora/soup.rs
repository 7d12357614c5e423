//! Soups: weighted mixtures of adapters, of the factors as in the paper or of the products that they stand for.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use nalgebra::DMatrix;

use super::{Adapters, Factor};

/// What is averaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Average {
    /// A = sum_i c_i A_i, B = sum_i c_i B_i (the paper). Not the average of the models: B A has the cross terms
    /// c_i c_j B_i A_j too. Good for adapters that share their first A, as checkpoints of one run do.
    Factors,
    /// sum_i c_i (alpha_i / rank_i) B_i A_i, exactly: the ranks add up. With `rank`, the nearest adapters (in the
    /// Frobenius norm) of at most that rank.
    Product { rank: Option<usize> },
}

/// Weighted mixture of adapters: the weights are used as given, they need not add up to one.
///
/// [`Average::Product`] takes a layer that a part lacks for zero. So the base model is a part without adapters, and
/// mixing with it by c scales the product by c. Parts of weight zero leave no trace in the rank.
///
/// # Errors
/// There is nothing to mix, a weight is not finite, or two parts disagree on a layer's shape; for [`Average::Factors`]
/// also on the set of layers, on a rank or on alpha.
pub fn mix(parts: &[(Adapters, f64)], average: Average) -> Result<Adapters> {
    if let Some((_, weight)) = parts.iter().find(|(_, weight)| !weight.is_finite()) {
        bail!("a weight of the soup is {weight}");
    }
    if parts.iter().all(|(part, _)| part.is_empty()) {
        bail!("there is no adapter in the soup: give at least one LoRA");
    }
    match average {
        Average::Factors => mix_factors(parts),
        Average::Product { rank: Some(0) } => bail!("the rank of a soup must be at least 1"),
        Average::Product { rank } => {
            let parts: Vec<_> = parts.iter().map(|(part, weight)| (part, *weight)).collect();
            let factors = modules(&parts).into_iter().map(|module| {
                let product = LowRank::sum(module, &parts)?;
                match rank {
                    Some(rank) if rank < product.rank() => {
                        product.truncate(rank).with_context(|| format!("truncating `{module}`"))?
                    }
                    _ => product,
                }
                .into_factor(module)
                .map(|factor| Factor { convolution: is_convolution(module, &parts), ..factor })
            });
            Adapters::new(factors.collect::<Result<_>>()?)
        }
    }
}

/// ||X - Y|| / ||X|| in the Frobenius norm over all layers, where X and Y are the products that the exact and the
/// approximate adapters add to the weights: what a truncation loses, or how far the factor average is from the true one.
///
/// # Errors
/// The two disagree on a layer's shape.
pub fn relative_error(exact: &Adapters, approximate: &Adapters) -> Result<f64> {
    let (mut difference, mut total) = (0.0, 0.0);
    for module in modules(&[(exact, 1.0), (approximate, 1.0)]) {
        difference += LowRank::sum(module, &[(exact, 1.0), (approximate, -1.0)])?.norm().powi(2);
        if exact.get(module).is_some() {
            total += LowRank::sum(module, &[(exact, 1.0)])?.norm().powi(2);
        }
    }
    Ok(if difference == 0.0 { 0.0 } else { (difference / total).sqrt() })
}

/// A = sum_i c_i A_i, B = sum_i c_i B_i.
fn mix_factors(parts: &[(Adapters, f64)]) -> Result<Adapters> {
    const HINT: &str = "average the products instead of the factors";
    let (first, _) = &parts[0]; // some part has adapters, so there is one
    let mut factors = Vec::with_capacity(first.factors().len());
    for like in first.factors() {
        let module = &like.module;
        let (mut a, mut b) = (like.a.zeros_like()?, like.b.zeros_like()?);
        for (part, weight) in parts {
            let Some(factor) = part.get(module) else {
                bail!("not all parts of the soup adapt `{module}`; {HINT}");
            };
            if (factor.a.dims(), factor.b.dims()) != (like.a.dims(), like.b.dims()) {
                bail!(
                    "the parts of the soup have different ranks or shapes at `{module}`: A is {:?} and {:?}; {HINT}",
                    like.a.dims(),
                    factor.a.dims()
                );
            }
            if (factor.alpha - like.alpha).abs() > 1e-9 * like.alpha.abs() {
                bail!(
                    "the parts of the soup have different alphas at `{module}`: {} and {}; {HINT}",
                    like.alpha,
                    factor.alpha
                );
            }
            a = (a + factor.a.affine(*weight, 0.0)?)?;
            b = (b + factor.b.affine(*weight, 0.0)?)?;
        }
        factors.push(Factor { convolution: like.convolution, ..Factor::new(module, a, b, like.alpha)? });
    }
    if let Some((part, _)) = parts.iter().find(|(part, _)| part.factors().len() != first.factors().len()) {
        bail!("the parts of the soup adapt {} and {} layers; {HINT}", first.factors().len(), part.factors().len());
    }
    Adapters::new(factors)
}

/// The layers that any part adapts, sorted.
fn modules<'a>(parts: &[(&'a Adapters, f64)]) -> BTreeSet<&'a str> {
    parts.iter().flat_map(|(part, _)| part.factors()).map(|factor| factor.module.as_str()).collect()
}

/// Whether a part knows the layer as a convolution.
fn is_convolution(module: &str, parts: &[(&Adapters, f64)]) -> bool {
    parts.iter().any(|(part, _)| part.get(module).is_some_and(|factor| factor.convolution))
}

/// A product b a that is never formed, in f64: at (out, in) = (1280, 1280) it would be 13 MB for each of 128 layers.
struct LowRank {
    /// (rank, in)
    a: DMatrix<f64>,
    /// (out, rank)
    b: DMatrix<f64>,
}

impl LowRank {
    /// sum_i c_i s_i B_i A_i of one layer as [.. B_i ..] [.. A_i ..]^T, with s_i = alpha_i / rank_i. Each side takes the
    /// root of |c_i s_i|, so that neither is large, and B the sign.
    fn sum(module: &str, parts: &[(&Adapters, f64)]) -> Result<Self> {
        let terms: Vec<(&Factor, f64)> = parts
            .iter()
            .filter_map(|(part, weight)| part.get(module).map(|factor| (factor, weight * factor.scale())))
            .collect();
        let shapes: BTreeSet<_> =
            terms.iter().map(|(factor, _)| (factor.in_features(), factor.out_features())).collect();
        let (Some(&(inputs, outputs)), 1) = (shapes.first(), shapes.len()) else {
            bail!("the parts are for different models: the layer `{module}` has the shapes (in, out) {shapes:?}");
        };
        let nonzero: Vec<_> = terms.iter().copied().filter(|(_, scale)| *scale != 0.0).collect();
        let terms = if nonzero.is_empty() { terms } else { nonzero }; // all zero: a factor of zeros, not of rank 0
        let rank = terms.iter().map(|(factor, _)| factor.rank()).sum();
        let (mut a, mut b) = (DMatrix::zeros(rank, inputs), DMatrix::zeros(outputs, rank));
        let mut row = 0;
        for (factor, scale) in terms {
            let root = scale.abs().sqrt();
            a.rows_mut(row, factor.rank()).copy_from(&(to_matrix(&factor.a)? * root));
            b.columns_mut(row, factor.rank()).copy_from(&(to_matrix(&factor.b)? * root.copysign(scale)));
            row += factor.rank();
        }
        Ok(Self { a, b })
    }

    fn rank(&self) -> usize {
        self.a.nrows()
    }

    /// b a = Q_b (R_b R_a^T) Q_a^T: the Frobenius norm and the singular values are those of the small matrix R_b R_a^T.
    fn norm(&self) -> f64 {
        let (r_b, r_a) = (self.b.clone().qr().r(), self.a.transpose().qr().r());
        (r_b * r_a.transpose()).norm()
    }

    /// The nearest product of this rank (Eckart and Young): the largest singular values, their roots on either side.
    fn truncate(&self, rank: usize) -> Result<Self> {
        let (qr_b, qr_a) = (self.b.clone().qr(), self.a.transpose().qr());
        let core = qr_b.r() * qr_a.r().transpose();
        let (mut us, mut v) = orthogonal_columns(core)?; // core = us v^T
        let mut order: Vec<(usize, f64)> = us.column_iter().map(|column| column.norm()).enumerate().collect();
        order.sort_by(|(_, x), (_, y)| y.total_cmp(x));
        order.truncate(rank);
        for &(i, singular_value) in order.iter().filter(|(_, singular_value)| *singular_value > 0.0) {
            us.column_mut(i).unscale_mut(singular_value.sqrt());
            v.column_mut(i).scale_mut(singular_value.sqrt());
        }
        let kept: Vec<usize> = order.iter().map(|&(i, _)| i).collect();
        Ok(Self { a: (qr_a.q() * v.select_columns(&kept)).transpose(), b: qr_b.q() * us.select_columns(&kept) })
    }

    /// alpha = rank: the scale is in the factors.
    fn into_factor(self, module: &str) -> Result<Factor> {
        let rank = self.rank() as f64;
        Factor::new(module, to_tensor(&self.a)?, to_tensor(&self.b)?, rank)
    }
}

/// core = us v^T with orthogonal columns of us, whose norms are the singular values, and an orthogonal v: one-sided
/// Jacobi rotations (Hestenes 1958).
///
/// Not nalgebra's `svd`: version 0.35 gives a wrong decomposition for one in ten matrices that lack rank, and the
/// checkpoints of one run nearly share their A.
///
/// # Errors
/// The matrix is not finite.
fn orthogonal_columns(core: DMatrix<f64>) -> Result<(DMatrix<f64>, DMatrix<f64>)> {
    const MAX_SWEEPS: usize = 100; // about ten are usual
    const COSINE: f64 = 1e-14; // columns count as orthogonal below it; the result is rounded to f32 (6e-8)
    let n = core.ncols();
    let zero = (COSINE * core.norm()).powi(2); // the square of a norm that is rounding error
    if !zero.is_finite() {
        bail!("the factors are not finite, or too large to multiply");
    }
    let (mut us, mut v) = (core, DMatrix::identity(n, n));
    for _ in 0..MAX_SWEEPS {
        let mut done = true;
        for (p, q) in (0..n).flat_map(|p| (p + 1..n).map(move |q| (p, q))) {
            let (pp, qq, pq) =
                (us.column(p).norm_squared(), us.column(q).norm_squared(), us.column(p).dot(&us.column(q)));
            if pp.min(qq) <= zero || pq.abs() <= COSINE * (pp * qq).sqrt() {
                continue;
            }
            // The angle that makes the columns orthogonal: tan^2 + 2 cot(2 angle) tan - 1 = 0, the smaller root.
            let cot = (qq - pp) / (2.0 * pq);
            let tan = cot.signum() / (cot.abs() + cot.hypot(1.0));
            let cos = 1.0 / tan.hypot(1.0);
            rotate(&mut us, p, q, cos, cos * tan);
            rotate(&mut v, p, q, cos, cos * tan);
            done = false;
        }
        if done {
            return Ok((us, v));
        }
    }
    bail!("the singular value decomposition does not converge in {MAX_SWEEPS} sweeps")
}

/// Columns (x, y) -> (cos x - sin y, sin x + cos y).
fn rotate(matrix: &mut DMatrix<f64>, p: usize, q: usize, cos: f64, sin: f64) {
    for row in 0..matrix.nrows() {
        let (x, y) = (matrix[(row, p)], matrix[(row, q)]);
        (matrix[(row, p)], matrix[(row, q)]) = (cos * x - sin * y, sin * x + cos * y);
    }
}

fn to_matrix(tensor: &Tensor) -> Result<DMatrix<f64>> {
    let (rows, columns) = tensor.dims2()?;
    let values = tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    Ok(DMatrix::from_row_slice(rows, columns, &values))
}

fn to_tensor(matrix: &DMatrix<f64>) -> Result<Tensor> {
    // nalgebra stores columns, candle rows.
    let values: Vec<f32> = matrix.transpose().iter().map(|&x| x as f32).collect();
    Ok(Tensor::from_vec(values, matrix.shape(), &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers in [-1, 1) that depend on the seed alone.
    fn noise(seed: u64, rows: usize, columns: usize) -> Tensor {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let values: Vec<f32> = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .take(rows * columns)
        .collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    }

    /// One layer, 7 -> 9.
    fn factor(seed: u64, module: &str, rank: usize, alpha: f64) -> Factor {
        Factor::new(module, noise(seed, rank, 7), noise(seed + 1000, 9, rank), alpha).unwrap()
    }

    fn adapters(factors: impl IntoIterator<Item = Factor>) -> Adapters {
        Adapters::new(factors.into_iter().collect()).unwrap()
    }

    /// alpha / rank B A, (9, 7).
    fn dense(adapters: &Adapters, module: &str) -> DMatrix<f64> {
        adapters
            .get(module)
            .map_or(DMatrix::zeros(9, 7), |f| to_matrix(&f.b).unwrap() * to_matrix(&f.a).unwrap() * f.scale())
    }

    fn product(parts: &[(Adapters, f64)], rank: Option<usize>) -> Adapters {
        mix(parts, Average::Product { rank }).unwrap()
    }

    #[test]
    fn the_product_average_is_the_dense_average() {
        // Different ranks, alpha != rank, a negative weight, a layer that one part lacks.
        let x = adapters([factor(1, "m", 2, 8.0), factor(2, "only_x", 1, 1.0)]);
        let y = adapters([factor(3, "m", 3, 1.5)]);
        let mixed = product(&[(x.clone(), 0.7), (y.clone(), -0.2)], None);
        assert_eq!((mixed.get("m").unwrap().rank(), mixed.get("m").unwrap().scale()), (5, 1.0));
        for module in ["m", "only_x"] {
            let wanted = dense(&x, module) * 0.7 - dense(&y, module) * 0.2;
            assert!((dense(&mixed, module) - &wanted).norm() < 1e-6 * wanted.norm(), "{module}"); // f32 factors
        }
    }

    #[test]
    fn the_truncation_is_that_of_the_dense_product() {
        let parts: Vec<_> =
            (0..3).map(|i| (adapters([factor(i, "m", 2, 3.0), factor(i + 50, "n", 1, 1.0)]), 0.5 + i as f64)).collect();
        let exact = product(&parts, None);
        for rank in 1..=5 {
            let truncated = product(&parts, Some(rank));
            assert_eq!(truncated.get("m").unwrap().rank(), rank);
            assert_eq!(truncated.get("n").unwrap().rank(), rank.min(3));
            // Eckart and Young: the error is the root of the sum of the squares of the singular values left out.
            let (mut lost, mut total) = (0.0, 0.0);
            for module in ["m", "n"] {
                let mut squares: Vec<f64> = dense(&exact, module).singular_values().iter().map(|s| s * s).collect();
                squares.sort_by(|x, y| y.total_cmp(x));
                lost += squares.iter().skip(rank).sum::<f64>();
                total += squares.iter().sum::<f64>();
            }
            let (wanted, error) = ((lost / total).sqrt(), relative_error(&exact, &truncated).unwrap());
            assert!((error - wanted).abs() < 1e-6, "rank {rank}: {error} for {wanted}");
        }
    }

    #[test]
    fn a_deficient_product_loses_nothing() {
        // The same adapter twice, and one that starts as zero: rank 2 held in 6.
        let x = adapters([factor(1, "m", 2, 2.0)]);
        let fresh =
            adapters([Factor::new("m", noise(9, 2, 7), Tensor::zeros((9, 2), DType::F32, &Device::Cpu).unwrap(), 2.0)
                .unwrap()]);
        let parts = [(x.clone(), 0.25), (fresh, 1.0), (x.clone(), 0.75)];
        assert!(relative_error(&x, &product(&parts, Some(2))).unwrap() < 1e-6);
        assert!(relative_error(&x, &product(&parts, Some(4))).unwrap() < 1e-6);
        // More than the layer holds: min(in, out) = 7.
        let many: Vec<_> = (0..6).map(|i| (adapters([factor(i, "m", 3, 3.0)]), 1.0)).collect();
        assert_eq!(product(&many, Some(10)).get("m").unwrap().rank(), 7);
        assert!(relative_error(&product(&many, None), &product(&many, Some(10))).unwrap() < 1e-6);
    }

    #[test]
    fn the_decomposition_holds_for_deficient_matrices() {
        for i in 0..400 {
            let (rows, columns, rank) = (1 + i % 23, 1 + i % 17, i % 5);
            let matrix = |seed: usize, rows: usize, columns: usize| {
                to_matrix(&noise(seed as u64, rows, columns.max(1))).unwrap()
            };
            let mut core = matrix(i, rows, rank) * matrix(i + 1000, columns, rank).transpose();
            if rank == 0 {
                core.fill(0.0);
            }
            let (us, v) = orthogonal_columns(core.clone()).unwrap();
            let (scale, eye) = (1e-12 * core.norm(), DMatrix::identity(columns, columns));
            assert!((&us * v.transpose() - &core).norm() <= scale && (v.transpose() * &v - eye).norm() < 1e-12, "{i}");
            let gram = us.transpose() * &us;
            assert!((&gram - DMatrix::from_diagonal(&gram.diagonal())).norm() <= scale * core.norm(), "{i}");
            // In a product of more rank, cut to what it holds.
            let wide = LowRank { a: matrix(i, 6, columns), b: matrix(i + 1, rows, 3) * matrix(i + 2, 3, 6) };
            let cut = wide.truncate(3).unwrap();
            assert!((cut.b * cut.a - &wide.b * &wide.a).norm() < 1e-12 * wide.b.norm() * wide.a.norm(), "{i}");
        }
        assert!(orthogonal_columns(DMatrix::from_element(2, 2, f64::NAN)).is_err());
    }

    #[test]
    fn weights_of_one_and_zero_pick_a_part() {
        let (x, y) = (adapters([factor(1, "m", 2, 6.0)]), adapters([factor(2, "m", 2, 6.0)]));
        let parts = [(x.clone(), 1.0), (y, 0.0)];
        assert_eq!(product(&parts, None).get("m").unwrap().rank(), 2);
        for average in [Average::Product { rank: None }, Average::Product { rank: Some(2) }, Average::Factors] {
            assert!(relative_error(&x, &mix(&parts, average).unwrap()).unwrap() < 1e-6, "{average:?}");
        }
    }

    #[test]
    fn the_base_model_scales_the_product() {
        let x = adapters([factor(1, "m", 2, 6.0)]);
        for weight in [0.3, 0.0] {
            let mixed = product(&[(x.clone(), weight), (Adapters::default(), 1.0 - weight)], None);
            assert!((dense(&mixed, "m") - dense(&x, "m") * weight).norm() < 1e-6);
        }
    }

    #[test]
    fn the_factor_average_is_the_papers() {
        let (x, y) = (adapters([factor(1, "m", 2, 4.0)]), adapters([factor(2, "m", 2, 4.0)]));
        let mixed = mix(&[(x.clone(), 0.3), (y.clone(), 0.7)], Average::Factors).unwrap();
        let (m, x, y) = (mixed.get("m").unwrap(), x.get("m").unwrap(), y.get("m").unwrap());
        assert_eq!(m.alpha, 4.0);
        for (m, x, y) in [(&m.a, &x.a, &y.a), (&m.b, &x.b, &y.b)] {
            let wanted = to_matrix(x).unwrap() * 0.3 + to_matrix(y).unwrap() * 0.7;
            assert!((to_matrix(m).unwrap() - wanted).amax() < 1e-6);
        }
        let half = mix(&[(mixed.clone(), 0.5), (mixed.clone(), 0.5)], Average::Factors).unwrap();
        assert!(relative_error(&mixed, &half).unwrap() < 1e-6);
    }

    #[test]
    fn what_cannot_be_mixed_is_an_error() {
        let one = |module: &str, rank, alpha| adapters([factor(1, module, rank, alpha)]);
        let x = one("m", 2, 2.0);
        for other in [
            one("m", 3, 3.0),
            one("m", 2, 1.0),
            one("n", 2, 2.0),
            Adapters::default(),
            adapters([factor(1, "m", 2, 2.0), factor(1, "n", 2, 2.0)]),
        ] {
            for parts in [[(x.clone(), 0.5), (other.clone(), 0.5)], [(other.clone(), 0.5), (x.clone(), 0.5)]] {
                let error = mix(&parts, Average::Factors).unwrap_err();
                assert!(error.to_string().contains("average the products"), "{error}");
            }
        }
        let wide = adapters([Factor::new("m", noise(1, 2, 8), noise(2, 9, 2), 2.0).unwrap()]);
        let error = |parts: &[(Adapters, f64)], rank| mix(parts, Average::Product { rank }).unwrap_err().to_string();
        assert!(error(&[(x.clone(), 1.0), (wide, 1.0)], None).contains("different models"));
        assert!(error(&[(x.clone(), 1.0)], Some(0)).contains("at least 1"));
        assert!(error(&[(x, f64::NAN)], None).contains("NaN"));
        assert!(error(&[(Adapters::default(), 1.0)], None).contains("no adapter"));
    }
}

//! Pictures that belong together, so that a split does not have the same picture on both sides.

use std::collections::HashMap;

use super::Matrix;
use crate::ops::gemm::{Threads, View, ViewMut, gemm};

/// The cosines from which on two pictures may count as the same, the least that is sensible first.
const COSINES: [f64; 4] = [0.97, 0.985, 0.995, 0.999];

/// A group may hold this share of the pictures; where more are alike, only those count that are more so.
const LARGEST: f64 = 0.1;

/// The group of each row of unit vectors, and the cosine from which on two are in the same one.
pub fn near_duplicates(embeddings: &Matrix) -> (Vec<usize>, f64) {
    for cosine in COSINES {
        let groups = alike(embeddings, cosine);
        if largest(&groups) as f64 <= (LARGEST * groups.len() as f64).max(2.0) {
            return (groups, cosine);
        }
    }
    ((0..embeddings.rows()).collect(), 1.0)
}

fn alike(embeddings: &Matrix, cosine: f64) -> Vec<usize> {
    const BLOCK: usize = 256;
    let (rows, width) = (embeddings.rows(), embeddings.width());
    let mut pairs = Vec::new();
    for start in (0..rows).step_by(BLOCK) {
        // the cosines of a block with itself and all rows behind it
        let (block, others) = (BLOCK.min(rows - start), rows - start);
        let left = View::rows(&embeddings.data[start * width..(start + block) * width], block, width);
        let right = View::rows(&embeddings.data[start * width..], others, width).t();
        let mut cosines = vec![0.0; block * others];
        gemm(left, right, ViewMut::rows(&mut cosines, block, others), false, Threads::All);
        for (i, row) in cosines.chunks_exact(others).enumerate() {
            let near = row.iter().enumerate().skip(i + 1).filter(|(_, found)| **found >= cosine);
            pairs.extend(near.map(|(j, _)| (start + i, start + j)));
        }
    }
    joined(rows, pairs)
}

/// The components of a graph, each by its first member.
pub(super) fn joined(members: usize, pairs: impl IntoIterator<Item = (usize, usize)>) -> Vec<usize> {
    let mut parent: Vec<usize> = (0..members).collect();
    fn root(parent: &mut [usize], mut i: usize) -> usize {
        while parent[i] != i {
            parent[i] = parent[parent[i]];
            i = parent[i];
        }
        i
    }
    for (a, b) in pairs {
        let (a, b) = (root(&mut parent, a), root(&mut parent, b));
        parent[a.max(b)] = a.min(b);
    }
    (0..members).map(|i| root(&mut parent, i)).collect()
}

/// Members of the largest group.
pub(super) fn largest(groups: &[usize]) -> usize {
    let mut counts = HashMap::new();
    groups.iter().for_each(|group| *counts.entry(group).or_insert(0) += 1);
    counts.into_values().max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fit::dot;
    use crate::fit::tests::embeddings;

    #[test]
    fn copies_are_grouped_and_a_cloud_is_not() {
        let x = embeddings(60, 40, 3);
        let (groups, _) = near_duplicates(&x);
        assert_eq!(groups, (0..60).collect::<Vec<_>>());
        // rows 20 and 40 are row 3, a little moved
        let mut data = x.data.clone();
        for copy in [20, 40] {
            let row: Vec<f64> =
                x.row(3).iter().enumerate().map(|(i, v)| v + 1e-3 * (i as f64 + copy as f64).sin()).collect();
            let norm = dot(&row, &row).sqrt();
            data[copy * 40..(copy + 1) * 40].iter_mut().zip(row).for_each(|(slot, v)| *slot = v / norm);
        }
        let (groups, cosine) = near_duplicates(&Matrix::new(data, 40).unwrap());
        assert_eq!((groups[20], groups[40], cosine), (3, 3, 0.97));
        // all nearly the same: none is a copy
        let near: Vec<f64> = (0..50)
            .flat_map(|i| {
                [1.0, 0.02 * f64::from(i), 1e-3].map(|v| v / (1.0f64 + 4e-4 * f64::from(i * i) + 1e-6).sqrt())
            })
            .collect();
        let (groups, cosine) = near_duplicates(&Matrix::new(near, 3).unwrap());
        assert!(cosine > 0.98 && largest(&groups) <= 5, "{cosine} {groups:?}");
        assert_eq!(joined(5, [(4, 1), (3, 4)]), [0, 1, 2, 1, 1]);
    }
}

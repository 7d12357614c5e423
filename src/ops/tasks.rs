//! How work is divided.

use std::ops::Range;

use rayon::prelude::*;

/// Part `index` of `parts` nearly equal parts of 0..total.
pub(super) fn share(total: usize, parts: usize, index: usize) -> Range<usize> {
    total * index / parts..total * (index + 1) / parts
}

/// All tasks, on all threads where there are several.
pub(super) fn parallel(tasks: usize, task: impl Fn(usize) + Send + Sync) {
    if tasks == 1 {
        task(0);
    } else {
        (0..tasks).into_par_iter().for_each(task);
    }
}

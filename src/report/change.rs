//! A mean that was measured before and after, beside what chance makes of it.

/// A mean before and after.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    pub from: f64,
    pub to: f64,
    /// Standard error of the difference.
    pub error: f64,
    /// Standard deviation of the single scores before, where they are known.
    pub spread: Option<f64>,
    /// How many of how many rose, where they are pairs.
    pub better: Option<(usize, usize)>,
}

/// What can be said of a [`Change`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Rose,
    Fell,
    /// The difference is less than two standard errors.
    Level,
}

impl Change {
    /// Of pairs (before, after) of single scores; two at least.
    pub fn of_pairs(pairs: impl Iterator<Item = (f64, f64)>) -> Option<Self> {
        let (before, after): (Vec<f64>, Vec<f64>) = pairs.unzip();
        let differences: Vec<f64> = after.iter().zip(&before).map(|(after, before)| after - before).collect();
        let n = differences.len();
        let ((from, spread), (to, _), (_, of_difference)) =
            (moments(&before)?, moments(&after)?, moments(&differences)?);
        let better = Some((differences.iter().filter(|d| **d > 0.0).count(), n));
        Some(Self { from, to, error: of_difference / (n as f64).sqrt(), spread: Some(spread), better })
    }

    /// Of the first and the last batches of a history, up to ten each; four batches at least.
    pub fn of_batches(history: &[(usize, f64)]) -> Option<Self> {
        let n = (history.len() / 2).min(10);
        let values = |points: &[(usize, f64)]| points.iter().map(|(_, value)| *value).collect::<Vec<_>>();
        let (from, first) = moments(&values(&history[..n]))?;
        let (to, last) = moments(&values(&history[history.len() - n..]))?;
        Some(Self { from, to, error: ((first * first + last * last) / n as f64).sqrt(), spread: None, better: None })
    }

    pub fn verdict(&self) -> Verdict {
        match self.to - self.from {
            by if by.abs() <= 2.0 * self.error => Verdict::Level,
            by if by > 0.0 => Verdict::Rose,
            _ => Verdict::Fell,
        }
    }

    /// The verdict of a run that goes on.
    pub fn trend(&self) -> &'static str {
        match self.verdict() {
            Verdict::Rose => "rising",
            Verdict::Fell => "falling",
            Verdict::Level => "level",
        }
    }

    /// `from 0.7814 to 0.7890, +0.0076 ± 0.0031`, in the digits that the error leaves.
    pub fn in_numbers(&self) -> String {
        let digits = self.digits();
        format!("from {:.digits$} to {:.digits$}, {}", self.from, self.to, self.by())
    }

    /// `+0.0076 ± 0.0031`.
    pub fn by(&self) -> String {
        let digits = self.digits();
        format!("{:+.digits$} ± {:.digits$}", self.to - self.from, self.error)
    }

    /// Decimals that show two digits of the error.
    fn digits(&self) -> usize {
        if self.error > 0.0 { (1.0 - self.error.log10().floor()).clamp(0.0, 9.0) as usize } else { 4 }
    }
}

/// Mean and standard deviation (of a sample) of two values or more.
fn moments(values: &[f64]) -> Option<(f64, f64)> {
    let n = values.len() as f64;
    if values.len() < 2 {
        return None;
    }
    let mean = values.iter().sum::<f64>() / n;
    let squares = values.iter().map(|value| (value - mean) * (value - mean)).sum::<f64>();
    Some((mean, (squares / (n - 1.0)).sqrt()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_more_than_chance_or_level() {
        // differences 1, 2, 3: mean 2, standard deviation 1
        let change = Change::of_pairs([(1.0, 2.0), (3.0, 5.0), (5.0, 8.0)].into_iter()).unwrap();
        assert_eq!((change.from, change.to, change.spread, change.better), (3.0, 5.0, Some(2.0), Some((3, 3))));
        assert!((change.error - 1.0 / 3f64.sqrt()).abs() < 1e-12);
        assert_eq!((change.verdict(), change.by().as_str()), (Verdict::Rose, "+2.00 ± 0.58"));
        let back = Change::of_pairs([(2.0, 1.0), (5.0, 3.0), (8.0, 5.0)].into_iter()).unwrap();
        assert_eq!((back.verdict(), back.by().as_str()), (Verdict::Fell, "-2.00 ± 0.58"));
        let level = Change::of_pairs([(1.0, 2.0), (1.0, 0.5), (1.0, 1.0)].into_iter()).unwrap();
        assert_eq!((level.verdict(), level.better), (Verdict::Level, Some((1, 3))));
        assert_eq!(Change::of_pairs([(1.0, 2.0)].into_iter()), None);
    }

    #[test]
    fn batches_are_compared_by_both_ends() {
        let history: Vec<(usize, f64)> = (0..100).map(|step| (step, step as f64)).collect();
        let change = Change::of_batches(&history).unwrap();
        assert_eq!((change.from, change.to, change.verdict()), (4.5, 94.5, Verdict::Rose));
        // variance of ten neighbours: 55 / 6
        assert!((change.error - (2.0 * 55.0 / 6.0 / 10.0f64).sqrt()).abs() < 1e-12);
        assert_eq!(Change::of_batches(&history[..3]), None);
        let level: Vec<(usize, f64)> = (0..40).map(|step| (step, f64::from(step as u32 % 2))).collect();
        assert_eq!(Change::of_batches(&level).unwrap().verdict(), Verdict::Level);
    }
}

//! What a step wants to know of its numbers, answered at one reading.

use candle_core::{DType, Result, Tensor};

use super::{NotANumber, mark};

/// Slots of a page: 32 KiB.
const PAGE: usize = 4096;

/// Numbers that are wanted on the host, and checks that tensors are finite.
///
/// A GPU works off a queue, and whoever looks at one of its numbers waits until the queue is empty. So on a GPU a note is a
/// slot in a small buffer there, which kernels fill, and [`Self::read`] fetches all slots at once: whoever takes notes does
/// not wait. On the CPU, where a number is there as soon as it is computed, a note is looked at when it is made.
///
/// ```text
/// ledger.finite(&image, |_| "the image is not finite".into())?;      the CPU: an error; a GPU: a slot
/// let score = ledger.number(&score)?;
/// ...                                                                nothing waits
/// let readings = ledger.read()?;                                     the one wait; the first bad note is the error
/// readings.get(score)
/// ```
#[derive(Default)]
pub struct Ledger {
    /// Numbers on the CPU are noted for the reading too, as a GPU's are: for tests of what follows from that.
    always_later: bool,
    /// (PAGE) f64 each; zeros where nothing was written.
    pages: Vec<Tensor>,
    /// Slots in use.
    used: usize,
    /// Numbers that must be finite, in the order of their notes.
    checks: Vec<Check>,
    counts: Vec<Count>,
}

struct Check {
    number: Number,
    room: Box<dyn Fn(f64) -> String>,
}

/// A number that the host makes of a tensor.
struct Count {
    of: Tensor,
    count: Box<Counting>,
}

type Counting = dyn FnOnce(&Tensor) -> anyhow::Result<f64>;

/// A number that is known, or will be when its ledger is read.
#[derive(Clone, Copy, Debug)]
pub struct Number(Place);

#[derive(Clone, Copy, Debug)]
enum Place {
    Known(f64),
    Slot(usize),
    Count(usize),
}

impl From<f64> for Number {
    fn from(number: f64) -> Self {
        Self(Place::Known(number))
    }
}

/// The numbers of a ledger that was read.
pub struct Readings {
    slots: Vec<f64>,
    counts: Vec<f64>,
}

impl Readings {
    /// # Panics
    /// The number is of another ledger, which had more of them.
    pub fn get(&self, number: Number) -> f64 {
        match number.0 {
            Place::Known(number) => number,
            Place::Slot(slot) => self.slots[slot],
            Place::Count(index) => self.counts[index],
        }
    }

    fn all_finite(&self, checks: &[Check]) -> anyhow::Result<()> {
        match checks.iter().find(|check| !self.get(check.number).is_finite()) {
            Some(check) => Err(NotANumber((check.room)(self.get(check.number))).into()),
            None => Ok(()),
        }
    }
}

impl Ledger {
    /// One that looks at nothing before it is read, wherever the numbers are: what a GPU does to a step can be tested so
    /// without one.
    pub fn always_later() -> Self {
        Self { always_later: true, ..Self::default() }
    }

    /// Notes that every element of `x` must be finite. `room` says where it was, given a number that is not finite.
    ///
    /// # Errors
    /// [`NotANumber`], where the numbers can be looked at now.
    pub fn finite(&mut self, x: &Tensor, room: impl Fn(f64) -> String + 'static) -> anyhow::Result<()> {
        if self.looks_now(x) {
            return if super::is_finite(x)? { Ok(()) } else { Err(NotANumber(room(f64::NAN)).into()) };
        }
        let (page, place) = self.slot(x)?;
        mark(&page, place, x)?;
        self.checks.push(Check { number: Number(Place::Slot(self.used - 1)), room: Box::new(room) });
        Ok(())
    }

    /// Notes the one number of `x`.
    ///
    /// # Errors
    /// It has more, or none.
    pub fn number(&mut self, x: &Tensor) -> Result<Number> {
        let x = x.reshape(1)?.to_dtype(DType::F64)?;
        if self.looks_now(&x) {
            return Ok(x.to_vec1::<f64>()?[0].into());
        }
        let (page, place) = self.slot(&x)?;
        page.slice_set(&x, 0, place)?;
        Ok(Number(Place::Slot(self.used - 1)))
    }

    /// Notes the numbers of `x` (n), one each.
    ///
    /// # Errors
    /// It has another rank.
    pub fn numbers(&mut self, x: &Tensor) -> Result<Vec<Number>> {
        (0..x.dims1()?).map(|row| self.number(&x.narrow(0, row, 1)?)).collect()
    }

    /// Notes that a number of this ledger must be finite; `room` says where it was, given the number.
    ///
    /// # Errors
    /// [`NotANumber`], where the number is known.
    pub fn finite_number(&mut self, number: Number, room: impl Fn(f64) -> String + 'static) -> anyhow::Result<()> {
        match number.0 {
            Place::Known(known) if known.is_finite() => Ok(()),
            Place::Known(known) => Err(NotANumber(room(known)).into()),
            _ => {
                self.checks.push(Check { number, room: Box::new(room) });
                Ok(())
            }
        }
    }

    /// Notes what `count` makes of `x` on the host. On a GPU the tensor is held until the ledger is read.
    ///
    /// # Errors
    /// Those of `count`, where the numbers can be looked at now.
    pub fn counted(
        &mut self,
        x: &Tensor,
        count: impl FnOnce(&Tensor) -> anyhow::Result<f64> + 'static,
    ) -> anyhow::Result<Number> {
        if self.looks_now(x) {
            return Ok(count(x)?.into());
        }
        self.counts.push(Count { of: x.clone(), count: Box::new(count) });
        Ok(Number(Place::Count(self.counts.len() - 1)))
    }

    /// All numbers. Waits for a GPU, once.
    ///
    /// # Errors
    /// [`NotANumber`]: the first note whose number is not finite. Those of what is counted.
    pub fn read(self) -> anyhow::Result<Readings> {
        let mut slots = Vec::with_capacity(self.pages.len() * PAGE);
        for page in &self.pages {
            slots.extend(page.to_vec1::<f64>()?);
        }
        let mut readings = Readings { slots, counts: Vec::new() };
        // what is counted may need finite numbers to count, so it comes second
        let (counted, noted): (Vec<Check>, Vec<Check>) =
            self.checks.into_iter().partition(|check| matches!(check.number.0, Place::Count(_)));
        readings.all_finite(&noted)?;
        readings.counts =
            self.counts.into_iter().map(|count| (count.count)(&count.of)).collect::<anyhow::Result<_>>()?;
        readings.all_finite(&counted)?;
        Ok(readings)
    }

    /// Reads what was noted so far, and starts again: numbers that were noted are gone.
    ///
    /// # Errors
    /// Those of [`Self::read`].
    pub fn read_now(&mut self) -> anyhow::Result<()> {
        let fresh = Self { always_later: self.always_later, ..Self::default() };
        std::mem::replace(self, fresh).read().map(|_| ())
    }

    /// What `work` gives, and what it noted, read when it is done.
    ///
    /// # Errors
    /// Those of `work` and of [`Self::read`].
    pub fn around<T>(work: impl FnOnce(&mut Self) -> anyhow::Result<T>) -> anyhow::Result<(T, Readings)> {
        let mut ledger = Self::default();
        let done = work(&mut ledger)?;
        Ok((done, ledger.read()?))
    }

    fn looks_now(&self, x: &Tensor) -> bool {
        x.device().is_cpu() && !self.always_later
    }

    /// The next free slot: its page and its place there.
    fn slot(&mut self, like: &Tensor) -> Result<(Tensor, usize)> {
        let place = self.used % PAGE;
        if place == 0 {
            self.pages.push(Tensor::zeros(PAGE, DType::F64, like.device())?);
        }
        self.used += 1;
        Ok((self.pages[self.pages.len() - 1].clone(), place))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    #[test]
    fn numbers_are_the_same_now_and_later() {
        for mut ledger in [Ledger::default(), Ledger::always_later()] {
            let noted: Vec<Number> = (0..2 * PAGE + 3).map(|i| ledger.number(&tensor(&[i as f32])).unwrap()).collect();
            ledger.finite(&tensor(&[1.0, 2.0]), |_| unreachable!()).unwrap();
            let count = |x: &Tensor| Ok(x.to_vec1::<f32>()?.len() as f64);
            let counted = ledger.counted(&tensor(&[1.0, 2.0]), count).unwrap();
            let exact = ledger.number(&Tensor::new(&[[1.0f64 / 3.0]], &Device::Cpu).unwrap()).unwrap();
            let readings = ledger.read().unwrap();
            for (i, number) in noted.into_iter().enumerate() {
                assert_eq!(readings.get(number), i as f64);
            }
            assert_eq!([exact, counted, 7.5.into()].map(|number| readings.get(number)), [1.0 / 3.0, 2.0, 7.5]);
        }
    }

    #[test]
    fn the_first_bad_note_is_the_error() {
        let notes = |mut ledger: Ledger| -> anyhow::Result<Readings> {
            ledger.finite(&tensor(&[1.0, 2.0]), |_| "good".into())?;
            ledger.number(&tensor(&[f32::NAN]))?; // not asked to be finite
            ledger.finite(&tensor(&[1.0, f32::INFINITY]), |_| "the first".into())?;
            let second = ledger.number(&tensor(&[f32::NAN]))?;
            ledger.finite_number(second, |_| "the second".into())?;
            ledger.read()
        };
        let score = |mut ledger: Ledger, score: f32| -> anyhow::Result<Readings> {
            for number in ledger.numbers(&tensor(&[1.0, score]))? {
                ledger.finite_number(number, |score| format!("it gave {score}"))?;
            }
            ledger.read()
        };
        for new in [Ledger::default, Ledger::always_later] {
            let message = |result: anyhow::Result<Readings>| {
                let error = result.err().unwrap();
                assert!(error.is::<NotANumber>());
                error.to_string()
            };
            assert_eq!(message(notes(new())), "not a number: the first");
            assert_eq!(message(score(new(), f32::NEG_INFINITY)), "not a number: it gave -inf");
            let counted = |mut ledger: Ledger| -> anyhow::Result<Readings> {
                let number = ledger.counted(&tensor(&[1.0]), |_| Ok(f64::NAN))?;
                ledger.finite_number(number, |count| format!("it counted {count}"))?;
                ledger.read()
            };
            assert_eq!(message(counted(new())), "not a number: it counted NaN");
        }
        // the CPU does not wait for the reading
        assert!(Ledger::default().finite(&tensor(&[f32::NAN]), |_| String::new()).is_err());
        Ledger::always_later().finite(&tensor(&[f32::NAN]), |_| String::new()).unwrap();
    }
}

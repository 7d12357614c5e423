//! Which branches an input went through, where the program was built to count them (`just fuzz`): an input that goes where
//! none went before is worth changing further.

use std::sync::Mutex;

static COUNTERS: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

/// Called by every instrumented object file at the start, with the range of its counters.
#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_8bit_counters_init(start: *mut u8, stop: *mut u8) {
    COUNTERS.lock().unwrap().push((start as usize, stop as usize));
}

/// What was seen so far: for each counter the magnitudes it had.
#[derive(Default)]
pub struct Seen(Vec<u8>);

impl Seen {
    /// Runs `work`; the number is how many branches it went through for the first time, or as often as never before.
    pub fn new_branches<T>(&mut self, work: impl FnOnce() -> T) -> (T, usize) {
        let ranges = COUNTERS.lock().unwrap().clone();
        for &(start, stop) in &ranges {
            // SAFETY: the range is a static array of counters, that instrumented code writes and nobody else.
            unsafe { std::ptr::write_bytes(start as *mut u8, 0, stop - start) };
        }
        let done = work();
        let mut new = 0;
        // SAFETY: as above; volatile, as other threads may count meanwhile.
        let counts = ranges
            .iter()
            .flat_map(|&(start, stop)| (start..stop).map(|at| unsafe { std::ptr::read_volatile(at as *const u8) }));
        for (i, count) in counts.enumerate() {
            if self.0.len() <= i {
                self.0.push(0);
            }
            if count > 0 {
                // 1, 2-3, 4-7, .., 128-255
                let magnitude = 1u8 << count.ilog2();
                new += usize::from(self.0[i] & magnitude == 0);
                self.0[i] |= magnitude;
            }
        }
        (done, new)
    }
}

//! The allocator of this program: it notes the largest block and the most bytes that the thread asked for.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A block of this size is refused, which ends the process: a reader that believes any number shall not take the machine.
const REFUSED: usize = 1 << 30;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(layout: Layout, sign: isize) {
    let live = LIVE.get() + sign * layout.size() as isize;
    LIVE.set(live);
    PEAK.set(PEAK.get().max(live));
    if sign > 0 {
        LARGEST.set(LARGEST.get().max(layout.size()));
    }
}

// SAFETY: the system's allocator, with counters beside it that allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout, 1);
        // SAFETY: the caller's promise is the system allocator's requirement.
        if layout.size() > REFUSED { std::ptr::null_mut() } else { unsafe { System.alloc(layout) } }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout, 1);
        // SAFETY: as in `alloc`.
        if layout.size() > REFUSED { std::ptr::null_mut() } else { unsafe { System.alloc_zeroed(layout) } }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(layout, -1);
        // SAFETY: as in `alloc`.
        unsafe { System.dealloc(ptr, layout) }
    }
}

/// What a thread needed while it did something.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    /// The largest single block.
    pub largest: usize,
    /// The most bytes at a time.
    pub peak: usize,
}

/// Runs `work` and says what memory it needed in this thread.
pub fn need<T>(work: impl FnOnce() -> T) -> (T, Need) {
    let before = LIVE.get();
    LARGEST.set(0);
    PEAK.set(before);
    let done = work();
    (done, Need { largest: LARGEST.get(), peak: (PEAK.get() - before).max(0) as usize })
}

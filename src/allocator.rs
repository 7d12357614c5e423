//! The program's allocator: mimalloc for what is small, kept huge pages for what is large, and a count of both.
//!
//! Activations come and go by the hundred megabytes in every step. A block that goes back to the system comes again as
//! pages that the system clears one by one, in the thread that asked, while the others wait. So blocks of 16 KiB and more
//! come from stretches of address space that keep their pages, made of huge pages where Linux gives them; freed neighbours
//! are joined and the best fit is used again, so that the program's resident memory stays close to what is allocated at the
//! peak. What lasts ([`lasting`]) has a stretch of its own, so that weights do not lie scattered between what their loading
//! needed for a moment.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use mimalloc::MiMalloc;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// Bytes that are allocated now; 0 where the program's allocator is another one.
pub fn live() -> usize {
    LIVE.load(Relaxed)
}

/// The most bytes that were allocated at a time, since the start or the last [`reset_peak`].
pub fn peak() -> usize {
    PEAK.load(Relaxed)
}

/// The peak is what is allocated now.
pub fn reset_peak() {
    PEAK.store(live(), Relaxed);
}

/// `mi_option_purge_delay`, which the crate has no name for.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// In milliseconds.
const A_WEEK: std::ffi::c_long = 604_800_000;

/// Tells mimalloc to keep freed pages too, unless `MIMALLOC_PURGE_DELAY` says otherwise; for the start of a program.
pub fn keep_pages() {
    if std::env::var_os("MIMALLOC_PURGE_DELAY").is_none() {
        // SAFETY: the option is a plain number that the allocator reads; no other thread runs yet.
        unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, A_WEEK) };
    }
}

thread_local! {
    static LASTING: Cell<bool> = const { Cell::new(false) };
}

/// Large blocks that `make` allocates, in this thread, are kept as long as the program: weights.
pub fn lasting<T>(make: impl FnOnce() -> T) -> T {
    let before = LASTING.replace(true);
    let made = make();
    LASTING.set(before);
    made
}

/// `#[global_allocator]` of the binary and the benches.
pub struct Allocator;

fn grow(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Relaxed) + bytes;
    PEAK.fetch_max(live, Relaxed);
}

// SAFETY: a block comes from the kept stretch or from mimalloc, both of which give aligned memory of the size that is
// asked for, and goes back to where its address says it came from. The counters and the lock allocate nothing large.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        match Large::of(layout).and_then(take) {
            Some((block, _)) => block,
            // SAFETY: the caller's promise about `layout` is mimalloc's requirement.
            None => unsafe { MiMalloc.alloc(layout) },
        }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        match Large::of(layout).and_then(take) {
            Some((block, used)) => {
                // SAFETY: the block has at least that many bytes; behind them its pages are as the system gave them.
                unsafe { block.write_bytes(0, used.min(layout.size())) };
                block
            }
            // SAFETY: as in `alloc`.
            None => unsafe { MiMalloc.alloc_zeroed(layout) },
        }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        match Large::of(layout) {
            Some(large) if is_kept(ptr) => space(ptr as usize >= MIDDLE.load(Relaxed)).give(ptr as usize, large.0),
            // SAFETY: `ptr` came from mimalloc with this layout, as the caller promises.
            _ => unsafe { MiMalloc.dealloc(ptr, layout) },
        }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller promises that the new size is not zero and does not overflow when rounded up.
        let new_layout = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        if Large::of(layout).is_none() && Large::of(new_layout).is_none() {
            // as a move: both are there for a moment
            grow(new_size);
            LIVE.fetch_sub(layout.size(), Relaxed);
            // SAFETY: as in `dealloc`; `new_size` is the caller's promise.
            return unsafe { MiMalloc.realloc(ptr, layout, new_size) };
        }
        // SAFETY: the old block has the old layout; the copy stays inside both blocks.
        unsafe {
            let block = self.alloc(new_layout);
            if !block.is_null() {
                block.copy_from_nonoverlapping(ptr, layout.size().min(new_size));
                self.dealloc(ptr, layout);
            }
            block
        }
    }
}

/// The smallest block that is taken from a kept stretch.
const SMALLEST: usize = 1 << 14;
/// Blocks start at multiples of this and are as long.
const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;

/// The bytes of a large block, whole pages.
struct Large(usize);

impl Large {
    fn of(layout: Layout) -> Option<Self> {
        (layout.size() >= SMALLEST && layout.align() <= PAGE).then(|| Self(layout.size().next_multiple_of(PAGE)))
    }
}

/// Where the stretches are, the second one from the middle on; 0 before they are there.
static START: AtomicUsize = AtomicUsize::new(0);
static MIDDLE: AtomicUsize = AtomicUsize::new(0);
static END: AtomicUsize = AtomicUsize::new(0);
static WORKING_SPACE: Mutex<Space> = Mutex::new(Space::new(0, 0));
static LASTING_SPACE: Mutex<Space> = Mutex::new(Space::new(0, 0));

fn is_kept(ptr: *mut u8) -> bool {
    (START.load(Relaxed)..END.load(Relaxed)).contains(&(ptr as usize))
}

fn space(lasting: bool) -> MutexGuard<'static, Space> {
    let space = if lasting { &LASTING_SPACE } else { &WORKING_SPACE };
    space.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A large block, and how many of its bytes were in use before; `None` where the system has no room for it.
fn take(Large(bytes): Large) -> Option<(*mut u8, usize)> {
    static RESERVED: Once = Once::new();
    RESERVED.call_once(|| {
        if let Some((start, end)) = reserve() {
            let middle = start + ((end - start) / 2).next_multiple_of(HUGE_PAGE);
            *space(false) = Space::new(start, middle);
            *space(true) = Space::new(middle, end);
            START.store(start, Relaxed);
            MIDDLE.store(middle, Relaxed);
            END.store(end, Relaxed);
        }
    });
    let (block, used) = space(LASTING.get()).take(bytes)?;
    Some((std::ptr::with_exposed_provenance_mut(block), used))
}

/// Address space without memory behind it, from a multiple of a huge page on.
#[cfg(target_os = "linux")]
fn reserve() -> Option<(usize, usize)> {
    // less where the system allows no more
    (34..=40).rev().find_map(|bits| {
        let bytes = 1usize << bits;
        let (access, kind) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: a new mapping at an address that the system chooses; the advice is about that mapping.
        let start = unsafe {
            let start = libc::mmap(std::ptr::null_mut(), bytes, access, kind, -1, 0);
            if start == libc::MAP_FAILED {
                return None;
            }
            libc::madvise(start, bytes, libc::MADV_HUGEPAGE);
            start.expose_provenance()
        };
        Some((start.next_multiple_of(HUGE_PAGE), start + bytes))
    })
}

#[cfg(not(target_os = "linux"))]
fn reserve() -> Option<(usize, usize)> {
    None
}

/// Which parts of a stretch of addresses are free.
struct Space {
    /// Nothing from here on is in use.
    top: usize,
    /// Nothing from here on has ever been in use.
    highest: usize,
    end: usize,
    /// Free parts below `top`, by address and by size; no two of them touch each other or `top`.
    free: BTreeMap<usize, usize>,
    sizes: BTreeSet<(usize, usize)>,
}

impl Space {
    const fn new(start: usize, end: usize) -> Self {
        Self { top: start, highest: start, end, free: BTreeMap::new(), sizes: BTreeSet::new() }
    }

    /// The address of `bytes` bytes, and how many of them were in use before. The best fit, the lowest of equals.
    fn take(&mut self, bytes: usize) -> Option<(usize, usize)> {
        if let Some(&(size, start)) = self.sizes.range((bytes, 0)..).next() {
            self.forget(start, size);
            if size > bytes {
                self.remember(start + bytes, size - bytes);
            }
            return Some((start, bytes));
        }
        let start = self.top;
        let top = start.checked_add(bytes).filter(|top| *top <= self.end)?;
        let used = self.highest.saturating_sub(start).min(bytes);
        self.top = top;
        self.highest = self.highest.max(top);
        Some((start, used))
    }

    fn give(&mut self, mut start: usize, mut bytes: usize) {
        if let Some((&before, &size)) = self.free.range(..start).next_back()
            && before + size == start
        {
            self.forget(before, size);
            (start, bytes) = (before, bytes + size);
        }
        if let Some(&size) = self.free.get(&(start + bytes)) {
            self.forget(start + bytes, size);
            bytes += size;
        }
        if start + bytes == self.top {
            self.top = start;
        } else {
            self.remember(start, bytes);
        }
    }

    fn remember(&mut self, start: usize, bytes: usize) {
        self.free.insert(start, bytes);
        self.sizes.insert((bytes, start));
    }

    fn forget(&mut self, start: usize, bytes: usize) {
        self.free.remove(&start);
        self.sizes.remove(&(bytes, start));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_never_overlap_and_everything_is_joined_again() {
        let (start, end) = (1 << 20, 1 << 24);
        let mut space = Space::new(start, end);
        let mut blocks: Vec<(usize, usize)> = Vec::new();
        let mut state = 1u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % below
        };
        let (mut highest, mut refused) = (start, 0);
        for _ in 0..20_000 {
            if random(5) < 3 {
                let bytes = (1 + random(300)) * PAGE;
                match space.take(bytes) {
                    Some((block, used)) => {
                        assert!(block >= start && block + bytes <= end);
                        assert_eq!(used, highest.saturating_sub(block).min(bytes), "bytes that were in use before");
                        highest = highest.max(block + bytes);
                        assert!(
                            blocks.iter().all(|(other, size)| block + bytes <= *other || other + size <= block),
                            "an overlap"
                        );
                        blocks.push((block, bytes));
                    }
                    None => refused += 1,
                }
            } else if !blocks.is_empty() {
                let (block, bytes) = blocks.swap_remove(random(blocks.len()));
                space.give(block, bytes);
            }
        }
        assert!(refused > 0, "the stretch was never full");
        for (block, bytes) in blocks {
            space.give(block, bytes);
        }
        assert_eq!((space.top, space.free.len(), space.sizes.len()), (start, 0, 0));
    }

    #[test]
    fn the_best_fit_is_used_again() {
        let mut space = Space::new(0, 1 << 30);
        let sizes = [8, 1, 4, 1, 6, 1].map(|pages| pages * PAGE);
        let blocks = sizes.map(|bytes| space.take(bytes).unwrap().0);
        for i in [0, 2, 4] {
            space.give(blocks[i], sizes[i]);
        }
        assert_eq!(space.take(5 * PAGE), Some((blocks[4], 5 * PAGE)));
        assert_eq!(space.take(4 * PAGE), Some((blocks[2], 4 * PAGE)));
    }

    #[test]
    fn large_blocks_are_zero_when_asked_for_and_keep_what_they_hold_when_they_grow() {
        let layout = Layout::from_size_align(3 * SMALLEST + 5, 64).unwrap();
        // SAFETY: sizes are those of the layouts, and each block goes back once.
        unsafe {
            for _ in 0..3 {
                let block = Allocator.alloc_zeroed(layout);
                let bytes = std::slice::from_raw_parts_mut(block, layout.size());
                assert!(bytes.iter().all(|byte| *byte == 0));
                bytes.fill(7);
                let grown = Allocator.realloc(block, layout, 5 * SMALLEST);
                assert!(std::slice::from_raw_parts(grown, layout.size()).iter().all(|byte| *byte == 7));
                let small = Allocator.realloc(grown, Layout::from_size_align(5 * SMALLEST, 64).unwrap(), 100);
                assert!(std::slice::from_raw_parts(small, 100).iter().all(|byte| *byte == 7));
                Allocator.dealloc(small, Layout::from_size_align(100, 64).unwrap());
            }
        }
    }
}

//! Ctrl-C and SIGTERM: the first one ends the run after its step, with a checkpoint; the second one ends it at once.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// Which signal has asked the run to stop.
pub struct Interrupt(Arc<AtomicUsize>);

impl Interrupt {
    /// Listens from now on; once for the process, whatever the number of calls.
    ///
    /// The second signal ends the process in its handler, with 128 + its number: every file is written under another
    /// name and renamed, so nothing is left half-written.
    pub fn listen() -> Result<Self> {
        static RECEIVED: OnceLock<Arc<AtomicUsize>> = OnceLock::new();
        if let Some(received) = RECEIVED.get() {
            return Ok(Self(received.clone()));
        }
        let received = Arc::new(AtomicUsize::new(0));
        let again = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // handlers run in this order: the first signal finds `again` not set, and sets it
            let register = || -> std::io::Result<()> {
                flag::register_conditional_shutdown(signal, 128 + signal, again.clone())?;
                flag::register(signal, again.clone())?;
                flag::register_usize(signal, received.clone(), signal as usize)?;
                Ok(())
            };
            register().context("listening for Ctrl-C")?;
        }
        announce(received.clone());
        Ok(Self(RECEIVED.get_or_init(|| received).clone()))
    }

    /// The signal that arrived, if one did.
    pub fn received(&self) -> Option<i32> {
        match self.0.load(Ordering::SeqCst) {
            0 => None,
            signal => Some(signal as i32),
        }
    }
}

/// Says at once what the first signal does: a step may take minutes.
fn announce(received: Arc<AtomicUsize>) {
    std::thread::spawn(move || {
        while received.load(Ordering::SeqCst) == 0 {
            std::thread::sleep(Duration::from_millis(100));
        }
        eprintln!("\nfinishing this optimizer step, then saving; once more to stop at once");
    });
}

/// A run that a signal ended, with its checkpoint saved.
#[derive(Debug, thiserror::Error)]
#[error("stopped after step {step} of {steps}, saved; go on with `{resume}`")]
pub struct Interrupted {
    pub signal: i32,
    pub step: usize,
    pub steps: usize,
    /// The command that goes on.
    pub resume: String,
}

impl Interrupted {
    /// As a shell reports a process that the signal ended: 130 for Ctrl-C.
    pub fn exit_code(&self) -> u8 {
        (128 + self.signal) as u8
    }
}

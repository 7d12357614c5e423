//! Signals: each of those that terminals and clusters send ends the run after its step, with a checkpoint.
//!
//! ```text
//! INT, TERM         Ctrl-C, `kill`, the end of a job's time: the second one ends the process at once
//! HUP               a terminal that closes
//! USR1, USR2, XCPU  a cluster: the job's time is nearly over
//!                   these may come more than once and still save
//! ```

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// The signals of a closed terminal and of a cluster.
#[cfg(unix)]
const REPEATABLE: [i32; 4] = [libc::SIGHUP, libc::SIGUSR1, libc::SIGUSR2, libc::SIGXCPU];
#[cfg(not(unix))]
const REPEATABLE: [i32; 0] = [];

/// Which signal has asked the run to stop.
pub struct Interrupt(Arc<AtomicUsize>);

impl Interrupt {
    /// Listens from now on; once for the process, whatever the number of calls.
    ///
    /// The second Ctrl-C or SIGTERM ends the process in its handler, with 128 + its number: every file is written under
    /// another name and renamed, so nothing is left half-written. What was told to be ignored stays ignored (`nohup`).
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
        for signal in REPEATABLE.into_iter().filter(|signal| !ignored(*signal)) {
            flag::register_usize(signal, received.clone(), signal as usize)
                .with_context(|| format!("listening for signal {signal}"))?;
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

/// Whether whoever started the process has it ignore this signal.
#[cfg(unix)]
fn ignored(signal: i32) -> bool {
    // SAFETY: `sigaction` without a new action only writes the present one to `action`, for which zeros are a valid value.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &mut action) == 0 && action.sa_sigaction == libc::SIG_IGN
    }
}

#[cfg(not(unix))]
fn ignored(_: i32) -> bool {
    false
}

/// Says at once what the first signal does: a step may take minutes.
fn announce(received: Arc<AtomicUsize>) {
    std::thread::spawn(move || {
        while received.load(Ordering::SeqCst) == 0 {
            std::thread::sleep(Duration::from_millis(100));
        }
        let repeatable = REPEATABLE.iter().any(|signal| *signal as usize == received.load(Ordering::SeqCst));
        let at_once = if repeatable { "Ctrl-C or SIGTERM twice" } else { "once more" };
        note!("\nfinishing this optimizer step, then saving; {at_once} to stop at once");
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

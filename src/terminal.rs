//! The one door to stdout and stderr.
//!
//! `println!` panics where nobody reads any more or the disk is full. Here a line that cannot be written is lost and the
//! work goes on; [`lost`] tells at the end of the process whether that has to be said.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};
use std::sync::OnceLock;

/// Why the first line for stdout was lost.
static LOST: OnceLock<io::Error> = OnceLock::new();

/// A line on stdout: what a command was asked for.
macro_rules! say {
    ($($words:tt)*) => { $crate::terminal::say(format_args!($($words)*)) };
}

/// A line on stderr: progress, warnings.
macro_rules! note {
    ($($words:tt)*) => { $crate::terminal::note(format_args!($($words)*)) };
}

/// Writes a line to stdout; use `say!`.
pub fn say(line: Arguments) {
    if let Err(error) = write(io::stdout().lock(), line) {
        LOST.get_or_init(|| error);
    }
}

/// Writes a line to stderr, or loses it: there is nowhere to say so.
pub fn note(line: Arguments) {
    let _ = write(io::stderr().lock(), line);
}

/// In one piece, so that lines of several threads and processes stay whole.
fn write(mut to: impl Write, line: Arguments) -> io::Result<()> {
    to.write_all(format!("{line}\n").as_bytes())?;
    to.flush()
}

/// Why something printed is missing; `None` as well where that is nobody's loss: the reader of the pipe has left, the
/// terminal is closed.
pub fn lost() -> Option<&'static io::Error> {
    LOST.get().filter(|error| !nobody_reads(error))
}

fn nobody_reads(error: &io::Error) -> bool {
    #[cfg(unix)]
    if error.raw_os_error() == Some(libc::EIO) {
        return true; // a terminal that has hung up
    }
    error.kind() == ErrorKind::BrokenPipe
}

//! Ctrl-C: the first one asks for a clean end, the second one kills.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

const EXIT_CODE: u8 = 130;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Takes over Ctrl-C.
pub(super) fn install() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(EXIT_CODE));
        }
    })?;
    Ok(())
}

/// Whether Ctrl-C was pressed.
pub(super) fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Whether Ctrl-C was pressed since this was last asked: the next one is a first one again.
pub(super) fn take() -> bool {
    INTERRUPTED.swap(false, Ordering::Relaxed)
}

pub(super) fn exit_code() -> ExitCode {
    ExitCode::from(EXIT_CODE)
}

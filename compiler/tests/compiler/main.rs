//! Tests of the compiler: each pass text in, text out; whole compilations of the fixtures.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod compile;
mod cuda;
mod fuse;
mod interpret;
mod nvrtc;
mod plan_memory;
mod sass;
mod select_early;
mod specialise;

use std::path::{Path, PathBuf};

/// A checkpoint directory or file under `tests/fixtures`.
fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures")
        .join(name)
}

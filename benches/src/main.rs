//! `kiln-perf`.

use std::process::ExitCode;

fn main() -> ExitCode {
    kiln_benches::cli::main()
}

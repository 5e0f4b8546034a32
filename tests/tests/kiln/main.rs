//! Integration tests: both programs as a user runs them.

mod batch_invariance;
mod cpu_parity;
mod documents;
mod generate;
mod hostile_bundles;
mod programs;

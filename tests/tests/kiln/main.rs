//! Integration tests: both programs as a user runs them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod batch_invariance;
mod conformance;
mod cpu_parity;
mod documents;
mod embed;
mod emulated_engine;
mod emulated_kernels;
mod emulation;
mod evaluated;
mod generate;
mod generation;
mod gptq;
mod hostile_bundles;
mod interactive;
mod mock_gpu;
mod perf_table;
mod programs;
mod quantised;
mod traces;

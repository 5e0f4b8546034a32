//! `kiln-perf`: where the time of a step goes, kernel by kernel, and what is left to the limit.
//!
//! [`table`] is what the commands share: one makes it, the others read it.

pub mod cli;
mod error;
mod kinds;
mod measure;
pub mod overhead;
mod predicted;
mod references;
mod steps;
pub mod table;
mod text;

pub use error::TableError;

//! `kiln-perf`: where the time of a step goes, kernel by kernel, and what is left to the limit.
//!
//! [`table`] is what the commands share: one makes it, the others read it. [`compare`] tells what became
//! slower between two of them, [`report`] makes a page of them. [`instructions`] counts what
//! kernels execute, where times are too noisy to fail a change by.

pub mod cli;
pub mod compare;
pub mod instructions;
pub mod overhead;
pub mod report;
pub mod table;
pub mod testing;

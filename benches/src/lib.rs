//! Benchmarks of kiln.

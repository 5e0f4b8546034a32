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

use kiln_ir::Graph;
use std::path::{Path, PathBuf};

/// A graph of these declared weights, which is sound.
fn graph(weights: &str, body: &str) -> Graph {
    let graph: Graph = format!("graph g {{\n{weights}{body}}}\n").parse().unwrap();
    assert_eq!(graph.verify(), Ok(()), "the input of the case");
    graph
}

/// The text of a graph, which is sound, after these weights.
fn body(weights: &str, graph: &Graph) -> String {
    assert_eq!(graph.verify(), Ok(()), "the result:\n{graph}");
    let text = graph.to_string();
    let body = text.strip_prefix("graph g {\n").unwrap();
    let body = body.strip_prefix(weights).unwrap();
    body.strip_suffix("}\n").unwrap().to_owned()
}

/// A checkpoint directory or file under `tests/fixtures`.
fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures")
        .join(name)
}

//! Graph to graph. A pass is one function, graph in, graph out; the pipeline verifies after each.

mod fuse;

pub use fuse::fuse;

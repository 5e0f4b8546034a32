//! Graph to graph. A pass is one function, graph in, graph out; the pipeline verifies after each.

mod fuse;
mod select_early;

pub use fuse::fuse;
pub use select_early::select_early;

//! The tools of the `herd` binary.

pub mod cluster;
pub mod logits;

//! The tools of the `herd` binary.

pub mod logits;

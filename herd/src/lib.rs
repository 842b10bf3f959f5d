//! The tools of the `herd` binary.

pub mod bench;
pub mod cluster;
pub mod exchange_bench;
pub mod logits;
pub mod ranks;

//! The tools of the `herd` binary.

pub mod bench;
pub mod chaos;
pub mod cluster;
pub mod exchange_bench;
pub mod logits;
pub mod placement_bench;
pub mod ranks;

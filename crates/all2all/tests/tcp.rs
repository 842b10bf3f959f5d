//! The exchange between processes keeps the rules of every exchange. Here every rank is a thread with a
//! mesh of its own; `processes.rs` has real processes.

#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod common;

use common::{Meshes, allocations};

all2all::conformance!(Meshes::apart(), allocations);

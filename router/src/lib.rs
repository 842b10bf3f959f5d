//! The router: front door, scheduler and journal of a herd cluster.

pub mod engine;
pub mod http;
pub mod lead;
pub mod status;

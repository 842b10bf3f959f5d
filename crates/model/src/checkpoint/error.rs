//! What can be wrong with a checkpoint, and how it is told: everything at once, one line each.

use std::fmt;
use std::path::PathBuf;

/// Why a checkpoint cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    /// The index cannot be understood (a broken weight file is a [`Problem`]).
    #[error("{}: {reason}; download the file again", path.display())]
    Header { path: PathBuf, reason: String },
    #[error("the checkpoint has {} problems, download the files named or correct config.json:{}", .0.len(), lines(.0))]
    Problems(Vec<Problem>),
    #[error("{} tensors hold values that are not finite, download their files again:{}", .0.len(), lines(.0))]
    NonFinite(Vec<NonFinite>),
}

/// One thing that is wrong with the files.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("{file}: cannot be opened: {reason}")]
    MissingFile { file: String, reason: String },
    #[error("{file}: {reason}")]
    BrokenHeader { file: String, reason: String },
    #[error("{file}: {found} bytes instead of {expected} (download cut short or overwritten)")]
    Length { file: String, expected: u64, found: u64 },
    #[error("{tensor}: missing, expected {expected:?}")]
    MissingTensor { tensor: String, expected: Vec<usize> },
    #[error("{file}: {tensor}: shape {found:?}, expected {expected:?}")]
    Shape { file: String, tensor: String, expected: Vec<usize>, found: Vec<usize> },
    #[error("{file}: {tensor}: type {found}, expected {}", expected.join(" or "))]
    Dtype { file: String, tensor: String, expected: Vec<&'static str>, found: String },
}

/// A tensor with infinities or NaN.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}: {tensor}: {count} values, the first at element {first}")]
pub struct NonFinite {
    pub file: String,
    pub tensor: String,
    /// How many elements are not finite.
    pub count: u64,
    /// Index of the first one within the tensor, row-major.
    pub first: u64,
}

fn lines<T: fmt::Display>(items: &[T]) -> String {
    items.iter().map(|item| format!("\n  {item}")).collect()
}

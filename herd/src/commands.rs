//! The subcommands: what each asks of the user, and how it runs.

pub(crate) mod admin;
pub(crate) mod bench;
pub(crate) mod chaos;
pub(crate) mod chat;
pub(crate) mod coordinator;
pub(crate) mod drain;
mod etcd;
mod links;
pub(crate) mod logits;
mod parts;
mod processes;
pub(crate) mod rebalance;
pub(crate) mod router;
pub(crate) mod scale;
pub(crate) mod status;
pub(crate) mod synth;
pub(crate) mod up;
pub(crate) mod worker;

use kernels::Dtype;

/// The small trained model of the repository.
pub(crate) const DEFAULT_MODEL: &str = "models/toy-maverick";
/// Where `herd up` listens unless told otherwise.
pub(crate) const DEFAULT_LISTEN: &str = "127.0.0.1:8000";

/// Arithmetic of the activations.
#[derive(Clone, Copy, clap::ValueEnum)]
pub(crate) enum DtypeArg {
    F32,
    Bf16,
}

impl From<DtypeArg> for Dtype {
    fn from(arg: DtypeArg) -> Self {
        match arg {
            DtypeArg::F32 => Self::F32,
            DtypeArg::Bf16 => Self::Bf16,
        }
    }
}

/// Marks an error as the fault of the input; the text is its context.
#[derive(Debug)]
pub(crate) struct BadInput(pub(crate) String);

impl std::fmt::Display for BadInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadInput {}

//! Why a worker cannot do what it is asked to.

use crate::finite::NonFinite;
use crate::weights::ModelError;
use all2all::{ExchangeError, Fault};
use ids::Epoch;
use kernels::DeviceError;

/// Why a rank cannot start, or a step failed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("exchange: {0}")]
    Exchange(#[from] ExchangeError),
    #[error("placement: {0}")]
    Routes(#[from] all2all::RoutesError),
    #[error("step failed: {0}")]
    Step(Fault),
    #[error("shares: {0}")]
    Parts(#[from] all2all::PartsError),
    #[error("{0}")]
    NonFinite(NonFinite),
    #[error("a GPU cannot serve this model: {0}")]
    Unsupported(String),
    #[error("the worker has no rank yet")]
    Unseated,
    #[error("the step belongs to {got}, the worker serves {serving:?}")]
    Epoch { got: Epoch, serving: Option<Epoch> },
    #[error("there are no copies here of the sequences {0:?}; they have to be computed again")]
    Missing(Vec<u64>),
    #[error("{0}")]
    Io(String),
}

impl EngineError {
    /// What the exchange saw, if it was the exchange.
    #[must_use]
    pub fn fault(&self) -> Option<&Fault> {
        match self {
            Self::Exchange(ExchangeError::Faulted(fault)) | Self::Step(fault) => Some(fault),
            Self::Exchange(
                ExchangeError::StaleEpoch { .. }
                | ExchangeError::NotReady { .. }
                | ExchangeError::Poisoned { .. }
                | ExchangeError::Join { .. },
            )
            | Self::Model(_)
            | Self::Device(_)
            | Self::Routes(_)
            | Self::Parts(_)
            | Self::NonFinite(_)
            | Self::Unsupported(_)
            | Self::Unseated
            | Self::Epoch { .. }
            | Self::Missing(_)
            | Self::Io(_) => None,
        }
    }
}

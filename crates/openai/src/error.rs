//! The error object of the OpenAI interface and the HTTP status that goes with it.
//!
//! A message says what was wrong, what is allowed and what to do about it: most readers see it in
//! a stack trace of a client library and nowhere else.

use serde_json::json;

/// What a client did wrong, or what the server lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    InvalidRequest,
    /// A field that is known but not served by this version.
    Unsupported,
    ContextLength,
    ModelNotFound,
    /// No such path.
    PathNotFound,
    MethodNotAllowed,
    BodyTooLarge,
    QueueFull {
        retry_after_s: u32,
    },
    NotReady {
        retry_after_s: u32,
    },
    Internal,
}

impl ErrorKind {
    /// The HTTP status.
    #[must_use]
    pub fn status(self) -> u16 {
        match self {
            Self::InvalidRequest | Self::Unsupported | Self::ContextLength => 400,
            Self::ModelNotFound | Self::PathNotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::BodyTooLarge => 413,
            Self::QueueFull { .. } => 429,
            Self::Internal => 500,
            Self::NotReady { .. } => 503,
        }
    }

    /// Seconds for the header `Retry-After`, where trying again can help.
    #[must_use]
    pub fn retry_after_s(self) -> Option<u32> {
        match self {
            Self::QueueFull { retry_after_s } | Self::NotReady { retry_after_s } => {
                Some(retry_after_s)
            }
            Self::InvalidRequest
            | Self::Unsupported
            | Self::ContextLength
            | Self::ModelNotFound
            | Self::PathNotFound
            | Self::MethodNotAllowed
            | Self::BodyTooLarge
            | Self::Internal => None,
        }
    }

    fn type_name(self) -> &'static str {
        match self {
            Self::InvalidRequest
            | Self::Unsupported
            | Self::ContextLength
            | Self::ModelNotFound
            | Self::PathNotFound
            | Self::MethodNotAllowed
            | Self::BodyTooLarge => "invalid_request_error",
            Self::QueueFull { .. } => "rate_limit_error",
            Self::NotReady { .. } | Self::Internal => "server_error",
        }
    }

    fn code(self) -> &'static str {
        match self {
            Self::InvalidRequest => "invalid_value",
            Self::Unsupported => "unsupported_value",
            Self::ContextLength => "context_length_exceeded",
            Self::ModelNotFound => "model_not_found",
            Self::PathNotFound => "not_found",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::BodyTooLarge => "request_too_large",
            Self::QueueFull { .. } => "rate_limit_exceeded",
            Self::NotReady { .. } => "not_ready",
            Self::Internal => "internal_error",
        }
    }
}

/// An answer that is an error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    pub kind: ErrorKind,
    pub message: String,
    /// The field at fault, where it is one.
    pub param: Option<String>,
}

impl ApiError {
    /// An error that is no single field's fault.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), param: None }
    }

    /// An error of the field `param`.
    pub fn of(kind: ErrorKind, param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(kind, message) }
    }

    /// The error object.
    #[must_use]
    pub fn json(&self) -> String {
        let (r#type, code) = (self.kind.type_name(), self.kind.code());
        let Self { kind: _, message, param } = self;
        json!({ "error": { "message": message, "type": r#type, "param": param, "code": code } })
            .to_string()
    }
}

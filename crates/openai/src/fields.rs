//! Reads checked values out of a JSON object. `null` means the same as a missing field.
//!
//! Every refusal names the field, the value, what is allowed and the remedy.

use crate::{ApiError, ErrorKind};
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// Characters of a refused value that its message repeats.
const SHOWN_MAX: usize = 60;

/// The fields of a request.
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let refuse = |why: String| ApiError::new(ErrorKind::InvalidRequest, why);
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self(map)),
            Ok(other) => Err(refuse(format!(
                "the body is {}, but must be a JSON object; send the request's fields in `{{}}`",
                shown(&other)
            ))),
            Err(error) => {
                Err(refuse(format!("the body is not valid JSON: {error}; correct it there")))
            }
        }
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    pub(crate) fn required(&self, name: &str) -> Result<&Value, ApiError> {
        let missing = || format!("`{name}` is missing; the request needs it");
        self.get(name).ok_or_else(|| ApiError::of(ErrorKind::InvalidRequest, name, missing()))
    }

    /// Whether the field has content: not missing, `null`, `false`, `{}` or `[]`.
    pub(crate) fn asks_for(&self, name: &str) -> bool {
        self.get(name).is_some_and(|value| match value {
            Value::Null => false,
            Value::Bool(on) => *on,
            Value::Number(_) => true,
            Value::String(text) => !text.is_empty(),
            Value::Array(items) => !items.is_empty(),
            Value::Object(map) => !map.is_empty(),
        })
    }

    pub(crate) fn flag(&self, name: &str) -> Result<Option<bool>, ApiError> {
        self.read(name, "true or false", Value::as_bool)
    }

    pub(crate) fn text(&self, name: &str) -> Result<Option<&str>, ApiError> {
        self.read(name, "a string", Value::as_str)
    }

    pub(crate) fn number(
        &self,
        name: &str,
        range: RangeInclusive<f32>,
    ) -> Result<Option<f32>, ApiError> {
        let allowed = format!("a number from {} to {}", range.start(), range.end());
        self.read(name, &allowed, |value| as_f32(value).filter(|number| range.contains(number)))
    }

    /// A number above 0, at most 1.
    pub(crate) fn share(&self, name: &str) -> Result<Option<f32>, ApiError> {
        let inside = |number: &f32| 0.0 < *number && *number <= 1.0;
        self.read(name, "a number above 0 and at most 1", |value| as_f32(value).filter(inside))
    }

    pub(crate) fn count(
        &self,
        name: &str,
        range: RangeInclusive<u32>,
    ) -> Result<Option<u32>, ApiError> {
        let allowed = match *range.end() {
            u32::MAX => format!("a whole number of at least {}", range.start()),
            end => format!("a whole number from {} to {end}", range.start()),
        };
        self.read(name, &allowed, |value| as_u32(value).filter(|count| range.contains(count)))
    }

    pub(crate) fn read<'a, T>(
        &'a self,
        name: &str,
        allowed: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| wrong(name, value, allowed))
    }
}

/// The error of a field whose value is not what is allowed.
pub(crate) fn wrong(name: &str, value: &Value, allowed: &str) -> ApiError {
    let message = format!("`{name}` is {}, but must be {allowed}; correct the field", shown(value));
    ApiError::of(ErrorKind::InvalidRequest, name, message)
}

/// The error of a field that this version does not serve.
pub(crate) fn unsupported(name: &str, what: &str) -> ApiError {
    let message = format!("{what} not supported yet; leave `{name}` out");
    ApiError::of(ErrorKind::Unsupported, name, message)
}

pub(crate) fn as_u32(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|count| u32::try_from(count).ok())
}

pub(crate) fn as_f32(value: &Value) -> Option<f32> {
    #[expect(clippy::cast_possible_truncation, reason = "sampling computes in f32")]
    let number = value.as_f64()? as f32;
    number.is_finite().then_some(number)
}

fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

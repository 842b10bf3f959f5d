//! Typed access to the fields of one JSON object, with errors that say where and what to do.
//!
//! `null` counts as missing, because transformers writes it for "not set". The exceptions are
//! the chunk size, where `null` switches chunking off, and the temperature switch, where Python
//! takes `None` for false.

use super::{ConfigError, Missing};
use serde_json::{Map, Value};

/// One object of the file; `prefix` is its path with a closing dot, for messages.
#[derive(Clone)]
pub(super) struct Fields<'a> {
    file: &'a str,
    prefix: String,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(file: &'a str, prefix: &str, map: &'a Map<String, Value>) -> Self {
        Self { file, prefix: prefix.to_owned(), map }
    }

    pub(super) fn error(&self, name: &str, problem: &str, remedy: &str) -> ConfigError {
        ConfigError::Field {
            file: self.file.to_owned(),
            field: format!("{}{name}", self.prefix),
            value: self.map.get(name).map_or("missing".to_owned(), Value::to_string),
            problem: problem.to_owned(),
            remedy: remedy.to_owned(),
        }
    }

    pub(super) fn present(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// `read` of the value, or an error that it is not `kind`.
    fn typed<T>(
        &self,
        name: &str,
        kind: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.present(name) else { return Ok(None) };
        let wrong = || self.error(name, &format!("it must be {kind}"), "correct the field");
        read(value).map(Some).ok_or_else(wrong)
    }

    pub(super) fn object(&self, name: &str) -> Result<Option<Self>, ConfigError> {
        let map = self.typed(name, "an object", Value::as_object)?;
        let prefix = format!("{}{name}.", self.prefix);
        Ok(map.map(|map| Self { file: self.file, prefix, map }))
    }

    pub(super) fn list(&self, name: &str) -> Result<Option<&'a [Value]>, ConfigError> {
        self.typed(name, "a list", |value| value.as_array().map(Vec::as_slice))
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<&'a str>, ConfigError> {
        self.typed(name, "a text", Value::as_str)
    }

    pub(super) fn number(&self, name: &str) -> Result<Option<f64>, ConfigError> {
        self.typed(name, "a number", Value::as_f64)
    }

    pub(super) fn positive(&self, name: &str) -> Result<Option<f64>, ConfigError> {
        self.typed(name, "a positive number", |value| value.as_f64().filter(|&x| 0.0 < x))
    }

    pub(super) fn required(&self, name: &str) -> Result<f64, ConfigError> {
        let missing = || self.error(name, "this scaling needs it", "add the field");
        self.positive(name)?.ok_or_else(missing)
    }

    /// A whole number that may be 0.
    pub(super) fn count(&self, name: &str) -> Result<Option<usize>, ConfigError> {
        self.typed(name, "a whole number", |value| {
            value.as_u64().and_then(|count| usize::try_from(count).ok())
        })
    }

    /// A dimension. Anything above `u32` would overflow products of three of them.
    pub(super) fn size_or(&self, name: &str, missing: usize) -> Result<usize, ConfigError> {
        let size = self.typed(name, "a positive whole number below 2^32", |value| {
            value.as_u64().and_then(|size| u32::try_from(size).ok()).filter(|&size| 0 < size)
        })?;
        Ok(size.map_or(missing, |size| size as usize))
    }

    pub(super) fn size(&self, name: &str) -> Result<usize, ConfigError> {
        match self.size_or(name, 0)? {
            0 => {
                let remedy = "use the config.json that belongs to the checkpoint";
                Err(self.error(name, "the model's shape depends on it", remedy))
            }
            size => Ok(size),
        }
    }

    pub(super) fn token(&self, name: &str) -> Result<Option<u32>, ConfigError> {
        self.typed(name, "a whole number below 2^32", as_token)
    }

    /// One id or a list of them; missing is an empty list.
    pub(super) fn tokens(&self, name: &str) -> Result<Vec<u32>, ConfigError> {
        let tokens =
            self.typed(name, "an id or a list of ids", |value| match value.as_array() {
                Some(ids) => ids.iter().map(as_token).collect(),
                None => as_token(value).map(|id| vec![id]),
            })?;
        Ok(tokens.unwrap_or_default())
    }

    pub(super) fn flag(&self, name: &str, missing: Missing) -> Result<bool, ConfigError> {
        let flag = self.typed(name, "true or false", Value::as_bool)?;
        Ok(flag.unwrap_or(matches!(missing, Missing::True)))
    }

    /// Python's truth: also a number, or `null` for false.
    pub(super) fn loose_flag(&self, name: &str, missing: Missing) -> Result<bool, ConfigError> {
        if self.map.get(name).is_some_and(Value::is_null) {
            return Ok(false);
        }
        let flag = self.typed(name, "true, false or a number", |value| {
            value.as_bool().or_else(|| value.as_f64().map(|number| number != 0.0))
        })?;
        Ok(flag.unwrap_or(matches!(missing, Missing::True)))
    }

    /// Missing is 8192, `null` is "no chunks".
    pub(super) fn chunk_tokens(&self) -> Result<Option<u32>, ConfigError> {
        let name = "attention_chunk_size";
        if !self.map.contains_key(name) {
            return Ok(Some(8192));
        }
        self.typed(name, "a positive whole number or null", |value| {
            as_token(value).filter(|&tokens| 0 < tokens)
        })
    }

    /// A small positive number, computed with in `f32`.
    pub(super) fn epsilon(&self, name: &str, missing: f32) -> Result<f32, ConfigError> {
        #[expect(clippy::cast_possible_truncation, reason = "rounds to the nearest f32, as torch")]
        let epsilon = self.positive(name)?.map(|epsilon| epsilon as f32);
        Ok(epsilon.unwrap_or(missing))
    }
}

fn as_token(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

//! What the checkpoint's makers recommend for sampling: `generation_config.json`.
//!
//! A missing file or field is no recommendation, never an error: a request decides, and what it
//! leaves open comes from here.

use serde_json::{Map, Value};
use std::path::Path;

/// Recommended sampling and the special ids that end a text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// False means greedy decoding, whatever the other fields say.
    pub do_sample: bool,
    pub temperature: Option<f32>,
    /// In `(0, 1]`.
    pub top_p: Option<f32>,
    /// At least 1; transformers' 0 ("off") is `None`.
    pub top_k: Option<u32>,
    /// In `[0, 1]`.
    pub min_p: Option<f32>,
    pub eos: Vec<u32>,
    pub bos: Option<u32>,
    pub pad: Option<u32>,
}

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    #[error("cannot read {file}: {source}; correct its permissions or remove it")]
    Io { file: String, source: std::io::Error },
    #[error("{file} is not a JSON object: {source}; download the file again or remove it")]
    Json { file: String, source: serde_json::Error },
    #[error("{file}: `{field}` is {value}, which is not {expected}; correct or remove the field")]
    Field { file: String, field: &'static str, value: String, expected: &'static str },
}

impl GenerationConfig {
    /// Reads `generation_config.json` in `dir`; without the file all is unset.
    ///
    /// # Errors
    ///
    /// [`GenerationError`] if the file exists but says something that makes no sense.
    pub fn load(dir: &Path) -> Result<Self, GenerationError> {
        let path = dir.join("generation_config.json");
        let file = path.display().to_string();
        match std::fs::read_to_string(&path) {
            Ok(json) => Self::parse(&json, &file),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(GenerationError::Io { file, source }),
        }
    }

    fn parse(json: &str, file: &str) -> Result<Self, GenerationError> {
        let map: Map<String, Value> = serde_json::from_str(json)
            .map_err(|source| GenerationError::Json { file: file.to_owned(), source })?;
        let fields = Fields { file, map };
        let top_k = fields.read("top_k", "a whole number", as_id)?;
        Ok(Self {
            do_sample: fields.read("do_sample", "true or false", Value::as_bool)?.unwrap_or(false),
            temperature: fields.number("temperature", "a number from 0 to 100", 0.0..=100.0)?,
            top_p: fields.number(
                "top_p",
                "a number above 0 and at most 1",
                f32::MIN_POSITIVE..=1.0,
            )?,
            top_k: top_k.filter(|&k| k != 0),
            min_p: fields.number("min_p", "a number from 0 to 1", 0.0..=1.0)?,
            eos: fields.read("eos_token_id", "an id or a list of ids", as_ids)?.unwrap_or_default(),
            bos: fields.read("bos_token_id", "a token id", as_id)?,
            pad: fields.read("pad_token_id", "a token id", as_id)?,
        })
    }
}

struct Fields<'a> {
    file: &'a str,
    map: Map<String, Value>,
}

impl Fields<'_> {
    fn read<T>(
        &self,
        field: &'static str,
        expected: &'static str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, GenerationError> {
        let Some(value) = self.map.get(field).filter(|value| !value.is_null()) else {
            return Ok(None);
        };
        let file = || self.file.to_owned();
        let wrong =
            || GenerationError::Field { file: file(), field, value: value.to_string(), expected };
        read(value).map(Some).ok_or_else(wrong)
    }

    fn number(
        &self,
        field: &'static str,
        expected: &'static str,
        range: std::ops::RangeInclusive<f32>,
    ) -> Result<Option<f32>, GenerationError> {
        self.read(field, expected, |value| {
            #[expect(clippy::cast_possible_truncation, reason = "sampling computes in f32")]
            value.as_f64().map(|number| number as f32).filter(|number| range.contains(number))
        })
    }
}

fn as_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

fn as_ids(value: &Value) -> Option<Vec<u32>> {
    match value.as_array() {
        Some(ids) => ids.iter().map(as_id).collect(),
        None => as_id(value).map(|id| vec![id]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_file_is_read() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/scout-tiny");
        let expected = GenerationConfig {
            do_sample: true,
            temperature: Some(0.6),
            top_p: Some(0.9),
            top_k: None,
            min_p: None,
            eos: vec![401, 407, 408],
            bos: Some(400),
            pad: Some(418),
        };
        assert_eq!(GenerationConfig::load(&dir).unwrap(), expected);
    }

    #[test]
    fn missing_file_recommends_nothing() {
        let config = GenerationConfig::load(Path::new("/nowhere")).unwrap();
        assert_eq!(config, GenerationConfig::default());
    }

    #[test]
    fn single_id_and_zero_top_k() {
        let config = GenerationConfig::parse(r#"{"eos_token_id": 7, "top_k": 0}"#, "f").unwrap();
        assert_eq!((config.eos, config.top_k), (vec![7], None));
    }

    #[test]
    fn nonsense_is_refused_with_its_field() {
        for (json, expected) in [
            (
                r#"{"top_p": 0}"#,
                "f: `top_p` is 0, which is not a number above 0 and at most 1; correct or remove the field",
            ),
            (
                r#"{"temperature": -1}"#,
                "f: `temperature` is -1, which is not a number from 0 to 100; correct or remove the field",
            ),
            (
                r#"{"eos_token_id": [-1]}"#,
                "f: `eos_token_id` is [-1], which is not an id or a list of ids; correct or remove the field",
            ),
        ] {
            assert_eq!(GenerationConfig::parse(json, "f").unwrap_err().to_string(), expected);
        }
    }
}

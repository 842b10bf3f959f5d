//! Finds the weight files of a folder and reads their headers.
//!
//! A header is `u64` length, JSON, padding; the tensors' bytes follow. The JSON is checked by the
//! `safetensors` crate (offsets without gaps, sizes that match shapes); the file's length is
//! checked here, because only the header is in memory.

use super::{CheckpointError, Problem};
use safetensors::tensor::Metadata;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// As in the `safetensors` crate: a longer header is an attack or garbage.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// One weight file.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) file: File,
}

/// One tensor as a header describes it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) stored_name: String,
    pub(super) dtype: String,
    pub(super) shape: Vec<usize>,
    pub(super) file: usize,
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

/// Tensors that cannot be looked up since their file is broken.
pub(super) enum Unreadable {
    Everything,
    Tensors(BTreeSet<String>),
}

impl Unreadable {
    pub(super) fn holds(&self, logical: &str) -> bool {
        match self {
            Self::Everything => true,
            Self::Tensors(names) => names.contains(logical),
        }
    }
}

/// What a folder holds, by logical name.
pub(super) struct Listing {
    pub(super) shards: Vec<Shard>,
    pub(super) entries: BTreeMap<String, Entry>,
    pub(super) problems: Vec<Problem>,
    pub(super) unreadable: Unreadable,
}

/// Reads all headers of the folder; names that do not start with `prefix` are left out.
pub(super) fn list(dir: &Path, prefix: &str) -> Result<Listing, CheckpointError> {
    let single = dir.join("model.safetensors");
    let index = match single.exists() {
        true => None,
        false => Some(read_index(&dir.join("model.safetensors.index.json"))?),
    };
    let names: BTreeSet<&str> = match &index {
        None => BTreeSet::from(["model.safetensors"]),
        Some(index) => index.values().map(String::as_str).collect(),
    };
    let mut listing = Listing {
        shards: Vec::new(),
        entries: BTreeMap::new(),
        problems: Vec::new(),
        unreadable: Unreadable::Tensors(BTreeSet::new()),
    };
    let mut broken = BTreeSet::new();
    for name in names {
        match open_shard(dir, name, listing.shards.len()) {
            Ok((shard, entries)) => {
                listing.shards.push(shard);
                // A tensor counts where the index says that it is.
                let here = |entry: &Entry| match &index {
                    None => true,
                    Some(index) => index.get(&entry.stored_name).is_some_and(|file| file == name),
                };
                for entry in entries.into_iter().filter(here) {
                    if let Some(logical) = entry.stored_name.strip_prefix(prefix) {
                        listing.entries.insert(logical.to_owned(), entry);
                    }
                }
            }
            Err(problem) => {
                broken.insert(name);
                listing.problems.push(problem);
            }
        }
    }
    listing.unreadable = match &index {
        None if !broken.is_empty() => Unreadable::Everything,
        None => Unreadable::Tensors(BTreeSet::new()),
        Some(index) => {
            let lost = index.iter().filter(|(_, file)| broken.contains(file.as_str()));
            let logical = lost.filter_map(|(name, _)| name.strip_prefix(prefix));
            Unreadable::Tensors(logical.map(str::to_owned).collect())
        }
    };
    Ok(listing)
}

/// `weight_map` of the index: tensor to file.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, CheckpointError> {
    let broken = |reason: String| CheckpointError::Header { path: path.to_owned(), reason };
    let text = std::fs::read_to_string(path).map_err(|source| {
        // The commonest cause is a wrong folder, so the message names both possible files.
        let message = format!("no model.safetensors beside it, and: {source}");
        let source = std::io::Error::new(source.kind(), message);
        CheckpointError::Io { path: path.to_owned(), source }
    })?;
    let index: Map<String, Value> =
        serde_json::from_str(&text).map_err(|error| broken(format!("not JSON: {error}")))?;
    let map = index.get("weight_map").cloned().unwrap_or_default();
    serde_json::from_value(map)
        .map_err(|error| broken(format!("`weight_map` must name a file for each tensor: {error}")))
}

fn open_shard(dir: &Path, name: &str, index: usize) -> Result<(Shard, Vec<Entry>), Problem> {
    let path = dir.join(name);
    let missing = |error: std::io::Error| Problem::MissingFile {
        file: name.to_owned(),
        reason: error.to_string(),
    };
    let broken = |reason: String| Problem::BrokenHeader { file: name.to_owned(), reason };
    let file = File::open(&path).map_err(missing)?;
    let found = file.metadata().map_err(missing)?.len();
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0)
        .map_err(|_| broken(format!("{found} bytes are no weight file")))?;
    let header_bytes = u64::from_le_bytes(length);
    if HEADER_BYTES_MAX < header_bytes {
        return Err(broken(format!("a header of {header_bytes} bytes; not a weight file")));
    }
    let mut header = vec![0; usize::try_from(header_bytes).expect("at most 100 MB")];
    file.read_exact_at(&mut header, 8)
        .map_err(|_| broken(format!("{found} bytes end within the header")))?;
    let metadata: Metadata = serde_json::from_slice(&header)
        .map_err(|error| broken(format!("the header is not valid: {error}")))?;
    let data = 8 + header_bytes;
    let expected = data + metadata.data_len() as u64;
    if expected != found {
        return Err(Problem::Length { file: name.to_owned(), expected, found });
    }
    let entry = |name: String| {
        let info = metadata.info(&name).expect("the name comes from the same header");
        Entry {
            dtype: info.dtype.to_string(),
            shape: info.shape.clone(),
            file: index,
            offset: data + info.data_offsets.0 as u64,
            bytes: (info.data_offsets.1 - info.data_offsets.0) as u64,
            stored_name: name,
        }
    };
    let entries = metadata.offset_keys().into_iter().map(entry).collect();
    Ok((Shard { name: name.to_owned(), path, file }, entries))
}

//! The text of the kernels.

use super::image_cache::Fnv;
use std::hash::Hasher;

/// What every kernel begins with.
const PRELUDE: &str = include_str!("kernels/prelude.cuh");

/// A file of kernels.
#[derive(Debug, Clone, Copy)]
pub struct Source {
    pub name: &'static str,
    /// What it shares with other files.
    shared: &'static str,
    text: &'static str,
}

macro_rules! sources {
    ($($name:literal $(with $($shared:literal)+)?),* $(,)?) => {
        &[$(Source {
            name: $name,
            shared: concat!($($(include_str!(concat!("kernels/", $shared, ".cuh"))),+)?),
            text: include_str!(concat!("kernels/", $name, ".cu")),
        }),*]
    };
}

/// All kernels.
pub const SOURCES: &[Source] = sources![
    "attention_f32",
    "elementwise",
    "embed",
    "finite",
    "gate",
    "linear_f32",
    "kv_rows" with "cache",
    "positions" with "cache",
    "read",
    "rms_norm",
    "sample",
    "dispatch" with "rows",
    "linear_bf16" with "tiles",
    "experts" with "rows" "tiles",
    "experts_f32" with "rows",
    "attention_bf16",
];

/// How the definition of a kernel begins.
const BEGINS: &str = "extern \"C\" __global__ void ";

impl Source {
    /// What a compiler is given.
    #[must_use]
    pub fn text(&self) -> String {
        let Self { name, shared, text } = self;
        format!(
            "{PRELUDE}\n#line 1 \"shared with {name}.cu\"\n{shared}\n#line 1 \"{name}.cu\"\n{text}"
        )
    }

    /// The kernels in the file.
    pub fn kernels(&self) -> impl Iterator<Item = &'static str> {
        self.text.split(BEGINS).skip(1).map(|rest| {
            let rest = match rest.strip_prefix("__launch_bounds__(") {
                Some(bounded) => bounded.split_once(") ").map_or("", |(_, rest)| rest),
                None => rest,
            };
            rest.split('(').next().unwrap_or_default()
        })
    }
}

/// Of all kernels' text, by which the layout of tiled weights goes, too: processes with the same one compute alike, and may
/// take each other's weights.
#[must_use]
pub fn fingerprint() -> u64 {
    fingerprint_of(SOURCES.iter().map(Source::text))
}

fn fingerprint_of(texts: impl Iterator<Item = String>) -> u64 {
    let mut hash = Fnv::default();
    texts.for_each(|text| hash.write(text.as_bytes()));
    hash.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_kernel_has_a_name_of_its_own() {
        let names: Vec<&str> = SOURCES.iter().flat_map(Source::kernels).collect();
        assert!(names.iter().all(|name| name.starts_with("herd_")), "{names:?}");
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len(), "{names:?}");
        assert!(SOURCES.iter().all(|source| source.kernels().next().is_some()));
    }

    #[test]
    fn any_change_of_a_kernel_changes_the_fingerprint() {
        let of = |texts: &[&str]| fingerprint_of(texts.iter().map(|&text| text.into()));
        // As published for FNV-1a.
        assert_eq!(of(&["foobar"]), 0x8594_4171_f739_67e8);
        assert_ne!(of(&["a", "b"]), of(&["a", "c"]));
        assert_ne!(fingerprint(), of(&[]));
    }
}

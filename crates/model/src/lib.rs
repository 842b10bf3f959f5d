//! Llama 4 as files and as numbers: configuration, checkpoint, tokenizer, chat template.
//!
//! What the published files may look like is decided here and nowhere else: both packagings, both
//! spellings of the configuration, fused and FP8 experts. The rest of herd sees [`config::Config`]
//! and the logical tensor names of [`checkpoint::names`].

pub mod checkpoint;
pub mod config;
pub mod footprint;
pub mod forward;
pub mod generation;
pub mod load;
pub mod synth;
pub mod template;
pub mod tokenizer;
pub mod weights;

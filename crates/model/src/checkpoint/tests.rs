//! Golden checkpoints open as published; damaged copies are described completely.

use super::names::{self, Attention, Fused, Mlp};
use super::*;
use std::fs;
use std::path::PathBuf;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

fn open(dir: &Path) -> Result<Checkpoint, CheckpointError> {
    Checkpoint::open(dir, &Config::load(dir).unwrap())
}

/// A copy of a golden checkpoint that the test may damage; removed when dropped.
struct Copy(PathBuf);

impl Copy {
    #[track_caller]
    fn of(name: &str, test: &str) -> Self {
        let dir =
            std::env::temp_dir().join(format!("herd-checkpoint-{test}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        for entry in fs::read_dir(golden(name)).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
        }
        Self(dir)
    }

    fn edit(&self, file: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let path = self.0.join(file);
        let mut bytes = fs::read(&path).unwrap();
        change(&mut bytes);
        fs::write(path, bytes).unwrap();
    }

    /// Replaces text in a header; both must have the same length, so that offsets stay.
    fn edit_text(&self, file: &str, from: &str, to: &str) {
        assert_eq!(from.len(), to.len());
        self.edit(file, |bytes| {
            let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).expect("found");
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        });
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[track_caller]
fn check_refused(dir: &Path, lines: &[&str]) {
    let error = open(dir).unwrap_err().to_string();
    let mut found: Vec<&str> = error.lines().skip(1).map(str::trim).collect();
    found.sort_unstable();
    assert_eq!(found, lines, "{error}");
}

#[test]
fn golden_checkpoints_open_and_verify() {
    for (name, format, tensors) in [
        ("maverick-tiny", ExpertFormat::Fused, 3 + 6 * 6 + 3 * 3 + 3 * 6),
        ("scout-tiny", ExpertFormat::Fused, 3 + 5 * (6 + 6)),
        ("maverick-tiny-128e", ExpertFormat::Fused, 3 + 4 * 6 + 2 * 3 + 2 * 6),
        ("fp8-tiny", ExpertFormat::PerExpertFp8, 3 + 4 * 6 + 2 * 3 + 2 * (4 + 8 * 6)),
        ("vision-tiny", ExpertFormat::Fused, 3 + 4 * 6 + 2 * 3 + 2 * 6),
        ("bf16-tiny", ExpertFormat::Fused, 3 + 4 * 6 + 2 * 3 + 2 * 6),
    ] {
        let config = Config::load(&golden(name)).unwrap();
        let checkpoint = Checkpoint::open(&golden(name), &config).unwrap();
        assert_eq!(checkpoint.tensors().count(), tensors, "{name}");
        for layer in 0..config.layers {
            assert_eq!(checkpoint.expert_format(layer), config.moe[layer].then_some(format));
        }
        let last = AtomicU64::new(0);
        let progress = |done: u64, total: u64| {
            assert_eq!(total, checkpoint.bytes());
            last.fetch_max(done, Ordering::Relaxed);
        };
        checkpoint.verify(&progress).unwrap();
        assert_eq!(last.into_inner(), checkpoint.bytes());
        assert_eq!(checkpoint.bytes_read(), checkpoint.bytes());
    }
}

#[test]
fn reads_are_the_bytes_of_the_file() {
    let dir = golden("maverick-tiny-128e");
    let checkpoint = open(&dir).unwrap();
    let info = checkpoint.tensor(&names::fused_experts(3, Fused::GateUp)).unwrap();
    assert_eq!((info.dtype, info.shape.as_slice()), (Dtype::Bf16, &[128, 64, 32][..]));
    let bytes = fs::read(dir.join("model-00003-of-00004.safetensors")).unwrap();
    let data = &bytes[bytes.len() - 128 * 64 * 32 * 2..];
    let mut out = vec![0; 1000];
    checkpoint.read_at(info, 77, &mut out).unwrap();
    assert_eq!(out, data[77..1077]);
    assert_eq!(checkpoint.bytes_read(), 1000);
}

#[test]
#[should_panic(expected = "read to 257 of 256 bytes")]
fn read_beyond_the_tensor_is_a_bug() {
    let checkpoint = open(&golden("maverick-tiny")).unwrap();
    let info = checkpoint.tensor(names::NORM).unwrap();
    let _ = checkpoint.read_at(info, 1, &mut [0; 256]);
}

#[test]
fn all_problems_are_told_at_once() {
    let copy = Copy::of("maverick-tiny-128e", "all");
    fs::remove_file(copy.0.join("model-00001-of-00004.safetensors")).unwrap();
    copy.edit("model-00003-of-00004.safetensors", |bytes| bytes.truncate(bytes.len() - 1));
    copy.edit_text(
        "model-00004-of-00004.safetensors",
        r#""BF16","shape":[512,64]"#,
        r#""BF16","shape":[64,512]"#,
    );
    copy.edit_text(
        "model-00002-of-00004.safetensors",
        r#""BF16","shape":[512,64]"#,
        r#""I16","shape" :[512,64]"#,
    );
    copy.edit_text(
        "model-00002-of-00004.safetensors",
        "0.feed_forward.up_proj",
        "0.feed_forward.xx_proj",
    );
    check_refused(
        &copy.0,
        &[
            "language_model.model.layers.0.feed_forward.up_proj.weight: missing, expected [96, 64]",
            "model-00001-of-00004.safetensors: cannot be opened: No such file or directory (os error 2)",
            "model-00002-of-00004.safetensors: language_model.model.embed_tokens.weight: type I16, expected F32 or BF16 or F16",
            "model-00003-of-00004.safetensors: 524463 bytes instead of 524464 (download cut short or overwritten)",
            "model-00004-of-00004.safetensors: language_model.lm_head.weight: shape [64, 512], expected [512, 64]",
        ],
    );
}

#[test]
fn single_truncated_file_is_one_problem() {
    let copy = Copy::of("maverick-tiny", "truncated");
    copy.edit("model.safetensors", |bytes| bytes.truncate(100_000));
    let line =
        "model.safetensors: 100000 bytes instead of 1937712 (download cut short or overwritten)";
    check_refused(&copy.0, &[line]);
    copy.edit("model.safetensors", |bytes| bytes.truncate(5000));
    check_refused(&copy.0, &["model.safetensors: 5000 bytes end within the header"]);
    copy.edit("model.safetensors", |bytes| bytes.truncate(3));
    check_refused(&copy.0, &["model.safetensors: 3 bytes are no weight file"]);
}

#[test]
fn folder_without_weights_says_what_is_looked_for() {
    let dir = golden("");
    let config = Config::load(&golden("maverick-tiny")).unwrap();
    let error = Checkpoint::open(&dir, &config).unwrap_err().to_string();
    assert!(
        error.contains("model.safetensors.index.json: no model.safetensors beside it"),
        "{error}"
    );
}

#[test]
fn fp8_experts_need_their_scales() {
    let copy = Copy::of("fp8-tiny", "scales");
    copy.edit_text(
        "model.safetensors",
        "experts.3.up_proj.weight_scale",
        "experts.3.up_proj.weight_xxxxx",
    );
    copy.edit_text("model.safetensors", r#""shape":[40,1]"#, r#""shape":[1,40]"#);
    check_refused(
        &copy.0,
        &[
            "language_model.model.layers.1.feed_forward.experts.3.up_proj.weight_scale: missing, expected [40, 1]",
            "model.safetensors: language_model.model.layers.1.feed_forward.experts.0.gate_proj.weight_scale: shape [1, 40], expected [40, 1]",
        ],
    );
}

#[test]
fn scales_may_have_one_dimension() {
    let copy = Copy::of("fp8-tiny", "rank-one");
    copy.edit_text("model.safetensors", r#""shape":[40,1]"#, r#""shape":[40  ]"#);
    let checkpoint = open(&copy.0).unwrap();
    let scale = checkpoint.tensor(&names::expert_scale(1, 0, Mlp::Gate)).unwrap();
    assert_eq!(scale.shape, [40]);
}

#[test]
fn values_that_are_not_finite_are_counted_and_placed() {
    let copy = Copy::of("maverick-tiny", "nan");
    let checkpoint = open(&copy.0).unwrap();
    let place = |name: &str, element: u64| {
        let at = checkpoint.tensor(name).unwrap().offset + 4 * element;
        usize::try_from(at).unwrap()
    };
    let query = names::attention(2, Attention::Query);
    let (norm, first, second) = (place(names::NORM, 63), place(&query, 100), place(&query, 4000));
    copy.edit("model.safetensors", |bytes| {
        for (at, value) in [(norm, f32::NEG_INFINITY), (first, f32::NAN), (second, f32::INFINITY)] {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
    });
    let error = open(&copy.0).unwrap().verify(&|_, _| ()).unwrap_err().to_string();
    let expected = "2 tensors hold values that are not finite, download their files again:\
        \n  model.safetensors: model.layers.2.self_attn.q_proj.weight: 2 values, the first at element 100\
        \n  model.safetensors: model.norm.weight: 1 values, the first at element 63";
    assert_eq!(error, expected);
}

#[test]
fn every_type_knows_its_values_that_are_not_finite() {
    let pattern = |dtype: Dtype| -> u64 {
        let size = dtype.bytes();
        let bytes: Vec<u8> = match size {
            1 => (0..=255).collect(),
            _ => (0..=u16::MAX)
                .flat_map(|bits| [vec![0; size - 2], bits.to_le_bytes().to_vec()].concat())
                .collect(),
        };
        verify_scan(dtype, &bytes)
    };
    // All 16-bit patterns (the upper halves for F32) and all bytes. F32 and BF16: 2^7 patterns of
    // each sign have the full exponent; F16: 2^10; e4m3fn has NaN only, one of each sign.
    assert_eq!(pattern(Dtype::F32), 2 * 128);
    assert_eq!(pattern(Dtype::Bf16), 2 * 128);
    assert_eq!(pattern(Dtype::F16), 2 * 1024);
    assert_eq!(pattern(Dtype::F8E4M3), 2);
}

fn verify_scan(dtype: Dtype, bytes: &[u8]) -> u64 {
    super::verify::scan(dtype, bytes).map_or(0, |(count, _)| count)
}

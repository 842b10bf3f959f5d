//! What is written opens again, is the same for the same seed, and looks random.

use super::numbers::to_fp8;
use super::*;
use crate::checkpoint::names::{Attention, Mlp};
use crate::checkpoint::{Checkpoint, Dtype};
use crate::template::{ChatTemplate, Conversation};
use crate::tokenizer::{SkipSpecial, Tokenizer};
use std::fs;

fn golden_config(name: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    fs::read_to_string(root.join(name).join("config.json")).unwrap()
}

fn options() -> SynthOptions {
    SynthOptions {
        seed: 7,
        dtype: WeightType::F32,
        experts: SynthExperts::Fused,
        shard_bytes_max: 5_000_000_000,
        tokenizer_from: None,
    }
}

/// A folder that is removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("herd-synth-{test}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        Self(dir)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[track_caller]
fn check(test: &str, config: &str, options: &SynthOptions) -> (Folder, Checkpoint, Summary) {
    let folder = Folder::new(test);
    let last = AtomicU64::new(0);
    let progress = |done: u64, _: u64| {
        last.fetch_max(done, Ordering::Relaxed);
    };
    let summary = write(config, &folder.0, options, &progress).unwrap();
    assert_eq!(last.into_inner(), summary.bytes);
    let config = Config::load(&folder.0).unwrap();
    let checkpoint = Checkpoint::open(&folder.0, &config).unwrap();
    checkpoint.verify(&|_, _| ()).unwrap();
    assert_eq!(checkpoint.bytes(), summary.bytes);
    assert_eq!(checkpoint.tensors().count(), summary.tensors);
    (folder, checkpoint, summary)
}

fn read(checkpoint: &Checkpoint, name: &str) -> Vec<u8> {
    let info = checkpoint.tensor(name).unwrap();
    let mut bytes = vec![0; usize::try_from(info.bytes).unwrap()];
    checkpoint.read_at(info, 0, &mut bytes).unwrap();
    bytes
}

#[test]
fn without_files_the_weights_are_the_same() {
    for (name, experts) in [("maverick-tiny", SynthExperts::Fused), ("fp8-tiny", SynthExperts::Fp8)]
    {
        let options = SynthOptions { dtype: WeightType::Bf16, experts, ..options() };
        let (_folder, written, _) = check(&format!("made-{name}"), &golden_config(name), &options);
        let config = Config::parse(&golden_config(name)).unwrap();
        let made = checkpoint(&config, &options);
        assert!(
            made.tensors()
                .map(|t| (&t.name, &t.shape, t.dtype))
                .eq(written.tensors().map(|t| (&t.name, &t.shape, t.dtype)))
        );
        for tensor in written.tensors() {
            assert_eq!(read(&made, &tensor.name), read(&written, &tensor.name), "{}", tensor.name);
            let mut part = [0; 8];
            made.read_at(tensor, tensor.bytes - 8, &mut part).unwrap();
            assert_eq!(part, read(&written, &tensor.name)[usize_of(tensor.bytes) - 8..]);
        }
        for layer in 0..config.layers {
            assert_eq!(made.expert_format(layer), written.expert_format(layer));
        }
    }
}

fn usize_of(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap()
}

#[test]
fn every_packaging_opens_again() {
    for (name, dtype, experts) in [
        ("maverick-tiny", WeightType::F32, SynthExperts::Fused),
        ("maverick-tiny-128e", WeightType::Bf16, SynthExperts::Fused),
        ("scout-tiny", WeightType::Bf16, SynthExperts::Fp8),
        ("fp8-tiny", WeightType::Bf16, SynthExperts::Fp8),
    ] {
        let options = SynthOptions { dtype, experts, ..options() };
        let (_folder, checkpoint, summary) = check(name, &golden_config(name), &options);
        assert_eq!(summary.files, ["model.safetensors"]);
        let format = match experts {
            SynthExperts::Fused => ExpertFormat::Fused,
            SynthExperts::Fp8 => ExpertFormat::PerExpertFp8,
        };
        assert_eq!(checkpoint.expert_format(1), Some(format));
    }
}

#[test]
fn same_seed_gives_the_same_values_whatever_the_shards_and_threads() {
    let config = golden_config("maverick-tiny-128e");
    let (_a, whole, _) = check("whole", &config, &options());
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let small = SynthOptions { shard_bytes_max: 300_000, ..options() };
    let (_b, sharded, summary) = one_thread.install(|| check("shards", &config, &small));
    assert!(5 < summary.files.len(), "{:?}", summary.files);
    let other = SynthOptions { seed: 8, ..options() };
    let (_c, other, _) = check("other", &config, &other);
    for tensor in whole.tensors() {
        let bytes = read(&whole, &tensor.name);
        assert!(bytes == read(&sharded, &tensor.name), "{}", tensor.name);
        assert!(bytes != read(&other, &tensor.name), "{}", tensor.name);
    }
}

#[test]
fn values_are_centred_with_the_deviation_promised() {
    let (_folder, checkpoint, _) = check("moments", &golden_config("maverick-tiny"), &options());
    for (name, mean, deviation) in [
        (names::EMBED.to_owned(), 0.0, 0.125),
        (names::dense(0, Mlp::Down), 0.0, (160.0_f64).sqrt().recip()),
        (names::attention(3, Attention::Query), 0.0, 0.125),
        (names::NORM.to_owned(), 1.0, 0.1),
    ] {
        let bytes = read(&checkpoint, &name);
        let (values, _) = bytes.as_chunks::<4>();
        let values: Vec<f64> = values.iter().map(|&b| f64::from(f32::from_le_bytes(b))).collect();
        let count = f64::from(u32::try_from(values.len()).unwrap());
        let found = values.iter().sum::<f64>() / count;
        let variance = values.iter().map(|v| (v - found).powi(2)).sum::<f64>() / count;
        // Four standard errors of the mean, and about four of the deviation.
        assert!((found - mean).abs() < 4.0 * deviation / count.sqrt(), "{name}: mean {found}");
        let error = (variance.sqrt() / deviation - 1.0).abs();
        assert!(error < 4.0 / (2.0 * count).sqrt(), "{name}: deviation {}", variance.sqrt());
    }
}

#[test]
fn fp8_rounds_to_the_nearest_value() {
    for (value, bits) in [
        (0.0, 0x00),
        (1.0, 0x38),
        (-1.0, 0xB8),
        (448.0, 0x7E),
        (1000.0, 0x7E),
        (1.0625, 0x38), // halfway between 1 and 1.125: even
        (1.1875, 0x3A), // halfway between 1.125 and 1.25: even
        (2.0_f32.powi(-9), 0x01),
        (2.0_f32.powi(-10), 0x00),
    ] {
        assert_eq!(to_fp8(value), bits, "{value}");
    }
}

#[test]
fn generated_tokenizer_serves_a_chat() {
    let (folder, checkpoint, summary) = check("chat", &golden_config("fp8-tiny"), &options());
    assert_eq!(summary.tokenizer, TokenizerOrigin::Generated);
    assert_eq!(checkpoint.tensor(names::NORM).unwrap().dtype, Dtype::F32);
    let tokenizer = Tokenizer::load(&folder.0).unwrap();
    let template = ChatTemplate::load(&folder.0).unwrap();
    assert_eq!(tokenizer.bos(), Some(400));
    let message = json!({ "role": "user", "content": "Grüße <|eot|>" });
    let conversation = Conversation::new(vec![message]);
    let ids = template.render_ids(&tokenizer, &conversation).unwrap();
    let special: Vec<u32> = ids.iter().copied().filter(|&id| tokenizer.is_special(id)).collect();
    assert_eq!(special, [400, 405, 406, 408, 405, 406]);
    let text = template.render(&conversation).unwrap();
    assert_eq!(tokenizer.decode(&ids, SkipSpecial::No), text);
}

#[test]
fn tokenizer_is_copied_if_it_fits() {
    let toy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/toy-maverick");
    let options = SynthOptions { tokenizer_from: Some(toy.clone()), ..options() };
    let large = fs::read_to_string(toy.join("config.json")).unwrap();
    let (folder, _, summary) = check("copied", &large, &options);
    assert_eq!(summary.tokenizer, TokenizerOrigin::Copied);
    assert_eq!(Tokenizer::load(&folder.0).unwrap().vocab(), 2048);
    let (_folder, _, summary) = check("small", &golden_config("fp8-tiny"), &options);
    assert_eq!(summary.tokenizer, TokenizerOrigin::Generated);
}

#[test]
fn old_folder_is_left_alone() {
    let folder = Folder::new("old");
    fs::create_dir_all(&folder.0).unwrap();
    fs::write(folder.0.join("x"), "x").unwrap();
    let error = write(&golden_config("fp8-tiny"), &folder.0, &options(), &|_, _| ()).unwrap_err();
    assert!(matches!(error, SynthError::NotEmpty { .. }), "{error}");
}

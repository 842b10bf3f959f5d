//! The engine and the exchange against values of the reference implementation (transformers 5.23,
//! float32, eager attention): logits, chosen experts, greedy tokens. And law 1: the number of ranks,
//! of replicas and of tokens per step changes no bit.

#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use herd::logits::{Options, Outcome, max_difference, run};
use kernels::Dtype;
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use worker::Model;

/// Largest error of a logit in f32; the reference's own float64 twin differs by 3e-5.
const TOLERANCE_F32: f32 = 2e-4;

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn ids(bytes: &[u8]) -> Vec<u32> {
    let id = |b: &[u8]| u32::try_from(i64::from_le_bytes(b.try_into().unwrap())).unwrap();
    bytes.chunks_exact(8).map(id).collect()
}

const PLAIN: Options = Options { workers: 1, threads: 1, chunk: 512, greedy: 32, redundancy: 0 };

fn outcome(dir: &Path, dtype: Dtype, prompt: &[u32], options: Options) -> Outcome {
    let model = Model::open(dir, dtype).unwrap();
    run(&model, prompt, options).unwrap()
}

#[track_caller]
fn check_f32(name: &str, options: Options) {
    let dir = case(name);
    let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |name: &str| expected.tensor(name).unwrap();
    let prompt = ids(tensor("input_ids").data());
    let got = outcome(&dir, Dtype::F32, &prompt, options);

    let want = floats(tensor("logits").data());
    assert_eq!(got.logits.len(), want.len());
    let worst = max_difference(&got.logits, &want);
    assert!(worst <= TOLERANCE_F32, "{name}: a logit is off by {worst}");
    assert_eq!(got.greedy, ids(tensor("greedy_ids").data()), "{name}: greedy tokens");
    let mut layers = 0;
    for (moe_layer, layer) in moe_layers(&dir).into_iter().enumerate() {
        let want = ids(tensor(&format!("router.{layer}.expert")).data());
        let got: Vec<u32> = got.experts[moe_layer].iter().map(|&e| u32::from(e)).collect();
        assert_eq!(got, want, "{name}: experts of layer {layer}");
        layers += 1;
    }
    assert!(0 < layers, "no MoE layer was compared");
}

fn moe_layers(dir: &Path) -> Vec<usize> {
    model::config::Config::load(dir).unwrap().moe_layers()
}

#[test]
fn maverick_tiny() {
    check_f32("maverick-tiny", PLAIN);
}

#[test]
fn scout_tiny() {
    check_f32("scout-tiny", PLAIN);
}

#[test]
fn maverick_tiny_128_experts_over_4_ranks() {
    check_f32("maverick-tiny-128e", Options { workers: 4, chunk: 7, ..PLAIN });
}

#[test]
fn fp8_tiny() {
    check_f32("fp8-tiny", PLAIN);
}

#[test]
fn bf16_tiny_in_f32() {
    check_f32("bf16-tiny", PLAIN);
}

/// bf16 arithmetic strays no further from the f32 values than the reference's own bf16 run does.
#[test]
fn bf16_tiny_in_bf16() {
    let dir = case("bf16-tiny");
    let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let prompt = ids(expected.tensor("input_ids").unwrap().data());
    let got = outcome(&dir, Dtype::Bf16, &prompt, PLAIN);
    let worst = max_difference(&got.logits, &floats(expected.tensor("logits").unwrap().data()));
    assert!(0.0 < worst && worst <= 0.225, "a logit is off by {worst}");
}

#[test]
fn ranks_replicas_threads_and_chunks_change_no_bit() {
    for name in ["maverick-tiny", "scout-tiny", "fp8-tiny"] {
        let dir = case(name);
        let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
        let expected = SafeTensors::deserialize(&bytes).unwrap();
        let prompt = ids(expected.tensor("input_ids").unwrap().data());
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let want = outcome(&dir, dtype, &prompt, PLAIN);
            for (workers, chunk, redundancy, threads) in
                [(2, 1, 0, 1), (3, 5, 1, 1), (4, 16, 2, 2), (8, 33, 0, 1), (8, 3, 7, 1)]
            {
                let options = Options { workers, chunk, redundancy, threads, ..PLAIN };
                let got = outcome(&dir, dtype, &prompt, options);
                assert_eq!(got.greedy, want.greedy, "{name} {dtype} {options:?}");
                assert_eq!(got.experts, want.experts, "{name} {dtype} {options:?}");
                assert!(got.logits == want.logits, "{name} {dtype} {options:?}: other bits");
            }
        }
    }
}

//! The CUDA kernels and the host's side of them, on the emulated device: golden cases through the engine and the
//! exchange. In the f32 profile the device has the CPU's order of operations, so its bits are the CPU's.
//!
//! With `HERD_TEST_GPU` set to the number of a GPU, all this runs there.

#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

#[path = "cuda/lending.rs"]
mod lending;

use herd::logits::{Options, Outcome, max_difference, run};
use kernels::Dtype;
use kernels::cuda::Driver;
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use worker::{Gpu, Model, Platform};

const PLAIN: Options = Options { workers: 1, threads: 1, chunk: 512, greedy: 4, redundancy: 0 };

/// Where the program was built, or, on another machine, in the working directory.
fn case(name: &str) -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = if built.exists() { built } else { Path::new("tests") };
    folder.join("golden").join(name)
}

fn prompt(dir: &Path) -> Vec<u32> {
    let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let ids = expected.tensor("input_ids").unwrap().data();
    let id = |b: &[u8]| u32::try_from(i64::from_le_bytes(b.try_into().unwrap())).unwrap();
    ids.chunks_exact(8).map(id).collect()
}

/// The GPU, whose kernels are compiled once; or an emulated device that nobody else has.
fn device() -> Arc<Driver> {
    static REAL: LazyLock<Option<Arc<Driver>>> = LazyLock::new(|| {
        let number = std::env::var("HERD_TEST_GPU").ok()?;
        Some(Arc::new(Driver::open(number.parse().unwrap(), None).unwrap()))
    });
    REAL.clone().unwrap_or_else(|| Arc::new(Driver::emulated().unwrap()))
}

fn gpu() -> Platform {
    Platform::Cuda(Gpu::new(device()))
}

fn outcome(dir: &Path, (dtype, platform): (Dtype, Platform), options: Options) -> Outcome {
    let model = Model::open_for(dir, dtype, platform).unwrap();
    run(&model, &prompt(dir), options).unwrap()
}

#[track_caller]
fn check_f32(name: &str, options: Options) {
    let dir = case(name);
    let want = outcome(&dir, (Dtype::F32, Platform::Cpu), PLAIN);
    let got = outcome(&dir, (Dtype::F32, gpu()), options);
    assert_eq!(got.experts, want.experts, "{name}");
    assert_eq!(got.greedy, want.greedy, "{name}");
    let differ = got.logits.iter().zip(&want.logits).filter(|(a, b)| a.to_bits() != b.to_bits());
    assert_eq!((got.logits.len(), differ.count()), (want.logits.len(), 0), "{name}: other bits");
}

#[test]
fn maverick_tiny() {
    check_f32("maverick-tiny", PLAIN);
}

#[test]
fn scout_tiny_in_chunks() {
    check_f32("scout-tiny", Options { chunk: 11, ..PLAIN });
}

#[test]
fn maverick_tiny_128_experts_over_4_ranks() {
    check_f32("maverick-tiny-128e", Options { workers: 4, chunk: 7, ..PLAIN });
}

/// No further from the reference's f32 values than its own bf16 run is.
#[test]
fn bf16_tiny_in_bf16() {
    let dir = case("bf16-tiny");
    let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let want = expected.tensor("logits").unwrap().data();
    let want: Vec<f32> =
        want.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let got = outcome(&dir, (Dtype::Bf16, gpu()), PLAIN);
    let worst = max_difference(&got.logits, &want);
    assert!(0.0 < worst && worst <= 0.225, "a logit is off by {worst}");
}

/// FP8 weights stay FP8 on the device; widened on the CPU they are the same numbers. Rounding of the activations takes
/// both away from the f32 values, each in its own order of additions.
#[test]
fn fp8_tiny_in_bf16() {
    let dir = case("fp8-tiny");
    let exact = outcome(&dir, (Dtype::F32, Platform::Cpu), PLAIN);
    let off = |platform| {
        let got = outcome(&dir, (Dtype::Bf16, platform), PLAIN);
        max_difference(&got.logits, &exact.logits)
    };
    let (cpu, device) = (off(Platform::Cpu), off(gpu()));
    assert!(0.0 < device && device <= 2.0 * cpu, "a logit is off by {device}, on the CPU by {cpu}");
}

#[test]
fn fp8_experts_take_a_byte_per_weight_on_the_device() {
    let of = |name: &str, platform| {
        Model::open_for(&case(name), Dtype::Bf16, platform).unwrap().footprint()
    };
    let (cpu, fp8) = (of("fp8-tiny", Platform::Cpu), of("fp8-tiny", gpu()));
    assert_eq!((fp8.dense, fp8.experts), (cpu.dense, cpu.experts));
    // Scales are as large as before, and few.
    assert!(cpu.expert / 2 < fp8.expert && fp8.expert < cpu.expert * 6 / 10, "{fp8:?} {cpu:?}");
    assert_eq!(of("bf16-tiny", Platform::Cpu), of("bf16-tiny", gpu()));
}

#[test]
fn ranks_replicas_and_chunks_change_no_bit() {
    for name in ["maverick-tiny", "scout-tiny", "fp8-tiny"] {
        let dir = case(name);
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let want = outcome(&dir, (dtype, gpu()), PLAIN);
            for (workers, chunk, redundancy) in [(1, 1, 0), (2, 5, 0), (4, 33, 1)] {
                let options = Options { workers, chunk, redundancy, ..PLAIN };
                let got = outcome(&dir, (dtype, gpu()), options);
                assert_eq!(got.greedy, want.greedy, "{name} {dtype} {options:?}");
                assert!(got.logits == want.logits, "{name} {dtype} {options:?}: other bits");
            }
        }
    }
}

#[test]
fn fp8_tiny_over_2_ranks() {
    check_f32("fp8-tiny", Options { workers: 2, ..PLAIN });
}

/// Rows stay on the device, where nobody else sees what an expert makes of them; with several ranks each looks at its own.
#[test]
fn expert_that_gives_no_number_fails_the_step_and_is_named() {
    let from = case("maverick-tiny");
    let dir = std::env::temp_dir().join(format!("herd-not-finite-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    for entry in std::fs::read_dir(&from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
    }
    let file = dir.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let spoilt = {
        let all = SafeTensors::deserialize(&bytes).unwrap();
        let names = all.names();
        let name = names.iter().find(|name| name.ends_with("experts.down_proj")).unwrap();
        let data = all.tensor(name).unwrap().data().as_ptr_range();
        let start = bytes.as_ptr().addr();
        data.start.addr() - start..data.end.addr() - start
    };
    bytes[spoilt].fill(0xff);
    std::fs::write(&file, bytes).unwrap();
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let model = Model::open_for(&dir, dtype, gpu()).unwrap();
        for workers in [1, 3] {
            let options = Options { workers, ..PLAIN };
            let error = run(&model, &prompt(&from), options).unwrap_err().to_string();
            let place = "the result of the routed expert of MoE layer";
            assert!(error.contains(place), "{dtype} over {workers}: {error}");
        }
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

//! The CUDA kernels and the host's side of them, on the emulated device: golden cases through the engine and the
//! exchange. In the f32 profile the device has the CPU's order of operations, so its bits are the CPU's.
//!
//! With `HERD_TEST_GPU` set to the number of a GPU, all this runs there.

#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

#[path = "cuda/lending.rs"]
mod lending;

use herd::cluster::{Cluster, Config};
use herd::logits::{Options, Outcome, max_difference, run};
use kernels::Dtype;
use kernels::cuda::nvml::Nvml;
use kernels::cuda::{Driver, GraphFigures};
use model::synth::{SynthExperts, SynthOptions};
use router::engine::{Event, Generate, Sampling};
use safetensors::SafeTensors;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use worker::{Ended, Gpu, KvBlocks, Model, Platform};

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
        let options = kernels::cuda::Options { cache: None, wait_max: Duration::from_secs(30) };
        Some(Arc::new(Driver::open(number.parse().unwrap(), &options).unwrap()))
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

/// Within the second step, on a device that hangs in the midst of it.
const KERNELS_BEFORE_IT_HANGS: u64 = 150;

fn hanging() -> Platform {
    let wait_max = Duration::from_millis(300);
    let driver = Driver::emulated_until(KERNELS_BEFORE_IT_HANGS, wait_max).unwrap();
    Platform::Cuda(Gpu::new(Arc::new(driver)))
}

const HANGS: &str = "the emulated device has not finished within 0.3 s what it was given";

#[test]
fn kernel_that_never_ends_fails_the_step() {
    let model = Model::open_for(&case("maverick-tiny"), Dtype::Bf16, hanging()).unwrap();
    let options = Options { chunk: 7, ..PLAIN };
    let error = run(&model, &prompt(&case("maverick-tiny")), options).unwrap_err();
    assert!(format!("{error:#}").contains(HANGS), "{error:#}");
    assert!(model.platform.failure().unwrap().starts_with(HANGS));
}

/// A worker alone notices it at the end of a step, others where they read rows for each other.
#[tokio::test(flavor = "multi_thread")]
async fn kernel_that_never_ends_ends_the_worker() {
    for workers in [1, 2] {
        let ends = ends_of_hanging(workers).await;
        assert_eq!(ends.len(), usize::from(workers));
        for end in ends {
            assert!(matches!(&end, Ended::Failed(reason) if reason.starts_with(HANGS)), "{end:?}");
        }
    }
}

/// A cluster that is ready, of so many workers on this device.
async fn cluster(platform: Platform, workers: u16) -> Cluster {
    let model = Model::open_for(&case("maverick-tiny"), Dtype::Bf16, platform).unwrap();
    let kv = KvBlocks::plan(&model.config, model.dtype, 1 << 24, 4).unwrap();
    let config = Config {
        model: Arc::new(model),
        threads: 1,
        settings: control::Settings {
            workers_expected: workers,
            assemble_max: Duration::from_secs(60),
            adopt_max: Duration::ZERO,
            redundancy: 0,
            spare: 0,
            repair_after: Duration::from_secs(1),
            rebalance_every: None,
        },
        kv,
        step_tokens: 16,
        prefill_max: Duration::from_millis(100),
        sequences_max: 4,
        queue_max: 4,
        step_deadline: Duration::from_secs(20),
        address: "none".into(),
    };
    let cluster = Cluster::start(config).await.unwrap();
    until(|| cluster.engine.is_ready()).await;
    cluster
}

async fn until(is_so: impl Fn() -> bool) {
    let look = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), look).await.unwrap();
}

async fn ends_of_hanging(workers: u16) -> Vec<Ended> {
    let mut cluster = cluster(hanging(), workers).await;
    let request = Generate {
        prompt: prompt(&case("maverick-tiny")),
        tokens_max: 8,
        sampling: Sampling::greedy(),
        stop_tokens: Vec::new(),
        group: 1,
    };
    let _stream = cluster.engine.submit(request).await.unwrap();
    let ended = futures::future::join_all(cluster.workers.iter_mut().map(worker::Worker::ended));
    tokio::time::timeout(Duration::from_secs(60), ended).await.unwrap()
}

/// Of sequences that decode together, tokens are sampled from seeds.
async fn tokens_of(cluster: &Cluster) -> Vec<Vec<u32>> {
    let all = prompt(&case("maverick-tiny"));
    let streams = (0..3).map(|seed| {
        let sampling = Sampling { temperature: 0.9, seed, ..Sampling::greedy() };
        let prompt = all[..all.len() - 3 * usize::try_from(seed).unwrap()].to_vec();
        let request =
            Generate { prompt, tokens_max: 40, sampling, stop_tokens: Vec::new(), group: seed };
        async move {
            let mut stream = cluster.engine.submit(request).await.unwrap();
            let mut tokens = Vec::new();
            loop {
                match stream.next().await.unwrap() {
                    Event::Token(sampled) => tokens.push(sampled.token),
                    Event::End(_) => return tokens,
                    Event::Failed(text) | Event::Deposed(text) => panic!("{text}"),
                }
            }
        }
    });
    tokio::time::timeout(Duration::from_secs(60), futures::future::join_all(streams)).await.unwrap()
}

/// Goal: steps of as many sequences are one graph, however their contexts grow. Two ranks of one device make none.
#[tokio::test(flavor = "multi_thread")]
async fn steps_that_repeat_themselves_are_graphs_with_the_same_bits() {
    let mut heard = Vec::new();
    for workers in [1, 2] {
        let driver = device();
        let before = driver.graphs();
        let cluster = cluster(Platform::Cuda(Gpu::new(Arc::clone(&driver))), workers).await;
        heard.push(tokens_of(&cluster).await);
        let GraphFigures { made, replayed, refused, .. } = driver.graphs();
        let (made, replayed) = (made - before.made, replayed - before.replayed);
        match workers {
            1 => assert!(20 < replayed && made < replayed / 3, "{made} {replayed}"),
            _ => assert_eq!((made, replayed), (0, 0)),
        }
        assert_eq!(refused, None);
    }
    assert!(heard[0].iter().all(|tokens| tokens.len() == 40));
    assert_eq!(heard[0], heard[1]);
}

/// Weights that no file holds, a context that is filled before decoding is measured, and the kernels' own times.
#[test]
fn bench_counts_what_a_step_reads() {
    bench_counts_of(1);
    bench_counts_of(2);
}

#[track_caller]
fn bench_counts_of(workers: u16) {
    let text = std::fs::read_to_string(case("fp8-tiny").join("config.json")).unwrap();
    let config = model::config::Config::parse(&text).unwrap();
    let options = SynthOptions { experts: SynthExperts::Fp8, ..SynthOptions::default() };
    let model = Model::random(config, &options, Dtype::Bf16, gpu());
    let options = herd::bench::Options {
        workers,
        threads: 1,
        streams: vec![1, 3],
        context: 20,
        kernels: herd::bench::Kernels::Times,
        bandwidth: 1e9,
        prompt: 9,
        decode: 2,
        chunk: 8,
    };
    let mut lines = Vec::new();
    herd::bench::run(&model, &options, &mut |line| lines.push(line.clone())).unwrap();
    let cases: Vec<_> = lines.iter().map(|line| line["case"].as_str().unwrap()).collect();
    assert_eq!(cases, ["prefill", "decode", "decode-3"]);
    let footprint = model.footprint();
    let layers = model.config.moe_layers().len() as u64;
    let one = &lines[1];
    // One rank has the only row, and each layer sends it to one expert.
    assert_eq!(one["weight_bytes_per_step"], footprint.read + footprint.expert);
    assert_eq!(one["kernels"]["expert_bytes_per_step"], footprint.expert);
    let times = one["kernels"]["times"].as_array().unwrap();
    let launches = |name: &str| -> f64 {
        let of = times.iter().filter(|time| time["kernel"].as_str().unwrap().starts_with(name));
        of.map(|time| time["launches_per_step"].as_f64().unwrap()).sum()
    };
    assert_eq!(launches("herd_gate"), layers as f64, "of the rank with the row");
    // Two blocks of 16 positions, in the layers of either pool.
    let kv = KvBlocks { full: 2, chunked: 2 }.bytes(&model.config, Dtype::Bf16);
    assert_eq!(one["kv_bytes_per_step"], kv);
}

/// Through the worker's reports and the coordinator, out of a library with known answers.
#[tokio::test(flavor = "multi_thread")]
async fn status_shows_how_the_gpu_is() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/kernels/emulator/nvml.c");
    let library = std::env::temp_dir().join(format!("herd-nvml-{}.so", std::process::id()));
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source);
    assert!(compiler.status().unwrap().success());
    let nvml = Nvml::open(&library, "0000:17:00.0").unwrap();
    std::fs::remove_file(library).unwrap();
    let gpu = Gpu::new(Arc::new(Driver::emulated().unwrap())).watched(nvml);
    let cluster = cluster(Platform::Cuda(gpu), 1).await;
    let told = async {
        loop {
            let status = cluster.status().await.unwrap();
            if let Some(gpu) = status["members"][0].get("gpu") {
                return gpu.clone();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let want = json!({
        "memory_used_bytes": 61_u64 << 30, "memory_total_bytes": 80_u64 << 30, "sm_mhz": 1980, "memory_mhz": 2619,
        "temperature_c": 45, "ecc_uncorrected": 3, "last_xid": 79, "throttle": ["power_cap", "0x4000"],
    });
    assert_eq!(tokio::time::timeout(Duration::from_secs(60), told).await.unwrap(), want);
}

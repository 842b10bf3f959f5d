//! NVML, with a library that has known answers.

use super::super::nvml::{GpuHealth, Nvml, NvmlError};
use std::path::{Path, PathBuf};
use std::process::Command;

const BUS: &str = "0000:17:00.0";

/// The library, compiled with these flags.
fn library(name: &str, flags: &[&str]) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("emulator/nvml.c");
    let file = std::env::temp_dir().join(format!("herd-nvml-{name}-{}.so", std::process::id()));
    let mut command = Command::new("cc");
    command.args(["-shared", "-fPIC", "-Wall", "-o"]).arg(&file).args(flags).arg(source);
    assert!(command.status().unwrap().success());
    file
}

/// What it says of the GPU, look by look.
fn looks<const N: usize>(name: &str, flags: &[&str]) -> [GpuHealth; N] {
    let file = library(name, flags);
    let nvml = Nvml::open(&file, BUS).unwrap();
    std::fs::remove_file(file).unwrap();
    std::array::from_fn(|_| nvml.health())
}

fn full() -> GpuHealth {
    GpuHealth {
        memory_used: Some(61 << 30),
        memory_total: Some(80 << 30),
        sm_mhz: Some(1980),
        memory_mhz: Some(2619),
        temperature_c: Some(45),
        ecc_uncorrected: Some(3),
        last_xid: Some(79),
        throttle: vec!["power_cap".into(), "0x4000".into()],
    }
}

#[test]
fn every_figure_is_told_and_the_last_xid_stays() {
    assert_eq!(looks("full", &[]), [full(), full()]);
}

#[test]
fn function_that_is_missing_leaves_its_figure_out_and_former_names_will_do() {
    let [health] = looks("old", &["-DOLD"]);
    assert_eq!(health, GpuHealth { temperature_c: None, ..full() });
}

#[test]
fn what_the_gpu_does_not_support_is_absent() {
    assert_eq!(looks("unsupported", &["-DUNSUPPORTED"]), [GpuHealth::default()]);
}

#[test]
fn library_or_gpu_that_is_not_there_is_an_error_with_a_name() {
    let absent = Nvml::open(Path::new("/nowhere/libnvidia-ml.so.1"), BUS).err().unwrap();
    let text = absent.to_string();
    assert!(text.starts_with("/nowhere/libnvidia-ml.so.1 cannot be loaded"), "{text}");
    let file = library("bus", &[]);
    let other = Nvml::open(&file, "0000:18:00.0").err();
    let function = "nvmlDeviceGetHandleByPciBusId_v2";
    assert_eq!(other, Some(NvmlError::Failed { function, code: 6 }));
    std::fs::remove_file(file).unwrap();
}

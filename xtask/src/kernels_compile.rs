//! Every CUDA kernel to machine code for every architecture that herd supports, without a GPU.
//!
//! PTX would not do: the assembler is what checks inline assembly and counts registers.

use anyhow::{Context, bail, ensure};
use kernels::cuda::compile::{compile, version};
use kernels::cuda::sources::SOURCES;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A100, H100 and H200, B200.
const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90a", "sm_100a"];

/// The compiler of CUDA 13.0, whose output the oldest supported driver loads.
const WHEEL: &str = "nvidia-cuda-nvrtc==13.0.88";

/// Some kernels take a second block per SM for a few bytes outside of registers; more is a mistake.
const SPILLED_MAX: u32 = 32;

/// Where the wheel keeps its libraries, below `lib/python3.*`.
const LIBRARIES: &str = "site-packages/nvidia/cu13/lib";

/// Set for the process that finds the libraries on its search path.
pub(crate) const SEARCH_PATH: &str = "LD_LIBRARY_PATH";

/// What the assembler says of a kernel.
#[derive(Debug, PartialEq, Eq)]
struct Usage {
    kernel: String,
    registers: u32,
    shared_bytes: u32,
    spilled_bytes: u32,
}

pub(crate) fn run(root: &Path) -> anyhow::Result<()> {
    let libraries = install(root)?;
    // The search path counts from a process's start.
    let path = std::env::var(SEARCH_PATH).unwrap_or_default();
    if !std::env::split_paths(&path).any(|entry| entry == libraries) {
        let mut entries = vec![libraries];
        entries.extend(std::env::split_paths(&path));
        let status = Command::new(std::env::current_exe()?)
            .args(std::env::args_os().skip(1))
            .env(SEARCH_PATH, std::env::join_paths(entries)?)
            .status()?;
        ensure!(status.success(), "kernels do not compile");
        return Ok(());
    }
    let (major, minor) = version()?;
    ensure!((major, minor) == (13, 0), "NVRTC {major}.{minor} was found instead of {WHEEL}");
    let mut spilling = Vec::new();
    for source in SOURCES {
        for arch in ARCHITECTURES {
            let compiled = compile(*source, arch)?;
            let usages = usages(&compiled.log);
            let names: Vec<&str> = usages.iter().map(|usage| usage.kernel.as_str()).collect();
            for kernel in source.kernels() {
                ensure!(
                    names.contains(&kernel),
                    "{kernel}: the assembler says nothing of it:\n{}",
                    compiled.log
                );
            }
            for usage in usages {
                let Usage { kernel, registers, shared_bytes, spilled_bytes } = usage;
                eprintln!(
                    "{arch:8} {kernel:36} {registers:3} registers, {shared_bytes:6} bytes shared, {spilled_bytes} spilled"
                );
                if SPILLED_MAX < spilled_bytes {
                    spilling.push(format!("{kernel} on {arch}"));
                }
            }
        }
    }
    if !spilling.is_empty() {
        bail!("registers do not suffice: {}", spilling.join(", "));
    }
    Ok(())
}

/// Where Cargo builds.
pub(crate) fn target(root: &Path) -> PathBuf {
    // An absolute one stays as it is.
    root.join(std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// The folder of the compiler's libraries; installs them if they are not there yet.
pub(crate) fn install(root: &Path) -> anyhow::Result<PathBuf> {
    let venv = target(root).join(WHEEL.replace("==", "-"));
    if let Some(found) = libraries(&venv) {
        return Ok(found);
    }
    eprintln!("installing {WHEEL}");
    shell(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
    shell(Command::new(venv.join("bin/pip")).args([
        "install",
        "--quiet",
        "--disable-pip-version-check",
        WHEEL,
    ]))?;
    libraries(&venv).with_context(|| format!("{WHEEL} has no libraries below {}", venv.display()))
}

fn libraries(venv: &Path) -> Option<PathBuf> {
    let versions = std::fs::read_dir(venv.join("lib")).ok()?;
    let folders = versions.filter_map(|entry| Some(entry.ok()?.path().join(LIBRARIES)));
    folders.into_iter().find(|folder| folder.join("libnvrtc.so.13").exists())
}

pub(crate) fn shell(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("{command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

/// Reads the assembler's report (`ptxas -v`).
fn usages(log: &str) -> Vec<Usage> {
    let mut all = Vec::new();
    let (mut kernel, mut spilled_bytes) = (String::new(), 0);
    for line in log.lines() {
        if let Some((_, name)) = line.split_once("Compiling entry function '") {
            kernel = name.split('\'').next().unwrap_or_default().to_owned();
        } else if line.contains("bytes spill stores") {
            spilled_bytes =
                before(line, " bytes spill stores") + before(line, " bytes spill loads");
        } else if line.contains("Used ") && line.contains(" registers") {
            all.push(Usage {
                kernel: std::mem::take(&mut kernel),
                registers: before(line, " registers"),
                shared_bytes: before(line, " bytes smem"),
                spilled_bytes: std::mem::take(&mut spilled_bytes),
            });
        }
    }
    all
}

/// The number before `unit`; 0 if the line has no such.
fn before(line: &str, unit: &str) -> u32 {
    let number = line
        .split_once(unit)
        .and_then(|(start, _)| start.split([' ', ',']).next_back()?.parse().ok());
    number.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assembler_report_is_read() {
        let log = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'herd_a' for 'sm_90a'
ptxas info    : Function properties for herd_a
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compiling entry function 'herd_b' for 'sm_90a'
ptxas info    : Function properties for herd_b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 9 registers, used 0 barriers";
        let usage = |kernel: &str, registers, shared_bytes, spilled_bytes| Usage {
            kernel: kernel.into(),
            registers,
            shared_bytes,
            spilled_bytes,
        };
        assert_eq!(usages(log), [usage("herd_a", 32, 1024, 28), usage("herd_b", 9, 0, 0)]);
    }
}

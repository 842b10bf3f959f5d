//! A machine with a GPU, as far as a process can tell, on one without: CUDA's driver and NVML are stand-ins that know herd's
//! kernels, and the kernels' compiler is the true one.

use crate::kernels_compile::{self, SEARCH_PATH, shell};
use anyhow::Context;
use kernels::cuda::emulator::{Watch, stand_in};
use kernels::cuda::sources::SOURCES;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Makes the stand-ins, and runs a command that finds them; without one it says what the search path must be.
pub(crate) fn run(root: &Path, watch: Watch, command: &[String]) -> anyhow::Result<ExitCode> {
    let name = match watch {
        Watch::Nothing => "gpu-stand-in",
        Watch::Races => "gpu-stand-in-races",
    };
    let folder = kernels_compile::target(root).join(name);
    make(root, &folder, watch)?;
    let mut entries = vec![folder, kernels_compile::install(root)?];
    entries.extend(std::env::split_paths(&std::env::var(SEARCH_PATH).unwrap_or_default()));
    let path = std::env::join_paths(entries)?;
    let Some((program, arguments)) = command.split_first() else {
        println!("{SEARCH_PATH}={}", path.display());
        return Ok(ExitCode::SUCCESS);
    };
    let status = Command::new(program)
        .args(arguments)
        .env(SEARCH_PATH, path)
        .status()
        .with_context(|| format!("{program} could not be started"))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX);
    Ok(ExitCode::from(code))
}

/// Compiles them, unless they are there and nothing has changed.
fn make(root: &Path, folder: &Path, watch: Watch) -> anyhow::Result<()> {
    let sources = root.join("crates/kernels/emulator");
    let mut hasher = DefaultHasher::new();
    let mut files: Vec<PathBuf> = std::fs::read_dir(&sources)?
        .map(|entry| Ok(entry?.path()))
        .collect::<std::io::Result<_>>()?;
    files.sort();
    for file in files {
        std::fs::read(file)?.hash(&mut hasher);
    }
    SOURCES.iter().for_each(|source| source.text().hash(&mut hasher));
    let (stamp, now) = (folder.join("made-of"), format!("{:016x}\n", hasher.finish()));
    if std::fs::read_to_string(&stamp).is_ok_and(|then| then == now) {
        return Ok(());
    }
    eprintln!("compiling a stand-in for CUDA's driver");
    std::fs::create_dir_all(folder)?;
    stand_in(folder, watch).map_err(anyhow::Error::msg)?;
    let nvml = folder.join("libnvidia-ml.so.1");
    shell(
        Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(nvml).arg(sources.join("nvml.c")),
    )?;
    std::fs::write(stamp, now).context("the stamp of the stand-in")
}

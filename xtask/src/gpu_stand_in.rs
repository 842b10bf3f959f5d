//! A machine with a GPU, as far as a process can tell, on one without: CUDA's driver and NVML are stand-ins that know herd's
//! kernels, and the kernels' compiler is the true one.

use crate::accesses;
use crate::kernels_compile::{self, SEARCH_PATH, shell};
use anyhow::{Context, ensure};
use kernels::cuda::emulator::{Watch, stand_in};
use kernels::cuda::sources::SOURCES;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// What is watched while kernels run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Plain,
    Races,
    /// Races, and what is asked of memory.
    Accesses,
}

/// How the stand-in is told what it is like.
const SETTINGS: &str = "HERD_STAND_IN";

/// Makes the stand-ins, and runs a command that finds them; without one it says what the search path must be.
pub(crate) fn run(root: &Path, mode: Mode, command: &[String]) -> anyhow::Result<ExitCode> {
    let (name, watch) = match mode {
        Mode::Plain => ("gpu-stand-in", Watch::Nothing),
        Mode::Races | Mode::Accesses => ("gpu-stand-in-races", Watch::Races),
    };
    let folder = kernels_compile::target(root).join(name);
    make(root, &folder, watch)?;
    let known = std::env::var(SEARCH_PATH).unwrap_or_default();
    // An empty entry would be the present folder.
    let known = std::env::split_paths(&known).filter(|entry| !entry.as_os_str().is_empty());
    let entries = [folder.clone(), kernels_compile::install(root)?].into_iter().chain(known);
    let path = std::env::join_paths(entries)?;
    let Some((program, arguments)) = command.split_first() else {
        ensure!(mode != Mode::Accesses, "--accesses counts what a command does: give one");
        writeln!(std::io::stdout(), "{SEARCH_PATH}={}", path.display())?;
        return Ok(ExitCode::SUCCESS);
    };
    let counted = folder.join(format!("accesses-{}", std::process::id()));
    let mut command = Command::new(program);
    command.args(arguments).env(SEARCH_PATH, path);
    if mode == Mode::Accesses {
        std::fs::create_dir(&counted)?;
        let settings = std::env::var(SETTINGS).unwrap_or_default();
        command.env(SETTINGS, format!("{settings},accesses={}", counted.display()));
    }
    let status = command.status().with_context(|| format!("{program} could not be started"))?;
    if mode == Mode::Accesses {
        if status.success() {
            accesses::print(&counted, &folder.join("libcuda.so.1"))?;
        }
        std::fs::remove_dir_all(&counted)?;
    }
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
    files.retain(|file| file.is_file());
    // And how they are compiled.
    files.push(root.join("crates/kernels/src/cuda/emulator.rs"));
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

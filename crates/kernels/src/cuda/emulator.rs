//! Compiles the kernels for a CPU, by the machine's C++ compiler: for the emulated device, and as a CUDA driver that needs
//! no GPU.

use super::sources::SOURCES;
use libloading::Library;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The library of the emulated device.
pub(super) fn load() -> Result<Library, String> {
    let folder = std::env::temp_dir().join(format!("herd-emulator-{}", std::process::id()));
    let library = folder.join("kernels.so");
    let result = compile(&folder, &["emulator.cpp"], Watch::Nothing, &library).and_then(|()| {
        // SAFETY: its initialisers only note the kernels.
        unsafe { Library::new(&library) }.map_err(|error| error.to_string())
    });
    // The library is loaded, or nobody wants it.
    let _left_behind = std::fs::remove_dir_all(&folder);
    result
}

/// What is watched while kernels run, besides what always is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Watch {
    Nothing,
    /// Every load and store: whether threads race, which ends the process. Some ten times as slow.
    Races,
}

/// Makes a CUDA driver (`libcuda.so.1`) in a folder that runs herd's kernels on the CPU, and checks how it is called: a
/// process that finds it on its search path has a GPU, as far as it can tell.
///
/// # Errors
///
/// The compiler's words.
pub fn stand_in(folder: &Path, watch: Watch) -> Result<(), String> {
    let sources = folder.join("sources");
    // Nobody finds half a library.
    let (new, library) = (folder.join("libcuda.so.new"), folder.join("libcuda.so.1"));
    compile(&sources, &["emulator.cpp", "driver.cpp", "cubin.cpp"], watch, &new)?;
    std::fs::remove_dir_all(&sources)
        .and_then(|()| std::fs::rename(&new, &library))
        .map_err(|error| format!("{}: {error}", library.display()))
}

/// Compiles all kernels and these files of the emulator to a library.
fn compile(folder: &Path, files: &[&str], watch: Watch, library: &Path) -> Result<(), String> {
    std::fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("emulator");
    let mut files: Vec<PathBuf> = files.iter().map(|file| here.join(file)).collect();
    let mut kernels = Vec::new();
    for source in SOURCES {
        // In a namespace of its own: two files may give different things the same name.
        let mut text = format!("#include \"emulator.hpp\"\nnamespace {{\n{}\n", source.text());
        for kernel in source.kernels() {
            text += &format!("static emulator::Entry<&{kernel}> entry_{kernel}(\"{kernel}\");\n");
        }
        text += "}\n";
        let file = folder.join(format!("{}.cpp", source.name));
        std::fs::write(&file, text).map_err(|error| format!("{}: {error}", file.display()))?;
        kernels.push(file);
    }
    let flags: &[&str] = match watch {
        Watch::Nothing => &[],
        Watch::Races => {
            files.extend(["races.cpp", "requests.cpp"].map(|file| here.join(file)));
            &["-DHERD_RACES", "-g1"]
        }
    };
    let mut of_kernels = compiler(&here, flags);
    if watch == Watch::Races {
        // The calls that this makes of every access go to races.cpp: the linker is told nothing of it.
        // A vector shall be touched as one.
        of_kernels.args(["-fsanitize=thread", "-fno-tree-sra"]);
    }
    run(of_kernels.current_dir(folder).arg("-c").args(&kernels))?;
    let objects = kernels.iter().map(|file| file.with_extension("o"));
    run(compiler(&here, flags).args(&files).args(objects).args(["-shared", "-o"]).arg(library))
}

fn compiler(here: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new("g++");
    command
        .args(["-std=c++20", "-O2", "-mfma", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC"])
        .args(["-pthread", "-Wall", "-Wextra", "-Wno-unused-function", "-Wno-unknown-pragmas"])
        .args(flags)
        .arg("-I")
        .arg(here);
    command
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| format!("g++: {error}"))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(format!("g++: {}", String::from_utf8_lossy(&output.stderr)))
    }
}

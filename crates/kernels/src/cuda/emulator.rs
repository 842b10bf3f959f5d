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
    link(folder, (&kernels, files), watch, &["-shared", "-o", &library.to_string_lossy()])
}

/// Compiles files of kernels, and these of the emulator, and links them as `output` says.
fn link(
    folder: &Path,
    (kernels, files): (&[PathBuf], &[&str]),
    watch: Watch,
    output: &[&str],
) -> Result<(), String> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("emulator");
    let mut files: Vec<PathBuf> = files.iter().map(|file| here.join(file)).collect();
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
    run(of_kernels.current_dir(folder).arg("-c").args(kernels))?;
    let objects = kernels.iter().filter_map(|file| Some(folder.join(file.file_stem()?)));
    let objects = objects.map(|object| object.with_extension("o"));
    run(compiler(&here, flags).args(&files).args(objects).args(output))
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
    let output = command.output().map_err(|error| format!("g++, which is needed: {error}"))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(format!("g++: {}", String::from_utf8_lossy(&output.stderr)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program that runs planted faults, once built.
    fn program(folder: &Path) -> PathBuf {
        std::fs::create_dir_all(folder).unwrap();
        let planted = Path::new(env!("CARGO_MANIFEST_DIR")).join("emulator/tests/planted.cpp");
        let files = ["tests/main.cpp", "emulator.cpp", "driver.cpp", "cubin.cpp"];
        let program = folder.join("planted");
        let output = ["-o", &program.to_string_lossy()];
        link(folder, (&[planted], &files), Watch::Races, &output).unwrap();
        program
    }

    #[test]
    fn planted_faults_are_found_and_what_is_right_passes() {
        let folder = std::env::temp_dir().join(format!("herd-planted-{}", std::process::id()));
        let program = program(&folder);
        let said = |what: &str| {
            let output = Command::new(&program).arg(what).output().unwrap();
            (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
        };
        for right in [
            "barrier_there",
            "warp_barrier_there",
            "blocks_share_an_atomic",
            "copy_well_done",
            "bytes_read_when_they_are_there",
        ] {
            assert_eq!(said(right), (Some(0), String::new()), "{right}");
        }
        assert_eq!(said("bytes_read_before_they_are_there").0, Some(5));
        for (planted, words) in [
            ("barrier_missing", "race in kernel barrier_missing, shared memory"),
            ("shuffle_for_barrier", "race in kernel shuffle_for_barrier, shared memory"),
            ("warp_barrier_for_block", "race in kernel warp_barrier_for_block, shared memory"),
            ("overwritten_too_soon", "overwrites what thread"),
            ("blocks_share_a_word", "race in kernel blocks_share_a_word, global memory"),
            ("atomic_is_read_plainly", "race in kernel atomic_is_read_plainly, global memory"),
            ("copy_into_a_slot_in_use", "a copy to it is on its way"),
            ("copy_that_is_not_waited_for", "a copy to it is on its way"),
            ("copy_of_what_changes", "a copy from it is on its way"),
            ("constant_that_changes", "takes for constant"),
            ("address_not_aligned", "a GPU refuses addresses that are not aligned"),
            ("shared_memory_not_written", "shared memory that the block has not written"),
            ("memory_of_the_host", "this is no memory of the device"),
            ("copy_past_the_end", "a copy past the end of device memory"),
            ("large_copy_that_may_wait", "a large copy out of memory that is not pinned"),
            ("read_that_may_wait", "a copy to memory that is not pinned"),
            ("memory_that_is_left", "1 allocations left when the context goes"),
            ("memory_freed_twice", "is free already"),
            ("full_queue", "more calls than the driver's queue holds"),
            ("no_context", "a call without a current context"),
        ] {
            let (code, text) = said(planted);
            // It ends by a signal.
            assert!(code.is_none() && text.contains(words), "{planted}: {code:?}, {text}");
        }
        std::fs::remove_dir_all(folder).unwrap();
    }
}

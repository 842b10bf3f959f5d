//! Kernels from source to machine code, by NVRTC: no toolkit and no header is needed.

use super::driver::CudaError;
use super::sources::Source;
use cudarc::nvrtc::result::{self, NvrtcError};
use cudarc::nvrtc::sys;
use std::ffi::{CStr, CString};
use std::sync::OnceLock;

/// It knows all architectures that herd runs on.
const VERSION_MIN: (i32, i32) = (13, 0);

/// Machine code of a file of kernels, and what the compiler said: registers, shared memory and spills per kernel.
#[derive(Debug, Clone)]
pub struct Compiled {
    pub image: Vec<u8>,
    pub log: String,
}

/// The compiler's version, `(major, minor)`.
///
/// # Errors
///
/// [`CudaError::NoCompiler`] if it is not installed, [`CudaError::OldCompiler`] if an older one is found first.
pub fn version() -> Result<(i32, i32), CudaError> {
    static VERSION: OnceLock<Option<(i32, i32)>> = OnceLock::new();
    let ask = || {
        // A library that lacks a symbol makes cudarc panic; it is as good as none.
        std::panic::catch_unwind(|| {
            let (mut major, mut minor) = (0, 0);
            // SAFETY: opens a library and closes it; NVIDIA's have no effect when they are opened.
            let is_there = unsafe { sys::is_culib_present() };
            // SAFETY: both are valid for writing.
            let ok = is_there
                && unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) }.result().is_ok();
            ok.then_some((major, minor))
        })
        .ok()
        .flatten()
    };
    let found = VERSION.get_or_init(ask).ok_or(CudaError::NoCompiler)?;
    if found < VERSION_MIN {
        Err(CudaError::OldCompiler { found, needed: VERSION_MIN })
    } else {
        Ok(found)
    }
}

/// Compiles for an architecture: `sm_80`, `sm_90a`, ….
///
/// # Errors
///
/// [`CudaError::NoCompiler`]; [`CudaError::Compile`] with the compiler's words.
///
/// # Panics
///
/// If the source holds a zero byte.
pub fn compile(source: Source, arch: &str) -> Result<Compiled, CudaError> {
    version()?;
    let text = CString::new(source.text()).expect("sources hold no zero");
    let failed = |log: String| CudaError::Compile { kernel: source.name, arch: arch.into(), log };
    let program = result::create_program(&text, None).map_err(|error| failed(error.to_string()))?;
    let compiled = compile_program(program, arch);
    let log = log(program);
    // SAFETY: made above, and not used any more. What could fail has had its effect.
    let _freed = unsafe { result::destroy_program(program) };
    match compiled {
        Ok(image) => Ok(Compiled { image, log }),
        Err(error) => Err(failed(format!("{error}\n{log}"))),
    }
}

fn compile_program(program: sys::nvrtcProgram, arch: &str) -> Result<Vec<u8>, NvrtcError> {
    let options = [
        format!("--gpu-architecture={arch}"),
        "--std=c++17".into(),
        // Products and sums are fused where the source says so, and nowhere else.
        "--fmad=false".into(),
        "--ptxas-options=-v".into(),
    ];
    let mut bytes = 0;
    // SAFETY: the program was made and is not freed; the image has as many bytes as it was said to have.
    unsafe {
        result::compile_program(program, &options)?;
        sys::nvrtcGetCUBINSize(program, &raw mut bytes).result()?;
        let mut image = vec![0_u8; bytes];
        sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()).result()?;
        Ok(image)
    }
}

fn log(program: sys::nvrtcProgram) -> String {
    // SAFETY: the program was made and is not freed.
    let bytes = unsafe { result::get_program_log(program) }.unwrap_or_default();
    let bytes: Vec<u8> = bytes.into_iter().map(i8::cast_unsigned).collect();
    CStr::from_bytes_until_nul(&bytes)
        .map(|log| log.to_string_lossy().trim().to_owned())
        .unwrap_or_default()
}

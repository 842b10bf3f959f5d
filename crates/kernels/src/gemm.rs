//! `out[m, n] = sum over k of x[m, k] * w[n, k]`, the product that nearly all of a step is made of.
//!
//! Every element of the result is one chain `acc = fma(x[m, k], w[n, k], acc)` for `k = 0, 1, …`,
//! kept in a register, or parked as an f32 in `out` between two blocks of `k`. So the bits of a row
//! do not depend on the other rows, on the tile it fell into or on the number of threads.
//!
//! Tiles are `ROWS x PANELS`: few rows take several panels to hide the latency of the additions, many
//! rows share one. With one row the product runs at the speed of memory.

mod multiply;

use crate::isa::{Isa, Portable};
use crate::matrix::{Matrix, PANEL, Storage};
use crate::{Dtype, Level};
use multiply::{Pairs, Singles, multiply};
use rayon::prelude::*;

/// Inputs of one block when many rows share the weights: a panel's block (32 KiB in bf16) and the
/// rows' block stay in the first two cache levels.
const K_BLOCK: usize = 1024;
/// Bytes of the left operand that are worked on before the weights are read again: half of the
/// smallest second-level cache we met.
const ROWS_BYTES: usize = 256 << 10;
/// Rows of the tallest tile. Beside five rows of two 256-bit accumulators the weights of a line fit into the 16
/// registers, beside six they do not (60 rows on a Zen 1 core: 29.5 and 27.9 GFLOPS); 512-bit ones are 32.
const fn rows_max<I: Isa>() -> usize {
    match I::ACCS {
        1 => 6,
        _ => 5,
    }
}
/// Multiply-adds below which a second thread costs more than it gains.
const WORK_MIN: usize = 1 << 17;

/// The left operand in the form the instruction set wants.
struct Left<'a, X> {
    data: &'a [X],
    /// Elements from one row to the next.
    stride: usize,
}

/// Scratch of [`linear`] that survives between calls.
#[derive(Default)]
pub(crate) struct GemmScratch {
    pairs: Vec<u32>,
}

/// Where to compute: level, activation type and threads.
#[derive(Clone, Copy)]
pub(crate) struct Exec {
    pub(crate) level: Level,
    pub(crate) dtype: Dtype,
    pub(crate) threads: usize,
}

/// `out[rows, outputs] = x[rows, inputs] * w^T`, times the matrix's scales if it has any.
///
/// # Panics
///
/// If the slices do not have the sizes that `rows` and the matrix ask for.
pub(crate) fn linear(
    exec: Exec,
    scratch: &mut GemmScratch,
    x: &[f32],
    rows: usize,
    w: &Matrix,
    out: &mut [f32],
) {
    assert_eq!(x.len(), rows * w.inputs, "left operand of a product");
    assert_eq!(out.len(), rows * w.outputs, "result of a product");
    if rows == 0 {
        return;
    }
    let bf16_pairs =
        exec.level == Level::Avx512Bf16 && exec.dtype == Dtype::Bf16 && w.storage == Storage::Bf16;
    if bf16_pairs {
        scratch.pairs.clear();
        scratch.pairs.extend(x.chunks_exact(2).map(|pair| {
            // The operands were rounded to bf16 before, so their upper halves are all there is.
            pair[0].to_bits() >> 16 | (pair[1].to_bits() & 0xffff_0000)
        }));
        let left = Left { data: &scratch.pairs, stride: w.inputs / 2 };
        #[cfg(target_arch = "x86_64")]
        split(exec, rows, w, out, |task| run_avx512bf16(&left, task));
        #[cfg(not(target_arch = "x86_64"))]
        drop(left);
        return;
    }
    let left = Left { data: x, stride: w.inputs };
    match exec.level {
        Level::Portable => split(exec, rows, w, out, |task| {
            // SAFETY: the portable instruction set needs no features.
            unsafe { run::<Portable>(&left, task) }
        }),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => split(exec, rows, w, out, |task| run_avx2(&left, task)),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Bf16 => {
            split(exec, rows, w, out, |task| run_avx512(&left, task));
        }
        #[cfg(not(target_arch = "x86_64"))]
        Level::Avx2 | Level::Avx512 | Level::Avx512Bf16 => {
            unreachable!("levels above portable are only made on x86-64")
        }
    }
}

/// Some panels of one product.
#[derive(Clone, Copy)]
struct Task<'a> {
    rows: usize,
    w: &'a Matrix,
    panels: (usize, usize),
    out: OutPtr,
}

/// The result's first element. Tasks write disjoint columns of it.
#[derive(Clone, Copy)]
struct OutPtr(*mut f32);

// SAFETY: every task writes the columns of its own panels only, and `split` keeps the borrow of the
// result alive until all tasks are done.
unsafe impl Send for OutPtr {}
// SAFETY: as above.
unsafe impl Sync for OutPtr {}

/// Deals the panels to the threads in equal runs.
fn split(exec: Exec, rows: usize, w: &Matrix, out: &mut [f32], run: impl Fn(Task<'_>) + Sync) {
    let panels = w.panels();
    let task = Task { rows, w, panels: (0, panels), out: OutPtr(out.as_mut_ptr()) };
    let threads = exec.threads.min(panels);
    if threads <= 1 || rows * w.inputs * w.outputs < WORK_MIN {
        run(task);
        return;
    }
    (0..threads).into_par_iter().for_each(|thread| {
        let cut = |i: usize| panels * i / threads;
        run(Task { panels: (cut(thread), cut(thread + 1)), ..task });
    });
}

#[cfg(target_arch = "x86_64")]
fn run_avx2(left: &Left<'_, f32>, task: Task<'_>) {
    #[target_feature(enable = "avx2,fma")]
    fn inner(left: &Left<'_, f32>, task: Task<'_>) {
        // SAFETY: this function has the features of `Avx2`.
        unsafe { run::<crate::isa::Avx2>(left, task) }
    }
    // SAFETY: `Level::Avx2` is only made on CPUs with the features.
    unsafe { inner(left, task) }
}

#[cfg(target_arch = "x86_64")]
fn run_avx512(left: &Left<'_, f32>, task: Task<'_>) {
    #[target_feature(enable = "avx512f,avx512bw,avx2,fma")]
    fn inner(left: &Left<'_, f32>, task: Task<'_>) {
        // SAFETY: this function has the features of `Avx512`.
        unsafe { run::<crate::isa::Avx512>(left, task) }
    }
    // SAFETY: `Level::Avx512` is only made on CPUs with the features.
    unsafe { inner(left, task) }
}

#[cfg(target_arch = "x86_64")]
fn run_avx512bf16(left: &Left<'_, u32>, task: Task<'_>) {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx2,fma")]
    fn inner(left: &Left<'_, u32>, task: Task<'_>) {
        // SAFETY: this function has the features of `Avx512Bf16`.
        unsafe { run::<crate::isa::Avx512Bf16>(left, task) }
    }
    // SAFETY: `Level::Avx512Bf16` is only made on CPUs with the features.
    unsafe { inner(left, task) }
}

/// Blocks over `k`, rows and panels.
///
/// # Safety
///
/// The caller has the features of `I`, and nobody else touches the columns of the task's panels.
#[inline(always)]
unsafe fn run<I: Isa>(left: &Left<'_, I::X>, task: Task<'_>) {
    let inputs = task.w.inputs;
    let few = task.rows <= rows_max::<I>();
    let k_block = if few { inputs.max(1) } else { K_BLOCK };
    let row_block = if few {
        task.rows
    } else {
        (ROWS_BYTES / (4 * k_block.min(inputs.max(1)))).next_multiple_of(rows_max::<I>())
    };
    let mut k0 = 0;
    loop {
        let k1 = (k0 + k_block).min(inputs);
        let mut row0 = 0;
        while row0 < task.rows {
            let row1 = (row0 + row_block).min(task.rows);
            // SAFETY: as the caller's.
            unsafe { rows_by_panels::<I>(left, task, (row0, row1), (k0, k1)) };
            row0 = row1;
        }
        k0 = k1;
        if k0 >= inputs {
            break;
        }
    }
}

/// One block of rows times all panels of the task.
#[inline(always)]
unsafe fn rows_by_panels<I: Isa>(
    left: &Left<'_, I::X>,
    task: Task<'_>,
    (row0, row1): (usize, usize),
    k: (usize, usize),
) {
    let mut panel = task.panels.0;
    while panel < task.panels.1 {
        let wide = tile_panels::<I>(row1 - row0, task.panels.1 - panel);
        let mut row = row0;
        while row < row1 {
            // Even tiles: 7 rows are 4 + 3, since a tile of a single row waits for its additions.
            let tiles = (row1 - row).div_ceil(rows_max::<I>());
            let high = (row1 - row).div_ceil(tiles);
            let tile = Tile { row, panel, k };
            // SAFETY: as the caller's, here and in every arm.
            unsafe {
                match (high, wide) {
                    (1, 8) => tile_of::<I, 1, 8>(left, task, tile),
                    (1, 4) => tile_of::<I, 1, 4>(left, task, tile),
                    (1, 2) => tile_of::<I, 1, 2>(left, task, tile),
                    (1, 1) => tile_of::<I, 1, 1>(left, task, tile),
                    (2, 3) => tile_of::<I, 2, 3>(left, task, tile),
                    (2, 2) => tile_of::<I, 2, 2>(left, task, tile),
                    (2, 1) => tile_of::<I, 2, 1>(left, task, tile),
                    (3, 2) => tile_of::<I, 3, 2>(left, task, tile),
                    (3, 1) => tile_of::<I, 3, 1>(left, task, tile),
                    (4, 2) => tile_of::<I, 4, 2>(left, task, tile),
                    (4, 1) => tile_of::<I, 4, 1>(left, task, tile),
                    (5, 2) => tile_of::<I, 5, 2>(left, task, tile),
                    (5, 1) => tile_of::<I, 5, 1>(left, task, tile),
                    (6, 2) => tile_of::<I, 6, 2>(left, task, tile),
                    (6, 1) => tile_of::<I, 6, 1>(left, task, tile),
                    other => unreachable!("no tile of {other:?} rows and panels"),
                }
            }
            row += high;
        }
        panel += wide;
    }
}

/// Panels of the tiles of a block of rows, so that accumulators and weights fit the registers: 16 of 256
/// bits, or 32 of 512. Every tile of the block is as wide as its tallest one may be.
#[inline(always)]
fn tile_panels<I: Isa>(rows: usize, room: usize) -> usize {
    let widths: &[usize] = match (I::ACCS, rows) {
        (1, 1) => &[8, 4, 2, 1],
        (_, 1) => &[4, 2, 1],
        (1, 2) => &[3, 2, 1],
        (1, _) | (_, 2) => &[2, 1],
        (_, _) => &[1],
    };
    widths.iter().copied().find(|&wide| wide <= room).unwrap_or(1)
}

/// Position of one tile.
#[derive(Clone, Copy)]
struct Tile {
    row: usize,
    panel: usize,
    k: (usize, usize),
}

/// `ROWS x PANELS` outputs over one block of `k`, in registers.
#[inline(always)]
unsafe fn tile_of<I: Isa, const ROWS: usize, const PANELS: usize>(
    left: &Left<'_, I::X>,
    task: Task<'_>,
    tile: Tile,
) {
    let w = task.w;
    // Two vectors are the most an instruction set needs for 16 outputs; a loop over `I::ACCS` below
    // leaves the second unused where one is enough.
    // SAFETY: features by the caller.
    let mut acc = unsafe { [[[I::zero(); 2]; PANELS]; ROWS] };
    let mut edge = [[0.0_f32; PANEL]; PANELS];
    if tile.k.0 > 0 {
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: the tile's rows and columns lie inside the result.
            unsafe {
                load_out::<PANELS>(task, tile, r, &mut edge);
                for (acc, edge) in acc.iter_mut().zip(&edge) {
                    for (part, acc) in acc.iter_mut().enumerate().take(I::ACCS) {
                        *acc = I::load(edge.as_ptr().add(part * (PANEL / I::ACCS)));
                    }
                }
            }
        }
    }
    let line: [*const u8; PANELS] = std::array::from_fn(|p| w.panel_ptr(tile.panel + p));
    let x: [*const I::X; ROWS] =
        std::array::from_fn(|r| left.data[(tile.row + r) * left.stride..].as_ptr());
    // SAFETY: lines of `k` below `inputs` exist in every panel, and rows have `inputs` elements.
    unsafe {
        match w.storage {
            Storage::Bf16 => {
                for pair in tile.k.0 / 2..tile.k.1 / 2 {
                    multiply::<I, Pairs, ROWS, PANELS>(&mut acc, &line, &x, pair);
                }
            }
            Storage::F32 => {
                for k in tile.k.0..tile.k.1 {
                    multiply::<I, Singles, ROWS, PANELS>(&mut acc, &line, &x, k);
                }
            }
        }
    }
    let last = tile.k.1 == w.inputs;
    for (r, acc) in acc.iter().enumerate() {
        for (acc, edge) in acc.iter().zip(&mut edge) {
            for (part, acc) in acc.iter().enumerate().take(I::ACCS) {
                // SAFETY: `edge` has 16 floats.
                unsafe { I::store(*acc, edge.as_mut_ptr().add(part * (PANEL / I::ACCS))) };
            }
        }
        // SAFETY: the tile's rows and columns lie inside the result and are this task's own.
        unsafe { store_out::<PANELS>(task, tile, (r, last), &edge) };
    }
}

/// Columns of the result that a panel really has (the last one may be cut).
#[inline(always)]
fn columns(w: &Matrix, panel: usize) -> (usize, usize) {
    let first = panel * PANEL;
    (first, (w.outputs - first).min(PANEL))
}

#[inline(always)]
unsafe fn load_out<const PANELS: usize>(
    task: Task<'_>,
    tile: Tile,
    r: usize,
    edge: &mut [[f32; PANEL]; PANELS],
) {
    for (p, edge) in edge.iter_mut().enumerate() {
        let (first, wide) = columns(task.w, tile.panel + p);
        // SAFETY: row and columns lie inside the result, which only this task touches there.
        unsafe {
            let from = task.out.0.add((tile.row + r) * task.w.outputs + first);
            std::ptr::copy_nonoverlapping(from, edge.as_mut_ptr(), wide);
        }
    }
}

#[inline(always)]
unsafe fn store_out<const PANELS: usize>(
    task: Task<'_>,
    tile: Tile,
    (r, last): (usize, bool),
    edge: &[[f32; PANEL]; PANELS],
) {
    for (p, edge) in edge.iter().enumerate() {
        let (first, wide) = columns(task.w, tile.panel + p);
        // SAFETY: row and columns lie inside the result, which only this task touches there.
        let to = unsafe {
            let to = task.out.0.add((tile.row + r) * task.w.outputs + first);
            std::slice::from_raw_parts_mut(to, wide)
        };
        match &task.w.scales {
            Some(scales) if last => {
                for (i, to) in to.iter_mut().enumerate() {
                    *to = edge[i] * scales[first + i];
                }
            }
            Some(_) | None => to.copy_from_slice(&edge[..wide]),
        }
    }
}

#[cfg(test)]
mod tests;

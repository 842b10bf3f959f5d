//! Weights in the order in which the tensor cores' kernels read them (`tiles.cuh`).
//!
//! A matrix `[outputs, inputs]` is cut into tiles of 16 outputs and 32 (bf16) or 64 (FP8) inputs, 1 KiB each; tiles of
//! the same outputs follow each other. A tile is two pieces, outputs 0..8 and 8..16; lane `4 g + t` of a warp has 16
//! bytes in each: output `g` of the eight, 8 inputs from `8 t`, and of FP8 as many from `32 + 8 t`: so the warp reads runs
//! of 32 inputs of a token. Both are padded with zeros.
//!
//! Four FP8 weights lie in a word so that few operations widen them; see [`fp8_word`]. Every other eight lanes have
//! their two halves of 8 bytes swapped: kernels read halves, and these are then in different banks of shared memory.

use super::args::Parameter;
use super::buffer::Buffer;
use super::driver::{CudaError, Driver};
use rayon::prelude::*;
use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

/// Outputs of a tile.
pub(super) const TILE_OUTPUTS: usize = 16;

/// Bytes of a tile.
const TILE_BYTES: usize = 1024;

/// Bytes of half a tile: 16 for every lane of a warp.
const PIECE_BYTES: usize = 512;

/// Threads of a block: a warp for each of the 8 segments that K is cut into.
pub(super) const THREADS: u32 = 256;

/// Shared memory of a block for many tokens: 4 stages of 128 outputs and 128 tokens by the inputs of a tile.
pub(super) fn wide_shared(storage: TileStorage) -> u32 {
    match storage {
        TileStorage::Bf16 => 4 * (8 + 8) * 1024,
        TileStorage::Fp8 => 4 * (8 + 16) * 1024,
    }
}

/// How a weight is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum TileStorage {
    Bf16,
    /// e4m3fn without NaN; one factor per output multiplies the finished sum.
    Fp8,
}

impl TileStorage {
    /// Bytes of a weight.
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::Fp8 => 1,
        }
    }

    /// Inputs of a tile.
    fn tile_inputs(self) -> usize {
        TILE_BYTES / TILE_OUTPUTS / self.bytes()
    }
}

/// The shape of a tiled matrix.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct TileShape {
    pub(super) storage: TileStorage,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

impl TileShape {
    /// Tiles next to each other along the inputs.
    pub(super) fn across(self) -> usize {
        self.inputs.div_ceil(self.storage.tile_inputs())
    }

    /// Tiles along the outputs.
    pub(super) fn down(self) -> usize {
        self.outputs.div_ceil(TILE_OUTPUTS)
    }

    /// Bytes of 16 outputs.
    fn band_bytes(self) -> usize {
        self.across() * TILE_BYTES
    }

    /// Bytes of the whole matrix.
    pub(super) fn bytes(self) -> usize {
        self.down() * self.band_bytes()
    }

    /// Tiles up to 16 outputs: `rows` are theirs, row-major, and `to` has room for one tile next to the other.
    fn tile(self, rows: &[u8], to: &mut [u8]) {
        let row_bytes = self.inputs * self.storage.bytes();
        if rows.len() < TILE_OUTPUTS * row_bytes || !row_bytes.is_multiple_of(RUN) {
            to.fill(0);
        }
        for (output, row) in rows.chunks_exact(row_bytes).enumerate() {
            // Where lane 4 g of the output's piece begins.
            let at = output / 8 * PIECE_BYTES + output % 8 * RUN;
            for (tile, run) in to.chunks_exact_mut(TILE_BYTES).zip(row.chunks(RUN)) {
                self.put(run, output, &mut tile[at..at + RUN]);
            }
        }
    }

    /// One output of one tile: up to 64 bytes, cut off at the end of the row.
    fn put(self, run: &[u8], output: usize, to: &mut [u8]) {
        match self.storage {
            TileStorage::Bf16 => to[..run.len()].copy_from_slice(run),
            TileStorage::Fp8 => {
                // Lanes 8..16 and 24..32 have the outputs 2, 3, 6 and 7 of a piece.
                let swap = if output & 2 == 0 { 0 } else { 8 };
                let mut padded = [0; RUN];
                padded[..run.len()].copy_from_slice(run);
                let words: [[u8; 4]; RUN / 4] = bytemuck::cast(padded);
                // All at once, and then each 8 inputs to their lane's half.
                let words = words.map(|four| fp8_word(u32::from_le_bytes(four)).to_le_bytes());
                let eights: [[u8; 8]; RUN / 8] = bytemuck::cast(words);
                for (index, eight) in eights.into_iter().enumerate() {
                    let (half, lane) = (index / 4, index % 4);
                    to[(lane * 16 + half * 8) ^ swap..][..8].copy_from_slice(&eight);
                }
            }
        }
    }
}

/// Bytes of an output in a tile.
const RUN: usize = 64;

/// Four e4m3 weights, the first in the lowest byte, as the kernels take them. The first and second have sign at bit 15 and
/// the rest at 4..=10 of the lower and of the upper half, where a bf16 has them but for the exponent's offset. The third
/// and fourth are in the gaps between: sign at bit 11, lower four bits at 0..=3, upper three at 12..=14.
fn fp8_word(x: u32) -> u32 {
    let placed = (x & 0x80) << 8 | (x & 0x7f) << 4 | (x & 0x8000) << 16 | (x & 0x7f00) << 12;
    let third = (x >> 12 & 0x0800) | (x >> 16 & 0x000f) | (x >> 8 & 0x7000);
    let fourth = (x >> 4 & 0x0800_0000) | (x >> 8 & 0x000f_0000) | (x & 0x7000_0000);
    placed | third | fourth
}

/// Outputs that are read and tiled at once: a few megabytes.
const OUTPUTS_AT_ONCE: usize = 128;

/// Rows as they were read, and tiled.
#[derive(Default)]
struct Scratch {
    rows: Vec<u8>,
    tiles: Vec<u8>,
}

thread_local! {
    /// Of a thread that brings weights: memory anew for each piece would cost more than tiling it.
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Reads output rows of one of the matrices that a tiled one holds: which, which of its outputs, and where they go,
/// row-major.
pub(super) type ReadRows<'a, E> =
    dyn Fn(usize, Range<usize>, &mut [u8]) -> Result<(), E> + Sync + 'a;

/// A tiled weight matrix `[outputs, inputs]` in device memory.
pub(super) struct TiledMatrix {
    shape: TileShape,
    tiles: Buffer,
    /// `[outputs]` f32, padded to whole tiles.
    scales: Option<Buffer>,
}

impl TiledMatrix {
    /// A matrix whose weights and scales, if it has any, are still to come.
    ///
    /// # Errors
    ///
    /// [`CudaError`] if memory is refused.
    pub(super) fn new(driver: &Arc<Driver>, shape: TileShape) -> Result<Self, CudaError> {
        let scales = match shape.storage {
            TileStorage::Bf16 => None,
            TileStorage::Fp8 => {
                Some(Buffer::new(driver, "scales", shape.down() * TILE_OUTPUTS * 4)?)
            }
        };
        Ok(Self { shape, tiles: Buffer::new(driver, "weights", shape.bytes())?, scales })
    }

    /// Brings the weights of `matrices` matrices, each of as many outputs, to the device: tiles of all of them take
    /// turns. Several threads of the current pool read, tile and copy, each a part.
    ///
    /// # Errors
    ///
    /// Those of `read`; [`CudaError`] if an FP8 weight is no number, or CUDA fails.
    ///
    /// # Panics
    ///
    /// If their tiles are not just those of this matrix.
    pub(super) fn bring<E: From<CudaError> + Send>(
        &self,
        (matrices, outputs): (usize, usize),
        read: &ReadRows<'_, E>,
    ) -> Result<(), E> {
        assert_eq!(matrices * outputs.div_ceil(TILE_OUTPUTS), self.shape.down(), "all tiles");
        let band = self.shape.band_bytes();
        let row_bytes = self.shape.inputs * self.shape.storage.bytes();
        (0..outputs.div_ceil(OUTPUTS_AT_ONCE)).into_par_iter().try_for_each(|part| {
            let first = part * OUTPUTS_AT_ONCE;
            let some = first..outputs.min(first + OUTPUTS_AT_ONCE);
            let mut scratch = SCRATCH.take();
            let Scratch { rows, tiles } = &mut scratch;
            rows.resize(some.len() * row_bytes, 0);
            tiles.resize(matrices * some.len().div_ceil(TILE_OUTPUTS) * band, 0);
            for matrix in 0..matrices {
                read(matrix, some.clone(), rows)?;
                self.check(rows)?;
                let bands = tiles.chunks_exact_mut(band).skip(matrix).step_by(matrices);
                for (rows, band) in rows.chunks(TILE_OUTPUTS * row_bytes).zip(bands) {
                    self.shape.tile(rows, band);
                }
            }
            self.tiles.bring(first / TILE_OUTPUTS * matrices * band, tiles)?;
            SCRATCH.set(scratch);
            Ok(())
        })
    }

    /// Kernels widen FP8 weights by their bits and know no NaN.
    fn check(&self, rows: &[u8]) -> Result<(), CudaError> {
        // All of them: a loop that could end early is ten times as slow.
        let any_nan = || rows.iter().fold(false, |any, byte| any | (byte & 0x7f == 0x7f));
        match self.shape.storage {
            TileStorage::Fp8 if any_nan() => Err(CudaError::NotFinite),
            TileStorage::Fp8 | TileStorage::Bf16 => Ok(()),
        }
    }

    /// Writes the scales of as many matrices as were brought.
    ///
    /// # Errors
    ///
    /// [`CudaError`] if CUDA fails.
    ///
    /// # Panics
    ///
    /// If they are not just those of this matrix, or it has none.
    pub(super) fn set_scales(&self, of_matrices: &[&[f32]]) -> Result<(), CudaError> {
        let to = self.scales.as_ref().expect("a matrix with scales");
        let mut all = vec![0.0; to.bytes() / 4];
        for (matrix, scales) in of_matrices.iter().enumerate() {
            let bands = all.chunks_exact_mut(TILE_OUTPUTS).skip(matrix).step_by(of_matrices.len());
            assert_eq!(scales.len().div_ceil(TILE_OUTPUTS), bands.len(), "a scale per output");
            for (scales, band) in scales.chunks(TILE_OUTPUTS).zip(bands) {
                band[..scales.len()].copy_from_slice(scales);
            }
        }
        to.bring(0, bytemuck::cast_slice(&all))
    }

    /// Its shape; two matrices of the same shape are interchangeable.
    pub(super) fn shape(&self) -> TileShape {
        self.shape
    }

    pub(super) fn tiles(&self) -> &Buffer {
        &self.tiles
    }

    pub(super) fn scales(&self) -> Option<&Buffer> {
        self.scales.as_ref()
    }

    /// Addresses of the tiles and of the scales, 0 if it has none.
    pub(super) fn addresses(&self) -> [u64; 2] {
        [self.tiles.address(), self.scales().bits()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The operations of `tiles.cuh` before its multiplication by 2^120.
    fn widened(word: u32) -> [f32; 4] {
        let first = word & 0x87f0_87f0;
        let second = (word << 4 & 0x80f0_80f0) | (word >> 4 & 0x0700_0700);
        [first << 16, first & 0xffff_0000, second << 16, second & 0xffff_0000]
            .map(|bits| f32::from_bits(bits) * 120.0_f32.exp2())
    }

    fn e4m3(byte: u8) -> f32 {
        let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
        let (exponent, mantissa) = (byte >> 3 & 15, f32::from(byte & 7));
        match exponent {
            0 => sign * mantissa * 2.0_f32.powi(-9),
            _ => sign * (8.0 + mantissa) * 2.0_f32.powi(i32::from(exponent) - 10),
        }
    }

    #[test]
    fn every_fp8_weight_is_widened_exactly_in_every_place() {
        for byte in (0..=u8::MAX).filter(|byte| byte & 0x7f != 0x7f) {
            for place in 0..4 {
                let mut bytes = [0x35, 0xc1, 0x7e, 0x80];
                bytes[place] = byte;
                let want = bytes.map(|byte| e4m3(byte).to_bits());
                assert_eq!(
                    widened(fp8_word(u32::from_le_bytes(bytes))).map(f32::to_bits),
                    want,
                    "{bytes:x?}"
                );
            }
        }
    }

    #[test]
    fn fp8_tiles_hold_two_runs_of_inputs_by_lane() {
        let shape = TileShape { storage: TileStorage::Fp8, outputs: 19, inputs: 88 };
        // All weights but NaN, so that many differ from their neighbours.
        let weight = |output: usize, input: usize| -> u8 {
            u8::try_from((output * 7 + input * 3) % 127).unwrap()
        };
        let rows: Vec<u8> = (0..19).flat_map(|o| (0..88).map(move |i| weight(o, i))).collect();
        let mut tiles = vec![0xff; shape.bytes()];
        for (rows, band) in rows.chunks(16 * 88).zip(tiles.chunks_exact_mut(shape.band_bytes())) {
            shape.tile(rows, band);
        }
        for (at, word) in tiles.chunks_exact(4).enumerate() {
            let (tile, piece, lane) = (at / 256, at / 128 % 2, at / 4 % 32);
            let half = (at / 2 % 2) ^ (lane >> 3 & 1);
            let output = tile / 2 * 16 + piece * 8 + lane / 4;
            let input = tile % 2 * 64 + half * 32 + lane % 4 * 8 + at % 2 * 4;
            let want = [0, 1, 2, 3].map(|i| {
                if output < 19 && input + i < 88 { e4m3(weight(output, input + i)) } else { 0.0 }
            });
            let word = u32::from_le_bytes(word.try_into().unwrap());
            assert_eq!(widened(word).map(f32::to_bits), want.map(f32::to_bits), "word {at}");
        }
    }

    #[test]
    fn tiles_hold_runs_of_inputs_by_lane() {
        let shape = TileShape { storage: TileStorage::Bf16, outputs: 17, inputs: 40 };
        let rows: Vec<u16> = (0..17 * 40).collect();
        let mut tiles = vec![0xff; shape.bytes()];
        let bands = tiles.chunks_exact_mut(shape.band_bytes());
        for (rows, band) in rows.chunks(16 * 40).zip(bands) {
            shape.tile(bytemuck::cast_slice(rows), band);
        }
        let tiles: Vec<u16> = bytemuck::pod_collect_to_vec(&tiles);
        for (at, &got) in tiles.iter().enumerate() {
            let (tile, piece, lane, i) = (at / 512, at / 256 % 2, at / 8 % 32, at % 8);
            let output = tile / 2 * 16 + piece * 8 + lane / 4;
            let input = tile % 2 * 32 + lane % 4 * 8 + i;
            let is_there = output < 17 && input < 40;
            assert_eq!(usize::from(got), if is_there { output * 40 + input } else { 0 });
        }
    }
}

//! Products on tensor cores: close to the exact value, and the same bits for any number of rows.

use super::super::driver::CudaError;
use super::super::linear_bf16::linear_bf16;
use super::super::tensor::Tensor;
use super::super::tiles::{TileShape, TileStorage, TiledMatrix};
use super::{assert_same, driver, noise};
use crate::level::Dtype;
use crate::math::{bf16_bits, round_bf16};

/// Brings whole matrices, row-major, that take turns.
pub(super) fn bring(to: &TiledMatrix, matrices: &[&[u8]]) {
    let shape = to.shape();
    let row_bytes = shape.inputs * shape.storage.bytes();
    let read = |matrix: usize, some: std::ops::Range<usize>, rows: &mut [u8]| {
        let matrix: &[u8] = matrices[matrix];
        rows.copy_from_slice(&matrix[some.start * row_bytes..some.end * row_bytes]);
        Ok::<_, CudaError>(())
    };
    to.bring((matrices.len(), matrices[0].len() / row_bytes), &read).unwrap();
}

/// Random weights: the matrix on the device, and the values without their scales.
pub(super) fn weights(shape: TileShape, seed: u32) -> (TiledMatrix, Vec<f32>, Vec<f32>) {
    let matrix = TiledMatrix::new(driver(), shape).unwrap();
    let (bytes, values) = random(shape, seed);
    bring(&matrix, &[&bytes]);
    let scales = match shape.storage {
        TileStorage::Bf16 => vec![1.0; shape.outputs],
        TileStorage::Fp8 => {
            let scales: Vec<f32> =
                noise(shape.outputs, seed + 1, 0.5).iter().map(|x| x + 1.0).collect();
            matrix.set_scales(&[&scales]).unwrap();
            scales
        }
    };
    (matrix, values, scales)
}

/// Random weights as the checkpoint has them, and their values.
pub(super) fn random(shape: TileShape, seed: u32) -> (Vec<u8>, Vec<f32>) {
    let noise = noise(shape.outputs * shape.inputs, seed, 1.0);
    match shape.storage {
        TileStorage::Bf16 => {
            let bits = noise.iter().map(|x| bf16_bits(*x));
            (
                bits.flat_map(u16::to_le_bytes).collect(),
                noise.iter().map(|x| round_bf16(*x)).collect(),
            )
        }
        TileStorage::Fp8 => {
            // Four exponents around 1, and both signs.
            let byte = |x: &f32| {
                let small = (x.to_bits() >> 18 & 31) as u8;
                if *x < 0.0 { 0xa8 + small } else { 0x28 + small }
            };
            let bytes: Vec<u8> = noise.iter().map(byte).collect();
            let value = |byte: &u8| {
                let size =
                    (8.0 + f32::from(byte & 7)) * 2.0_f32.powi(i32::from(byte >> 3 & 15) - 10);
                if byte & 0x80 == 0 { size } else { -size }
            };
            let values = bytes.iter().map(value).collect();
            (bytes, values)
        }
    }
}

fn product(x: &[f32], w: &TiledMatrix) -> Vec<f32> {
    let shape = w.shape();
    let x = Tensor::of(driver(), Dtype::Bf16, shape.inputs, x);
    let mut out = Tensor::new(driver(), Dtype::F32, (0, shape.outputs)).unwrap();
    linear_bf16(driver(), &x, w, &mut out).unwrap();
    out.to_host().unwrap()
}

#[test]
fn bits_do_not_depend_on_the_number_of_rows() {
    let cases = [(16, 32), (33, 40), (70, 64), (48, 256), (20, 608), (5, 8)];
    for storage in [TileStorage::Bf16, TileStorage::Fp8] {
        for (outputs, inputs) in cases {
            let shape = TileShape { storage, outputs, inputs };
            let (w, values, scales) = weights(shape, 7);
            let x: Vec<f32> = noise(130 * inputs, 1, 1.0).into_iter().map(round_bf16).collect();
            let all = product(&x, &w);
            for (row, got) in all.chunks_exact(outputs).enumerate() {
                for (n, got) in got.iter().enumerate() {
                    let pairs = x[row * inputs..][..inputs].iter().zip(&values[n * inputs..]);
                    let terms = pairs.map(|(x, w)| f64::from(*x) * f64::from(*w));
                    let (sum, size) =
                        terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                    let scale = f64::from(scales[n]);
                    // One rounding per addition, of at most the sum of all sizes.
                    let limit = size * scale * inputs as f64 * f64::from(f32::EPSILON) / 2.0;
                    assert!((f64::from(*got) - sum * scale).abs() <= limit, "{shape:?} {row} {n}");
                }
            }
            for rows in [0, 1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 129] {
                let some = product(&x[(130 - rows) * inputs..], &w);
                assert_same(&some, &all[(130 - rows) * outputs..], &format!("{shape:?} {rows}"));
            }
        }
    }
}

#[test]
fn many_rows_have_the_bits_of_few() {
    // 130 rows of 6500 outputs are 2 * 51 blocks of the wide kernel.
    for storage in [TileStorage::Bf16, TileStorage::Fp8] {
        let shape = TileShape { storage, outputs: 6500, inputs: 328 };
        let (w, _, _) = weights(shape, 7);
        let x: Vec<f32> = noise(130 * shape.inputs, 1, 1.0).into_iter().map(round_bf16).collect();
        let all = product(&x, &w);
        for row in [0, 63, 64, 129] {
            let some = product(&x[row * shape.inputs..][..shape.inputs], &w);
            assert_same(&all[row * shape.outputs..][..shape.outputs], &some, &format!("{row}"));
        }
    }
}

/// The kernels take an FP8 weight apart by its bits: one that is no number would become a large one.
#[test]
fn fp8_weights_that_are_no_numbers_are_refused() {
    let shape = TileShape { storage: TileStorage::Fp8, outputs: 20, inputs: 64 };
    let matrix = TiledMatrix::new(driver(), shape).unwrap();
    let brought = |bad: u8| {
        let read = |_: usize, some: std::ops::Range<usize>, rows: &mut [u8]| {
            rows.fill(0x38);
            if some.contains(&19) {
                rows[(19 - some.start) * 64 + 63] = bad;
            }
            Ok::<_, CudaError>(())
        };
        matrix.bring((1, 20), &read)
    };
    brought(0x7e).unwrap();
    for bad in [0x7f, 0xff] {
        assert!(matches!(brought(bad), Err(CudaError::NotFinite)), "{bad:#x}");
    }
}

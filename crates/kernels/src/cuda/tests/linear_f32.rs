//! Products against the CPU.

use super::super::linear_f32::linear_f32;
use super::super::matrix::{Matrix, MatrixShape, Storage};
use super::super::tensor::Tensor;
use super::step::{cpu, on_cpu};
use super::{assert_same, driver, noise};
use crate::device::Device;
use crate::level::Dtype;
use crate::math::bf16_bits;

/// The product on both devices.
#[track_caller]
fn check(rows: usize, MatrixShape { outputs, inputs }: MatrixShape, storage: Storage) {
    let (x, w) = (noise(rows * inputs, 1, 2.0), noise(outputs * inputs, 2, 1.0));
    // Some matrices have scales.
    let scales = outputs.is_multiple_of(2).then(|| noise(outputs, 3, 2.0));

    let mut cpu = cpu(Dtype::F32);
    let of_cpu = match storage {
        Storage::F32 => crate::Storage::F32,
        Storage::Bf16 => crate::Storage::Bf16,
    };
    let mut packed = crate::Matrix::zeroed(of_cpu, outputs, inputs).unwrap();
    for (i, mut panel) in packed.panels_mut().enumerate() {
        for (lane, row) in w.chunks_exact(inputs).skip(16 * i).take(16).enumerate() {
            panel.put_output(lane, 0, row.iter().copied());
        }
    }
    let shape = MatrixShape { outputs, inputs };
    let mut matrix = Matrix::new(driver(), storage, shape).unwrap();
    let bytes: Vec<u8> = match storage {
        Storage::F32 => bytemuck::cast_slice(&w).to_vec(),
        Storage::Bf16 => w.iter().flat_map(|x| bf16_bits(*x).to_le_bytes()).collect(),
    };
    matrix.bring(&bytes).unwrap();
    if let Some(scales) = scales {
        matrix.set_scales(driver(), &scales).unwrap();
        packed.set_scales(scales);
    }

    let left = on_cpu(&mut cpu, &x, inputs);
    let mut want = cpu.tensor(0, outputs);
    cpu.linear(&left, &packed, &mut want);
    let mut out = Tensor::of(driver(), Dtype::F32, outputs, &[]);
    linear_f32(driver(), &Tensor::of(driver(), Dtype::F32, inputs, &x), &matrix, &mut out).unwrap();
    let what = format!("{rows} rows, {shape:?}, {storage:?}");
    assert_same(&out.to_host().unwrap(), want.data(), &what);
}

#[test]
fn products_match_the_cpu_bit_for_bit() {
    // Around the tile of 32 rows, 64 outputs and 32 inputs.
    for rows in [0, 1, 2, 31, 32, 33] {
        for outputs in [1, 16, 63, 64, 65, 130] {
            for inputs in [2, 30, 32, 34, 100] {
                for storage in [Storage::F32, Storage::Bf16] {
                    check(rows, MatrixShape { outputs, inputs }, storage);
                }
            }
        }
    }
    check(3, MatrixShape { outputs: 5, inputs: 1 }, Storage::F32);
    check(3, MatrixShape { outputs: 5, inputs: 33 }, Storage::F32);
}

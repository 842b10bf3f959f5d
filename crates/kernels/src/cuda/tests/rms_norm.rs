//! RMS norm against the CPU's.

use super::super::buffer::Buffer;
use super::super::rms_norm::rms_norm;
use super::super::tensor::Tensor;
use super::{assert_same, driver, noise};
use crate::level::{Dtype, Level};
use crate::norm::{self, Rounding};

#[test]
fn f32_matches_the_cpu_bit_for_bit() {
    // Around the 16 chains, and the 256 threads of a block.
    for hidden in [1, 16, 37, 256, 600] {
        for rows in [0, 1, 3] {
            let (x, y) = (noise(rows * hidden, 1, 3.0), noise(rows * hidden, 2, 1.0));
            let weight = noise(hidden, 3, 2.0);
            let sum: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
            let mut want = vec![0.0; x.len()];
            norm::rms_norm(Level::Portable, &sum, &weight, 1e-5, Rounding::None, &mut want);

            let tensor = |values: &[f32]| Tensor::of(driver(), Dtype::F32, hidden, values);
            let (x, y) = (tensor(&x), tensor(&y));
            let weight = Buffer::of(driver(), "weights", bytemuck::cast_slice(&weight)).unwrap();
            let mut out = tensor(&[]);
            rms_norm(driver(), (&x, Some(&y)), (&weight, 1e-5), &mut out).unwrap();
            assert_same(&out.to_host().unwrap(), &want, &format!("{hidden} {rows}"));
            assert_same(&x.to_host().unwrap(), &sum, "the residual");
        }
    }
}

#[test]
fn bf16_is_rounded_before_the_weight_and_after_it() {
    for hidden in [16, 37, 600] {
        let (x, weight) = (noise(2 * hidden, 1, 3.0), noise(hidden, 3, 2.0));
        let mut want = vec![0.0; x.len()];
        norm::rms_norm(Level::Portable, &x, &weight, 1e-5, Rounding::Bf16, &mut want);
        let x = Tensor::of(driver(), Dtype::F32, hidden, &x);
        let weight = Buffer::of(driver(), "weights", bytemuck::cast_slice(&weight)).unwrap();
        let mut out = Tensor::new(driver(), Dtype::Bf16, (0, hidden)).unwrap();
        rms_norm(driver(), (&x, None), (&weight, 1e-5), &mut out).unwrap();
        let got = out.to_host().unwrap();
        let far = got.iter().zip(&want).filter(|(got, want)| got != want).count();
        // The order of the sum differs, so a value at the edge between two bf16 may round to the other one.
        assert!(far * 50 <= got.len(), "{far} of {} differ", got.len());
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() <= want.abs() * 0.016, "{got} {want}");
        }
    }
}

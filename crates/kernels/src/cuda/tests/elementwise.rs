//! Element-wise operations against the CPU.

use super::super::elementwise::{add, pack, select, swiglu};
use super::super::gate::{Route, gate};
use super::super::tensor::Tensor;
use super::step::{LIMITS, of_tokens, rope, upload};
use super::{assert_same, driver, noise};
use crate::device::SampleRow;
use crate::level::{Dtype, Level};
use crate::math::round_bf16;
use crate::norm::{self, Rounding};
use crate::sample::Sampling;

/// Around the 4 columns of a thread and the 1024 of a block; aligned rows and others.
const COLUMNS: [usize; 8] = [1, 3, 4, 37, 1020, 1024, 1025, 1028];
const ROWS: [usize; 3] = [0, 1, 3];
const DTYPES: [Dtype; 2] = [Dtype::F32, Dtype::Bf16];

fn tensor(dtype: Dtype, columns: usize, values: &[f32]) -> Tensor {
    Tensor::of(driver(), dtype, columns, values)
}

/// As a tensor of this type holds it.
fn stored(dtype: Dtype, values: &[f32]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => values.to_vec(),
        Dtype::Bf16 => values.iter().map(|x| round_bf16(*x)).collect(),
    }
}

/// Every shape, with a text that names it.
fn each(check: impl Fn(usize, usize, Dtype, &str)) {
    for columns in COLUMNS {
        for rows in ROWS {
            for dtype in DTYPES {
                check(rows, columns, dtype, &format!("{rows} rows of {columns} in {dtype}"));
            }
        }
    }
}

#[test]
fn swiglu_matches_the_cpu() {
    each(|rows, width, dtype, what| {
        let gate_up = noise(rows * 2 * width, 4, 9.0);
        let mut want = vec![0.0; rows * width];
        norm::swiglu(Level::Portable, &gate_up, width, Rounding::from(dtype), &mut want);
        let mut out = tensor(dtype, width, &[]);
        swiglu(driver(), &tensor(Dtype::F32, 2 * width, &gate_up), &mut out).unwrap();
        assert_same(&out.to_host().unwrap(), &want, what);
    });
}

#[test]
fn sums_match_the_cpu() {
    each(|rows, columns, dtype, what| {
        let (x, y) = (noise(rows * columns, 5, 2.0), noise(rows * columns, 6, 3.0));
        let mut want = x.clone();
        norm::add(Level::Portable, &mut want, &stored(dtype, &y));
        let mut x = tensor(Dtype::F32, columns, &x);
        add(driver(), &mut x, &tensor(dtype, columns, &y)).unwrap();
        assert_same(&x.to_host().unwrap(), &want, what);
    });
}

#[test]
fn rows_are_packed_with_their_scores() {
    each(|rows, columns, dtype, what| {
        let (h, logits) = (stored(dtype, &noise(rows * columns, 7, 2.0)), noise(rows * 5, 8, 4.0));
        let (mut chosen, mut scores, mut want) = (vec![], vec![], vec![0.0; h.len()]);
        crate::gate::top1(&logits, 5, &mut chosen, &mut scores);
        norm::scale_rows(Level::Portable, &h, &scores, Rounding::from(dtype), &mut want);
        let mut route = Route::new(driver()).unwrap();
        gate(driver(), &tensor(Dtype::F32, 5, &logits), &mut route).unwrap();
        let mut wire = tensor(dtype, columns, &[]);
        pack(driver(), &tensor(dtype, columns, &h), &route, &mut wire).unwrap();
        assert_same(&wire.to_host().unwrap(), &want, what);
    });
}

#[test]
fn selected_rows_come_in_order() {
    for columns in COLUMNS {
        for chosen in [&[][..], &[4], &[3, 0, 3]] {
            let x = noise(5 * columns, 9, 1.0);
            let mut step = of_tokens(&[0; 5]);
            let sample = |row: &u32| SampleRow { row: *row, sampling: Sampling::default() };
            step.samples = chosen.iter().map(sample).collect();
            let batch = upload(&step, &rope(4), LIMITS);
            let mut out = tensor(Dtype::F32, columns, &[]);
            select(driver(), &batch, &tensor(Dtype::F32, columns, &x), &mut out).unwrap();
            let row = |row: &u32| x[*row as usize * columns..][..columns].to_vec();
            let want: Vec<f32> = chosen.iter().flat_map(row).collect();
            assert_same(&out.to_host().unwrap(), &want, &format!("{columns} {chosen:?}"));
        }
    }
}

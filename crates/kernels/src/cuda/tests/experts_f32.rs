//! The experts of the reference profile have the CPU's bits.

use super::super::buffer::Buffer;
use super::super::dispatch::{
    Arrivals, RouteTable, RouteTableParts, Serving, Source, Sources, dispatch,
};
use super::super::experts_f32::{PlainExpert, PlainShape, PlainTable, experts_f32};
use super::super::tensor::Tensor;
use super::{assert_same, driver, noise};
use crate::level::{Dtype, Level};
use crate::math::{bf16_bits, round_bf16};
use crate::norm::{self, Rounding};
use std::sync::Arc;

/// `x * w^T`, one chain per element as the CPU has it.
fn product(x: &[f32], w: &[f32], scales: Option<&[f32]>) -> Vec<f32> {
    let sum = |w: &[f32]| x.iter().zip(w).fold(0.0_f32, |sum, (x, w)| x.mul_add(*w, sum));
    let sums = w.chunks_exact(x.len()).map(sum).enumerate();
    sums.map(|(n, sum)| scales.map_or(sum, |scales| sum * scales[n])).collect()
}

/// Weights and scales on the host.
struct Expert {
    gate_up: Vec<f32>,
    down: Vec<f32>,
    scales: Option<(Vec<f32>, Vec<f32>)>,
}

impl Expert {
    fn new(shape: PlainShape, seed: u32) -> Self {
        let PlainShape { dtype, hidden, width } = shape;
        let weights = |count, seed| -> Vec<f32> {
            let noise = noise(count, seed, 0.5).into_iter();
            noise.map(|x| if dtype == Dtype::Bf16 { round_bf16(x) } else { x }).collect()
        };
        Self {
            gate_up: weights(2 * width * hidden, seed),
            down: weights(hidden * width, seed + 1),
            scales: (dtype == Dtype::Bf16)
                .then(|| (noise(2 * width, seed + 2, 2.0), noise(hidden, seed + 3, 2.0))),
        }
    }

    fn upload(&self, dtype: Dtype) -> Arc<PlainExpert> {
        let put = |bytes: &[u8]| Buffer::of(driver(), "weights", bytes).unwrap();
        let weights = |values: &[f32]| match dtype {
            Dtype::F32 => put(bytemuck::cast_slice(values)),
            Dtype::Bf16 => {
                let bits: Vec<u16> = values.iter().map(|x| bf16_bits(*x)).collect();
                put(bytemuck::cast_slice(&bits))
            }
        };
        let scales = self.scales.as_ref();
        Arc::new(PlainExpert {
            gate_up: weights(&self.gate_up),
            gate_up_scales: scales.map(|scales| put(bytemuck::cast_slice(&scales.0))),
            down: weights(&self.down),
            down_scales: scales.map(|scales| put(bytemuck::cast_slice(&scales.1))),
        })
    }

    fn run(&self, x: &[f32], width: usize) -> Vec<f32> {
        let scales = self.scales.as_ref();
        let gate_up = product(x, &self.gate_up, scales.map(|scales| &scales.0[..]));
        let mut act = vec![0.0; width];
        norm::swiglu(Level::Portable, &gate_up, width, Rounding::None, &mut act);
        product(&act, &self.down, scales.map(|scales| &scales.1[..]))
    }
}

#[test]
fn results_are_those_of_the_cpu_bit_for_bit() {
    for (dtype, hidden, width) in [(Dtype::F32, 96, 70), (Dtype::Bf16, 70, 33)] {
        let shape = PlainShape { dtype, hidden, width };
        let all = [Expert::new(shape, 1), Expert::new(shape, 11)];
        let uploaded = all.iter().map(|expert| expert.upload(dtype)).collect();
        let table = PlainTable::new(shape, uploaded);
        let words = Buffer::of(driver(), "words", bytemuck::cast_slice(table.words())).unwrap();
        // The second expert is served by another rank for some rows.
        let parts = RouteTableParts {
            spans: &[vec![(0, 1), (1, 2)]],
            targets: &[(0, 0, 0), (0, 1, 1 << 31), (1, 0, 0)],
            start: 0,
        };
        let routes = RouteTable::new(driver(), parts).unwrap();
        let is_here = |row: usize| u32::try_from(row).unwrap().wrapping_mul(0x9e37_79b9) < 1 << 31;
        let wanted: Vec<u16> = (0..23).map(|i| u16::from(i % 4 == 0)).collect();
        let x = noise(wanted.len() * hidden, 5, 2.0);
        let rows = Buffer::of(driver(), "rows", bytemuck::cast_slice(&x)).unwrap();
        let results = Buffer::new(driver(), "results", x.len() * 4).unwrap();
        let experts = Buffer::of(driver(), "experts", bytemuck::cast_slice(&wanted)).unwrap();
        let source = Source {
            wanted: experts.address(),
            rows: rows.address(),
            results: results.address(),
            count: 23,
            routes: routes.addresses(),
        };
        let mut sources = Sources::new(driver()).unwrap();
        sources.set(std::iter::once(source)).unwrap();
        let mut arrivals = Arrivals::new(driver()).unwrap();
        arrivals.reserve(8, 23).unwrap();
        let serving = Serving { layer: 0, me: 0, slots: 2, served: 0, unserved: 0 };
        dispatch(driver(), &sources, serving, &mut arrivals).unwrap();
        let mut act = Tensor::new(driver(), Dtype::F32, (0, width)).unwrap();
        let table = (&table, words.address());
        experts_f32(driver(), (&sources, &arrivals), table, &mut act).unwrap();
        let mut got = vec![0.0_f32; x.len()];
        results.read(bytemuck::cast_slice_mut(&mut got)).unwrap();
        for (row, expert) in wanted.iter().enumerate().filter(|(row, e)| **e == 0 || is_here(*row))
        {
            let at = row * hidden..(row + 1) * hidden;
            let want = all[usize::from(*expert)].run(&x[at.clone()], width);
            assert_same(&got[at], &want, &format!("{shape:?} row {row}"));
        }
    }
}

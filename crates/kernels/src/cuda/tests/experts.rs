//! Grouped experts against one product after the other.

use super::super::buffer::Buffer;
use super::super::dispatch::{
    Arrivals, RouteTable, RouteTableParts, Serving, Source, Sources, dispatch,
};
use super::super::experts::{ExpertShape, ExpertTable, SlotLoad, TiledExpert, experts};
use super::super::linear_bf16::linear_bf16;
use super::super::tensor::Tensor;
use super::super::tiles::{TileShape, TileStorage, TiledMatrix};
use super::linear_bf16::{bring, random, weights};
use super::{assert_same, driver, noise};
use crate::level::{Dtype, Level};
use crate::math::{bf16_bits, bf16_to_f32, round_bf16};
use crate::norm::{self, Rounding};
use std::sync::Arc;

/// An expert tiled for the fused kernel, and its gates and ups, one after the other, as a plain matrix.
fn expert(shape: ExpertShape, seed: u32) -> (Arc<TiledExpert>, TiledMatrix) {
    let ExpertShape { storage, hidden, width } = shape;
    let plain_shape = TileShape { storage, outputs: 2 * width, inputs: hidden };
    let (plain, _, scales) = weights(plain_shape, seed);
    let (bytes, _) = random(plain_shape, seed);
    let gate_up = TiledMatrix::new(driver(), shape.gate_up()).unwrap();
    let (gates, ups) = bytes.split_at(bytes.len() / 2);
    bring(&gate_up, &[gates, ups]);
    if storage == TileStorage::Fp8 {
        gate_up.set_scales(&[&scales[..width], &scales[width..]]).unwrap();
    }
    let (down, _, _) = weights(shape.down(), seed + 100);
    (Arc::new(TiledExpert { gate_up, down }), plain)
}

fn linear(x: &[f32], w: &TiledMatrix) -> Vec<f32> {
    let x = Tensor::of(driver(), Dtype::Bf16, w.shape().inputs, x);
    let mut out = Tensor::new(driver(), Dtype::F32, (0, w.shape().outputs)).unwrap();
    linear_bf16(driver(), &x, w, &mut out).unwrap();
    out.to_host().unwrap()
}

/// Rows of one source, and where their results go.
struct Rows {
    values: Vec<f32>,
    rows: Buffer,
    results: Buffer,
    experts: Buffer,
}

fn rows(hidden: usize, experts: &[u16], seed: u32) -> Rows {
    let values: Vec<f32> =
        noise(experts.len() * hidden, seed, 1.0).into_iter().map(round_bf16).collect();
    let bits: Vec<u16> = values.iter().map(|x| bf16_bits(*x)).collect();
    Rows {
        rows: Buffer::of(driver(), "rows", bytemuck::cast_slice(&bits)).unwrap(),
        results: Buffer::new(driver(), "results", bits.len() * 2).unwrap(),
        experts: Buffer::of(driver(), "experts", bytemuck::cast_slice(experts)).unwrap(),
        values,
    }
}

#[track_caller]
fn check(shape: ExpertShape, wanted: &[Vec<u16>]) {
    let ExpertShape { hidden, width, .. } = shape;
    let all: Vec<_> = (0..3).map(|slot| expert(shape, 10 * slot)).collect();
    let held = all.iter().map(|(expert, _)| Arc::clone(expert)).collect();
    let table = ExpertTable::new(shape, held);
    let words = Buffer::of(driver(), "words", bytemuck::cast_slice(table.words())).unwrap();
    // Experts 0, 1, 2 in slots 2, 0, 1 here; expert 3 elsewhere.
    let parts = RouteTableParts {
        spans: &[vec![(0, 1), (1, 1), (2, 1), (3, 1)]],
        targets: &[(1, 2), (1, 0), (1, 1), (0, 0)].map(|(rank, slot)| (rank, slot, u32::MAX)),
        start: 0,
    };
    let routes = RouteTable::new(driver(), parts).unwrap();
    let of_rank: Vec<Rows> = (0..).zip(wanted).map(|(i, wanted)| rows(hidden, wanted, i)).collect();
    let source = |(rows, wanted): (&Rows, &Vec<u16>)| Source {
        wanted: rows.experts.address(),
        rows: rows.rows.address(),
        results: rows.results.address(),
        count: u32::try_from(wanted.len()).unwrap(),
        routes: routes.addresses(),
    };
    let mut sources = Sources::new(driver()).unwrap();
    sources.set(of_rank.iter().zip(wanted).map(source)).unwrap();
    let mut arrivals = Arrivals::new(driver()).unwrap();
    arrivals.reserve(8, sources.rows()).unwrap();
    let serving = Serving { layer: 0, me: 1, slots: 3, served: 0, unserved: 0 };
    dispatch(driver(), &sources, serving, &mut arrivals).unwrap();
    for load in [SlotLoad::Few, SlotLoad::Many] {
        let mut act = Tensor::new(driver(), Dtype::Bf16, (0, width)).unwrap();
        let table = (&table, words.address());
        experts(driver(), (&sources, &arrivals), table, load, &mut act).unwrap();
        for (rows, wanted) in of_rank.iter().zip(wanted) {
            let mut bits = vec![0_u16; wanted.len() * hidden];
            rows.results.read(bytemuck::cast_slice_mut(&mut bits)).unwrap();
            for (i, wanted) in wanted.iter().enumerate().filter(|(_, wanted)| **wanted < 3) {
                let (expert, plain) = &all[[2, 0, 1][usize::from(*wanted)]];
                let gate_up = linear(&rows.values[i * hidden..][..hidden], plain);
                let mut act = vec![0.0; width];
                norm::swiglu(Level::Portable, &gate_up, width, Rounding::Bf16, &mut act);
                let want: Vec<f32> =
                    linear(&act, &expert.down).into_iter().map(round_bf16).collect();
                let got: Vec<f32> =
                    bits[i * hidden..][..hidden].iter().map(|x| bf16_to_f32(*x)).collect();
                assert_same(&got, &want, &format!("{shape:?} {load:?} row {i}"));
            }
        }
    }
}

#[test]
fn experts_equal_the_plain_products_whatever_else_arrives() {
    for storage in [TileStorage::Bf16, TileStorage::Fp8] {
        for (hidden, width) in [(64, 40), (136, 64), (256, 24)] {
            let shape = ExpertShape { storage, hidden, width };
            // Slot 1 has no rows; others have few, more than one chunk of few, more than one of many.
            check(shape, &[vec![], vec![0, 3, 1, 0]]);
            let most: Vec<u16> = (0..85).map(|i| if i % 5 == 0 { 1 } else { 0 }).collect();
            check(shape, &[vec![2, 2, 0], vec![], most]);
        }
        // A second chunk of many, with one row.
        check(ExpertShape { storage, hidden: 64, width: 40 }, &[vec![0; 100], vec![0; 29]]);
    }
}

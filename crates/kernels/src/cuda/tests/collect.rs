//! Launches of a step are collected, and nothing that others do in between cuts them in two.

use super::super::buffer::Buffer;
use super::super::device::Cuda;
use super::super::driver::{Driver, StepKind};
use super::super::elementwise::add;
use super::super::tensor::Tensor;
use super::own_driver;
use crate::level::Dtype;
use std::sync::Arc;

/// Enough for a graph.
const LAUNCHES: usize = 40;

/// Collects additions of ones to `x`; `meanwhile` comes in their middle. What `x` has then.
fn step(driver: &Arc<Driver>, kind: StepKind, meanwhile: impl FnOnce()) -> Vec<f32> {
    let mut x = Tensor::of(driver, Dtype::F32, 4, &[0.0; 4]);
    let ones = Tensor::of(driver, Dtype::F32, 4, &[1.0; 4]);
    driver.begin_step(kind).unwrap();
    for _ in 0..LAUNCHES / 2 {
        add(driver, &mut x, &ones).unwrap();
    }
    meanwhile();
    for _ in 0..LAUNCHES / 2 {
        add(driver, &mut x, &ones).unwrap();
    }
    // Freed before anything was enqueued.
    drop(ones);
    x.to_host().unwrap()
}

#[test]
fn memory_that_others_free_or_fill_leaves_a_step_in_one_piece() {
    let driver = own_driver();
    let rank = Cuda::new(&driver, Dtype::F32, None, (1, 1)).unwrap();
    let other = Buffer::new(&driver, "other", 1 << 20).unwrap();
    let held = driver.taken().bytes;
    let sums = step(&driver, StepKind::Decoding, || {
        let driver = Arc::clone(&driver);
        let work = move || {
            drop(other);
            drop(Buffer::of(&driver, "another", &[1; 100]).unwrap());
        };
        std::thread::spawn(work).join().unwrap();
    });
    assert_eq!(sums, [LAUNCHES as f32; 4]);
    assert_eq!(driver.graphs().enqueued, 1, "one list");
    assert!(driver.taken().bytes < held, "freed once the step was enqueued");
    drop(rank);
}

#[test]
fn prompts_and_steps_of_several_ranks_are_not_collected() {
    let driver = own_driver();
    let rank = || Cuda::new(&driver, Dtype::F32, None, (1, 1)).unwrap();
    let first = rank();
    assert_eq!(step(&driver, StepKind::Others, || ()), [LAUNCHES as f32; 4]);
    let second = rank();
    assert_eq!(step(&driver, StepKind::Decoding, || ()), [LAUNCHES as f32; 4]);
    assert_eq!(driver.graphs().enqueued, 0);
    drop(second);
    assert_eq!(step(&driver, StepKind::Decoding, || ()), [LAUNCHES as f32; 4]);
    assert_eq!(driver.graphs().enqueued, 1);
    drop(first);
}

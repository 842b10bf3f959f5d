//! The router against the CPU.

use super::super::gate::{Route, gate};
use super::super::tensor::Tensor;
use super::{assert_same, driver, noise};
use crate::gate::top1;
use crate::level::Dtype;

#[track_caller]
fn check(logits: &[f32], experts: usize) {
    let (mut chosen, mut scores) = (vec![], vec![]);
    top1(logits, experts, &mut chosen, &mut scores);
    let mut route = Route::new(driver()).unwrap();
    gate(driver(), &Tensor::of(driver(), Dtype::F32, experts, logits), &mut route).unwrap();
    assert_eq!(route.experts_to_host().unwrap(), chosen, "{experts}");
    let mut got = vec![0.0_f32; chosen.len()];
    route.scores().read(bytemuck::cast_slice_mut(&mut got)).unwrap();
    assert_same(&got, &scores, &format!("scores of {experts}"));
}

#[test]
fn choices_match_the_cpu() {
    // Around a warp's lanes and a block's rows.
    for experts in [1, 2, 16, 31, 32, 33, 64, 128, 200] {
        for rows in [0, 1, 3, 4, 5, 9] {
            check(&noise(rows * experts, 1, 5.0), experts);
        }
    }
}

#[test]
fn ties_go_to_the_lowest_id() {
    for (first, second) in [(0, 1), (3, 35), (31, 32), (2, 69), (38, 40), (65, 69)] {
        let mut logits = vec![-1.0; 70];
        (logits[first], logits[second]) = (2.0, 2.0);
        check(&logits, 70);
    }
    check(&[-0.0, 0.0, -0.0], 3);
    check(&[7.0; 70], 70);
}

#[test]
fn what_is_no_number_does_not_win() {
    let (nan, low) = (f32::NAN, f32::NEG_INFINITY);
    check(&[1.0, nan, 2.0, nan], 4);
    check(&[nan, nan, 2.0, 1.0], 4);
    check(&[low, nan, nan], 3);
    check(&[low, low, -1e30, low], 4);
    check(&[nan; 40], 40);
    check(&[low; 40], 40);
    check(&[1.0, f32::INFINITY, f32::INFINITY], 3);
}

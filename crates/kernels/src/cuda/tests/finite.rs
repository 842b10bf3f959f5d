//! Planted values that are not finite are found.

use super::super::finite::Notes;
use super::super::tensor::Tensor;
use super::{driver, noise};
use crate::level::Dtype;

fn flags(notes: &mut Notes) -> Vec<Option<u32>> {
    notes.read().unwrap().0.collect()
}

#[test]
fn first_row_that_is_not_finite_is_found() {
    // Around the 4 columns of a thread and the 1024 of a block.
    for columns in [1, 3, 37, 1024, 1025, 2100] {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let mut notes = Notes::new(driver(), (4, 0)).unwrap();
            notes.reset(driver()).unwrap();
            let look = |bad: &[(usize, usize, f32)], flag| {
                let mut x = noise(5 * columns, 1, 1e30);
                for (row, column, value) in bad {
                    x[row * columns + column] = *value;
                }
                notes.look(driver(), &Tensor::of(driver(), dtype, columns, &x), flag).unwrap();
            };
            let last = columns - 1;
            look(&[(4, last, f32::NAN), (3, 0, f32::NEG_INFINITY)], 0);
            look(&[], 1);
            look(&[(0, last, f32::INFINITY), (1, last / 2, f32::NAN)], 2);
            look(&[(4, last, f32::NAN)], 3);
            let want = [Some(3), None, Some(0), Some(4)];
            assert_eq!(flags(&mut notes), want, "{columns} {dtype}");
        }
    }
}

#[test]
fn nothing_is_found_in_no_rows_or_after_a_reset() {
    let mut notes = Notes::new(driver(), (2, 3)).unwrap();
    notes.reset(driver()).unwrap();
    notes.look(driver(), &Tensor::of(driver(), Dtype::F32, 3, &[]), 1).unwrap();
    assert_eq!(flags(&mut notes), [None, None]);
    notes.look(driver(), &Tensor::of(driver(), Dtype::F32, 3, &[f32::NAN; 3]), 1).unwrap();
    assert_eq!(flags(&mut notes), [None, Some(0)]);
    notes.reset(driver()).unwrap();
    assert_eq!(flags(&mut notes), [None, None]);
}

//! A device that does not finish: on a GPU one that is given no time.

use super::super::driver::{CudaError, Driver, Options};
use super::super::linear_bf16::linear_bf16;
use super::super::tensor::Tensor;
use super::super::tiles::{TileShape, TileStorage, TiledMatrix};
use super::REAL;
use crate::level::Dtype;
use std::sync::Arc;
use std::time::Duration;

/// Rows, inputs and outputs: a tenth of a millisecond of the fastest GPU, and ten times the limit ...
const SIZE: usize = 2048;
/// ... and of what stands in for one, whose other devices wait until it is through.
const SIZE_EMULATED: usize = 128;
const WAIT_MAX: Duration = Duration::from_micros(10);

fn driver() -> Arc<Driver> {
    Arc::new(match std::env::var(REAL) {
        Ok(number) => {
            let options = Options { cache: None, wait_max: WAIT_MAX };
            Driver::open(number.parse().unwrap(), &options).unwrap()
        }
        Err(_) => Driver::emulated_until(1, WAIT_MAX).unwrap(),
    })
}

#[test]
fn device_that_does_not_finish_has_failed_and_nothing_waits_for_it_again() {
    let driver = driver();
    let is_emulated = driver.identity().1.starts_with("no GPU");
    let size = if is_emulated { SIZE_EMULATED } else { SIZE };
    let shape = TileShape { storage: TileStorage::Bf16, outputs: size, inputs: size };
    let weights = TiledMatrix::new(&driver, shape).unwrap();
    let mut x = Tensor::new(&driver, Dtype::Bf16, (0, size)).unwrap();
    x.resize(size).unwrap();
    let mut out = Tensor::new(&driver, Dtype::F32, (0, size)).unwrap();
    // Nothing is freed in between: that waits.
    out.resize(size).unwrap();
    for rows in [1, size] {
        x.resize(rows).unwrap();
        // The emulated device comes to the end of the first one only.
        linear_bf16(&driver, &x, &weights, &mut out).unwrap();
    }
    let hangs = |result| matches!(result, Err(CudaError::Hangs { .. }));
    assert!(hangs(out.to_host().map(drop)));
    assert!(matches!(driver.failure(), Some(CudaError::Hangs { .. })));
    assert!(hangs(x.to_host().map(drop)), "and so does whatever comes after it");
    assert!(hangs(linear_bf16(&driver, &x, &weights, &mut out)));
    assert!(hangs(Tensor::new(&driver, Dtype::F32, (1, 1)).map(drop)));
    // All of it goes without another wait.
    drop((weights, x, out, driver));
}

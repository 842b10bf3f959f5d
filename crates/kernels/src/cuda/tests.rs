//! The kernels, emulated, against the CPU device.

use super::driver::{Driver, Options};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

mod attention_bf16;
mod attention_f32;
mod batch;
mod collect;
mod dispatch;
mod elementwise;
mod embed;
mod experts;
mod experts_f32;
mod finite;
mod gate;
mod hang;
mod kv_rows;
mod lending;
mod linear_bf16;
mod linear_f32;
mod nvml;
mod read;
mod rms_norm;
mod sample;
mod step;

/// Set to the number of a GPU, the tests run there.
const REAL: &str = "HERD_TEST_GPU";

/// The device of all tests.
fn driver() -> &'static Arc<Driver> {
    static DRIVER: LazyLock<Arc<Driver>> = LazyLock::new(own_driver);
    &DRIVER
}

/// One that no other test has.
fn own_driver() -> Arc<Driver> {
    Arc::new(match std::env::var(REAL) {
        Ok(number) => {
            let options = Options { cache: None, wait_max: Duration::from_secs(30) };
            Driver::open(number.parse().unwrap(), &options).unwrap()
        }
        Err(_) => Driver::emulated().unwrap(),
    })
}

/// `count` values in (-scale, scale) that look random.
fn noise(count: usize, seed: u32, scale: f32) -> Vec<f32> {
    let value = |i: usize| {
        let x = u32::try_from(i).unwrap().wrapping_add(seed.wrapping_mul(0x85eb_ca6b));
        let x = x.wrapping_mul(2_654_435_761).rotate_left(13).wrapping_mul(0x9e37_79b9);
        ((x >> 8) as f32 / 8_388_608.0 - 1.0) * scale
    };
    (0..count).map(value).collect()
}

/// Equal bit for bit.
#[track_caller]
fn assert_same(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(got.to_bits() == want.to_bits(), "{what}: element {i} is {got}, not {want}");
    }
}

//! The product against a plain loop, bit for bit, on every instruction set of this machine.

use super::*;

/// A few bits of noise per index; enough for a test, the same everywhere.
fn noise(i: usize) -> f32 {
    let x = u32::try_from(i)
        .unwrap()
        .wrapping_mul(2_654_435_761)
        .rotate_left(13)
        .wrapping_mul(0x9e37_79b9);
    (x >> 8) as f32 / 8_388_608.0 - 1.0
}

fn matrix(storage: Storage, outputs: usize, inputs: usize) -> Matrix {
    let mut w = Matrix::zeroed(storage, outputs, inputs).unwrap();
    for (p, mut panel) in w.panels_mut().enumerate() {
        for lane in 0..PANEL.min(outputs - p * PANEL) {
            let n = p * PANEL + lane;
            panel.put_output(lane, 0, (0..inputs).map(|k| noise(n * inputs + k + 7)));
        }
    }
    w
}

/// The definition: one chain of fused multiply-adds per element.
fn reference(x: &[f32], rows: usize, w: &Matrix) -> Vec<f32> {
    let mut out = Vec::new();
    for row in x.chunks_exact(w.inputs).take(rows) {
        for n in 0..w.outputs {
            let sum = (0..w.inputs).fold(0.0_f32, |acc, k| w.get(n, k).mul_add(row[k], acc));
            out.push(w.scales.as_ref().map_or(sum, |scales| sum * scales[n]));
        }
    }
    out
}

fn run_at(exec: Exec, x: &[f32], rows: usize, w: &Matrix) -> Vec<f32> {
    let mut out = vec![f32::NAN; rows * w.outputs];
    linear(exec, &mut GemmScratch::default(), x, rows, w, &mut out);
    out
}

#[test]
fn every_level_gives_the_bits_of_the_definition() {
    let mut compared = 0;
    for level in Level::available() {
        for storage in [Storage::F32, Storage::Bf16] {
            for (outputs, inputs) in [(1, 2), (16, 64), (40, 64), (100, 130), (33, 2050)] {
                let mut w = matrix(storage, outputs, inputs);
                if outputs == 40 {
                    w.set_scales((0..outputs).map(|n| noise(n + 3) + 2.0).collect());
                }
                for rows in [1, 2, 3, 4, 5, 6, 7, 8, 13, 70] {
                    let x: Vec<f32> = (0..rows * inputs).map(noise).collect();
                    let exec = Exec { level, dtype: Dtype::F32, threads: 3 };
                    let got = run_at(exec, &x, rows, &w);
                    assert_eq!(
                        got,
                        reference(&x, rows, &w),
                        "{level} {storage:?} {rows}x{outputs}"
                    );
                    compared += 1;
                }
            }
        }
    }
    assert!(100 <= compared);
}

/// The bf16 pair path has the hardware's order of additions: close to the definition, and rows do
/// not depend on each other.
#[test]
fn pairs_of_bf16_are_close_and_invariant() {
    for level in Level::available() {
        let w = matrix(Storage::Bf16, 100, 2050);
        let rows = 13;
        let x: Vec<f32> = (0..rows * w.inputs).map(|i| crate::math::round_bf16(noise(i))).collect();
        let exec = Exec { level, dtype: Dtype::Bf16, threads: 1 };
        let all = run_at(exec, &x, rows, &w);
        for (got, want) in all.iter().zip(reference(&x, rows, &w)) {
            assert!((got - want).abs() < 2e-3, "{level}: {got} {want}");
        }
        for row in 0..rows {
            let alone = run_at(exec, &x[row * w.inputs..][..w.inputs], 1, &w);
            assert_eq!(alone, all[row * w.outputs..][..w.outputs], "{level} row {row}");
        }
    }
}

/// The AVX-512 BF16 code over an emulation of its instruction, so that packing and indices are
/// checked on machines without it.
#[test]
fn pair_code_reads_the_right_elements() {
    #[derive(Clone, Copy)]
    struct Emulated;
    // SAFETY: plain Rust, no features.
    unsafe impl Isa for Emulated {
        type Acc = [f32; 16];
        const ACCS: usize = 1;
        type X = u32;
        type Factor = [u32; 16];
        const PER_PAIR: usize = 1;
        unsafe fn zero() -> [f32; 16] {
            [0.0; 16]
        }
        unsafe fn load(from: *const f32) -> [f32; 16] {
            // SAFETY: 16 readable floats by contract.
            unsafe { from.cast::<[f32; 16]>().read_unaligned() }
        }
        unsafe fn store(acc: [f32; 16], to: *mut f32) {
            // SAFETY: 16 writable floats by contract.
            unsafe { to.cast::<[f32; 16]>().write_unaligned(acc) }
        }
        unsafe fn single(_: *const u8, _: usize) -> [u32; 16] {
            unreachable!("the weights are bf16")
        }
        unsafe fn pair(line: *const u8, part: usize, nth: usize) -> [u32; 16] {
            assert_eq!((part, nth), (0, 0));
            // SAFETY: 64 readable bytes by contract.
            unsafe { line.cast::<[u32; 16]>().read() }
        }
        unsafe fn spread_single(_: *const f32) -> [u32; 16] {
            unreachable!("the weights are bf16")
        }
        unsafe fn spread(x: *const u32) -> [u32; 16] {
            // SAFETY: readable by contract.
            [unsafe { *x }; 16]
        }
        unsafe fn fma(_: [f32; 16], _: [u32; 16], _: [u32; 16]) -> [f32; 16] {
            unreachable!("the weights are bf16")
        }
        unsafe fn fma_pair(acc: [f32; 16], w: [u32; 16], x: [u32; 16]) -> [f32; 16] {
            let halves =
                |bits: u32| (f32::from_bits(bits << 16), f32::from_bits(bits & 0xffff_0000));
            std::array::from_fn(|i| {
                let ((even, odd), (x_even, x_odd)) = (halves(w[i]), halves(x[i]));
                odd.mul_add(x_odd, even.mul_add(x_even, acc[i]))
            })
        }
    }
    for rows in [1, 2, 3, 7, 8, 13, 70] {
        for outputs in [16, 100, 129, 200] {
            let w = matrix(Storage::Bf16, outputs, 2050);
            let x: Vec<f32> =
                (0..rows * w.inputs).map(|i| crate::math::round_bf16(noise(i))).collect();
            let pairs: Vec<u32> = x
                .chunks_exact(2)
                .map(|p| p[0].to_bits() >> 16 | (p[1].to_bits() & 0xffff_0000))
                .collect();
            let left = Left { data: &pairs, stride: w.inputs / 2 };
            let mut out = vec![f32::NAN; rows * outputs];
            let exec = Exec { level: Level::Portable, dtype: Dtype::Bf16, threads: 2 };
            split(exec, rows, &w, &mut out, |task| {
                // SAFETY: `Emulated` needs no features.
                unsafe { run::<Emulated>(&left, task) }
            });
            assert_eq!(out, reference(&x, rows, &w), "{rows}x{outputs}");
        }
    }
}

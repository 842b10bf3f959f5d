//! Elementary functions whose bits do not depend on the machine's libm or vector width.

/// Lanes that the portable loops are written in; two AVX2 registers, one AVX-512 register.
pub(crate) const LANES: usize = 16;

/// Instantiates a function once per instruction set and picks one by [`crate::Level`].
///
/// The body is compiled with the wider registers switched on; it holds no intrinsics, and since
/// nothing in it may be contracted or reassociated, every version gives the same bits.
macro_rules! per_level {
    ($(#[$doc:meta])* fn $name:ident ( $($arg:ident : $ty:ty),* $(,)? ) $body:block) => {
        $(#[$doc])*
        pub(crate) fn $name(level: $crate::Level, $($arg: $ty),*) {
            #[inline(always)]
            fn body($($arg: $ty),*) $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) { body($($arg),*) }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx2,fma")]
            fn avx512($($arg: $ty),*) { body($($arg),*) }

            match level {
                $crate::Level::Portable => body($($arg),*),
                // SAFETY: `Level` above `Portable` is only made when the CPU has the features.
                #[cfg(target_arch = "x86_64")]
                $crate::Level::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::Level::Avx512 | $crate::Level::Avx512Bf16 => unsafe { avx512($($arg),*) },
                #[cfg(not(target_arch = "x86_64"))]
                _ => body($($arg),*),
            }
        }
    };
}
pub(crate) use per_level;

/// `e^x` for every finite `x` and `-inf`; relative error below 2e-7.
///
/// Cody-Waite reduction to `|r| <= ln 2 / 2` and a polynomial of degree 6 (the coefficients are
/// those of Cephes `expf`), scaled by `2^n` through the exponent bits.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    // Below this e^x is under the smallest normal number: it counts as 0, as softmax wants.
    const MIN: f32 = -87.0;
    const MAX: f32 = 88.0;
    // `max` then `min`, written so that the compiler may use the vector instructions.
    let clamped = if x > MIN { x } else { MIN };
    let clamped = if clamped < MAX { clamped } else { MAX };
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
    let n = clamped.mul_add(std::f32::consts::LOG2_E, 12_582_912.0) - 12_582_912.0;
    let r = (-n).mul_add(LN2_HI, clamped);
    let r = (-n).mul_add(LN2_LO, r);
    let mut p = 1.987_569_1e-4_f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 5e-1);
    let y = p.mul_add(r * r, r) + 1.0;
    // Exact: n lies in [-126, 127], so n + 127 is a valid exponent field.
    #[expect(clippy::cast_possible_truncation, reason = "in [1, 254]")]
    let scale = f32::from_bits(((n + 127.0) as u32) << 23);
    if x < MIN { 0.0 } else { y * scale }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Rounds to the nearest bf16 (ties to even) and widens back. Keeps NaN a NaN.
#[inline(always)]
pub(crate) fn round_bf16(x: f32) -> f32 {
    f32::from_bits(u32::from(bf16_bits(x)) << 16)
}

/// The bf16 nearest to `x` (ties to even). Keeps NaN a NaN.
#[inline(always)]
pub(crate) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    let quiet = bits | 0x0040_0000;
    let chosen = if x.is_nan() { quiet } else { rounded };
    // The upper half is the bf16.
    let half = chosen >> 16;
    half as u16
}

/// Widens a bf16.
#[inline(always)]
pub(crate) fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Sum of 16 lanes as a fixed tree.
#[inline(always)]
pub(crate) fn sum_lanes(mut v: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            v[i] += v[i + width];
        }
        width /= 2;
    }
    v[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_2e_7_of_the_exact_value() {
        let mut worst = 0.0_f64;
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - exact) / exact).abs());
        }
        assert!(worst < 2e-7, "{worst}");
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn bf16_rounding_is_that_of_the_half_crate() {
        for i in 0..=u32::from(u16::MAX) {
            for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(i << 16 | low);
                let want = half::bf16::from_f32(x);
                assert_eq!(round_bf16(x).is_nan(), want.is_nan());
                if !want.is_nan() {
                    assert_eq!(bf16_bits(x), want.to_bits(), "{x}");
                }
            }
        }
    }
}

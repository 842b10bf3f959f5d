//! The values: a counter-based generator, so that any element can be made alone.
//!
//! A value is `hash(seed, tensor, index)` read as four 16-bit uniforms whose sum is nearly normal
//! (Irwin-Hall, cut off at 3.46 deviations). That is three multiplications per element and no
//! state, hence vectorised and independent of threads.

use super::WeightType;
use crate::checkpoint::Dtype;
use crate::checkpoint::names::{Kind, Required};
use half::bf16;

/// Of the sum of four uniforms on `0..=65535`.
const MEAN: f32 = 131_070.0;
const DEVIATION: f32 = 37_837.23;

/// Largest FP8 value.
const FP8_MAX: f32 = 448.0;

/// Deviations that [`FP8_MAX`] stands for: the end of the distribution.
const FP8_DEVIATIONS: f32 = MEAN / DEVIATION;

/// How a tensor is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    F32,
    Bf16,
    Fp8,
}

impl Stored {
    pub(super) fn of(kind: Kind, dtype: WeightType) -> Self {
        match (kind, dtype) {
            (Kind::Fp8, _) => Self::Fp8,
            (Kind::Scale, _) | (Kind::Weight | Kind::Norm, WeightType::Bf16) => Self::Bf16,
            (Kind::Weight | Kind::Norm, WeightType::F32) => Self::F32,
        }
    }

    pub(super) fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::Bf16,
            Self::Fp8 => Dtype::F8E4M3,
        }
    }

    pub(super) fn bytes(self) -> u64 {
        self.dtype().bytes() as u64
    }
}

/// Makes elements of one checkpoint.
pub(super) struct Filler {
    seed: u64,
    /// FP8 byte by the upper 16 bits of the 18-bit sum.
    fp8: Vec<u8>,
}

impl Filler {
    pub(super) fn new(seed: u64) -> Self {
        let byte = |step: u16| {
            let sum = f32::from(step) * 4.0 + 1.5;
            to_fp8((sum - MEAN) / MEAN * FP8_MAX)
        };
        Self { seed, fp8: (0..=u16::MAX).map(byte).collect() }
    }

    /// Overwrites `out` with the bytes of the elements from `first` on; a part of an element at the end is left out.
    pub(super) fn fill(&self, tensor: &Required, stored: Stored, first: u64, out: &mut [u8]) {
        let key = mix(self.seed ^ name_hash(&tensor.name));
        let (offset, deviation) = distribution(tensor);
        let factor = deviation / DEVIATION;
        let value = |index: u64| (as_f32(sum(key, index)) - MEAN).mul_add(factor, offset);
        match stored {
            Stored::F32 => {
                for (out, index) in out.as_chunks_mut().0.iter_mut().zip(first..) {
                    *out = value(index).to_le_bytes();
                }
            }
            Stored::Bf16 => {
                for (out, index) in out.as_chunks_mut().0.iter_mut().zip(first..) {
                    *out = bf16::from_f32(value(index)).to_le_bytes();
                }
            }
            Stored::Fp8 => {
                for (out, index) in out.iter_mut().zip(first..) {
                    *out = self.fp8[(sum(key, index) >> 2) as usize];
                }
            }
        }
    }
}

/// Mean and standard deviation of a tensor's values.
fn distribution(tensor: &Required) -> (f32, f32) {
    let shape = &tensor.shape;
    match tensor.kind {
        Kind::Norm => (1.0, 0.1),
        // Fused experts are `[experts, in, out]`, all else is `[out, in]`.
        Kind::Weight => (0.0, weight_deviation(shape[1])),
        // The scale carries it.
        Kind::Fp8 => (0.0, 1.0),
        // The scale does not know the matrix's inputs, and the FP8 packaging is made for large
        // models, so its deviation is the large models' one. Rows differ, as real ones do.
        Kind::Scale => {
            let scale = 0.02 * FP8_DEVIATIONS / FP8_MAX;
            (scale, 0.1 * scale)
        }
    }
}

/// 0.02 as Llama 4's `initializer_range`; small models take the deviation that keeps a layer's
/// output as large as its input, or their logits would all be alike.
fn weight_deviation(inputs: usize) -> f32 {
    const INPUTS_OF_LARGE_MODELS: usize = 512;
    if INPUTS_OF_LARGE_MODELS <= inputs {
        return 0.02;
    }
    let inputs = u16::try_from(inputs).expect("fewer than 512");
    1.0 / f32::from(inputs).sqrt()
}

/// Sum of four uniforms on `0..=65535`.
fn sum(key: u64, index: u64) -> u32 {
    // A Weyl sequence, then a mixer: SplitMix64 with random access.
    let bits = mix(key.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15)));
    let halves = (bits & 0x0000_FFFF_0000_FFFF) + (bits >> 16 & 0x0000_FFFF_0000_FFFF);
    let sum = (halves & 0xFFFF_FFFF) + (halves >> 32);
    u32::try_from(sum).expect("four times 65535 fits")
}

fn as_f32(sum: u32) -> f32 {
    #[expect(clippy::cast_precision_loss, reason = "18 bits fit a mantissa")]
    let sum = sum as f32;
    sum
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// FNV-1a.
fn name_hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Value of a non-negative e4m3fn pattern below 0x7F.
fn fp8_value(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3), f32::from(bits & 7));
    match exponent {
        0 => mantissa * 2.0_f32.powi(-9),
        _ => (8.0 + mantissa) * 2.0_f32.powi(exponent - 10),
    }
}

/// Nearest e4m3fn value; of two equally near ones the even pattern.
pub(super) fn to_fp8(value: f32) -> u8 {
    let size = value.abs();
    let nearest = (0..0x7F_u8)
        .min_by(|&a, &b| {
            let distance = |bits: u8| (fp8_value(bits) - size).abs();
            distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1)))
        })
        .expect("there are 127 patterns");
    if value.is_sign_negative() { nearest | 0x80 } else { nearest }
}

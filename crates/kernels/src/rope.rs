//! Rotary position embedding: angles, and the rotation of neighbouring pairs.
//!
//! Llama 4 rotates the pairs `(2j, 2j + 1)` (complex product), not halves. Layers with RoPE never
//! look across a chunk border, so the angle may use the position within the chunk: the same function,
//! and exact at any position.

use crate::device::Temperature;
use crate::math::{per_level, round_bf16};
use crate::norm::{Rounding, mean_square};

/// Frequency scaling of the "llama3" type (Scout).
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Llama3Scaling {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_positions: f64,
}

/// What the angles depend on.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct RopeSpec {
    pub head_dim: usize,
    pub theta: f64,
    pub scaling: Option<Llama3Scaling>,
    /// Positions per attention chunk; the angle uses the position modulo this.
    pub chunk_tokens: Option<u32>,
}

/// Radians per position of every pair, `[head_dim / 2]`: `theta^(-2j / head_dim)`, scaled.
///
/// Source of the scaling: `_compute_llama3_parameters` of transformers. With equal low and high factor
/// the smooth band is empty, and is not evaluated.
#[must_use]
pub fn inv_freq(spec: &RopeSpec) -> Vec<f64> {
    let half = spec.head_dim / 2;
    (0..half)
        .map(|j| {
            // The reference keeps frequencies in f32.
            #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is the purpose")]
            let f = spec.theta.powf(-(2.0 * j as f64) / spec.head_dim as f64) as f32;
            let f = f64::from(f);
            spec.scaling.map_or(f, |scaling| scaled(f, scaling))
        })
        .collect()
}

fn scaled(f: f64, s: Llama3Scaling) -> f64 {
    let wavelength = 2.0 * std::f64::consts::PI / f;
    if wavelength < s.original_positions / s.high_freq_factor {
        f
    } else if wavelength > s.original_positions / s.low_freq_factor {
        f / s.factor
    } else {
        let smooth = (s.original_positions / wavelength - s.low_freq_factor)
            / (s.high_freq_factor - s.low_freq_factor);
        (1.0 - smooth) * f / s.factor + smooth * f
    }
}

/// Fills `table` with `[cos, sin]` pairs of one position, `[head_dim / 2][2]`.
pub(crate) fn angles(spec: &RopeSpec, inv_freq: &[f64], position: u32, table: &mut [f32]) {
    let position = spec.chunk_tokens.map_or(position, |chunk| position % chunk);
    for (pair, f) in table.chunks_exact_mut(2).zip(inv_freq) {
        let (sin, cos) = (f64::from(position) * f).sin_cos();
        #[expect(clippy::cast_possible_truncation, reason = "rounding to f32 is the purpose")]
        {
            pair[0] = cos as f32;
            pair[1] = sin as f32;
        }
    }
}

per_level! {
    /// Rotates every head of a row in place, then applies the weightless QK norm if `norm_eps` is
    /// set. `table` is `[head_dim / 2][cos, sin]`.
    fn rotate(row: &mut [f32], table: &[f32], norm_eps: Option<f32>, round: Rounding) {
        for head in row.chunks_exact_mut(table.len()) {
            for (pair, angle) in head.chunks_exact_mut(2).zip(table.chunks_exact(2)) {
                let (re, im, cos, sin) = (pair[0], pair[1], angle[0], angle[1]);
                pair[0] = re.mul_add(cos, -(im * sin));
                pair[1] = re.mul_add(sin, im * cos);
            }
            if let Some(eps) = norm_eps {
                let scale = 1.0 / (mean_square(head) + eps).sqrt();
                for x in head.iter_mut() {
                    *x *= scale;
                }
            }
            if round == Rounding::Bf16 {
                for x in head.iter_mut() {
                    *x = round_bf16(*x);
                }
            }
        }
    }
}

/// What a query at `position` is multiplied by in a layer without rotary embedding.
pub(crate) fn factor(position: u32, temperature: Temperature) -> f32 {
    let Temperature { floor_scale, attn_scale } = temperature;
    let steps = ((f64::from(position) + 1.0) / floor_scale).floor();
    #[expect(clippy::cast_possible_truncation, reason = "the reference is f32")]
    let factor = (1.0 + attn_scale * steps.ln_1p()) as f32;
    factor
}

per_level! {
    /// Multiplies a row by `factor`.
    fn scale(row: &mut [f32], factor: f32, round: Rounding) {
        for x in row.iter_mut() {
            *x *= factor;
            if round == Rounding::Bf16 {
                *x = round_bf16(*x);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_scaling_factors_leave_no_smooth_band() {
        // Scout: kept for j <= 34, divided by 16 from 35 on (wavelength above 8192).
        let scaling = Llama3Scaling {
            factor: 16.0,
            low_freq_factor: 1.0,
            high_freq_factor: 1.0,
            original_positions: 8192.0,
        };
        let plain = RopeSpec { head_dim: 128, theta: 5e5, scaling: None, chunk_tokens: Some(8192) };
        let scout = RopeSpec { scaling: Some(scaling), ..plain };
        for (j, (a, b)) in inv_freq(&plain).iter().zip(inv_freq(&scout)).enumerate() {
            let want = if j <= 34 { *a } else { a / 16.0 };
            assert!((b - want).abs() < 1e-12 * want.abs(), "j={j}");
        }
    }

    #[test]
    fn rotation_keeps_the_length_of_every_pair() {
        let spec = RopeSpec { head_dim: 8, theta: 1e4, scaling: None, chunk_tokens: None };
        let mut table = vec![0.0; 8];
        angles(&spec, &inv_freq(&spec), 12_345, &mut table);
        let before: Vec<f32> = (1..=16).map(|i| i as f32).collect();
        let mut row = before.clone();
        rotate(crate::Level::Portable, &mut row, &table, None, Rounding::None);
        for (a, b) in before.chunks(2).zip(row.chunks(2)) {
            assert!((a[0].hypot(a[1]) - b[0].hypot(b[1])).abs() < 1e-5);
        }
        assert_ne!(before, row);
    }
}

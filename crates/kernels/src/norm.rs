//! RMS norm, SwiGLU and the other element-wise operations.

use crate::math::{LANES, per_level, round_bf16, sigmoid, sum_lanes};

/// Mean of squares of a row, summed in 16 interleaved lanes and a fixed tree.
#[inline(always)]
pub(crate) fn mean_square(row: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let whole = row.len() / LANES * LANES;
    for chunk in row[..whole].chunks_exact(LANES) {
        for i in 0..LANES {
            lanes[i] = chunk[i].mul_add(chunk[i], lanes[i]);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(&row[whole..]) {
        *lane = x.mul_add(*x, *lane);
    }
    sum_lanes(lanes) / row.len() as f32
}

per_level! {
    /// `out = x / sqrt(mean(x^2) + eps) * weight` for rows of `weight.len()` elements.
    ///
    /// With `round`, the normalised row is rounded to bf16 before the weight and the product after it,
    /// as the reference does in bf16 (`Llama4TextRMSNorm`).
    fn rms_norm(x: &[f32], weight: &[f32], eps: f32, round: Rounding, out: &mut [f32]) {
        for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
            let scale = 1.0 / (mean_square(x) + eps).sqrt();
            match round {
                Rounding::None => {
                    for i in 0..x.len() {
                        out[i] = x[i] * scale * weight[i];
                    }
                }
                Rounding::Bf16 => {
                    for i in 0..x.len() {
                        out[i] = round_bf16(round_bf16(x[i] * scale) * weight[i]);
                    }
                }
            }
        }
    }
}

per_level! {
    /// `out = silu(gate) * up`; a row of `gate_up` is `[gate; width]` then `[up; width]`.
    fn swiglu(gate_up: &[f32], width: usize, round: Rounding, out: &mut [f32]) {
        for (row, out) in gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
            let (gate, up) = row.split_at(width);
            for i in 0..width {
                let y = gate[i] * sigmoid(gate[i]) * up[i];
                out[i] = match round { Rounding::None => y, Rounding::Bf16 => round_bf16(y) };
            }
        }
    }
}

per_level! {
    /// `x += y`.
    fn add(x: &mut [f32], y: &[f32]) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += *y;
        }
    }
}

per_level! {
    /// Row `t` of `out` is `x[t] * scores[t]`.
    fn scale_rows(x: &[f32], scores: &[f32], round: Rounding, out: &mut [f32]) {
        if scores.is_empty() {
            return;
        }
        let hidden = x.len() / scores.len();
        for ((x, out), score) in
            x.chunks_exact(hidden).zip(out.chunks_exact_mut(hidden)).zip(scores)
        {
            for i in 0..hidden {
                let y = x[i] * score;
                out[i] = match round { Rounding::None => y, Rounding::Bf16 => round_bf16(y) };
            }
        }
    }
}

/// Whether results are rounded to bf16.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Rounding {
    None,
    Bf16,
}

impl From<crate::Dtype> for Rounding {
    fn from(dtype: crate::Dtype) -> Self {
        match dtype {
            crate::Dtype::F32 => Self::None,
            crate::Dtype::Bf16 => Self::Bf16,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Level;

    #[test]
    fn rms_norm_matches_the_formula_on_every_level() {
        let x: Vec<f32> = (0..3 * 37).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let weight: Vec<f32> = (0..37).map(|i| 1.0 + i as f32 * 0.01).collect();
        let mut first = Vec::new();
        for level in Level::available() {
            let mut out = vec![0.0; x.len()];
            rms_norm(level, &x, &weight, 1e-5, Rounding::None, &mut out);
            for (row, out) in x.chunks(37).zip(out.chunks(37)) {
                let mean: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / 37.0;
                for i in 0..37 {
                    let want = f64::from(row[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
                    assert!((f64::from(out[i]) - want).abs() < 1e-6);
                }
            }
            if first.is_empty() {
                first = out;
            } else {
                assert_eq!(first, out, "{level}");
            }
        }
    }

    #[test]
    fn swiglu_matches_the_formula_on_every_level() {
        let gate_up: Vec<f32> = (0..2 * 2 * 19).map(|i| (i as f32 * 0.7).cos() * 9.0).collect();
        for level in Level::available() {
            let mut out = vec![0.0; 2 * 19];
            swiglu(level, &gate_up, 19, Rounding::None, &mut out);
            for (row, out) in gate_up.chunks(38).zip(out.chunks(19)) {
                for i in 0..19 {
                    let (g, u) = (f64::from(row[i]), f64::from(row[19 + i]));
                    let want = g / (1.0 + (-g).exp()) * u;
                    assert!((f64::from(out[i]) - want).abs() < 1e-5, "{level}");
                }
            }
        }
    }
}

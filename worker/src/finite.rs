//! Whether values are finite: the watch over a step's numbers.
//!
//! One value that is not a number poisons every later position of its sequence, so no token may be chosen
//! from it. The rows that a rank sends, the results it gets back and the logits are looked at: one pass
//! over memory that the exchange has just touched. It only reads, so no bit of a result depends on it.
//!
//! Where rows stay on the device, the device looks, for the same rank and at the same values.
//!
//! It is the rank of the sequence that looks, not that of the expert: only it knows whose row it is, and it
//! sees what happens on the way, too.

use kernels::{Bad, BadPlace, Dtype, StepBatch};
use std::fmt;

/// Where a value is not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NonFinite {
    pub place: Place,
    /// Row of the step.
    pub row: usize,
}

/// In which values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// What goes into the experts of a MoE layer.
    Hidden {
        layer: u16,
    },
    /// What came back from an expert of a MoE layer.
    Expert {
        layer: u16,
        expert: u16,
        rank: u16,
    },
    /// What came back from the routed experts of a MoE layer, where rows stay on the device, which does not say more.
    Routed {
        layer: u16,
    },
    Logits,
}

impl fmt::Display for NonFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value is not finite: ")?;
        match self.place {
            Place::Hidden { layer } => write!(f, "the input of MoE layer {layer}")?,
            Place::Expert { layer, expert, rank } => {
                write!(f, "the result of expert {expert} of MoE layer {layer} on rank {rank}")?;
            }
            Place::Routed { layer } => {
                write!(f, "the result of the routed expert of MoE layer {layer}")?;
            }
            Place::Logits => f.write_str("the logits")?,
        }
        write!(f, ", row {} of the step", self.row)
    }
}

/// The first of the rows with a value that is infinite or not a number.
pub(crate) fn first_bad_row(bytes: &[u8], row_bytes: usize, dtype: Dtype) -> Option<usize> {
    // Row by row, so that the inner loop has no exit and becomes a few vector instructions.
    let is_bad = |row: &[u8]| match dtype {
        Dtype::F32 => bad(row.chunks_exact(4), |v| v[3] & 0x7f == 0x7f && v[2] & 0x80 == 0x80),
        Dtype::Bf16 => bad(row.chunks_exact(2), |v| v[1] & 0x7f == 0x7f && v[0] & 0x80 == 0x80),
    };
    bytes.chunks_exact(row_bytes.max(1)).position(is_bad)
}

/// All exponent bits are set in the infinite and in what is no number.
fn bad<'a>(values: impl Iterator<Item = &'a [u8]>, is_bad: impl Fn(&[u8]) -> bool) -> bool {
    values.fold(false, |any, value| any | is_bad(value))
}

/// What the device found, in terms of the step.
pub(crate) fn located(bad: Bad, step: &StepBatch) -> Option<NonFinite> {
    let layer = |layer: usize| u16::try_from(layer).expect("layers are numbered in 16 bits");
    Some(match bad.place {
        BadPlace::Hidden { layer: l } => {
            NonFinite { place: Place::Hidden { layer: layer(l) }, row: bad.row }
        }
        BadPlace::Routed { layer: l } => {
            NonFinite { place: Place::Routed { layer: layer(l) }, row: bad.row }
        }
        BadPlace::Logits => {
            NonFinite { place: Place::Logits, row: step.samples.get(bad.row)?.row as usize }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_bad_value_is_found_and_no_good_one() {
        let good = [0.0_f32, -0.0, 1.5, f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-45];
        let of = |values: &[f32]| -> (Vec<u8>, Vec<u8>) {
            let wide = values.iter().flat_map(|v| v.to_le_bytes());
            // Truncated, as f32::MAX would round to infinity.
            let narrow = values.iter().flat_map(|v| [v.to_le_bytes()[2], v.to_le_bytes()[3]]);
            (wide.collect(), narrow.collect())
        };
        let (wide, narrow) = of(&good);
        assert_eq!(first_bad_row(&wide, 4, Dtype::F32), None);
        assert_eq!(first_bad_row(&narrow, 2, Dtype::Bf16), None);
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in 0..good.len() {
                let mut values = good;
                values[at] = bad;
                let (wide, narrow) = of(&values);
                assert_eq!(first_bad_row(&wide, 4, Dtype::F32), Some(at), "{bad}");
                assert_eq!(first_bad_row(&narrow, 2, Dtype::Bf16), Some(at), "{bad}");
            }
        }
        assert_eq!(first_bad_row(&[], 0, Dtype::F32), None);
    }
}

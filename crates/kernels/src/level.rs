//! Which instructions this process may use, found once at run time.

use std::fmt;

/// Arithmetic of the activations.
///
/// `Bf16` rounds every operand of a matrix product, every row of the exchange and the KV cache to
/// bf16 and accumulates in f32; the residual stream, norms, softmax and logits are f32 in both.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dtype {
    F32,
    Bf16,
}

impl Dtype {
    /// Bytes of one element on the wire and in the KV cache.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

/// An instruction set that the CPU device has code for, in rising order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Level {
    Portable,
    Avx2,
    Avx512,
    Avx512Bf16,
}

impl Level {
    /// The best level of this machine.
    #[must_use]
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 =
                avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
            if avx512 && is_x86_feature_detected!("avx512bf16") {
                return Self::Avx512Bf16;
            }
            if avx512 {
                return Self::Avx512;
            }
            if avx2 {
                return Self::Avx2;
            }
        }
        Self::Portable
    }

    /// Every level this machine can run, for tests that compare them.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let best = Self::detect();
        [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16]
            .into_iter()
            .filter(|level| *level <= best)
            .collect()
    }

    /// Ranks of one view must agree on this text: equal profiles give equal bits.
    #[must_use]
    pub fn profile(self, dtype: Dtype) -> String {
        match (dtype, self) {
            (Dtype::Bf16, Self::Avx512Bf16) => "cpu/bf16/avx512bf16".into(),
            (Dtype::F32 | Dtype::Bf16, _) => format!("cpu/{dtype}/fma"),
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
        })
    }
}

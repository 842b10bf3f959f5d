//! The vector operations that the matrix product is written in, one implementation per
//! instruction set.
//!
//! A *line* is 64 bytes of packed weights: 16 outputs of one `k` in f32, or 16 outputs of two
//! neighbouring `k` in bf16 (`[16][2]`, so that a 32-bit lane holds a pair: the even `k` in its low
//! half). `ACCS` accumulators of an implementation cover the 16 outputs.

/// One instruction set.
///
/// # Safety
///
/// Every method may only be called in a function compiled with the features of the implementor, on
/// a CPU that has them. Pointers to lines are valid for 64 bytes.
pub(crate) unsafe trait Isa: Copy {
    /// A vector of f32 accumulators.
    type Acc: Copy;
    /// Vectors that make up 16 outputs.
    const ACCS: usize;
    /// One element of the left operand: an f32, or a pair of bf16 in a `u32`.
    type X: Copy;
    /// Operands of a multiplication: weights of as many outputs as an accumulator has, and an element of the
    /// left operand for each of them.
    type Factor: Copy;
    /// Multiplications per pair of `k`, each with an `X` of its own: first the even `k`, then the odd one; or
    /// one of both, in the order of the hardware.
    const PER_PAIR: usize;

    unsafe fn zero() -> Self::Acc;
    unsafe fn load(from: *const f32) -> Self::Acc;
    unsafe fn store(acc: Self::Acc, to: *mut f32);
    /// Weights of the line's `part`-th vector of outputs, f32.
    unsafe fn single(line: *const u8, part: usize) -> Self::Factor;
    /// The same of a line of bf16 pairs, for the `nth` multiplication.
    unsafe fn pair(line: *const u8, part: usize, nth: usize) -> Self::Factor;
    /// An element of the left operand, for f32 weights.
    unsafe fn spread_single(x: *const f32) -> Self::Factor;
    /// The same for pairs.
    unsafe fn spread(x: *const Self::X) -> Self::Factor;
    /// `acc[i] += w[i] * x[i]`, f32 weights.
    unsafe fn fma(acc: Self::Acc, w: Self::Factor, x: Self::Factor) -> Self::Acc;
    /// The same for pairs.
    unsafe fn fma_pair(acc: Self::Acc, w: Self::Factor, x: Self::Factor) -> Self::Acc {
        // SAFETY: passed on.
        unsafe { Self::fma(acc, w, x) }
    }
}

/// Plain Rust, eight lanes a vector; the reference of the others.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

// SAFETY: no features needed.
unsafe impl Isa for Portable {
    type Acc = [f32; 8];
    const ACCS: usize = 2;
    type X = f32;
    type Factor = [f32; 8];
    const PER_PAIR: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> Self::Acc {
        [0.0; 8]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Acc {
        // SAFETY: the caller gives 8 readable floats.
        unsafe { from.cast::<[f32; 8]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(acc: Self::Acc, to: *mut f32) {
        // SAFETY: the caller gives 8 writable floats.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(acc) }
    }

    #[inline(always)]
    unsafe fn single(line: *const u8, part: usize) -> Self::Factor {
        // SAFETY: the line is 64 bytes and aligned to them.
        unsafe { line.cast::<[f32; 8]>().add(part).read() }
    }

    #[inline(always)]
    unsafe fn pair(line: *const u8, part: usize, nth: usize) -> Self::Factor {
        // SAFETY: the line is 64 bytes and aligned to them.
        let pairs = unsafe { line.cast::<[u32; 8]>().add(part).read() };
        pairs.map(|pair| f32::from_bits(if nth == 0 { pair << 16 } else { pair & 0xffff_0000 }))
    }

    #[inline(always)]
    unsafe fn spread_single(x: *const f32) -> Self::Factor {
        // SAFETY: `x` is readable.
        [unsafe { *x }; 8]
    }

    #[inline(always)]
    unsafe fn spread(x: *const f32) -> Self::Factor {
        // SAFETY: passed on.
        unsafe { Self::spread_single(x) }
    }

    #[inline(always)]
    unsafe fn fma(acc: Self::Acc, w: Self::Factor, x: Self::Factor) -> Self::Acc {
        std::array::from_fn(|i| w[i].mul_add(x[i], acc[i]))
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512, Avx512Bf16};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Isa;
    use std::arch::x86_64::*;

    /// 256-bit registers with fused multiply-add: every x86 server since 2013.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2;

    // SAFETY: needs avx2 and fma, as the trait's contract says.
    unsafe impl Isa for Avx2 {
        type Acc = __m256;
        const ACCS: usize = 2;
        type X = f32;
        type Factor = __m256;
        const PER_PAIR: usize = 2;

        #[inline(always)]
        unsafe fn zero() -> __m256 {
            // SAFETY: contract of the trait, here and in every method below.
            unsafe { _mm256_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m256 {
            // SAFETY: 8 readable floats by contract.
            unsafe { _mm256_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn store(acc: __m256, to: *mut f32) {
            // SAFETY: 8 writable floats by contract.
            unsafe { _mm256_storeu_ps(to, acc) }
        }

        #[inline(always)]
        unsafe fn single(line: *const u8, part: usize) -> __m256 {
            // SAFETY: a line is 64 bytes, aligned to them.
            unsafe { _mm256_load_ps(line.cast::<f32>().add(8 * part)) }
        }

        #[inline(always)]
        unsafe fn pair(line: *const u8, part: usize, nth: usize) -> __m256 {
            // SAFETY: a line is 64 bytes, aligned to them.
            unsafe {
                let w = _mm256_load_si256(line.cast::<__m256i>().add(part));
                let upper = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
                _mm256_castsi256_ps(match nth {
                    0 => _mm256_slli_epi32::<16>(w),
                    _ => _mm256_and_si256(w, upper),
                })
            }
        }

        #[inline(always)]
        unsafe fn spread_single(x: *const f32) -> __m256 {
            // SAFETY: `x` is readable.
            unsafe { _mm256_broadcast_ss(&*x) }
        }

        #[inline(always)]
        unsafe fn spread(x: *const f32) -> __m256 {
            // SAFETY: passed on.
            unsafe { Self::spread_single(x) }
        }

        #[inline(always)]
        unsafe fn fma(acc: __m256, w: __m256, x: __m256) -> __m256 {
            // SAFETY: contract of the trait.
            unsafe { _mm256_fmadd_ps(w, x, acc) }
        }
    }

    /// 512-bit registers; the bits of [`Avx2`].
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512;

    // SAFETY: needs avx512f, as the trait's contract says.
    unsafe impl Isa for Avx512 {
        type Acc = __m512;
        const ACCS: usize = 1;
        type X = f32;
        type Factor = __m512;
        const PER_PAIR: usize = 2;

        #[inline(always)]
        unsafe fn zero() -> __m512 {
            // SAFETY: contract of the trait, here and in every method below.
            unsafe { _mm512_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m512 {
            // SAFETY: 16 readable floats by contract.
            unsafe { _mm512_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn store(acc: __m512, to: *mut f32) {
            // SAFETY: 16 writable floats by contract.
            unsafe { _mm512_storeu_ps(to, acc) }
        }

        #[inline(always)]
        unsafe fn single(line: *const u8, _part: usize) -> __m512 {
            // SAFETY: a line is 64 bytes.
            unsafe { _mm512_loadu_ps(line.cast()) }
        }

        #[inline(always)]
        unsafe fn pair(line: *const u8, _part: usize, nth: usize) -> __m512 {
            // SAFETY: a line is 64 bytes.
            unsafe {
                let w = _mm512_loadu_si512(line.cast());
                let upper = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
                _mm512_castsi512_ps(match nth {
                    0 => _mm512_slli_epi32::<16>(w),
                    _ => _mm512_and_si512(w, upper),
                })
            }
        }

        #[inline(always)]
        unsafe fn spread_single(x: *const f32) -> __m512 {
            // SAFETY: `x` is readable.
            unsafe { _mm512_set1_ps(*x) }
        }

        #[inline(always)]
        unsafe fn spread(x: *const f32) -> __m512 {
            // SAFETY: passed on.
            unsafe { Self::spread_single(x) }
        }

        #[inline(always)]
        unsafe fn fma(acc: __m512, w: __m512, x: __m512) -> __m512 {
            // SAFETY: contract of the trait.
            unsafe { _mm512_fmadd_ps(w, x, acc) }
        }
    }

    /// 512-bit registers with the bf16 dot product: a pair of `k` in one instruction, whose two
    /// additions are rounded in the hardware's order. Left operands are pairs of bf16.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512Bf16;

    // SAFETY: needs avx512f and avx512bf16, as the trait's contract says.
    unsafe impl Isa for Avx512Bf16 {
        type Acc = __m512;
        const ACCS: usize = 1;
        type X = u32;
        type Factor = __m512;
        const PER_PAIR: usize = 1;

        #[inline(always)]
        unsafe fn zero() -> __m512 {
            // SAFETY: contract of the trait, here and in every method below.
            unsafe { Avx512::zero() }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m512 {
            // SAFETY: 16 readable floats by contract.
            unsafe { Avx512::load(from) }
        }

        #[inline(always)]
        unsafe fn store(acc: __m512, to: *mut f32) {
            // SAFETY: 16 writable floats by contract.
            unsafe { Avx512::store(acc, to) }
        }

        #[inline(always)]
        unsafe fn single(line: *const u8, part: usize) -> __m512 {
            // SAFETY: passed on.
            unsafe { Avx512::single(line, part) }
        }

        #[inline(always)]
        unsafe fn pair(line: *const u8, part: usize, _nth: usize) -> __m512 {
            // SAFETY: passed on; the bits of both weights.
            unsafe { Avx512::single(line, part) }
        }

        #[inline(always)]
        unsafe fn spread_single(x: *const f32) -> __m512 {
            // SAFETY: passed on.
            unsafe { Avx512::spread_single(x) }
        }

        #[inline(always)]
        unsafe fn spread(x: *const u32) -> __m512 {
            // SAFETY: `x` is readable.
            unsafe { _mm512_castsi512_ps(_mm512_set1_epi32((*x).cast_signed())) }
        }

        #[inline(always)]
        unsafe fn fma(acc: __m512, w: __m512, x: __m512) -> __m512 {
            // SAFETY: passed on.
            unsafe { Avx512::fma(acc, w, x) }
        }

        #[inline(always)]
        unsafe fn fma_pair(acc: __m512, w: __m512, x: __m512) -> __m512 {
            // SAFETY: __m512bh and __m512 are the same 64 bytes of plain bits.
            unsafe {
                let w = std::mem::transmute::<__m512, __m512bh>(w);
                let x = std::mem::transmute::<__m512, __m512bh>(x);
                _mm512_dpbf16_ps(acc, w, x)
            }
        }
    }
}

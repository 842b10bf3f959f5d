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

    unsafe fn zero() -> Self::Acc;
    unsafe fn load(from: *const f32) -> Self::Acc;
    unsafe fn store(acc: Self::Acc, to: *mut f32);
    /// `acc[i] += line[part][i] * x` for the line's `part`-th vector of outputs, f32 weights.
    unsafe fn fma_f32(acc: Self::Acc, line: *const u8, part: usize, x: *const f32) -> Self::Acc;
    /// The same for a line of bf16 pairs: first the even `k`, then the odd one (or the order of
    /// the hardware). `x` points to two elements.
    unsafe fn fma_pair(
        acc: Self::Acc,
        line: *const u8,
        part: usize,
        x: *const Self::X,
    ) -> Self::Acc;
    /// `X` elements per pair of `k`.
    const X_PER_PAIR: usize;
}

/// Plain Rust, eight lanes a vector; the reference of the others.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

// SAFETY: no features needed.
unsafe impl Isa for Portable {
    type Acc = [f32; 8];
    const ACCS: usize = 2;
    type X = f32;
    const X_PER_PAIR: usize = 2;

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
    unsafe fn fma_f32(acc: Self::Acc, line: *const u8, part: usize, x: *const f32) -> Self::Acc {
        // SAFETY: the line is 64 bytes and aligned to them, `x` is readable.
        let (w, x) = unsafe { (line.cast::<[f32; 8]>().add(part).read(), *x) };
        std::array::from_fn(|i| w[i].mul_add(x, acc[i]))
    }

    #[inline(always)]
    unsafe fn fma_pair(acc: Self::Acc, line: *const u8, part: usize, x: *const f32) -> Self::Acc {
        // SAFETY: the line is 64 bytes and aligned to them, `x` has two elements.
        let (w, even, odd) = unsafe { (line.cast::<[u32; 8]>().add(part).read(), *x, *x.add(1)) };
        std::array::from_fn(|i| {
            let acc = f32::from_bits(w[i] << 16).mul_add(even, acc[i]);
            f32::from_bits(w[i] & 0xffff_0000).mul_add(odd, acc)
        })
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
        const X_PER_PAIR: usize = 2;

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
        unsafe fn fma_f32(acc: __m256, line: *const u8, part: usize, x: *const f32) -> __m256 {
            // SAFETY: a line is 64 bytes, aligned to them.
            unsafe {
                let w = _mm256_load_ps(line.cast::<f32>().add(8 * part));
                _mm256_fmadd_ps(w, _mm256_broadcast_ss(&*x), acc)
            }
        }

        #[inline(always)]
        unsafe fn fma_pair(acc: __m256, line: *const u8, part: usize, x: *const f32) -> __m256 {
            // SAFETY: a line is 64 bytes, aligned to them; `x` has two elements.
            unsafe {
                let w = _mm256_load_si256(line.cast::<__m256i>().add(part));
                let even = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w));
                let odd = _mm256_castsi256_ps(_mm256_and_si256(
                    w,
                    _mm256_set1_epi32(0xffff_0000_u32.cast_signed()),
                ));
                let acc = _mm256_fmadd_ps(even, _mm256_broadcast_ss(&*x), acc);
                _mm256_fmadd_ps(odd, _mm256_broadcast_ss(&*x.add(1)), acc)
            }
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
        const X_PER_PAIR: usize = 2;

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
        unsafe fn fma_f32(acc: __m512, line: *const u8, _part: usize, x: *const f32) -> __m512 {
            // SAFETY: a line is 64 bytes.
            unsafe { _mm512_fmadd_ps(_mm512_loadu_ps(line.cast()), _mm512_set1_ps(*x), acc) }
        }

        #[inline(always)]
        unsafe fn fma_pair(acc: __m512, line: *const u8, _part: usize, x: *const f32) -> __m512 {
            // SAFETY: a line is 64 bytes; `x` has two elements.
            unsafe {
                let w = _mm512_loadu_si512(line.cast());
                let even = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(w));
                let odd = _mm512_castsi512_ps(_mm512_and_si512(
                    w,
                    _mm512_set1_epi32(0xffff_0000_u32.cast_signed()),
                ));
                let acc = _mm512_fmadd_ps(even, _mm512_set1_ps(*x), acc);
                _mm512_fmadd_ps(odd, _mm512_set1_ps(*x.add(1)), acc)
            }
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
        const X_PER_PAIR: usize = 1;

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
        unsafe fn fma_f32(acc: __m512, line: *const u8, part: usize, x: *const f32) -> __m512 {
            // SAFETY: passed on.
            unsafe { Avx512::fma_f32(acc, line, part, x) }
        }

        #[inline(always)]
        unsafe fn fma_pair(acc: __m512, line: *const u8, _part: usize, x: *const u32) -> __m512 {
            // SAFETY: a line is 64 bytes; __m512bh and __m512i are the same 64 bytes of plain bits.
            unsafe {
                let w: __m512bh = std::mem::transmute(_mm512_loadu_si512(line.cast()));
                let x: __m512bh = std::mem::transmute(_mm512_set1_epi32((*x).cast_signed()));
                _mm512_dpbf16_ps(acc, w, x)
            }
        }
    }
}

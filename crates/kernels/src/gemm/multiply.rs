//! The multiplications of a tile, line of weights by line.

use crate::isa::Isa;
use crate::lines::LINE_BYTES;

/// What the multiplications of a line take of it and of a row.
///
/// # Safety
///
/// As for [`Isa`]. `x` is the first element of a row, which has those of the `at`-th line.
pub(super) unsafe trait Operands<I: Isa> {
    /// Multiplications per line.
    const COUNT: usize;
    unsafe fn weights(line: *const u8, part: usize, nth: usize) -> I::Factor;
    unsafe fn left(x: *const I::X, at: usize, nth: usize) -> I::Factor;
    unsafe fn fma(acc: I::Acc, w: I::Factor, x: I::Factor) -> I::Acc;
}

/// Lines of one `k` in f32.
pub(super) struct Singles;

/// Lines of two `k` in bf16.
pub(super) struct Pairs;

// SAFETY: with f32 storage the left operand is f32 on every instruction set (`linear` packs pairs for bf16
// storage only).
unsafe impl<I: Isa> Operands<I> for Singles {
    const COUNT: usize = 1;

    #[inline(always)]
    unsafe fn weights(line: *const u8, part: usize, _nth: usize) -> I::Factor {
        // SAFETY: contract of the trait, here and below.
        unsafe { I::single(line, part) }
    }

    #[inline(always)]
    unsafe fn left(x: *const I::X, at: usize, _nth: usize) -> I::Factor {
        // SAFETY: as above.
        unsafe { I::spread_single(x.cast::<f32>().add(at)) }
    }

    #[inline(always)]
    unsafe fn fma(acc: I::Acc, w: I::Factor, x: I::Factor) -> I::Acc {
        // SAFETY: as above.
        unsafe { I::fma(acc, w, x) }
    }
}

// SAFETY: nothing but the contract is relied on.
unsafe impl<I: Isa> Operands<I> for Pairs {
    const COUNT: usize = I::PER_PAIR;

    #[inline(always)]
    unsafe fn weights(line: *const u8, part: usize, nth: usize) -> I::Factor {
        // SAFETY: contract of the trait, here and below.
        unsafe { I::pair(line, part, nth) }
    }

    #[inline(always)]
    unsafe fn left(x: *const I::X, at: usize, nth: usize) -> I::Factor {
        // SAFETY: as above.
        unsafe { I::spread(x.add(at * I::PER_PAIR + nth)) }
    }

    #[inline(always)]
    unsafe fn fma(acc: I::Acc, w: I::Factor, x: I::Factor) -> I::Acc {
        // SAFETY: as above.
        unsafe { I::fma_pair(acc, w, x) }
    }
}

/// The multiplications of one line of every panel, in an order that needs few registers beside the
/// accumulators: AVX2 has 16 of them, and tiles of up to 12 accumulators.
///
/// # Safety
///
/// As for [`Isa`]. Every panel has an `at`-th line, and every row the elements for it.
#[inline(always)]
pub(super) unsafe fn multiply<I: Isa, O: Operands<I>, const ROWS: usize, const PANELS: usize>(
    acc: &mut [[[I::Acc; 2]; PANELS]; ROWS],
    line: &[*const u8; PANELS],
    x: &[*const I::X; ROWS],
    at: usize,
) {
    // SAFETY: the caller's contract. Not a loop over the multiplications: it would keep the accumulators in memory.
    unsafe {
        if ROWS <= PANELS * I::ACCS {
            by_outputs::<I, O, ROWS, PANELS>(acc, line, x, at);
        } else {
            by_rows::<I, O, ROWS, PANELS>(acc, line, x, (at, 0));
            if O::COUNT == 2 {
                by_rows::<I, O, ROWS, PANELS>(acc, line, x, (at, 1));
            }
        }
    }
}

/// Elements of the few rows stay, and weights come one vector after the other.
#[expect(clippy::needless_range_loop, reason = "`part` also picks the half of the line")]
#[inline(always)]
unsafe fn by_outputs<I: Isa, O: Operands<I>, const ROWS: usize, const PANELS: usize>(
    acc: &mut [[[I::Acc; 2]; PANELS]; ROWS],
    line: &[*const u8; PANELS],
    x: &[*const I::X; ROWS],
    at: usize,
) {
    for p in 0..PANELS {
        for part in 0..I::ACCS {
            for r in 0..ROWS {
                // SAFETY: as above.
                unsafe {
                    let line = line[p].add(at * LINE_BYTES);
                    let mut sum = acc[r][p][part];
                    sum = O::fma(sum, O::weights(line, part, 0), O::left(x[r], at, 0));
                    if O::COUNT == 2 {
                        sum = O::fma(sum, O::weights(line, part, 1), O::left(x[r], at, 1));
                    }
                    acc[r][p][part] = sum;
                }
            }
        }
    }
}

/// Weights of the few outputs stay, and elements come one row after the other.
#[expect(clippy::needless_range_loop, reason = "`part` also picks the half of the line")]
#[inline(always)]
unsafe fn by_rows<I: Isa, O: Operands<I>, const ROWS: usize, const PANELS: usize>(
    acc: &mut [[[I::Acc; 2]; PANELS]; ROWS],
    line: &[*const u8; PANELS],
    x: &[*const I::X; ROWS],
    (at, nth): (usize, usize),
) {
    // SAFETY: as above.
    unsafe {
        // A loop over `I::ACCS` leaves the second unused where one is enough.
        let mut w = [[O::weights(line[0].add(at * LINE_BYTES), 0, nth); 2]; PANELS];
        for p in 0..PANELS {
            for part in 0..I::ACCS {
                w[p][part] = O::weights(line[p].add(at * LINE_BYTES), part, nth);
            }
        }
        for r in 0..ROWS {
            let left = O::left(x[r], at, nth);
            for p in 0..PANELS {
                for part in 0..I::ACCS {
                    acc[r][p][part] = O::fma(acc[r][p][part], w[p][part], left);
                }
            }
        }
    }
}

//! The measurement of bandwidth reads what it says.

use super::super::buffer::Buffer;
use super::super::read::{BLOCKS, read};
use super::driver;

#[test]
fn every_word_is_read_once() {
    // Fewer vectors than threads, and a part of a stride behind whole ones.
    for vectors in [1, 257, BLOCKS * 256 * 2 + 77] {
        let word = |i: u32| i.wrapping_mul(i) ^ 0x9e37_79b9;
        let words: Vec<u32> = (0..).take(vectors * 4).map(word).collect();
        let memory = Buffer::of(driver(), "words", bytemuck::cast_slice(&words)).unwrap();
        let sum = |words: &[u32]| words.iter().fold(0_u32, |sum, word| sum.wrapping_add(*word));
        let out = Buffer::new(driver(), "sums", BLOCKS * 4).unwrap();
        read(driver(), &memory, &out).unwrap();
        let mut sums = vec![0_u32; BLOCKS];
        out.read(bytemuck::cast_slice_mut(&mut sums)).unwrap();
        assert_eq!(sum(&sums), sum(&words), "{vectors}");
    }
}

//! Embeddings are those of the table.

use super::super::embed::{Embedding, embed};
use super::super::tensor::Tensor;
use super::step::{LIMITS, of_tokens, rope, upload};
use super::{assert_same, driver, noise};
use crate::level::Dtype;
use crate::math::{bf16_bits, round_bf16};

#[test]
fn rows_are_those_of_the_tokens() {
    let vocab = 64;
    // Around the 4 columns of a thread and the 1024 of a block; aligned rows and others.
    for hidden in [1, 4, 37, 1024, 1028, 1030] {
        let table = noise(vocab * hidden, 1, 3.0);
        for tokens in [&[][..], &[63], &[5, 0, 5, 17]] {
            check(&table, hidden, tokens, Dtype::F32);
            check(&table, hidden, tokens, Dtype::Bf16);
        }
    }
}

#[track_caller]
fn check(table: &[f32], hidden: usize, tokens: &[u32], dtype: Dtype) {
    let (bytes, stored): (Vec<u8>, fn(f32) -> f32) = match dtype {
        Dtype::F32 => (bytemuck::cast_slice(table).to_vec(), |x| x),
        Dtype::Bf16 => {
            (table.iter().flat_map(|x| bf16_bits(*x).to_le_bytes()).collect(), round_bf16)
        }
    };
    let on_device = Embedding::new(driver(), dtype, (table.len() / hidden, hidden)).unwrap();
    on_device.bring(&bytes).unwrap();
    let mut x = Tensor::new(driver(), Dtype::F32, (0, hidden)).unwrap();
    let batch = upload(&of_tokens(tokens), &rope(4), LIMITS);
    embed(driver(), &batch, &on_device, &mut x).unwrap();
    let row = |token: &u32| table[*token as usize * hidden..][..hidden].iter().map(|x| stored(*x));
    let want: Vec<f32> = tokens.iter().flat_map(row).collect();
    assert_same(&x.to_host().unwrap(), &want, &format!("{hidden} {tokens:?} {dtype}"));
}

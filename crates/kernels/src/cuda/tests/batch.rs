//! What a step looks like in device memory.

use super::super::batch::{Batch, Part, StepRules};
use super::driver;
use super::step::{LIMITS, TEMPERATURE, rope};
use crate::device::{Row, SampleRow, StepBatch, Table};
use crate::sample::Sampling;

fn step(rows: u32) -> StepBatch {
    let row = |i| Row { token: i % 64, position: i, table: i % 2 };
    let sampling = Sampling { seed: 0x1_0000_0002, temperature: 0.5, ..Sampling::default() };
    let table = |first: u32| Table {
        full: (first..30).collect(),
        chunked: (0..3 + first).collect(),
        chunked_first: first,
    };
    StepBatch {
        rows: (0..rows).map(row).collect(),
        tables: vec![table(0), table(1)],
        samples: (0..rows).map(|row| SampleRow { row, sampling: sampling.clone() }).collect(),
    }
}

/// `count` words of an array, from the device's memory.
fn words(batch: &Batch, part: Part, count: usize) -> Vec<u32> {
    let mut words = vec![0_u32; count];
    assert!(batch.address(part).is_multiple_of(16), "{part:?}");
    driver().read(batch.address(part), bytemuck::cast_slice_mut(&mut words)).unwrap();
    words
}

#[test]
fn arrays_lie_where_they_are_said_to() {
    let rope = rope(4);
    let rules = StepRules { rope: &rope, temperature: Some(TEMPERATURE), limits: LIMITS };
    let mut batch = Batch::new(driver()).unwrap();
    for rows in [3, 0, 5, 2, 90] {
        batch.upload(&step(rows), &rules).unwrap();
        let count = rows as usize;
        assert_eq!((batch.rows(), batch.samples()), (count, count));
        let numbers: Vec<u32> = (0..rows).collect();
        assert_eq!(words(&batch, Part::Positions, count), numbers);
        assert_eq!(words(&batch, Part::Samples, count), numbers);
        let tokens: Vec<u32> = numbers.iter().map(|i| i % 64).collect();
        assert_eq!(words(&batch, Part::Tokens, count), tokens);
        let tables: Vec<u32> = numbers.iter().map(|i| i % 2).collect();
        assert_eq!(words(&batch, Part::Tables, count), tables);
        assert_eq!(words(&batch, Part::FullStart, 3), [0, 30, 59]);
        assert_eq!(words(&batch, Part::Full, 59)[29..32], [29, 1, 2]);
        assert_eq!(words(&batch, Part::ChunkedStart, 3), [0, 3, 7]);
        assert_eq!(words(&batch, Part::Chunked, 7), [0, 1, 2, 0, 1, 2, 3]);
        assert_eq!(words(&batch, Part::ChunkedFirst, 2), [0, 1]);
        let next: Vec<u32> = (1..=rows).collect();
        assert_eq!(words(&batch, Part::SamplePositions, count), next);
        assert_eq!(words(&batch, Part::Temperatures, count), vec![0.5_f32.to_bits(); count]);
        assert_eq!(words(&batch, Part::Seeds, 2 * count), [2, 1].repeat(count));
        let factors = words(&batch, Part::Factors, count);
        assert!(factors.iter().zip(0..).all(|(factor, position)| {
            *factor == crate::rope::factor(position, TEMPERATURE).to_bits()
        }));
        for (position, angles) in words(&batch, Part::Angles, 4 * count).chunks(4).enumerate() {
            let mut want = [0.0; 4];
            let position = u32::try_from(position).unwrap();
            crate::rope::angles(&rope.spec, &rope.inv_freq, position, &mut want);
            assert_eq!(angles, want.map(f32::to_bits));
        }
    }
}

#[test]
fn memory_stays_where_it_is_for_smaller_steps() {
    let rope = rope(8);
    let rules = StepRules { rope: &rope, temperature: None, limits: LIMITS };
    let mut batch = Batch::new(driver()).unwrap();
    batch.upload(&step(40), &rules).unwrap();
    let at = batch.address(Part::Tokens);
    for rows in [39, 0, 40] {
        batch.upload(&step(rows), &rules).unwrap();
        assert_eq!(batch.address(Part::Tokens), at);
    }
}

//! Pieces make the same expert again, and what does not fit is refused.

use super::*;
use bytes::Bytes;
use kernels::{ExpertWeights, Matrix, Storage};

/// 40 inputs and 24 outputs, with scales if `fp8`; every weight differs.
fn expert(fill: impl Fn(usize) -> f32, scale: Option<f32>) -> ExpertWeights {
    let matrix = |outputs: usize, inputs: usize| {
        let mut matrix = Matrix::zeroed(Storage::F32, outputs, inputs).unwrap();
        for (panel_number, mut panel) in matrix.panels_mut().enumerate() {
            for k in 0..inputs {
                let lanes = 16.min(outputs - panel_number * 16);
                let first = (panel_number * inputs + k) * 16;
                panel.put_input(k, (first..first + lanes).map(&fill));
            }
        }
        if let Some(scale) = scale {
            matrix.set_scales(vec![scale; outputs]);
        }
        matrix
    };
    ExpertWeights { gate_up: matrix(24, 40), down: matrix(40, 12) }
}

fn blank(scale: Option<f32>) -> Blank {
    Blank::Cpu(expert(|_| 0.0, scale.map(|_| 0.0)))
}

fn all_pieces(key: Key, held: &Held) -> Vec<pb::ExpertPiece> {
    pieces(key, held).collect::<Result<_, _>>().unwrap()
}

#[test]
fn pieces_make_the_same_expert_again() {
    for scale in [None, Some(0.5)] {
        let weights = Arc::new(expert(|i| i as f32 * 0.25, scale));
        let sent = Held::Cpu(Arc::clone(&weights));
        let mut coming = Coming::new(vec![(1, 2), (0, 5)]);
        let mut got = Vec::new();
        for piece in [all_pieces((1, 2), &sent), all_pieces((0, 5), &sent)].concat() {
            got.extend(coming.put(&piece, |_| Ok(blank(scale))).unwrap());
        }
        assert_eq!(got.iter().map(|(key, _)| *key).collect::<Vec<_>>(), [(1, 2), (0, 5)]);
        for (_, expert) in got {
            let Held::Cpu(expert) = expert else { panic!("on another platform") };
            assert_eq!(expert.image(), weights.image());
            assert_eq!(expert.gate_up.get(23, 39), weights.gate_up.get(23, 39));
        }
    }
}

#[test]
fn pieces_that_do_not_fit_are_refused() {
    let sent = Held::Cpu(Arc::new(expert(|i| i as f32, None)));
    let whole = all_pieces((0, 1), &sent);
    let refuse = |change: &dyn Fn(&mut pb::ExpertPiece)| {
        let mut piece = whole[0].clone();
        change(&mut piece);
        let result = Coming::new(vec![(0, 1)]).put(&piece, |_| Ok(blank(None)));
        result.err().expect("it is refused").to_string()
    };
    let sum = |piece: &mut pb::ExpertPiece| piece.crc32c = crc_fast::crc32_iscsi(&piece.bytes);
    assert_eq!(refuse(&|p| p.crc32c ^= 1), "a piece changed on its way");
    let text = "expert 2 of MoE layer 0 was not asked for, or not now";
    assert_eq!(refuse(&|p| p.expert = 2), text);
    let text = "a piece at 64 of part 0 does not follow what came before";
    assert_eq!(refuse(&|p| p.at = 64), text);
    let text = "a piece at 0 of part 1 does not follow what came before";
    assert_eq!(refuse(&|p| p.part = 1), text);
    let too_long = |p: &mut pb::ExpertPiece| {
        p.bytes = [&p.bytes[..], &[0; 64]].concat().into();
        sum(p);
    };
    let text = "a piece at 0 of part 0 does not follow what came before";
    assert_eq!(refuse(&too_long), text);
    assert_eq!(refuse(&|p| (p.bytes = Bytes::new(), sum(p)).1), text);
}

#[test]
fn experts_are_shared_out_evenly_among_those_who_have_them() {
    let missing: Vec<Key> = (0..6).map(|expert| (0, expert)).collect();
    let all: BTreeSet<Key> = missing.iter().copied().collect();
    let few: BTreeSet<Key> = [(0, 0), (0, 1)].into();
    let shares = share_out(&missing[..5], [&all, &few].into_iter());
    assert_eq!(shares, [vec![(0, 0), (0, 2), (0, 3), (0, 4)], vec![(0, 1)]]);
    assert_eq!(share_out(&missing, [&BTreeSet::new()].into_iter()), [vec![]]);
}

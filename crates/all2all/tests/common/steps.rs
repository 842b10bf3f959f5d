//! Steps whose results are checked, for tests of what the suite cannot do: processes and bytes.

use all2all::tcp::Tcp;
use all2all::{AllToAll, ExchangeError, Fault, HostRows, LayerKey, Routes, StepOutcome, View};
use ids::{Epoch, ExpertId, Rank, StepId};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(crate) const ROW_BYTES: usize = 10_240;
const LAYERS: u16 = 4;

/// Every rank holds every expert; expert `e` is served by the `e`-th active rank.
pub(crate) fn view(epoch: u64, me: usize, active: &[bool]) -> View {
    let ranks = active.len();
    let able: Vec<usize> = (0..ranks).filter(|rank| active[*rank]).collect();
    let experts: Vec<ExpertId> = (0..ranks).map(|e| ExpertId(small(e))).collect();
    let held = |_| (0..ranks).map(|_| experts.clone()).collect();
    let held: Vec<Vec<Vec<ExpertId>>> = (0..LAYERS).map(held).collect();
    let target = |_, expert: ExpertId| vec![Rank(small(able[usize::from(expert.0) % able.len()]))];
    let routes = Routes::new(Rank(small(me)), ranks, &held, target).unwrap();
    let (me, ranks) = (Rank(small(me)), small(ranks));
    View { epoch: Epoch(epoch), me, ranks, active: active.to_vec(), routes: Arc::new(routes) }
}

/// A step of several layers with `rows` rows for every expert.
pub(crate) fn step(end: &mut Tcp, id: u64, rows: usize, within: Duration) -> Result<(), Fault> {
    match try_step(end, StepId(id), rows, within) {
        Ok(()) => {}
        Err(ExchangeError::Faulted(_) | ExchangeError::Poisoned { .. }) => {}
        Err(error) => panic!("{error}"),
    }
    match end.end_step() {
        StepOutcome::Complete => Ok(()),
        StepOutcome::Faulted(fault) => Err(fault),
    }
}

fn try_step(
    end: &mut Tcp,
    step: StepId,
    rows: usize,
    within: Duration,
) -> Result<(), ExchangeError> {
    let ranks = usize::from(end.view().ranks);
    let me = end.view().me.index();
    end.begin_step(end.view().epoch, step, Instant::now() + within)?;
    for layer in 0..LAYERS {
        let experts: Vec<u16> = (0..rows * ranks).map(|row| small(row % ranks)).collect();
        let byte = |row: usize| (row * 7 + me * 31 + usize::from(layer)).to_le_bytes()[0];
        let bytes: Vec<u8> = (0..experts.len()).flat_map(|row| [byte(row); ROW_BYTES]).collect();
        let key = LayerKey { step, layer };
        // Peers read these in different ways.
        let mut buffer = end.buffer(bytes.len());
        buffer.copy_from_slice(&bytes);
        let lent = if layer % 2 == 0 { &bytes } else { &buffer[..] };
        let lent = HostRows { bytes: lent, row_bytes: ROW_BYTES };
        let sent = end.dispatch_send(key, lent, &experts)?;
        // Rows are lent no longer.
        buffer.fill(!0);
        drop(buffer);
        let arrived = end.dispatch_recv(sent)?;
        let (here, offsets) = end.arrived(&arrived);
        let mut results = here.bytes.to_vec();
        for (expert, ends) in offsets.windows(2).enumerate() {
            let range = ends[0] as usize * ROW_BYTES..ends[1] as usize * ROW_BYTES;
            for byte in &mut results[range] {
                *byte = byte.wrapping_add(answer(expert));
            }
        }
        let lent = HostRows { bytes: &results, row_bytes: ROW_BYTES };
        let pending = end.combine_send(arrived, lent)?;
        let mut out = vec![0; bytes.len()];
        end.combine_recv(pending, &mut out)?;
        for (row, out) in out.chunks(ROW_BYTES).enumerate() {
            let right = byte(row).wrapping_add(answer(row % ranks));
            assert!(out.iter().all(|byte| *byte == right), "row {row} of layer {layer}");
        }
    }
    Ok(())
}

/// What an expert adds to every byte.
fn answer(expert: usize) -> u8 {
    expert.to_le_bytes()[0] * 3 + 1
}

fn small(number: usize) -> u16 {
    u16::try_from(number).unwrap()
}

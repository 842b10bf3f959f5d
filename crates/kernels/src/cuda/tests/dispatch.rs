//! The dispatch index against the exchange's rule.

use super::super::buffer::Buffer;
use super::super::dispatch::{
    Arrivals, RouteTable, RouteTableParts, Serving, Source, Sources, dispatch,
};
use super::driver;

/// What every rank wants, and who serves it.
struct Wishes {
    buffers: Vec<Buffer>,
    counts: Vec<u32>,
}

impl Wishes {
    fn of(experts: &[Vec<u16>]) -> Self {
        let of_rank = |experts: &Vec<u16>| {
            Buffer::of(driver(), "experts", bytemuck::cast_slice(experts)).unwrap()
        };
        let count = |experts: &Vec<u16>| u32::try_from(experts.len()).unwrap();
        Self {
            buffers: experts.iter().map(of_rank).collect(),
            counts: experts.iter().map(count).collect(),
        }
    }

    fn sources(&self, routes: &[RouteTable]) -> Sources {
        let source = |((buffer, count), routes): ((&Buffer, &u32), &RouteTable)| Source {
            wanted: buffer.address(),
            rows: 0,
            results: 0,
            count: *count,
            routes: routes.addresses(),
        };
        let mut sources = Sources::new(driver()).unwrap();
        sources.set(self.buffers.iter().zip(&self.counts).zip(routes).map(source)).unwrap();
        sources
    }
}

/// Offsets, order and numbers as the device found them.
#[track_caller]
fn found(sources: &Sources, serving: Serving) -> (Vec<u32>, Vec<(u32, u32)>, Vec<u32>) {
    let mut arrivals = Arrivals::new(driver()).unwrap();
    arrivals.reserve(8, sources.rows()).unwrap();
    let slots = serving.slots;
    let numbers = Buffer::of(driver(), "numbers", &vec![0xff; (slots + 1) * 4]).unwrap();
    let serving = Serving { served: numbers.address(), ..serving };
    dispatch(driver(), sources, serving, &mut arrivals).unwrap();
    let (mut offsets, mut served) = (vec![0_u32; slots + 1], vec![0_u32; slots + 1]);
    arrivals.offsets().read(bytemuck::cast_slice_mut(&mut offsets)).unwrap();
    numbers.read(bytemuck::cast_slice_mut(&mut served)).unwrap();
    assert_eq!(served.pop(), Some(u32::MAX), "behind the slots nothing is written");
    let mut order = vec![[0_u32; 2]; offsets[slots] as usize];
    arrivals.order().read(bytemuck::cast_slice_mut(&mut order)).unwrap();
    (offsets, order.into_iter().map(|[source, row]| (source, row)).collect(), served)
}

const EXPERTS: u16 = 24;
const RANKS: u16 = 4;
const SLOTS: usize = 7;
const LAYERS: usize = 2;

/// Expert e has 1 to 3 targets among the ranks, other ones for every source and layer; rank r holds all experts of the
/// same e % 7 in one slot, another one in every layer.
struct Routed {
    spans: Vec<Vec<(u32, u32)>>,
    targets: Vec<(u16, u16, u32)>,
    start: u32,
}

impl Routed {
    fn of(source: u16) -> Self {
        let (mut spans, mut targets) = (vec![Vec::new(); LAYERS], Vec::new());
        for (layer, spans) in (0..).zip(&mut spans) {
            for expert in 0..EXPERTS {
                let count = 1 + (expert + source) % 3;
                spans.push((u32::try_from(targets.len()).unwrap(), u32::from(count)));
                for i in 0..count {
                    let until = u32::from(i + 1) << 30;
                    let rank = (expert + i + source * layer) % RANKS;
                    targets.push((rank, (expert + layer) % 7, until));
                }
            }
        }
        Self { spans, targets, start: u32::from(source) << 29 }
    }

    fn target(&self, layer: usize, expert: u16, row: u32) -> (u16, u16) {
        let (first, count) = self.spans[layer][usize::from(expert)];
        let point = self.start.wrapping_add(row.wrapping_mul(all2all::STRIDE));
        // Each but the last has a quarter of all points.
        let (rank, slot, _) = self.targets[(first + (point >> 30).min(count - 1)) as usize];
        (rank, slot)
    }
}

#[test]
fn rows_are_grouped_by_slot_then_source_then_row() {
    let routed: Vec<Routed> = (0..RANKS).map(Routed::of).collect();
    let table = |of: &Routed| {
        RouteTable::new(
            driver(),
            RouteTableParts { spans: &of.spans, targets: &of.targets, start: of.start },
        )
        .unwrap()
    };
    let tables: Vec<RouteTable> = routed.iter().map(table).collect();
    for counts in [[0, 0, 0, 0], [1, 0, 2, 0], [40, 33, 0, 31], [700, 1, 600, 64]] {
        let of_rank = |(rank, count): (usize, &usize)| {
            (0..*count).map(|i| u16::try_from((i * 7 + rank * 5 + i / 11) % 24).unwrap()).collect()
        };
        let wanted: Vec<Vec<u16>> = counts.iter().enumerate().map(of_rank).collect();
        let wishes = Wishes::of(&wanted);
        let sources = wishes.sources(&tables);
        for (me, layer) in (0..RANKS).flat_map(|me| (0..LAYERS).map(move |layer| (me, layer))) {
            let mut want: Vec<Vec<(u32, u32)>> = vec![Vec::new(); SLOTS];
            for ((source, wanted), routed) in (0..).zip(&wanted).zip(&routed) {
                for (row, expert) in (0..).zip(wanted) {
                    let (rank, slot) = routed.target(layer, *expert, row);
                    if rank == me {
                        want[usize::from(slot)].push((source, row));
                    }
                }
            }
            let serving = Serving { layer, me, slots: SLOTS, served: 0, unserved: 0 };
            let (offsets, order, served) = found(&sources, serving);
            assert_eq!(order, want.concat(), "rank {me} of {counts:?}");
            let lengths: Vec<u32> = offsets.windows(2).map(|pair| pair[1] - pair[0]).collect();
            let wanted: Vec<usize> = want.iter().map(Vec::len).collect();
            assert_eq!(
                lengths,
                wanted.into_iter().map(|n| u32::try_from(n).unwrap()).collect::<Vec<_>>()
            );
            assert_eq!(served, lengths);
        }
    }
}

/// Its results would be what went in, and nobody would notice.
#[test]
fn row_that_nobody_serves_is_noted() {
    // Expert 0 is here in slot 1, expert 1 in slot 2, which there is not, expert 2 elsewhere; there is no expert 3.
    let parts = RouteTableParts {
        spans: &[vec![(0, 1), (1, 1), (2, 1)]],
        targets: &[(0, 1, 9), (0, 2, 9), (1, 7, 9)],
        start: 5,
    };
    let tables = [RouteTable::new(driver(), parts).unwrap()];
    for (wanted, want) in [
        (vec![0, 2, 0], u32::MAX),
        (vec![0, 0, 1], 2),
        (vec![2; 70].into_iter().chain([3, 0, 1]).collect(), 70),
    ] {
        let wishes = Wishes::of(std::slice::from_ref(&wanted));
        let sources = wishes.sources(&tables);
        let flag = Buffer::of(driver(), "flag", &[0xff; 4]).unwrap();
        let serving = Serving { layer: 0, me: 0, slots: 2, served: 0, unserved: flag.address() };
        found(&sources, serving);
        let mut noted = [0];
        flag.read(bytemuck::cast_slice_mut(&mut noted)).unwrap();
        assert_eq!(noted, [want], "{wanted:?}");
    }
}

#[test]
fn no_more_rows_arrive_than_there_is_room_for() {
    let mut wishes = Wishes::of(&[vec![0; 100], vec![0; 100]]);
    wishes.counts[1] = u32::MAX;
    let table = || {
        let parts = RouteTableParts { spans: &[vec![(0, 1)]], targets: &[(0, 0, 0)], start: 0 };
        RouteTable::new(driver(), parts).unwrap()
    };
    let tables = [table(), table()];
    let sources = wishes.sources(&tables);
    for rows_max in [0, 50, 150] {
        let mut arrivals = Arrivals::new(driver()).unwrap();
        arrivals.reserve(8, rows_max).unwrap();
        let serving = Serving { layer: 0, me: 0, slots: 1, served: 0, unserved: 0 };
        dispatch(driver(), &sources, serving, &mut arrivals).unwrap();
        let mut offsets = [0_u32; 2];
        arrivals.offsets().read(bytemuck::cast_slice_mut(&mut offsets)).unwrap();
        assert_eq!(offsets, [0, u32::try_from(rows_max).unwrap()]);
    }
}

#[test]
fn sources_are_written_again_only_if_they_are_others() {
    let of = |rows| Source { wanted: 1, rows, results: 2, count: 3, ..Source::default() };
    let mut sources = Sources::new(driver()).unwrap();
    let bytes = |sources: &Sources, count: usize| {
        let mut bytes = vec![0; count * 56];
        sources.buffer().read(&mut bytes).unwrap();
        bytes
    };
    let first = |sources: &Sources| bytes(sources, 1)[..16].to_vec();
    let words = |words: [u64; 2]| words.map(u64::to_le_bytes).as_flattened().to_vec();
    sources.set([of(7), of(8), of(9)].into_iter()).unwrap();
    assert_eq!((first(&sources), sources.rows()), (words([1, 7]), 9));
    sources.buffer().fill(0, &[0xee]).unwrap();
    sources.set([of(7), of(8)].into_iter()).unwrap();
    assert_eq!((first(&sources)[0], sources.rows()), (0xee, 6), "they were there");
    sources.set([of(7), of(6)].into_iter()).unwrap();
    let now = bytes(&sources, 2);
    assert_eq!((now[0], now[56], now[56 + 8]), (0xee, 1, 6));
    sources.set([of(5), of(6)].into_iter()).unwrap();
    assert_eq!(first(&sources), words([1, 5]));
}

//! The dispatch index against the exchange's rule.

use super::super::buffer::Buffer;
use super::super::dispatch::{Arrivals, RouteTable, RouteTableParts, Source, Sources, dispatch};
use super::driver;

/// Offsets and order as the device found them.
#[track_caller]
fn found(experts: &[Vec<u16>], parts: RouteTableParts<'_>) -> (Vec<u32>, Vec<(u32, u32)>) {
    let of_rank = |experts: &Vec<u16>| {
        Buffer::of(driver(), "experts", bytemuck::cast_slice(experts)).unwrap()
    };
    let buffers: Vec<Buffer> = experts.iter().map(of_rank).collect();
    let source = |(buffer, experts): (&Buffer, &Vec<u16>)| Source {
        experts: buffer.address(),
        rows: 0,
        results: 0,
        count: u32::try_from(experts.len()).unwrap(),
    };
    let sources: Vec<Source> = buffers.iter().zip(experts).map(source).collect();
    let sources = Sources::new(driver(), &sources).unwrap();
    let routes = RouteTable::new(driver(), parts).unwrap();
    let rows = experts.iter().map(Vec::len).sum();
    let mut arrivals = Arrivals::new(driver(), parts.slots, rows).unwrap();
    dispatch(driver(), &sources, &routes, &mut arrivals).unwrap();
    let mut offsets = vec![0_u32; parts.slots + 1];
    arrivals.offsets().read(bytemuck::cast_slice_mut(&mut offsets)).unwrap();
    let mut order = vec![[0_u32; 2]; offsets[parts.slots] as usize];
    arrivals.order().read(bytemuck::cast_slice_mut(&mut order)).unwrap();
    (offsets, order.into_iter().map(|[source, row]| (source, row)).collect())
}

#[test]
fn rows_are_grouped_by_slot_then_source_then_row() {
    // Expert e has 1 to 3 targets among the 4 ranks; rank `me` holds some of them in slots of its own.
    let (experts, ranks, slots) = (24_u16, 4_u16, 7_usize);
    for me in 0..ranks {
        let (mut spans, mut targets, mut held) = (Vec::new(), Vec::new(), 0_u16);
        for expert in 0..experts {
            let count = 1 + expert % 3;
            spans.push((u32::try_from(targets.len()).unwrap(), u32::from(count)));
            for i in 0..count {
                let rank = (expert + i) % ranks;
                targets.push((rank, if rank == me { held % 7 } else { 0 }));
                held += u16::from(rank == me);
            }
        }
        let parts = RouteTableParts { spans: &spans, targets: &targets, me, slots };
        for counts in [[0, 0, 0, 0], [1, 0, 2, 0], [40, 33, 0, 31], [700, 1, 600, 64]] {
            let of_rank = |(rank, count): (usize, &usize)| {
                (0..*count)
                    .map(|i| u16::try_from((i * 7 + rank * 5 + i / 11) % 24).unwrap())
                    .collect()
            };
            let wanted: Vec<Vec<u16>> = counts.iter().enumerate().map(of_rank).collect();
            let mut want: Vec<Vec<(u32, u32)>> = vec![Vec::new(); slots];
            for (source, wanted) in (0..).zip(&wanted) {
                for (row, expert) in (0..).zip(wanted) {
                    let (first, count) = spans[usize::from(*expert)];
                    let (rank, slot) = targets[(first + row % count) as usize];
                    if rank == me {
                        want[usize::from(slot)].push((source, row));
                    }
                }
            }
            let (offsets, order) = found(&wanted, parts);
            assert_eq!(order, want.concat(), "rank {me} of {counts:?}");
            let lengths: Vec<usize> =
                offsets.windows(2).map(|pair| (pair[1] - pair[0]) as usize).collect();
            assert_eq!(lengths, want.iter().map(Vec::len).collect::<Vec<_>>());
        }
    }
}

#[test]
fn no_more_rows_arrive_than_there_is_room_for() {
    let experts = Buffer::of(driver(), "experts", &[0; 2 * 100]).unwrap();
    let source = Source { experts: experts.address(), rows: 0, results: 0, count: 100 };
    let sources = Sources::new(driver(), &[source, Source { count: u32::MAX, ..source }]).unwrap();
    let parts = RouteTableParts { spans: &[(0, 1)], targets: &[(0, 0)], me: 0, slots: 1 };
    let routes = RouteTable::new(driver(), parts).unwrap();
    for rows_max in [0, 50, 150] {
        let mut arrivals = Arrivals::new(driver(), 1, rows_max).unwrap();
        dispatch(driver(), &sources, &routes, &mut arrivals).unwrap();
        let mut offsets = [0_u32; 2];
        arrivals.offsets().read(bytemuck::cast_slice_mut(&mut offsets)).unwrap();
        assert_eq!(offsets, [0, u32::try_from(rows_max).unwrap()]);
    }
}

//! What must hold of every plan, and what few moves mean in each situation.

use super::*;

const SHAPE: Shape = Shape { moe_layers: 2, experts: 16 };

/// Expert `e` of every layer gets `tokens(e)`.
fn window(tokens: impl Fn(usize) -> u64) -> Window {
    let layer: Vec<u64> = (0..SHAPE.experts).map(tokens).collect();
    Window::new(&vec![layer; SHAPE.moe_layers]).unwrap()
}

fn load(windows: &[Window]) -> Load {
    let mut load = Load::unknown(SHAPE);
    for window in windows {
        load.observe(window).unwrap();
    }
    load
}

#[track_caller]
fn next(capacity: &[usize], redundancy: u16, current: &Holdings, load: &Load) -> Planned {
    plan_with(&Request { aim: Aim::Level, capacity, redundancy, current, load })
}

#[track_caller]
fn plan_with(request: &Request<'_>) -> Planned {
    let planned = replan(request).unwrap();
    check(&planned, request);
    planned
}

/// The promises that hold whatever was asked for.
#[track_caller]
fn check(planned: &Planned, request: &Request<'_>) {
    let (placement, capacity) = (&planned.placement, request.capacity);
    let (current, survives) = (request.current, request.aim == Aim::Survive);
    let redundancy = if survives { 0 } else { request.redundancy };
    let hosts = capacity.iter().filter(|&&capacity| 0 < capacity).count();
    let places: usize = capacity.iter().map(|&places| places.min(placement.experts())).sum();
    let copies = (usize::from(redundancy) + 1).min(hosts).min(places / placement.experts().max(1));
    let mut missing = Vec::new();
    for moe_layer in 0..placement.moe_layers() {
        for (rank, &places) in (0..).map(Rank).zip(capacity) {
            let held = placement.local_experts(moe_layer, rank);
            let holds = |e: &&ExpertId| current.holders(moe_layer, **e).contains(&rank);
            let had = (0..).map(ExpertId).take(placement.experts()).filter(|e| holds(&e)).count();
            let places = if survives && 0 < places { places.max(had) } else { places };
            assert!(held.len() <= places, "{rank} holds {held:?}, it can {places}");
        }
        for expert in (0..).map(ExpertId).take(placement.experts()) {
            let replicas = placement.replicas(moe_layer, expert);
            assert!(copies <= replicas.len(), "{expert}: {replicas:?}, not {copies} copies");
            let holders = current.holders(moe_layer, expert);
            let new = replicas.iter().filter(|rank| !holders.contains(rank));
            if survives && holders.iter().any(|rank| 0 < capacity[rank.index()]) {
                assert_eq!(new.clone().count(), 0, "{expert} is held by {holders:?}");
            }
            missing.extend(new.map(|&rank| (moe_layer, expert, rank)));
        }
    }
    let mut loads: Vec<_> =
        planned.loads.iter().map(|load| (load.moe_layer, load.expert, load.rank)).collect();
    loads.sort_unstable();
    assert_eq!(loads, missing, "the loads are what is new");
    for load in &planned.loads {
        let holders = current.holders(load.moe_layer, load.expert);
        assert_eq!(load.source.is_some(), !holders.is_empty());
        assert!(load.source.is_none_or(|source| holders.contains(&source)), "{load:?}");
    }
}

fn stay(planned: &Planned) -> Holdings {
    Holdings::carried(&planned.placement, Some)
}

/// Without one rank; those behind it move up.
fn without(planned: &Planned, lost: u16) -> Holdings {
    Holdings::carried(&planned.placement, |rank| match rank.0.cmp(&lost) {
        std::cmp::Ordering::Less => Some(rank),
        std::cmp::Ordering::Equal => None,
        std::cmp::Ordering::Greater => Some(Rank(rank.0 - 1)),
    })
}

fn zipf(expert: usize) -> u64 {
    10_000 / (expert as u64 + 1)
}

#[test]
fn first_placement_splits_the_busiest_experts() {
    let load = load(&[window(zipf)]);
    let planned = next(&[5; 4], 0, &Holdings::none(SHAPE), &load);
    assert_eq!(planned.loads.len(), 2 * 20, "all places are used");
    assert!(planned.placement.replicas(0, ExpertId(0)).len() > 1);
    let balance = levelled(&window(zipf), &planned.placement);
    assert!(0.98 < balance, "{balance}");
}

#[test]
fn nothing_moves_while_the_load_stays() {
    let load = load(&[window(zipf)]);
    let first = next(&[5; 4], 0, &Holdings::none(SHAPE), &load);
    assert_eq!(next(&[5; 4], 0, &stay(&first), &load).loads, []);
    let unknown = Load::unknown(SHAPE);
    assert_eq!(next(&[5; 4], 0, &stay(&first), &unknown).loads, []);
}

#[test]
fn nothing_is_loaded_to_survive_while_a_copy_is_left() {
    let unknown = Load::unknown(SHAPE);
    for (redundancy, experts_lost) in [(1, 0), (0, 2 * 4)] {
        let capacity = even_capacity(SHAPE, 4, redundancy, 0);
        let first = next(&capacity, redundancy, &Holdings::none(SHAPE), &unknown);
        let current = without(&first, 2);
        let second = plan_with(&Request {
            aim: Aim::Survive,
            // Less than the ranks hold: what is there stays.
            capacity: &even_capacity(SHAPE, 3, 0, 0),
            redundancy,
            current: &current,
            load: &unknown,
        });
        assert_eq!(second.loads.len(), experts_lost);
        for layer in 0..2 {
            for expert in (0..16).map(ExpertId) {
                let had = current.holders(layer, expert);
                let has = second.placement.replicas(layer, expert);
                assert!(had.iter().all(|rank| has.contains(rank)), "{had:?} became {has:?}");
            }
        }
    }
}

#[test]
fn lost_rank_moves_only_what_it_held() {
    let load = Load::unknown(SHAPE);
    let first = next(&even_capacity(SHAPE, 4, 1, 0), 1, &Holdings::none(SHAPE), &load);
    let held: usize = (0..2).map(|layer| first.placement.local_experts(layer, Rank(2)).len()).sum();
    let second = next(&even_capacity(SHAPE, 3, 1, 0), 1, &without(&first, 2), &load);
    assert_eq!(second.loads.len(), held);
    assert!(second.loads.iter().all(|load| load.source.is_some()), "a copy of each is left");
}

#[test]
fn experts_that_nobody_holds_are_loaded_first() {
    let unknown = Load::unknown(SHAPE);
    let first = next(&even_capacity(SHAPE, 4, 0, 0), 0, &Holdings::none(SHAPE), &unknown);
    let second = next(&even_capacity(SHAPE, 3, 1, 0), 1, &without(&first, 0), &unknown);
    let sources: Vec<bool> = second.loads.iter().map(|load| load.source.is_some()).collect();
    assert!(sources.is_sorted(), "{sources:?}");
    assert_eq!(
        sources.iter().filter(|&&has| !has).count(),
        2 * 4 * 2,
        "four per layer, two copies"
    );
}

#[test]
fn joined_rank_takes_its_share_and_nobody_else_moves() {
    for load in [Load::unknown(SHAPE), load(&[window(|_| 100)])] {
        let first = next(&even_capacity(SHAPE, 3, 1, 0), 1, &Holdings::none(SHAPE), &load);
        let second = next(&even_capacity(SHAPE, 4, 1, 0), 1, &stay(&first), &load);
        assert!(second.loads.iter().all(|load| load.rank == Rank(3)), "{:?}", second.loads);
        assert_eq!(second.loads.len(), 2 * 8);
    }
}

#[test]
fn drained_rank_gives_and_takes_nothing() {
    let unknown = Load::unknown(SHAPE);
    let first = next(&even_capacity(SHAPE, 4, 0, 0), 0, &Holdings::none(SHAPE), &unknown);
    let second = next(&[6, 0, 6, 6], 0, &stay(&first), &unknown);
    assert_eq!(second.loads.len(), 2 * 4);
    assert!(second.loads.iter().all(|load| load.source == Some(Rank(1))), "{:?}", second.loads);
}

#[test]
fn burst_moves_a_little_and_its_return_nothing() {
    let (calm, burst) = (window(|_| 100), window(|e| if e == 3 { 1500 } else { 100 }));
    let mut load = load(&[calm.clone(), calm.clone()]);
    let first = next(&[5; 4], 0, &Holdings::none(SHAPE), &load);
    assert!(levelled(&burst, &first.placement) < 0.7);
    load.observe(&burst).unwrap();
    let second = next(&[5; 4], 0, &stay(&first), &load);
    let balance = levelled(&burst, &second.placement);
    assert!(0.9 < balance, "{balance}");
    assert!((1..=12).contains(&second.loads.len()), "{}", second.loads.len());

    load.observe(&calm).unwrap();
    let third = next(&[5; 4], 0, &stay(&second), &load);
    load.observe(&burst).unwrap();
    assert!(0.9 < levelled(&burst, &third.placement), "the burst is not forgotten");
    assert!(next(&[5; 4], 0, &stay(&third), &load).loads.len() <= 2);
}

#[test]
fn impossible_requests_are_refused() {
    let refused = |capacity: &[usize], current: &Holdings, load: &Load| {
        replan(&Request { aim: Aim::Level, capacity, redundancy: 0, current, load })
            .unwrap_err()
            .to_string()
    };
    let (unknown, nobody) = (Load::unknown(SHAPE), Holdings::none(SHAPE));
    assert_eq!(refused(&[], &nobody, &unknown), "a placement needs at least one rank");
    assert_eq!(refused(&[8, 7], &nobody, &unknown), "15 places per layer for 16 experts");
    let other = Holdings::none(Shape { moe_layers: 1, experts: 16 });
    assert_eq!(
        refused(&[16], &other, &unknown),
        "2 layers of 16 experts given for a model of 1 layers of 16 experts"
    );
}

proptest! {
    /// Any history of ranks that come, go and change in size, under any load.
    #[test]
    fn plans_keep_their_promises_and_are_repeatable(
        steps in proptest::collection::vec(
            (proptest::collection::vec(0_usize..14, 1..7), 0_u16..3, any::<u64>()), 1..6),
        moe_layers in 1_usize..3, experts in 1_usize..20,
    ) {
        let shape = Shape { moe_layers, experts };
        let (mut load, mut last) = (Load::unknown(shape), None::<Placement>);
        for (capacity, redundancy, seed) in steps {
            let counts = |layer: usize| -> Vec<u64> {
                (0..experts).map(|e| (seed >> ((e + layer) % 60)) % 1000).collect()
            };
            if seed % 3 != 0 {
                let layers: Vec<Vec<u64>> = (0..moe_layers).map(counts).collect();
                load.observe(&Window::new(&layers).unwrap()).unwrap();
            }
            let ranks = u16::try_from(capacity.len()).unwrap();
            let within = |rank: Rank| (rank.0 < ranks).then_some(rank);
            let known = last.as_ref().map_or_else(
                || Holdings::none(shape),
                |last| Holdings::carried(last, within),
            );
            let aim = if seed % 5 == 0 { Aim::Survive } else { Aim::Level };
            let (capacity, current) = (&capacity[..], &known);
            let request = Request { aim, capacity, redundancy, current, load: &load };
            let useful: usize = capacity.iter().map(|&places| places.min(experts)).sum();
            match replan(&request) {
                Ok(planned) => {
                    check(&planned, &request);
                    prop_assert_eq!(replan(&request).unwrap(), planned.clone());
                    last = Some(planned.placement);
                }
                Err(error) => prop_assert!(useful < experts, "{error}"),
            }
        }
    }
}

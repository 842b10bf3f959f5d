//! What a rank counts and watches where its rows stay on the device, and what faults do there.

use crate::chaos::{Fault, From, Hooks, Kind, Phase};
use crate::joined::{Exchange, Processes, Transport, WithinHost};
use crate::{Engine, EngineError, Gpu, KvBlocks, Model, NonFinite, Place, Platform, Seat, Shard};
use all2all::Reason;
use all2all::local::Hub;
use all2all::tcp::Peer;
use ids::{Epoch, ExpertId, Rank, StepId};
use kernels::cuda::Driver;
use kernels::{Dtype, Row, SampleRow, Sampling, StepBatch, Table};
use std::path::Path;
use std::sync::Barrier;
use std::time::{Duration, Instant};

fn model(platform: Platform, dtype: Dtype) -> Model {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    Model::open_for(&root.join("tests/golden/maverick-tiny"), dtype, platform).unwrap()
}

fn gpu() -> Platform {
    Platform::Cuda(Gpu::new(std::sync::Arc::new(Driver::emulated().unwrap())))
}

/// Rows of a rank; rank 0 has none.
fn batch(rank: u16) -> StepBatch {
    let rows = 7 * u32::from(rank);
    let row = |position| Row { token: (position * 37 + 5) % 400, position, table: 0 };
    let last = rows.checked_sub(1).map(|row| SampleRow { row, sampling: Sampling::default() });
    StepBatch {
        rows: (0..rows).map(row).collect(),
        tables: vec![Table { full: vec![0, 1], chunked: vec![0, 1], chunked_first: 0 }],
        samples: last.into_iter().collect(),
    }
}

const KV: KvBlocks = KvBlocks { full: 2, chunked: 2 };

/// What came of two steps of the same rows, and what each rank had counted afterwards.
type Lives = Vec<([Result<usize, EngineError>; 2], Option<Vec<Vec<u64>>>)>;

/// Expert `e` is held by ranks `e % ranks` and the one behind it; odd rows go there.
fn live(model: &Model, ranks: u16, hooks: impl Fn(Rank) -> Hooks + Sync) -> Lives {
    let holders = |expert: u16| [Rank(expert % ranks), Rank((expert + 1) % ranks)];
    let experts = u16::try_from(model.config.experts).unwrap();
    let of_rank = |rank: u16| {
        let held = (0..experts).filter(|expert| holders(*expert).contains(&Rank(rank)));
        held.map(ExpertId).collect()
    };
    let of_layer = |_| (0..ranks).map(of_rank).collect();
    let held: Vec<Vec<Vec<ExpertId>>> = model.config.moe_layers().iter().map(of_layer).collect();
    let (hub, stepped) = (Hub::new(), Barrier::new(usize::from(ranks)));
    let run = |rank: u16| {
        let targets = |_: usize, expert: ExpertId| holders(expert.0).to_vec();
        let (epoch, me) = (Epoch(1), Rank(rank));
        let shard = Shard { epoch, rank: me, ranks, held: &held, targets: &targets };
        let mut engine = Engine::new(model, &shard, &hub, 1, KV).unwrap();
        engine.hook(hooks(me));
        let done = [1, 2].map(|step| {
            stepped.wait();
            let deadline = Instant::now() + Duration::from_secs(100);
            engine.step(StepId(step), &batch(rank), deadline, None).map(|sampled| sampled.len())
        });
        (done, engine.tally().take())
    };
    std::thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || run(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn device_counts_the_rows_of_every_expert_as_the_host_does() {
    let (cpu, gpu) = (model(Platform::Cpu, Dtype::F32), model(gpu(), Dtype::F32));
    for ranks in [2, 3] {
        let quiet = |_| Hooks::default();
        let want = live(&cpu, ranks, quiet);
        let mut all = 0;
        for ((rank, want), got) in (0..ranks).zip(want).zip(live(&gpu, ranks, quiet)) {
            assert_eq!(got.1, want.1, "rank {rank} of {ranks}");
            all += want.1.iter().flatten().flatten().sum::<u64>();
            for step in got.0 {
                assert_eq!(step.unwrap(), usize::from(0 < rank), "rank {rank} of {ranks}");
            }
        }
        let rows = 2 * (0..ranks).map(|rank| 7 * u64::from(rank)).sum::<u64>();
        assert_eq!(all, rows * gpu.config.moe_layers().len() as u64, "{ranks} ranks");
    }
}

#[test]
fn nan_among_lent_results_fails_the_step_of_the_rank_whose_row_it_is_once() {
    let hooks = |rank| {
        let hooks = Hooks::default();
        let (kind, phase) = (Kind::Nan { until: None }, Some(Phase::Combine));
        if rank == Rank(2) {
            assert!(hooks.arm(Fault { kind, from: From::Offset(0), layer: Some(1), phase }));
        }
        hooks
    };
    let lives = live(&model(gpu(), Dtype::Bf16), 3, hooks);
    for (rank, ([first, second], _)) in (0..).zip(lives) {
        // Rank 0 has no rows: those of rank 1 are the first.
        match (rank, first) {
            (1, Err(EngineError::NonFinite(found))) => {
                assert_eq!(found, NonFinite { place: Place::Routed { layer: 1 }, row: 0 });
            }
            (1, other) => panic!("{other:?}"),
            (_, first) => assert_eq!(first.unwrap(), usize::from(0 < rank)),
        }
        assert_eq!(second.unwrap(), usize::from(0 < rank), "rank {rank}");
    }
}

/// Workers that could be processes, each with a mesh of its own.
fn mesh(name: &str) -> Transport {
    let listen = "127.0.0.1:0".parse().unwrap();
    let within_host = WithinHost::Tcp;
    let exchange =
        Exchange::Processes(Processes { listen, advertise: None, within_host, experts_port: 0 });
    Transport::open(&exchange, "loans", name).unwrap()
}

/// The token of rank 0, which steps with rank 1 if that is there.
fn step(engines: &mut [Engine]) -> Result<u32, EngineError> {
    let step = |(rank, engine): (u16, &mut Engine)| {
        let deadline = Instant::now() + Duration::from_secs(100);
        engine.step(StepId(1), &batch(rank), deadline, None).map(|sampled| sampled[0].token)
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            (1..).zip(engines).map(|rank| scope.spawn(move || step(rank))).collect();
        let done: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        done.into_iter().next().unwrap()
    })
}

#[test]
fn lone_process_keeps_its_rows_on_the_device_until_another_joins() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        check_lone(&model(gpu(), dtype));
    }
}

#[track_caller]
fn check_lone(model: &Model) {
    let names = ["1", "2"];
    let meshes = names.map(mesh);
    let peers: Vec<Peer> = names
        .into_iter()
        .zip(&meshes)
        .map(|(name, mesh)| Peer {
            address: mesh.address().parse().unwrap(),
            incarnation: name.into(),
        })
        .collect();
    let seat = |epoch, me: u16, ranks: u16| {
        let of_rank = |rank: u16| {
            let all = (0..8).filter(|expert| expert % ranks == rank);
            all.map(ExpertId).collect()
        };
        let held: Vec<Vec<Vec<ExpertId>>> =
            model.config.moe_layers().iter().map(|_| (0..ranks).map(of_rank).collect()).collect();
        let targets = |_: usize, expert: ExpertId| vec![Rank(expert.0 % ranks)];
        let (epoch, rank) = (Epoch(epoch), Rank(me));
        let shard = Shard { epoch, rank, ranks, held: &held, targets: &targets };
        let members = &peers[..usize::from(ranks)];
        meshes[usize::from(me)].prepare(epoch, members);
        Seat::load(model, &shard, &|| true).unwrap().with_peers(members.to_vec())
    };
    let engine = |mesh| Engine::unseated(model, mesh, 1, KV).unwrap();
    let mut engines = meshes.clone().map(engine);
    let rows = 7 * model.config.moe_layers().len() as u64;
    let counted = |engine: &Engine| engine.tally().take().iter().flatten().flatten().sum::<u64>();

    engines[0].take(seat(1, 0, 1)).unwrap();
    let token = step(&mut engines[..1]).unwrap();
    assert_eq!(counted(&engines[0]), rows);
    for (me, engine) in (0..).zip(&mut engines) {
        engine.take(seat(2, me, 2)).unwrap();
    }
    assert_eq!(step(&mut engines).unwrap(), token);
    // Rank 1 has a second batch, of twice as many rows.
    assert_eq!(counted(&engines[0]) + counted(&engines[1]), 3 * rows);
    engines[0].take(seat(3, 0, 1)).unwrap();
    engines[0].aborter().unwrap().abort(Epoch(2), Reason::ViewChange);
    assert_eq!(step(&mut engines[..1]).unwrap(), token, "that was another epoch");
    engines[0].aborter().unwrap().abort(Epoch(3), Reason::ViewChange);
    let error = step(&mut engines[..1]).unwrap_err();
    assert!(error.to_string().contains("has a failed step"), "{error}");
    // An abort may come before its epoch.
    engines[0].aborter().unwrap().abort(Epoch(4), Reason::ViewChange);
    engines[0].take(seat(4, 0, 1)).unwrap();
    step(&mut engines[..1]).unwrap_err();
    engines[0].take(seat(5, 0, 1)).unwrap();
    assert_eq!(step(&mut engines[..1]).unwrap(), token);
}

#[test]
fn more_ranks_than_share_a_device_are_refused() {
    let model = model(gpu(), Dtype::F32);
    let all: Vec<ExpertId> = (0..8).map(ExpertId).collect();
    let of_layer = |_| (0..65).map(|_| all.clone()).collect();
    let held: Vec<Vec<Vec<ExpertId>>> = model.config.moe_layers().iter().map(of_layer).collect();
    let targets = |_: usize, _: ExpertId| vec![Rank(0)];
    let (epoch, rank) = (Epoch(1), Rank(0));
    let shard = Shard { epoch, rank, ranks: 65, held: &held, targets: &targets };
    let error = Engine::new(&model, &shard, &Hub::new(), 1, KV).err().unwrap().to_string();
    assert!(error.contains("more ranks than can share a device; give some"), "{error}");
}

//! Law 1: the logits at a position depend on the checkpoint, the numeric profile and the tokens up to that
//! position, bit for bit. Not on the number of ranks, the placement, the choice of replicas, the chunks of
//! a prompt, the rest of the batch, the blocks of the cache, or steps that failed on the way.
//!
//! Random models, sequences and worlds by seed; the reference is each sequence alone on one rank, its prompt
//! in one piece. A failure prints the seed; `HERD_LAW_SEED=<seed> cargo test -p herd-tests --test law`
//! runs nothing else.

#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

#[path = "law/blocks.rs"]
mod blocks;
#[path = "law/models.rs"]
mod models;
#[path = "law/serve.rs"]
mod serve;
#[path = "law/world.rs"]
mod world;

use herd_tests::rng::Rng;
use ids::SeqId;
use kernels::{Dtype, Sampling};
use serve::{Evidence, Heard, Logits, serve};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use worker::Model;
use world::{Client, World};

/// The seeds to run: these, or the one that the environment names.
fn seeds(all: Range<u64>) -> Vec<u64> {
    match std::env::var("HERD_LAW_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => all.collect(),
    }
}

/// Says which seed it was when a test panics.
struct Replay(u64);

impl Drop for Replay {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self(seed) = self;
            eprintln!("replay: HERD_LAW_SEED={seed} cargo test -p herd-tests --test law");
        }
    }
}

/// Each client alone on one rank, the prompt in one piece; and once more the finished sequence in one piece,
/// so that the decodes are checked against a prefill.
fn alone(model: &Model, clients: &[Client]) -> BTreeMap<SeqId, Heard> {
    let plain = World::plain(&model.config, 1);
    let one = |client: &Client| {
        let only = std::slice::from_ref(client);
        let heard =
            serve(model, &plain, only, &mut Evidence::default()).remove(&client.id).unwrap();
        let mut tokens: Vec<u32> = heard.sampled.iter().map(|sampled| sampled.token).collect();
        assert_eq!(tokens.len(), client.tokens_max as usize, "tokens of {}", client.id);
        tokens.pop();
        let prompt = [client.prompt.clone(), tokens].concat();
        let whole = Client { prompt, tokens_max: 1, ..client.clone() };
        let only = std::slice::from_ref(&whole);
        let again =
            serve(model, &plain, only, &mut Evidence::default()).remove(&client.id).unwrap();
        check(client, &heard, &again.logits, &"decoded, not prefilled");
        (client.id, heard)
    };
    clients.iter().map(one).collect()
}

#[track_caller]
fn check(client: &Client, want: &Heard, got: &Logits, circumstances: &dyn std::fmt::Debug) {
    for (position, logits) in got {
        let differing = logits.iter().zip(&want.logits[position]).filter(|(a, b)| a != b).count();
        let id = client.id;
        assert_eq!(differing, 0, "{id} at {position}: other logits; {circumstances:#?}");
    }
}

/// Serves the clients in a world and compares with what each of them heard alone.
#[track_caller]
fn check_world(
    model: &Model,
    world: &World,
    (clients, alone): (&[Client], &BTreeMap<SeqId, Heard>),
    evidence: &mut Evidence,
) {
    let heard = serve(model, world, clients, evidence);
    for (client, leaves) in clients.iter().zip(&world.leaves) {
        let (got, want) = (&heard[&client.id], &alone[&client.id]);
        check(client, want, &got.logits, world);
        let tokens = got.sampled.len();
        assert_eq!(
            got.sampled[..],
            want.sampled[..tokens],
            "{}: other tokens; {world:#?}",
            client.id
        );
        if leaves.is_none() {
            assert_eq!(tokens, want.sampled.len(), "{} was cut short", client.id);
            assert_eq!(got.logits.len(), client.positions() as usize, "{} has gaps", client.id);
        }
    }
}

#[track_caller]
fn check_models(dtype: Dtype, all: Range<u64>) {
    let mut evidence = Evidence::default();
    let seeds = seeds(all);
    for &seed in &seeds {
        let _replay = Replay(seed);
        let mut rng = Rng::new(seed);
        let (_folder, model) = models::random(&mut rng, dtype);
        let clients = world::clients(&mut rng, &model.config, 60);
        let alone = alone(&model, &clients);
        for _ in 0..4 {
            let world = World::random(&mut rng, &model.config, &clients);
            check_world(&model, &world, (&clients, &alone), &mut evidence);
        }
    }
    if 1 < seeds.len() {
        evidence.happened(&[]);
    }
}

#[test]
fn no_sequence_can_tell_what_serves_it_in_f32() {
    check_models(Dtype::F32, 0..150);
}

#[test]
fn no_sequence_can_tell_what_serves_it_in_bf16() {
    check_models(Dtype::Bf16, 1000..1150);
}

/// The same with weights that were trained: their logits are far from noise.
#[test]
fn toy_maverick_cannot_tell_what_serves_it() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/toy-maverick");
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let model = Model::open(&dir, dtype).unwrap();
        let mut evidence = Evidence::default();
        let seeds = seeds(0..4);
        for &seed in &seeds {
            let _replay = Replay(seed);
            let mut rng = Rng::new(seed);
            let clients = world::clients(&mut rng, &model.config, 170);
            let alone = alone(&model, &clients);
            for _ in 0..3 {
                let world = World::random(&mut rng, &model.config, &clients);
                check_world(&model, &world, (&clients, &alone), &mut evidence);
            }
        }
        if 1 < seeds.len() {
            evidence.happened(&["preemptions", "sequences that moved", "failed steps"]);
        }
    }
}

/// Which physical blocks hold a sequence, in which order, what they held before and who shares them.
#[test]
fn logits_do_not_depend_on_the_blocks_of_the_cache() {
    let mut shared = 0;
    let seeds = seeds(2000..2100);
    for &seed in &seeds {
        let _replay = Replay(seed);
        let mut rng = Rng::new(seed);
        let dtype = rng.pick(&[Dtype::F32, Dtype::Bf16]);
        let (_folder, model) = models::random(&mut rng, dtype);
        let mut clients = world::clients(&mut rng, &model.config, 60);
        for client in &mut clients {
            (client.tokens_max, client.sampling) = (1, Sampling::default());
        }
        blocks::share_a_prefix(&mut clients, &mut rng);
        let alone = alone(&model, &clients);
        shared += blocks::check_blocks(&model, &clients, &mut rng, &|client, got| {
            check(client, &alone[&client.id], got, &"blocks of the cache");
        });
    }
    assert!(0 < shared || seeds.len() == 1, "vacuous: no prefix was shared");
}

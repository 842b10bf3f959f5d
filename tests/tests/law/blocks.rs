//! One engine, sequences in random blocks of its cache: no scheduler decides here.

use crate::serve::Logits;
use crate::world::Client;
use herd::ranks::RankStep;
use herd_tests::rng::Rng;
use ids::{Epoch, ExpertId, Rank, StepId};
use kernels::{BLOCK_TOKENS, Row, SampleRow, Sampling, StepBatch, Table};
use std::time::{Duration, Instant};
use worker::{Engine, KvBlocks, Model, Shard};

/// Blocks of either pool that stay free, so that a sequence never lies where the last one did.
const SPARE: u32 = 7;

/// A sequence in the cache.
struct Held<'a> {
    client: &'a Client,
    full: Vec<u32>,
    chunked: Vec<u32>,
    /// Next position to compute.
    next: u32,
    /// Nothing is computed before the first sequence has come so far: its blocks are used.
    after: u32,
    heard: Logits,
}

/// Lets the last client begin like the first one, if that one is longer than a block.
pub(crate) fn share_a_prefix(clients: &mut [Client], rng: &mut Rng) {
    let (first, rest) = clients.split_first_mut().unwrap();
    let Some(last) = rest.last_mut() else { return };
    if BLOCK_TOKENS < first.prompt.len() {
        let common = BLOCK_TOKENS + rng.index(first.prompt.len() - BLOCK_TOKENS);
        last.prompt = [&first.prompt[..common], &last.prompt].concat();
    }
}

/// Computes the clients' prompts several times, each time elsewhere, over what the last time has left.
/// Returns how many blocks were not computed but shared.
pub(crate) fn check_blocks(
    model: &Model,
    clients: &[Client],
    rng: &mut Rng,
    check: &dyn Fn(&Client, &Logits),
) -> u64 {
    let block = u32::try_from(BLOCK_TOKENS).unwrap();
    let blocks: u32 = clients.iter().map(|c| c.positions().div_ceil(block)).sum::<u32>() + SPARE;
    let config = &model.config;
    let experts = (0..).map(ExpertId).take(config.experts).collect::<Vec<_>>();
    let held = vec![vec![experts]; config.moe_layers().len()];
    let targets = |_: usize, _: ExpertId| vec![Rank(0)];
    let shard = Shard { epoch: Epoch(1), rank: Rank(0), ranks: 1, held: &held, targets: &targets };
    let kv = KvBlocks { full: blocks, chunked: blocks };
    let hub = all2all::local::Hub::new();
    let mut engine = Engine::new(model, &shard, &hub, 1, kv).unwrap();
    let (mut step, mut shared) = (StepId(0), 0);
    for _ in 0..4 {
        let mut held = place(clients, blocks, rng);
        shared += u64::from(held.iter().map(|held| held.next / block).sum::<u32>());
        while held.iter().any(|held| held.next < held.client.positions()) {
            step = step.next();
            run(&mut engine, step, &mut held, (config.vocab, config.chunk_tokens, rng));
        }
        held.iter().for_each(|held| check(held.client, &held.heard));
    }
    shared
}

/// Random blocks for everybody.
fn place<'a>(clients: &'a [Client], blocks: u32, rng: &mut Rng) -> Vec<Held<'a>> {
    let mut free: [Vec<u32>; 2] = [(0..blocks).collect(), (0..blocks).collect()];
    free.iter_mut().for_each(|free| rng.shuffle(free));
    let [free_full, free_chunked] = &mut free;
    let mut held: Vec<Held<'_>> = Vec::new();
    for client in clients {
        let needed = client.prompt.len().div_ceil(BLOCK_TOKENS);
        // What the first client has in whole blocks; one token at least remains to be computed.
        let common = held.first().map_or(0, |first| {
            let equal = client.prompt.iter().zip(&first.client.prompt);
            equal.take_while(|(a, b)| a == b).count().min(client.prompt.len() - 1) / BLOCK_TOKENS
        });
        let table = |of: for<'h> fn(&'h Held<'_>) -> &'h Vec<u32>, free: &mut Vec<u32>| {
            let mut table = held.first().map_or(vec![], |first| of(first)[..common].to_vec());
            table.extend((common..needed).map(|_| free.pop().unwrap()));
            table
        };
        let full = table(|first| &first.full, free_full);
        let chunked = table(|first| &first.chunked, free_chunked);
        let next = u32::try_from(common * BLOCK_TOKENS).unwrap();
        held.push(Held { client, full, chunked, next, after: next, heard: Logits::new() });
    }
    held
}

/// One step with some tokens of some of them, in any order.
fn run(
    engine: &mut Engine,
    step: StepId,
    held: &mut [Held<'_>],
    (vocab, chunk, rng): (usize, Option<u32>, &mut Rng),
) {
    let mut batch = StepBatch::default();
    let mut slices = Vec::new();
    let first_at = held[0].next;
    let mut order: Vec<usize> = (0..held.len()).collect();
    rng.shuffle(&mut order);
    for index in order {
        let held = &mut held[index];
        let left = held.client.positions() - held.next;
        if left == 0 || (0 < index && first_at < held.after) || rng.one_in(3) {
            continue;
        }
        let (start, tokens) = (held.next, rng.between(1, left));
        let table = u32::try_from(batch.tables.len()).unwrap();
        for position in start..start + tokens {
            let row = u32::try_from(batch.rows.len()).unwrap();
            let token = held.client.prompt[position as usize];
            batch.rows.push(Row { token, position, table });
            batch.samples.push(SampleRow { row, sampling: Sampling::default() });
        }
        // Not more than is needed, or what came before as well.
        let needed = chunk.map_or(0, |chunk| start / chunk * chunk / 16);
        let chunked_first = rng.between(0, needed);
        batch.tables.push(Table {
            full: held.full.clone(),
            chunked: held.chunked[chunked_first as usize..].to_vec(),
            chunked_first,
        });
        held.next += tokens;
        slices.push((index, start));
    }
    let mut seen = RankStep::default();
    engine.step(step, &batch, Instant::now() + Duration::from_secs(60), Some(&mut seen)).unwrap();
    let mut rows = seen.logits.chunks_exact(vocab);
    for (index, start) in slices {
        let held = &mut held[index];
        for position in start..held.next {
            let bits = rows.next().unwrap().iter().map(|x| x.to_bits()).collect();
            held.heard.insert(position, bits);
        }
    }
    assert!(rows.next().is_none());
}

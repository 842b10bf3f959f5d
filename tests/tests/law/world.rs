//! Sequences, and the worlds in which they are served: how many ranks, who holds which expert, how much
//! memory, what else goes on. The law says that no sequence can tell.

use herd_tests::rng::Rng;
use ids::{ExpertId, Rank, SeqId};
use kernels::{BLOCK_TOKENS, Sampling};
use model::config::Config;
use placement::{Placement, Shape};
use scheduler::{KvPools, NewSequence};
use std::time::Duration;

/// A sequence to serve.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(crate) id: SeqId,
    pub(crate) prompt: Vec<u32>,
    pub(crate) tokens_max: u32,
    pub(crate) sampling: Sampling,
    pub(crate) group: Option<u64>,
}

impl Client {
    pub(crate) fn sequence(&self) -> NewSequence {
        NewSequence {
            id: self.id,
            prompt: self.prompt.clone(),
            tokens_max: self.tokens_max,
            group: self.group,
            has_begun: false,
        }
    }

    /// Positions that are computed: the last token is sampled only.
    pub(crate) fn positions(&self) -> u32 {
        u32::try_from(self.prompt.len()).unwrap() + self.tokens_max - 1
    }
}

/// Several sequences of up to so many prompt tokens.
pub(crate) fn clients(rng: &mut Rng, config: &Config, prompt_max: u32) -> Vec<Client> {
    let vocab = u32::try_from(config.vocab).unwrap();
    // Short prompts and long answers need blocks that nobody kept for them, and are preempted.
    let talkers = rng.one_in(4);
    let prompt_max = if talkers { 8 } else { prompt_max };
    (0..u64::from(rng.between(2, 6)))
        .map(|id| Client {
            id: SeqId(id),
            prompt: (0..rng.between(1, prompt_max)).map(|_| rng.below(vocab)).collect(),
            tokens_max: if talkers { rng.between(20, 60) } else { rng.between(1, 12) },
            sampling: Sampling {
                seed: rng.bits(),
                temperature: rng.pick(&[0.0, 0.7, 1.3]),
                top_p: rng.pick(&[1.0, 0.9]),
                top_k: rng.pick(&[0, 7]),
                logprobs: Some(3),
                ..Sampling::default()
            },
            group: rng.one_in(2).then(|| u64::from(rng.below(2))),
        })
        .collect()
}

/// How the sequences are served.
#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(crate) placement: Placement,
    /// `[moe layers][experts][source]`
    pub(crate) targets: Vec<Vec<Vec<Vec<Rank>>>>,
    pub(crate) threads: usize,
    pub(crate) scheduler: scheduler::Config,
    /// Step at which each client comes.
    pub(crate) arrivals: Vec<u64>,
    /// Tokens after which a client goes; none stays to the end.
    pub(crate) leaves: Vec<Option<usize>>,
    /// One step in so many fails on the way and is repeated; 0: none.
    pub(crate) failing: u32,
    pub(crate) seed: u64,
}

impl World {
    /// One rank, room for everything, no prompt is cut, nothing fails.
    pub(crate) fn plain(config: &Config, clients: usize) -> Self {
        let placement = placement::plan(shape(config), 1, 0).unwrap();
        let targets = vec![vec![vec![vec![Rank(0)]]; config.experts]; placement.moe_layers()];
        Self {
            placement,
            targets,
            threads: 1,
            scheduler: scheduler::Config {
                pools: vec![pools(config, 64, 64)],
                step_tokens: 1000,
                prefill_max: Duration::MAX,
                sequences_max: 1,
                queue_max: 64,
                context_tokens: config.context_tokens,
                backup_tokens: Vec::new(),
            },
            arrivals: vec![0; clients],
            leaves: vec![None; clients],
            failing: 0,
            seed: 0,
        }
    }

    /// Anything that is valid. Memory holds the longest sequence and little else.
    pub(crate) fn random(rng: &mut Rng, config: &Config, clients: &[Client]) -> Self {
        // Everybody at once, where there is room for one and a little.
        let crowded = rng.one_in(3);
        let workers = if crowded { rng.pick(&[1, 2, 2]) } else { rng.pick(&[1, 2, 3, 4, 8]) };
        let (placement, targets) = match rng.one_in(4) {
            true => planned(rng, config, workers),
            false => placed(rng, config, workers),
        };
        let longest = clients.iter().map(Client::positions).max().unwrap();
        let block = u32::try_from(BLOCK_TOKENS).unwrap();
        let blocks = longest.div_ceil(block);
        let window = config.chunk_tokens.map_or(0, |chunk| (chunk - 1).div_ceil(block) + 1);
        let spare = if crowded { 2 } else { rng.pick(&[1, blocks, 2 * blocks]) };
        let pool =
            |rng: &mut Rng| pools(config, blocks + rng.below(spare), window + rng.below(spare + 1));
        let sequences_max = if crowded { 6 } else { rng.between(1, 5) };
        let come = if crowded { 1 } else { 12 };
        Self {
            placement,
            targets,
            threads: rng.pick(&[1, 1, 1, 2]),
            scheduler: scheduler::Config {
                pools: (0..workers).map(|_| pool(rng)).collect(),
                step_tokens: sequences_max + rng.pick(&[0, 1, 3, 10, 40]),
                prefill_max: Duration::from_millis(rng.pick(&[1, 10, 100])),
                sequences_max,
                queue_max: 64,
                context_tokens: config.context_tokens,
                backup_tokens: Vec::new(),
            },
            arrivals: clients.iter().map(|_| u64::from(rng.below(come))).collect(),
            leaves: clients.iter().map(|_| rng.one_in(8).then(|| rng.index(4))).collect(),
            failing: rng.pick(&[0, 4, 10]),
            seed: rng.bits(),
        }
    }

    pub(crate) fn targets(&self, layer: usize, expert: ExpertId, source: Rank) -> Vec<Rank> {
        self.targets[layer][expert.index()][source.index()].clone()
    }
}

fn shape(config: &Config) -> Shape {
    Shape { moe_layers: config.moe_layers().len(), experts: config.experts }
}

fn pools(config: &Config, full_blocks: u32, chunked_blocks: u32) -> KvPools {
    let block_tokens = u32::try_from(BLOCK_TOKENS).unwrap();
    KvPools { block_tokens, full_blocks, chunked_blocks, chunk_tokens: config.chunk_tokens }
}

/// As the coordinator places, with its choice of replicas.
fn planned(rng: &mut Rng, config: &Config, workers: u16) -> (Placement, Vec<Vec<Vec<Vec<Rank>>>>) {
    let redundancy = u16::try_from(rng.below(u32::from(workers))).unwrap();
    let placement = placement::plan(shape(config), workers, redundancy).unwrap();
    let target = |layer: usize, expert: usize, source: u16| {
        let expert = ExpertId(u16::try_from(expert).unwrap());
        placement.targets(layer, expert, Rank(source))
    };
    let targets = (0..placement.moe_layers())
        .map(|layer| {
            let of = |e| (0..workers).map(|source| target(layer, e, source)).collect();
            (0..config.experts).map(of).collect()
        })
        .collect();
    (placement, targets)
}

/// Every expert anywhere, one copy or more; every source served by any of them, which share its rows.
fn placed(rng: &mut Rng, config: &Config, workers: u16) -> (Placement, Vec<Vec<Vec<Vec<Rank>>>>) {
    let (mut layers, mut targets) = (Vec::new(), Vec::new());
    for _ in 0..config.moe_layers().len() {
        let (mut replicas, mut served) = (Vec::new(), Vec::new());
        for _ in 0..config.experts {
            let mut ranks: Vec<Rank> = (0..workers).map(Rank).collect();
            rng.shuffle(&mut ranks);
            ranks.truncate(1 + if rng.one_in(2) { 0 } else { rng.index(usize::from(workers)) });
            let mut sharers = |_| {
                let mut sharers = ranks.clone();
                rng.shuffle(&mut sharers);
                sharers.truncate(1 + rng.index(sharers.len()));
                sharers
            };
            served.push((0..workers).map(&mut sharers).collect());
            replicas.push(ranks);
        }
        layers.push(replicas);
        targets.push(served);
    }
    (Placement::new(workers, layers).unwrap(), targets)
}

//! Who holds which expert, who sends what, and what must come of it.
//!
//! Everything is a function of seeds and of (epoch, step, layer, source, row), so every rank can say what
//! every other one sends. That is the oracle: no state, no buffers, one row at a time.

use super::rng::Rng;
use crate::{Routes, View};
use ids::{Epoch, ExpertId, Rank, StepId};
use std::sync::Arc;

/// A cluster and its traffic.
#[derive(Clone, Debug)]
pub(super) struct Scene {
    pub(super) seed: u64,
    pub(super) ranks: u16,
    pub(super) active: Vec<bool>,
    pub(super) layers: u16,
    pub(super) experts: u16,
    pub(super) row_bytes: usize,
    /// Rows that a rank sends per layer at most.
    pub(super) rows_max: u16,
    pub(super) routing: Routing,
    /// `[source]`: who serves its rows.
    routes: Vec<Arc<Routes>>,
    /// `[source]`: the step from which others of the same ranks do, and which.
    pub(super) anew: Vec<(StepId, Arc<Routes>)>,
    /// `[layer][rank]`, ascending.
    held: Vec<Vec<Vec<ExpertId>>>,
}

/// Which experts the rows want.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Routing {
    /// Anything, also no row at all and all rows to one expert.
    Mixed,
    /// All of `rows_max` rows to the expert numbered by the step.
    One,
}

/// One layer of one step of one epoch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Place {
    pub(super) epoch: Epoch,
    pub(super) step: StepId,
    pub(super) layer: u16,
}

impl Scene {
    /// `ranks` ranks; every expert on one to all of them, every source served by one of its holders.
    pub(super) fn new(seed: u64, ranks: u16) -> Self {
        Self::masked(seed, &vec![true; usize::from(ranks)])
    }

    /// A scene of more than one layer.
    pub(super) fn deep(seed: u64, ranks: u16) -> Self {
        let mut scenes = (seed..).map(|seed| Self::new(seed, ranks));
        scenes.find(|scene| 1 < scene.layers).expect("two of three scenes are")
    }

    /// A scene of one layer.
    pub(super) fn flat(seed: u64, ranks: u16) -> Self {
        let mut scenes = (seed..).map(|seed| Self::new(seed, ranks));
        scenes.find(|scene| scene.layers == 1).expect("every third scene is")
    }

    /// The same with only the `active` ranks taking part.
    pub(super) fn masked(seed: u64, active: &[bool]) -> Self {
        let mut rng = Rng::of(&[seed, 1]);
        let ranks = u16::try_from(active.len()).expect("few ranks");
        let (layers, experts) = (1 + rng.below(3), 1 + rng.below(9));
        let mut scene = Self {
            seed,
            ranks,
            active: active.to_vec(),
            layers,
            experts,
            row_bytes: 16,
            rows_max: 20,
            routing: Routing::Mixed,
            routes: Vec::new(),
            anew: Vec::new(),
            held: vec![vec![Vec::new(); active.len()]; usize::from(layers)],
        };
        let able: Vec<Rank> = (0..ranks).map(Rank).filter(|r| active[r.index()]).collect();
        // `[layer][expert][source]`: who serves it.
        let mut targets: Vec<Vec<Vec<Vec<Rank>>>> = Vec::new();
        for layer in 0..usize::from(layers) {
            let mut served = Vec::new();
            for expert in (0..experts).map(ExpertId) {
                let mut holders = able.clone();
                for _ in 0..rng.index(able.len()) {
                    holders.swap_remove(rng.index(holders.len()));
                }
                for holder in &holders {
                    scene.held[layer][holder.index()].push(expert);
                }
                // One holder, or several that share its rows.
                let mut sharers = |_| {
                    let first = rng.index(holders.len());
                    let count = 1 + rng.index(holders.len());
                    holders.iter().cycle().skip(first).take(count).copied().collect()
                };
                served.push((0..ranks).map(&mut sharers).collect());
            }
            targets.push(served);
        }
        let routes = |me: Rank| {
            let targets =
                |layer: usize, expert: ExpertId| targets[layer][expert.index()][me.index()].clone();
            Routes::new(me, usize::from(experts), &scene.held, targets)
                .expect("targets hold the expert")
        };
        scene.routes = (0..ranks).map(|rank| Arc::new(routes(Rank(rank)))).collect();
        scene
    }

    /// The same with rows of another width.
    pub(super) fn wide(self, row_bytes: usize) -> Self {
        Self { row_bytes, ..self }
    }

    /// The same placement with other wishes.
    pub(super) fn routed(self, routing: Routing) -> Self {
        Self { routing, ..self }
    }

    /// The same, where every source shares its rows among their targets in another way from some step on, each from another
    /// one, before `steps`.
    pub(super) fn shared_anew(self, steps: u64) -> Self {
        let mut rng = Rng::of(&[self.seed, 2]);
        // Also nothing at all, and very different parts.
        let parts: Vec<f32> =
            (0..64).map(|_| f32::from(rng.below(4)) * f32::from(rng.below(99))).collect();
        let anew = |(source, routes): (usize, &Arc<Routes>)| {
            let of_expert = |layer: usize, expert: ExpertId| {
                let count = routes.tables().spans[layer][expert.index()].1 as usize;
                &parts[(layer * 7 + expert.index() * 5 + source) % 50..][..count]
            };
            let from = 1 + rng.next() % (steps - 1);
            (StepId(from), Arc::new(routes.shared(of_expert).expect("as many parts as targets")))
        };
        let anew = self.routes.iter().enumerate().map(anew).collect();
        Self { anew, ..self }
    }

    /// What rank `me` is told.
    pub(super) fn view(&self, epoch: Epoch, me: Rank) -> View {
        let routes = Arc::clone(&self.routes[me.index()]);
        View { epoch, me, ranks: self.ranks, active: self.active.clone(), routes }
    }

    /// The expert of every row that `source` sends.
    pub(super) fn experts(&self, place: Place, source: Rank) -> Vec<u16> {
        let step = place.step.0;
        if self.routing == Routing::One {
            let one = u16::try_from(step % u64::from(self.experts)).expect("fewer experts");
            return vec![one; usize::from(self.rows_max)];
        }
        let mut rng = self.rng(place, source, u64::MAX);
        let one = rng.below(self.experts);
        match rng.below(4) {
            0 => vec![],
            1 => vec![one; usize::from(self.rows_max)],
            _ => (0..rng.below(self.rows_max + 1)).map(|_| rng.below(self.experts)).collect(),
        }
    }

    /// The bytes of one row: noise, or a pattern that arithmetic would not leave alone.
    pub(super) fn row(&self, place: Place, source: Rank, row: usize) -> Vec<u8> {
        /// Little-endian words: quiet and signalling NaN with payload, minus zero, a denormal.
        const DELICATE: [u32; 4] = [0x7fc0_1234, 0xff80_0001, 0x8000_0000, 0x0000_0001];
        let mut rng = self.rng(place, source, u64::try_from(row).expect("few rows"));
        let delicate = rng.one_in(3).then(|| DELICATE[rng.index(4)].to_le_bytes());
        let byte = |i: usize| match delicate {
            Some(word) => word[i % 4],
            None => rng.next().to_le_bytes()[0],
        };
        (0..self.row_bytes).map(byte).collect()
    }

    /// All rows that `source` sends.
    pub(super) fn rows(&self, place: Place, source: Rank) -> Vec<u8> {
        let rows = self.experts(place, source).len();
        (0..rows).flat_map(|row| self.row(place, source, row)).collect()
    }

    /// What an expert makes of a row: of half of the rows nothing else.
    pub(super) fn answer(row: &mut [u8], layer: u16, expert: u16) {
        let turn = u8::try_from((expert * 7 + layer) % 251).expect("less than 256");
        if row.first().is_some_and(|byte| byte % 2 == 0) {
            for byte in &mut row[1..] {
                *byte = byte.rotate_left(3) ^ turn;
            }
        }
    }

    /// The answers to all rows of `source`.
    pub(super) fn answers(&self, place: Place, source: Rank) -> Vec<u8> {
        let mut rows = self.rows(place, source);
        let experts = self.experts(place, source);
        for (row, &expert) in rows.chunks_mut(self.row_bytes).zip(&experts) {
            Self::answer(row, place.layer, expert);
        }
        rows
    }

    /// What must arrive at `me`: per expert held there, by source, by row.
    pub(super) fn arrivals(&self, place: Place, me: Rank) -> (Vec<u8>, Vec<u32>) {
        let (mut rows, mut offsets) = (Vec::new(), vec![0]);
        let mut count = 0;
        for &expert in self.held(place.layer, me) {
            for source in self.active_ranks() {
                for (row, &wanted) in self.experts(place, source).iter().enumerate() {
                    if wanted == expert.0 && self.target(place, expert, (source, row)) == me {
                        rows.extend(self.row(place, source, row));
                        count += 1;
                    }
                }
            }
            offsets.push(count);
        }
        (rows, offsets)
    }

    pub(super) fn held(&self, layer: u16, rank: Rank) -> &[ExpertId] {
        &self.held[usize::from(layer)][rank.index()]
    }

    /// Who serves a row of a source.
    pub(super) fn target(
        &self,
        place: Place,
        expert: ExpertId,
        (source, row): (Rank, usize),
    ) -> Rank {
        let anew = self.anew.get(source.index()).filter(|(from, _)| *from <= place.step);
        let routes = anew.map_or(&self.routes[source.index()], |(_, routes)| routes);
        routes.target(place.layer, expert.0, row).0
    }

    pub(super) fn active_ranks(&self) -> impl Iterator<Item = Rank> + '_ {
        (0..self.ranks).map(Rank).filter(|rank| self.active[rank.index()])
    }

    fn rng(&self, place: Place, source: Rank, row: u64) -> Rng {
        let Place { epoch, step, layer } = place;
        Rng::of(&[self.seed, epoch.0, step.0, u64::from(layer), u64::from(source.0), row])
    }
}

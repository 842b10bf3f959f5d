//! The next placement: level, redundant, and near what the ranks hold already.

use crate::bound;
use crate::fill::{self, Free};
use crate::improve;
use crate::layer::{Layer, Terms};
use crate::load::{Lanes, Load};
use crate::{Placement, PlacementError, Shape};
use ids::{ExpertId, Rank};
use std::borrow::Cow;

/// Who holds which experts now, in the ranks of the next view. Unlike a [`Placement`] it may lack
/// experts: those whose last holder was lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holdings {
    shape: Shape,
    /// `[moe layers][experts]`, holders in the order of their replicas.
    layers: Vec<Vec<Vec<Rank>>>,
}

impl Holdings {
    /// Nobody holds anything.
    #[must_use]
    pub fn none(shape: Shape) -> Self {
        Self { shape, layers: vec![vec![Vec::new(); shape.experts]; shape.moe_layers] }
    }

    /// What a placement leaves when its ranks are numbered anew; `None`: that rank is gone.
    #[must_use]
    pub fn carried(placement: &Placement, renumber: impl Fn(Rank) -> Option<Rank>) -> Self {
        let shape = Shape { moe_layers: placement.moe_layers(), experts: placement.experts() };
        let experts = || (0..).map(ExpertId).take(shape.experts);
        let layer = |moe_layer| {
            let holders = |expert| placement.replicas(moe_layer, expert).iter();
            let carried = |expert| holders(expert).filter_map(|&rank| renumber(rank)).collect();
            experts().map(carried).collect()
        };
        Self { shape, layers: (0..shape.moe_layers).map(layer).collect() }
    }

    /// Who holds the expert, in the order of its replicas.
    ///
    /// # Panics
    ///
    /// If the layer or the expert does not exist.
    #[must_use]
    pub fn holders(&self, moe_layer: usize, expert: ExpertId) -> &[Rank] {
        &self.layers[moe_layer][expert.index()]
    }
}

/// How far a plan goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aim {
    /// Only what must be, because streams wait: every expert is held by somebody. Lost copies are not made
    /// again while another is left, and nobody gives any away.
    Survive,
    /// Every expert has its copies and nobody holds too much; copies also move, and further ones are made, where that levels the load.
    Level,
}

/// What a placement is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    pub aim: Aim,
    /// By rank of the next view: copies per layer that it can hold. A rank that can hold none gives
    /// what it holds to others, and takes nothing.
    pub capacity: &'a [usize],
    /// Copies of every expert beyond the first, as far as ranks and capacity allow.
    pub redundancy: u16,
    pub current: &'a Holdings,
    pub load: &'a Load,
}

/// A copy that a rank lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ExpertLoad {
    pub moe_layer: usize,
    pub expert: ExpertId,
    pub rank: Rank,
    /// A rank that holds it now.
    pub source: Option<Rank>,
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    pub placement: Placement,
    /// What must be loaded before it can be served. Experts that no rank holds come first.
    pub loads: Vec<ExpertLoad>,
}

/// Copies per layer that each of `ranks` must be able to hold so that all together can hold
/// `redundancy + 1` copies of every expert, with `spare` more on each.
#[must_use]
pub fn even_capacity(shape: Shape, ranks: u16, redundancy: u16, spare: usize) -> Vec<usize> {
    let copies = shape.experts * (usize::from(redundancy) + 1);
    let ranks = usize::from(ranks);
    vec![(copies.div_ceil(ranks.max(1)) + spare).min(shape.experts); ranks]
}

/// Plans the next placement. Equal requests give equal answers.
///
/// Copies stay where they are unless a rank holds too much, an expert has too few copies, or a move
/// levels the load by more than it is worth. While no load is known nothing moves for it.
///
/// # Errors
///
/// [`PlacementError`] if the ranks cannot hold every expert, or the parts of the request do not fit.
pub fn replan(request: &Request<'_>) -> Result<Planned, PlacementError> {
    let shape = request.load.shape();
    let ranks = check(request, shape)?;
    let copies_min = copies_min(request, shape)?;
    let mut layers = Vec::with_capacity(shape.moe_layers);
    for (moe_layer, current) in request.current.layers.iter().enumerate() {
        let current: Vec<Vec<usize>> = current
            .iter()
            .map(|holders| holders.iter().map(|rank| rank.index()).collect())
            .collect();
        let (weights, demand) = demand(request, moe_layer);
        let capacity = capacity(request, &current);
        let first = moe_layer % capacity.len();
        let terms = Terms { capacity: &capacity, copies_min, weights, first };
        let mut layer = Layer::new(terms, demand, &current);
        match request.aim {
            Aim::Level if !request.load.is_unknown() => {
                fill::fill(&mut layer, Free::FillNewcomers);
                improve::improve(&mut layer);
            }
            Aim::Level | Aim::Survive => fill::fill(&mut layer, Free::Keep),
        }
        layers.push(replicas(&layer, &request.current.layers[moe_layer]));
    }
    let placement = Placement::new(ranks, layers)?;
    let loads = loads(&placement, request.current);
    Ok(Planned { placement, loads })
}

fn check(request: &Request<'_>, shape: Shape) -> Result<u16, PlacementError> {
    let ranks = request.capacity.len();
    let ranks = u16::try_from(ranks).map_err(|_| PlacementError::TooManyRanks { ranks })?;
    if ranks == 0 {
        return Err(PlacementError::NoRanks);
    }
    if request.current.shape != shape {
        return Err(PlacementError::Window { found: shape, expected: request.current.shape });
    }
    for (layer, experts) in request.current.layers.iter().enumerate() {
        for (expert, holders) in (0..).map(ExpertId).zip(experts) {
            for (at, &rank) in holders.iter().enumerate() {
                if ranks <= rank.0 {
                    return Err(PlacementError::NoSuchRank { layer, expert, rank, ranks });
                }
                if holders[..at].contains(&rank) {
                    return Err(PlacementError::Twice { layer, expert, rank });
                }
            }
        }
    }
    Ok(ranks)
}

/// Copies of the layer that each rank may hold. Who must only survive keeps what it has.
fn capacity<'a>(request: &Request<'a>, current: &[Vec<usize>]) -> Cow<'a, [usize]> {
    match request.aim {
        Aim::Level => Cow::Borrowed(request.capacity),
        Aim::Survive => {
            let held = |rank| current.iter().filter(|holders| holders.contains(&rank)).count();
            let most = |(rank, &capacity): (usize, &usize)| match capacity {
                0 => 0,
                capacity => capacity.max(held(rank)),
            };
            Cow::Owned(request.capacity.iter().enumerate().map(most).collect())
        }
    }
}

/// Copies of every expert that the ranks can hold on distinct ones, at most as many as asked for.
fn copies_min(request: &Request<'_>, shape: Shape) -> Result<usize, PlacementError> {
    if shape.experts == 0 {
        return Ok(0);
    }
    let useful = request.capacity.iter().map(|&capacity| capacity.min(shape.experts));
    let capacity: usize = useful.sum();
    let hosts = request.capacity.iter().filter(|&&capacity| 0 < capacity).count();
    let asked = match request.aim {
        Aim::Survive => 1,
        Aim::Level => usize::from(request.redundancy) + 1,
    };
    let copies = (capacity / shape.experts).min(hosts).min(asked);
    if copies == 0 {
        return Err(PlacementError::Capacity { capacity, experts: shape.experts });
    }
    Ok(copies)
}

/// Weights of the regimes and the layer's demand, in units of the mean load of a rank.
fn demand(request: &Request<'_>, moe_layer: usize) -> (Lanes, Vec<Lanes>) {
    let hosts = request.capacity.iter().filter(|&&capacity| 0 < capacity).count();
    let hosts = f32::from(u16::try_from(hosts).unwrap_or(u16::MAX));
    if request.load.is_unknown() {
        let experts = request.load.shape().experts;
        let each = hosts / f32::from(u16::try_from(experts).unwrap_or(u16::MAX)).max(1.0);
        let first = |x: f32| std::array::from_fn(|lane| if lane == 0 { x } else { 0.0 });
        return (first(1.0), vec![first(each); experts]);
    }
    let mut demands = request.load.demands(moe_layer);
    for demand in &mut demands {
        *demand = demand.map(|share| share * hosts);
    }
    let places = request.capacity.iter().sum();
    // A regime that no placement makes level must not hide those that some can.
    let factors = bound::least_fullest(&demands, places).map(|load| 1.0 / load);
    for demand in &mut demands {
        *demand = std::array::from_fn(|lane| demand[lane] * factors[lane]);
    }
    (request.load.weights(), demands)
}

/// Holders that stay keep their order; new ones follow by rank.
fn replicas(layer: &Layer, current: &[Vec<Rank>]) -> Vec<Vec<Rank>> {
    let ordered = |(holders, current): (&Vec<usize>, &Vec<Rank>)| {
        let place = |rank: Rank| current.iter().position(|&old| old == rank);
        let rank = |&rank: &usize| Rank(u16::try_from(rank).expect("`check` counted the ranks"));
        let mut replicas: Vec<Rank> = holders.iter().map(rank).collect();
        replicas.sort_by_key(|&rank| (place(rank).unwrap_or(usize::MAX), rank));
        replicas
    };
    layer.holders.iter().zip(current).map(ordered).collect()
}

fn loads(placement: &Placement, current: &Holdings) -> Vec<ExpertLoad> {
    let mut loads = Vec::new();
    for (moe_layer, experts) in current.layers.iter().enumerate() {
        for (expert, holders) in (0..).map(ExpertId).zip(experts) {
            for &rank in placement.replicas(moe_layer, expert) {
                if !holders.contains(&rank) {
                    // Receivers of one expert take it from different holders.
                    let source = holders.get(rank.index() % holders.len().max(1)).copied();
                    loads.push(ExpertLoad { moe_layer, expert, rank, source });
                }
            }
        }
    }
    loads.sort_by_key(|load| (load.source.is_some(), *load));
    loads
}

//! Random histories with an oracle.

use super::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// A cluster whose workers and store answer at random times, or die.
#[derive(Default)]
struct World {
    pending: Vec<Input>,
    /// Rank of a worker in a view, and how many there are.
    ranks: BTreeMap<(Epoch, WorkerId), (Rank, u16)>,
    alive: BTreeMap<WorkerId, String>,
    prepared: BTreeMap<Epoch, BTreeSet<WorkerId>>,
    published: Vec<Arc<View>>,
    born: u32,
}

impl World {
    fn feed(&mut self, control: &mut Control, now: Duration, input: Input) {
        if let Input::Prepared { epoch, worker, unreached } = &input
            && unreached.is_empty()
        {
            self.prepared.entry(*epoch).or_default().insert(*worker);
        }
        for output in control.step(now, input) {
            match output {
                Output::Welcome { incarnation, worker } => {
                    self.alive.insert(worker, incarnation);
                }
                Output::DrainRefused { .. }
                | Output::GivenUp { .. }
                | Output::Lacking(_)
                | Output::Scaled { .. }
                | Output::ScaleRefused { .. }
                | Output::Rebalanced(_) => {}
                Output::Refuse { .. } => panic!("all workers of this world are alike"),
                Output::Prepare { worker, rank, view, .. } => {
                    let ranks = view.placement.ranks();
                    self.ranks.insert((view.epoch, worker), (rank, ranks));
                    let epoch = view.epoch;
                    self.pending.push(Input::Prepared { epoch, worker, unreached: vec![] });
                }
                Output::Store { view } => self.pending.push(Input::Stored { epoch: view.epoch }),
                Output::Publish { view } => self.publish(view),
                Output::Share { view, .. } => {
                    let counts = self.published.last().map(|view| view.epoch);
                    assert_eq!(counts, Some(view.epoch), "shares of the view that counts");
                }
                Output::Dismiss { worker, .. } => {
                    self.alive.remove(&worker);
                }
            }
        }
    }

    /// What must hold of every view that counts.
    fn publish(&mut self, view: Arc<View>) {
        assert!(self.published.last().is_none_or(|last| last.epoch < view.epoch), "epochs rise");
        let members: BTreeSet<WorkerId> = view.members.iter().map(|m| m.worker).collect();
        assert_eq!(members.len(), view.members.len(), "nobody has two ranks");
        assert_eq!(self.prepared.get(&view.epoch), Some(&members), "all members are prepared");
        self.published.push(view);
    }

    fn random(&mut self, control: &mut Control, now: Duration, dice: u32) {
        let pick = (dice / 16) as usize;
        match dice % 16 {
            0..=2 => {
                self.born += 1;
                let name = format!("i{}", self.born);
                self.feed(control, now, Input::Hello(hello(&name)));
            }
            3 | 4 if !self.alive.is_empty() => {
                let (&worker, _) = self.alive.iter().nth(pick % self.alive.len()).unwrap();
                self.alive.remove(&worker);
                self.feed(control, now, Input::Lost { worker, evidence: "dice".into() });
            }
            5 if control.committed.is_some() => {
                let epoch = control.committed.as_ref().unwrap().epoch;
                let text = "dice".into();
                let ranks = control.committed.as_ref().unwrap().placement.ranks();
                let silent = pick
                    .is_multiple_of(3)
                    .then(|| Rank(u16::try_from(pick % usize::from(ranks)).unwrap()));
                let ranks = silent.into_iter().collect();
                let silence = Silence { ranks, lasted: Duration::from_millis(100) };
                self.feed(control, now, Input::Fault { epoch, text, suspects: vec![], silence });
            }
            6 => self.feed(control, now, Input::Tick),
            7 if !self.alive.is_empty() => {
                let (&worker, _) = self.alive.iter().nth(pick % self.alive.len()).unwrap();
                self.feed(control, now, Input::Drain { worker });
            }
            8 => {
                let layer: Vec<u64> = (0..4).map(|e| (pick as u64 >> (e * 4)) % 16).collect();
                let window = Window::new(&[layer.clone(), layer]).unwrap();
                self.feed(control, now, Input::Moment { window: window.clone() });
                self.feed(control, now, Input::Load { window });
                self.feed(control, now, Input::Rebalance);
            }
            9 => {
                let workers = u16::try_from(pick % 5).unwrap();
                self.feed(control, now, Input::Scale { workers });
            }
            _ if !self.pending.is_empty() => {
                let input = self.pending.swap_remove(pick % self.pending.len());
                let input = match (input, dice / 16 % 5) {
                    (Input::Prepared { epoch, worker, .. }, 0) => {
                        Input::PrepareFailed { epoch, worker, text: "dice".into() }
                    }
                    (Input::Prepared { epoch, worker, .. }, 1) => {
                        let (me, ranks) = self.ranks[&(epoch, worker)];
                        let is_missed = |rank: &u16| *rank != me.0 && pick >> (rank % 8) & 1 == 1;
                        let unreached = (0..ranks).filter(is_missed).map(Rank).collect();
                        Input::Prepared { epoch, worker, unreached }
                    }
                    (Input::Stored { epoch }, 0) => {
                        self.pending.push(Input::Stored { epoch });
                        Input::StoreFailed { epoch, text: "dice".into() }
                    }
                    (input, _) => input,
                };
                self.feed(control, now, input);
            }
            _ => {}
        }
    }
}

/// Of the expert that has fewest.
fn copies(placement: &placement::Placement) -> usize {
    let layers = 0..placement.moe_layers();
    let of = |layer| (0..4).map(move |e| placement.replicas(layer, ids::ExpertId(e)).len());
    layers.flat_map(of).min().unwrap()
}

proptest! {
    /// Whatever happens, no view counts that a member has not prepared; and when it stops happening,
    /// everybody who lives serves.
    #[test]
    fn random_histories_are_safe_and_end_in_service(
        dice in proptest::collection::vec(any::<u32>(), 1..200),
    ) {
        let (mut world, mut now) = (World::default(), Duration::ZERO);
        let mut control = start(3);
        for dice in dice {
            now += Duration::from_millis(u64::from(dice % 1000));
            world.random(&mut control, now, dice);
        }
        world.feed(&mut control, now, Input::Hello(hello("last")));
        // A view that could not be prepared is tried again, and lost copies are made again.
        while control.status().phase != PhaseName::Serving || control.deadline().is_some() {
            now += Duration::from_secs(1);
            let next = if world.pending.is_empty() { Input::Tick } else { world.pending.remove(0) };
            world.feed(&mut control, now, next);
            prop_assert!(now < Duration::from_secs(10_000), "it never serves again");
        }
        let view = world.published.last().unwrap();
        let members: BTreeSet<WorkerId> = view.members.iter().map(|m| m.worker).collect();
        prop_assert!(usize::from(view.placement.ranks().min(2)) <= copies(&view.placement));
        prop_assert_eq!(members, world.alive.keys().copied().collect::<BTreeSet<_>>());
    }
}

//! What an operator may see of the machine.

use crate::machine::Phase;
use crate::{Change, Control, Lack};
use ids::{Epoch, Rank, WorkerId};
use placement::{Aim, Member, Placement, Shape, Shares, View};

/// Which phase, without its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PhaseName {
    Adopting,
    Assembling,
    Preparing,
    Committing,
    Serving,
}

/// A member's part in the view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemberState {
    /// Serves its rank of the current view.
    Serving,
    /// Waits for the next view.
    Joining,
    /// Is being prepared for the next view.
    Preparing,
    /// Serves until a view without it counts.
    Draining,
}

/// One member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberStatus {
    pub worker: WorkerId,
    /// In the current view.
    pub rank: Option<Rank>,
    pub pid: u32,
    pub address: String,
    pub device: String,
    pub state: MemberState,
    /// Copies of experts it holds in the current view, over all layers.
    pub experts: usize,
}

/// The whole picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Status {
    /// Of the view that counts; `None` before the first.
    pub epoch: Option<Epoch>,
    pub phase: PhaseName,
    /// How many workers an operator wants, if one has said so.
    pub wanted: Option<u16>,
    pub members: Vec<MemberStatus>,
    /// Of the view that counts.
    pub placement: Option<Placement>,
    /// How often the members were told other shares of the experts' rows, and the last of the view that counts; `None`: all
    /// copies of an expert share alike, or as a former leader told.
    pub shared: (u64, Option<Shares>),
    /// Oldest first.
    pub changes: Vec<Change>,
    /// What keeps it from serving.
    pub lack: Option<Lack>,
}

impl Control {
    /// Layers and experts of the view that counts.
    #[must_use]
    pub fn shape(&self) -> Option<Shape> {
        Some(self.standing()?.placement.shape())
    }

    /// A snapshot for `herd status`.
    #[must_use]
    pub fn status(&self) -> Status {
        let phase = match &self.phase {
            Phase::Adopting { .. } => PhaseName::Adopting,
            Phase::Assembling { .. } => PhaseName::Assembling,
            Phase::Preparing { .. } => PhaseName::Preparing,
            Phase::Committing { .. } => PhaseName::Committing,
            Phase::Serving => PhaseName::Serving,
        };
        let view = self.standing();
        let mut members: Vec<MemberStatus> =
            self.members.keys().map(|&worker| self.member_status(worker)).collect();
        if let Phase::Adopting { view, .. } = &self.phase {
            // They serve, whether or not they have met the new leader.
            let unmet = |member: &&Member| !self.members.contains_key(&member.worker);
            members.extend(view.members.iter().filter(unmet).map(|member| MemberStatus {
                worker: member.worker,
                rank: Some(member.rank),
                pid: member.pid,
                address: member.address.clone(),
                device: member.device.clone(),
                state: MemberState::Serving,
                experts: held(view, member.rank),
            }));
            members.sort_by_key(|member| member.worker);
        }
        Status {
            epoch: view.map(|view| view.epoch),
            phase,
            wanted: self.wanted,
            members,
            placement: view.map(|view| view.placement.clone()),
            shared: (self.shared, self.follower.told().cloned()),
            changes: self.history.iter().cloned().collect(),
            lack: self.lack,
        }
    }

    /// The view that the cluster serves, as far as this coordinator knows.
    fn standing(&self) -> Option<&View> {
        match &self.phase {
            Phase::Adopting { view, .. } => Some(view),
            Phase::Assembling { .. }
            | Phase::Preparing { .. }
            | Phase::Committing { .. }
            | Phase::Serving => self.committed.as_deref(),
        }
    }

    fn member_status(&self, worker: WorkerId) -> MemberStatus {
        let hello = &self.members[&worker];
        let placed = self.standing().and_then(|view| {
            let member = view.members.iter().find(|member| member.worker == worker)?;
            Some((member.rank, held(view, member.rank)))
        });
        let is_waited_for = match &self.phase {
            // What is planned stops nobody who serves.
            Phase::Preparing { waiting, aim, .. } => {
                let serves_on = *aim == Aim::Level && placed.is_some() && self.is_served();
                waiting.contains(&worker) && !serves_on
            }
            Phase::Adopting { .. }
            | Phase::Assembling { .. }
            | Phase::Committing { .. }
            | Phase::Serving => false,
        };
        let state = match (is_waited_for, placed) {
            _ if self.draining.contains(&worker) => MemberState::Draining,
            (true, _) => MemberState::Preparing,
            (false, Some(_)) => MemberState::Serving,
            (false, None) => MemberState::Joining,
        };
        MemberStatus {
            worker,
            rank: placed.map(|(rank, _)| rank),
            pid: hello.pid,
            address: hello.address.clone(),
            device: hello.device.clone(),
            state,
            experts: placed.map_or(0, |(_, held)| held),
        }
    }
}

/// Copies of experts on a rank, over all layers.
fn held(view: &View, rank: Rank) -> usize {
    let layers = 0..view.placement.moe_layers();
    layers.map(|layer| view.placement.local_experts(layer, rank).len()).sum()
}

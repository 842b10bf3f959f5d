//! Views: coordinator -> wire -> router and workers.

use crate::{WireError, narrow, pb};
use ids::{Epoch, ExpertId, Rank, WorkerId};
use placement::{KvPools, Member, Placement, View};

/// The wire form of a view.
#[must_use]
pub fn view_to_wire(view: &View) -> pb::View {
    pb::View {
        epoch: view.epoch.0,
        members: view.members.iter().map(member_to_wire).collect(),
        placement: (0..view.placement.moe_layers())
            .map(|layer| layer_to_wire(&view.placement, layer))
            .collect(),
        profile: view.profile.clone(),
        model: view.model.clone(),
    }
}

fn member_to_wire(member: &Member) -> pb::Member {
    pb::Member {
        worker: member.worker.0,
        rank: u32::from(member.rank.0),
        address: member.address.clone(),
        incarnation: member.incarnation.clone(),
        pid: member.pid,
        device: member.device.clone(),
        kv: Some(pools_to_wire(member.kv)),
        context_tokens: member.context_tokens,
        exchange: member.exchange.clone(),
    }
}

fn layer_to_wire(placement: &Placement, layer: usize) -> pb::LayerPlacement {
    let experts = u16::try_from(placement.experts()).expect("experts are numbered in 16 bits");
    let replicas = |expert| pb::Replicas {
        ranks: placement
            .replicas(layer, ExpertId(expert))
            .iter()
            .map(|rank| u32::from(rank.0))
            .collect(),
    };
    pb::LayerPlacement { experts: (0..experts).map(replicas).collect() }
}

/// The wire form of a rank's KV capacity.
#[must_use]
pub fn pools_to_wire(pools: KvPools) -> pb::KvPools {
    pb::KvPools {
        block_tokens: pools.block_tokens,
        full_blocks: pools.full_blocks,
        chunked_blocks: pools.chunked_blocks,
        chunk_tokens: pools.chunk_tokens.unwrap_or(0),
        backup_tokens: pools.backup_tokens,
    }
}

/// The core form of a rank's KV capacity; a chunk of 0 tokens means that no layer is chunked.
#[must_use]
pub fn pools_from_wire(wire: pb::KvPools) -> KvPools {
    KvPools {
        block_tokens: wire.block_tokens,
        full_blocks: wire.full_blocks,
        chunked_blocks: wire.chunked_blocks,
        chunk_tokens: (wire.chunk_tokens != 0).then_some(wire.chunk_tokens),
        backup_tokens: wire.backup_tokens,
    }
}

/// The core form of a view.
///
/// # Errors
///
/// [`WireError`] if the members are not in rank order or the placement is impossible.
pub fn view_from_wire(wire: pb::View) -> Result<View, WireError> {
    let mut members = Vec::with_capacity(wire.members.len());
    for (index, member) in wire.members.into_iter().enumerate() {
        let rank = narrow("member.rank", member.rank)?;
        if usize::from(rank) != index {
            return Err(WireError::RankOrder { index, rank: member.rank });
        }
        members.push(Member {
            worker: WorkerId(member.worker),
            rank: Rank(rank),
            address: member.address,
            incarnation: member.incarnation,
            pid: member.pid,
            device: member.device,
            kv: pools_from_wire(member.kv.ok_or(WireError::Missing { field: "member.kv" })?),
            context_tokens: member.context_tokens,
            exchange: member.exchange,
        });
    }
    let ranks = u16::try_from(members.len()).map_err(|_| WireError::TooLarge {
        field: "members",
        value: members.len() as u64,
        max: u64::from(u16::MAX),
    })?;
    let layers =
        wire.placement.into_iter().map(layer_from_wire).collect::<Result<Vec<_>, WireError>>()?;
    let placement =
        Placement::new(ranks, layers).map_err(|e| WireError::Placement(e.to_string()))?;
    Ok(View {
        epoch: Epoch(wire.epoch),
        members,
        placement,
        profile: wire.profile,
        model: wire.model,
    })
}

fn layer_from_wire(layer: pb::LayerPlacement) -> Result<Vec<Vec<Rank>>, WireError> {
    let ranks = |replicas: pb::Replicas| {
        replicas.ranks.into_iter().map(|rank| narrow("replicas.ranks", rank).map(Rank)).collect()
    };
    layer.experts.into_iter().map(ranks).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view() -> View {
        let member = |rank: u16| Member {
            worker: WorkerId(u32::from(rank) + 10),
            rank: Rank(rank),
            address: format!("127.0.0.1:{rank}"),
            incarnation: "i".into(),
            pid: 1,
            device: "cpu".into(),
            kv: KvPools {
                block_tokens: 16,
                full_blocks: 4,
                chunked_blocks: 5,
                chunk_tokens: None,
                backup_tokens: 77,
            },
            context_tokens: 64,
            exchange: format!("127.0.0.1:9{rank}"),
        };
        let layers = vec![vec![vec![Rank(0)], vec![Rank(1), Rank(0)]]];
        View {
            epoch: Epoch(3),
            members: vec![member(0), member(1)],
            placement: Placement::new(2, layers).unwrap(),
            profile: "f32".into(),
            model: "m".into(),
        }
    }

    #[test]
    fn view_survives_the_wire() {
        assert_eq!(view_from_wire(view_to_wire(&view())), Ok(view()));
    }

    #[test]
    fn members_out_of_order_are_refused() {
        let mut wire = view_to_wire(&view());
        wire.members.swap(0, 1);
        assert_eq!(view_from_wire(wire), Err(WireError::RankOrder { index: 0, rank: 1 }));
    }

    #[test]
    fn expert_without_a_rank_is_refused() {
        let mut wire = view_to_wire(&view());
        wire.placement[0].experts[0].ranks.clear();
        assert!(matches!(view_from_wire(wire), Err(WireError::Placement(_))));
    }
}

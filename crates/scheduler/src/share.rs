//! Fair shares of a token budget.
//!
//! Max-min fairness: nobody gets more than he asks for, and nobody gets less than another unless he
//! asked for less. It is applied twice: between requests, then between the sequences of each, so
//! that a request with `n = 8` does not count eight times.

/// A prefill that asks for tokens of this step.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq))]
pub(crate) struct Claim {
    /// Who asks: an index of the caller's.
    pub(crate) owner: usize,
    pub(crate) unit: Unit,
    pub(crate) demand_tokens: u32,
    /// The answer.
    pub(crate) share_tokens: u32,
}

/// What counts once between requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Unit {
    Group(u64),
    /// A sequence without a group, by its index.
    Alone(usize),
}

/// Sums over the claims of one unit; kept between steps for its memory.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq))]
pub(crate) struct UnitClaim {
    first: usize,
    claims: usize,
    demand_tokens: u32,
    share_tokens: u32,
}

/// Divides `budget_tokens` between the claims; afterwards they are ordered by owner.
///
/// All of the budget is given away, or every demand is met. If the budget is at least the number
/// of units, every unit gets at least one token.
pub(crate) fn divide(budget_tokens: u32, claims: &mut [Claim], units: &mut Vec<UnitClaim>) {
    claims.sort_unstable_by_key(|claim| (claim.unit, claim.demand_tokens, claim.owner));
    units.clear();
    for (i, claim) in claims.iter().enumerate() {
        match units.last_mut() {
            Some(unit) if claims[unit.first].unit == claim.unit => {
                unit.claims += 1;
                unit.demand_tokens = unit.demand_tokens.saturating_add(claim.demand_tokens);
            }
            Some(_) | None => units.push(UnitClaim {
                first: i,
                claims: 1,
                demand_tokens: claim.demand_tokens,
                share_tokens: 0,
            }),
        }
    }

    units.sort_unstable_by_key(|unit| (unit.demand_tokens, unit.first));
    fill(budget_tokens, units.iter_mut().map(|u| (u.demand_tokens, &mut u.share_tokens)));
    for unit in units.drain(..) {
        let members = &mut claims[unit.first..][..unit.claims];
        fill(unit.share_tokens, members.iter_mut().map(|c| (c.demand_tokens, &mut c.share_tokens)));
    }
    claims.sort_unstable_by_key(|claim| claim.owner);
}

/// Water-filling over demands in ascending order. A remainder goes to the first.
fn fill<'a>(budget_tokens: u32, demands: impl ExactSizeIterator<Item = (u32, &'a mut u32)>) {
    let mut left = budget_tokens;
    let mut waiting = u32::try_from(demands.len()).expect("no more claims than sequences");
    for (demand, share) in demands {
        *share = demand.min(left.div_ceil(waiting));
        left -= *share;
        waiting -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(budget_tokens: u32, demands: &[(Unit, u32)], want: &[u32]) {
        let claim =
            |(owner, &(unit, demand_tokens))| Claim { owner, unit, demand_tokens, share_tokens: 0 };
        let mut claims: Vec<Claim> = demands.iter().enumerate().map(claim).collect();
        divide(budget_tokens, &mut claims, &mut Vec::new());
        let shares: Vec<u32> = claims.iter().map(|claim| claim.share_tokens).collect();
        assert_eq!(shares, want, "{budget_tokens} among {demands:?}");
    }

    use Unit::{Alone, Group};

    #[test]
    fn what_one_cannot_use_goes_to_the_others() {
        check(12, &[(Alone(0), 100), (Alone(1), 2), (Alone(2), 100)], &[5, 2, 5]);
    }

    #[test]
    fn all_demands_are_met_if_the_budget_suffices() {
        check(9, &[(Alone(0), 5), (Alone(1), 3)], &[5, 3]);
    }

    #[test]
    fn request_with_many_sequences_counts_once() {
        check(12, &[(Group(1), 9), (Group(1), 9), (Group(1), 9), (Alone(3), 9)], &[2, 2, 2, 6]);
    }

    #[test]
    fn remainder_goes_to_who_is_nearest_to_its_end() {
        check(3, &[(Alone(0), 9), (Alone(1), 8)], &[1, 2]);
        check(2, &[(Group(1), 9), (Group(1), 9), (Group(1), 8)], &[1, 0, 1]);
    }

    #[test]
    fn nothing_to_give_gives_nothing() {
        check(0, &[(Alone(0), 9)], &[0]);
        check(5, &[], &[]);
    }
}

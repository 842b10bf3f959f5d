//! How level a layer can be at best: what each regime is measured by.
//!
//! It ignores who holds what and how many places each rank has, so it is never above what can be.

use crate::load::{Lanes, REGIMES_MAX};

/// Halvings of the range in which the bound is sought: to 1 % of it.
const HALVINGS: usize = 7;

/// By regime, a load of the fullest rank that no placement in this many places is below: an expert
/// has no fewer copies than its load needs. At least 1, which is level. `demands` are by expert, in
/// units of the mean load of a rank.
pub(crate) fn least_fullest(demands: &[Lanes], places: usize) -> Lanes {
    let hottest = |lane: usize| demands.iter().map(|demand| demand[lane]).fold(1.0, f32::max);
    let mut below = [1.0; REGIMES_MAX];
    let level = fits(demands, &below, places);
    let mut enough = std::array::from_fn(|lane| if level[lane] { 1.0 } else { hottest(lane) });
    for _ in 0..HALVINGS {
        if below == enough {
            break;
        }
        let middle = std::array::from_fn(|lane| (below[lane] + enough[lane]) / 2.0);
        let fits = fits(demands, &middle, places);
        for lane in 0..REGIMES_MAX {
            let bound = if fits[lane] { &mut enough[lane] } else { &mut below[lane] };
            *bound = middle[lane];
        }
    }
    below
}

/// By regime, whether the places are enough for copies of at most this load each.
fn fits(demands: &[Lanes], limits: &Lanes, places: usize) -> [bool; REGIMES_MAX] {
    let mut copies = [0.0; REGIMES_MAX];
    for demand in demands {
        for lane in 0..REGIMES_MAX {
            copies[lane] += (demand[lane] / limits[lane]).ceil().max(1.0);
        }
    }
    let places = f32::from(u16::try_from(places).unwrap_or(u16::MAX));
    copies.map(|copies: f32| copies <= places)
}

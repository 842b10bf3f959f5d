//! Shares that follow the traffic: from moment to moment, within one placement.

use crate::load::float;
use crate::{Load, Placement, PlacementError, Shares, Window};

/// What is left of the weight of a moment when the next one has passed: the last four count for two thirds.
const KEEP: f64 = 0.75;
/// Tokens per expert that the newest mix of the past windows counts for: without it a few tokens would look like a trend.
const PRIOR: f64 = 1.0;
/// Counts are whole numbers, and what is left of them is not.
const SCALE: f64 = 64.0;
/// What other shares must gain in balance, the mean over the layers: less is noise.
const GAIN_MIN: f64 = 0.01;

/// The traffic of the last moments, and the shares that were made for it.
#[derive(Debug, Clone, Default)]
pub struct Follower {
    /// Tokens by expert, `[moe layers][experts]`; those of earlier moments count for less.
    recent: Vec<Vec<f64>>,
    told: Told,
}

/// What those who serve the placement go by.
#[derive(Debug, Clone, Default)]
enum Told {
    /// Nobody knows: somebody else may have told them.
    #[default]
    Unknown,
    /// Every expert's copies share alike.
    Nothing,
    These(Shares),
}

impl Follower {
    /// Takes in what the experts had to do in the moment that has just passed.
    pub fn observe(&mut self, moment: &Window) {
        let is_alike = self.recent.len() == moment.shape().moe_layers
            && self.recent.iter().zip(moment.layers()).all(|(old, new)| old.len() == new.len());
        if !is_alike {
            self.recent = moment.layers().map(|layer| vec![0.0; layer.len()]).collect();
        }
        for (old, new) in self.recent.iter_mut().flatten().zip(moment.layers().flatten()) {
            *old = *old * KEEP + float(*new);
        }
    }

    /// Another placement is served from now on; every expert's copies share alike until [`Follower::shares`] says otherwise.
    pub fn begin(&mut self) {
        self.told = Told::Nothing;
    }

    /// What was last said of the placement.
    #[must_use]
    pub fn told(&self) -> Option<&Shares> {
        match &self.told {
            Told::Unknown | Told::Nothing => None,
            Told::These(shares) => Some(shares),
        }
    }

    /// Shares of `placement` for the present traffic, if they are worth telling anybody.
    ///
    /// * `load`: the windows before
    ///
    /// # Errors
    ///
    /// [`PlacementError::Window`] if the traffic is that of another model.
    pub fn shares(
        &mut self,
        placement: &Placement,
        load: Option<&Load>,
    ) -> Result<Option<&Shares>, PlacementError> {
        if !placement.has_choice() {
            return Ok(None);
        }
        let Some(traffic) = self.traffic(load)? else { return Ok(None) };
        let level = Shares::level_from(placement, &traffic, self.told())?;
        let present = match &self.told {
            Told::Unknown => 0.0,
            Told::Nothing => traffic.balance(placement, &Shares::even(placement)),
            Told::These(shares) => traffic.balance(placement, shares),
        };
        if present >= traffic.balance(placement, &level) * (1.0 - GAIN_MIN) {
            return Ok(None);
        }
        self.told = Told::These(level);
        Ok(self.told())
    }

    /// What is to be expected for the next moments; `None` if there was nothing yet.
    fn traffic(&self, load: Option<&Load>) -> Result<Option<Window>, PlacementError> {
        let tokens = |layer: &Vec<f64>| layer.iter().sum::<f64>();
        if self.recent.iter().map(tokens).sum::<f64>() < 1.0 {
            return Ok(None);
        }
        let mut layers = Vec::with_capacity(self.recent.len());
        for (moe_layer, recent) in self.recent.iter().enumerate() {
            let prior = load.and_then(|load| load.newest(moe_layer));
            let prior = prior.filter(|prior| prior.len() == recent.len());
            let tokens = float(recent.len() as u64) * PRIOR;
            let expected = |(expert, &tokens_seen): (usize, &f64)| {
                let prior = prior.map_or(0.0, |prior| prior[expert] * tokens);
                whole((tokens_seen + prior) * SCALE)
            };
            layers.push(recent.iter().enumerate().map(expected).collect());
        }
        Window::new(&layers).map(Some)
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "counts of tokens")]
fn whole(count: f64) -> u64 {
    count.round() as u64
}

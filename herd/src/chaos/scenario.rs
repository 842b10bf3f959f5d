//! What shall happen: a TOML file.
//!
//! ```toml
//! seed = 7
//! streams = 40
//! tokens = 200
//! rounds = 10
//! stall_p99_max_s = 1.0
//!
//! [[faults]]
//! kind = "kill"
//! target = "worker"
//! after_s = [0.5, 2.0]
//!
//! [[faults]]
//! kind = "nan"
//! at = { step = 3, layer = 1, phase = "combine" }
//! ```

use super::fault::Fault;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Why a file is no scenario.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}: {source}", path.display())]
    Parse { path: PathBuf, source: Box<toml::de::Error> },
    #[error("{}: {what}", path.display())]
    Invalid { path: PathBuf, what: String },
}

/// A scenario.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Scenario {
    /// Decides who is hit and when.
    pub seed: u64,
    /// Streams that run at once.
    pub streams: u32,
    /// Tokens of every stream.
    pub tokens: u32,
    /// How often the streams run and the faults strike.
    pub rounds: u32,
    /// Fail if the median stream stands still for longer.
    pub stall_p50_max_s: Option<f64>,
    /// Fail if one stream of a hundred stands still for longer.
    pub stall_p99_max_s: Option<f64>,
    /// Fail if a stream stands still for longer, or the cluster is not whole and idle so long after a round.
    pub recovery_max_s: f64,
    /// Of every round.
    pub faults: Vec<Fault>,
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            seed: 0,
            streams: 40,
            tokens: 200,
            rounds: 1,
            stall_p50_max_s: None,
            stall_p99_max_s: None,
            recovery_max_s: 60.0,
            faults: Vec::new(),
        }
    }
}

impl Scenario {
    /// Reads and checks a file.
    ///
    /// # Errors
    ///
    /// [`ScenarioError`].
    pub fn load(path: &Path) -> Result<Self, ScenarioError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ScenarioError::Read { path: path.to_owned(), source })?;
        let scenario: Self = toml::from_str(&text).map_err(|source| ScenarioError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        scenario.check().map_err(|what| ScenarioError::Invalid { path: path.to_owned(), what })?;
        Ok(scenario)
    }

    fn check(&self) -> Result<(), String> {
        if self.streams == 0 || self.tokens == 0 || self.rounds == 0 {
            return Err("streams, tokens and rounds must be at least 1".into());
        }
        self.faults.iter().try_for_each(Fault::check)
    }
}

/// The chance of a run: splitmix64 of the seed, so that a seed replays on every machine.
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// An index below `count`, which is at least 1.
    pub(super) fn below(&mut self, count: usize) -> usize {
        let rest = self.roll() % count as u64;
        usize::try_from(rest).expect("smaller than a usize")
    }

    pub(super) fn between(&mut self, [from, to]: [f64; 2]) -> f64 {
        let fraction = (self.roll() >> 11) as f64 / (1_u64 << 53) as f64;
        from + (to - from) * fraction
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refused(text: &str, want: &str) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.toml");
        std::fs::write(&path, text).unwrap();
        let error = Scenario::load(&path).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }

    #[test]
    fn files_that_say_nothing_sensible_are_refused() {
        refused("streams = 0", "must be at least 1");
        refused("stream = 3", "unknown field `stream`");
        let fault = |text: &str, want: &str| refused(&format!("[[faults]]\n{text}"), want);
        fault("kind = 'freeze'\nafter_s = [1, 2]", "a freeze lasts for_s = 0");
        fault("kind = 'freeze'\nfor_s = 1\nafter_s = [2, 1]", "not a span within an hour");
        fault("kind = 'kill'", "neither after_s nor at");
        fault("kind = 'kill'\nworkers = 0\nafter_s = [1, 1]", "workers = 0");
        fault("kind = 'kill'\ntarget = 'etcd'\nworkers = 2\nafter_s = [1, 1]", "one etcd");
        fault("kind = 'nan'\ntarget = 'leader'\nafter_s = [1, 1]", "only a worker");
        fault("kind = 'kill'\ntarget = 'etcd'\nat = { step = 1 }", "only a worker has steps");
        fault("kind = 'freeze'\nfor_s = 1\nat = { step = 1 }", "pause");
        fault("kind = 'nan'\nat = { phase = 'experts' }", "results exist in the phase combine");
        fault("kind = 'corrupt'\nat = { phase = 'experts' }", "no frame is sent");
        fault("kind = 'slow'\nms = 5\nat = { step = 1 }", "a slow lasts for_s = 0");
        fault("kind = 'slow'\nms = 5\nfor_s = 1\nafter_s = [1, 1]", "needs a layer and a phase");
        fault("kind = 'pause'\nat = { step = 1 }", "a pause takes ms = 0");
        fault("kind = 'delay'\nfor_s = 1\nafter_s = [1, 1]", "neither ms nor bytes_per_s");
        fault("kind = 'kill'\nms = 3\nafter_s = [1, 1]", "a kill has no ms");
        fault("kind = 'kill'\nfor_s = 3\nafter_s = [1, 1]", "a kill does not last");
        fault("kind = 'kill'\nway = 'to'\nafter_s = [1, 1]", "a kill has no way");
        fault(
            "kind = 'partition'\nfor_s = 1\nway = 'up'\nafter_s = [1, 1]",
            "unknown variant `up`",
        );
        fault("kind = 'nan'\nat = { stepp = 1 }", "unknown field `stepp`");
        refused("[[faults]]\nkind = \"melt\"", "unknown variant `melt`");
    }

    #[test]
    fn seed_decides_everything_and_another_seed_differs() {
        let rolls = |seed| {
            let mut dice = Dice::new(seed);
            (0..20).map(|_| (dice.below(4), dice.between([1.0, 2.0]))).collect::<Vec<_>>()
        };
        assert_eq!(rolls(7), rolls(7));
        assert_ne!(rolls(7), rolls(8));
        assert!(rolls(7).iter().all(|&(i, x)| i < 4 && (1.0..2.0).contains(&x)));
    }
}

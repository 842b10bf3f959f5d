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
//! ```

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
            faults: Vec::new(),
        }
    }
}

/// One fault.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    pub kind: Kind,
    pub target: Target,
    /// When it strikes, after the start of the streams: somewhere from the first to the second.
    pub after_s: [f64; 2],
    /// How long a freeze lasts.
    #[serde(default)]
    pub for_s: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// SIGKILL.
    Kill,
    /// SIGSTOP, and SIGCONT after `for_s`.
    Freeze,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// One of those that serve, drawn by the seed.
    Worker,
    /// The leading coordinator.
    Leader,
    Etcd,
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
        for fault in &self.faults {
            let [from, to] = fault.after_s;
            if !(0.0..=3600.0).contains(&from) || !(from..=3600.0).contains(&to) {
                return Err(format!("after_s is [{from}, {to}], not a span within an hour"));
            }
            let lasts = (0.001..=3600.0).contains(&fault.for_s);
            match fault.kind {
                Kind::Freeze if !lasts => {
                    return Err(format!(
                        "a freeze lasts for_s = {}; give 0.001 to 3600",
                        fault.for_s
                    ));
                }
                Kind::Freeze | Kind::Kill => {}
            }
        }
        Ok(())
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
        let fault = "[[faults]]\nkind = \"freeze\"\ntarget = \"worker\"\n";
        refused(&format!("{fault}after_s = [1.0, 2.0]"), "a freeze lasts for_s = 0");
        refused(&format!("{fault}for_s = 1.0\nafter_s = [2.0, 1.0]"), "not a span within an hour");
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

//! One fault of a scenario: what, to whom, when; and which of these go together.

use serde::{Deserialize, Serialize};

/// Longest time of anything here, in seconds.
const TIME_MAX_S: f64 = 3600.0;

/// One fault.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    pub kind: Kind,
    #[serde(default)]
    pub target: Target,
    /// So many workers at the same time, drawn by the seed.
    #[serde(default = "one")]
    pub workers: usize,
    /// When it strikes, after the start of the streams: somewhere from the first to the second.
    pub after_s: Option<[f64; 2]>,
    /// Where in a step, from then on.
    pub at: Option<At>,
    /// How long it lasts.
    #[serde(default)]
    pub for_s: f64,
    /// Of a pause, or by how much a step or a link is slower.
    #[serde(default)]
    pub ms: u32,
    /// Most that a delayed link carries; 0: no limit.
    #[serde(default)]
    pub bytes_per_s: u64,
    /// Which of the links of the struck workers.
    pub between: Option<Between>,
    pub way: Option<Way>,
}

fn one() -> usize {
    1
}

/// A place in a step. What is not given is any.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct At {
    /// So many steps later; 0 is the next one.
    pub step: u64,
    /// Among the MoE layers.
    pub layer: Option<u16>,
    pub phase: Option<Phase>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Before the rows are sent.
    Dispatch,
    /// Before the experts run.
    Experts,
    /// Before the results are sent back.
    Combine,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// SIGKILL; with `at` the worker ends itself there.
    Kill,
    /// SIGSTOP, and SIGCONT after `for_s`.
    Freeze,
    /// The worker's thread stands still for `ms`, while its process answers.
    Pause,
    /// The same in every step for `for_s`.
    Slow,
    /// A bit of a frame of rows changes on its way.
    Corrupt,
    /// A value of an expert's result is not a number: once, or in every step for `for_s`.
    Nan,
    /// Bytes arrive `ms` later, or no more than `bytes_per_s`.
    Delay,
    /// Connections are ended, and new ones as soon as they are opened.
    Drop,
    /// Nothing arrives, until it heals.
    Partition,
}

impl Kind {
    /// As scenarios write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Freeze => "freeze",
            Self::Pause => "pause",
            Self::Slow => "slow",
            Self::Corrupt => "corrupt",
            Self::Nan => "nan",
            Self::Delay => "delay",
            Self::Drop => "drop",
            Self::Partition => "partition",
        }
    }

    /// Whether it strikes links.
    pub(super) fn is_of_links(self) -> bool {
        match self {
            Self::Delay | Self::Drop | Self::Partition => true,
            Self::Kill | Self::Freeze | Self::Pause | Self::Slow | Self::Corrupt | Self::Nan => {
                false
            }
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// Of those that serve, drawn by the seed.
    #[default]
    Worker,
    /// The leading coordinator.
    Leader,
    Etcd,
}

/// The other side of a struck link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Between {
    /// All who are not struck.
    #[default]
    All,
    /// Router and coordinators.
    Rest,
    /// The workers that are not struck.
    Workers,
}

/// Which bytes of a struck link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    #[default]
    Both,
    /// To the struck workers.
    To,
    /// From them.
    From,
}

impl Fault {
    /// What is wrong with it.
    pub(super) fn check(&self) -> Result<(), String> {
        let name = self.kind.name();
        let ensure = |is_right: bool, text: String| if is_right { Ok(()) } else { Err(text) };
        let [from, to] = self.after_s.unwrap_or_default();
        ensure(
            (0.0..=TIME_MAX_S).contains(&from) && (from..=TIME_MAX_S).contains(&to),
            format!("after_s is [{from}, {to}], not a span within an hour"),
        )?;
        ensure(
            self.after_s.is_some() || self.at.is_some(),
            format!("a {name} has neither after_s nor at: when shall it strike?"),
        )?;
        ensure(self.workers > 0, "workers = 0 strikes nobody".into())?;
        match self.target {
            Target::Worker => {}
            Target::Leader | Target::Etcd => {
                let known = matches!(self.kind, Kind::Kill | Kind::Freeze);
                ensure(known, format!("only a worker can be the target of a {name}"))?;
                ensure(self.at.is_none(), "only a worker has steps: give after_s, not at".into())?;
                ensure(self.workers == 1, "there is one leader and one etcd".into())?;
            }
        }
        self.check_time()?;
        self.check_place()
    }

    fn check_time(&self) -> Result<(), String> {
        let Self { kind, for_s, ms, bytes_per_s, .. } = *self;
        let name = kind.name();
        let lasts = (0.001..=TIME_MAX_S).contains(&for_s);
        match kind {
            Kind::Freeze | Kind::Slow | Kind::Delay | Kind::Drop | Kind::Partition if !lasts => {
                return Err(format!("a {name} lasts for_s = {for_s}; give 0.001 to 3600"));
            }
            Kind::Nan if !lasts && for_s != 0.0 => {
                return Err(format!(
                    "a nan lasts for_s = {for_s}; give 0.001 to 3600, or nothing for once"
                ));
            }
            Kind::Kill | Kind::Pause | Kind::Corrupt if for_s != 0.0 => {
                return Err(format!("a {name} does not last: for_s has no meaning"));
            }
            Kind::Pause | Kind::Slow if ms == 0 => {
                return Err(format!("a {name} takes ms = 0; say how long"));
            }
            Kind::Delay if ms == 0 && bytes_per_s == 0 => {
                return Err("a delay has neither ms nor bytes_per_s".into());
            }
            Kind::Kill
            | Kind::Freeze
            | Kind::Corrupt
            | Kind::Nan
            | Kind::Drop
            | Kind::Partition
                if ms != 0 =>
            {
                return Err(format!("a {name} has no ms"));
            }
            Kind::Kill
            | Kind::Freeze
            | Kind::Pause
            | Kind::Slow
            | Kind::Corrupt
            | Kind::Nan
            | Kind::Delay
            | Kind::Drop
            | Kind::Partition => {}
        }
        if bytes_per_s != 0 && kind != Kind::Delay {
            return Err(format!("a {name} has no bytes_per_s"));
        }
        Ok(())
    }

    fn check_place(&self) -> Result<(), String> {
        let name = self.kind.name();
        if !self.kind.is_of_links() && (self.between.is_some() || self.way.is_some()) {
            return Err(format!("a {name} has no way: it strikes no link"));
        }
        let at = self.at.unwrap_or_default();
        match (self.kind, at.phase) {
            (Kind::Freeze, _) if self.at.is_some() => {
                Err("a freeze stops the process anywhere; for a place in a step use pause".into())
            }
            (Kind::Delay | Kind::Drop | Kind::Partition, _) if self.at.is_some() => {
                Err(format!("a {name} strikes links: give after_s, not at"))
            }
            (Kind::Slow, phase) if phase.is_none() || at.layer.is_none() => {
                Err("a slow needs a layer and a phase in at, so that it strikes a step once".into())
            }
            (Kind::Corrupt, Some(Phase::Experts)) => {
                Err("no frame is sent in the phase experts: give dispatch or combine".into())
            }
            (Kind::Nan, Some(Phase::Dispatch | Phase::Experts)) => {
                Err("results exist in the phase combine".into())
            }
            (
                Kind::Kill
                | Kind::Freeze
                | Kind::Pause
                | Kind::Slow
                | Kind::Corrupt
                | Kind::Nan
                | Kind::Delay
                | Kind::Drop
                | Kind::Partition,
                _,
            ) => Ok(()),
        }
    }
}

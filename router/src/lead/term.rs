//! Under which term a router drives the workers: a pure machine.
//!
//! ```text
//!              elected                       claimed
//! stands by ───────────▶ claiming (silent) ──────────▶ leads
//!                                                       │ refused by a worker: a higher term exists
//!                        claiming (silent) ◀────────────┤
//!                        claiming (goes on) ◀───────────┘ elected again: the store had lost the key
//! any ── the key is another's ──▶ stands by
//! ```
//!
//! A term is claimed in the store, above every one that was claimed there before and every one that a
//! worker has named: so no two routers ever have the same, even if the store lost its data and counts
//! from the start again. A router that was elected again goes on under its old term meanwhile, because
//! workers refuse that if another one has led.

/// What a router may do, as its engine and its front door see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lead {
    /// Serves. Every step carries `term`; 0: there is no election. No other router has led since
    /// `since`, so what it knows of the workers' KV memory holds from there on.
    Leads { term: u64, since: u64 },
    /// Must not step. The URL of the router that leads, as far as known.
    StandsBy { leader: Option<String> },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Input {
    /// The store says that this router's key stands.
    Elected,
    /// The store says that another router's key stands, or none and this router did not lead.
    Displaced { leader: Option<String> },
    /// A worker refused a step: it has seen this term.
    Refused { term: u64 },
    /// The store has given this router the term. `before`: the one that was claimed before it.
    Claimed { term: u64, before: Option<u64> },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Output {
    Show(Lead),
    /// Ask the store for a term above this one, which it gives to its leader only.
    Claim {
        above: u64,
    },
}

#[derive(Debug)]
enum Phase {
    StandsBy,
    /// Waits for its term; `holds`: the one under which it goes on meanwhile, and since when.
    Claiming {
        holds: Option<(u64, u64)>,
    },
    Leads {
        term: u64,
        since: u64,
    },
}

#[derive(Debug)]
pub(super) struct Machine {
    phase: Phase,
    /// The highest term that this router has held or heard of.
    highest: u64,
}

impl Machine {
    pub(super) fn new() -> Self {
        Self { phase: Phase::StandsBy, highest: 0 }
    }

    pub(super) fn step(&mut self, input: Input) -> Vec<Output> {
        match input {
            Input::Elected => {
                let holds = match self.phase {
                    Phase::StandsBy => None,
                    Phase::Claiming { holds } => holds,
                    Phase::Leads { term, since } => Some((term, since)),
                };
                self.phase = Phase::Claiming { holds };
                vec![Output::Claim { above: self.highest }]
            }
            Input::Displaced { leader } => {
                self.phase = Phase::StandsBy;
                vec![Output::Show(Lead::StandsBy { leader })]
            }
            Input::Refused { term } => self.refused(term),
            Input::Claimed { term, before } => self.claimed(term, before),
        }
    }

    fn refused(&mut self, term: u64) -> Vec<Output> {
        let is_news = self.highest < term;
        self.highest = self.highest.max(term);
        match self.phase {
            Phase::Leads { .. } | Phase::Claiming { holds: Some(_) } if is_news => {
                self.phase = Phase::Claiming { holds: None };
                let silent = Lead::StandsBy { leader: None };
                vec![Output::Show(silent), Output::Claim { above: term }]
            }
            Phase::Claiming { holds: None } if is_news => vec![Output::Claim { above: term }],
            // The refusal of a step of an earlier term.
            Phase::Leads { .. } | Phase::Claiming { .. } | Phase::StandsBy => Vec::new(),
        }
    }

    fn claimed(&mut self, term: u64, before: Option<u64>) -> Vec<Output> {
        let Phase::Claiming { holds } = self.phase else { return Vec::new() };
        if term <= self.highest {
            // The answer to an earlier claim; a higher term has been heard of since.
            return Vec::new();
        }
        let since = match holds {
            // Whoever led in between would have claimed a term.
            Some((held, since)) if before.is_none_or(|before| before == held) => since,
            Some(_) | None => term,
        };
        self.highest = term;
        self.phase = Phase::Leads { term, since };
        vec![Output::Show(Lead::Leads { term, since })]
    }
}

#[cfg(test)]
mod tests;

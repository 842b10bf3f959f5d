//! Which router leads: the shell around `term` and the store's election.
//!
//! Without an election a router leads by itself. With one it leads while its key stands in the store,
//! and goes on while the store is away; workers refuse it if another one leads ("fencing").

mod term;

use futures::FutureExt;
use std::sync::Arc;
use std::time::Duration;
use store::{Candidate, Entry, Guard, Standing, Store, StoreError, Swap, Write};
use tokio::sync::{mpsc, watch};

pub use term::Lead;
use term::{Input, Machine, Output};

/// The key that the leading router holds; its value is the router's URL.
const LEADER_KEY: &str = "/herd/router";
/// The highest term that was ever claimed, as decimal digits.
const TERM_KEY: &str = "/herd/router-term";
/// How long a router is missed whose death nobody sees: a frozen one's, or a host's. etcd grants no less.
const LEASE: Duration = Duration::from_secs(2);
/// Between attempts to claim a term.
const RETRY: Duration = Duration::from_millis(200);
/// Refusals that wait. Ranks refuse one step at once, and all say the same.
const REFUSALS_MAX: usize = 16;

/// A router's part in the election, for the engine.
#[derive(Debug, Clone)]
pub struct LeadHandle {
    pub(crate) lead: watch::Receiver<Lead>,
    refusals: Option<mpsc::Sender<u64>>,
}

impl LeadHandle {
    /// Of a router that no other one competes with.
    #[must_use]
    pub fn alone() -> Self {
        let (_, lead) = watch::channel(Lead::Leads { term: 0, since: 0 });
        Self { lead, refusals: None }
    }

    /// A handle, who changes the lead, and the refusals that the engine reports.
    #[cfg(test)]
    pub(crate) fn scripted(lead: Lead) -> (Self, watch::Sender<Lead>, mpsc::Receiver<u64>) {
        let (tell, lead) = watch::channel(lead);
        let (refusals, refused) = mpsc::channel(REFUSALS_MAX);
        (Self { lead, refusals: Some(refusals) }, tell, refused)
    }

    pub(crate) fn now(&self) -> Lead {
        self.lead.borrow().clone()
    }

    /// A worker has seen this term. The answer is a change of the lead.
    pub(crate) fn refused(&self, term: u64) {
        if let Some(refusals) = &self.refusals {
            // One that finds no place says what those before it say.
            let _full = refusals.try_send(term);
        }
    }

    /// Waits until the router leads; for ever if nobody elects any more.
    pub(crate) async fn begun(&mut self) {
        if self.lead.wait_for(|lead| matches!(lead, Lead::Leads { .. })).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Waits until the router must not go on as it does, or knows less of the KV memory; for ever
    /// without an election.
    pub(crate) async fn ended(&mut self, since: u64) {
        let goes_on = |lead: &Lead| matches!(lead, Lead::Leads { since: now, .. } if *now == since);
        if self.lead.wait_for(|lead| !goes_on(lead)).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// A router's candidature.
#[derive(Debug)]
pub struct Election {
    handle: LeadHandle,
    stop: watch::Sender<()>,
}

impl Election {
    /// Stands for election. `url`: where clients reach this router; no other one has the same.
    #[must_use]
    pub fn stand(store: Arc<dyn Store>, url: &str) -> Self {
        let (tell, lead) = watch::channel(Lead::StandsBy { leader: None });
        let (refusals, refused) = mpsc::channel(REFUSALS_MAX);
        let (stop, stopped) = watch::channel(());
        let candidate = store::stand(Arc::clone(&store), LEADER_KEY, url.as_bytes(), LEASE);
        let task = Task { store, tell, machine: Machine::new(), claim: None };
        telemetry::spawn("router.lead", task.run(candidate, refused, stopped));
        Self { handle: LeadHandle { lead, refusals: Some(refusals) }, stop }
    }

    /// The engine's end.
    #[must_use]
    pub fn handle(&self) -> LeadHandle {
        self.handle.clone()
    }

    /// Gives the lead up; returns when the store knows, or does not answer.
    pub async fn resign(self) {
        let Self { handle: LeadHandle { mut lead, refusals }, stop } = self;
        drop((refusals, stop));
        // The task ends, and its sender with it.
        while lead.changed().await.is_ok() {}
    }
}

struct Task {
    store: Arc<dyn Store>,
    tell: watch::Sender<Lead>,
    machine: Machine,
    /// The term that is asked for: above which.
    claim: Option<u64>,
}

impl Task {
    async fn run(
        mut self,
        candidate: Candidate,
        mut refused: mpsc::Receiver<u64>,
        mut stopped: watch::Receiver<()>,
    ) {
        let mut standings = candidate.standing();
        loop {
            let guard = match &*standings.borrow() {
                Standing::Leads(guard) => Some(guard.clone()),
                Standing::StandsBy(_) => None,
            };
            let claim = self.claim.zip(guard);
            let claimed = match claim {
                Some((above, guard)) => {
                    claim_soon(Arc::clone(&self.store), guard, above).left_future()
                }
                None => std::future::pending().right_future(),
            };
            let input = tokio::select! {
                biased; // What the store says of the lead comes first.
                _ = stopped.changed() => {
                    candidate.resign().await;
                    return;
                }
                changed = standings.changed() => match changed {
                    Ok(()) => standing(&standings.borrow_and_update()),
                    Err(_) => return,
                },
                Some(term) = refused.recv() => Input::Refused { term },
                (term, before) = claimed => Input::Claimed { term, before },
            };
            self.feed(input);
        }
    }

    fn feed(&mut self, input: Input) {
        match input {
            Input::Claimed { .. } | Input::Displaced { .. } => self.claim = None,
            Input::Elected | Input::Refused { .. } => {}
        }
        for output in self.machine.step(input) {
            match output {
                Output::Claim { above } => self.claim = Some(above),
                Output::Show(lead) => {
                    match &lead {
                        Lead::Leads { term, .. } => tracing::info!(term, "this router leads"),
                        Lead::StandsBy { leader: Some(url) } => {
                            tracing::info!(url, "this router stands by; that one leads");
                        }
                        Lead::StandsBy { leader: None } => tracing::info!("this router stands by"),
                    }
                    self.tell.send_replace(lead);
                }
            }
        }
    }
}

fn standing(standing: &Standing) -> Input {
    match standing {
        Standing::Leads(_) => Input::Elected,
        Standing::StandsBy(entry) => {
            let url = |entry: &Entry| String::from_utf8_lossy(&entry.value).into_owned();
            Input::Displaced { leader: entry.as_ref().map(url) }
        }
    }
}

/// Claims until the store gives a term: the new one and that before it. A leader that the store does
/// not take for one any more waits here for the news of who leads.
async fn claim_soon(store: Arc<dyn Store>, guard: Guard, above: u64) -> (u64, Option<u64>) {
    loop {
        match claim(&*store, &guard, above).await {
            Ok(Some(claimed)) => return claimed,
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "cannot claim a term; will retry"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn claim(
    store: &dyn Store,
    guard: &Guard,
    above: u64,
) -> Result<Option<(u64, Option<u64>)>, StoreError> {
    let stands = store.get(TERM_KEY).await?;
    let before = stands.as_ref().and_then(|entry| {
        let digits = std::str::from_utf8(&entry.value).ok()?;
        digits.parse::<u64>().ok()
    });
    let term = guard.created.0.max(before.unwrap_or(0) + 1).max(above + 1);
    let write = Write {
        key: TERM_KEY.into(),
        expected: stands.map(|entry| entry.revision),
        value: term.to_string().into_bytes(),
        lease: None,
        guard: Some(guard.clone()),
    };
    match store.swap(write).await? {
        Swap::Done(_) => Ok(Some((term, before))),
        Swap::Lost(_) | Swap::Fenced => Ok(None),
    }
}

#[cfg(test)]
mod tests;

//! A standing candidature: leads, stands by and leads again, and tells which.
//!
//! ```text
//!            the key is made                  the key is another's
//! stands by ────────────────▶ leads ─────────────────────────────▶ stands by
//!                             leads ── lease or key gone, store away ─▶ leads (makes the key again)
//! ```
//!
//! Unlike [`Leadership::lost`](crate::Leadership::lost), which warns that somebody else *may* lead, a
//! candidate stands down only on proof: the store answers that the key is another's. It is for
//! whoever must go on while the store is away and is fenced elsewhere.

use crate::election::{RETRY, attempt};
use crate::incumbent::Incumbent;
use crate::{Entry, Guard, Store};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// How long a candidate that did not lead leaves a vanished key to the one that led: a store that was
/// away comes back without its lease, and who led needs a renewal's time to make the key again. Its
/// clients are worth the wait.
pub(crate) const GRACE: Duration = Duration::from_secs(1);

/// What a candidate is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// It made the key that the guard names.
    Leads(Guard),
    /// The key of the one that leads, as far as known.
    StandsBy(Option<Entry>),
}

/// A candidature. Dropping it ends it and gives the lead up.
#[derive(Debug)]
pub struct Candidate {
    standing: watch::Receiver<Standing>,
    stop: watch::Sender<()>,
}

impl Candidate {
    /// What it is, now and after every change.
    #[must_use]
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.clone()
    }

    /// Gives the lead up; returns when the store knows, or does not answer.
    pub async fn resign(self) {
        let Self { mut standing, stop } = self;
        drop(stop);
        // The task ends, and its sender with it.
        while standing.changed().await.is_ok() {}
    }
}

/// Stands for election until the candidate is dropped. `value` tells the others who it is, as in
/// [`campaign`](crate::campaign); no other candidate may have the same.
#[must_use]
pub fn stand(store: Arc<dyn Store>, key: &str, value: &[u8], ttl: Duration) -> Candidate {
    let (tell, standing) = watch::channel(Standing::StandsBy(None));
    let (stop, stopped) = watch::channel(());
    let task = Task { store, key: key.to_owned(), value: value.to_vec(), ttl, tell };
    telemetry::spawn("store.candidate", task.run(stopped));
    Candidate { standing, stop }
}

struct Task {
    store: Arc<dyn Store>,
    key: String,
    value: Vec<u8>,
    ttl: Duration,
    tell: watch::Sender<Standing>,
}

impl Task {
    async fn run(self, mut stopped: watch::Receiver<()>) {
        loop {
            let attempt = tokio::select! {
                attempt = attempt(&self.store, &self.key, &self.value, self.ttl) => attempt,
                // Only ever an error: the candidate was dropped. A key that is just made goes with
                // its lease.
                _ = stopped.changed() => return,
            };
            match attempt {
                Ok(Some(mut leadership)) => {
                    self.tell.send_replace(Standing::Leads(leadership.guard()));
                    tokio::select! {
                        () = leadership.lost() => {}
                        _ = stopped.changed() => {
                            leadership.resign().await;
                            return;
                        }
                    }
                }
                Ok(None) => tokio::select! {
                    () = self.stand_by() => {}
                    _ = stopped.changed() => return,
                },
                Err(error) => {
                    tracing::warn!(%error, key = self.key, "cannot stand for election; will retry");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Waits until it may try to lead.
    async fn stand_by(&self) {
        let mut incumbent = Incumbent::follow(&self.store, &self.key, &self.value);
        let mut pause = Duration::ZERO;
        while let Some(entry) = incumbent.next().await {
            // A key with its own value is what is left of an attempt without an answer, or of its
            // predecessor at this address. Those who stood by meanwhile have been up for longer.
            if entry.value == self.value {
                pause = 2 * GRACE;
            } else {
                pause = GRACE;
                self.tell.send_replace(Standing::StandsBy(Some(entry.clone())));
            }
        }
        if matches!(*self.tell.borrow(), Standing::Leads(_)) {
            return;
        }
        self.tell.send_replace(Standing::StandsBy(None));
        // The dead do not make their key again.
        if !incumbent.has_died() {
            tokio::time::sleep(pause).await;
        }
    }
}

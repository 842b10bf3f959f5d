//! Logs, named tasks and the metric endpoint's text.
//!
//! Logs go to stderr, so that machine-readable output on stdout stays clean.

use std::future::Future;
use std::io::IsTerminal;
use tokio::task::JoinHandle;
use tracing::Instrument;

pub use metrics_exporter_prometheus::PrometheusHandle;

/// Seconds at which the latency histograms are cut: from a toy model's step to a long prefill.
const LATENCY_BUCKETS_S: [f64; 14] =
    [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0];

/// Spawns a task under a name; a task without a name is a task nobody can find.
pub fn spawn<F>(name: &'static str, future: F) -> JoinHandle<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    tokio::spawn(future.instrument(tracing::info_span!("task", name)))
}

/// Prints events at or above `filter` (for example `info,router=debug`) to stderr.
///
/// Calling it twice keeps the first.
pub fn init_logs(filter: &str) {
    let filter = tracing_subscriber::EnvFilter::try_new(filter)
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(true)
        .with_ansi(std::io::stderr().is_terminal())
        .compact();
    // Only a second call in one process can fail, and then the first subscriber stands.
    let _second_call = subscriber.try_init();
}

/// Installs the process's metric recorder and returns the handle that renders `/metrics`.
///
/// # Errors
///
/// The recorder's text if the process already has one.
pub fn init_metrics() -> Result<PrometheusHandle, String> {
    use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &LATENCY_BUCKETS_S)
        .map_err(|error| error.to_string())?
        .install_recorder()
        .map_err(|error| error.to_string())
}

//! A whole cluster as tasks of this process: coordinator, workers and the router's engine, each
//! behind the same gRPC services on loopback ports as if it were a process of its own.

use anyhow::Context;
use control::Settings;
use router::engine::{EngineConfig, EngineHandle};
use std::sync::Arc;
use std::time::Duration;
use store::Memory;
use tokio::net::TcpListener;
use worker::{KvBlocks, Model, Worker};

/// What the cluster is made of.
pub struct Config {
    pub model: Arc<Model>,
    /// Threads of every worker.
    pub threads: usize,
    /// Of the coordinator; as many workers are started as it expects.
    pub settings: Settings,
    pub kv: KvBlocks,
    /// Token budget per rank and step.
    pub step_tokens: u32,
    /// Longest that prompts hold up a step of streams that wait for their next token; see
    /// [`scheduler::Config::prefill_max`].
    pub prefill_max: Duration,
    /// Running sequences per rank.
    pub sequences_max: u32,
    /// Waiting sequences.
    pub queue_max: u32,
    /// Longest a step may take.
    pub step_deadline: Duration,
    /// The router's HTTP address, for the status.
    pub address: String,
}

/// A running cluster; it ends when it is dropped.
pub struct Cluster {
    /// `http://host:port` of the coordinator.
    pub coordinator: String,
    pub engine: EngineHandle,
    pub workers: Vec<Worker>,
    hub: Arc<all2all::local::Hub>,
    handle: coordinator::Handle,
    config: Config,
}

impl Cluster {
    /// Starts everything; the first view follows when all workers have registered.
    ///
    /// # Errors
    ///
    /// If a port cannot be had, weights cannot be loaded or memory is refused.
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        let listener = loopback().await?;
        let coordinator = format!("http://{}", listener.local_addr()?);
        let handle = coordinator::start(coordinator::Config {
            settings: config.settings,
            store: Arc::new(Memory::new()),
            url: coordinator.clone(),
            store_urls: Vec::new(),
        });
        let server = handle.clone();
        telemetry::spawn("coordinator.server", async move {
            if let Err(error) = server.serve(listener).await {
                tracing::error!(%error, "the coordinator's service ended");
            }
        });
        let engine = router::engine::start(EngineConfig {
            coordinator: coordinator.clone(),
            address: config.address.clone(),
            step_tokens: config.step_tokens,
            prefill_max: config.prefill_max,
            sequences_max: config.sequences_max,
            queue_max: config.queue_max,
            step_deadline: config.step_deadline,
        });
        let hub = all2all::local::Hub::new();
        let workers = Vec::new();
        let mut cluster = Self { coordinator, engine, workers, hub, handle, config };
        for _ in 0..cluster.config.settings.workers_expected {
            cluster.add_worker().await?;
        }
        Ok(cluster)
    }

    /// Adds a worker; it takes load with the next view.
    ///
    /// # Errors
    ///
    /// As for [`Cluster::start`].
    pub async fn add_worker(&mut self) -> anyhow::Result<()> {
        let config = worker::Config {
            model: Arc::clone(&self.config.model),
            exchange: worker::Exchange::Local(Arc::clone(&self.hub)),
            threads: self.config.threads,
            kv: self.config.kv,
            // The workers of a process share what is loaded.
            places: self.config.model.config.experts,
            backup_bytes: 0,
            coordinator: self.coordinator.clone(),
            advertise: None,
            chaos: worker::Chaos::Refused,
        };
        self.workers.push(worker::start(config, loopback().await?).await?);
        Ok(())
    }

    /// The coordinator's part of `herd status`.
    pub async fn status(&self) -> Option<serde_json::Value> {
        self.handle.status().await
    }
}

async fn loopback() -> anyhow::Result<TcpListener> {
    TcpListener::bind("127.0.0.1:0").await.context("cannot listen on a loopback port")
}

//! `herd drain`: takes a worker out of a running cluster without anybody noticing.

use super::parts::{block_on, say};
use super::{BadInput, DEFAULT_LISTEN};
use anyhow::{Context, bail};
use proto::pb::{DrainRequest, coordinator_client::CoordinatorClient};
use tonic::Code;
use tonic::transport::Endpoint;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The worker's number in `herd status`.
    worker: u32,
    /// The router that knows the coordinator, `http://host:port`.
    #[arg(long, default_value_t = format!("http://{DEFAULT_LISTEN}"), env = "HERD_URL")]
    url: String,
    /// The coordinator, `http://host:port`; several separated by commas. Needs no router.
    #[arg(long, conflicts_with = "url")]
    coordinator: Option<String>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let coordinators = match &args.coordinator {
        Some(urls) => urls.clone(),
        None => super::status::leader(&args.url)?,
    };
    block_on(async {
        let mut last = None;
        for url in coordinators.split(',') {
            match drain(url, args.worker).await {
                Ok(()) => {
                    say(&format!("worker {} has left the cluster", args.worker));
                    return Ok(());
                }
                Err(error) => last = Some(error),
            }
        }
        let error = last.context("no coordinator was given")?;
        Err(error.context(format!("worker {} is not drained", args.worker)))
    })
}

async fn drain(url: &str, worker: u32) -> anyhow::Result<()> {
    let endpoint = Endpoint::from_shared(url.to_owned())
        .with_context(|| BadInput(format!("--coordinator {url} is no URL")))?;
    let channel = endpoint.connect().await.with_context(|| format!("no answer from {url}"))?;
    match CoordinatorClient::new(channel).drain(DrainRequest { worker }).await {
        Ok(_) => Ok(()),
        Err(status) if status.code() == Code::FailedPrecondition => bail!("{}", status.message()),
        Err(status) => Err(status.into()),
    }
}

//! What the commands that change a running cluster share: finding the coordinator that leads.

use super::{BadInput, DEFAULT_LISTEN, parts::block_on};
use anyhow::{Context, bail};
use proto::pb::coordinator_client::CoordinatorClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

#[derive(clap::Args)]
pub(crate) struct AdminArgs {
    /// The router that knows the coordinator, `http://host:port`.
    #[arg(long, default_value_t = format!("http://{DEFAULT_LISTEN}"), env = "HERD_URL")]
    url: String,
    /// The coordinator, `http://host:port`; several separated by commas. Needs no router.
    #[arg(long, conflicts_with = "url")]
    coordinator: Option<String>,
}

impl AdminArgs {
    /// The first answer that is none of a standby.
    ///
    /// # Errors
    ///
    /// The last coordinator's, if none answers.
    pub(crate) fn ask<T>(
        &self,
        call: impl AsyncFn(CoordinatorClient<Channel>) -> Result<T, Status>,
    ) -> anyhow::Result<T> {
        let coordinators = match &self.coordinator {
            Some(urls) => urls.clone(),
            None => super::status::leader(&self.url)?,
        };
        block_on(async {
            let mut last = None;
            for url in coordinators.split(',') {
                match ask_one(url, &call).await {
                    Ok(answer) => return Ok(answer),
                    Err(error) => last = Some(error),
                }
            }
            Err(last.context("no coordinator was given")?)
        })
    }

    /// The cluster as a coordinator or the router shows it.
    pub(crate) fn status(&self) -> anyhow::Result<serde_json::Value> {
        match &self.coordinator {
            Some(urls) => {
                let urls = urls.clone();
                block_on(async move { Ok(router::status::of_coordinators(&urls)().await) })
            }
            None => super::status::of_router(&self.url),
        }
    }
}

async fn ask_one<T>(
    url: &str,
    call: &impl AsyncFn(CoordinatorClient<Channel>) -> Result<T, Status>,
) -> anyhow::Result<T> {
    let endpoint = Endpoint::from_shared(url.to_owned())
        .with_context(|| BadInput(format!("--coordinator {url} is no URL")))?;
    let channel = endpoint.connect().await.with_context(|| format!("no answer from {url}"))?;
    match call(CoordinatorClient::new(channel)).await {
        Ok(answer) => Ok(answer),
        Err(status) if status.code() == Code::FailedPrecondition => bail!("{}", status.message()),
        Err(status) => Err(status.into()),
    }
}

//! `herd worker`: one worker of a cluster, as a process of its own.

use super::parts::{ChildArgs, ComputeArgs, ModelArgs, Signals, block_on, say};
use anyhow::{Context, bail};
use std::sync::Arc;
use tokio::net::TcpListener;
use worker::{Ended, Exchange, Model};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    /// The coordinator, `http://host:port`; several separated by commas.
    #[arg(long, env = "HERD_COORDINATOR")]
    coordinator: String,
    /// Where to serve gRPC, an address that the others reach; port 0 takes a free one. The exchange
    /// takes another free port of the same address.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: String,
    #[command(flatten)]
    child: ChildArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    block_on(async {
        let model = Arc::new(Model::open(&args.model.dir()?, args.compute.dtype.into())?);
        let kv = args.compute.kv(&model, 1)?;
        let listener = TcpListener::bind(&args.listen)
            .await
            .with_context(|| format!("cannot listen on {}; give another --listen", args.listen))?;
        let address = listener.local_addr()?;
        let config = worker::Config {
            threads: args.compute.threads(1),
            kv,
            exchange: Exchange::Processes(address.ip()),
            coordinator: args.coordinator.clone(),
            model,
        };
        let mut signals = Signals::of_role(&args.child)?;
        let mut worker = worker::start(config, listener).await?;
        say(&format!("worker: {address}"));
        tokio::select! {
            () = signals.next() => {
                say("stopped");
                Ok(())
            }
            () = args.child.parent_gone() => Ok(()),
            // The supervisor starts a new process.
            ended = worker.ended() => match ended {
                Ended::Drained => {
                    say("drained");
                    Ok(())
                }
                Ended::Failed(reason) => bail!("the worker ended: {reason}"),
            },
        }
    })
}

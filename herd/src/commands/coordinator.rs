//! `herd coordinator`: the control plane of a cluster, as a process of its own.

use super::etcd::EtcdArgs;
use super::parts::{ChildArgs, PlacementArgs, Signals, block_on, say};
use anyhow::Context;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use store::Memory;
use tokio::net::TcpListener;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where to serve gRPC.
    #[arg(long, default_value = "127.0.0.1:7070")]
    listen: String,
    /// Under which address others reach it, if not under that of --listen. A proxy there that ends looks to
    /// them as if the coordinator had.
    #[arg(long)]
    advertise: Option<String>,
    #[command(flatten)]
    etcd: EtcdArgs,
    #[command(flatten)]
    settings: SettingsArgs,
    #[command(flatten)]
    child: ChildArgs,
}

/// How views are made.
#[derive(clap::Args)]
pub(crate) struct SettingsArgs {
    /// Workers that the first view waits for.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) workers: u16,
    /// Longest wait for them, in seconds, from the first one on.
    #[arg(long, default_value_t = 60)]
    pub(crate) assemble_max_s: u64,
    #[command(flatten)]
    pub(crate) placement: PlacementArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    block_on(async {
        let listener = TcpListener::bind(&args.listen)
            .await
            .with_context(|| format!("cannot listen on {}; give another --listen", args.listen))?;
        let address = listener.local_addr()?.to_string();
        let url = args.etcd.known_as(&address, args.advertise.as_ref())?;
        let store = args.etcd.open().await?.unwrap_or_else(|| Arc::new(Memory::new()));
        let handle = coordinator::start(coordinator::Config {
            settings: args
                .settings
                .placement
                .settings(args.settings.workers, Duration::from_secs(args.settings.assemble_max_s)),
            store,
            url: url.clone(),
            store_urls: args.etcd.urls(),
        });
        let mut signals = Signals::of_role(&args.child)?;
        say(&format!("coordinator: {url}"));
        // It listens until it has given the lead up: a leader that nobody reaches is taken for dead.
        let mut serving = pin!(handle.serve(listener));
        tokio::select! {
            result = &mut serving => result.context("the coordinator's service ended"),
            () = args.child.parent_gone() => Ok(()),
            () = signals.next() => {
                handle.resign().await;
                say("stopped");
                Ok(())
            }
        }
    })
}

//! `herd worker`: one worker of a cluster, as a process of its own.

use super::parts::{
    ChildArgs, ComputeArgs, DEFAULT_STEP_TOKENS, ModelArgs, Signals, block_on, say,
};
use super::{BadInput, DeviceArg};
use anyhow::{Context, bail, ensure};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use tokio::net::TcpListener;
use worker::{Chaos, Ended, Exchange, MemoryPlan, Processes, Share, WithinHost};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    /// The --step-tokens of the router: a GPU's memory for such steps is taken at the start, and larger ones are refused.
    #[arg(long, default_value_t = DEFAULT_STEP_TOKENS, value_parser = clap::value_parser!(u32).range(1..))]
    step_tokens: u32,
    /// Workers of the cluster: with them all their rows may come to a GPU, and its memory is planned for that.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: u16,
    /// The coordinator, `http://host:port`; several separated by commas.
    #[arg(long, env = "HERD_COORDINATOR")]
    coordinator: String,
    /// Where to serve gRPC, an address that the others reach; port 0 takes a free one. The exchange
    /// takes another free port of the same address.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: String,
    /// `host:port` under which coordinator and router reach it, if that is not --listen: behind a proxy, or
    /// where it listens on every address of the host.
    #[arg(long)]
    advertise: Option<String>,
    /// Where to exchange rows with other workers; a free port of the address of --listen if not given.
    #[arg(long)]
    exchange_listen: Option<SocketAddr>,
    /// `address:port` under which other workers reach its exchange, if that is not where it listens.
    #[arg(long)]
    exchange_advertise: Option<SocketAddr>,
    /// Where other workers get experts from: this port of the address of --listen, which they reach by the same number
    /// where --advertise names another host. If not given a free one, or none behind another address. Where it is out
    /// of reach experts come from the port of --listen, and steps and beats may wait for them.
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    experts_port: u16,
    /// What carries rows between workers of one host.
    #[arg(long, value_enum, default_value = "auto")]
    exchange: ExchangeArg,
    /// Let others inflict faults on this worker by gRPC; for tests of a cluster.
    #[arg(long)]
    allow_chaos: bool,
    #[command(flatten)]
    child: ChildArgs,
}

#[derive(Clone, Copy, clap::ValueEnum)]
pub(crate) enum ExchangeArg {
    /// Shared memory where it works, TCP elsewhere.
    Auto,
    /// Always TCP, with checksums.
    Tcp,
}

impl Args {
    /// How the rows travel; `address` is where gRPC is served.
    fn exchange(&self, address: SocketAddr) -> anyhow::Result<Processes> {
        let listen = self.exchange_listen.unwrap_or(SocketAddr::new(address.ip(), 0));
        let is_hidden = |ip: IpAddr, advertised: bool| ip.is_unspecified() && !advertised;
        ensure!(
            !is_hidden(address.ip(), self.advertise.is_some())
                && !is_hidden(listen.ip(), self.exchange_advertise.is_some()),
            BadInput(
                "nobody reaches a worker at 0.0.0.0; listen on one address of the host, or give \
                 --advertise and --exchange-advertise with --exchange-listen"
                    .into()
            )
        );
        let within_host = match self.exchange {
            ExchangeArg::Auto => WithinHost::SharedMemory,
            ExchangeArg::Tcp => WithinHost::Tcp,
        };
        let (advertise, experts_port) = (self.exchange_advertise, self.experts_port);
        Ok(Processes { listen, advertise, within_host, experts_port })
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    block_on(async {
        let model = Arc::new(args.compute.model(&args.model.dir()?, args.step_tokens)?);
        let memory = args.compute.memory(1)?;
        let kv = args.compute.kv(&model, memory)?;
        let mut backups = args.compute.backups(&model, (memory, kv));
        let plan = |backups| {
            // A GPU's memory is another.
            let backups = if args.compute.device == DeviceArg::Cpu { backups } else { 0 };
            let share = Share { memory, backups, ranks: args.workers, workers: 1 };
            MemoryPlan::new(&model, kv, share)
        };
        let mut planned = plan(backups);
        if planned.is_err() && args.compute.backup_mib.is_none() {
            // Nobody has asked for copies.
            backups = 0;
            planned = plan(0);
        }
        let plan =
            planned.with_context(|| BadInput("this worker is too small for the model".into()))?;
        tracing::info!("{plan}");
        let listener = TcpListener::bind(&args.listen)
            .await
            .with_context(|| format!("cannot listen on {}; give another --listen", args.listen))?;
        let address = listener.local_addr()?;
        let config = worker::Config {
            threads: args.compute.threads(1),
            kv,
            places: plan.places,
            backup_bytes: backups,
            exchange: Exchange::Processes(args.exchange(address)?),
            advertise: args.advertise.clone(),
            chaos: if args.allow_chaos { Chaos::Allowed } else { Chaos::Refused },
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

//! `herd up --processes`: a real cluster of processes on this machine, supervised.
//!
//! etcd, two coordinators, a router and the workers. Each child's standard input is a pipe from here:
//! when this process dies, however it dies, they end too. (etcd does not look at its input; it is only
//! ended with this process if that has the time.) What dies is started again, unless the user wants it
//! dead.

use super::links::{Network, Place};
use super::parts::{Signals, say};
use super::up::{Args, how_to_try};
use super::{DeviceArg, DtypeArg};
use anyhow::{Context, bail};
use std::ffi::OsString;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::process::{Child, ChildStdin, Command};

/// Coordinators: one leads, one stands by.
const COORDINATORS: usize = 2;
/// Between a child's end and its successor.
const RESTART_PAUSE: Duration = Duration::from_millis(200);
/// Between questions of how many workers an operator wants.
const SCALE_POLL: Duration = Duration::from_millis(500);
/// How the names of workers begin, and those of routers.
const WORKER: &str = "worker ";
const ROUTER: &str = "router";
/// Longest wait for a child to end by itself.
const STOP_MAX: Duration = Duration::from_secs(5);
/// Longest wait for the first router to be elected before the others start.
const LEAD_MAX: Duration = Duration::from_secs(10);
/// Between looks at whether the cluster serves.
const READY_POLL: Duration = Duration::from_millis(50);

/// A child that should run.
struct Role {
    name: String,
    program: OsString,
    args: Vec<OsString>,
    environment: Vec<(&'static str, OsString)>,
    child: Option<Child>,
    /// Kept open: its end tells the child that this process is gone. (`Child::wait` would close it.)
    stdin: Option<ChildStdin>,
}

impl Role {
    fn spawn(&mut self) -> anyhow::Result<()> {
        let mut child = Command::new(&self.program)
            .args(&self.args)
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.to_string_lossy()))?;
        say(&format!("{}: pid {}", self.name, child.id().unwrap_or(0)));
        self.stdin = child.stdin.take();
        self.child = Some(child);
        Ok(())
    }

    fn is_worker(&self) -> bool {
        self.name.starts_with(WORKER)
    }

    /// Waits for its end; for ever, if it does not run.
    async fn ended(&mut self) -> std::io::Result<ExitStatus> {
        match &mut self.child {
            Some(child) => child.wait().await,
            None => std::future::pending().await,
        }
    }

    /// SIGTERM, and SIGKILL for who does not listen.
    async fn stop(&mut self, limit: Duration) {
        let Some(mut child) = self.child.take() else { return };
        if let Some(pid) = child.id() {
            terminate(pid).await;
        }
        if tokio::time::timeout(limit, child.wait()).await.is_err() {
            tracing::warn!(name = self.name, "does not end; killed");
            // It may have ended just now.
            let _ended = child.kill().await;
        }
    }
}

/// Without unsafe code there is no `kill(2)`; every system has the command.
async fn terminate(pid: u32) {
    let status = Command::new("kill").args(["-TERM", &pid.to_string()]).status().await;
    if !status.is_ok_and(|status| status.success()) {
        tracing::debug!(pid, "cannot be signalled; it has ended");
    }
}

pub(crate) async fn run(args: &Args) -> anyhow::Result<()> {
    let dir = args.model.dir()?;
    let data = tempfile::tempdir().context("cannot make a folder for etcd")?;
    let mut roles = Vec::new();
    let etcd = match &args.etcd.etcd {
        Some(urls) => urls.clone(),
        None => {
            let (role, url) = etcd(data.path())?;
            roles.push(role);
            url
        }
    };
    let program = std::env::current_exe().context("cannot find this program")?.into_os_string();
    let (coordinators, urls) = coordinators(args, &program, &etcd)?;
    roles.extend(coordinators);
    let network = args.allow_chaos.then(|| Network::start(&urls)).transpose()?;
    if let Some((_, links)) = &network {
        say(&format!("links: {links}"));
    }
    let another = |number| {
        let memory = args.compute.memory(args.workers)?;
        let Some((network, _)) = &network else {
            return Ok(worker((args, memory, data.path()), &program, &urls, (&dir, number)));
        };
        let Place { flags, coordinators } = network.place(number)?;
        let mut role = worker((args, memory, data.path()), &program, &coordinators, (&dir, number));
        role.args.extend(flags);
        Ok(role)
    };
    for number in 0..args.workers {
        roles.push(another(number)?);
    }
    let address =
        if args.serve.listen.ends_with(":0") { free_address()? } else { args.serve.listen.clone() };
    roles.push(router(args, &program, (&urls, &etcd), (&dir, &address)));
    for role in &mut roles {
        role.spawn()?;
    }
    let mut signals = Signals::new()?;
    let name = args.serve.model_name(&dir);
    let announce = async {
        ready(&address).await;
        say(&format!("\n{}", how_to_try(&name, &address)));
        std::future::pending::<()>().await;
    };
    let another_router = |at: &str| router(args, &program, (&urls, &etcd), (&dir, at));
    let supervised = async {
        add_standbys(&mut roles, args.routers, &address, another_router).await?;
        supervise(&mut roles, &urls, args, another).await
    };
    tokio::select! {
        () = signals.next() => {}
        () = announce => {}
        result = supervised => return result,
    }
    say("stopping");
    stop(roles, Duration::from_secs(args.serve.drain_max_s) + STOP_MAX, &mut signals).await;
    say("stopped");
    Ok(())
}

/// Starts the routers that stand by, on the next free ports.
async fn add_standbys(
    roles: &mut Vec<Role>,
    routers: u16,
    leader: &str,
    router: impl Fn(&str) -> Role,
) -> anyhow::Result<()> {
    if routers < 2 {
        return Ok(());
    }
    // Whoever stands by must not be elected before the one whose address was asked for.
    let _late = tokio::time::timeout(LEAD_MAX, leads(leader)).await;
    let mut last = leader.to_owned();
    for number in 1..routers {
        last = next_free(&last)?;
        let mut role = router(&last);
        role.name = format!("{ROUTER} {number}");
        role.spawn()?;
        say(&format!("{}: http://{last} stands by", role.name));
        roles.push(role);
    }
    Ok(())
}

/// Ends everything. The routers first: they let running requests end, for which they need the others.
async fn stop(roles: Vec<Role>, drain: Duration, signals: &mut Signals) {
    let is_router = |role: &Role| role.name.starts_with(ROUTER);
    let (mut routers, mut others): (Vec<Role>, Vec<Role>) = roles.into_iter().partition(is_router);
    let stop = futures::future::join_all(routers.iter_mut().map(|router| router.stop(drain)));
    tokio::select! {
        _ends = stop => {}
        () = signals.next() => {}
    }
    for role in others.iter_mut().rev() {
        role.stop(STOP_MAX).await;
    }
}

/// What the supervisor waits for.
enum News {
    /// The end of a role, by index.
    Ended(std::io::Result<ExitStatus>, usize),
    /// So many workers are wanted; 0 if nobody has said.
    Wanted(u16),
}

/// Starts what ends again, and the workers that an operator wants beyond those that run. Returns only
/// if that fails.
async fn supervise(
    roles: &mut Vec<Role>,
    coordinators: &str,
    args: &Args,
    worker: impl Fn(u16) -> anyhow::Result<Role>,
) -> anyhow::Result<()> {
    let status = router::status::of_coordinators(coordinators);
    let mut next_worker = args.workers;
    loop {
        let ends = roles.iter_mut().map(|role| Box::pin(role.ended()));
        let news = tokio::select! {
            (status, index, _) = futures::future::select_all(ends) => News::Ended(status, index),
            workers = wanted(&status) => News::Wanted(workers),
        };
        let (status, index) = match news {
            News::Ended(status, index) => (status, index),
            News::Wanted(workers) => {
                let runs = |role: &&Role| role.is_worker() && role.child.is_some();
                let running = roles.iter().filter(runs).count();
                for _ in running..usize::from(workers) {
                    let mut role = worker(next_worker)?;
                    next_worker += 1;
                    role.spawn()?;
                    roles.push(role);
                }
                continue;
            }
        };
        let role = &mut roles[index];
        role.child = None;
        let (text, is_done) = match &status {
            // A drained worker has done what it was asked to.
            Ok(status) => (status.to_string(), status.success()),
            Err(error) => (error.to_string(), false),
        };
        say(&format!("{} ended: {text}", role.name));
        if is_done && role.is_worker() {
            roles.remove(index);
            continue;
        }
        if args.no_restart || is_done {
            continue;
        }
        tokio::time::sleep(RESTART_PAUSE).await;
        role.spawn()?;
    }
}

/// Waits a while, and asks how many workers an operator wants; 0 if nobody has said.
async fn wanted(status: &router::http::ClusterStatus) -> u16 {
    tokio::time::sleep(SCALE_POLL).await;
    let wanted = status().await["workers_wanted"].as_u64();
    wanted.and_then(|wanted| u16::try_from(wanted).ok()).unwrap_or(0)
}

/// Waits until the router there serves.
async fn ready(address: &str) {
    until(format!("http://{address}/health"), |_| true).await;
}

/// Waits until the router there is elected.
async fn leads(address: &str) {
    until(format!("http://{address}/status"), |text| {
        let status: Option<serde_json::Value> = serde_json::from_str(text).ok();
        status.is_some_and(|status| status["routers"][0]["leader"] == true)
    })
    .await;
}

/// Asks until the answer is good.
async fn until(url: String, is_good: fn(&str) -> bool) {
    let agent: ureq::Agent =
        ureq::Agent::config_builder().timeout_global(Some(Duration::from_secs(1))).build().into();
    loop {
        let (agent, url) = (agent.clone(), url.clone());
        let ask = move || agent.get(&url).call().ok()?.body_mut().read_to_string().ok();
        let answer = tokio::task::spawn_blocking(ask).await.ok().flatten();
        if answer.is_some_and(|text| is_good(&text)) {
            return;
        }
        tokio::time::sleep(READY_POLL).await;
    }
}

fn etcd(data: &Path) -> anyhow::Result<(Role, String)> {
    let found = std::process::Command::new("etcd").arg("--version").stdout(Stdio::null()).status();
    if found.is_err() {
        bail!("etcd is not installed; install it (Debian: etcd-server) or give --etcd URL");
    }
    let (client, peer) =
        (format!("http://{}", free_address()?), format!("http://{}", free_address()?));
    let cluster = format!("herd={peer}");
    let mut args: Vec<OsString> = vec!["--data-dir".into(), data.join("etcd").into_os_string()];
    for arg in [
        "--name",
        "herd",
        "--log-level",
        "error",
        "--listen-client-urls",
        &client,
        "--advertise-client-urls",
        &client,
        "--listen-peer-urls",
        &peer,
        "--initial-advertise-peer-urls",
        &peer,
        "--initial-cluster",
        &cluster,
    ] {
        args.push(arg.into());
    }
    Ok((
        Role {
            name: "etcd".into(),
            program: "etcd".into(),
            args,
            environment: Vec::new(),
            child: None,
            stdin: None,
        },
        client,
    ))
}

fn coordinators(
    args: &Args,
    program: &OsString,
    etcd: &str,
) -> anyhow::Result<(Vec<Role>, String)> {
    let (mut roles, mut urls) = (Vec::new(), Vec::new());
    for number in 0..COORDINATORS {
        let address = free_address()?;
        urls.push(format!("http://{address}"));
        let workers = args.workers.to_string();
        let flags = ["coordinator", "--listen", &address, "--etcd", etcd, "--workers", &workers];
        let mut role = role(format!("coordinator {number}"), program, &flags);
        role.args.extend(args.placement.flags().map(OsString::from));
        role.environment = args.etcd.environment();
        roles.push(role);
    }
    Ok((roles, urls.join(",")))
}

fn worker(
    (args, memory, data): (&Args, u64, &Path),
    program: &OsString,
    urls: &str,
    (dir, number): (&Path, u16),
) -> Role {
    let compute = &args.compute;
    let threads = compute.threads(args.workers).to_string();
    let sequences = compute.sequences.to_string();
    let dtype = match compute.dtype {
        DtypeArg::F32 => "f32",
        DtypeArg::Bf16 => "bf16",
    };
    let device = compute.device.to_string();
    let flags = [
        "worker",
        "--coordinator",
        urls,
        "--threads",
        &threads,
        "--dtype",
        dtype,
        "--device",
        &device,
        "--sequences",
        &sequences,
    ];
    let mut role = role(format!("{WORKER}{number}"), program, &flags);
    role.args.extend(["--model".into(), dir.as_os_str().to_owned()]);
    // A part of what is free now; who is started again has the same flags, and so the same part.
    let mib = (memory >> 20).max(1);
    role.args.extend(["--memory-mib".into(), mib.to_string().into()]);
    role.args.extend(["--step-tokens".into(), args.serve.step_tokens.to_string().into()]);
    role.args.extend(["--workers".into(), args.workers.to_string().into()]);
    if let Some(mib) = compute.kv_mib {
        role.args.extend(["--kv-mib".into(), mib.to_string().into()]);
    }
    if let Some(mib) = compute.backup_mib {
        role.args.extend(["--backup-mib".into(), mib.to_string().into()]);
    }
    if compute.device != DeviceArg::Cpu {
        let cache = compute.gpu.kernel_cache.clone().unwrap_or_else(|| data.join("kernels"));
        role.args.extend(["--kernel-cache".into(), cache.into_os_string()]);
        role.args.extend(["--gpu-limit-s".into(), compute.gpu.gpu_limit_s.to_string().into()]);
    }
    role
}

fn router(
    args: &Args,
    program: &OsString,
    (urls, etcd): (&str, &str),
    (dir, address): (&Path, &str),
) -> Role {
    let serve = &args.serve;
    let name = serve.model_name(dir);
    let flags = ["router", "--coordinator", urls, "--listen", address, "--name", &name];
    let mut role = role(ROUTER.into(), program, &flags);
    let numbers = [
        ("--step-tokens", serve.step_tokens.to_string()),
        ("--prefill-ms", serve.prefill_ms.to_string()),
        ("--queue", serve.queue.to_string()),
        ("--step-max-s", serve.step_max_s.to_string()),
        ("--drain-max-s", serve.drain_max_s.to_string()),
        ("--sequences", args.compute.sequences.to_string()),
    ];
    for (flag, number) in numbers {
        role.args.extend([flag.into(), number.into()]);
    }
    if 1 < args.routers {
        role.args.extend(["--etcd".into(), etcd.into()]);
        role.environment = args.etcd.environment();
    }
    role.args.extend(["--model".into(), dir.as_os_str().to_owned()]);
    role
}

fn role(name: String, program: &OsString, flags: &[&str]) -> Role {
    let mut args: Vec<OsString> = flags.iter().map(|flag| (*flag).into()).collect();
    args.push("--exit-with-parent".into());
    let environment = Vec::new();
    Role { name, program: program.clone(), args, environment, child: None, stdin: None }
}

/// The first free port behind that of `address`.
fn next_free(address: &str) -> anyhow::Result<String> {
    let mut next: SocketAddr =
        address.parse().with_context(|| format!("{address} is no IP address with a port"))?;
    while let Some(port) = next.port().checked_add(1) {
        next.set_port(port);
        if TcpListener::bind(next).is_ok() {
            return Ok(next.to_string());
        }
    }
    bail!("there is no free port behind {address}")
}

/// A port that is free now. Somebody else may take it before the child does; then the child says so.
fn free_address() -> anyhow::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").context("cannot find a free port")?;
    Ok(listener.local_addr()?.to_string())
}

#[cfg(test)]
mod tests;

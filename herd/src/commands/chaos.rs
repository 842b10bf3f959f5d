//! `herd chaos`.

use super::{BadInput, DEFAULT_LISTEN};
use anyhow::{Context, bail};
use herd::chaos::{self, Cluster, Scenario};
use std::io::Write;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// What shall happen, a TOML file; examples are in bench/chaos.
    scenario: PathBuf,
    /// The router, `http://host:port`. Its cluster's processes must be on this host.
    #[arg(long, default_value_t = format!("http://{DEFAULT_LISTEN}"), env = "HERD_URL")]
    url: String,
    /// etcd's process, for scenarios that strike it.
    #[arg(long)]
    etcd_pid: Option<u32>,
    /// Where the links between the workers take rules; `herd up --processes --allow-chaos` prints it.
    #[arg(long)]
    links: Option<String>,
    /// Folder for report.json and report.html.
    #[arg(long)]
    report: Option<PathBuf>,
    /// Rounds, instead of the scenario's.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mut scenario =
        Scenario::load(&args.scenario).with_context(|| BadInput("bad scenario".into()))?;
    scenario.rounds = args.rounds.unwrap_or(scenario.rounds);
    let url = args.url.trim_end_matches('/').to_owned();
    let cluster = Cluster { url, etcd_pid: args.etcd_pid, links: args.links.clone() };
    let mut stdout = std::io::stdout();
    let report = chaos::run(&scenario, &cluster, &mut |round| {
        // A reader that has seen enough closes the pipe.
        let _closed = writeln!(stdout, "{}", round.json());
    })?;
    if let Some(dir) = &args.report {
        std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        std::fs::write(dir.join("report.json"), format!("{:#}\n", report.json()))?;
        std::fs::write(dir.join("report.html"), chaos::html(&report))?;
        tracing::info!("wrote {}", dir.join("report.html").display());
    }
    let broken = report.broken();
    if !broken.is_empty() {
        bail!("{}", broken.join("; "));
    }
    Ok(())
}

//! `herd status`: members, epoch, placement and load of a running cluster.

use super::{BadInput, DEFAULT_LISTEN};
use anyhow::Context;
use proto::pb::{StatusRequest, coordinator_client::CoordinatorClient};
use serde_json::Value;
use std::fmt::Write as _;
use std::io::Write as _;
use std::time::Duration;

/// Longest wait for an answer.
const CALL_MAX: Duration = Duration::from_secs(10);
/// Changes of the view that are shown to people; `--json` has more.
const CHANGES_SHOWN: usize = 8;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The router to ask, `http://host:port`.
    #[arg(long, default_value_t = format!("http://{DEFAULT_LISTEN}"), env = "HERD_URL")]
    url: String,
    /// Ask this coordinator instead, `http://host:port`: works without a router, but knows none.
    #[arg(long, conflicts_with = "url")]
    coordinator: Option<String>,
    /// Print the whole document.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let status = match &args.coordinator {
        Some(url) => of_coordinator(url)?,
        None => of_router(&args.url)?,
    };
    let text = if args.json { format!("{status:#}\n") } else { table(&status) };
    // A reader that has seen enough closes the pipe.
    let _closed = std::io::stdout().write_all(text.as_bytes());
    Ok(())
}

pub(crate) fn of_router(url: &str) -> anyhow::Result<Value> {
    let url = url.trim_end_matches('/');
    let agent: ureq::Agent =
        ureq::Agent::config_builder().timeout_global(Some(CALL_MAX)).build().into();
    let mut answer = agent
        .get(format!("{url}/status"))
        .call()
        .with_context(|| format!("no herd router answers at {url}; start one with `herd up`"))?;
    let text = answer.body_mut().read_to_string()?;
    serde_json::from_str(&text).with_context(|| format!("{url} is no herd router"))
}

/// The leading coordinator that a router knows.
pub(crate) fn leader(router: &str) -> anyhow::Result<String> {
    let status = of_router(router)?;
    let coordinators = status["coordinators"].as_array().map_or(&[][..], Vec::as_slice);
    let leader = coordinators.iter().find(|coordinator| coordinator["leader"] == true);
    let url = leader.and_then(|leader| leader["url"].as_str());
    url.map(str::to_owned).with_context(|| {
        format!("the router at {router} knows no coordinator: {}", status["coordinator_error"])
    })
}

fn of_coordinator(url: &str) -> anyhow::Result<Value> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let endpoint = tonic::transport::Endpoint::from_shared(url.to_owned())
            .with_context(|| BadInput(format!("--coordinator {url} is no URL")))?
            .connect_timeout(CALL_MAX)
            .timeout(CALL_MAX);
        let channel = endpoint
            .connect()
            .await
            .with_context(|| format!("no herd coordinator answers at {url}"))?;
        let answer = CoordinatorClient::new(channel).status(StatusRequest {}).await?;
        Ok(serde_json::from_str(&answer.into_inner().json)?)
    })
}

/// For people: one line per member, then the last changes.
fn table(status: &Value) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        out.push_str(text.trim_end());
        out.push('\n');
    };
    line(format!("epoch {}   {}", cell(&status["epoch"]), cell(&status["phase"])));
    if let Some(waiting) = status["waiting"].as_str() {
        line(format!("it does not serve: {waiting}"));
    }
    if let Some(error) = status["coordinator_error"].as_str() {
        line(format!("no coordinator leads: {error}"));
    }
    let router = &status["router"];
    if router.is_object() {
        line(format!(
            "router {}   ready {}   streams {}   queued {}   steps {}   failed {}",
            cell(&router["address"]),
            cell(&router["ready"]),
            cell(&router["streams"]),
            cell(&router["queued"]),
            cell(&router["steps"]),
            cell(&router["failed_steps"]),
        ));
    }
    line(String::new());
    let columns = ["url", "pid", "leader", "error"];
    let rows = rows(&status["coordinators"], &columns, usize::MAX);
    line(aligned(&["coordinator", "pid", "leader", "error"], &rows));
    line(String::new());
    let columns = ["worker", "rank", "state", "experts", "sequences", "pid", "address", "device"];
    let rows = self::rows(&status["members"], &columns, usize::MAX);
    line(aligned(&columns, &rows));
    let gpus = gpus(&status["members"]);
    if !gpus.is_empty() {
        line(String::new());
        line(aligned(&GPU_COLUMNS, &gpus));
    }
    line(String::new());
    let columns = ["epoch", "prepare_ms", "commit_ms", "first_token_ms", "cause"];
    let rows = self::rows(&status["changes"], &columns, CHANGES_SHOWN);
    line(aligned(&columns, &rows));
    out
}

/// Heads of what [`gpus`] gives.
const GPU_COLUMNS: [&str; 8] =
    ["worker", "gpu memory", "sm", "memory", "temperature", "ecc errors", "last xid", "throttle"];

/// A line per member whose GPU tells how it is.
fn gpus(members: &Value) -> Vec<Vec<String>> {
    let row = |member: &Value| {
        let gpu = member.get("gpu")?;
        let with = |name: &str, unit: &str| match gpu.get(name) {
            None => "-".to_owned(),
            Some(value) => format!("{} {unit}", cell(value)),
        };
        let throttle = gpu["throttle"].as_array().map_or(&[][..], Vec::as_slice);
        Some(vec![
            cell(&member["worker"]),
            gpu_memory(gpu),
            with("sm_mhz", "MHz"),
            with("memory_mhz", "MHz"),
            with("temperature_c", "C"),
            cell(&gpu["ecc_uncorrected"]),
            cell(&gpu["last_xid"]),
            match throttle {
                [] => "-".to_owned(),
                some => some.iter().map(cell).collect::<Vec<_>>().join(", "),
            },
        ])
    };
    members.as_array().map_or(&[][..], Vec::as_slice).iter().filter_map(row).collect()
}

/// `61.0 of 80.0 GiB`
fn gpu_memory(gpu: &Value) -> String {
    let gib = |name: &str| gpu[name].as_f64().map(|bytes| bytes / f64::from(1 << 30));
    match (gib("memory_used_bytes"), gib("memory_total_bytes")) {
        (Some(used), Some(total)) => format!("{used:.1} of {total:.1} GiB"),
        (Some(used), None) => format!("{used:.1} GiB"),
        (None, _) => "-".to_owned(),
    }
}

/// The last `most` objects of an array, column by column.
fn rows(array: &Value, columns: &[&str], most: usize) -> Vec<Vec<String>> {
    let all = array.as_array().map_or(&[][..], Vec::as_slice);
    let shown = &all[all.len().saturating_sub(most)..];
    shown.iter().map(|row| columns.iter().map(|column| cell(&row[*column])).collect()).collect()
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        Value::Number(number) if number.is_f64() => {
            number.as_f64().map_or_else(|| "-".into(), |number| format!("{number:.1}"))
        }
        Value::Number(_) | Value::Bool(_) | Value::Array(_) | Value::Object(_) => value.to_string(),
    }
}

fn aligned(columns: &[&str], rows: &[Vec<String>]) -> String {
    let width =
        |i: usize| rows.iter().map(|row| row[i].len()).max().unwrap_or(0).max(columns[i].len());
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let heads: Vec<String> = columns.iter().map(|column| (*column).to_owned()).collect();
    let mut out = String::new();
    for row in std::iter::once(&heads).chain(rows) {
        let mut text = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            // Writing to a string cannot fail.
            let _infallible = write!(text, "{cell:<width$}  ");
        }
        out.push_str(text.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn table_shows_members_and_changes() {
        let status = json!({
            "epoch": 2, "phase": "serving",
            "members": [{ "worker": 10, "rank": 0, "state": "serving", "experts": 8,
                          "sequences": 3, "pid": 7, "address": "a:1", "device": "cpu:avx2 x1" }],
            "router": { "address": "b:2", "ready": true, "streams": 3, "queued": 0, "steps": 9,
                        "failed_steps": 0 },
            "coordinators": [{ "url": "http://c:3", "pid": 5, "leader": true }],
            "changes": [{ "epoch": 2, "cause": "start", "prepare_ms": 1.25, "commit_ms": 0.5,
                          "first_token_ms": null }],
        });
        let want = "\
epoch 2   serving
router b:2   ready true   streams 3   queued 0   steps 9   failed 0

coordinator  pid  leader  error
http://c:3   5    true    -

worker  rank  state    experts  sequences  pid  address  device
10      0     serving  8        3          7    a:1      cpu:avx2 x1

epoch  prepare_ms  commit_ms  first_token_ms  cause
2      1.2         0.5        -               start
";
        assert_eq!(table(&status), want);
    }

    #[test]
    fn gpus_have_a_table_of_their_own_and_dashes_for_what_they_do_not_tell() {
        let status = json!({ "members": [
            { "worker": 1, "gpu": { "memory_used_bytes": 61_u64 << 30, "memory_total_bytes": 80_u64 << 30,
                                    "sm_mhz": 1980, "memory_mhz": 2619, "temperature_c": 45, "ecc_uncorrected": 0,
                                    "last_xid": 79, "throttle": ["power_cap", "0x4000"] } },
            { "worker": 2 },
            { "worker": 3, "gpu": { "temperature_c": 31 } },
        ] });
        let want = "\
worker  gpu memory        sm        memory    temperature  ecc errors  last xid  throttle
1       61.0 of 80.0 GiB  1980 MHz  2619 MHz  45 C         0           79        power_cap, 0x4000
3       -                 -         -         31 C         -           -         -
";
        let text = table(&status);
        assert!(text.contains(want), "{text}");
    }
}

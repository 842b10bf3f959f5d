//! Dependency directions between the workspace's crates, read from `cargo metadata`.
//!
//! Two rules: an edge between two of our crates must be in [`ALLOWED`], and a pure crate must not reach a package of
//! [`IMPURE`], however indirectly. Only normal dependencies count: tests may use what they like.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use serde_json::Value;

/// Crates that decide and never act: no runtime, socket, clock, randomness or threads. A name here binds the crate from
/// the day it becomes a member.
pub(super) const PURE: &[&str] = &["control", "ids", "openai", "placement", "scheduler", "sim"];

/// Packages that bring a runtime, sockets, randomness or threads with them.
const IMPURE: &[&str] = &[
    "async-std",
    "axum",
    "crossbeam-channel",
    "etcd-client",
    "fastrand",
    "getrandom",
    "hyper",
    "mio",
    "rand",
    "rand_core",
    "rayon",
    "reqwest",
    "smol",
    "socket2",
    "tokio",
    "tonic",
    "tower",
    "ureq",
];

/// What each crate may depend on besides `ids`, whose newtypes are everybody's words.
const ALLOWED: &[(&str, &[&str])] = &[
    ("all2all", &["kernels"]),
    ("control", &["placement"]),
    ("coordinator", &["control", "placement", "proto", "store", "telemetry"]),
    ("ids", &[]),
    ("kernels", &[]),
    ("model", &["kernels"]),
    ("openai", &[]),
    ("placement", &[]),
    ("proto", &["placement", "scheduler"]),
    ("router", &["model", "openai", "placement", "proto", "scheduler", "store", "telemetry"]),
    ("scheduler", &[]),
    ("sim", &["control", "placement", "scheduler"]),
    ("store", &["telemetry"]),
    ("telemetry", &[]),
    ("worker", &["all2all", "kernels", "model", "placement", "proto", "store", "telemetry"]),
    ("xtask", &["kernels", "sim"]),
];

/// The binary and the integration tests put everything together.
const UNRESTRICTED: &[&str] = &["herd", "herd-tests"];

/// What the rules need to know of `cargo metadata`: who depends on whom, by package name.
pub(super) struct Workspace {
    /// Folders of the members relative to the root, `/`-separated.
    pub folders: BTreeSet<String>,
    pub members: BTreeSet<String>,
    /// Normal dependencies of every package in the graph, ours and others'.
    pub edges: BTreeMap<String, BTreeSet<String>>,
}

impl Workspace {
    pub(super) fn read(root: &Path) -> anyhow::Result<Self> {
        let output = Command::new("cargo")
            .args(["metadata", "--format-version", "1"])
            .current_dir(root)
            .output()
            .context("cargo metadata could not be started")?;
        if !output.status.success() {
            bail!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr));
        }
        let metadata: Value = serde_json::from_slice(&output.stdout)?;
        Self::parse(&metadata).context("cargo metadata has an unknown form")
    }

    fn parse(metadata: &Value) -> Option<Self> {
        let root = metadata["workspace_root"].as_str()?;
        let ours = strings(&metadata["workspace_members"])?;
        let mut names = BTreeMap::new();
        let (mut folders, mut members) = (BTreeSet::new(), BTreeSet::new());
        for package in metadata["packages"].as_array()? {
            let (id, name) = (package["id"].as_str()?, package["name"].as_str()?);
            names.insert(id, name);
            if ours.contains(id) {
                members.insert(name.to_owned());
                let manifest = Path::new(package["manifest_path"].as_str()?);
                let folder = manifest.parent()?.strip_prefix(root).ok()?;
                folders.insert(folder.to_str()?.replace('\\', "/"));
            }
        }
        let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for node in metadata["resolve"]["nodes"].as_array()? {
            let from = names.get(node["id"].as_str()?)?;
            let targets = edges.entry((*from).to_owned()).or_default();
            for dependency in node["deps"].as_array()? {
                let kinds = dependency["dep_kinds"].as_array()?;
                if kinds.iter().any(|kind| kind["kind"].is_null()) {
                    targets.insert((*names.get(dependency["pkg"].as_str()?)?).to_owned());
                }
            }
        }
        Some(Self { folders, members, edges })
    }
}

fn strings(value: &Value) -> Option<BTreeSet<&str>> {
    value.as_array()?.iter().map(Value::as_str).collect()
}

pub(super) fn check(workspace: &Workspace) -> Vec<String> {
    let mut findings = directions(workspace);
    for name in PURE.iter().filter(|name| workspace.members.contains(**name)) {
        if let Some(path) = impure_path(workspace, name) {
            findings.push(format!("{name} is a pure crate and reaches {}", path.join(" -> ")));
        }
    }
    findings
}

fn directions(workspace: &Workspace) -> Vec<String> {
    let mut findings = Vec::new();
    for name in &workspace.members {
        if UNRESTRICTED.contains(&name.as_str()) {
            continue;
        }
        let Some((_, allowed)) = ALLOWED.iter().find(|(crate_name, _)| crate_name == name) else {
            findings.push(format!("{name} has no line in the table of allowed dependencies"));
            continue;
        };
        let targets = workspace.edges.get(name).into_iter().flatten();
        for target in targets.filter(|target| workspace.members.contains(*target)) {
            let general = target == "ids" && name != "kernels" && name != "xtask";
            if !general && !allowed.contains(&target.as_str()) {
                findings.push(format!("{name} must not depend on {target}"));
            }
        }
    }
    findings
}

/// The way from `start` to an impure package, shortest first, or `None`.
fn impure_path(workspace: &Workspace, start: &str) -> Option<Vec<String>> {
    let mut seen = BTreeSet::from([start.to_owned()]);
    let mut layer = vec![vec![start.to_owned()]];
    while !layer.is_empty() {
        let mut next = Vec::new();
        for path in layer {
            let last = path.last().expect("a path has its start");
            for target in workspace.edges.get(last).into_iter().flatten() {
                if !seen.insert(target.clone()) {
                    continue;
                }
                let longer: Vec<String> = path.iter().chain([target]).cloned().collect();
                if IMPURE.contains(&target.as_str()) {
                    return Some(longer);
                }
                next.push(longer);
            }
        }
        layer = next;
    }
    None
}

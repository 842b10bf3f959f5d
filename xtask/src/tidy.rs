//! The rules about this tree that neither rustc nor clippy checks.
//!
//! Each module returns the list of its findings, so that one run shows all of them; an empty list is the only success.

mod dependencies;
mod files;
mod map;
#[cfg(test)]
mod tests;

use std::path::Path;

use anyhow::bail;

/// Prints every finding and fails if there is one.
pub(crate) fn run(root: &Path) -> anyhow::Result<()> {
    let findings = findings(root)?;
    for finding in &findings {
        eprintln!("tidy: {finding}");
    }
    if !findings.is_empty() {
        bail!("tidy: {} findings", findings.len());
    }
    eprintln!("tidy: clean");
    Ok(())
}

fn findings(root: &Path) -> anyhow::Result<Vec<String>> {
    let workspace = dependencies::Workspace::read(root)?;
    let mut findings = dependencies::check(&workspace);
    findings.extend(map::check(root, &workspace.folders));
    findings.extend(files::check(root)?);
    Ok(findings)
}

//! The code map of ARCHITECTURE.md against the folders of the workspace.
//!
//! The map is the list under the heading "Code map": every line that starts with a path in backquotes, with or without
//! a bullet or a table's bar. It names every member of the workspace; other folders may be named if they exist.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

const FILE: &str = "ARCHITECTURE.md";

pub(super) fn check(root: &Path, folders: &BTreeSet<String>) -> Vec<String> {
    match fs::read_to_string(root.join(FILE)) {
        Ok(text) => compare(&text, folders, |folder| root.join(folder).is_dir()),
        Err(error) => vec![format!("{FILE} cannot be read: {error}")],
    }
}

pub(super) fn compare(
    text: &str,
    folders: &BTreeSet<String>,
    exists: impl Fn(&str) -> bool,
) -> Vec<String> {
    let named = entries(text);
    if named.is_empty() {
        return vec![format!("{FILE} has no list of `folders` under a heading \"Code map\"")];
    }
    let missing =
        folders.difference(&named).map(|folder| format!("{FILE}: the code map lacks {folder}"));
    let gone = named
        .iter()
        .filter(|folder| !exists(folder))
        .map(|folder| format!("{FILE}: the code map names {folder}, which is no folder"));
    missing.chain(gone).collect()
}

fn entries(text: &str) -> BTreeSet<String> {
    let heading = |line: &&str| line.starts_with('#');
    text.lines()
        .skip_while(|line| !(heading(line) && line.to_lowercase().contains("code map")))
        .skip(1)
        .take_while(|line| !heading(line))
        .filter_map(|line| {
            let line = line.trim_start().trim_start_matches(['-', '*', '|']).trim_start();
            let (path, _) = line.strip_prefix('`')?.split_once('`')?;
            Some(path.trim_end_matches('/').to_owned())
        })
        .collect()
}

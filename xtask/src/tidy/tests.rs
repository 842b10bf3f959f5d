//! The tree is tidy, and each rule finds what was planted for it.

use std::collections::{BTreeMap, BTreeSet};

use super::dependencies::{PURE, Workspace, check};
use super::{files, findings, map};

#[test]
fn the_tree_is_tidy() {
    let findings = findings(&crate::root()).unwrap();
    assert!(findings.is_empty(), "{}", findings.join("\n"));
}

/// A workspace of the pure crates and those named in `edges`, `"from to"` each; a package is ours unless it is `tokio` or `bytes`.
fn workspace(edges: &[&str]) -> Workspace {
    let mut members: BTreeSet<String> = PURE.iter().map(|name| (*name).to_owned()).collect();
    let mut graph: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for edge in edges {
        let (from, to) = edge.split_once(' ').unwrap();
        graph.entry(from.to_owned()).or_default().insert(to.to_owned());
        members.extend(
            [from, to]
                .into_iter()
                .filter(|name| !["tokio", "bytes"].contains(name))
                .map(str::to_owned),
        );
    }
    Workspace { folders: BTreeSet::new(), members, edges: graph }
}

#[track_caller]
fn check_edges(edges: &[&str], want: &[&str]) {
    assert_eq!(check(&workspace(edges)), want);
}

#[test]
fn an_edge_outside_the_table_is_found() {
    check_edges(&["control placement", "router model", "all2all ids"], &[]);
    check_edges(&["placement control"], &["placement must not depend on control"]);
    check_edges(&["router worker"], &["router must not depend on worker"]);
    check_edges(&["kernels ids"], &["kernels must not depend on ids"]);
    check_edges(&["herd worker", "herd router"], &[]);
    check_edges(&["stranger ids"], &["stranger has no line in the table of allowed dependencies"]);
}

#[test]
fn a_pure_crate_that_reaches_a_runtime_is_found() {
    check_edges(&["ids bytes"], &[]);
    check_edges(&["worker tokio"], &[]);
    check_edges(
        &["ids bytes", "bytes tokio"],
        &["ids is a pure crate and reaches ids -> bytes -> tokio"],
    );
}

#[track_caller]
fn check_file(name: &str, text: &str, want: &[&str]) {
    assert_eq!(files::check_text(name, text), want);
}

#[test]
fn a_file_without_an_opening_comment_is_found() {
    check_file("a.rs", "//! What it is.\nfn main() {}\n", &[]);
    check_file("a.py", "print(1)\n", &[]);
    check_file(
        "a.rs",
        "fn main() {}\n",
        &["a.rs:1: the first line is not a //! comment that says what the file is for"],
    );
}

#[test]
fn a_long_file_is_found() {
    check_file("a.rs", &("//! What it is.\n".to_owned() + &"\n".repeat(499)), &[]);
    check_file(
        "a.rs",
        &("//! What it is.\n".to_owned() + &"\n".repeat(500)),
        &["a.rs: 501 lines, more than 500, and not in the list of long files"],
    );
}

#[test]
fn a_todo_needs_a_number() {
    let word = concat!("TO", "DO");
    check_file("a.py", &format!("# {word}(#12) later\n"), &[]);
    check_file("a.md", &format!("no {word}s here\n"), &[]);
    for planted in
        [format!("# {word} later"), format!("# {word}(#) later"), format!("# {word}(me) later")]
    {
        check_file(
            "a.py",
            &planted,
            &[&format!("a.py:1: {word} without a number, as in {word}(#12)")],
        );
    }
}

#[test]
fn a_path_of_one_machine_is_found() {
    let path = concat!("/wo", "rk/");
    check_file(
        "a.md",
        &format!("first\nsee {path}x\n"),
        &[&format!("a.md:2: names {path}, a path of one machine")],
    );
}

#[track_caller]
fn check_map(text: &str, want: &[&str]) {
    let folders = ["crates/ids", "herd"].map(str::to_owned).into();
    let exists = |folder: &str| ["crates/ids", "herd", "bench"].contains(&folder);
    assert_eq!(map::compare(text, &folders, exists), want);
}

#[test]
fn the_code_map_names_the_members_and_only_folders_that_exist() {
    check_map(
        "# A\n## Code map\n- `crates/ids`: words\n- `herd/`: binary\n* `bench`\n## B\n- `gone`\n",
        &[],
    );
    check_map(
        "## Code map\n| `herd` | binary |\n",
        &["ARCHITECTURE.md: the code map lacks crates/ids"],
    );
    check_map(
        "## Code map\n- `herd`\n- `crates/ids`\n- `gone`\n",
        &["ARCHITECTURE.md: the code map names gone, which is no folder"],
    );
    check_map(
        "# Nothing\n",
        &["ARCHITECTURE.md has no list of `folders` under a heading \"Code map\""],
    );
}

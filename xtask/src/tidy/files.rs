//! Rules about single files: opening comment, length, numbered reminders, no paths of the machine they were written on.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

const LINES_MAX: usize = 500;

/// Files that may be longer than [`LINES_MAX`], each with its reason. The list may only shrink.
const LONG_FILES: &[(&str, &str)] = &[];

/// Folders that hold nothing written by hand, by name; build folders start with `target` besides.
const SKIPPED_FOLDERS: &[&str] =
    &[".git", ".venv", "__pycache__", ".pytest_cache", "node_modules", "golden", "shared"];

/// Extensions of source files: the rule about reminders is for code, not for texts that talk about it.
const SOURCES: &[&str] = &["cu", "proto", "py", "rs", "sh", "toml", "yaml", "yml"];

// In two pieces, so that this file does not find itself.
const MARK: &str = concat!("TO", "DO");
const MACHINE_PATHS: &[&str] =
    &[concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/ho", "me/")];

pub(super) fn check(root: &Path) -> anyhow::Result<Vec<String>> {
    let mut paths = Vec::new();
    collect(root, &mut paths)?;
    paths.sort();
    let mut findings = Vec::new();
    for path in paths {
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        // A file that is not UTF-8 is data.
        let Ok(text) = String::from_utf8(bytes) else { continue };
        let name = path.strip_prefix(root).expect("collected below the root").to_string_lossy();
        findings.extend(check_text(&name, &text));
    }
    for (name, _) in LONG_FILES {
        if !root.join(name).is_file() {
            findings.push(format!("{name} is in the list of long files and does not exist"));
        }
    }
    Ok(findings)
}

fn collect(folder: &Path, paths: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in
        fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?
    {
        let entry = entry?;
        let (name, kind) = (entry.file_name().to_string_lossy().into_owned(), entry.file_type()?);
        if kind.is_dir() {
            if !name.starts_with("target") && !SKIPPED_FOLDERS.contains(&name.as_str()) {
                collect(&entry.path(), paths)?;
            }
        } else if kind.is_file() && !name.ends_with(".safetensors") && !name.ends_with(".log") {
            paths.push(entry.path());
        }
    }
    Ok(())
}

pub(super) fn check_text(name: &str, text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    let extension =
        Path::new(name).extension().and_then(|extension| extension.to_str()).unwrap_or("");
    if extension == "rs" {
        findings.extend(check_rust(name, text));
    }
    for (number, line) in (1..).zip(text.lines()) {
        if SOURCES.contains(&extension) && unnumbered_todo(line) {
            findings.push(format!("{name}:{number}: {MARK} without a number, as in {MARK}(#12)"));
        }
        if let Some(path) = MACHINE_PATHS.iter().find(|path| line.contains(*path)) {
            findings.push(format!("{name}:{number}: names {path}, a path of one machine"));
        }
    }
    findings
}

fn check_rust(name: &str, text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    if !text.starts_with("//!") {
        findings.push(format!(
            "{name}:1: the first line is not a //! comment that says what the file is for"
        ));
    }
    let lines = text.lines().count();
    let listed = LONG_FILES.iter().any(|(long, _)| *long == name);
    if lines > LINES_MAX && !listed {
        findings.push(format!(
            "{name}: {lines} lines, more than {LINES_MAX}, and not in the list of long files"
        ));
    }
    if lines <= LINES_MAX && listed {
        findings.push(format!("{name}: {lines} lines: it can leave the list of long files"));
    }
    findings
}

/// Whether the line has the word without `(#number)` right behind it.
fn unnumbered_todo(line: &str) -> bool {
    line.match_indices(MARK).any(|(at, _)| {
        let Some(rest) = line[at + MARK.len()..].strip_prefix("(#") else { return true };
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        digits == 0 || !rest[digits..].starts_with(')')
    })
}

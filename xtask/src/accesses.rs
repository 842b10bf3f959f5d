//! What kernels ask of a GPU's memory, from what the stand-in has counted: sectors and passes beside the fewest that the
//! same bytes could take, by kernel and by line.

use anyhow::{Context, ensure};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;

/// A line is shown if it costs so much more than it must ...
const WASTE_MIN: f64 = 1.1;
/// ... and that makes out this part of its kernel's cost.
const PART_MIN: f64 = 0.01;

/// What a place in the code costs: 32-byte sectors of global memory, or passes over the banks of shared memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Cost {
    requests: u64,
    cost: u64,
    least: u64,
}

impl Cost {
    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.cost += other.cost;
        self.least += other.least;
    }

    fn ratio(self) -> f64 {
        self.cost as f64 / self.least.max(1) as f64
    }
}

/// A line of the stand-in's file.
#[derive(Debug, PartialEq, Eq)]
struct Counted {
    kernel: String,
    /// Of the code, in the library.
    offset: u64,
    memory: String,
    bytes: u32,
    cost: Cost,
}

/// Kernel, memory and bytes of an access, with the lines that lead there.
type ByLine = BTreeMap<(String, String, u32, String), Cost>;

/// Prints the table of what the processes that left a file in this folder have counted.
pub(crate) fn print(folder: &Path, library: &Path) -> anyhow::Result<()> {
    let mut text = String::new();
    for entry in std::fs::read_dir(folder)? {
        text += &std::fs::read_to_string(entry?.path())?;
    }
    ensure!(!text.is_empty(), "no kernel was run: does the command use --device cuda:0?");
    let counted = text
        .lines()
        .map(|line| parse(line).with_context(|| format!("what is {line:?}?")))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let lines = lines(&counted, library)?;
    let (mut by_kernel, mut by_line) = (BTreeMap::<_, Cost>::new(), ByLine::new());
    for Counted { kernel, offset, memory, bytes, cost } in counted {
        by_kernel.entry((kernel.clone(), memory.clone())).or_default().add(cost);
        let place = lines.get(&offset).cloned().unwrap_or_default();
        by_line.entry((kernel, memory, bytes, place)).or_default().add(cost);
    }
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "kernel, memory: sectors or passes, the fewest there could be; lines that take more"
    )?;
    for ((kernel, memory), all) in by_kernel {
        let Cost { cost, least, .. } = all;
        writeln!(out, "{kernel:36} {memory:6} {cost:11} {least:11} {:5.2}", all.ratio())?;
        let mut worst: Vec<_> = by_line
            .iter()
            .filter(|((other, at, ..), _)| (other, at) == (&kernel, &memory))
            .filter(|(_, line)| is_wasteful(**line, all))
            .collect();
        worst.sort_by_key(|(_, line)| std::cmp::Reverse(line.cost - line.least));
        for ((_, _, bytes, place), line) in worst {
            let Cost { requests, cost, least } = line;
            writeln!(
                out,
                "    {bytes:2} B x {requests:9} {cost:10} for {least:10} {:5.2}  {place}",
                line.ratio()
            )?;
        }
    }
    Ok(())
}

fn is_wasteful(line: Cost, all: Cost) -> bool {
    WASTE_MIN < line.ratio() && PART_MIN * (all.cost as f64) < (line.cost - line.least) as f64
}

fn parse(line: &str) -> Option<Counted> {
    let mut words = line.split(' ');
    let kernel = words.next()?.to_owned();
    let offset = u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
    let (memory, bytes) = (words.next()?.to_owned(), words.next()?.parse().ok()?);
    let mut number = || words.next()?.parse().ok();
    let cost = Cost { requests: number()?, cost: number()?, least: number()? };
    Some(Counted { kernel, offset, memory, bytes, cost })
}

/// The lines of the code at these offsets, that of the innermost inlined function first.
fn lines(counted: &[Counted], library: &Path) -> anyhow::Result<BTreeMap<u64, String>> {
    let mut offsets: Vec<u64> = counted.iter().map(|counted| counted.offset).collect();
    offsets.sort_unstable();
    offsets.dedup();
    // An offset is where the call returns to.
    let calls = offsets.iter().map(|offset| format!("{:#x}", offset.saturating_sub(1)));
    let output = Command::new("addr2line")
        .args(["-i", "-a", "-e"])
        .arg(library)
        .args(calls)
        .output()
        .context("addr2line, of binutils")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(places(&String::from_utf8_lossy(&output.stdout)))
}

/// Reads what addr2line says: an address, and lines of its frames.
fn places(text: &str) -> BTreeMap<u64, String> {
    const FRAMES: usize = 3;
    let mut found = BTreeMap::<u64, Vec<&str>>::new();
    let mut now = 0;
    for line in text.lines() {
        if let Some(address) = line.strip_prefix("0x") {
            now = u64::from_str_radix(address, 16).map_or(0, |address| address + 1);
        } else {
            let line = line.split(" (").next().unwrap_or(line);
            found.entry(now).or_default().push(line.rsplit('/').next().unwrap_or(line));
        }
    }
    let joined = |frames: Vec<&str>| frames[..frames.len().min(FRAMES)].join(" < ");
    found.into_iter().map(|(address, frames)| (address, joined(frames))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_lines_are_read() {
        let cost = Cost { requests: 3, cost: 24, least: 12 };
        let want = Counted {
            kernel: "herd_a".into(),
            offset: 0x1f,
            memory: "shared".into(),
            bytes: 16,
            cost,
        };
        assert_eq!(parse("herd_a 0x1f shared 16 3 24 12"), Some(want));
        assert_eq!(parse("herd_a 0x1f shared 16 3 24"), None);
        assert!(is_wasteful(cost, cost) && !is_wasteful(Cost { cost: 13, ..cost }, cost));
        let text = "0x000000000000001e\n/a/tiles.cuh:7\n/b/experts.cu:9 (discriminator 2)\n";
        let want = BTreeMap::from([(0x1f, "tiles.cuh:7 < experts.cu:9".into())]);
        assert_eq!(places(text), want);
    }
}

//! `herd bench placement`: the expert planner beside DeepSeek's EPLB, on the loads that both were given.
//!
//! The folder holds load matrices (`CASE.npy`: `[layers, experts]`, or `[windows, layers, experts]`
//! where the traffic drifts) and what EPLB made of them (`eplb_results.json`). One case is a matrix, a
//! number of GPUs and a number of copies beyond the first of each expert.
//!
//! * *same*: every window is placed from nothing and judged by itself, as EPLB does it; the copies of an expert have the
//!   shares that suit the window.
//! * *next*: windows are placed one after the other, each from the placement before, and judged by
//!   the window that follows, which the planner has not seen. Within it the shares of the copies follow the load as the
//!   coordinator lets them: 60 times, each time for what was before. EPLB's copies share alike.

use anyhow::{Context, ensure};
use placement::{
    Aim, Follower, Holdings, Load, Placement, Planned, Request, Shape, Shares, Window, replan,
};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

/// Runs every recorded case and hands each to `report` as one JSON object.
///
/// # Errors
///
/// If the folder lacks a file, or a file is not what it should be.
pub fn run(folder: &Path, repeats: u32, report: &mut dyn FnMut(&Value)) -> anyhow::Result<()> {
    let path = folder.join("eplb_results.json");
    let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let recorded: Value = serde_json::from_slice(&text).context("eplb_results.json")?;
    for eplb in recorded["results"].as_array().context("eplb_results.json has no results")? {
        let text =
            |key: &str| eplb[key].as_str().with_context(|| format!("a result without {key}"));
        let count = |key: &str| {
            let count = eplb[key].as_u64().and_then(|count| usize::try_from(count).ok());
            count.with_context(|| format!("a result without {key}"))
        };
        let path = folder.join(format!("{}.npy", text("case")?));
        let windows = read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let case = Case { gpus: count("gpus")?, redundant: count("redundant")? };
        report(&line(text("case")?, case, eplb, &case.run(&windows, repeats)?));
    }
    Ok(())
}

#[derive(Debug, Clone, Copy)]
struct Case {
    gpus: usize,
    redundant: usize,
}

/// What the planner reached.
#[derive(Debug)]
struct Figures {
    same: f64,
    fresh: Duration,
    drift: Option<Drift>,
}

#[derive(Debug)]
struct Drift {
    next: f64,
    next_all: f64,
    loads_per_replan: f64,
    replan: Duration,
}

impl Case {
    fn run(self, windows: &[Window], repeats: u32) -> anyhow::Result<Figures> {
        let shape = windows.first().context("no window")?.shape();
        ensure!(
            (shape.experts + self.redundant).is_multiple_of(self.gpus),
            "{self:?}: every GPU has as many places"
        );
        let capacity = vec![(shape.experts + self.redundant) / self.gpus; self.gpus];
        let nobody = Holdings::none(shape);
        let judged: Vec<usize> =
            (0..windows.len()).filter(|&at| self.judges(at, windows)).collect();
        let (mut balances, mut times) = (Vec::new(), Vec::new());
        for at in judged {
            let mut load = Load::unknown(shape);
            load.observe(&windows[at])?;
            let (planned, took) = plan(&capacity, &nobody, &load, repeats)?;
            balances.push(
                windows[at]
                    .balance(&planned.placement, &Shares::level(&planned.placement, &windows[at])?),
            );
            times.push(took);
        }
        let drift = (1 < windows.len()).then(|| self.drift(&capacity, windows, repeats));
        Ok(Figures { same: mean(&balances), fresh: median(times), drift: drift.transpose()? })
    }

    /// EPLB was judged where a window follows, and with 64 GPUs, to save time, by every second one.
    fn judges(self, at: usize, windows: &[Window]) -> bool {
        let step = if self.gpus == 64 { 2 } else { 1 };
        windows.len() == 1 || (at + 1 < windows.len() && at.is_multiple_of(step))
    }

    fn drift(self, capacity: &[usize], windows: &[Window], repeats: u32) -> anyhow::Result<Drift> {
        let shape = windows[0].shape();
        let (mut load, mut current) = (Load::unknown(shape), Holdings::none(shape));
        let (mut follower, mut chance) = (Follower::default(), Chance(1));
        let (mut times, mut loads, mut judged, mut all) = (vec![], vec![], vec![], vec![]);
        moments(&windows[0], &mut chance)?.iter().for_each(|moment| follower.observe(moment));
        for (at, pair) in windows.windows(2).enumerate() {
            load.observe(&pair[0])?;
            let (planned, took) = plan(capacity, &current, &load, repeats)?;
            let moments = moments(&pair[1], &mut chance)?;
            let balance = follow((&planned.placement, &load), &mut follower, &moments)?;
            all.push(balance);
            if self.judges(at, windows) {
                judged.push(balance);
            }
            // Both count what follows the first placement, which has to load everything.
            if 0 < at {
                loads.push(planned.loads.len() as f64);
                times.push(took);
            }
            current = Holdings::carried(&planned.placement, Some);
        }
        Ok(Drift {
            next: mean(&judged),
            next_all: mean(&all),
            loads_per_replan: mean(&loads),
            replan: median(times),
        })
    }
}

/// How level a window is that the planner has not seen, while the shares of the copies follow it. At first they share alike;
/// what a moment brings is reported in the next one, and followed in the one after that.
fn follow(
    (placement, load): (&Placement, &Load),
    follower: &mut Follower,
    moments: &[Window],
) -> anyhow::Result<f64> {
    let mut shares = Shares::even(placement);
    let mut layers: Vec<Vec<f64>> = Vec::new();
    follower.begin();
    let mut coming = None;
    for moment in moments {
        if let Some(better) = coming.take() {
            shares = better;
        }
        coming = follower.shares(placement, Some(load))?.cloned();
        let loads = moment.rank_loads(placement, &shares);
        layers.resize(loads.len(), vec![0.0; usize::from(placement.ranks())]);
        for (sum, load) in layers.iter_mut().flatten().zip(loads.iter().flatten()) {
            *sum += load;
        }
        follower.observe(moment);
    }
    Ok(mean(&layers.iter().map(|ranks| placement::level(ranks)).collect::<Vec<_>>()))
}

/// A window's tokens in the order of time, as far as that is known: each comes in any moment with equal chance.
fn moments(window: &Window, chance: &mut Chance) -> anyhow::Result<Vec<Window>> {
    let mut left: Vec<Vec<u64>> = window.layers().map(<[u64]>::to_vec).collect();
    let moment = |moments_left: u64| {
        let layers: Vec<Vec<u64>> = left
            .iter_mut()
            .map(|layer| layer.iter_mut().map(|left| chance.part(left, moments_left)).collect())
            .collect();
        Ok(Window::new(&layers)?)
    };
    (1..=MOMENTS).rev().map(moment).collect()
}

/// Moments of a window: the coordinator hears of the load every second, and places anew every minute by default.
const MOMENTS: u64 = 60;

/// Numbers without pattern, the same ones every time (splitmix64).
struct Chance(u64);

impl Chance {
    /// Takes the tokens of the first of so many moments, binomially distributed but for the tails.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "counts of tokens")]
    fn part(&mut self, left: &mut u64, moments: u64) -> u64 {
        let part = 1.0 / moments as f64;
        let mean = *left as f64 * part;
        // The sum of twelve uniform numbers has variance 1.
        let normal: f64 = (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0;
        let drawn = (mean + normal * (mean * (1.0 - part)).sqrt()).round().max(0.0);
        let drawn = (drawn as u64).min(*left);
        *left -= drawn;
        drawn
    }

    /// 0 to 1.
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ (bits >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

fn plan(
    capacity: &[usize],
    current: &Holdings,
    load: &Load,
    repeats: u32,
) -> anyhow::Result<(Planned, Duration)> {
    let request = Request { aim: Aim::Level, capacity, redundancy: 0, current, load };
    let mut best = Duration::MAX;
    let mut planned = None;
    for _ in 0..repeats.max(1) {
        let started = Instant::now();
        let answer = replan(&request)?;
        best = best.min(started.elapsed());
        planned = Some(answer);
    }
    Ok((planned.context("at least one repeat")?, best))
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn mean(figures: &[f64]) -> f64 {
    figures.iter().sum::<f64>() / figures.len() as f64
}

fn line(name: &str, case: Case, eplb: &Value, figures: &Figures) -> Value {
    let ms = |time: Duration| round(time.as_secs_f64() * 1e3, 100.0);
    let mut ours = json!({ "same": round(figures.same, 1e4), "ms": ms(figures.fresh) });
    let mut theirs = json!({
        "same": eplb.get("bal_same_window").unwrap_or(&eplb["bal_mean"]),
        "ms": eplb["cpu_ms_median"],
    });
    if let Some(drift) = &figures.drift {
        ours["next"] = json!(round(drift.next, 1e4));
        ours["next_all"] = json!(round(drift.next_all, 1e4));
        ours["loads_per_replan"] = json!(round(drift.loads_per_replan, 10.0));
        ours["replan_ms"] = json!(ms(drift.replan));
        theirs["next"] = eplb["bal_next_window"].clone();
        theirs["loads_per_replan"] = eplb["expert_moves_per_replan"].clone();
    }
    json!({
        "case": name,
        "gpus": case.gpus,
        "redundant": case.redundant,
        "ours": ours,
        "eplb": theirs,
    })
}

fn round(figure: f64, parts: f64) -> f64 {
    (figure * parts).round() / parts
}

/// The windows of a `.npy` file of 16- or 32-bit little-endian counts.
fn read(path: &Path) -> anyhow::Result<Vec<Window>> {
    let bytes = std::fs::read(path)?;
    ensure!(bytes.starts_with(b"\x93NUMPY\x01"), "not a .npy file of version 1");
    let start = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let header = bytes.get(10..start).context("the header is cut off")?;
    let header = std::str::from_utf8(header)?;
    let counts: Vec<u64> = if header.contains("'<u2'") {
        let words = bytes[start..].as_chunks().0.iter();
        words.map(|&word| u64::from(u16::from_le_bytes(word))).collect()
    } else if header.contains("'<u4'") {
        let words = bytes[start..].as_chunks().0.iter();
        words.map(|&word| u64::from(u32::from_le_bytes(word))).collect()
    } else {
        anyhow::bail!("counts of another type: {header}")
    };
    let sizes = header.split(['(', ')']).nth(1).context("no shape")?.split(',');
    let sizes = sizes.map(str::trim).filter(|size| !size.is_empty());
    let sizes: Vec<usize> = sizes.map(str::parse).collect::<Result<_, _>>()?;
    let shape = match sizes[..] {
        [moe_layers, experts] | [_, moe_layers, experts] => Shape { moe_layers, experts },
        _ => anyhow::bail!("{sizes:?} is neither [layers, experts] nor [windows, layers, experts]"),
    };
    ensure!(0 < shape.experts && 0 < shape.moe_layers, "an empty matrix");
    ensure!(counts.len() == sizes.iter().product::<usize>(), "the counts are cut off");
    let rows: Vec<Vec<u64>> = counts.chunks(shape.experts).map(<[u64]>::to_vec).collect();
    rows.chunks(shape.moe_layers).map(|layers| Ok(Window::new(layers)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On every recorded case at least as level as EPLB, and where traffic drifts with a fifth of its
    /// loads at most. EPLB's figures have four digits.
    #[test]
    fn planner_is_nowhere_behind_eplb() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/eplb");
        let mut cases = 0;
        run(&folder, 1, &mut |line| {
            let of = |who: &str, key: &str| line[who][key].as_f64();
            assert!(of("eplb", "same") <= of("ours", "same"), "{line}");
            if let Some(theirs) = of("eplb", "loads_per_replan") {
                assert!(of("ours", "loads_per_replan").unwrap() * 5.0 <= theirs, "{line}");
                assert!(of("eplb", "next") <= of("ours", "next"), "{line}");
                if line["gpus"] == 64 && 0 < line["redundant"].as_u64().unwrap() {
                    assert!(0.85 <= of("ours", "next").unwrap(), "{line}");
                }
            }
            cases += 1;
        })
        .unwrap();
        assert_eq!(cases, 121);
    }
}

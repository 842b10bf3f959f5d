//! Golden traces of what is planned, and the rules at the edges.

mod backup;
mod model;
mod random;

use super::*;

/// Two sequences' worth of a small rank: blocks of 4, chunks of 8.
fn pools(full_blocks: u32, chunked_blocks: u32) -> KvPools {
    KvPools { block_tokens: 4, full_blocks, chunked_blocks, chunk_tokens: Some(8) }
}

fn config(pools: &[KvPools], step_tokens: u32) -> Config {
    Config {
        pools: pools.to_vec(),
        step_tokens,
        prefill_max: Duration::from_millis(100),
        sequences_max: 4,
        queue_max: 8,
        context_tokens: 1000,
        backup_tokens: Vec::new(),
    }
}

fn sequence(id: u64, prompt_tokens: u32, tokens_max: u32) -> NewSequence {
    let prompt = (0..prompt_tokens).collect();
    NewSequence { id: SeqId(id), prompt, tokens_max, group: None, has_begun: false }
}

/// `r0: q1 0..6 b0 b1 | 0: b0 b1 *`: q1 computes positions 0 to 5; its block table of the full
/// pool; its table of the chunked pool from block number 0; it samples.
fn text(plan: &Plan) -> String {
    let ids =
        |blocks: &[BlockId]| blocks.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let slice = |s: &Slice| {
        let end = s.start as usize + s.tokens.len();
        let (full, chunked) = (ids(&s.full_blocks), ids(&s.chunked_blocks));
        let star = if s.samples { " *" } else { "" };
        format!("{} {}..{end} {full} | {}: {chunked}{star}", s.sequence, s.start, s.chunked_first)
    };
    let rank = |(rank, slices): (usize, &Vec<Slice>)| {
        format!("r{rank}: {}", slices.iter().map(slice).collect::<Vec<_>>().join(", "))
    };
    let ranks = plan.ranks.iter().enumerate().filter(|(_, slices)| !slices.is_empty()).map(rank);
    ranks.collect::<Vec<_>>().join("; ")
}

enum Do {
    Submit(NewSequence),
    Cancel(u64),
    /// Plans, compares, and commits with the token 7 for whoever samples.
    Step(&'static str),
    /// Plans, compares, and leaves the step in flight.
    Plan(&'static str),
    Commit,
    Abort,
    /// Compares `running queued | full free, chunked free; …`.
    Load(&'static str),
}

#[track_caller]
fn check(config: Config, script: Vec<Do>) {
    let mut scheduler = Scheduler::new(config).unwrap();
    let mut plan = Plan::new();
    for (line, action) in script.into_iter().enumerate() {
        match action {
            Do::Submit(new) => scheduler.submit(new).unwrap(),
            Do::Cancel(id) => scheduler.cancel(SeqId(id)),
            Do::Step(want) => {
                let some = scheduler.plan(StepId(line as u64), &mut plan);
                assert_eq!((text(&plan).as_str(), some), (want, !want.is_empty()), "line {line}");
                if some {
                    commit(&mut scheduler, &plan);
                }
            }
            Do::Plan(want) => {
                assert!(scheduler.plan(StepId(line as u64), &mut plan));
                assert_eq!(text(&plan), want, "line {line}");
            }
            Do::Commit => commit(&mut scheduler, &plan),
            Do::Abort => scheduler.abort(),
            Do::Load(want) => {
                let stats = scheduler.stats();
                let free =
                    |r: &RankStats| format!("{} {}", r.full_free_blocks, r.chunked_free_blocks);
                let free = stats.ranks.iter().map(free).collect::<Vec<_>>().join("; ");
                let got = format!("{} {} | {free}", stats.running, stats.queued);
                assert_eq!(got, want, "line {line}");
            }
        }
    }
}

fn commit(scheduler: &mut Scheduler, plan: &Plan) {
    let sampled: Vec<(SeqId, u32)> =
        plan.ranks.iter().flatten().filter(|s| s.samples).map(|s| (s.sequence, 7)).collect();
    scheduler.commit(&sampled);
}

use Do::{Abort, Cancel, Load, Step, Submit};

#[test]
fn sequence_runs_from_prompt_to_limit() {
    check(
        config(&[pools(9, 9)], 16),
        vec![
            Step(""),
            Submit(sequence(1, 3, 3)),
            Load("0 1 | 9 9"),
            Step("r0: q1 0..3 b0 | 0: b0 *"),
            Step("r0: q1 3..4 b0 | 0: b0 *"),
            Step("r0: q1 4..5 b0 b1 | 0: b0 b1 *"),
            Load("0 0 | 9 9"),
            Step(""),
        ],
    );
}

#[test]
fn blocks_of_past_chunks_are_freed() {
    check(
        config(&[pools(9, 9)], 6),
        vec![
            Submit(sequence(1, 17, 9)),
            Step("r0: q1 0..6 b0 b1 | 0: b0 b1"),
            Step("r0: q1 6..12 b0 b1 b2 | 0: b0 b1 b2"), // Crosses into the second chunk.
            Load("1 0 | 6 8"),
            Step("r0: q1 12..17 b0 b1 b2 b3 b4 | 2: b2 b1 b0 *"),
            Load("1 0 | 4 8"),
            Step("r0: q1 17..18 b0 b1 b2 b3 b4 | 4: b0 *"),
        ],
    );
}

#[test]
fn long_prompt_does_not_starve_a_short_one() {
    check(
        config(&[pools(99, 99)], 8),
        vec![
            Submit(sequence(1, 100, 1)),
            Submit(sequence(2, 3, 2)),
            Step("r0: q1 0..5 b0 b2 | 0: b0 b2, q2 0..3 b1 | 0: b1 *"),
            Step("r0: q1 5..12 b0 b2 b3 | 0: b0 b2 b3, q2 3..4 b1 | 0: b1 *"),
        ],
    );
}

#[test]
fn sequences_go_to_the_rank_that_holds_least() {
    // However much more another one could hold.
    check(
        config(&[pools(9, 9), pools(900, 900)], 8),
        vec![
            Submit(sequence(1, 8, 1)),
            Submit(sequence(2, 2, 1)),
            Submit(sequence(3, 2, 1)),
            Submit(sequence(4, 2, 1)),
            Step(
                "r0: q1 0..6 b0 b2 | 0: b0 b2, q4 0..2 b1 | 0: b1 *; \
                 r1: q2 0..2 b0 | 0: b0 *, q3 0..2 b1 | 0: b1 *",
            ),
        ],
    );
}

#[test]
fn youngest_is_preempted_and_resumes_with_its_tokens() {
    check(
        config(&[pools(4, 4)], 8),
        vec![
            Submit(sequence(1, 3, 9)),
            Submit(sequence(2, 3, 9)),
            Step("r0: q1 0..3 b0 | 0: b0 *, q2 0..3 b1 | 0: b1 *"),
            Step("r0: q1 3..4 b0 | 0: b0 *, q2 3..4 b1 | 0: b1 *"),
            Step("r0: q1 4..5 b0 b2 | 0: b0 b2 *, q2 4..5 b1 b3 | 0: b1 b3 *"),
            Step("r0: q1 5..6 b0 b2 | 0: b0 b2 *, q2 5..6 b1 b3 | 0: b1 b3 *"),
            Step("r0: q1 6..7 b0 b2 | 0: b0 b2 *, q2 6..7 b1 b3 | 0: b1 b3 *"),
            Step("r0: q1 7..8 b0 b2 | 0: b0 b2 *, q2 7..8 b1 b3 | 0: b1 b3 *"),
            Step("r0: q1 8..9 b0 b2 b1 | 2: b3 *"),
            Load("1 1 | 1 3"),
            Cancel(1),
            Step("r0: q2 0..8 b0 b2 | 0: b3 b1"),
            Step("r0: q2 8..9 b0 b2 b1 | 2: b1 *"),
        ],
    );
}

#[test]
fn cancel_frees_at_once_or_with_the_step_in_flight() {
    check(
        config(&[pools(9, 9)], 8),
        vec![
            Submit(sequence(1, 3, 9)),
            Submit(sequence(2, 3, 9)),
            Cancel(2),
            Step("r0: q1 0..3 b0 | 0: b0 *"),
            Cancel(1),
            Cancel(1),
            Load("0 0 | 9 9"),
            Submit(sequence(3, 3, 9)),
            Do::Plan("r0: q3 0..3 b0 | 0: b0 *"),
            Cancel(3),
            Load("1 0 | 8 8"),
            Do::Commit,
            Load("0 0 | 9 9"),
            Submit(sequence(4, 3, 9)),
            Do::Plan("r0: q4 0..3 b0 | 0: b0 *"),
            Cancel(4),
            Abort,
            Load("0 0 | 9 9"),
        ],
    );
}

#[test]
fn aborted_step_is_planned_again_the_same() {
    check(
        config(&[pools(9, 9)], 6),
        vec![
            Submit(sequence(1, 10, 9)),
            Submit(sequence(2, 5, 9)),
            Do::Plan("r0: q1 0..3 b0 | 0: b0, q2 0..3 b1 | 0: b1"),
            Abort,
            Load("2 0 | 9 9"),
            Step("r0: q1 0..3 b0 | 0: b0, q2 0..3 b1 | 0: b1"),
            Do::Plan("r0: q1 3..7 b0 b2 | 0: b0 b2, q2 3..5 b1 b3 | 0: b1 b3 *"),
            Abort,
            Load("2 0 | 7 7"),
            Step("r0: q1 3..7 b0 b2 | 0: b0 b2, q2 3..5 b1 b3 | 0: b1 b3 *"),
        ],
    );
}

#[test]
fn step_after_a_failed_one_only_decodes() {
    check(
        config(&[pools(9, 9), pools(9, 9)], 6),
        vec![
            Submit(sequence(1, 3, 9)),
            Step("r0: q1 0..3 b0 | 0: b0 *"),
            Submit(sequence(2, 10, 9)),
            Do::Plan("r0: q1 3..4 b0 | 0: b0 *; r1: q2 0..6 b0 b1 | 0: b0 b1"),
            Abort,
            Do::Plan("r0: q1 3..4 b0 | 0: b0 *"),
            Abort,
            Step("r0: q1 3..4 b0 | 0: b0 *"),
            Do::Plan("r0: q1 4..5 b0 b1 | 0: b0 b1 *; r1: q2 0..6 b0 b1 | 0: b0 b1"),
            Abort,
            // Nobody waits for its next token any more.
            Cancel(1),
            Step("r1: q2 0..6 b0 b1 | 0: b0 b1"),
        ],
    );
}

#[test]
fn models_without_chunks_leave_the_chunked_pool_alone() {
    let kv = KvPools { block_tokens: 4, full_blocks: 9, chunked_blocks: 0, chunk_tokens: None };
    check(
        config(&[kv], 16),
        vec![
            Submit(sequence(1, 5, 2)),
            Step("r0: q1 0..5 b0 b1 | 0:  *"),
            Load("1 0 | 7 0"),
            Step("r0: q1 5..6 b0 b1 | 0:  *"),
        ],
    );
}

#[test]
fn what_cannot_run_is_refused() {
    let mut scheduler = Scheduler::new(config(&[pools(9, 9), pools(3, 9)], 8)).unwrap();
    assert_eq!(scheduler.context_tokens(), 13, "three blocks of four, and one token on top");
    let too_long = SubmitError::TooLong { prompt_tokens: 13, context_tokens: 13 };
    assert_eq!(scheduler.submit(sequence(1, 13, 1)), Err(too_long));
    assert_eq!(scheduler.submit(sequence(1, 12, 0)), Err(SubmitError::NoTokens));
    assert_eq!(scheduler.submit(sequence(1, 0, 1)), Err(SubmitError::EmptyPrompt));
    for id in 0..8 {
        scheduler.submit(sequence(id, 12, 1)).unwrap();
    }
    let full = SubmitError::QueueFull { queued: 8, queue_max: 8 };
    assert_eq!(scheduler.submit(sequence(8, 12, 1)), Err(full));
}

#[test]
fn configurations_that_get_stuck_are_refused() {
    let error = |config| Scheduler::new(config).unwrap_err();
    assert_eq!(error(config(&[], 8)), ConfigError::NoRanks);
    assert_eq!(error(config(&[pools(9, 9), pools(9, 0)], 8)), ConfigError::EmptyPool { rank: 1 });
    assert_eq!(
        error(config(&[pools(9, 9)], 3)),
        ConfigError::SmallStep { step_tokens: 3, sequences_max: 4 }
    );
    assert_eq!(error(config(&[pools(9, 9)], 0)), ConfigError::ZeroLimit);
}

#[test]
#[should_panic(expected = "planned while a step is in flight")]
fn second_step_in_flight_is_a_bug_of_the_caller() {
    let mut scheduler = Scheduler::new(config(&[pools(9, 9)], 8)).unwrap();
    scheduler.submit(sequence(1, 3, 1)).unwrap();
    assert!(scheduler.plan(StepId(0), &mut Plan::new()));
    scheduler.plan(StepId(1), &mut Plan::new());
}

/// Plans and commits until the scheduler has nothing to do; every sampled token is 7.
fn finish(scheduler: &mut Scheduler) -> Vec<String> {
    let (mut plan, mut lines) = (Plan::new(), Vec::new());
    while scheduler.plan(StepId(lines.len() as u64), &mut plan) {
        lines.push(text(&plan));
        let slices = plan.ranks.iter().flatten().filter(|slice| slice.samples);
        let sampled: Vec<_> = slices.map(|slice| (slice.sequence, 7)).collect();
        scheduler.commit(&sampled);
    }
    lines
}

#[test]
fn lost_rank_s_sequences_start_over_and_the_others_go_on() {
    let ranks = [pools(16, 8), pools(16, 8)];
    let mut scheduler = Scheduler::new(config(&ranks, 16)).unwrap();
    for id in 1..=3 {
        scheduler.submit(sequence(id, 6, 3)).unwrap();
    }
    let mut plan = Plan::new();
    assert!(scheduler.plan(StepId(0), &mut plan));
    scheduler.commit(&[(SeqId(1), 7), (SeqId(2), 7), (SeqId(3), 7)]);
    assert!(scheduler.plan(StepId(1), &mut plan));
    let before = text(&plan);
    assert_eq!(
        before,
        "r0: q1 6..7 b0 b2 | 0: b0 b2 *, q3 6..7 b1 b3 | 0: b1 b3 *; r1: q2 6..7 b0 b1 | 0: b0 b1 *"
    );
    scheduler.abort();

    // Old rank 1 becomes rank 0, old rank 0 is gone, rank 1 is new.
    let mut next = scheduler.reconfigure(config(&ranks, 16), &[Some(1), None]).unwrap();
    // First those that go on, which have waited for the lost step.
    assert!(next.plan(StepId(2), &mut plan));
    assert_eq!(text(&plan), "r0: q2 6..7 b0 b1 | 0: b0 b1 *");
    next.commit(&[(SeqId(2), 7)]);
    assert!(next.plan(StepId(3), &mut plan));
    // q1 and q3 have 6 prompt tokens and the sampled one to compute again.
    assert_eq!(
        text(&plan),
        "r0: q2 7..8 b0 b1 | 0: b0 b1 *, q3 0..7 b2 b3 | 0: b2 b3 *; r1: q1 0..7 b0 b1 | 0: b0 b1 *"
    );
    next.abort();
    next.retain(|id| id != SeqId(3));
    assert!(next.has(SeqId(1)) && !next.has(SeqId(3)));
    assert_eq!(finish(&mut next).len(), 3);
}

#[test]
fn another_context_takes_no_sequence_over() {
    let mut scheduler = Scheduler::new(config(&[pools(8, 4)], 16)).unwrap();
    scheduler.submit(sequence(1, 6, 3)).unwrap();
    let next = scheduler.reconfigure(config(&[pools(6, 4)], 16), &[Some(0)]).unwrap();
    assert!(!next.has(SeqId(1)));
}

/// How many tokens of each sequence the next step computes, by rank; it then takes so long.
#[track_caller]
fn step(scheduler: &mut Scheduler, took_ms: u64, want: &[&[(u64, usize)]]) {
    let mut plan = Plan::new();
    scheduler.plan(StepId(0), &mut plan);
    let slices = |rank: &Vec<Slice>| -> Vec<(u64, usize)> {
        rank.iter().map(|slice| (slice.sequence.0, slice.tokens.len())).collect()
    };
    assert_eq!(plan.ranks.iter().map(slices).collect::<Vec<_>>(), want);
    scheduler.time(Duration::from_millis(took_ms));
    commit(scheduler, &plan);
}

#[test]
fn prefill_is_held_back_while_somebody_decodes() {
    let ranks = [pools(999, 999), pools(999, 999)];
    let mut scheduler = Scheduler::new(config(&ranks, 999)).unwrap();
    scheduler.submit(sequence(1, 400, 5)).unwrap();
    // A millisecond a token. Nobody waits, so it is not cut.
    step(&mut scheduler, 400, &[&[(1, 400)], &[]]);
    scheduler.submit(sequence(2, 450, 9)).unwrap();
    scheduler.submit(sequence(3, 250, 9)).unwrap();
    // What a step takes without prefill must be known once.
    step(&mut scheduler, 20, &[&[(1, 1)], &[]]);
    // Who decodes on one rank waits for the other, too.
    step(&mut scheduler, 120, &[&[(1, 1), (3, 100)], &[(2, 100)]]);
    scheduler.cancel(SeqId(1));
    // Nobody waits any more.
    step(&mut scheduler, 350, &[&[(3, 150)], &[(2, 350)]]);
    for _ in 0..6 {
        step(&mut scheduler, 80, &[&[(3, 1)], &[(2, 1)]]);
    }
    scheduler.submit(sequence(4, 300, 9)).unwrap();
    // A step of 69 ms, as it is believed to be by now, may take twice as much more.
    step(&mut scheduler, 207, &[&[(3, 1), (4, 138)], &[(2, 1)]]);
}

#[test]
fn decodes_are_measured_again_though_prompts_never_end() {
    let mut scheduler = Scheduler::new(config(&[pools(999, 999)], 999)).unwrap();
    scheduler.submit(sequence(1, 100, 99)).unwrap();
    step(&mut scheduler, 100, &[&[(1, 100)]]);
    scheduler.submit(sequence(2, 900, 9)).unwrap();
    for _ in 0..3 {
        step(&mut scheduler, 50, &[&[(1, 1)]]);
        for _ in 0..16 {
            let mut plan = Plan::new();
            scheduler.plan(StepId(0), &mut plan);
            assert_eq!(plan.ranks[0].len(), 2);
            scheduler.time(Duration::from_secs(9));
            commit(&mut scheduler, &plan);
        }
    }
}

#[test]
fn every_prompt_gets_on_however_many_they_are() {
    let mut config = config(&[pools(999, 999)], 99);
    (config.sequences_max, config.queue_max) = (40, 40);
    let mut scheduler = Scheduler::new(config).unwrap();
    scheduler.submit(sequence(0, 9, 99)).unwrap();
    step(&mut scheduler, 9000, &[&[(0, 9)]]);
    step(&mut scheduler, 10, &[&[(0, 1)]]);
    for id in 1..40 {
        scheduler.submit(sequence(id, 50 + u32::try_from(id).unwrap(), 9)).unwrap();
    }
    let each: Vec<_> = (0..40).map(|id| (id, 1)).collect();
    step(&mut scheduler, 9000, &[&each]);
    scheduler.cancel(SeqId(0));
    let mut plan = Plan::new();
    scheduler.plan(StepId(0), &mut plan);
    assert_eq!(plan.ranks[0].iter().map(|slice| slice.tokens.len()).sum::<usize>(), 99);
}

#[test]
fn those_in_the_middle_of_a_text_are_prefilled_first_and_faster() {
    let ranks = [pools(999, 999), pools(999, 999)];
    let mut scheduler = Scheduler::new(config(&ranks, 999)).unwrap();
    scheduler.submit(sequence(1, 500, 5)).unwrap();
    scheduler.submit(sequence(2, 500, 5)).unwrap();
    step(&mut scheduler, 500, &[&[(1, 500)], &[(2, 500)]]);
    step(&mut scheduler, 10, &[&[(1, 1)], &[(2, 1)]]);
    // Rank 1 is lost, and of another sequence only the journal is left.
    let mut scheduler = scheduler.reconfigure(config(&ranks, 999), &[Some(0), None]).unwrap();
    scheduler.submit(NewSequence { has_begun: true, ..sequence(3, 250, 9) }).unwrap();
    scheduler.submit(sequence(4, 250, 9)).unwrap();
    step(&mut scheduler, 410, &[&[(1, 1), (3, 250)], &[(2, 400)]]);
    // More than the limit of new ones, so they wait.
    step(&mut scheduler, 112, &[&[(1, 1), (3, 1)], &[(2, 102)]]);
    step(&mut scheduler, 110, &[&[(1, 1), (3, 1)], &[(2, 1), (4, 100)]]);
}

#[test]
fn who_resumes_alone_is_not_held_back_but_those_who_begin_are() {
    let ranks = [pools(999, 999)];
    let mut scheduler = Scheduler::new(config(&ranks, 999)).unwrap();
    scheduler.submit(sequence(1, 500, 5)).unwrap();
    step(&mut scheduler, 500, &[&[(1, 500)]]);
    let mut scheduler = scheduler.reconfigure(config(&ranks, 999), &[None]).unwrap();
    scheduler.submit(sequence(2, 300, 9)).unwrap();
    step(&mut scheduler, 501, &[&[(1, 501)]]);
    step(&mut scheduler, 10, &[&[(1, 1)]]);
    step(&mut scheduler, 110, &[&[(1, 1), (2, 100)]]);
}

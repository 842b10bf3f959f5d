//! Copies of KV rows: where they go, what is sent, and what comes of them.

use super::*;

/// Ranks with room for so many positions of others each, without chunks.
fn backed(backup_tokens: &[u32]) -> Config {
    let kv = KvPools { block_tokens: 4, full_blocks: 99, chunked_blocks: 0, chunk_tokens: None };
    let mut config = config(&vec![kv; backup_tokens.len()], 512);
    config.backup_tokens = backup_tokens.to_vec();
    config
}

/// `q1 r0 0..6 >r1 0..6`: rank 0 computes positions 0 to 5 of q1, and sends them to rank 1; `<4`: positions 0 to
/// 3 come out of its own copy before.
fn orders(plan: &Plan) -> Vec<String> {
    let slice = |rank: usize, s: &Slice| {
        let end = s.start as usize + s.tokens.len();
        let restored = if s.restored == 0 { String::new() } else { format!(" <{}", s.restored) };
        let backup = s.backup.map(|b| format!(" >{} {}..{}", b.rank, b.start, b.end));
        format!("{} r{rank} {}..{end}{restored}{}", s.sequence, s.start, backup.unwrap_or_default())
    };
    let ranks = plan.ranks.iter().enumerate();
    ranks.flat_map(|(rank, slices)| slices.iter().map(move |s| slice(rank, s))).collect()
}

fn step(scheduler: &mut Scheduler) -> Vec<String> {
    let mut plan = Plan::new();
    assert!(scheduler.plan(StepId(1), &mut plan));
    commit(scheduler, &plan);
    orders(&plan)
}

/// Who is told with the next step to keep what no more.
fn released(scheduler: &mut Scheduler) -> Vec<Vec<u64>> {
    let mut plan = Plan::new();
    assert!(scheduler.plan(StepId(1), &mut plan));
    scheduler.abort();
    plan.released.iter().map(|ids| ids.iter().map(|id| id.0).collect()).collect()
}

fn held(sequence: u64, positions: u32) -> Held {
    Held { sequence: SeqId(sequence), positions, has_gap: false }
}

fn lose(scheduler: Scheduler, config: Config, kept: &[Option<usize>]) -> Scheduler {
    scheduler.reconfigure(config, kept).unwrap()
}

#[test]
fn rows_go_to_another_rank_after_each_step() {
    let mut scheduler = Scheduler::new(backed(&[100, 100])).unwrap();
    scheduler.submit(sequence(1, 6, 9)).unwrap();
    assert_eq!(step(&mut scheduler), ["q1 r0 0..6 >r1 0..6"]);
    assert_eq!(step(&mut scheduler), ["q1 r0 6..7 >r1 6..7"]);
}

#[test]
fn one_rank_alone_keeps_no_copies() {
    let mut scheduler = Scheduler::new(backed(&[100])).unwrap();
    scheduler.submit(sequence(1, 6, 9)).unwrap();
    assert_eq!(step(&mut scheduler), ["q1 r0 0..6"]);
}

#[test]
fn copies_of_a_rank_are_spread_over_all_others() {
    let mut scheduler = Scheduler::new(backed(&[100; 3])).unwrap();
    for id in 0..6 {
        scheduler.submit(sequence(id, 6, 9)).unwrap();
    }
    let keepers = |orders: Vec<String>| -> Vec<String> {
        orders.into_iter().map(|o| o.replace(" 0..6", "")).collect()
    };
    let want = ["q0 r0 >r1", "q3 r0 >r2", "q1 r1 >r0", "q4 r1 >r2", "q2 r2 >r0", "q5 r2 >r1"];
    assert_eq!(keepers(step(&mut scheduler)), want);
}

#[test]
fn sequence_of_a_lost_rank_goes_on_from_its_copy() {
    let mut scheduler = Scheduler::new(backed(&[100; 3])).unwrap();
    for id in 0..3 {
        scheduler.submit(sequence(id, 6, 9)).unwrap();
    }
    step(&mut scheduler);
    // r1 keeps q0; it says what it has a step later.
    scheduler.held([(Rank(1), held(0, 6))]);
    step(&mut scheduler);
    let mut scheduler = lose(scheduler, backed(&[100; 2]), &[Some(1), Some(2)]);
    // Its prompt and 2 tokens; the last position is never in a copy.
    let want = ["q0 r0 6..8 <6", "q1 r0 7..8 >r1 0..8", "q2 r1 7..8 >r0 0..8"];
    assert_eq!(step(&mut scheduler), want);
    // It lives where its copy was, so it needs another one, and that one no more.
    assert_eq!(released(&mut scheduler), [vec![0], vec![]]);
    let want = ["q0 r0 8..9 >r1 0..9", "q1 r0 8..9 >r1 8..9", "q2 r1 8..9 >r0 8..9"];
    assert_eq!(step(&mut scheduler), want);
}

#[test]
fn nobody_knows_more_of_a_copy_than_its_rank_has_said() {
    let mut scheduler = Scheduler::new(backed(&[100; 2])).unwrap();
    scheduler.submit(sequence(1, 6, 9)).unwrap();
    step(&mut scheduler);
    let mut scheduler = lose(scheduler, backed(&[100; 2]), &[None, Some(1)]);
    assert_eq!(step(&mut scheduler), ["q1 r0 0..7 >r1 6..7"]);
}

#[test]
fn copy_ahead_of_the_sequence_leaves_a_position_to_compute() {
    let mut scheduler = Scheduler::new(backed(&[100; 2])).unwrap();
    scheduler.submit(sequence(1, 6, 9)).unwrap();
    step(&mut scheduler);
    // Rows of a step that failed elsewhere.
    scheduler.held([(Rank(1), held(1, 7))]);
    let mut scheduler = lose(scheduler, backed(&[100]), &[Some(1)]);
    assert_eq!(step(&mut scheduler), ["q1 r0 6..7 <6"]);
}

#[test]
fn failed_step_restores_and_sends_again() {
    let mut scheduler = Scheduler::new(backed(&[100; 2])).unwrap();
    scheduler.submit(sequence(1, 6, 9)).unwrap();
    step(&mut scheduler);
    scheduler.held([(Rank(1), held(1, 6))]);
    let mut scheduler = lose(scheduler, backed(&[100; 2]), &[None, Some(1)]);
    let mut plan = Plan::new();
    for _ in 0..2 {
        assert!(scheduler.plan(StepId(1), &mut plan));
        assert_eq!(orders(&plan), ["q1 r1 6..7 <6"]);
        scheduler.abort();
    }
    assert_eq!(step(&mut scheduler), ["q1 r1 6..7 <6"]);
    for _ in 0..2 {
        assert!(scheduler.plan(StepId(1), &mut plan));
        assert_eq!(
            (orders(&plan), &plan.released[1]),
            (vec!["q1 r1 7..8 >r0 0..8".into()], &vec![SeqId(1)])
        );
        scheduler.abort();
    }
}

#[test]
fn copy_that_is_gone_costs_a_prefill() {
    let mut scheduler = Scheduler::new(backed(&[100; 2])).unwrap();
    scheduler.submit(sequence(1, 6, 9)).unwrap();
    step(&mut scheduler);
    scheduler.held([(Rank(1), held(1, 6))]);
    let mut scheduler = lose(scheduler, backed(&[100; 2]), &[None, Some(1)]);
    let mut plan = Plan::new();
    assert!(scheduler.plan(StepId(1), &mut plan));
    scheduler.abort();
    scheduler.unrestore(Rank(1), &[SeqId(1)]);
    assert_eq!(step(&mut scheduler), ["q1 r1 0..7 >r0 0..7"]);
}

#[test]
fn gap_is_sent_again() {
    let mut scheduler = Scheduler::new(backed(&[100; 2])).unwrap();
    scheduler.submit(sequence(1, 6, 9)).unwrap();
    step(&mut scheduler);
    scheduler.held([(Rank(1), held(1, 4))]);
    assert_eq!(step(&mut scheduler), ["q1 r0 6..7 >r1 6..7"], "the rest may be on its way");
    scheduler.held([(Rank(1), Held { sequence: SeqId(1), positions: 4, has_gap: true })]);
    assert_eq!(step(&mut scheduler), ["q1 r0 7..8 >r1 4..8"]);
}

#[test]
fn ranks_speak_of_their_own_copies_only_and_their_last_word_counts() {
    let mut scheduler = Scheduler::new(backed(&[100; 3])).unwrap();
    scheduler.submit(sequence(1, 6, 9)).unwrap();
    scheduler.submit(sequence(2, 6, 9)).unwrap();
    assert_eq!(step(&mut scheduler), ["q1 r0 0..6 >r1 0..6", "q2 r1 0..6 >r0 0..6"]);
    // An old copy of q1, one that nobody knows, and two reports of one rank.
    let said =
        [(2, held(1, 5)), (1, held(1, 3)), (0, held(9, 4)), (1, held(1, 4)), (0, held(2, 2))];
    scheduler.held(said.map(|(rank, held)| (Rank(rank), held)));
    let tokens: Vec<u64> = scheduler.stats().ranks.iter().map(|rank| rank.backup_tokens).collect();
    assert_eq!(tokens, [2, 4, 0]);
}

#[test]
fn prompts_are_sent_over_some_steps_and_those_who_decode_first() {
    let mut scheduler = Scheduler::new(backed(&[999, 999])).unwrap();
    scheduler.submit(NewSequence { prompt: vec![1; 300], ..sequence(1, 1, 9) }).unwrap();
    assert_eq!(step(&mut scheduler), ["q1 r0 0..300 >r1 0..256"]);
    assert_eq!(step(&mut scheduler), ["q1 r0 300..301 >r1 256..301"]);
    assert_eq!(step(&mut scheduler), ["q1 r0 301..302 >r1 301..302"]);
}

#[test]
fn room_for_copies_bounds_them() {
    let mut scheduler = Scheduler::new(backed(&[8, 8])).unwrap();
    scheduler.submit(sequence(1, 6, 9)).unwrap();
    scheduler.submit(sequence(2, 9, 9)).unwrap();
    assert_eq!(step(&mut scheduler), ["q1 r0 0..6 >r1 0..6", "q2 r1 0..9"]);
    step(&mut scheduler);
    assert_eq!(step(&mut scheduler)[0], "q1 r0 7..8 >r1 7..8");
    assert_eq!(step(&mut scheduler)[0], "q1 r0 8..9", "a copy of the beginning is worth something");
    scheduler.held([(Rank(1), held(1, 8))]);
    assert_eq!(scheduler.stats().ranks[1].backup_tokens, 8);
}

#[test]
fn sequence_that_finds_no_room_is_in_nobody_s_way() {
    let mut scheduler = Scheduler::new(backed(&[8, 8])).unwrap();
    scheduler.submit(sequence(1, 9, 9)).unwrap();
    scheduler.submit(sequence(2, 1, 9)).unwrap();
    scheduler.submit(sequence(3, 6, 9)).unwrap();
    assert_eq!(step(&mut scheduler), ["q1 r0 0..9", "q2 r1 0..1 >r0 0..1", "q3 r1 0..6 >r0 0..6"]);
    scheduler.submit(sequence(4, 6, 9)).unwrap();
    assert!(step(&mut scheduler).contains(&"q4 r0 0..6 >r1 0..6".into()));
}

#[test]
fn another_context_releases_all_copies() {
    let mut scheduler = Scheduler::new(backed(&[100, 100])).unwrap();
    scheduler.submit(sequence(1, 6, 9)).unwrap();
    scheduler.submit(sequence(2, 6, 9)).unwrap();
    step(&mut scheduler);
    let shorter = Config { context_tokens: 50, ..backed(&[100, 100]) };
    let mut scheduler = lose(scheduler, shorter, &[Some(1), Some(0)]);
    assert!(!scheduler.has(SeqId(1)));
    scheduler.submit(sequence(3, 6, 9)).unwrap();
    // The ranks have changed places.
    assert_eq!(released(&mut scheduler), [vec![1], vec![2]]);
}

#[test]
fn copies_of_those_that_end_are_released_until_it_is_said() {
    let mut scheduler = Scheduler::new(backed(&[100, 100])).unwrap();
    scheduler.submit(sequence(1, 6, 1)).unwrap();
    scheduler.submit(sequence(2, 6, 9)).unwrap();
    scheduler.submit(sequence(3, 6, 9)).unwrap();
    step(&mut scheduler);
    scheduler.cancel(SeqId(3));
    assert_eq!(released(&mut scheduler), [vec![], vec![1, 3]]);
    assert_eq!(released(&mut scheduler), [vec![], vec![1, 3]]);
    step(&mut scheduler);
    assert_eq!(released(&mut scheduler), [vec![], vec![]]);
}

#[test]
fn of_chunks_only_the_present_one_can_be_copied() {
    let mut config = backed(&[999, 999]);
    for kv in &mut config.pools {
        (kv.chunk_tokens, kv.chunked_blocks, kv.full_blocks) = (Some(200), 99, 200);
    }
    let mut scheduler = Scheduler::new(config.clone()).unwrap();
    scheduler.submit(NewSequence { prompt: vec![1; 390], ..sequence(1, 1, 99) }).unwrap();
    assert_eq!(step(&mut scheduler), ["q1 r0 0..390 >r1 0..256"]);
    assert_eq!(step(&mut scheduler), ["q1 r0 390..391 >r1 256..391"]);
    scheduler.held([(Rank(1), held(1, 391))]);
    let other = lose(scheduler.clone(), config.clone(), &[None, Some(1)]);
    assert_eq!(step(&mut { other }), ["q1 r1 391..392 <391"]);
    // A gap is filled when the rows of the chunk in it are there no more: but for those, whole chunks suffice.
    while step(&mut scheduler) != ["q1 r0 410..411 >r1 410..411"] {}
    scheduler.held([(Rank(1), Held { sequence: SeqId(1), positions: 300, has_gap: true })]);
    assert_eq!(step(&mut scheduler), ["q1 r0 411..412 >r1 300..412"]);
    scheduler.held([(Rank(1), held(1, 350))]);
    let other = lose(scheduler.clone(), config.clone(), &[None, Some(1)]);
    assert_eq!(step(&mut { other })[0], "q1 r1 200..413 <200");
    scheduler.held([(Rank(1), held(1, 412))]);
    let other = lose(scheduler, config, &[None, Some(1)]);
    assert_eq!(step(&mut { other }), ["q1 r1 412..413 <412"]);
}

#[test]
fn copies_need_an_entry_per_rank() {
    let error = Scheduler::new(Config { backup_tokens: vec![1], ..backed(&[1, 1]) }).unwrap_err();
    assert_eq!(error, ConfigError::Backups { entries: 1, ranks: 2 });
}

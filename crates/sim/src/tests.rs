//! Many seeds without a bug, and every planted bug found.

use super::*;

/// Events of a run: about a minute of the cluster's life, with some hundred faults.
const STEPS: u64 = 40_000;

#[test]
fn hundreds_of_seeds_keep_the_laws_and_return_to_service() {
    let mut sum = Report::default();
    for seed in 0..400_u64 {
        let workers = u16::try_from(1 + seed % 8).unwrap();
        let report = run(Options { seed, workers, steps: STEPS });
        let report = report.unwrap_or_else(|failure| panic!("{failure}"));
        sum.faults += report.faults;
        sum.views += report.views;
        sum.streams += report.streams;
        sum.restored += report.restored;
    }
    // The runs were not idle.
    assert!(20_000 < sum.faults && 5_000 < sum.views && 50_000 < sum.streams, "{sum:?}");
    assert!(5_000 < sum.restored, "{sum:?}");
}

#[test]
fn large_clusters_keep_the_laws() {
    for seed in 0..4 {
        // A step of 64 ranks is some 200 events.
        let options = Options { seed, workers: 64, steps: 10 * STEPS };
        run(options).unwrap_or_else(|failure| panic!("{failure}"));
    }
}

#[test]
fn equal_seeds_give_equal_runs() {
    let options = Options { seed: 7, workers: 5, steps: STEPS };
    assert_eq!(run(options), run(options));
}

/// Plants a bug; one of the first seeds must find it, by one of these laws.
#[track_caller]
fn check(bug: Bug, laws: &[&str]) {
    let found = (0..1000).find_map(|seed| {
        let workers = u16::try_from(2 + seed % 6).unwrap();
        run_with(Options { seed, workers, steps: STEPS }, Some(bug)).err()
    });
    let failure = found.unwrap_or_else(|| panic!("nobody found {bug:?}"));
    let is_by = |law: &&str| failure.text.contains(*law);
    assert!(laws.iter().any(is_by), "{failure}");
    let replay = format!("cargo xtask sim --seed {} --workers", failure.options.seed);
    assert!(failure.to_string().contains(&replay));
}

#[test]
fn answers_of_an_old_epoch_that_count_are_found() {
    check(Bug::StaleAnswersCount, &["counts without", "alone it gets"]);
}

#[test]
fn view_that_counts_before_all_are_prepared_is_found() {
    check(Bug::OneAnswerPreparesAll, &["has not prepared it"]);
}

#[test]
fn dropped_replica_is_found() {
    check(Bug::ReplicaDropped, &["copies, not 2"]);
}

#[test]
fn experts_that_were_not_loaded_are_found() {
    check(Bug::NothingLoaded, &["lacks"]);
}

#[test]
fn experts_forgotten_before_the_next_view_are_found() {
    check(Bug::ForgottenEarly, &["lacks"]);
}

#[test]
fn view_of_a_deposed_leader_is_found() {
    check(Bug::DeposedLeaderPrepares, &["than the one that counts"]);
}

#[test]
fn write_of_a_deposed_leader_is_found() {
    check(
        Bug::UnguardedStore,
        &["leader of the past", "was stored after", "than the one that counts"],
    );
}

#[test]
fn journal_without_outputs_is_found() {
    check(Bug::OutputsForgotten, &["alone it gets"]);
}

#[test]
fn memory_of_another_process_is_found() {
    check(Bug::MemoryAssumed, &["alone it gets"]);
}

#[test]
fn copies_with_gaps_are_found() {
    check(Bug::GapsIgnored, &["alone it gets"]);
}

#[test]
fn step_without_some_ranks_is_found() {
    check(Bug::MajorityCommits, &["gets 77", "counts without"]);
}

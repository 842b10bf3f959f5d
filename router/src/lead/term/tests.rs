//! Routers, a store and a worker's memory, as small as they can be: no two routers are ever obeyed at once.

use super::*;

#[track_caller]
fn check(inputs: Vec<Input>, want: &str) {
    let mut machine = Machine::new();
    let outputs: Vec<String> = inputs
        .into_iter()
        .map(|input| {
            let shown = machine.step(input).into_iter().map(|output| match output {
                Output::Show(Lead::Leads { term, since }) => format!("leads {term} since {since}"),
                Output::Show(Lead::StandsBy { leader }) => {
                    format!("by {}", leader.unwrap_or_else(|| "?".into()))
                }
                Output::Claim { above } => format!("claim >{above}"),
            });
            shown.collect::<Vec<_>>().join(", ")
        })
        .collect();
    assert_eq!(outputs.join(" | "), want);
}

fn displaced(leader: &str) -> Input {
    Input::Displaced { leader: Some(leader.into()) }
}

fn claimed(term: u64, before: Option<u64>) -> Input {
    Input::Claimed { term, before }
}

#[test]
fn elected_router_leads_when_it_has_its_term() {
    check(
        vec![displaced("b"), Input::Elected, claimed(7, Some(5))],
        "by b | claim >0 | leads 7 since 7",
    );
}

#[test]
fn leader_that_is_elected_again_goes_on_and_keeps_what_it_knows() {
    check(
        vec![Input::Elected, claimed(7, None), Input::Elected, claimed(9, Some(7))],
        "claim >0 | leads 7 since 7 | claim >7 | leads 9 since 7",
    );
}

#[test]
fn store_without_data_gives_a_higher_term_and_breaks_nothing() {
    check(
        vec![Input::Elected, claimed(700, None), Input::Elected, claimed(701, None)],
        "claim >0 | leads 700 since 700 | claim >700 | leads 701 since 700",
    );
}

#[test]
fn leader_that_missed_another_s_term_knows_nothing_of_the_memory() {
    check(
        vec![Input::Elected, claimed(7, None), Input::Elected, claimed(9, Some(8))],
        "claim >0 | leads 7 since 7 | claim >7 | leads 9 since 9",
    );
}

#[test]
fn refused_leader_is_silent_until_the_store_gives_it_a_higher_term() {
    check(
        vec![Input::Elected, claimed(7, None), Input::Refused { term: 20 }, claimed(21, Some(7))],
        "claim >0 | leads 7 since 7 | by ?, claim >20 | leads 21 since 21",
    );
}

#[test]
fn refused_leader_that_is_none_stands_down_and_a_late_answer_changes_nothing() {
    check(
        vec![
            Input::Elected,
            claimed(7, None),
            Input::Refused { term: 9 },
            displaced("b"),
            claimed(10, Some(9)),
        ],
        "claim >0 | leads 7 since 7 | by ?, claim >9 | by b | ",
    );
}

#[test]
fn old_refusals_and_claims_are_dropped() {
    check(
        vec![
            Input::Elected,
            Input::Refused { term: 30 },
            claimed(7, None),
            claimed(31, Some(7)),
            Input::Refused { term: 30 },
            Input::Refused { term: 31 },
        ],
        "claim >0 | claim >30 |  | leads 31 since 31 |  | ",
    );
}

#[test]
fn refusal_while_it_goes_on_silences_it() {
    check(
        vec![
            Input::Elected,
            claimed(7, None),
            Input::Elected,
            Input::Refused { term: 8 },
            claimed(9, Some(8)),
        ],
        "claim >0 | leads 7 since 7 | claim >7 | by ?, claim >8 | leads 9 since 9",
    );
}

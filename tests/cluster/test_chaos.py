"""Faults at exact places of a step, and on links: no stream is lost, no token changes, and what happened is said."""

import re

import pytest

from chaos import Run
from server import Server

WORKERS = 4


@pytest.fixture(scope="module")
def strikable():
    with Server("--processes", "--allow-chaos", "--sequences", "64") as running:
        yield running


def left_and_came_back(run):
    """How many joined after somebody was lost. Several may be lost in one change, and a fault may be seen first."""
    lost = next((index for index, cause in enumerate(run.causes) if " lost: " in cause), len(run.causes))
    return sum("joined" in cause for cause in run.causes[lost:])


def test_worker_dies_between_its_experts_and_their_results(strikable, tmp_path):
    run = Run(strikable, tmp_path, 'kind = "kill"\nat = { step = 20, layer = 1, phase = "combine" }').check()
    assert left_and_came_back(run) == 1, run.causes


def test_passing_nan_costs_one_step_and_names_the_expert(strikable, tmp_path):
    run = Run(strikable, tmp_path, 'kind = "nan"\nat = { step = 20, layer = 1, phase = "combine" }').check()
    (cause,) = run.causes
    assert re.search(r"a value is not finite: the result of expert \d+ of MoE layer 1 on rank \d, row \d+ of the step", cause), cause


def test_lasting_nan_ends_in_an_explicit_error_and_service_goes_on(strikable, tmp_path):
    run = Run(strikable, tmp_path, f'kind = "nan"\nworkers = {WORKERS}\nafter_s = [0.4, 0.4]\nfor_s = 3')
    assert run.done.returncode == 1
    assert run.report["lost"] > 0 and run.report["different"] == 0
    assert "3 attempts at the next token failed" in run.round["first_error"], run.round["first_error"]
    broken = {i["id"] for i in run.report["invariants"] if not i["held"]}
    assert broken == {"I7"}, "the streams failed; nothing else broke"
    (tmp_path / "after").mkdir()
    Run(strikable, tmp_path / "after", 'kind = "pause"\nms = 1\nafter_s = [0.3, 0.3]').check()


@pytest.mark.parametrize("phase", ["dispatch", "combine"])
def test_changed_frame_is_noticed_and_its_step_runs_again(strikable, tmp_path, phase):
    run = Run(strikable, tmp_path, f'kind = "corrupt"\nat = {{ step = 20, layer = 1, phase = "{phase}" }}').check()
    (cause,) = run.causes
    assert f"changed on their way in {phase} of MoE layer 1" in cause, cause


def test_slow_worker_is_waited_for(strikable, tmp_path):
    run = Run(strikable, tmp_path, 'kind = "slow"\nms = 150\nfor_s = 1\nat = { step = 20, layer = 0, phase = "experts" }').check()
    assert run.causes == []
    assert run.round["stall_p50_s"] > 0.15


def test_worker_that_stands_still_but_answers_is_waited_for(strikable, tmp_path):
    run = Run(strikable, tmp_path, 'kind = "pause"\nms = 1200\nat = { step = 20, layer = 1, phase = "experts" }').check()
    assert run.causes == []
    assert run.round["stall_p50_s"] > 1.2


def test_late_links_slow_down_and_nothing_else(strikable, tmp_path):
    run = Run(strikable, tmp_path, 'kind = "delay"\nms = 10\nfor_s = 1\nafter_s = [0.4, 0.4]').check()
    assert run.causes == []
    # A step crosses the links of the worker twice in each of the MoE layers, and to the router and back.
    assert run.round["stall_p50_s"] > run.report["in_peace"]["stall_p50_s"] + 0.03


def test_ended_connections_come_back(strikable, tmp_path):
    run = Run(strikable, tmp_path, 'kind = "drop"\nfor_s = 0.5\nafter_s = [0.4, 0.4]').check()
    assert left_and_came_back(run) == 1, run.causes


@pytest.mark.parametrize("way", ["to", "from"])
def test_worker_that_is_cut_off_one_way_is_left_behind_and_comes_back(strikable, tmp_path, way):
    run = Run(strikable, tmp_path, f'kind = "partition"\nway = "{way}"\nfor_s = 4\nafter_s = [0.4, 0.4]').check()
    assert left_and_came_back(run) == 1, run.causes


def test_two_workers_are_cut_off_together_and_come_back(strikable, tmp_path):
    run = Run(strikable, tmp_path, 'kind = "partition"\nworkers = 2\nfor_s = 2\nafter_s = [0.4, 0.4]').check()
    assert len(run.round["faults"]) == 2
    assert left_and_came_back(run) == 2, run.causes


def test_two_workers_die_at_once(strikable, tmp_path):
    run = Run(strikable, tmp_path, 'kind = "kill"\nworkers = 2\nafter_s = [0.4, 0.4]').check()
    assert len({fault["pid"] for fault in run.round["faults"]}) == 2
    assert left_and_came_back(run) == 2, run.causes


def test_cluster_that_was_not_started_for_it_takes_no_faults(cluster, tmp_path):
    run = Run(cluster, tmp_path, 'kind = "nan"\nafter_s = [0.1, 0.1]', with_links=False)
    assert run.done.returncode == 1
    assert "does not take the fault: PermissionDenied" in run.done.stderr and "--allow-chaos" in run.done.stderr
    run = Run(cluster, tmp_path, 'kind = "partition"\nfor_s = 1\nafter_s = [0.1, 0.1]', with_links=False)
    assert run.done.returncode == 1
    assert "the links are unknown" in run.done.stderr and "--allow-chaos" in run.done.stderr


def test_scenario_that_makes_no_sense_is_bad_input(cluster, tmp_path):
    run = Run(cluster, tmp_path, 'kind = "slow"\nms = 5\nfor_s = 1\nafter_s = [0, 0]', with_links=False)
    assert run.done.returncode == 2
    assert "a slow needs a layer and a phase" in run.done.stderr

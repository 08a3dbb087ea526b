"""A search with a limit ends with the best plan measured by then, and goes on later as if it had never ended."""

import json
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

import coopq
from coopq import Goal, Request
from coopq.core.errors import EstimationError, OptionError, OutputError
from coopq.core.goal import Limit, Stopped
from coopq.core.types import ProgressCallback
from coopq.game.journal import Journal
from coopq.plan.confidence import confidence, selected_confidence
from coopq.plan.plan import load_plans
from tests.command_line import command

GOAL = Goal(budget="2.9avg")


@pytest.fixture
def request_(stories: str) -> Request:
    return Request.from_options(
        model=stories, granularity="fused", tokens=256, sequence_length=128, bits=(2, 3, 4, 8), loss="kl"
    )


class Interrupted(Exception):
    pass


def interrupt_after(n: int) -> ProgressCallback:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage.startswith("searching") and done >= n:
            raise Interrupted

    return interrupt


def test_a_limit_counts_from_its_beginning() -> None:
    limit = Limit(forwards=10)
    limit.spend(12)  # the first plan is measured in any case
    limit.begin()
    with pytest.raises(Stopped):
        limit.spend(1)
    assert limit.is_reached
    assert limit.text == "10 forwards"
    hurried = Limit(minutes=0)
    hurried.check_time()
    hurried.begin()
    with pytest.raises(Stopped):
        hurried.check_time()


@pytest.mark.parametrize("limited", [replace(GOAL, forwards=25), replace(GOAL, minutes=0)])
def test_a_stopped_search_has_a_plan_and_goes_on_later(limited: Goal, request_: Request, tmp_path: Path) -> None:
    whole = coopq.quantize(request_, GOAL, tmp_path / "whole")
    run = tmp_path / "run"
    stopped = coopq.quantize(request_, limited, tmp_path / "stopped", run=run)
    assert whole.stopped_after is None
    assert stopped.stopped_after == ("25 forwards" if limited.forwards else "0 minutes")
    assert stopped.measured_loss is not None
    assert whole.measured_loss is not None
    assert stopped.measured_loss >= whole.measured_loss
    assert stopped.block_forwards < whole.block_forwards
    if limited.forwards:
        assert stopped.block_forwards <= 25 * 5
    assert coopq.quantize(request_, limited, tmp_path / "stopped", run=run) == stopped, "a finished job is not repeated"
    with pytest.raises(OutputError, match="another limit"):
        coopq.quantize(request_, GOAL, tmp_path / "stopped", run=run)
    later = coopq.quantize(request_, GOAL, tmp_path / "later", run=run)
    assert later == whole


def test_an_interrupted_search_is_finished_with_what_it_measured(request_: Request, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        coopq.quantize(request_, GOAL, tmp_path / "out", run=run, progress=interrupt_after(12))
    (so_far,) = load_plans(list((run / "plans").glob("*.json")))
    (assignments, losses), _ = Journal.peek(run / "journal.jsonl")
    finished = coopq.quantize(request_, replace(GOAL, minutes=0), tmp_path / "out", run=run)
    assert finished.measured_loss is not None
    assert finished.measured_loss <= losses[(assignments == so_far.assignment).all(axis=1)][0]
    assert so_far.method == "active"
    assert min(player.score for player in so_far.players) > 0, "what lowering each player costs, not what is gained"
    sizes = [row for row in assignments.tolist() if row == finished.assignment]
    assert sizes, "nothing new is measured"
    assert len(Journal.peek(run / "journal.jsonl")[0][1]) == len(losses)


def test_limits_that_cannot_hold_are_refused(request_: Request, tmp_path: Path) -> None:
    with pytest.raises(EstimationError, match="cannot answer before its end"):
        coopq.quantize(request_, replace(GOAL, method="greedy-down", minutes=1), tmp_path / "out")
    with pytest.raises(OptionError, match="forwards = 0"):
        replace(GOAL, forwards=0)
    with pytest.raises(OptionError, match="minutes = -1"):
        replace(GOAL, minutes=-1)


def test_the_smallest_size_can_be_stopped_too(request_: Request, tmp_path: Path) -> None:
    plan = coopq.quantize(request_, Goal(max_loss=0.5, forwards=20), tmp_path / "out")
    assert plan.stopped_after == "20 forwards"
    assert plan.measured_loss is not None
    assert plan.measured_loss <= 0.5


def test_a_stopped_search_of_the_smallest_size_uses_its_last_round_too(request_: Request, tmp_path: Path) -> None:
    run, goal = tmp_path / "run", Goal(max_loss=0.2)
    with pytest.raises(Interrupted):
        coopq.quantize(request_, goal, tmp_path / "out", run=run, progress=interrupt_after(6))
    (assignments, losses), _ = Journal.peek(run / "journal.jsonl")
    finished = coopq.quantize(request_, replace(goal, minutes=0), tmp_path / "out", run=run)
    sizes = [
        sum(player.n_bytes[str(round(bits))] for player, bits in zip(finished.players, row, strict=True))
        for row in assignments[losses <= 0.2]
    ]
    assert finished.bytes == min(sizes)


def test_the_command_says_that_it_stopped(stories: str, tmp_path: Path) -> None:
    arguments = ["quantize", stories, "--budget", "3avg", "--tokens", "256", "--sequence-length", "128"]
    code, out, err = command(*arguments, "--forwards", "15", "--out", tmp_path / "out")
    assert code == 0, err
    assert "the search stopped after 15 forwards" in out
    code, out, err = command(*arguments, "--forwards", "15", "--out", tmp_path / "out", "--json")
    assert json.loads(out)["stopped_after"] == "15 forwards"


def test_selection_is_taken_from_the_difference() -> None:
    """Two hundred points that are all the same: the best looks better than the rest, and is not."""
    rng, plain, corrected = np.random.default_rng(0), [], []
    differs = ~np.eye(200, dtype=bool)
    differs[:, :100] &= False  # rivals are the second hundred
    for _ in range(30):
        losses = rng.normal(size=(200, 16))
        best = int(losses[:100].mean(axis=1).argmin())
        points = np.concatenate([losses[[best]], np.delete(losses, best, axis=0)])
        sure, runner_up = selected_confidence(points, 0, differs, is_best=False)
        assert runner_up is not None
        fresh = confidence(points[0], points[runner_up]).difference
        assert fresh is not None
        assert sure.difference is not None
        plain.append(fresh)
        corrected.append(sure.difference)
    assert np.mean(corrected) > np.mean(plain) + 0.1, "the rival was selected, and looks too good"
    better = rng.normal(size=(200, 16))
    sure, _ = selected_confidence(better[better.mean(axis=1).argsort()], 0, ~np.eye(200, dtype=bool), is_best=True)
    assert sure.probability is not None
    assert sure.probability < 0.9, "the best of two hundred alike is no better than the next"

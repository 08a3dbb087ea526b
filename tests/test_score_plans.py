"""Plans by one-layer scores: the best that the budget allows, and scores are computed once."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import coopq
from coopq.core.errors import EstimationError
from coopq.core.goal import Goal
from coopq.core.sizes import Budget, Sizes
from coopq.core.specs import Request, SolverSpec
from coopq.core.subject import Subject
from coopq.core.types import LinearLayer, Player
from coopq.plan.allocate import choose_by_gains, make_plan, search_space
from coopq.plan.estimation import Spent
from coopq.plan.methods import get_method, names
from coopq.plan.plan import Plan
from coopq.plan.scores import Gains, gains_of_ranking


def subject(n_weights: list[int]) -> Subject:
    players = tuple(Player(f"p{i}", (LinearLayer(f"p{i}.x", (1, n)),), i) for i, n in enumerate(n_weights))
    sizes = Sizes(tuple(n_weights), {2: tuple(2 * n for n in n_weights), 4: tuple(4 * n for n in n_weights)})
    return Subject(Request.from_options(model="toy"), players, sizes, {})


def plan_by_gains(toy: Subject, method: str, gains: Gains, budget: str) -> Plan:
    parsed, spent = Budget.parse(budget), Spent(5, 5)
    space = search_space(toy, [parsed])
    choice = choose_by_gains(space, space.capacities[0], method, gains, None, spent, SolverSpec())
    return make_plan(toy, parsed, choice)


def test_players_of_equal_size_are_taken_by_rank() -> None:
    gains = gains_of_ranking(np.array([-0.9, -0.2, -0.5, -0.7, -0.3]), np.ones(5))
    plan = plan_by_gains(subject([5] * 5), "lim", gains, "3.2avg")
    assert plan.assignment == [2, 4, 4, 2, 4]
    assert plan.predicted_loss is None
    assert plan_by_gains(subject([5] * 5), "lim", gains, "4avg").assignment == [4] * 5, "what fits is used"


@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(-1, 1)), min_size=2, max_size=8),
    st.integers(20, 40).map(lambda x: x / 10),
)
@settings(max_examples=50)
def test_players_of_unequal_size_are_an_exact_knapsack(players: list[tuple[int, float]], bits: float) -> None:
    n_weights, gains = [n for n, _ in players], np.array([gain for _, gain in players])
    toy = subject(n_weights)
    plan = plan_by_gains(toy, "llm-mq", gains, f"{bits}avg")
    best = max(
        float(gains @ np.array(raised))
        for raised in product([0, 1], repeat=len(n_weights))
        if toy.sizes.total_bytes([4 if r else 2 for r in raised]) <= plan.budget_bytes
    )
    assert plan.bytes <= plan.budget_bytes
    assert gains @ (np.array(plan.assignment) == 4) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("method", names(kind="score"))
def test_every_score_does_the_main_job(method: str, stories: str, tmp_path: Path) -> None:
    request = Request.from_options(model=stories, tokens=128, sequence_length=64)
    plan = coopq.quantize(request, Goal(budget="3avg", method=method), tmp_path / "out")
    assert plan.method == coopq.Plan.load(tmp_path / "out" / "plan.json").method == method
    assert plan.bytes <= plan.budget_bytes
    assert plan.measured_loss is not None
    assert len(set(plan.assignment)) == 2


@pytest.mark.parametrize("method", ["lim", "fisher"])
def test_scores_are_kept_in_the_run_folder(
    method: str, stories: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request.from_options(model=stories, tokens=128, sequence_length=64)
    plan = coopq.quantize(request, Goal(budget="3avg", method=method), tmp_path / "out")

    def not_again(*_: object) -> None:
        raise AssertionError("the scores are kept in the run folder")

    monkeypatch.setattr("coopq.plan.by_score.score", not_again)
    goal = Goal(budget="3.5avg", method=method)
    again = coopq.quantize(request, goal, tmp_path / "other", run=tmp_path / "out-run")
    assert [p.score for p in again.players] == [p.score for p in plan.players]


def test_an_unknown_method_gets_a_hint() -> None:
    with pytest.raises(EstimationError, match="method 'lmi' is unknown; did you mean 'lim'"):
        get_method("lmi")

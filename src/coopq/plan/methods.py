"""Every way from a budget to a plan, by name, on an open workbench: by walks, by scores, by searches."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from coopq.core.errors import EstimationError, hint
from coopq.search.strategies.exhaustive import check_enumerable
from coopq.plan.confidence import Evidence
from coopq.plan.by_score import SCORES, plans_by_score
from coopq.plan.by_search import SEARCHES, begin_with_nothing, plans_by_search, smallest_on
from coopq.plan.by_walks import estimate_on, plans_by_walks
from coopq.plan.plan import WALK_METHODS, Plan
from coopq.core.sizes import Budget
from coopq.core.types import Player
from coopq.game.session import Workbench

__all__ = [
    "METHODS",
    "OF_TWO_WIDTHS",
    "SEARCHES",
    "SHRUNK",
    "UNPROVEN",
    "begin_with_nothing",
    "check_method",
    "check_players",
    "estimate_on",
    "measure",
    "plans_on",
    "smallest_on",
]
SHRUNK = ("coopq", "pruning")
"""Methods that solve the paper's program, with its alpha."""
OF_TWO_WIDTHS = (*WALK_METHODS, "cross-layer")
"""Methods whose sources know a lower and a higher width; all others choose among any number."""
UNPROVEN = (*SEARCHES, "interactions", "fisher")
"""Methods whose programs are not solved to proof: their optimum is not the point, or nobody would wait for it."""
METHODS = (*SEARCHES, *WALK_METHODS, *SCORES)


def check_method(method: str) -> None:
    """Check a method's name before anything expensive.

    Raises:
        EstimationError: If it is unknown.
    """
    if method not in METHODS:
        raise EstimationError(f"method {method!r} is unknown; {hint(method, METHODS)}")


def check_players(methods: Sequence[str], players: Sequence[Player], n_widths: int) -> None:
    """Check that methods can do with players and widths, before any weights are quantized.

    Raises:
        EstimationError: If there are too many to enumerate, blocks cannot be removed whole, or a method knows only two
            widths.
    """
    of_two = [method for method in methods if method in OF_TWO_WIDTHS]
    if of_two and n_widths > 2:
        raise EstimationError(
            f"method {of_two[0]!r} is of two widths, and {n_widths} are given; take two, or another method: 'active'"
        )
    scores = [method for method in methods if method in SCORES]
    if scores and any(player.is_end for player in players):
        raise EstimationError(
            f"method {scores[0]!r} scores layers in blocks, not embeddings; take a search, or leave --embeddings out"
        )
    if "exact" in methods:
        check_enumerable(len(players), n_widths)
    if "pruning" in methods and len({player.block for player in players}) < len(players):
        raise EstimationError("pruning removes whole blocks; leave out --granularity, or take another method")


def plans_on(
    bench: Workbench,
    method: str,
    budgets: Sequence[Budget],
    *,
    alpha: float = 0.5,
    time_limit: float | None = None,
) -> list[Plan]:
    """The plans of budgets by a method; a search takes all budgets at once and shares what it measures."""
    check_method(method)
    if method in SEARCHES:
        return plans_by_search(bench, method, budgets, time_limit)
    if method in SCORES:
        return plans_by_score(bench, method, budgets, time_limit)
    return plans_by_walks(bench, method, budgets, alpha, time_limit)


def measure(bench: Workbench, plan: Plan) -> Plan:
    """The plan with its loss on the calibration set truly measured, and the evidence for it; kept in the run folder."""
    points = np.array([plan.assignment, plan.runner_up or plan.assignment], dtype=np.float32)
    with bench.calibration_game("measuring the plan") as game:
        chosen, runner_up = game.per_sequence(points)
    evidence = Evidence.of(chosen, None if plan.runner_up is None else runner_up)
    plan = dataclasses.replace(plan, measured_loss=float(chosen.mean()), evidence=evidence)
    bench.folder.plans.mkdir(exist_ok=True)
    plan.save(bench.folder.plans / plan.file_name)
    return plan

"""Plans by permutation walks: the paper's way, and other readings of the same walks."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from coopq.game.prefix_engine import prefix_tree_size
from coopq.search import SPQE, Measured, run_estimator
from coopq.plan.plan import Plan, plan_budget, plan_gains, plan_search, setting_of
from coopq.search.solver.quadratic_program import local_optima
from coopq.core.config import Estimation
from coopq.core.sizes import Budget
from coopq.search.surrogate import best_surrogate
from coopq.core.types import REMOVED, UNTOUCHED, Width, as_widths
from coopq.game.session import Workbench


def plans_by_walks(
    bench: Workbench, method: str, budgets: Sequence[Budget], alpha: float, time_limit: float | None
) -> list[Plan]:
    """Plans by permutation walks: the paper's way, and other readings of the same walks."""
    estimation = _pruning_on(bench) if method == "pruning" else estimate_on(bench)
    setting = setting_of(bench, budgets)
    walked = Measured(setting)
    if method != "pruning":
        points = _spqe(bench).points
        with bench.calibration_game("measuring the walks") as game:
            walked.add(points, game(points))
    spent: dict[str, Any] = {
        "layer_forwards": estimation.layer_forwards,
        "layer_forwards_unshared": estimation.layer_forwards_unshared,
        "time_limit": time_limit,
    }
    plans = []
    for budget, capacity in zip(bench.each(f"solving the program, {method}", budgets), setting.capacities, strict=True):
        best = [tuple(as_widths(row)) for row in setting.assignments(walked.best(capacity, 2))]
        if method == "shapley":
            plan = plan_gains(bench, method, estimation.estimate.shapley, budget, **spent)
        elif method == "interactions":
            program = best_surrogate(walked.surrogates(capacity)).program(setting.program(capacity))
            optima = local_optima(program, walked.best(capacity, 3), 100, np.random.default_rng([setting.seed, 0]))
            chosen = setting.assignments(optima[0])
            plan = plan_search(bench, method, chosen, budget, measured=walked, runner_up=None, **spent)
        else:
            plan = plan_budget(estimation, budget, method=method, alpha=alpha, time_limit=time_limit)
        others = [row for row in best if row != tuple(plan.assignment)]
        plans.append(dataclasses.replace(plan, runner_up=others[0] if others else None))
    return plans


def estimate_on(bench: Workbench) -> Estimation:
    """`coopq.estimate` on an open workbench."""
    estimation = _estimation(bench, _spqe(bench))
    bench.folder.save(estimation)
    return estimation


def _pruning_on(bench: Workbench) -> Estimation:
    """The same from walks that remove players instead of lowering them: the paper's ablation."""
    return _estimation(bench, _spqe(bench, low=REMOVED, high=UNTOUCHED))


def _spqe(bench: Workbench, low: Width | None = None, high: Width | None = None) -> SPQE:
    config = bench.config
    return SPQE(
        len(bench.players),
        low=config.low if low is None else low,
        high=config.high if high is None else high,
        permutations=config.permutations,
        seed=config.seed,
    )


def _estimation(bench: Workbench, estimator: SPQE) -> Estimation:
    config, n_players, blocks = bench.config, len(bench.players), [player.block for player in bench.players]
    with bench.calibration_game("measuring the walks") as game:
        result = run_estimator(estimator, game).estimate()
    return Estimation(
        config=config,
        players=bench.players,
        storage=bench.storage,
        estimate=result,
        fingerprint=bench.fingerprint,
        layer_forwards=prefix_tree_size(estimator.points, blocks),
        layer_forwards_unshared=config.permutations * n_players * len(set(blocks)),
    )

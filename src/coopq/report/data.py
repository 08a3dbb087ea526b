"""Plans, runs, comparisons and benches as plain data for machines."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from coopq.core.specs import Request
from coopq.export.formats import FORMS
from coopq.judge.results import Comparison, Evaluation
from coopq.plan.allocate import search_space
from coopq.plan.estimation import Estimation
from coopq.plan.methods import METHODS
from coopq.plan.plan import Plan
from coopq.search import Known, Measured

if TYPE_CHECKING:  # these import torch
    from coopq.judge.bench.results import Result
    from coopq.judge.engines.engine_check import Delivery
    from coopq.plan.forecast import Forecast


def plan_data(plan: Plan) -> dict[str, Any]:
    """A plan: `bits` by player, `block_forwards`, sizes and losses.

    Plans of the method coopq have `shapley` and `stderr` by player, plans of other methods `scores`. Plans that solve
    a program have its `status` and `gap`; those of searches have None there.
    """
    scores = {player.name: player.score for player in plan.players}
    errors = {player.name: player.stderr for player in plan.players}
    return {
        "method": plan.method,
        "bits": {player.name: player.bits for player in plan.players},
        **({"shapley": scores, "stderr": errors} if plan.method == "coopq" else {"scores": scores}),
        "status": plan.solver and plan.solver.status,
        "gap": plan.solver and plan.solver.gap,
        "block_forwards": plan.block_forwards,
        "block_forwards_unshared": plan.block_forwards_unshared,
        "budget": plan.budget,
        "file_bytes": plan.file_bytes,
        "bytes": plan.bytes,
        "source_bytes": plan.source_bytes,
        "average_bits": plan.average_bits,
        "bits_per_weight": plan.bits_per_weight,
        "covered": plan.covered,
        "source_notes": list(plan.source_notes),
        "loss": plan.request.search.loss,
        "predicted_loss": plan.predicted_loss,
        "measured_loss": plan.measured_loss,
        "saved_loss": plan.saved_loss,
        "max_loss": plan.max_loss,
        "stopped_after": plan.stopped_after,
        "runner_up": None if plan.runner_up is None else dict(zip(scores, plan.runner_up, strict=True)),
        "confidence": msgspec.to_builtins(plan.confidence),
        "fidelity": msgspec.to_builtins(plan.fidelity),
        "deployment": msgspec.to_builtins(plan.deployment),
    }


def delivery_data(made: "Delivery") -> dict[str, Any]:
    """What was made for an engine: the plan, `out`, the engine's `check`, and how to `run` it."""
    return plan_data(made.plan) | {
        "out": str(made.out),
        "check": made.check and asdict(made.check),
        "run": made.run,
    }


def run_data(
    estimation: Estimation | None, plans: Sequence[Plan], block_forwards: int, measured: Known
) -> dict[str, Any]:
    """A run: `bits`, `status`, `gap` and `confidence` by plan, the estimation, and the work.

    Args:
        estimation: The finished estimation, if there is one.
        plans: The plans of the run.
        block_forwards: Block forwards truly spent, those of comparisons included.
        measured: Everything measured on the calibration set.
    """
    data: dict[str, Any] = {
        "bits": {plan.label: {player.name: player.bits for player in plan.players} for plan in plans},
        "status": {plan.label: plan.solver and plan.solver.status for plan in plans},
        "gap": {plan.label: plan.solver and plan.solver.gap for plan in plans},
        "measured_loss": {plan.label: plan.measured_loss for plan in plans},
        "confidence": {plan.label: msgspec.to_builtins(plan.confidence) for plan in plans},
        "block_forwards": block_forwards,
    }
    if estimation is None:
        return data
    names = [player.name for player in estimation.players]
    return data | {
        "shapley": dict(zip(names, estimation.estimate.shapley.tolist(), strict=True)),
        "stderr": dict(zip(names, estimation.estimate.stderr.tolist(), strict=True)),
        "block_forwards_walks": estimation.spent.block_forwards,
        "block_forwards_unshared": estimation.spent.unshared,
        "permutations": estimation.estimate.permutations,
        "covariance_correlation": covariance_correlation(estimation, measured),
    }


def covariance_correlation(estimation: Estimation, measured: Known) -> float | None:
    """Correlation of the covariance of the walks with pair terms fitted to everything measured; None if undefined.

    The paper's program takes that covariance for interactions.
    """
    space = search_space(estimation)
    points = Measured(space)
    points.add(*measured)
    if len(points) < 2 or space.n_steps < 3:
        return None
    fitted = points.surrogates(int(space.step_bytes.sum()) // 2)[0].K
    above = np.triu_indices(space.n_steps, 1)
    pairs = np.array([fitted[above], estimation.estimate.covariance[above]])
    if (np.ptp(pairs, axis=1) == 0).any():
        return None
    return float(np.corrcoef(pairs)[0, 1])


def forecast_data(expected: "Forecast") -> dict[str, Any]:
    """A forecast, in seconds and bytes."""
    data = asdict(expected)
    for name, work in expected.methods.items():
        data["methods"][name] |= {"seconds": expected.seconds(work), "flops": expected.flops(work)}
    return data


def evaluation_data(evaluation: Evaluation, rows: Sequence[Comparison] = ()) -> dict[str, Any]:
    """An evaluation: `nll`, `perplexity`, `tokens`, `bytes`, and the `comparison` if there are rows."""
    data = {**asdict(evaluation), "perplexity": evaluation.perplexity}
    return data | {"comparison": [asdict(row) for row in rows]} if rows else data


def comparison_data(request: Request, text: str, rows: Sequence[Comparison]) -> dict[str, Any]:
    """A comparison: what was asked for, the judging text, and the rows."""
    return {"request": msgspec.to_builtins(request), "text": text, "comparison": [asdict(row) for row in rows]}


def bench_data(files: Sequence[Path], results: "Sequence[Result]") -> dict[str, Any]:
    """A bench: the files of its report, and the results."""
    return {"files": [str(file) for file in files], "results": msgspec.to_builtins(results)}


def methods_data() -> list[dict[str, Any]]:
    """All methods: name, kind, summary and cost, with the limits of each."""
    shown = ("name", "kind", "summary", "cost", "most_widths", "whole_blocks", "is_in_paper", "is_compared")
    return [{field: getattr(method, field) for field in shown} for method in METHODS.values()]


def targets_data() -> list[dict[str, Any]]:
    """All forms that models are exported to: name, engine, summary, backends, and whether the form takes a base."""
    shown = ("engine", "summary", "backends", "takes_base")
    return [{"name": name, **{field: getattr(form, field) for field in shown}} for name, form in FORMS.items()]

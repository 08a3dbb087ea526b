"""Plans, runs and comparisons as tables for people and as plain data for machines."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from coopq.search import Known, Measured
from coopq.plan.allocate import search_space
from coopq.plan.plan import WALK_METHODS, Plan
from coopq.core.config import Estimation, RunConfig
from coopq.judge.results import Accuracy, Comparison, Evaluation
from coopq.core.types import Width

if TYPE_CHECKING:  # it imports torch
    from coopq.plan.forecast import Forecast

_MOST_COLUMNS = 8
_LOSS_NAMES = {"nll": "calibration loss", "kl": "divergence from full precision on the calibration text"}
_SHAPLEY = "Shapley value: loss increase by lowering the player, nats per token, ± standard error"


def plan_data(plan: Plan) -> dict[str, Any]:
    """A plan for machines: `bits` by player, `status`, `gap`, `layer_forwards` and sizes.

    Plans of the method coopq have `shapley` and `stderr` by player, those of baselines `scores`.
    """
    scores = {player.name: player.score for player in plan.players}
    errors = {player.name: player.stderr for player in plan.players}
    return {
        "method": plan.method,
        "bits": {player.name: player.bits for player in plan.players},
        **({"shapley": scores, "stderr": errors} if plan.method == "coopq" else {"scores": scores}),
        "status": plan.solver.status,
        "gap": plan.solver.gap,
        "layer_forwards": plan.layer_forwards,
        "layer_forwards_unshared": plan.layer_forwards_unshared,
        "budget": plan.budget,
        "bytes": plan.bytes,
        "average_bits": plan.average_bits,
        "bits_per_weight": plan.bits_per_weight,
        "predicted_loss": plan.predicted_loss,
        "measured_loss": plan.measured_loss,
        "saved_loss": plan.saved_loss,
        "max_loss": plan.max_loss,
        "runner_up": None if plan.runner_up is None else dict(zip(scores, plan.runner_up, strict=True)),
        "evidence": None if plan.evidence is None else asdict(plan.evidence),
        "fidelity": None if plan.fidelity is None else asdict(plan.fidelity),
        "deployment": plan.deployment,
    }


def run_data(
    estimation: Estimation | None, plans: Sequence[Plan], layer_forwards: int, measured: Known
) -> dict[str, Any]:
    """A run for machines; `bits`, `status`, `gap` and `evidence` by plan, `layer_forwards` as truly spent."""
    data: dict[str, Any] = {
        "bits": {plan.label: {player.name: player.bits for player in plan.players} for plan in plans},
        "status": {plan.label: plan.solver.status for plan in plans},
        "gap": {plan.label: plan.solver.gap for plan in plans},
        "measured_loss": {plan.label: plan.measured_loss for plan in plans},
        "evidence": {plan.label: None if plan.evidence is None else asdict(plan.evidence) for plan in plans},
        "layer_forwards": layer_forwards,
    }
    if estimation is None:
        return data
    names = [player.name for player in estimation.players]
    return data | {
        "shapley": dict(zip(names, estimation.estimate.shapley.tolist(), strict=True)),
        "stderr": dict(zip(names, estimation.estimate.stderr.tolist(), strict=True)),
        "layer_forwards_walks": estimation.layer_forwards,
        "layer_forwards_unshared": estimation.layer_forwards_unshared,
        "permutations": estimation.estimate.permutations,
        "covariance_correlation": covariance_correlation(estimation, measured),
    }


def forecast_data(expected: "Forecast") -> dict[str, Any]:
    """A forecast for machines; seconds and bytes."""
    data = asdict(expected)
    for name, work in expected.methods.items():
        data["methods"][name] |= {"seconds": expected.seconds(work), "flops": expected.flops(work)}
    return data


def show_forecast(expected: "Forecast") -> RenderableType:
    """A forecast for people."""
    table = Table("method, one budget", "layer forwards", "losses", "TFLOP", "time")
    for name, work in expected.methods.items():
        most = "up to " if work.is_bound else ""
        table.add_row(
            name,
            f"{most}{work.layer_forwards:,}",
            f"{most}{work.evaluations:,}",
            f"{expected.flops(work) / 1e12:,.1f}",
            f"{most}{timedelta(seconds=round(expected.seconds(work)))}",
        )
    rate = expected.layer_flops / expected.layer_forward / 1e9
    text = (
        f"{expected.n_players} players in {expected.n_blocks} blocks, {expected.tokens} calibration tokens\n"
        f"a layer forward takes {expected.layer_forward * 1e3:.1f} ms ({rate:,.0f} GFLOP/s), a head "
        f"{expected.head * 1e3:.1f} ms: measured here, now\n{expected.footprint}"
    )
    return Group(text, table)


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
    ours, theirs = fitted[above], estimation.estimate.covariance[above]
    if np.ptp(ours) == 0 or np.ptp(theirs) == 0:
        return None
    return float(np.corrcoef(np.array([ours, theirs]))[0, 1])


def evaluation_data(evaluation: Evaluation, rows: Sequence[Comparison] = ()) -> dict[str, Any]:
    """An evaluation for machines: `nll`, `perplexity`, `tokens`, `bytes` and the comparison."""
    data = {**asdict(evaluation), "perplexity": evaluation.perplexity}
    return data | {"comparison": [asdict(row) for row in rows]} if rows else data


def plan_summary(plan: Plan) -> str:
    """Sizes, losses and proof of a plan, and how sure the choice is, in two to four lines."""
    deployed = f"; deployed by {plan.deployment['name']}, not by what was measured" if plan.deployment else ""
    measured = "not measured" if plan.measured_loss is None else f"{plan.measured_loss:.4f} measured"
    loss = plan.config.get("loss", "nll")
    if plan.saved_loss is not None:  # always a likelihood
        what = "" if loss == "nll" else "negative log-likelihood "
        measured += f" on the bank's weights, {what}{plan.saved_loss:.4f} on the saved model's"
    predicted = "" if plan.predicted_loss is None else f"{plan.predicted_loss:.4f} predicted, "
    return (
        f"budget {plan.budget} by {plan.method}: {plan.bytes / 2**20:.2f} MiB of {plan.budget_bytes / 2**20:.2f} MiB, "
        f"{plan.average_bits:.3f} average bits, {plan.bits_per_weight:.3f} bits per weight\n"
        f"{_LOSS_NAMES[loss]} {predicted}{measured} (nats per token)"
        f"{'' if plan.fidelity else f'; solver: {_proof(plan)}'}{deployed}{_evidence(plan)}{_fidelity(plan)}"
    )


def _proof(plan: Plan) -> str:
    """How well the program of a plan is solved."""
    return f"{plan.solver.status}, gap {plan.solver.gap:.2%}"


def _evidence(plan: Plan) -> str:
    """How sure the choice is, in a line of its own."""
    evidence = plan.evidence
    if evidence is None or evidence.difference is None or evidence.interval is None or evidence.probability is None:
        return ""
    low, high = evidence.interval
    if evidence.difference < 0:
        return (
            f"\nan assignment measured on the way is BETTER by {-evidence.difference:.4f} "
            f"(95 % {-high:.4f} to {-low:.4f}, paired bootstrap over sequences); the method chooses without looking"
        )
    return (
        f"\nthe runner-up measured is worse by {evidence.difference:.4f} (95 % {low:.4f} to {high:.4f}, paired "
        f"bootstrap over sequences); probability of the choice being better {evidence.probability:.0%}"
    )


def _fidelity(plan: Plan) -> str:
    """How far the surrogate is to be trusted, in a line of its own."""
    fidelity = plan.fidelity
    if fidelity is None:
        return ""
    rank = "unknown" if fidelity.rank_correlation is None else f"{fidelity.rank_correlation:.2f}"
    warning = "" if fidelity.is_trusted else "; trust what was measured, not what it predicts"
    return (
        f"\nsurrogate of {fidelity.n_points} points: left-out error {fidelity.error:.4f}, "
        f"rank correlation within equal sizes {rank}; its program: {_proof(plan)}{warning}"
    )


def provenance(config: RunConfig, fingerprint: Mapping[str, Any], method: str = "coopq") -> str:
    """Model, backend, walks and calibration set in one line."""
    walks = f"{config.permutations} walks (seed {config.seed})" if method in WALK_METHODS else method
    text = config.calibration
    opening = ", each after a BOS token" if fingerprint["bos"] else ", no special tokens"
    return (
        f"{config.model}: backend {config.backend}, {config.widths_text} bits by {config.granularity}, "
        f"{walks} on {text.sequences} x {text.length} tokens of {text.source} (seed {text.seed}{opening})"
    )


def players_table(
    title: str, names: Sequence[str], bits: Mapping[str, Sequence[Width]], scores: Mapping[str, Sequence[float]]
) -> Table:
    """Players as rows; bits by budget, then scores."""
    table = Table(title=title)
    table.add_column("player")
    for column in (*bits, *scores):
        table.add_column(column, justify="right")
    for row, name in enumerate(names):
        widths = [str(of_budget[row]) for of_budget in bits.values()]
        table.add_row(name, *widths, *(f"{values[row]:.5g}" for values in scores.values()))
    return table


def show_plan(plan: Plan) -> RenderableType:
    """A plan for people."""
    scores = [player.score for player in plan.players]
    columns = {"score": scores}
    if plan.method == "coopq":
        columns = {"Shapley value": scores, "±": [player.stderr or 0.0 for player in plan.players]}
    names = [player.name for player in plan.players]
    table = players_table(_SHAPLEY if plan.method == "coopq" else "", names, {"bits": plan.assignment}, columns)
    head = provenance(RunConfig.from_json(plan.config), plan.fingerprint, plan.method)
    cost = _cost(plan.layer_forwards, plan.layer_forwards_unshared)
    return Group(Text(head), Text(plan_summary(plan)), table, Text(cost))


def show_run(
    estimation: Estimation | None, plans: Sequence[Plan], layer_forwards: int, measured: Known
) -> RenderableType:
    """A run for people."""
    parts: list[RenderableType] = []
    scores: dict[str, Sequence[float]] = {}
    if estimation is not None:
        parts.append(Text(provenance(estimation.config, estimation.fingerprint)))
        estimate = estimation.estimate
        scores = {"Shapley value": estimate.shapley.tolist(), "±": estimate.stderr.tolist()}
    parts += [Text(plan_summary(plan)) for plan in plans]
    players = plans[0].players if estimation is None else estimation.players
    bits = {plan.label: plan.assignment for plan in plans} if len(plans) <= _MOST_COLUMNS else {}
    parts.append(players_table(_SHAPLEY if scores else "", [player.name for player in players], bits, scores))
    if len(plans) > _MOST_COLUMNS:
        parts.append(Text(f"{len(plans)} plans are too many to show side by side; show one of them for its bits"))
    if estimation is not None:
        parts.append(Text(_cost(estimation.layer_forwards, estimation.layer_forwards_unshared)))
        correlation = covariance_correlation(estimation, measured)
        if correlation is not None:
            parts.append(Text(f"correlation of the walks' covariance with fitted interactions: {correlation:.2f}"))
    spent = f"{layer_forwards} layer forwards spent on the calibration set so far, comparisons included"
    return Group(*parts, Text(spent))


def comparison_table(rows: Sequence[Comparison], text: str) -> Table:
    """The comparison for people, sorted as given."""
    table = Table(title=f"Perplexity on {text}")
    table.add_column("weights")
    for column in ("bits per weight", "calibration loss", "NLL", "perplexity"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.bits_per_weight:.3f}",
            f"{row.calibration_nll:.4f}",
            f"{row.nll:.4f}",
            f"{row.perplexity:,.2f}",
        )
    return table


def accuracy_table(rows: Sequence[Accuracy], model: str) -> Table:
    """Accuracies with their standard errors for people."""
    table = Table(title=f"Zero-shot accuracy of {model}")
    table.add_column("task")
    for column in ("accuracy", "normalized by length", "questions"):
        table.add_column(column, justify="right")
    for row in rows:
        normalized = "" if row.normalized is None else f"{row.normalized[0]:.4f} ± {row.normalized[1]:.4f}"
        table.add_row(row.task, f"{row.accuracy:.4f} ± {row.stderr:.4f}", normalized, f"{row.questions:,}")
    return table


def _cost(layer_forwards: int, unshared: int) -> str:
    if layer_forwards in (0, unshared):
        return f"{layer_forwards} layer forwards"
    ratio = unshared / layer_forwards
    return f"it takes {layer_forwards} layer forwards; {unshared} without sharing prefixes ({ratio:.2f}x)"

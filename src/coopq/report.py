"""Plans, runs and comparisons as tables for people and as plain data for machines."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from coopq.plan import Plan
from coopq.run import Estimation, RunConfig
from coopq.scores import Comparison, Evaluation

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
        "deployment": plan.deployment,
    }


def run_data(estimation: Estimation, plans: Sequence[Plan], layer_forwards: int) -> dict[str, Any]:
    """A run for machines; `bits`, `status` and `gap` by budget, `layer_forwards` as truly spent."""
    names = [player.name for player in estimation.players]
    return {
        "bits": {plan.label: {player.name: player.bits for player in plan.players} for plan in plans},
        "shapley": dict(zip(names, estimation.estimate.shapley.tolist(), strict=True)),
        "stderr": dict(zip(names, estimation.estimate.stderr.tolist(), strict=True)),
        "status": {plan.label: plan.solver.status for plan in plans},
        "gap": {plan.label: plan.solver.gap for plan in plans},
        "layer_forwards": layer_forwards,
        "layer_forwards_walks": estimation.layer_forwards,
        "layer_forwards_unshared": estimation.layer_forwards_unshared,
        "permutations": estimation.estimate.permutations,
    }


def evaluation_data(evaluation: Evaluation, rows: Sequence[Comparison] = ()) -> dict[str, Any]:
    """An evaluation for machines: `nll`, `perplexity`, `tokens`, `bytes` and the comparison."""
    data = {**asdict(evaluation), "perplexity": evaluation.perplexity}
    return data | {"comparison": [asdict(row) for row in rows]} if rows else data


def plan_summary(plan: Plan) -> str:
    """Sizes, losses and proof of a plan in two lines."""
    deployed = f"; deployed by {plan.deployment['name']}, not by what was measured" if plan.deployment else ""
    measured = "not measured" if plan.measured_loss is None else f"{plan.measured_loss:.4f} measured"
    if plan.saved_loss is not None:
        measured += f" on the bank's weights, {plan.saved_loss:.4f} on the saved model's"
    predicted = "not predicted" if plan.predicted_loss is None else f"{plan.predicted_loss:.4f} predicted"
    return (
        f"budget {plan.budget} by {plan.method}: {plan.bytes / 2**20:.2f} MiB of {plan.budget_bytes / 2**20:.2f} MiB, "
        f"{plan.average_bits:.3f} average bits, {plan.bits_per_weight:.3f} bits per weight\n"
        f"calibration loss {predicted}, {measured} (nats per token); "
        f"solver: {plan.solver.status}, gap {plan.solver.gap:.2%}{deployed}"
    )


def provenance(config: RunConfig, fingerprint: Mapping[str, Any], method: str = "coopq") -> str:
    """Model, backend, walks and calibration set in one line."""
    walks = f"{config.permutations} walks (seed {config.seed})" if method == "coopq" else method
    text = config.calibration
    opening = ", each after a BOS token" if fingerprint["bos"] else ", no special tokens"
    return (
        f"{config.model}: backend {config.backend}, {config.low} and {config.high} bits by {config.granularity}, "
        f"{walks} on {text.sequences} x {text.length} tokens of {text.source} (seed {text.seed}{opening})"
    )


def players_table(
    title: str, names: Sequence[str], bits: Mapping[str, Sequence[int]], scores: Mapping[str, Sequence[float]]
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


def show_run(estimation: Estimation, plans: Sequence[Plan], layer_forwards: int) -> RenderableType:
    """A run for people."""
    table = players_table(
        _SHAPLEY,
        [player.name for player in estimation.players],
        {plan.label: plan.assignment for plan in plans},
        {"Shapley value": estimation.estimate.shapley.tolist(), "±": estimation.estimate.stderr.tolist()},
    )
    summaries = [Text(plan_summary(plan)) for plan in plans]
    return Group(
        Text(provenance(estimation.config, estimation.fingerprint)),
        *summaries,
        table,
        Text(_cost(estimation.layer_forwards, estimation.layer_forwards_unshared)),
        Text(f"{layer_forwards} layer forwards spent on the calibration set so far, comparisons included"),
    )


def comparison_table(rows: Sequence[Comparison], text: str) -> Table:
    """The comparison for people, sorted as given."""
    table = Table(title=f"Perplexity on {text}")
    table.add_column("weights")
    for column in ("bits per weight", "calibration NLL", "NLL", "perplexity"):
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


def _cost(layer_forwards: int, unshared: int) -> str:
    if layer_forwards == unshared:
        return f"{layer_forwards} layer forwards"
    ratio = unshared / layer_forwards
    return f"the walks take {layer_forwards} layer forwards; {unshared} without sharing prefixes ({ratio:.2f}x)"

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


def plan_data(plan: Plan) -> dict[str, Any]:
    """A plan for machines: `bits`, `shapley`, `stderr` by player, `status`, `gap`, `layer_forwards` and sizes."""
    return {
        "bits": {player.name: player.bits for player in plan.players},
        "shapley": {player.name: player.shapley for player in plan.players},
        "stderr": {player.name: player.stderr for player in plan.players},
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
    }


def run_data(estimation: Estimation, plans: Sequence[Plan], layer_forwards: int) -> dict[str, Any]:
    """A run for machines; `bits`, `status` and `gap` by budget, `layer_forwards` as truly spent."""
    names = [player.name for player in estimation.players]
    return {
        "bits": {plan.budget: {player.name: player.bits for player in plan.players} for plan in plans},
        "shapley": dict(zip(names, estimation.estimate.shapley.tolist(), strict=True)),
        "stderr": dict(zip(names, estimation.estimate.stderr.tolist(), strict=True)),
        "status": {plan.budget: plan.solver.status for plan in plans},
        "gap": {plan.budget: plan.solver.gap for plan in plans},
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
    measured = "not measured yet" if plan.measured_loss is None else f"{plan.measured_loss:.4f} measured"
    return (
        f"budget {plan.budget}: {plan.bytes / 2**20:.2f} MiB of {plan.budget_bytes / 2**20:.2f} MiB, "
        f"{plan.average_bits:.3f} average bits, {plan.bits_per_weight:.3f} bits per weight\n"
        f"calibration loss {plan.predicted_loss:.4f} predicted, {measured} (nats per token); "
        f"solver: {plan.solver.status}, gap {plan.solver.gap:.2%}"
    )


def provenance(config: RunConfig, fingerprint: Mapping[str, Any]) -> str:
    """Model, backend, walks and calibration set in one line."""
    text = config.calibration
    opening = ", each after a BOS token" if fingerprint["bos"] else ", no special tokens"
    return (
        f"{config.model}: backend {config.backend}, {config.low} and {config.high} bits, {config.permutations} walks "
        f"(seed {config.seed}) on {text.sequences} x {text.length} tokens of {text.source} (seed {text.seed}{opening})"
    )


def plans_table(
    names: Sequence[str], shapley: Sequence[float], stderr: Sequence[float], bits: Mapping[str, Sequence[int]]
) -> Table:
    """Players as rows; bits by budget, Shapley values with standard errors."""
    table = Table(title="Shapley value: loss increase by lowering the player, nats per token, ± standard error")
    table.add_column("player")
    for budget in bits:
        table.add_column(budget, justify="right")
    table.add_column("Shapley value", justify="right")
    table.add_column("±", justify="right")
    for row, (name, value, error) in enumerate(zip(names, shapley, stderr, strict=True)):
        table.add_row(name, *(str(widths[row]) for widths in bits.values()), f"{value:.5f}", f"{error:.5f}")
    return table


def show_plan(plan: Plan) -> RenderableType:
    """A plan for people."""
    table = plans_table(
        [player.name for player in plan.players],
        [player.shapley for player in plan.players],
        [player.stderr for player in plan.players],
        {"bits": plan.assignment},
    )
    head = provenance(RunConfig.from_json(plan.config), plan.fingerprint)
    return Group(
        Text(head), Text(plan_summary(plan)), table, Text(_cost(plan.layer_forwards, plan.layer_forwards_unshared))
    )


def show_run(estimation: Estimation, plans: Sequence[Plan], layer_forwards: int) -> RenderableType:
    """A run for people."""
    table = plans_table(
        [player.name for player in estimation.players],
        estimation.estimate.shapley.tolist(),
        estimation.estimate.stderr.tolist(),
        {plan.budget: plan.assignment for plan in plans},
    )
    summaries = [Text(plan_summary(plan)) for plan in plans]
    return Group(
        Text(provenance(estimation.config, estimation.fingerprint)),
        *summaries,
        table,
        Text(_cost(estimation.layer_forwards, estimation.layer_forwards_unshared)),
        Text(f"{layer_forwards} layer forwards spent in this run so far, plans and comparisons included"),
    )


def comparison_table(rows: Sequence[Comparison], text: str) -> Table:
    """The comparison for people, sorted as given."""
    table = Table(title=f"Perplexity on {text}")
    table.add_column("weights")
    for column in ("bits per weight", "calibration NLL", "NLL", "perplexity"):
        table.add_column(column, justify="right")
    for row in rows:
        name = row.name if row.n == 1 else f"{row.name} (mean of {row.n})"
        table.add_row(
            name,
            f"{row.bits_per_weight:.3f}",
            f"{row.calibration_nll:.4f}",
            f"{row.nll:.4f}",
            f"{row.perplexity:,.2f}",
        )
    return table


def _cost(layer_forwards: int, unshared: int) -> str:
    ratio = unshared / layer_forwards
    return f"the walks take {layer_forwards} layer forwards; {unshared} without sharing prefixes ({ratio:.2f}x)"

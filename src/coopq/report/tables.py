"""Plans, runs, comparisons, methods and targets as tables for people."""

import shlex
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from coopq.core.specs import Request
from coopq.core.types import Width
from coopq.export.formats import FORMS
from coopq.plan.estimation import Estimation
from coopq.plan.methods import METHODS
from coopq.plan.plan import Plan
from coopq.report.data import covariance_correlation
from coopq.report.words import LOSS_NAMES, score_text, size_text, with_half
from coopq.search import Known

if TYPE_CHECKING:  # these import torch
    from coopq.judge.engines.engine_check import Delivery
    from coopq.plan.forecast import Forecast
    from coopq.plan.searches.front import FrontPoint

_MOST_COLUMNS = 8


def plan_summary(plan: Plan) -> str:
    """Sizes, losses, proof and confidence of a plan, in two lines or more."""
    deployed = f"; deployed by {plan.deployment.backend}, not by what was measured" if plan.deployment else ""
    half = None if plan.confidence is None else plan.confidence.half
    measured = "not measured"
    if plan.measured_loss is not None:
        measured = (
            f"{plan.measured_loss:.4f} measured" if half is None else f"{with_half(plan.measured_loss, half)} measured"
        )
    loss = plan.request.search.loss
    if plan.saved_loss is not None:  # always a negative log-likelihood
        what = "" if loss == "nll" else "negative log-likelihood "
        measured += f" on the bank's weights, {what}{plan.saved_loss:.4f} on the saved model's"
    predicted = "" if plan.predicted_loss is None else f"{plan.predicted_loss:.4f} predicted, "
    unit = "nats per token" + ("" if half is None else ", ± half of the 95 % interval over sequences")
    covered = "" if plan.covered is None else f", {plan.covered:.1%} of the blocks' weights covered"
    average = "" if plan.keeps_quantized else f"{plan.average_bits:.3f} average bits, "
    notes = "".join(f"\n{note}" for note in plan.source_notes)
    return (
        f"budget {plan.budget} by {plan.method}: {_size(plan)}, {average}"
        f"{plan.bits_per_weight:.3f} bits per weight{covered}\n"
        f"{LOSS_NAMES[loss]} {predicted}{measured} ({unit})"
        f"{_proof(plan)}{deployed}{_confidence(plan)}{_fidelity(plan)}{_stopped(plan)}{notes}{_growth(plan)}"
    )


def _size(plan: Plan) -> str:
    """The size of the file that a plan is for, after the name of the target."""
    text = size_text(plan.file_bytes, plan.bytes, plan.budget_bytes)
    return text if plan.request.target.form is None else f"{plan.request.target.form} {text}"


def _growth(plan: Plan) -> str:
    """A warning if the result is larger than what it came from, in a line of its own."""
    if not 0 < plan.source_bytes < plan.file_bytes:
        return ""
    return (
        f"\nthe result is LARGER than the {plan.source_bytes / 1e6:,.1f} MB that it came from: keep the original, or "
        "use a smaller budget, --embeddings or a --target"
    )


def delivery_summary(request: Request, made: "Delivery") -> str:
    """What was made for an engine: the file, the plan, what the engine computes, how to run it."""
    check, checked = made.check, ""
    if check is not None:
        checked = (
            f"\n{check.engine}: {check.loss:.3f} nats a token on a short passage, {check.ours:.3f} by what was measured"
            f"\nthe file writes: {check.text!r}"
            + ("" if check.before is None else f"\nthe original writes: {check.before!r}")
            + (
                ""
                if not check.speed
                else f"\ntokens a second: {', the original '.join(f'{x:.1f}' for x in check.speed)}"
            )
        )
    return (
        f"{made.out}: {made.plan.file_bytes:,} bytes\n{provenance(request, made.plan.fingerprint, made.plan.method)}\n"
        f"{plan_summary(made.plan)}{checked}\n{how_to_judge(made.saved)}\nrun it: {made.run}"
    )


def how_to_judge(saved: Path) -> str:
    """The command that judges a saved model: a search sees its calibration text, so the loss there is too low."""
    return f"judge it on text that the search did not see: coopq evaluate {shlex.quote(str(saved))}"


def _proof(plan: Plan) -> str:
    """How well the program of a plan is solved; nothing for searches, which solve none."""
    return "" if plan.solver is None else f"; solver: {plan.solver.status}, gap {plan.solver.gap:.2%}"


def _stopped(plan: Plan) -> str:
    """What ended the search before its own end, in a line of its own."""
    if plan.stopped_after is None:
        return ""
    if plan.is_interrupted:
        return f"\nthe search was interrupted after {plan.stopped_after}; the same command goes on"
    return f"\nthe search stopped after {plan.stopped_after}; without a limit, it goes on in the same run folder"


def _confidence(plan: Plan) -> str:
    """How sure the choice is, in a line of its own."""
    sure = plan.confidence
    if sure is None or sure.difference is None or sure.interval is None or sure.probability is None:
        return ""
    low, high = sure.interval
    if sure.difference < 0 and METHODS[plan.method].kind != "search":
        return (
            f"\nan assignment measured on the way is BETTER by {-sure.difference:.4f} "
            f"(95 % {-high:.4f} to {-low:.4f}, bootstrap over sequences); the method chooses without looking"
        )
    return (
        f"\nrunner-up, with other widths for at least 5 % of the weights: {sure.difference:+.4f} (95 % {low:+.4f} to "
        f"{high:+.4f}, bootstrap over sequences, corrected for selection); probability of the choice being better "
        f"{sure.probability:.0%}"
    )


def _fidelity(plan: Plan) -> str:
    """How far the surrogate can be trusted, in a line of its own."""
    fidelity = plan.fidelity
    if fidelity is None or fidelity.n_points < 2:  # nothing is left to fit without the only point
        return ""
    rank = "unknown" if fidelity.rank_correlation is None else f"{fidelity.rank_correlation:.2f}"
    warning = "" if fidelity.is_trusted else "; trust measured losses, not predicted losses"
    return (
        f"\nsurrogate of {fidelity.n_points} points: left-out error {fidelity.error:.4f}, "
        f"rank correlation within equal sizes {rank}{warning}"
    )


def provenance(request: Request, fingerprint: Mapping[str, Any], method: str = "coopq") -> str:
    """Model, backend, method and calibration set in one line."""
    text, search, widths = request.text, request.search, request.widths
    walks = f"{search.permutations} walks (seed {search.seed})" if METHODS[method].kind == "walks" else method
    opening = ", each after a BOS token" if fingerprint["bos"] else ", no special tokens"
    return (
        f"{request.model.source}: backend {request.quantizer.backend}, {widths.text} bits by {widths.granularity}, "
        f"{walks} on {text.n_sequences} x {text.sequence_length} tokens of {text.source} (seed {text.seed}{opening})"
    )


def show_plan(plan: Plan) -> RenderableType:
    """A plan."""
    names, scores = zip(*((player.name, player.score) for player in plan.players), strict=True)
    errors = [player.stderr for player in plan.players if player.stderr is not None]
    table = _players_table(plan.method, names, {"bits": plan.assignment}, scores, errors)
    head = provenance(plan.request, plan.fingerprint, plan.method)
    cost = [] if plan.is_interrupted else [Text(_cost(plan.block_forwards, plan.block_forwards_unshared))]
    return Group(Text(head), Text(plan_summary(plan)), table, *cost)


def show_run(
    estimation: Estimation | None, plans: Sequence[Plan], block_forwards: int, measured: Known
) -> RenderableType:
    """A run; arguments as of `coopq.report.data.run_data`."""
    parts: list[RenderableType] = []
    scores: list[float] = []
    errors: list[float] = []
    if estimation is not None:
        parts.append(Text(provenance(estimation.request, estimation.fingerprint)))
        scores, errors = estimation.estimate.shapley.tolist(), estimation.estimate.stderr.tolist()
    parts += [Text(plan_summary(plan)) for plan in plans]
    players = plans[0].players if estimation is None else estimation.players
    bits = {plan.label: plan.assignment for plan in plans} if len(plans) <= _MOST_COLUMNS else {}
    parts.append(_players_table("coopq", [player.name for player in players], bits, scores, errors))
    if len(plans) > _MOST_COLUMNS:
        parts.append(Text(f"{len(plans)} plans are too many to show side by side; show one plan to see its bits"))
    if estimation is not None:
        parts.append(Text(_cost(estimation.spent.block_forwards, estimation.spent.unshared)))
        correlation = covariance_correlation(estimation, measured)
        if correlation is not None:
            parts.append(Text(f"correlation of the walks' covariance with fitted interactions: {correlation:.2f}"))
    spent = f"{block_forwards} block forwards spent on the calibration set so far, comparisons included"
    return Group(*parts, Text(spent))


def _players_table(
    method: str,
    names: Sequence[str],
    bits: Mapping[str, Sequence[Width]],
    scores: Sequence[float],
    errors: Sequence[float],
) -> Table:
    """A row for each player: its bits under each plan, then its score by a method with the standard error, if any."""
    columns = {name: values for name, values in (("score", scores), ("±", errors)) if values}
    title = f"score: {score_text(method)}" + (", ± standard error" if errors else "")
    table = empty_table(title if columns else "", "player", *bits, *columns)
    for row, name in enumerate(names):
        widths = [str(assignment[row]) for assignment in bits.values()]
        table.add_row(name, *widths, *(f"{values[row]:.5g}" for values in columns.values()))
    return table


def _cost(block_forwards: int, unshared: int) -> str:
    """What a method takes, and how much sharing prefixes saves."""
    if block_forwards in (0, unshared):
        return f"{block_forwards} block forwards"
    ratio = unshared / block_forwards
    return f"it takes {block_forwards} block forwards; {unshared} without sharing prefixes ({ratio:.2f}x)"


def show_forecast(expected: "Forecast") -> RenderableType:
    """A forecast."""
    table = Table("method, one budget", "block forwards", "losses", "TFLOP", "time")
    for name, work in expected.methods.items():
        most = "up to " if work.is_bound else ""
        seconds = expected.seconds(work)
        table.add_row(
            name,
            f"{most}{work.block_forwards:,}",
            f"{most}{work.evaluations:,}",
            f"{expected.flops(work) / 1e12:,.1f}",
            "not timed" if seconds is None else f"{most}{timedelta(seconds=round(seconds))}",
        )
    if expected.block_seconds is None or expected.head_seconds is None:
        timed = f"no times: {expected.untimed}"
    else:
        speed = expected.block_flops / expected.block_seconds / 1e9
        timed = (
            f"a block forward takes {expected.block_seconds * 1e3:.1f} ms ({speed:,.0f} GFLOP/s), a head "
            f"{expected.head_seconds * 1e3:.1f} ms: measured here, now, on one block with random weights"
        )
    players = f"{expected.n_players} players in {expected.n_blocks} blocks, {expected.tokens} calibration tokens"
    return Group(f"{players}\n{timed}\n{expected.memory}", table)


def front_table(points: "Sequence[FrontPoint]", loss: str) -> Table:
    """Sizes against losses."""
    table = empty_table(
        f"Size against {LOSS_NAMES[loss]}, nats per token", "MB", "bits per weight", "measured", "predicted", ""
    )
    for point in points:
        losses = ["" if value is None else f"{value:.4f}" for value in (point.measured, point.predicted)]
        knee = "knee: from here on bytes gain less" if point.is_knee else ""
        table.add_row(f"{point.n_bytes / 1e6:,.1f}", f"{point.bits_per_weight:.2f}", *losses, knee)
    return table


def methods_table() -> Table:
    """All methods: what each is for, and what it costs."""
    title = "Methods. Cost: forwards of the model over the calibration tokens, for 5 budgets, 30 blocks and 2 widths"
    table = Table("method", "kind", "how it decides", title=title)
    table.columns[0].no_wrap = True  # names are there to be copied
    table.add_column("widths", justify="right")
    table.add_column("cost", justify="right")
    for method in METHODS.values():
        widths = "any" if method.most_widths is None else str(method.most_widths)
        cost = "" if method.cost is None else f"{method.cost:,}"
        table.add_row(method.name, method.kind, method.summary, widths, cost)
    return table


def targets_table() -> Table:
    """All forms that models are exported to: what each is for, and what it takes."""
    title = "Targets, for --target and export --to"
    table = Table("target", "engine", "what it is for", "backends", "takes --base", title=title)
    for name, form in FORMS.items():
        base = "yes" if form.takes_base else "no"
        table.add_row(name, form.engine, form.summary, ", ".join(form.backends), base)
    return table


def empty_table(title: str, first: str, *others: str) -> Table:
    """An empty table whose columns are right-justified, except for the first column."""
    table = Table(first, title=title)
    for column in others:
        table.add_column(column, justify="right")
    return table

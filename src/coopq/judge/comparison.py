"""Plans beside references: the original, uniform widths, and random assignments of the same budgets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from coopq.core.sizes import Budget
from coopq.core.specs import Request, SolverSpec
from coopq.core.types import UNTOUCHED, Assignments, Losses, ProgressCallback, Width, silent
from coopq.export.deployment import deployed_request
from coopq.export.formats import TargetFile
from coopq.game.prepared import prepare
from coopq.game.session import Session, open_session
from coopq.judge.divergence import estimate
from coopq.judge.references import (
    N_RANDOM,
    ORIGINAL,
    RANDOM,
    UNIFORM,
    random_assignments,
    uniform_assignment,
)
from coopq.judge.results import MOST_NLL, Comparison
from coopq.judge.windows import judge_scores, judge_windows, judging_text
from coopq.model.texts import HeldOut
from coopq.plan.allocate import measure_plan
from coopq.plan.methods import check_methods, get_method, make_plans, names
from coopq.plan.plan import Plan
from coopq.plan.searches.by_search import begin_with_nothing

COMPARED = names(is_compared=True)
"""Methods that `compare` takes if none is named: those that take little beside the walks. "shapley" and "interactions"
are other readings of the walks of "coopq", and show what the covariance of "coopq" adds."""
_RANDOM_SEED = 0


@dataclass(frozen=True)
class Judged:
    """Assignments of one method at one budget, with their losses.

    Attributes:
        method: Name of the method or of the reference.
        budget: The budget as the user wrote it; None for the original and uniform widths.
        width: The width that was asked of every player; None except for uniform widths.
        assignments: Shape (n, n_players).
        block_forwards: Block forwards that the method takes; 0 for references.
        average_bits: Mean of the assignments' average bits.
        bits_per_weight: Mean of the assignments' bits per weight.
        file_bytes: Mean of the most bytes that the assignments' files can take; that of its own file for the original.
        calibration: Losses on the calibration set, shape (n,), nats per token.
        scores: On each window of the judging text: the negative log-likelihood, nats per token, and, if they were
            measured, the other means of `coopq.game.losses.TokenScores`; shape (n, n_windows, 1 or 3).
    """

    method: str
    budget: str | None
    width: Width | None
    assignments: Assignments
    block_forwards: int
    average_bits: float
    bits_per_weight: float
    file_bytes: int
    calibration: Losses
    scores: npt.NDArray[np.float64]

    @property
    def windows(self) -> npt.NDArray[np.float64]:
        """Negative log-likelihoods on each window, shape (n, n_windows), nats per token."""
        return self.scores[..., 0]


def compare_plan(
    plan: Plan,
    run: Path,
    text: HeldOut,
    *,
    model: str | None = None,
    device: str | None = None,
    progress: ProgressCallback = silent,
) -> list[Comparison]:
    """A plan beside the original, uniform widths, and random assignments of the plan's budget.

    Args:
        plan: The plan.
        run: The plan's run folder, whose weight bank and journals are used; it is made if it is missing.
        text: The text that judges.
        model: Where the plan's model is now; None looks where the plan says.
        device: Where to compute; None computes where the plan says.
        progress: Told of every step.
    """
    request = plan.request
    if plan.deployment is not None:
        request = deployed_request(request, plan.deployment, plan.assignment)
    request = request.replace(model=model or request.model.source, device=device or request.model.device)
    prepared = prepare(request, target=TargetFile(progress), judge_length=text.length)
    with open_session(prepared, run, progress) as session:
        return compare_on(session, [plan], text)


def compare(
    request: Request,
    budgets: Sequence[str],
    run: Path,
    text: HeldOut,
    *,
    methods: Sequence[str] = COMPARED,
    progress: ProgressCallback = silent,
) -> list[Comparison]:
    """Methods at several budgets, beside uniform widths and random assignments.

    Args:
        request: The model, and how to measure it.
        budgets: Budgets, as for `coopq.quantize`.
        run: The run folder; losses in its journals are not measured again.
        text: The text that judges.
        methods: Names of `coopq.plan.methods.METHODS`.
        progress: Told of every step.
    """
    text.check()
    parsed = [Budget.parse(budget) for budget in budgets]
    for method in methods:
        get_method(method)
    prepared = prepare(request, target=TargetFile(progress), judge_length=text.length)
    check_methods(methods, prepared)
    prepared.check_budgets(parsed)
    with open_session(prepared, run, progress) as session:
        judging_text(session, text)  # a text that is too short is an error before the walks
        plans = make_measured_plans(session, methods, parsed)
        return compare_on(session, plans, text)


def compare_on(session: Session, plans: Sequence[Plan], text: HeldOut) -> list[Comparison]:
    """Plans of an open session beside the original, uniform widths, and random assignments of their budgets."""
    judged = beside_references(session, plans, _RANDOM_SEED, text, diverges=True)
    rows = [_row(one, session.request.search.loss) for one in judged]
    return sorted(rows, key=lambda row: row.method == RANDOM)  # random assignments last


def _row(judged: Judged, loss: str) -> Comparison:
    """The row of a table; `loss` is the name of the calibration loss."""
    nll = judged.windows.mean(axis=1)
    _, divergence, same_top = judged.scores.mean(axis=0).T
    is_reference = judged.method == ORIGINAL
    return Comparison(
        method=judged.method,
        budget=judged.budget,
        n=len(judged.assignments),
        average_bits=judged.average_bits,
        bits_per_weight=judged.bits_per_weight,
        loss=loss,
        calibration_loss=float(judged.calibration.mean()),
        nll=float(nll.mean()),
        perplexity=float(np.exp(np.minimum(nll, MOST_NLL)).mean()),
        divergence=None if is_reference else estimate(divergence),
        same_top=None if is_reference else estimate(same_top),
        file_bytes=judged.file_bytes,
        windows=tuple(judged.windows.mean(axis=0).tolist()),
        width=judged.width,
    )


def make_measured_plans(session: Session, methods: Sequence[str], budgets: Sequence[Budget]) -> list[Plan]:
    """The plans of all budgets by each method, their losses on the calibration set measured.

    A search learns nothing from the losses of the other methods, whose order makes no difference.
    """
    begin_with_nothing(session, methods, budgets)
    return [
        measure_plan(session, plan) for method in methods for plan in make_plans(session, method, budgets, SolverSpec())
    ]


def beside_references(
    session: Session, plans: Sequence[Plan], seed: int, text: HeldOut, *, diverges: bool = False
) -> list[Judged]:
    """Losses of the original, of uniform widths, of random assignments of the plans' budgets, and of plans.

    Args:
        session: The session that the plans are from.
        plans: The plans.
        seed: Seed of the random assignments.
        text: The text that judges.
        diverges: Whether divergences from the original are measured too.
    Returns:
        The references, then the plans in their order.
    """
    groups: list[tuple[str, str | None, Width | None, Assignments, int]] = [
        *((*reference, 0) for reference in _references(session, plans, seed)),
        *((plan.method, plan.budget, None, _as_row(plan), plan.block_forwards) for plan in plans),
    ]
    points = np.concatenate([assignments for _, _, _, assignments, _ in groups])
    with session.game("comparing on the calibration set") as game:
        calibration = game(points)
    scores = judge_scores(session, points, text) if diverges else judge_windows(session, points, text)[..., None]
    ends = np.cumsum([len(assignments) for _, _, _, assignments, _ in groups])[:-1]
    judged = []
    for group, on_calibration, on_text in zip(groups, np.split(calibration, ends), np.split(scores, ends), strict=True):
        method, budget, width, assignments, block_forwards = group
        if method == ORIGINAL:
            average_bits = bits_per_weight = 8.0 * session.loaded.checkpoint_dtype.itemsize
            file_bytes = session.loaded.source_bytes
        else:
            average_bits = float(np.mean([session.sizes.average_bits(row) for row in assignments]))
            bits_per_weight = float(np.mean([session.sizes.bits_per_weight(row) for row in assignments]))
            file_bytes = round(np.mean([session.sizes.file_bytes(row) for row in assignments]))
        judged.append(
            Judged(
                method=method,
                budget=budget,
                width=width,
                assignments=assignments,
                block_forwards=block_forwards,
                average_bits=average_bits,
                bits_per_weight=bits_per_weight,
                file_bytes=file_bytes,
                calibration=on_calibration,
                scores=on_text,
            )
        )
    return judged


def _references(
    session: Session, plans: Sequence[Plan], seed: int
) -> Iterator[tuple[str, str | None, Width | None, Assignments]]:
    """Name, budget, width and assignments of each reference."""
    yield ORIGINAL, None, None, np.full((1, len(session.players)), UNTOUCHED, dtype=np.float32)
    uniform: dict[tuple[float, ...], Width] = {}
    for width in session.request.widths.quantized[::-1]:  # two widths may mean the same, where players lack one
        uniform.setdefault(tuple(uniform_assignment(session.player_widths, width).tolist()), width)
    for assignment, width in uniform.items():
        yield UNIFORM, None, width, np.array([assignment], dtype=np.float32)
    for budget, limit in {plan.budget: plan.budget_bytes for plan in plans}.items():
        drawn = random_assignments(session.sizes, session.request.widths.bits, limit, N_RANDOM, seed)
        yield RANDOM, budget, None, drawn


def _as_row(plan: Plan) -> Assignments:
    """The plan's assignment, shape (1, n_players)."""
    return np.array([plan.assignment], dtype=np.float32)

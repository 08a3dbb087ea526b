"""What a run folder says of a plan: every measured assignment, the surrogate fitted again, pair terms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from coopq.core.files import as_plain
from coopq.core.recipes import ENGINES, RECIPES
from coopq.core.sizes import Sizes
from coopq.core.types import UNTOUCHED, Assignments, Losses
from coopq.game.journal import Journal
from coopq.game.run_folder import Delivered, RunFolder
from coopq.judge.results import JudgedPlan, kept_judged
from coopq.plan.estimation import find_estimation
from coopq.plan.methods import METHODS
from coopq.plan.plan import Plan
from coopq.plan.scores.kept import Score, kept_score
from coopq.report.page.run.names import PlayerName, name_players
from coopq.search import Measured, SearchSpace
from coopq.search.informed import fit_informed
from coopq.search.prior import PRIOR_SCORE, make_prior
from coopq.search.surrogate import best_surrogate

Floats = npt.NDArray[np.float64]


class Points(NamedTuple):
    """Measured assignments, in the order of measuring.

    Attributes:
        assignments: Shape (n, n_players).
        losses: Shape (n,), nats per token.
        n_bytes: Bytes of the players' weights, shape (n,).
        forwards: Forwards of the whole model spent until then, prefixes shared, shape (n,).
    """

    assignments: Assignments
    losses: Losses
    n_bytes: npt.NDArray[np.int64]
    forwards: Floats


class PairTerms(NamedTuple):
    """How much pairs of players do together beyond what each does alone.

    Attributes:
        values: Symmetric, shape (n_players, n_players).
        unit: What the values are.
    """

    values: Floats
    unit: str


@dataclass(frozen=True)
class RunRecord:
    """A plan with what its run folder holds.

    Attributes:
        plan: The plan.
        names: Name of each player.
        measured: Losses on the whole calibration set.
        searched: Losses that the search looked at: on the screening sequences, where there are any. Losses that later
            commands measured are not among them.
        scoring: Forwards of the model that the score before the search took.
        predicted: Losses of `searched` as a surrogate fitted without each point predicts them, shape (n,); None without
            a surrogate.
        pairs: Pair terms; None where nothing fitted has any.
        engine: The engine that the job wrote its output for; None for a model as coopq itself saves it.
        judged: What `coopq evaluate` found out about the model, one for each text.
        file: The plan's file, for commands.
    """

    plan: Plan
    names: list[PlayerName]
    measured: Points
    searched: Points
    scoring: float
    predicted: Losses | None
    pairs: PairTerms | None
    engine: str | None = None
    judged: Sequence[JudgedPlan] = ()
    file: str = "PLAN"

    @property
    def n_weights(self) -> int:
        """Weights of all players."""
        return sum(player.n_weights for player in self.plan.players)

    def bits_per_weight(self, n_bytes: npt.NDArray[np.int64]) -> Floats:
        """Stored bits per weight of sizes in bytes."""
        found: Floats = 8 * n_bytes / self.n_weights
        return found


def read_run(plan: Plan, run: Path | None) -> RunRecord:
    """The record of a plan.

    Args:
        plan: The plan.
        run: Its run folder; None if it is gone. A journal of other weights, tokens or losses is left out.
    Raises:
        CoopQError: If a file of the folder is damaged.
    """
    nothing = np.zeros((0, len(plan.players)), np.float32), np.zeros(0), np.zeros(0, np.int64), np.zeros(0)
    none = Points(*nothing)
    empty = RunRecord(plan, name_players(plan.players), none, none, 0.0, None, None, file=plan.file_name)
    if run is None:
        return empty
    folder, text = RunFolder(run), plan.request.text
    empty = replace(empty, file=f"{run.name}/{folder.plans.name}/{plan.file_name}")
    for file in sorted(run.glob("saved/*.json")):  # what `deliver` wrote of each output
        made = Delivered.load(file)
        if made.bits == plan.assignment and made.form == plan.request.target.form:
            engine = next((name for name in ENGINES if RECIPES[name].form == made.form), None)
            empty = replace(empty, engine=engine)
    found = [one for one in kept_judged(run) if one.fingerprint == as_plain(plan.fingerprint)]
    empty = replace(empty, judged=[one for one in found if one.assignment == plan.assignment])
    if plan.deployment is not None or Journal.header(folder.journal) != as_plain(plan.fingerprint):
        return empty
    measured = searched = _points(plan, folder.journal)
    if text.n_screen_sequences < text.n_sequences:
        searched = _points(plan, folder.screening(text.n_screen_sequences))
    record, method = replace(empty, measured=measured, searched=searched), METHODS[plan.method]
    if method.kind == "walks":
        return replace(record, pairs=_walks_pairs(folder))
    if method.kind == "score" or plan.fidelity is None:
        return record
    space = plan_space(plan)
    searched = _before_the_end(searched, space, plan.fidelity.n_points)
    made_for = as_plain({"bits": plan.request.widths.bits, "player widths": space.player_widths})
    score = kept_score(folder, PRIOR_SCORE, made_for) if method.takes_prior else None
    scoring = 0.0 if score is None else score.block_forwards / len({player.block for player in plan.players})
    predicted, pairs = _fitted(plan, space, searched, score)
    return replace(record, searched=searched, scoring=scoring, predicted=predicted, pairs=pairs)


def plan_sizes(plan: Plan) -> Sizes:
    """Bytes of the players of a plan at the widths that each had to choose from."""
    widths = plan.request.widths.bits
    return Sizes(
        n_weights=tuple(player.n_weights for player in plan.players),
        n_bytes={width: tuple(player.n_bytes.get(f"{width:g}") for player in plan.players) for width in widths},
    )


def _points(plan: Plan, journal: Path) -> Points:
    """The points of a journal whose sizes are known; full precision is among them, at two bytes a weight."""
    (assignments, losses), spent = Journal.peek(journal)
    n_blocks = len({player.block for player in plan.players})
    assignments = assignments.reshape(len(losses), len(plan.players))
    at: list[Mapping[float, int]] = [
        {UNTOUCHED: 2 * player.n_weights} | {float(width): n for width, n in player.n_bytes.items()}
        for player in plan.players
    ]
    is_known = np.array([all(bits in own for bits, own in zip(row.tolist(), at, strict=True)) for row in assignments])
    kept = np.flatnonzero(is_known)  # a removed player has no size
    n_bytes = [sum(own[bits] for bits, own in zip(row.tolist(), at, strict=True)) for row in assignments[kept]]
    return Points(assignments[kept], losses[kept], np.array(n_bytes, dtype=np.int64), np.cumsum(spent)[kept] / n_blocks)


def plan_space(plan: Plan) -> SearchSpace:
    """What the plan was chosen from, with its budget."""
    sizes, bits = plan_sizes(plan), plan.request.widths.bits
    own = sizes.player_widths(bits)
    capacity = max(0, plan.budget_bytes - sizes.total_bytes([widths[0] for widths in own]))
    return SearchSpace(own, sizes.step_bytes(bits), (capacity,), plan.request.search.seed)


def _before_the_end(points: Points, space: SearchSpace, n_points: int) -> Points:
    """The points up to the n-th that is in the space, which was the last that the search saw."""
    inside = space.holds(points.assignments)
    last = np.flatnonzero(np.cumsum(inside) == n_points)
    end = last[0] + 1 if len(last) else len(inside)
    return Points(points.assignments[:end], points.losses[:end], points.n_bytes[:end], points.forwards[:end])


def _walks_pairs(folder: RunFolder) -> PairTerms | None:
    """The covariance of the walks' marginal contributions, which the paper takes for interactions."""
    if (estimation := find_estimation(folder.path)) is None:
        return None
    covariance = estimation.estimate.covariance.copy()
    np.fill_diagonal(covariance, 0.0)
    return PairTerms(covariance, "covariance of the walks, nats²")


def _fitted(plan: Plan, space: SearchSpace, points: Points, score: Score | None) -> tuple[Losses | None, PairTerms]:
    """Left-out predictions of points, and pair terms of players, by the surrogate that the plan's method fits."""
    (capacity,), measured = space.capacities, Measured(space)
    measured.add(points.assignments, points.losses)
    if score is None:
        quadratic = best_surrogate(measured.surrogates(capacity))
        unit = {"raw": "nats per token", "sqrt": "square root of nats", "log": "log of the loss"}[quadratic.transform]
        return None, PairTerms(_by_player(space, 2 * quadratic.K), f"pair term, {unit}")
    full = (points.assignments == UNTOUCHED).all(axis=1)
    origin = 0.0 if plan.request.search.loss == "kl" or not full.any() else float(points.losses[full][0])
    blocks, layers = [player.block for player in plan.players], [player.modules for player in plan.players]
    prior = make_prior(space, score.gains, origin, blocks, layers)
    informed = fit_informed(prior, measured.q, measured.losses, measured.lowest(capacity))
    predicted = np.full(len(points.losses), np.nan)
    inside = space.holds(points.assignments)
    predicted[inside] = informed.losses_of(informed.left_out)
    terms = informed.pair_terms(space.steps_down(np.array(plan.assignment, dtype=np.float32)))
    return predicted, PairTerms(100 * np.expm1(_by_player(space, terms)), "change of the loss, %")


def _by_player(space: SearchSpace, terms: Floats) -> Floats:
    """Pair terms of steps summed over the steps of players, without those of a player with itself."""
    summed = space.sum_by_player(space.sum_by_player(terms), axis=1)
    np.fill_diagonal(summed, 0.0)
    return summed

"""Size against loss, from what a run folder knows: nothing is measured and no weights are loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from coopq.core.errors import RunError
from coopq.core.files import as_plain
from coopq.core.types import UNTOUCHED
from coopq.game.journal import Journal
from coopq.game.prepared import Prepared
from coopq.game.run_folder import RunFolder
from coopq.plan.scores.kept import kept_score
from coopq.search import Measured, SearchSpace
from coopq.search.prior import PRIOR_SCORE, Prior, make_prior
from coopq.search.strategies.active import likely_optimum

_N_SIZES = 16
_LEVEL = 1e-6
"""A point this little below the line, in the logarithm of the loss, is on the line."""


@dataclass(frozen=True)
class FrontPoint:
    """What a size can buy.

    Attributes:
        n_bytes: Bytes of the file, with the KV cache if one is reserved.
        bits_per_weight: Stored bits per quantized weight.
        measured: Lowest loss measured within the size, nats per token; None if none was.
        predicted: Lowest loss that the surrogate expects; None without a score in the run folder.
        is_knee: Whether the curve bends here: from this size on, more bytes lower the loss less.
    """

    n_bytes: int
    bits_per_weight: float
    measured: float | None
    predicted: float | None
    is_knee: bool = False


def front_of(folder: Path, prepared: Prepared) -> list[FrontPoint]:
    """Sizes from the smallest to the largest, with what they cost in loss.

    Args:
        folder: The run folder.
        prepared: Its request.
    Raises:
        RunError: If nothing is measured there yet.
    """
    sizes, run = prepared.sizes, RunFolder(folder)
    (assignments, losses), _ = Journal.peek(run.journal)
    if not len(losses):
        raise RunError(f"{folder} holds no loss yet; search there first: coopq quantize ... --run {folder}")
    bits = prepared.request.widths.bits
    space = SearchSpace(sizes.player_widths(bits), sizes.step_bytes(bits))
    if assignments.shape[1] != space.n_players:
        raise RunError(
            f"{run.journal} has {assignments.shape[1]} players, and {prepared.request.model.source!r} has "
            f"{space.n_players}; put the run's model back"
        )
    measured, prior = Measured(space), None
    measured.add(assignments, losses)
    is_original = (assignments == UNTOUCHED).all(axis=1)
    made_for = as_plain({"bits": bits, "player widths": space.player_widths})
    has_origin = prepared.request.search.loss == "kl" or is_original.any()
    if has_origin and (score := kept_score(run, PRIOR_SCORE, made_for)) is not None:
        origin = 0.0 if prepared.request.search.loss == "kl" else float(losses[is_original][0])
        layers = [[linear.name for linear in player.linears] for player in prepared.players]
        prior = make_prior(space, score.gains, origin, prepared.blocks, layers)
    lowest = sizes.total_bytes([own[0] for own in space.player_widths])
    total = int(space.step_bytes.sum())
    points = []
    for capacity in (total * k // _N_SIZES for k in range(_N_SIZES + 1)):
        loss = measured.lowest(capacity)
        points.append(
            FrontPoint(
                n_bytes=lowest + capacity + sizes.fixed + sizes.reserved,
                bits_per_weight=8 * (lowest + capacity) / sum(sizes.n_weights),
                measured=None if loss == np.inf else loss,
                predicted=None if prior is None or loss == np.inf else _predicted(space, capacity, prior, measured),
            )
        )
    return _with_knee(points)


def _predicted(space: SearchSpace, capacity: int, prior: Prior, measured: Measured) -> float:
    """The loss of the surrogate's optimum, nats per token."""
    surrogate, optimum = likely_optimum(space, capacity, prior, measured)
    return float(surrogate.predict(optimum[None])[0])


def _with_knee(points: Sequence[FrontPoint]) -> list[FrontPoint]:
    """The points. The one farthest below the line from the first to the last is marked as the knee, if one is below it.

    Losses count by their logarithm. Source: Satopaa et al., Finding a Kneedle in a Haystack, 2011.
    """
    known = [at for at, point in enumerate(points) if (point.predicted or point.measured or 0) > 0]
    if len(known) < 3:
        return list(points)
    x = np.array([points[at].n_bytes for at in known], dtype=np.float64)
    y = np.log([points[at].predicted or points[at].measured or 1.0 for at in known])
    line = y[0] + (x - x[0]) / (x[-1] - x[0]) * (y[-1] - y[0])
    below = line - y
    if below.max() <= _LEVEL:
        return list(points)
    knee = known[int(below.argmax())]
    return [replace(point, is_knee=at == knee) for at, point in enumerate(points)]

"""A quadratic surrogate of the game, fitted to measured losses, and how far the surrogate is to be trusted.

The surrogate is a quadratic in q of an increasing function of the loss, fitted by `coopq.search.ridge`. No one
quadratic fits the whole game, so points whose fill differs from the budget's fill count less. Fill is the bytes above
all players at their lowest width, as a share: 0 with all players lowest, 1 with all players highest.

Constants here are chosen by hand; `benchmarks/regret.py` and `benchmarks/enumerated.py` measure the searches that use
the surrogate on games whose optimum is known.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from coopq.core.types import Losses
from coopq.search.ridge import Ridge, fit_ridge
from coopq.search.solver.quadratic_program import QuadraticProgram, Steps

Transform = Literal["raw", "sqrt", "log"]
TRANSFORMS: tuple[Transform, ...] = ("raw", "sqrt", "log")
"""Increasing functions of the loss that may be closer to a quadratic than the loss. No transform is best for all games:
games that saturate want the loss as it is, games that explode want its root or its logarithm."""

_LOG_OFFSET = 0.05
"""What the logarithm adds to the loss above the lowest loss, as a share of the median. Chosen by hand."""
_REACH = 0.15
"""Distance in fill at which a point counts half as much as a point at the budget's fill. Chosen by hand."""
_MOST_POINTS = 1000
"""A fit takes time cubic in the points; of more points, the nearest in fill are fitted. Chosen by hand."""
_SMALLEST_GROUP = 4
"""Points of equal fill that a rank correlation needs. Chosen by hand."""
_TRUSTED = 0.5
"""Rank correlation from which a surrogate is trusted. Chosen by hand."""


@dataclass(frozen=True)
class Fidelity:
    """How far a surrogate is to be trusted near the fill that it is for, by points left out of its fit.

    Attributes:
        transform: The function of the loss that was fitted.
        error: Root mean square error of left-out points, nats per token.
        rank_correlation: Spearman correlation of left-out predictions with losses among points of equal fill, averaged
            over fills; None if no fill has enough points.
        n_points: Number of points fitted.
    """

    transform: Transform
    error: float
    rank_correlation: float | None
    n_points: int

    @property
    def is_trusted(self) -> bool:
        """Whether the surrogate ranks left-out points of equal fill clearly better than chance."""
        return self.rank_correlation is not None and self.rank_correlation >= _TRUSTED


@dataclass(frozen=True)
class Surrogate:
    """A fitted quadratic, y = constant + a'q + q'Kq, of a transform of the loss.

    Attributes:
        constant: y with no step taken.
        a: Linear terms, shape (n_steps,).
        K: Pair terms, symmetric with a zero diagonal, shape (n_steps, n_steps).
        transform: The function of the loss that y is.
        origin: The lowest loss fitted, from which roots and logarithms start, nats per token.
        offset: What the logarithm adds, nats per token.
        fidelity: How far the surrogate is to be trusted.
        ridge: The fit, for the uncertainty of predictions.
    """

    constant: float
    a: npt.NDArray[np.float64]
    K: npt.NDArray[np.float64]
    transform: Transform
    origin: float
    offset: float
    fidelity: Fidelity
    ridge: Ridge = field(repr=False, compare=False)

    def value(self, q: Steps) -> npt.NDArray[np.float64]:
        """y of points of shape (n, n_steps), shape (n,)."""
        x = q.astype(np.float64)
        return self.constant + x @ self.a + ((x @ self.K) * x).sum(axis=1)

    def predict(self, q: Steps) -> Losses:
        """Predicted losses of points of shape (n, n_steps), shape (n,), nats per token."""
        return _losses(self.value(q), self.transform, self.origin, self.offset)

    def improvement(self, q: Steps, loss: float) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Expected improvement of points on a loss, and the probability to be lower than the loss.

        Args:
            q: Points, shape (n, n_steps).
            loss: The loss to improve on, nats per token.
        Returns:
            Expected fall of y below the y of the loss, where a rise counts as 0, and the probability of a fall, both of
            shape (n,), by the normal distribution that ridge regression stands for.
        Source: Jones et al., Efficient Global Optimization, 1998.
        """
        from scipy.special import ndtr

        deviation = self.ridge.deviation(q)
        fall = float(_transform(np.array([loss]), self.transform, self.origin, self.offset)[0]) - self.value(q)
        score = fall / deviation
        probability: npt.NDArray[np.float64] = ndtr(score)
        density = np.exp(-(score**2) / 2) / math.sqrt(2 * math.pi)
        return np.maximum(fall * probability + deviation * density, 0.0), probability

    def shapley(self) -> npt.NDArray[np.float64]:
        """Shapley value of each step in the game y, shape (n_steps,)."""
        return self.a + self.K.sum(axis=1)

    def program(self, constraint: QuadraticProgram) -> QuadraticProgram:
        """The program that minimises y under the constraint of another program."""
        return replace(constraint, a=self.a, K=self.K)


def fit_surrogates(
    q: Steps,
    losses: Losses,
    *,
    fills: npt.NDArray[np.float64],
    fill: float,
    transforms: Sequence[Transform] = TRANSFORMS,
    pairs: bool = True,
) -> list[Surrogate]:
    """Fit one surrogate for each transform.

    Args:
        q: Distinct points, shape (n_points, n_steps).
        losses: Losses of the points, shape (n_points,), nats per token.
        fills: Fill of each point, shape (n_points,).
        fill: The fill that the surrogates are for, 0 to 1.
        transforms: Functions of the loss to fit.
        pairs: Whether to fit pair terms; without pair terms K is 0.
    """
    nearest = np.argsort(np.abs(fills - fill), kind="stable")[:_MOST_POINTS]
    q, losses, fills = q[nearest], losses[nearest], fills[nearest]
    weights = _nearness(fills, fill)
    origin = float(losses.min())
    offset = _LOG_OFFSET * float(np.median(losses) - origin) or 1.0
    targets = [_transform(losses, transform, origin, offset) for transform in transforms]
    surrogates = []
    for transform, y, ridge in zip(transforms, targets, fit_ridge(q, targets, weights, pairs=pairs), strict=True):
        constant, a, K = ridge.terms()
        predicted = _losses(y - ridge.left_out_errors, transform, origin, offset)
        fidelity = fidelity_of(transform, predicted, losses, fills, fill)
        surrogates.append(Surrogate(constant, a, K, transform, origin, offset, fidelity, ridge))
    return surrogates


def fidelity_of(
    transform: Transform, predicted: Losses, losses: Losses, fills: npt.NDArray[np.float64], fill: float
) -> Fidelity:
    """How far a surrogate is to be trusted near a fill.

    Args:
        transform: The function of the loss that was fitted.
        predicted: Losses of points as a fit without each point predicts them, shape (n_points,), nats per token.
        losses: Their losses, shape (n_points,).
        fills: Fill of each point, shape (n_points,).
        fill: The fill that the surrogate is for, 0 to 1.
    """
    weights = _nearness(fills, fill)
    error = float(np.sqrt(np.average((predicted - losses) ** 2, weights=weights)))
    return Fidelity(transform, error, rank_correlation(predicted, losses, fills, fill), len(losses))


def _nearness(fills: npt.NDArray[np.float64], fill: float) -> npt.NDArray[np.float64]:
    """What points count by their fill, shape (n_points,)."""
    near: npt.NDArray[np.float64] = 1 / (1 + ((fills - fill) / _REACH) ** 2)
    return near


def best_surrogate(surrogates: Sequence[Surrogate]) -> Surrogate:
    """The surrogate that ranks left-out points of equal fill best; the first if no rank correlation is known."""
    ranks = [surrogate.fidelity.rank_correlation for surrogate in surrogates]
    return surrogates[int(np.argmax([-1.0 if rank is None else rank for rank in ranks]))]


def rank_correlation(
    predicted: npt.NDArray[np.float64], losses: Losses, fills: npt.NDArray[np.float64], fill: float
) -> float | None:
    """Mean Spearman correlation within groups of equal fill near `fill`, weighted by the size of the groups.

    Args:
        predicted: Predictions in any increasing function of the loss, shape (n_points,).
        losses: Shape (n_points,).
        fills: Shape (n_points,); fills that round to the same hundredth are equal.
        fill: Only fills within `_REACH` of this one count.
    Returns:
        None if no group has enough points.
    """
    from scipy.stats import rankdata

    total, n_points = 0.0, 0
    rounded = np.round(fills, 2)
    for value in np.unique(rounded[np.abs(fills - fill) <= _REACH]):
        group = rounded == value
        n = int(group.sum())
        if n >= _SMALLEST_GROUP and np.ptp(losses[group]) > 0 and np.ptp(predicted[group]) > 0:
            ranks = np.array([rankdata(x[group]) for x in (predicted, losses)])
            total, n_points = total + n * float(np.corrcoef(ranks)[0, 1]), n_points + n
    return total / n_points if n_points else None


def _transform(losses: Losses, transform: Transform, origin: float, offset: float) -> npt.NDArray[np.float64]:
    """y of losses, shape (n,)."""
    if transform == "raw":
        return losses
    above = np.maximum(losses - origin, 0)  # the best loss of all may not be among the losses fitted
    return np.sqrt(above) if transform == "sqrt" else np.log(above + offset)


def _losses(y: npt.NDArray[np.float64], transform: Transform, origin: float, offset: float) -> Losses:
    """Losses from their y, shape (n,), nats per token."""
    if transform == "raw":
        return y
    return origin + (np.maximum(y, 0) ** 2 if transform == "sqrt" else np.exp(y) - offset)

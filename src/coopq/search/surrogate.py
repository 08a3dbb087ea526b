"""A quadratic surrogate of the game, fitted to measured losses, and how far it is to be trusted.

The model is y = c + sum_i b_i z_i + sum_{i<j} w_ij z_i z_j with z = +1 for a lowered player and -1 for another (with
more than two widths, for each step down of each player), fitted by ridge regression in its dual form: the cost depends
on the number of points, not of pairs, so 300 players are no problem. Single terms and pairs have penalties of their
own. Everything is chosen by leave-one-out errors, which the dual form gives without fitting again. Points far in size
from what is asked for count less: no one quadratic fits the whole game.

Source: leave-one-out of ridge and of kriging, Dubrule, Cross validation of kriging, 1983.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from coopq.search.solver.quadratic_program import QuadraticProgram
from coopq.core.types import Losses

Lowered = npt.NDArray[np.bool_]
"""Coalitions: True where a player is at the low width, shape (n_points, n_players) or (n_players,)."""

Transform = Literal["raw", "sqrt", "log"]
TRANSFORMS: tuple[Transform, ...] = ("raw", "sqrt", "log")
"""Increasing functions of the loss that may be more nearly quadratic than the loss itself. None is best for all games:
those that saturate want the loss as it is, those that explode its root or its logarithm."""

_PAIR_RATIOS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Prior variance of all pair terms together, in units of half that of all single terms."""
_NOISES = 10.0 ** np.arange(-7, 1)
"""Variance of what the model cannot say, in the same unit."""
_REACH = 0.15
"""Share of the size at which a point counts half as much as one of the size asked for."""
_MOST_POINTS = 1000
"""Fits are cubic in the points; of more, those nearest in size are taken."""
_TRUSTED = 0.5
"""Rank correlation from which a surrogate is trusted."""


@dataclass(frozen=True)
class Fidelity:
    """How far a surrogate is to be trusted near the size it is for, by points left out of its fit.

    Attributes:
        transform: Which function of the loss was fitted.
        error: Root mean square error of left-out points, nats per token.
        rank_correlation: Spearman correlation of left-out predictions with the losses among points of equal size,
            averaged over sizes; None where there are too few.
        n_points: Points that it was fitted to.
    """

    transform: Transform
    error: float
    rank_correlation: float | None
    n_points: int

    @property
    def is_trusted(self) -> bool:
        """Whether it ranks left-out points of equal size clearly better than chance."""
        return self.rank_correlation is not None and self.rank_correlation >= _TRUSTED


@dataclass(frozen=True)
class Surrogate:
    """A fitted quadratic, y = constant + linear'q + q' quadratic q, of a transform of the loss.

    Attributes:
        constant: y with no player lowered.
        linear: Shape (n_players,).
        quadratic: Symmetric with a zero diagonal, shape (n_players, n_players).
        transform: Which function of the loss y is.
        origin: The loss from which it starts, nats per token.
        offset: What the logarithm adds, nats per token.
        fidelity: How far it is to be trusted.
        posterior: What its predictions may be wrong by.
    """

    constant: float
    linear: npt.NDArray[np.float64]
    quadratic: npt.NDArray[np.float64]
    transform: Transform
    origin: float
    offset: float
    fidelity: Fidelity
    posterior: "_Posterior" = field(repr=False, compare=False)

    def value(self, lowered: Lowered) -> npt.NDArray[np.float64]:
        """y of coalitions, shape (n,)."""
        q = lowered.astype(np.float64)
        return self.constant + q @ self.linear + ((q @ self.quadratic) * q).sum(axis=1)

    def predict(self, lowered: Lowered) -> Losses:
        """Losses of coalitions, nats per token, shape (n,)."""
        return _losses(self.value(lowered), self.transform, self.origin, self.offset)

    def improvement(self, lowered: Lowered, loss: float) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """By how much y of coalitions is expected to fall below that of a loss, and with what probability it does.

        Both of shape (n,), by the normal distribution that ridge regression stands for; the first counts a rise as 0.

        Source: Jones et al., Efficient Global Optimization, 1998.
        """
        deviation = self.posterior.deviation(lowered)
        fall = float(_transform(np.array([loss]), self.transform, self.origin, self.offset)[0]) - self.value(lowered)
        steps = fall / deviation
        probability = 0.5 * (1 + _erf(steps / math.sqrt(2)))
        density = np.exp(-(steps**2) / 2) / math.sqrt(2 * math.pi)
        return np.maximum(fall * probability + deviation * density, 0.0), probability

    def shapley(self) -> npt.NDArray[np.float64]:
        """Shapley values of y as a game, shape (n_players,)."""
        return self.linear + self.quadratic.sum(axis=1)

    def program(self, constraint: QuadraticProgram) -> QuadraticProgram:
        """The program that minimises the surrogate under the constraint of another."""
        return replace(constraint, linear=self.linear, quadratic=self.quadratic)


def fit_surrogates(
    lowered: Lowered,
    losses: Losses,
    *,
    sizes: npt.NDArray[np.float64],
    size: float,
    transforms: Sequence[Transform] = TRANSFORMS,
    pairs: bool = True,
) -> list[Surrogate]:
    """Fit one surrogate for each transform.

    Args:
        lowered: Distinct coalitions, shape (n_points, n_players).
        losses: Their losses, shape (n_points,).
        sizes: Size of each point, 0 for all players lowered to 1 for none, shape (n_points,).
        size: The size that the surrogate is for.
        transforms: Of the loss.
        pairs: Whether to fit pair terms; without, the surrogate is additive.
    """
    nearest = np.argsort(np.abs(sizes - size), kind="stable")[:_MOST_POINTS]
    lowered, losses, sizes = lowered[nearest], losses[nearest], sizes[nearest]
    n_players = lowered.shape[1]
    z = _signs(lowered)
    gram = z @ z.T / n_players
    weight = 1 / (1 + ((sizes - size) / _REACH) ** 2)
    root = np.sqrt(weight)
    targets = [_transformed(losses, transform) for transform in transforms]
    best: list[tuple[float, _Fit] | None] = [None] * len(transforms)
    for ratio in _PAIR_RATIOS if pairs else (0.0,):
        spectrum = _Spectrum(_kernel(gram, ratio, n_players), root)
        for k, (y, _, _) in enumerate(targets):
            fit, found = spectrum.fit(y), best[k]
            if found is None or fit.surprise < found[1].surprise:
                best[k] = ratio, fit
    surrogates = []
    for transform, (y, origin, offset), found in zip(transforms, targets, best, strict=True):
        assert found is not None
        ratio, fit = found
        single = z.T @ fit.weights / n_players
        pair = ratio * (z.T * fit.weights) @ z / n_players / max(1, n_players - 1)
        np.fill_diagonal(pair, 0.0)
        left_out = y - fit.left_out
        wrong = _losses(left_out, transform, origin, offset) - losses
        surrogates.append(
            Surrogate(
                constant=float(fit.mean - single.sum() + pair.sum() / 2),
                linear=2 * single - 2 * pair.sum(axis=1),
                quadratic=2 * pair,
                transform=transform,
                origin=origin,
                offset=offset,
                fidelity=Fidelity(
                    transform,
                    float(np.sqrt((weight * wrong**2).sum() / weight.sum())),
                    _rank_correlation(left_out, losses, sizes, size),
                    len(losses),
                ),
                posterior=_Posterior(z, ratio, fit),
            )
        )
    return surrogates


def best_surrogate(surrogates: Sequence[Surrogate]) -> Surrogate:
    """The one that ranks left-out points of equal size best; the first where that is not known."""
    ranks = [surrogate.fidelity.rank_correlation for surrogate in surrogates]
    return surrogates[int(np.argmax([-1.0 if rank is None else rank for rank in ranks]))]


@dataclass(frozen=True)
class _Fit:
    """Dual solution: y(z) = mean + sum_p weights_p k(z, z_p)."""

    mean: float
    weights: npt.NDArray[np.float64]
    left_out: npt.NDArray[np.float64]
    surprise: float
    scale: float
    noise: int
    spectrum: "_Spectrum"


class _Spectrum:
    """Eigenvectors of a kernel between weighted points, from which every noise and target is fitted at once.

    Arrays with a last axis are for each of `_NOISES`.
    """

    def __init__(self, kernel: npt.NDArray[np.float64], root: npt.NDArray[np.float64]) -> None:
        self._root = root
        values, self._vectors = np.linalg.eigh(kernel * np.outer(root, root))
        self._inverse = 1 / (np.maximum(values, 0)[:, None] + _NOISES)
        self._ones = (self._vectors.T @ root)[:, None]
        self._precision = (self._ones**2 * self._inverse).sum(axis=0)
        of_ones = self._vectors @ (self._inverse * self._ones)
        leverage = self._vectors**2 @ self._inverse - of_ones**2 / self._precision
        self._leverage = np.maximum(leverage, 1e-12 * self._inverse.max(axis=0))

    def fit(self, y: npt.NDArray[np.float64]) -> _Fit:
        """Ridge with a free mean, and what it says of each point when that is left out; of the least surprising noise.

        Surprise is minus the log density of the left-out points, up to a constant.
        """
        target = (self._vectors.T @ (y * self._root))[:, None]
        means = (self._ones * self._inverse * target).sum(axis=0) / self._precision
        dual = self._vectors @ (self._inverse * (target - means * self._ones))
        scales = np.maximum((dual**2 / self._leverage).mean(axis=0), 1e-300)
        surprises = np.log(scales / self._leverage).mean(axis=0)
        k = int(surprises.argmin())
        return _Fit(
            mean=float(means[k]),
            weights=dual[:, k] * self._root,
            left_out=dual[:, k] / self._leverage[:, k] / self._root,
            surprise=float(surprises[k]),
            scale=float(scales[k]),
            noise=k,
            spectrum=self,
        )

    def unexplained(self, kernel: npt.NDArray[np.float64], own: float, noise: int) -> npt.NDArray[np.float64]:
        """Variance that the points leave of what is measured elsewhere, in units of the fit's scale, shape (n,).

        Args:
            kernel: Between elsewhere and the points, shape (n, n_points).
            own: Of each with itself.
            noise: Index of the noise.
        """
        inverse, seen = self._inverse[:, noise], (kernel * self._root) @ self._vectors
        of_mean = (1 - seen @ (inverse * self._ones[:, 0])) ** 2 / self._precision[noise]
        return _NOISES[noise] + np.maximum(own - seen**2 @ inverse + of_mean, 0)


class _Posterior:
    """How wrong a fit may be."""

    def __init__(self, z: npt.NDArray[np.float64], ratio: float, fit: _Fit) -> None:
        self._z, self._ratio, self._fit = z, ratio, fit

    def deviation(self, lowered: Lowered) -> npt.NDArray[np.float64]:
        """Standard deviation of what is measured about what is predicted, in y, shape (n,)."""
        n_players, fit = self._z.shape[1], self._fit
        kernel = _kernel(_signs(lowered) @ self._z.T / n_players, self._ratio, n_players)
        own = float(_kernel(np.ones(()), self._ratio, n_players))
        return np.sqrt(fit.scale * fit.spectrum.unexplained(kernel, own, fit.noise))


def _signs(lowered: Lowered) -> npt.NDArray[np.float64]:
    """+1 for a lowered player, -1 for another."""
    return np.where(lowered, 1.0, -1.0)


def _kernel(gram: npt.NDArray[np.float64], ratio: float, n_players: int) -> npt.NDArray[np.float64]:
    """Prior covariance of y, from the mean product of the players' signs."""
    return gram + ratio * (gram**2 * n_players - 1) / (2 * max(1, n_players - 1))


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _transformed(losses: Losses, transform: Transform) -> tuple[npt.NDArray[np.float64], float, float]:
    """The target of a fit, with the origin and the offset that undo it."""
    origin = float(losses.min())
    offset = 0.05 * float(np.median(losses) - origin) or 1.0
    return _transform(losses, transform, origin, offset), origin, offset


def _transform(losses: Losses, transform: Transform, origin: float, offset: float) -> npt.NDArray[np.float64]:
    """A function of the loss."""
    if transform == "raw":
        return losses
    above = np.maximum(losses - origin, 0)  # the best loss of all may be none of those fitted
    return np.sqrt(above) if transform == "sqrt" else np.log(above + offset)


def _losses(y: npt.NDArray[np.float64], transform: Transform, origin: float, offset: float) -> Losses:
    """Losses from what `_transformed` made of them."""
    if transform == "raw":
        return y
    return origin + (np.maximum(y, 0) ** 2 if transform == "sqrt" else np.exp(y) - offset)


def _rank_correlation(
    predicted: npt.NDArray[np.float64], losses: Losses, sizes: npt.NDArray[np.float64], size: float
) -> float | None:
    """Mean Spearman correlation within groups of equal size, weighted by their points; None without a group of 4."""
    total, n_points = 0.0, 0
    rounded = np.round(sizes, 2)
    for of_group in np.unique(rounded[np.abs(sizes - size) <= _REACH]):
        group = rounded == of_group
        n = int(group.sum())
        if n >= 4 and np.ptp(losses[group]) > 0 and np.ptp(predicted[group]) > 0:
            ranks = np.array([np.argsort(np.argsort(x[group])) for x in (predicted, losses)])
            total, n_points = total + n * float(np.corrcoef(ranks)[0, 1]), n_points + n
    return total / n_points if n_points else None

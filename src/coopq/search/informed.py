"""A surrogate of the game that knows beforehand what each step costs about: a Gaussian process on the log of the loss.

Let g_i > 0 be the prior: what step i costs alone, from a score or from a loss, up to one factor. With q the steps taken
and g_0 what is lost at the highest widths, S(q) = g_0 + sum_i q_i g_i, and the share of step i is s_i = q_i g_i / S(q).
The surrogate is

    log L(q) = c_0 + c_1 log S(q) + sum_i s_i d_i + sum_{i<j} sqrt(s_i s_j) e_ij + noise

with d_i and e_ij normal about zero: a step costs a factor more or less than the prior says, and two steps together cost
more or less than both. Factors d are alike among steps of the same kind (the same projection and widths), of the same
widths and of blocks near by; e is larger for blocks near by. Variances are chosen by the density of left-out points.

Source: Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, sections 2.7 and 5.4.2. That a gradient
score predicts losses to a factor that is much the same for all steps: benchmarks/informed.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np
import numpy.typing as npt

from coopq.core.types import Losses
from coopq.search.solver.quadratic_program import Steps
from coopq.search.space import SearchSpace

Floats = npt.NDArray[np.float64]

PRIOR_SCORE = "auto-quantize"
"""The score that is the prior of the active search: benchmarks/informed.py compares scores."""
_FALL = 4.0
"""By what a bit more divides the error of rounding, in squares."""

_ALIKE = (0.25, 0.35, 0.2, 0.2)
"""Shares of the variance of d that a step has for itself, with its kind, with its widths, and with blocks near by."""
_REACH = 3.0
"""Blocks over which what is alike falls to a third."""
_FACTORS = (0.02, 0.1, 0.4, 1.5)
"""Variances of d to choose from."""
_PAIRS = (0.0, 0.1, 0.5, 2.0)
"""Variances of e to choose from, in units of the variance of d."""
_NOISES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""Variances of the noise to choose from."""
_FAR = 1.0
"""Distance in log loss from a budget's best loss at which a point counts half."""


@dataclass(frozen=True)
class Prior:
    """What is known of steps before an assignment is measured.

    Attributes:
        gains: What each step costs alone, up to a factor, shape (n_steps,), positive.
        base: What is lost with no step taken, in the same unit, not negative.
        origin: Loss of the model in full precision, nats per token: 0 for divergences.
        blocks: Block of each step, shape (n_steps,).
        kinds: A number for the projection and the widths of each step, shape (n_steps,).
        widths: A number for the widths of each step, shape (n_steps,).
    """

    gains: Floats
    base: float
    origin: float
    blocks: npt.NDArray[np.intp]
    kinds: npt.NDArray[np.intp]
    widths: npt.NDArray[np.intp]

    @cached_property
    def alike(self) -> Floats:
        """Prior covariance of the factors d, with variance 1, shape (n_steps, n_steps)."""
        own, kind, width, near = _ALIKE
        return (
            own * np.eye(len(self.gains))
            + kind * np.equal.outer(self.kinds, self.kinds)
            + width * np.equal.outer(self.widths, self.widths)
            + near * self.near_steps
        )

    @property
    def near_steps(self) -> Floats:
        """How near the blocks of two steps are, 1 for the same block, shape (n_steps, n_steps)."""
        near: Floats = self._nearness[np.ix_(self.blocks, self.blocks)]
        return near

    @cached_property
    def _nearness(self) -> Floats:
        """How alike blocks are, shape (n_blocks, n_blocks)."""
        block = np.arange(self.blocks.max() + 1)
        near: Floats = np.exp(-np.abs(np.subtract.outer(block, block)) / _REACH)
        return near

    def totals(self, q: Steps) -> Floats:
        """S of points of shape (n, n_steps), shape (n,)."""
        return self.base + q @ self.gains

    def shares(self, q: Steps) -> Floats:
        """s of points of shape (n, n_steps), of the same shape."""
        return q * self.gains / self.totals(q)[:, None]

    def pair_kernel(self, first: Floats, second: Floats) -> Floats:
        """Covariance of the pair terms, with variance 1, of points by their shares, shape (n_first, n_second)."""
        roots = np.sqrt(first), np.sqrt(second)
        found = np.zeros((len(first), len(second)))
        blocks = [np.flatnonzero(self.blocks == block) for block in range(len(self._nearness))]
        by_block = np.stack([roots[0][:, steps] @ roots[1][:, steps].T for steps in blocks])
        for row, nearness in zip(by_block, self._nearness, strict=True):
            found += row * np.tensordot(nearness, by_block, axes=1)
        return found / 2


def make_prior(
    space: SearchSpace, gains: Floats, origin: float, blocks: Sequence[int], layers: Sequence[Sequence[str]]
) -> Prior:
    """The prior that a score says.

    Args:
        space: Players and steps.
        gains: The score of each step, shape (n_steps,).
        origin: Loss of the model in full precision, nats per token.
        blocks: Block of each player, shape (n_players,).
        layers: Names of the linear layers of each player; the last part of a name is the projection.
    """
    positive = gains[gains > 0]
    gains = np.maximum(gains, 0.01 * float(np.median(positive)) if len(positive) else 1.0)
    pairs = [pair for widths in space.player_widths for pair in zip(widths[:0:-1], widths[-2::-1], strict=True)]
    is_first = np.diff(space.player_of_step, prepend=-1) > 0
    apart = np.array([high - low for high, low in pairs], dtype=np.float64)
    projections = ["+".join(name.rpartition(".")[2] for name in names) for names in layers]
    kinds = [projections[player] for player in space.player_of_step]
    return Prior(
        gains=gains,
        base=float((gains / (_FALL**apart - 1))[is_first].sum()),
        origin=origin,
        blocks=np.array(blocks, dtype=np.intp)[space.player_of_step],
        kinds=_numbers([f"{kind} {pair}" for kind, pair in zip(kinds, pairs, strict=True)]),
        widths=_numbers([str(pair) for pair in pairs]),
    )


def _numbers(names: Sequence[str]) -> npt.NDArray[np.intp]:
    """A number for each different name, in the order of the names."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], dtype=np.intp)


@dataclass(frozen=True)
class InformedSurrogate:
    """A fitted surrogate.

    Attributes:
        prior: The prior.
        origin: The loss that is subtracted before the logarithm is taken, nats per token.
        mean: c_0 and c_1.
        factor: Variance of d.
        pairs: Variance of e.
        left_out: Log of the loss of each fitted point as the other points predict it, shape (n_points,).
        shares: Shares of the fitted points, shape (n_points, n_steps).
        weights: The inverse covariance times the points' distance from the mean, shape (n_points,).
        inverse: The inverse covariance of the fitted points, shape (n_points, n_points).
    """

    prior: Prior
    origin: float
    mean: Floats
    factor: float
    pairs: float
    left_out: Floats = field(repr=False)
    shares: Floats = field(repr=False)
    weights: Floats = field(repr=False)
    inverse: Floats = field(repr=False)

    def pair_terms(self, q: Steps) -> Floats:
        """What pairs of steps add to the log of the loss of one point beyond what the single steps do.

        Args:
            q: The point, shape (n_steps,).
        Returns:
            sqrt(s_i s_j) e_ij with the fitted mean of e, symmetric with a zero diagonal, shape (n_steps, n_steps).
        """
        roots, fitted = np.sqrt(self.prior.shares(q[None])[0]), np.sqrt(self.shares)
        e = self.pairs * self.prior.near_steps * ((fitted.T * self.weights) @ fitted)
        terms: Floats = np.outer(roots, roots) * e
        np.fill_diagonal(terms, 0.0)
        return terms

    def corrected_gains(self) -> Floats:
        """The prior's gains times the factors that the measured losses say, shape (n_steps,)."""
        factors = self.factor * self.prior.alike @ (self.shares.T @ self.weights)
        corrected: Floats = self.prior.gains * np.exp(np.clip(factors, -2, 2))
        return corrected

    def log_loss(self, q: Steps) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the log of the loss of points of shape (n, n_steps), both of shape (n,)."""
        shares = self.prior.shares(q)
        alike = shares @ self.prior.alike
        kernel = self.factor * alike @ self.shares.T
        variance = self.factor * (alike * shares).sum(axis=1)
        if self.pairs:
            kernel += self.pairs * self.prior.pair_kernel(shares, self.shares)
            variance += self.pairs * 0.5  # at most: shares add to one
        mean = self.mean[0] + self.mean[1] * np.log(self.prior.totals(q)) + kernel @ self.weights
        left = variance - ((kernel @ self.inverse) * kernel).sum(axis=1)
        return mean, np.sqrt(np.maximum(left, 1e-10))

    def predict(self, q: Steps) -> Losses:
        """Losses of points of shape (n, n_steps), shape (n,), nats per token."""
        return self.losses_of(self.log_loss(q)[0])

    def losses_of(self, logs: Floats) -> Losses:
        """Losses whose logs above the origin are given, shape (n,), nats per token."""
        losses: Losses = self.origin + np.exp(logs)
        return losses

    def log_of(self, losses: Losses) -> Floats:
        """The log of losses above the origin, shape (n,)."""
        return _logs(losses, self.origin)

    def improvement(self, q: Steps, loss: float) -> Floats:
        """Expected fall of the log of the loss below that of a loss, a rise counted as 0, shape (n,).

        Source: Jones et al., Efficient Global Optimization, 1998.
        """
        from scipy.special import ndtr

        mean, deviation = self.log_loss(q)
        fall = float(self.log_of(np.array([loss]))[0]) - mean
        score = fall / deviation
        return np.maximum(fall * ndtr(score) + deviation * np.exp(-(score**2) / 2) / math.sqrt(2 * math.pi), 0.0)


def fit_informed(prior: Prior, q: Steps, losses: Losses, near: float, *, pairs: bool = True) -> InformedSurrogate:
    """Fit the surrogate to measured points.

    Args:
        prior: The prior.
        q: Distinct points, shape (n_points, n_steps).
        losses: Their losses, shape (n_points,), nats per token.
        near: The loss near which the surrogate is to be right.
        pairs: Whether to fit pair terms.
    """
    origin = _origin(prior.origin, losses)
    y = _logs(losses, origin)
    shares, x = prior.shares(q), np.log(prior.totals(q))
    distance = (y - float(_logs(np.array([near]), origin)[0])) / _FAR
    alike = shares @ prior.alike @ shares.T
    both = prior.pair_kernel(shares, shares) if pairs else np.zeros_like(alike)
    design = np.stack([np.ones_like(x), x], axis=1)
    root = 1 / np.sqrt(1 + distance**2)
    best: tuple[float, InformedSurrogate] | None = None
    for ratio in _PAIRS if pairs else (0.0,):
        values, vectors = np.linalg.eigh((alike + ratio * both) * np.outer(root, root))
        for factor, noise in product(_FACTORS, _NOISES):
            inverse = (vectors / (factor * np.maximum(values, 0) + noise)) @ vectors.T * np.outer(root, root)
            surprise, mean, weights, errors = _solve(inverse, design, y)
            if best is None or surprise < best[0]:
                variances = factor, factor * ratio
                found = InformedSurrogate(prior, origin, mean, *variances, y - errors, shares, weights, inverse)
                best = surprise, found
    assert best is not None
    return best[1]


def _solve(inverse: Floats, design: Floats, y: Floats) -> tuple[float, Floats, Floats, Floats]:
    """Regression with a free mean: minus the log density of left-out points, the mean's terms, weights, and errors.

    The slope has a weak prior about one, so that a few points at the same total do not turn it.
    """
    precision = design.T @ inverse @ design + np.diag([1e-6, 4.0])
    mean = np.linalg.solve(precision, design.T @ inverse @ y + np.array([0.0, 4.0]))
    weights = inverse @ (y - design @ mean)
    diagonal = np.maximum(np.diag(inverse), 1e-300)
    errors = weights / diagonal
    surprise = float((errors**2 * diagonal - np.log(diagonal)).mean())
    return surprise, mean, weights, errors


def _origin(origin: float, losses: Losses) -> float:
    """The loss that logarithms start from: that of full precision, and lower if losses come near or below it."""
    above = losses - origin
    smallest = 0.05 * float(np.median(above)) if origin else 0.0  # divergences are never negative
    return origin - max(0.0, smallest - float(above.min()) if above.min() < smallest else 0.0)


def _logs(losses: Losses, origin: float) -> Floats:
    logs: Floats = np.log(np.maximum(losses - origin, 1e-9))
    return logs


def knapsacks(capacities: Sequence[int], most: int, n: int) -> list[int]:
    """Capacities for first points: those of the budgets, and others from below the smallest to above the largest."""
    spread = np.linspace(0.8 * min(capacities), min(1.15 * max(capacities), most), n)
    return sorted({*capacities, *(int(capacity) for capacity in spread)})

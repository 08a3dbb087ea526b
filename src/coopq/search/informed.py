"""A surrogate of the game that knows beforehand what each step costs about: a Gaussian process on the log of the loss.

With S(q) what the prior says that the steps taken cost together, and s_i the share of step i in S(q)
(`coopq.search.prior`), the surrogate is

    log L(q) = c_0 + c_1 log S(q) + sum_i s_i d_i + 1/2 sum_{i,j} sqrt(s_i s_j) e_ij + noise

with d_i and e_ij normal about zero: a step costs a factor more or less than the prior says, and two steps together cost
more or less than both. Factors d are alike among steps of the same kind (the same projection and widths), of the same
widths and of blocks near by; e is larger for blocks near by. Variances are chosen by the density of left-out points.

Source: Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, sections 2.7 and 5.4.2.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np

from coopq.core.types import Losses
from coopq.search.prior import Floats, Prior
from coopq.search.solver.quadratic_program import Steps

_FACTORS = (0.02, 0.1, 0.4, 1.5)
"""Variances of d to choose from."""
_PAIRS = (0.0, 0.1, 0.5, 2.0)
"""Variances of e to choose from, in units of the variance of d."""
_NOISES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""Variances of the noise to choose from."""
_LEAST = 0.05
"""Least distance of the lowest loss from the origin, in distances of that loss from the median. Chosen by hand."""
_FAR = 1.0
"""Distance in log loss from a budget's best loss at which a point counts half."""


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
        roots = np.sqrt(self.prior.shares(q[None])[0])
        terms: Floats = np.outer(roots, roots) * self._pair_factors
        np.fill_diagonal(terms, 0.0)
        return terms

    def corrected_gains(self) -> Floats:
        """The prior's gains times the factors that the measured losses say, shape (n_steps,)."""
        corrected: Floats = self.prior.gains * np.exp(np.clip(self._factors, -2, 2))
        return corrected

    def log_loss(self, q: Steps) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the log of the loss of points of shape (n, n_steps), both of shape (n,)."""
        shares = self.prior.shares(q)
        alike = shares @ self.prior.alike
        kernel = self.factor * alike @ self.shares.T
        variance = self.factor * (alike * shares).sum(axis=1)
        if self.pairs:
            kernel += self.pairs * self.prior.pair_kernel(shares, self.shares)
            variance += self.pairs * self.prior.pair_variance(shares)
        left = variance - ((kernel @ self.inverse) * kernel).sum(axis=1)
        return self._trend(q) + kernel @ self.weights, np.sqrt(np.maximum(left, 1e-10))

    def mean_log_loss(self, q: Steps) -> Floats:
        """Mean of the log of the loss of points of shape (n, n_steps), shape (n,): `log_loss` without the deviation."""
        shares = self.prior.shares(q)
        mean: Floats = self._trend(q) + shares @ self._factors
        if self.pairs:
            roots = np.sqrt(shares)
            mean += ((roots @ self._pair_factors) * roots).sum(axis=1) / 2
        return mean

    def _trend(self, q: Steps) -> Floats:
        """The surrogate's mean before factors and pair terms, shape (n,)."""
        trend: Floats = self.mean[0] + self.mean[1] * np.log(self.prior.totals(q))
        return trend

    @cached_property
    def _factors(self) -> Floats:
        """Fitted mean of d, shape (n_steps,)."""
        factors: Floats = self.factor * self.prior.alike @ (self.shares.T @ self.weights)
        return factors

    @cached_property
    def _pair_factors(self) -> Floats:
        """Fitted mean of e, shape (n_steps, n_steps)."""
        fitted = np.sqrt(self.shares)
        factors: Floats = self.pairs * self.prior.near_steps * ((fitted.T * self.weights) @ fitted)
        return factors

    def predict(self, q: Steps) -> Losses:
        """Losses of points of shape (n, n_steps), shape (n,), nats per token."""
        return self.losses_of(self.mean_log_loss(q))

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
    origin = lowered_origin(prior.origin, losses)
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
        factors, noises = np.array(list(product(_FACTORS, _NOISES))).T
        inverse_values = 1 / (factors * np.maximum(values, 0)[:, None] + noises)
        vectors *= root[:, None]
        surprise, mean, weights, errors = _solve(vectors, inverse_values, design, y)
        k = int(surprise.argmin())
        if best is None or surprise[k] < best[0]:
            variances = factors[k], factors[k] * ratio
            inverse = (vectors * inverse_values[:, k]) @ vectors.T
            found = InformedSurrogate(
                prior, origin, mean[k], *variances, y - errors[:, k], shares, weights[:, k], inverse
            )
            best = float(surprise[k]), found
    assert best is not None
    return best[1]


def _solve(vectors: Floats, values: Floats, design: Floats, y: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Regressions with a free mean, one for each of several inverse covariances V diag(values) V'.

    The slope has a weak prior about one, so that a few points at the same total do not turn it.

    Args:
        vectors: V, shape (n_points, n_points).
        values: Shape (n_points, n).
        design: Shape (n_points, 2).
        y: Shape (n_points,).
    Returns:
        Minus the log density of left-out points, shape (n,); the mean's terms, shape (n, 2); weights and errors of
        left-out points, both of shape (n_points, n).
    """
    x, z = vectors.T @ design, vectors.T @ y
    precision = np.einsum("pi,pn,pj->nij", x, values, x) + np.diag([1e-6, 4.0])
    mean = np.linalg.solve(precision, np.einsum("pi,pn,p->ni", x, values, z)[..., None] + [[0.0], [4.0]])[..., 0]
    weights = vectors @ (values * (z[:, None] - x @ mean.T))
    diagonal = np.maximum(vectors**2 @ values, 1e-300)
    errors = weights / diagonal
    surprise = (errors**2 * diagonal - np.log(diagonal)).mean(axis=0)
    return surprise, mean, weights, errors


def lowered_origin(origin: float, losses: Losses) -> float:
    """The loss that logarithms start from: that of full precision, or a lower one if losses come near or below it.

    Rounding to 6 or 8 bits can lower the loss of a text below that of full precision. Divergences are never negative.
    """
    if not origin:
        return 0.0
    lowest = float(losses.min())
    return min(origin, lowest - _LEAST * (float(np.median(losses)) - lowest))


def _logs(losses: Losses, origin: float) -> Floats:
    logs: Floats = np.log(np.maximum(losses - origin, 1e-9))
    return logs

"""Ridge regression of a quadratic, y = mean + sum_i b_i z_i + sum_{i<j} w_ij z_i z_j with z_i = 2 q_i - 1.

The regression is solved in its dual form: its cost grows with the number of points, not with the number of pairs, so
300 steps are no problem. Single terms and pair terms have penalties of their own. Penalties are chosen by the
predictions of left-out points, which the dual form gives without fitting again.

Source: leave-one-out of ridge and of kriging, Dubrule, Cross validation of kriging, 1983.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coopq.search.solver.quadratic_program import Floats, Steps, terms_by_steps

_PAIR_RATIOS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Prior variances of all pair terms together to choose from, in units of half the variance of all single terms. Chosen
by hand."""
_NOISES = 10.0 ** np.arange(-7, 1)
"""Variances of what a quadratic cannot say to choose from, in the same unit. Chosen by hand."""


@dataclass(frozen=True)
class Ridge:
    """A fitted quadratic.

    Attributes:
        z: Signs of the points, shape (n_points, n_steps).
        pair_ratio: One of `_PAIR_RATIOS`, chosen by the left-out predictions.
        dual: The dual solution.
    """

    z: Floats
    pair_ratio: float
    dual: "_Dual"

    @property
    def left_out_errors(self) -> Floats:
        """y of each point minus its prediction by a fit without the point, shape (n_points,)."""
        return self.dual.left_out_errors

    def terms(self) -> tuple[float, Floats, Floats]:
        """The quadratic as c + a'q + q'Kq.

        Returns:
            c; a, shape (n_steps,); K, symmetric with a zero diagonal, shape (n_steps, n_steps).
        """
        n_steps = self.z.shape[1]
        single = self.z.T @ self.dual.weights / n_steps
        pair = self.pair_ratio * (self.z.T * self.dual.weights) @ self.z / n_steps / max(1, n_steps - 1)
        return terms_by_steps(self.dual.mean, single, pair)

    def deviation(self, q: Steps) -> Floats:
        """Standard deviation of y about its prediction, of points of shape (n, n_steps), shape (n,)."""
        n_steps, dual = self.z.shape[1], self.dual
        kernel = _kernel(_signs(q) @ self.z.T / n_steps, self.pair_ratio, n_steps)
        variance = float(_kernel(np.ones(()), self.pair_ratio, n_steps))
        return np.sqrt(dual.scale * dual.spectrum.unexplained(kernel, variance, dual.noise))


def fit_ridge(q: Steps, targets: Sequence[Floats], weights: Floats, *, pairs: bool) -> list[Ridge]:
    """Fit one quadratic to each target, with the penalties that make left-out points least surprising.

    Args:
        q: Distinct points, shape (n_points, n_steps).
        targets: For each fit, y of the points, shape (n_points,).
        weights: How much each point counts, shape (n_points,).
        pairs: Whether to fit pair terms.
    """
    z, n_steps = _signs(q), q.shape[1]
    gram, root = z @ z.T / n_steps, np.sqrt(weights)
    best: list[Ridge | None] = [None] * len(targets)
    for ratio in _PAIR_RATIOS if pairs else (0.0,):
        spectrum = _Spectrum(_kernel(gram, ratio, n_steps), root)
        for k, y in enumerate(targets):
            dual, found = spectrum.fit(y), best[k]
            if found is None or dual.surprise < found.dual.surprise:
                best[k] = Ridge(z, ratio, dual)
    return [found for found in best if found is not None]


@dataclass(frozen=True)
class _Dual:
    """Dual solution, y(z) = mean + sum_p weights_p kernel(z, z_p).

    Attributes:
        mean: Constant term.
        weights: Shape (n_points,).
        left_out_errors: y of each point minus its prediction by a fit without the point, shape (n_points,).
        surprise: Minus the log density of the left-out points, up to a constant.
        scale: Variance that the unit of kernel and noise stands for.
        noise: Index into `_NOISES`.
        spectrum: Of the kernel between the points.
    """

    mean: float
    weights: Floats
    left_out_errors: Floats
    surprise: float
    scale: float
    noise: int
    spectrum: "_Spectrum"


class _Spectrum:
    """Eigenvectors of a kernel between weighted points, which fit every noise and every target at once.

    The last axis of arrays runs over `_NOISES`.

    Args:
        kernel: Between the points, shape (n_points, n_points).
        root: Square roots of the points' weights, shape (n_points,).
    """

    def __init__(self, kernel: Floats, root: Floats) -> None:
        self._root = root
        values, self._vectors = np.linalg.eigh(kernel * np.outer(root, root))
        self._inverse = 1 / (np.maximum(values, 0)[:, None] + _NOISES)
        self._ones = (self._vectors.T @ root)[:, None]
        self._precision = (self._ones**2 * self._inverse).sum(axis=0)
        dual_ones = self._vectors @ (self._inverse * self._ones)
        leverage = self._vectors**2 @ self._inverse - dual_ones**2 / self._precision
        self._leverage = np.maximum(leverage, 1e-12 * self._inverse.max(axis=0))

    def fit(self, y: Floats) -> _Dual:
        """Ridge regression with a free mean, for the noise that makes left-out points least surprising."""
        target = (self._vectors.T @ (y * self._root))[:, None]
        means = (self._ones * self._inverse * target).sum(axis=0) / self._precision
        dual = self._vectors @ (self._inverse * (target - means * self._ones))
        scales = np.maximum((dual**2 / self._leverage).mean(axis=0), 1e-300)
        surprises = np.log(scales / self._leverage).mean(axis=0)
        k = int(surprises.argmin())
        return _Dual(
            mean=float(means[k]),
            weights=dual[:, k] * self._root,
            left_out_errors=dual[:, k] / self._leverage[:, k] / self._root,
            surprise=float(surprises[k]),
            scale=float(scales[k]),
            noise=k,
            spectrum=self,
        )

    def unexplained(self, kernel: Floats, variance: float, noise: int) -> Floats:
        """Variance of y at new points that the fitted points do not explain, in units of the fit's scale, shape (n,).

        Args:
            kernel: Between new and fitted points, shape (n, n_points).
            variance: Kernel of a new point with itself.
            noise: Index into `_NOISES`.
        """
        inverse, seen = self._inverse[:, noise], (kernel * self._root) @ self._vectors
        mean_variance = (1 - seen @ (inverse * self._ones[:, 0])) ** 2 / self._precision[noise]
        return _NOISES[noise] + np.maximum(variance - seen**2 @ inverse + mean_variance, 0)


def _signs(q: Steps) -> Floats:
    """z: +1 for a step taken, -1 for a step not taken."""
    return np.where(q, 1.0, -1.0)


def _kernel(gram: Floats, pair_ratio: float, n_steps: int) -> Floats:
    """Prior covariance of y, from the mean product of the points' signs."""
    return gram + pair_ratio * (gram**2 * n_steps - 1) / (2 * max(1, n_steps - 1))

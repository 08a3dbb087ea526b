"""A lower bound on the quadratic program, for any K, in seconds for hundreds of steps.

On binary q a diagonal can be moved between K and the linear terms: q'Kq = q'(K + diag(u))q - u'q. For every u that
makes K + diag(u) positive semidefinite, the convex program over 0 <= q <= 1 bounds the binary program from below.
Supergradient steps improve u. Accelerated projected gradient steps solve the convex program. The value returned is the
Frank-Wolfe bound of the convex program, which holds wherever the gradient steps stop. The order of a player's steps is
left out, which only lowers the bound.

Source: Billionnet and Elloumi, Using a mixed integer quadratic programming solver for the unconstrained quadratic 0-1
problem, 2007; Jaggi, Revisiting Frank-Wolfe, 2013.
"""

import numpy as np

from coopq.search.solver.quadratic_program import Floats, QuadraticProgram

_OUTER, _INNER = 30, 150
"""Supergradient steps, and gradient steps within each. Chosen by hand; docs/results/solver.md has gaps and seconds."""
_STEP = 1.4
"""First supergradient step, as a share of the mean of u. Chosen by hand."""


def lower_bound(program: QuadraticProgram) -> float:
    """A value that no feasible q of the program falls below, in the unit of the objective."""
    n = len(program.a)
    weights = program.step_bytes / program.step_bytes.sum() * n  # bytes in a unit that keeps the gradients well scaled
    least = weights.sum() - program.capacity / program.step_bytes.sum() * n  # weight of the steps taken, at least
    pairs = (program.K + program.K.T) / 2
    linear = program.a + np.diag(pairs)
    np.fill_diagonal(pairs, 0.0)
    u = np.full(n, max(0.0, -float(np.linalg.eigvalsh(pairs)[0])))
    size, best = float(u.mean()), -np.inf
    q: Floats = np.full(n, 0.5)
    for step in range(_OUTER):
        hessian, shifted = pairs + np.diag(u), linear - u
        q = _minimise(shifted, hessian, weights, least, q)
        gradient = shifted + 2 * hessian @ q
        lowest = _cheapest(gradient, weights, least)
        best = max(best, float(shifted @ q + q @ hessian @ q - gradient @ (q - lowest)))
        if size == 0:
            break
        # The bound grows where u shrinks on fractional entries of q, as far as K + diag(u) stays semidefinite.
        u = u + _STEP * size / np.sqrt(1 + step) * (q * q - q)
        u = u + max(0.0, -float(np.linalg.eigvalsh(pairs + np.diag(u))[0]))
    return best


def _minimise(linear: Floats, hessian: Floats, weights: Floats, least: float, q: Floats) -> Floats:
    """Nearly the minimum of linear'q + q' hessian q over 0 <= q <= 1 with weights'q >= least, shape (n_steps,)."""
    steepest = 2 * float(np.linalg.eigvalsh(hessian)[-1]) + 1e-12
    ahead, momentum = q, 1.0
    for _ in range(_INNER):
        new = _project(ahead - (linear + 2 * hessian @ ahead) / steepest, weights, least)
        faster = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead, q, momentum = new + (momentum - 1) / faster * (new - q), new, faster
    return q


def _project(x: Floats, weights: Floats, least: float) -> Floats:
    """The point nearest to x of 0 <= q <= 1 with weights'q >= least, shape (n_steps,)."""
    q: Floats = np.clip(x, 0, 1)
    if weights @ q >= least:
        return q
    # The point is clip(x + t weights, 0, 1) for some t. Its weight is linear in t between the values of t at which an
    # entry leaves 0 or reaches 1.
    turns = np.concatenate([-x / weights, (1 - x) / weights])
    order = np.argsort(turns)
    turns, slopes = turns[order], np.cumsum(np.repeat([1.0, -1.0], len(x))[order] * np.tile(weights**2, 2)[order])
    reached = np.concatenate([[0.0], np.cumsum(slopes[:-1] * np.diff(turns))])
    return np.clip(x + np.interp(least, reached, turns) * weights, 0, 1)


def _cheapest(gradient: Floats, weights: Floats, least: float) -> Floats:
    """The minimum of gradient'q over 0 <= q <= 1 with weights'q >= least: a fractional knapsack, shape (n_steps,)."""
    q = (gradient < 0).astype(np.float64)
    missing = least - float(weights @ q)
    free = np.flatnonzero(gradient >= 0)
    for step in free[np.argsort(gradient[free] / weights[free], kind="stable")]:
        if missing <= 0:
            break
        q[step] = min(1.0, missing / weights[step])
        missing -= float(q[step] * weights[step])
    return q

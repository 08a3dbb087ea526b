"""A lower bound on the program of a budget, for any K, in seconds for hundreds of players.

On binary q a diagonal can be moved between K and the linear term: q'Kq = q'(K + diag(u))q - u'q. For every u that makes
K + diag(u) positive semidefinite, the convex program over 0 <= q <= 1 bounds the binary one from below; u is improved
by supergradient steps. The convex program is solved by accelerated projected gradient, and what is returned is not its
value but its Frank-Wolfe bound, which holds wherever the gradient steps stop.

Source: Billionnet and Elloumi, Using a mixed integer quadratic programming solver for the unconstrained quadratic 0-1
problem, 2007; Jaggi, Revisiting Frank-Wolfe, 2013.
"""

import numpy as np
import numpy.typing as npt

from coopq.search.solver.quadratic_program import QuadraticProgram

_OUTER, _INNER = 30, 150

Floats = npt.NDArray[np.float64]


def lower_bound(program: QuadraticProgram) -> float:
    """A value that no assignment of the budget falls below, in the unit of the program."""
    n = len(program.linear)
    costs = program.costs / program.costs.sum() * n
    kept = costs.sum() - program.capacity / program.costs.sum() * n  # of the costs, by lowered players at least
    pairs = (program.quadratic + program.quadratic.T) / 2
    linear = program.linear + np.diag(pairs)
    np.fill_diagonal(pairs, 0.0)
    shift = np.full(n, max(0.0, -float(np.linalg.eigvalsh(pairs)[0])))
    size, best = float(shift.mean()), -np.inf
    q: Floats = np.full(n, 0.5)
    for step in range(_OUTER):
        hessian, slope = pairs + np.diag(shift), linear - shift
        q = _minimise(slope, hessian, costs, kept, q)
        gradient = slope + 2 * hessian @ q
        lowest = _cheapest(gradient, costs, kept)
        best = max(best, float(slope @ q + q @ hessian @ q - gradient @ (q - lowest)))
        if size == 0:
            break
        # The bound grows where the shift shrinks on fractional players, as far as K + diag(u) allows.
        shift = shift + 1.4 * size / np.sqrt(1 + step) * (q * q - q)
        shift = shift + max(0.0, -float(np.linalg.eigvalsh(pairs + np.diag(shift))[0]))
    return best


def _minimise(slope: Floats, hessian: Floats, costs: Floats, kept: float, q: Floats) -> Floats:
    """Nearly the minimum of slope'q + q' hessian q over the box with costs'q >= kept."""
    steepest = 2 * float(np.linalg.eigvalsh(hessian)[-1]) + 1e-12
    ahead, momentum = q, 1.0
    for _ in range(_INNER):
        new = _project(ahead - (slope + 2 * hessian @ ahead) / steepest, costs, kept)
        faster = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead, q, momentum = new + (momentum - 1) / faster * (new - q), new, faster
    return q


def _project(x: Floats, costs: Floats, kept: float) -> Floats:
    """The nearest point of the box with costs'q >= kept."""
    q: Floats = np.clip(x, 0, 1)
    if costs @ q >= kept:
        return q
    # It is clip(x + t costs, 0, 1) for some t, and its cost is linear in t between the t where a player leaves 0 or
    # reaches 1.
    turns = np.concatenate([-x / costs, (1 - x) / costs])
    order = np.argsort(turns)
    turns, slopes = turns[order], np.cumsum(np.repeat([1.0, -1.0], len(x))[order] * np.tile(costs**2, 2)[order])
    reached = np.concatenate([[0.0], np.cumsum(slopes[:-1] * np.diff(turns))])
    return np.clip(x + np.interp(kept, reached, turns) * costs, 0, 1)


def _cheapest(gradient: Floats, costs: Floats, kept: float) -> Floats:
    """Where gradient'q is lowest over the box with costs'q >= kept: a fractional knapsack."""
    q = (gradient < 0).astype(np.float64)
    missing = kept - float(costs @ q)
    free = np.flatnonzero(gradient >= 0)
    for player in free[np.argsort(gradient[free] / costs[free], kind="stable")]:
        if missing <= 0:
            break
        q[player] = min(1.0, missing / costs[player])
        missing -= float(q[player] * costs[player])
    return q

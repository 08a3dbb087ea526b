"""Local search on the quadratic program: fast for hundreds of steps and any K, but without a proof."""

from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.search.solver.quadratic_program import QuadraticProgram, Steps


def descend(program: QuadraticProgram, q: Steps) -> Steps:
    """Make the best move until no move lowers the objective.

    A move takes one step back, takes one step down, or does both for two players, and keeps the capacity. The steps of
    players with more than two widths differ much in bytes. When no move helps such players, the descent also tries to
    take one step back and several steps of other players down.

    Args:
        program: The program to minimise.
        q: A feasible start, shape (n_steps,).
    Returns:
        A feasible q that no single move improves, shape (n_steps,).
    """
    q = q.copy()
    pairs = program.K + program.K.T
    diagonal = np.diag(program.K)
    np.fill_diagonal(pairs, 0.0)
    marginals = program.a + diagonal + pairs @ q  # what taking each step adds while all other steps stay
    tolerance = 1e-12 * (float(np.abs(program.a).max()) + float(np.abs(program.K).max()))
    while True:
        back, down, change = _moves(program, q, marginals, pairs)
        best = np.unravel_index(int(change.argmin()), change.shape)
        if change[best] < -tolerance:
            changed = [step for step in (back[best[0]], down[best[1]]) if step >= 0]
        else:
            regrouped = _regrouped(program, q, marginals) if program.needs_previous.any() else q
            if not program.objective(regrouped) < program.objective(q) - tolerance:
                return q
            changed = np.flatnonzero(regrouped != q).tolist()
        for step in changed:
            marginals += pairs[step] * (-1.0 if q[step] else 1.0)
            q[step] = not q[step]


def local_optima(program: QuadraticProgram, starts: Steps, n_random: int, rng: np.random.Generator) -> Steps:
    """The distinct ends of descents, best first.

    Args:
        program: The program to minimise.
        starts: Feasible points to start from, shape (n_starts, n_steps); n_starts may be 0.
        n_random: Number of random starts besides.
        rng: Source of the random starts.
    Returns:
        Shape (n_optima, n_steps).
    """
    found = [descend(program, start) for start in (*starts, *(random_fill(program, rng) for _ in range(n_random)))]
    optima = distinct_points(np.array(found))
    return optima[np.argsort([program.objective(q) for q in optima], kind="stable")]


def random_fill(program: QuadraticProgram, rng: np.random.Generator) -> Steps:
    """A random q that fills the capacity: steps are taken back in random order, each if it fits, shape (n_steps,)."""
    q = np.ones(len(program.a), dtype=bool)
    left = program.capacity
    for drawn in rng.permutation(len(q)):
        is_taken = q & (program.player_of_step == program.player_of_step[drawn])
        step = np.flatnonzero(is_taken)[-1]  # only the last step that a player has taken can be taken back
        if program.step_bytes[step] <= left:
            q[step] = False
            left -= int(program.step_bytes[step])
    return q


def neighbours(program: QuadraticProgram, q: Steps) -> Steps:
    """The feasible points that take one step of q back, with or without another step down.

    Args:
        program: The program.
        q: The point, shape (n_steps,).
    Returns:
        Shape (n, n_steps).
    """
    back, down, change = _moves(program, q, np.zeros(len(q)))
    rows, columns = np.nonzero(np.isfinite(change) & (back[:, None] >= 0))
    result = np.repeat(q[None], len(rows), axis=0)
    result[np.arange(len(rows)), back[rows]] = False
    is_exchange = down[columns] >= 0
    result[np.flatnonzero(is_exchange), down[columns[is_exchange]]] = True
    return result


def exchanges(program: QuadraticProgram, q: Steps, gains: npt.NDArray[np.float64], most: int) -> Steps:
    """The feasible points of lowest total that give one player a higher width, with or without another a lower one.

    A player may pass over widths: a width that is not worth its bytes hides no better width behind it.

    Args:
        program: The program; its objective does not count.
        q: The point, shape (n_steps,).
        gains: What each step costs, shape (n_steps,).
        most: Most points.
    Returns:
        Shape (n, n_steps), lowest first.
    """
    begin, end = program.widths_beside(q)
    cost, size = (range_sums(values, begin, end) for values in (gains, program.step_bytes))
    back, down = np.flatnonzero(q), np.flatnonzero(~q)
    slack = program.capacity - int(program.step_bytes[~q].sum())
    change = np.append(cost[down], 0.0) - cost[back][:, None]
    too_large = size[back][:, None] - np.append(size[down], 0) > slack
    same_player = np.equal.outer(program.player_of_step[back], np.append(program.player_of_step[down], -1))
    change[too_large | same_player] = np.inf
    found = np.flatnonzero(np.isfinite(change))
    if len(found) > most:
        found = found[np.argpartition(change.ravel()[found], most)[:most]]
    found = found[np.argsort(change.ravel()[found], kind="stable")]
    rows, columns = np.unravel_index(found, change.shape)
    result = np.repeat(q[None], len(found), axis=0)
    for point, row, column in zip(result, rows, columns, strict=True):
        point[begin[back[row]] : end[back[row]]] = False
        if column < len(down):
            point[begin[down[column]] : end[down[column]]] = True
    return result


def range_sums(values: npt.NDArray[Any], begin: npt.NDArray[np.intp], end: npt.NDArray[np.intp]) -> npt.NDArray[Any]:
    """Sums of values[begin:end] for each begin and end."""
    totals = np.concatenate([[0], values.cumsum()])
    sums: npt.NDArray[Any] = totals[end] - totals[begin]
    return sums


def distinct_points(points: Steps) -> Steps:
    """The distinct rows of points of shape (n, n_steps), sorted."""
    packed = np.packbits(points, axis=1)  # whole rows are compared as bytes: much faster than bit by bit
    rows = np.ascontiguousarray(packed).view(np.dtype((np.void, packed.shape[1]))).ravel()
    return points[np.unique(rows, return_index=True)[1]]


def _moves(
    program: QuadraticProgram,
    q: Steps,
    marginals: npt.NDArray[np.float64],
    pairs: npt.NDArray[np.float64] | None = None,
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """All single moves from q.

    Args:
        program: The program.
        q: Shape (n_steps,).
        marginals: What taking each step adds to the objective, shape (n_steps,).
        pairs: K + K' with a zero diagonal, shape (n_steps, n_steps); None if moves do not interact.
    Returns:
        The steps that can be taken back, shape (n_back,), and the steps that can be taken, shape (n_down,), both with
        -1 for none as the last entry; what each move changes, shape (n_back, n_down). Moves over the capacity, and
        moves of one player back and down, change by infinity.
    """
    back, down = (np.flatnonzero(steps) for steps in program.movable(q))
    change = np.zeros((len(back) + 1, len(down) + 1))
    change[:-1] -= marginals[back][:, None]
    change[:, :-1] += marginals[down]
    if pairs is not None:
        change[:-1, :-1] -= pairs[np.ix_(back, down)]
    slack = program.capacity - int(program.step_bytes[~q].sum())
    needed = np.append(program.step_bytes[back], 0)[:, None] - np.append(program.step_bytes[down], 0)
    change[needed > slack] = np.inf
    same_player = np.equal.outer(program.player_of_step[back], program.player_of_step[down])
    change[:-1, :-1][same_player] = np.inf
    return np.append(back, -1), np.append(down, -1), change


def _regrouped(program: QuadraticProgram, q: Steps, marginals: npt.NDArray[np.float64]) -> Steps:
    """The best point that takes one step back and the steps of lowest marginal by the byte down, shape (n_steps,)."""
    best, lowest = q, program.objective(q)
    for step in np.flatnonzero(program.movable(q)[0]):
        candidate = q.copy()
        candidate[step] = False
        other_players = program.player_of_step != program.player_of_step[step]
        while int(program.step_bytes[~candidate].sum()) > program.capacity:
            free = np.flatnonzero(program.movable(candidate)[1] & other_players)
            if len(free) == 0:
                break
            candidate[free[np.argmin(marginals[free] / program.step_bytes[free])]] = True
        else:
            if (value := program.objective(candidate)) < lowest:
                best, lowest = candidate, value
    return best

"""The program that every allocation solves: a quadratic in who stays at the low width, under a byte budget."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class QuadraticProgram:
    """minimise a'q + q'Kq over binary q, subject to sum_i c_i (1 - q_i) <= capacity.

    q_i = 1 leaves player i at the low width, q_i = 0 raises it to the high one.

    Attributes:
        linear: a, shape (n_players,), nats per token.
        quadratic: K, symmetric, shape (n_players, n_players).
        costs: c, bytes that raising each player costs, shape (n_players,).
        capacity: Bytes that all raised players may cost together.

    Source: CoopQ (2026), stage 2.
    """

    linear: npt.NDArray[np.float64]
    quadratic: npt.NDArray[np.float64]
    costs: npt.NDArray[np.int64]
    capacity: int

    def objective(self, q: npt.NDArray[np.bool_]) -> float:
        """Value of a'q + q'Kq."""
        x = q.astype(np.float64)
        return float(self.linear @ x + x @ self.quadratic @ x)

    def feasible(self, q: npt.NDArray[np.bool_]) -> bool:
        """Whether the raised players fit the capacity, in exact integers."""
        return int(self.costs[~q].sum()) <= self.capacity


def paper_program(
    shapley: npt.NDArray[np.float64],
    covariance: npt.NDArray[np.float64],
    alpha: float,
    costs: npt.NDArray[np.int64],
    capacity: int,
) -> QuadraticProgram:
    """The paper's program: K = (1 - alpha) C + alpha diag(C), a_i = phi_i - sum_{j != i} K_ij.

    Source: CoopQ (2026), stage 2; alpha = 0.5 there.
    """
    quadratic = (1 - alpha) * covariance + alpha * np.diag(np.diag(covariance))
    linear = shapley - (quadratic.sum(axis=1) - np.diag(quadratic))
    return QuadraticProgram(linear=linear, quadratic=quadratic, costs=costs, capacity=capacity)


def descend(program: QuadraticProgram, q: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Take the best move as long as one helps.

    A move raises a player, lowers one, or exchanges two, and keeps the capacity.

    Args:
        program: What to minimise.
        q: A feasible start, shape (n_players,).
    Returns:
        A feasible assignment that no single move improves.
    """
    q = q.copy()
    pairs = program.quadratic + program.quadratic.T
    diagonal = np.diag(program.quadratic)
    np.fill_diagonal(pairs, 0.0)
    slope = program.linear + diagonal + pairs @ q  # what lowering each player adds, the others being as they are
    tolerance = 1e-12 * (float(np.abs(program.linear).max()) + float(np.abs(program.quadratic).max()))
    while True:
        raised, lowered, change = _moves(program, q, slope, pairs)
        best = np.unravel_index(int(change.argmin()), change.shape)
        if not change[best] < -tolerance:
            return q
        for player in (raised[best[0]], lowered[best[1]]):
            if player >= 0:
                slope += pairs[player] * (-1.0 if q[player] else 1.0)
                q[player] = not q[player]


def local_optima(
    program: QuadraticProgram, starts: npt.NDArray[np.bool_], n_random: int, rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Where descents end, best first, each once.

    Args:
        program: What to minimise.
        starts: Feasible assignments to start from, shape (n, n_players); n may be 0.
        n_random: Random assignments to start from beside them.
        rng: Where those come from.
    Returns:
        Shape (n_optima, n_players).
    """
    found = [descend(program, start) for start in (*starts, *(random_fill(program, rng) for _ in range(n_random)))]
    optima = np.unique(np.array(found), axis=0)
    return optima[np.argsort([program.objective(q) for q in optima], kind="stable")]


def random_fill(program: QuadraticProgram, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Players raised in random order, each if it still fits."""
    q = np.ones(len(program.linear), dtype=bool)
    left = program.capacity
    for player in rng.permutation(len(q)):
        if program.costs[player] <= left:
            q[player] = False
            left -= int(program.costs[player])
    return q


def neighbours(program: QuadraticProgram, q: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """All assignments one feasible exchange or raise away, shape (n, n_players)."""
    n = len(q)
    raised, lowered, change = _moves(program, q, np.zeros(n), np.zeros((n, n)))
    rows, columns = np.nonzero(np.isfinite(change) & (raised[:, None] >= 0))
    result = np.repeat(q[None], len(rows), axis=0)
    result[np.arange(len(rows)), raised[rows]] = False
    exchanged = lowered[columns] >= 0
    result[np.flatnonzero(exchanged), lowered[columns[exchanged]]] = True
    return result


def _moves(
    program: QuadraticProgram,
    q: npt.NDArray[np.bool_],
    slope: npt.NDArray[np.float64],
    pairs: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """Players that can be raised (rows), those that can be lowered (columns), and what each move changes.

    Player -1 stands for none; moves over the capacity change by infinity.
    """
    raised, lowered = np.flatnonzero(q), np.flatnonzero(~q)
    change = np.zeros((len(raised) + 1, len(lowered) + 1))
    change[:-1] -= slope[raised][:, None]
    change[:, :-1] += slope[lowered]
    change[:-1, :-1] -= pairs[np.ix_(raised, lowered)]
    slack = program.capacity - int(program.costs[~q].sum())
    needed = np.append(program.costs[raised], 0)[:, None] - np.append(program.costs[lowered], 0)
    change[needed > slack] = np.inf
    return np.append(raised, -1), np.append(lowered, -1), change

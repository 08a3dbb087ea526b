"""The program that every allocation solves: a quadratic in who is lowered how far, under a byte budget.

With two widths, a player is lowered or not. With more, it has a step from each of its widths to the next lower one, and
each of these is taken only after those above it: a step is what a player is with two widths, with this order beside it.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class QuadraticProgram:
    """minimise a'q + q'Kq over binary q with sum_i c_i (1 - q_i) <= capacity, and q_i <= q_(i-1) within a player.

    q_i = 1 takes step i down, with two widths from the high to the low one; q_i = 0 leaves it.

    Attributes:
        linear: a, shape (n_steps,), nats per token.
        quadratic: K, symmetric, shape (n_steps, n_steps).
        costs: c, bytes that each step saves, shape (n_steps,).
        capacity: Bytes that all steps not taken may cost together.
        owners: Player of each step, shape (n_steps,), ascending: the steps of a player lie together, the first one down
            first. None where each is of its own.

    Source: CoopQ (2026), stage 2, for two widths.
    """

    linear: npt.NDArray[np.float64]
    quadratic: npt.NDArray[np.float64]
    costs: npt.NDArray[np.int64]
    capacity: int
    owners: npt.NDArray[np.intp] | None = None

    @cached_property
    def players(self) -> npt.NDArray[np.intp]:
        """Player of each step, shape (n_steps,)."""
        return np.arange(len(self.costs)) if self.owners is None else self.owners

    @cached_property
    def follows(self) -> npt.NDArray[np.bool_]:
        """Which steps are taken only after the one before them, shape (n_steps,)."""
        return np.diff(self.players, prepend=-1) == 0

    def objective(self, q: npt.NDArray[np.bool_]) -> float:
        """Value of a'q + q'Kq."""
        x = q.astype(np.float64)
        return float(self.linear @ x + x @ self.quadratic @ x)

    def feasible(self, q: npt.NDArray[np.bool_]) -> bool:
        """Whether the steps not taken fit the capacity, in exact integers, and the others are in order."""
        in_order = q[:-1] | ~q[1:] | ~self.follows[1:]
        return int(self.costs[~q].sum()) <= self.capacity and bool(in_order.all())

    def movable(self, q: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Which steps can be taken back by themselves, and which can be taken, both of shape (n_steps,)."""
        back, down = q.copy(), ~q
        back[:-1] &= ~(q[1:] & self.follows[1:])
        down[1:] &= q[:-1] | ~self.follows[1:]
        return back, down


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

    A move raises a player by a step, lowers one, or does both with two, and keeps the capacity. With more widths than
    two, whose steps differ much in bytes, one that raises a player and lowers several is tried where none of these
    helps.

    Args:
        program: What to minimise.
        q: A feasible start, shape (n_steps,).
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
        if change[best] < -tolerance:
            changed = [step for step in (raised[best[0]], lowered[best[1]]) if step >= 0]
        else:
            regrouped = _regrouped(program, q, slope) if program.follows.any() else q
            if not program.objective(regrouped) < program.objective(q) - tolerance:
                return q
            changed = np.flatnonzero(regrouped != q).tolist()
        for step in changed:
            slope += pairs[step] * (-1.0 if q[step] else 1.0)
            q[step] = not q[step]


def _regrouped(
    program: QuadraticProgram, q: npt.NDArray[np.bool_], slope: npt.NDArray[np.float64]
) -> npt.NDArray[np.bool_]:
    """The best of what raising one step gives when others go down for it, those that cost least by the byte."""
    best, least = q, program.objective(q)
    for step in np.flatnonzero(program.movable(q)[0]):
        other = q.copy()
        other[step] = False
        of_others = program.players != program.players[step]
        while int(program.costs[~other].sum()) > program.capacity:
            free = np.flatnonzero(program.movable(other)[1] & of_others)
            if len(free) == 0:
                break
            other[free[np.argmin(slope[free] / program.costs[free])]] = True
        else:
            if (value := program.objective(other)) < least:
                best, least = other, value
    return best


def local_optima(
    program: QuadraticProgram, starts: npt.NDArray[np.bool_], n_random: int, rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Where descents end, best first, each once.

    Args:
        program: What to minimise.
        starts: Feasible assignments to start from, shape (n, n_steps); n may be 0.
        n_random: Random assignments to start from beside them.
        rng: Where those come from.
    Returns:
        Shape (n_optima, n_steps).
    """
    found = [descend(program, start) for start in (*starts, *(random_fill(program, rng) for _ in range(n_random)))]
    optima = np.unique(np.array(found), axis=0)
    return optima[np.argsort([program.objective(q) for q in optima], kind="stable")]


def random_fill(program: QuadraticProgram, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Players raised by a step in random order, each if it still fits."""
    q = np.ones(len(program.linear), dtype=bool)
    left = program.capacity
    for drawn in rng.permutation(len(q)):
        step = np.flatnonzero(q & (program.players == program.players[drawn]))[-1]  # the last one that is still taken
        if program.costs[step] <= left:
            q[step] = False
            left -= int(program.costs[step])
    return q


def neighbours(program: QuadraticProgram, q: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """All assignments one feasible exchange or raise of single steps away, shape (n, n_steps)."""
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
    """Steps that can be taken back (rows), those that can be taken (columns), and what each move changes.

    Step -1 stands for none; moves over the capacity, or of one player back and forth, change by infinity.
    """
    raised, lowered = (np.flatnonzero(of) for of in program.movable(q))
    change = np.zeros((len(raised) + 1, len(lowered) + 1))
    change[:-1] -= slope[raised][:, None]
    change[:, :-1] += slope[lowered]
    change[:-1, :-1] -= pairs[np.ix_(raised, lowered)]
    slack = program.capacity - int(program.costs[~q].sum())
    needed = np.append(program.costs[raised], 0)[:, None] - np.append(program.costs[lowered], 0)
    change[needed > slack] = np.inf
    of_one_player = np.equal.outer(program.players[raised], program.players[lowered])
    change[:-1, :-1][of_one_player] = np.inf
    return np.append(raised, -1), np.append(lowered, -1), change

"""The binary quadratic program that every allocation solves under a byte budget."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Steps = npt.NDArray[np.bool_]
"""q: True where a step down is taken, shape (n_points, n_steps), or (n_steps,) for one point."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class QuadraticProgram:
    """minimise a'q + q'Kq over binary q, subject to sum_i step_bytes_i (1 - q_i) <= capacity and the order of steps.

    q_i = 1 takes step i down, q_i = 0 does not. The order of steps: a player takes a step only after its step before,
    q_i <= q_(i-1). `coopq.search.space` says what steps are.

    Attributes:
        a: Linear terms, shape (n_steps,), in the unit of the objective.
        K: Quadratic terms, symmetric, shape (n_steps, n_steps), in the same unit.
        step_bytes: Bytes that each step down saves, shape (n_steps,).
        capacity: Most bytes that the steps not taken may need together.
        player_of_step: Player of each step, ascending, shape (n_steps,).

    Source: CoopQ (2026), stage 2, for two widths.
    """

    a: npt.NDArray[np.float64]
    K: npt.NDArray[np.float64]
    step_bytes: npt.NDArray[np.int64]
    capacity: int
    player_of_step: npt.NDArray[np.intp]

    @classmethod
    def two_widths(
        cls, a: npt.NDArray[np.float64], K: npt.NDArray[np.float64], step_bytes: npt.NDArray[np.int64], capacity: int
    ) -> "QuadraticProgram":
        """The program of players with two widths each: every step is a player."""
        return cls(a, K, step_bytes, capacity, np.arange(len(step_bytes)))

    @cached_property
    def needs_previous(self) -> npt.NDArray[np.bool_]:
        """Whether each step may only be taken after the step before it, shape (n_steps,)."""
        return np.diff(self.player_of_step, prepend=-1) == 0

    def objective(self, q: Steps) -> float:
        """The value of a'q + q'Kq; q of shape (n_steps,)."""
        x = q.astype(np.float64)
        return float(self.a @ x + x @ self.K @ x)

    def is_feasible(self, q: Steps) -> bool:
        """Whether q keeps the capacity, in exact integers, and the order of steps; q of shape (n_steps,)."""
        in_order = q[:-1] | ~q[1:] | ~self.needs_previous[1:]
        return int(self.step_bytes[~q].sum()) <= self.capacity and bool(in_order.all())

    def movable(self, q: Steps) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """The steps that can be taken back, and the steps that can be taken next, both of shape (n_steps,)."""
        back, down = q.copy(), ~q
        back[:-1] &= ~(q[1:] & self.needs_previous[1:])
        down[1:] &= q[:-1] | ~self.needs_previous[1:]
        return back, down

    def widths_beside(self, q: Steps) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """The steps that lead to each other width of a player, as ranges begin:end, both of shape (n_steps,).

        Each step stands for a width. A step that is taken stands for the width above the step: all steps from it to the
        player's last step taken go back. A step that is not taken stands for the width below: all steps down to it.
        """
        steps, player = np.arange(len(q)), self.player_of_step
        first = np.searchsorted(player, np.arange(player[-1] + 1))
        edge = (first + np.bincount(player, q).astype(np.intp))[player]
        return np.where(q, steps, edge), np.where(q, edge, steps + 1)


def paper_program(
    phi: npt.NDArray[np.float64],
    C: npt.NDArray[np.float64],
    alpha: float,
    step_bytes: npt.NDArray[np.int64],
    capacity: int,
) -> QuadraticProgram:
    """The paper's program: K = (1 - alpha) C + alpha diag(C), a_i = phi_i - sum_{j != i} K_ij.

    Args:
        phi: Shapley value of each player, shape (n_players,), nats per token.
        C: Covariance of the players' marginal contributions, shape (n_players, n_players).
        alpha: Shrinkage of C towards its diagonal, 0 to 1.
        step_bytes: Bytes that lowering each player saves, shape (n_players,).
        capacity: Most bytes that the players left at the high width may need above the low width.
    Source: CoopQ (2026), stage 2; alpha = 0.5 there.
    """
    K = (1 - alpha) * C + alpha * np.diag(np.diag(C))
    a = phi - (K.sum(axis=1) - np.diag(K))
    return QuadraticProgram.two_widths(a, K, step_bytes, capacity)


def terms_by_steps(mean: float, single: Floats, pairs: Floats) -> tuple[float, Floats, Floats]:
    """The quadratic mean + sum_i b_i z_i + sum_{i<j} w_ij z_i z_j, where z = 2 q - 1, as c + a'q + q'Kq.

    Args:
        mean: The constant term.
        single: b, shape (n_steps,).
        pairs: w, symmetric, shape (n_steps, n_steps); the diagonal is left out.
    Returns:
        c; a, shape (n_steps,); K, symmetric with a zero diagonal, shape (n_steps, n_steps).
    """
    pairs = pairs - np.diag(np.diag(pairs))
    return float(mean - single.sum() + pairs.sum() / 2), 2 * single - 2 * pairs.sum(axis=1), 2 * pairs

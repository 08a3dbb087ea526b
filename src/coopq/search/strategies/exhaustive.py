"""Small games measured whole: the ground truth for all other searches."""

from collections.abc import Sequence
from itertools import product
from math import comb, prod

import numpy as np
import numpy.typing as npt

from coopq.core.errors import EstimationError
from coopq.core.types import Assignment, Assignments, Losses, Width
from coopq.search.measured import Measured
from coopq.search.protocol import Search
from coopq.search.solver.quadratic_program import terms_by_steps
from coopq.search.space import SearchSpace

MOST_PLAYERS = 14
"""Most players with two widths whose assignments are enumerated, 16,384 assignments. Chosen by hand."""

Table = npt.NDArray[np.float64]
"""Loss of each coalition, shape (2**n_players,); bit i of the index says that player i is lowered."""


class Enumeration(Search):
    """Measures all assignments; with two widths, 2^n assignments by 2^(n + 1) - 2 block forwards.

    Args:
        space: Players, widths, budgets.

    Raises:
        EstimationError: If there are more than 2^`MOST_PLAYERS` assignments.
    """

    def __init__(self, space: SearchSpace) -> None:
        check_enumerable(space.player_widths)
        self._space = space
        self.measured = Measured(space)

    def propose(self) -> Assignments:
        """All assignments; with two widths in the order of `Table`."""
        descending = [widths[::-1] for widths in self._space.player_widths]
        assignments = np.array(list(product(*descending[::-1])), dtype=np.float32)[:, ::-1]
        return assignments[: 0 if len(self.measured) else None]

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        """Take the losses."""
        self.measured.add(assignments, losses)

    def choose(self, capacity: int) -> Assignment:
        """The optimum, shape (n_players,)."""
        return self._space.assignments(self.measured.best(capacity)[0])

    def table(self) -> Table:
        """The measured losses of a game with two widths."""
        index = self.measured.q @ (1 << np.arange(self._space.n_players))
        return self.measured.losses[np.argsort(index)]


def n_assignments(player_widths: Sequence[Sequence[Width]]) -> int:
    """Number of assignments of players with these widths."""
    return prod(map(len, player_widths))


def check_enumerable(player_widths: Sequence[Sequence[Width]]) -> None:
    """Check that all assignments of players with these widths can be measured.

    Raises:
        EstimationError: If there are more than 2^`MOST_PLAYERS` assignments.
    """
    if (n := n_assignments(player_widths)) > 2**MOST_PLAYERS:
        raise EstimationError(
            f"{len(player_widths)} players have {n:.3g} assignments; at most {2**MOST_PLAYERS:,} are enumerated, take "
            "another method"
        )


def shapley_values(table: Table) -> npt.NDArray[np.float64]:
    """Exact Shapley values, shape (n_players,), in the unit of the table.

    Source: Shapley, A Value for n-Person Games, 1953.
    """
    n = len(table).bit_length() - 1
    coalitions = np.arange(len(table))
    sizes = _members(n).sum(axis=1)
    weight = 1 / (n * np.array([comb(n - 1, size) for size in range(n)]))
    values = np.empty(n)
    for player in range(n):
        without = coalitions[coalitions >> player & 1 == 0]
        values[player] = weight[sizes[without]] @ (table[without | 1 << player] - table[without])
    return values


def best_quadratic(table: Table) -> tuple[float, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The c + a'q + q'Kq nearest to the game in least squares over all coalitions.

    Returns:
        c; a, shape (n_players,); K, symmetric with a zero diagonal, shape (n_players, n_players).
    Source: the faithful Banzhaf interaction index of order 2; Tsai, Yeh and Ravikumar, Faith-Shap, 2023.
    """
    z = 2.0 * _members(len(table).bit_length() - 1) - 1  # orthogonal terms: least squares is a projection
    single = z.T @ table / len(table)
    pairs = (z.T * table) @ z / len(table)
    return terms_by_steps(float(table.mean()), single, pairs)


def _members(n_players: int) -> npt.NDArray[np.int64]:
    """1 where a coalition holds a player, in the order of `Table`, shape (2**n_players, n_players)."""
    return np.arange(2**n_players)[:, None] >> np.arange(n_players) & 1

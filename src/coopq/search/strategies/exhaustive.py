"""Small games measured whole: the ground truth of every other estimator."""

from itertools import product
from math import comb

import numpy as np
import numpy.typing as npt

from coopq.core.errors import EstimationError
from coopq.search.space import Measured, Setting
from coopq.core.types import Assignment, Assignments, Losses

MOST_PLAYERS = 14

Table = npt.NDArray[np.float64]
"""Loss of each coalition, shape (2**n_players,); bit i of the index says that player i is lowered."""


class Enumeration:
    """Measures all assignments; with two widths, 2^n of them by 2^(n+1) - 2 layer forwards.

    Args:
        setting: Widths, sizes, budgets.

    Raises:
        EstimationError: If there are more than 2^`MOST_PLAYERS`.
    """

    def __init__(self, setting: Setting) -> None:
        check_enumerable(setting.n_players, len(setting.widths))
        self._setting = setting
        self.measured = Measured(setting)

    def propose(self) -> Assignments:
        """All assignments, with two widths in the order of `Table`."""
        levels = [of_player[::-1] for of_player in self._setting.levels_of_players]
        every = np.array(list(product(*levels[::-1])), dtype=np.float32)[:, ::-1]
        return every[: 0 if len(self.measured) else None]

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        """Take the losses."""
        self.measured.add(assignments, losses)

    def choose(self, capacity: int) -> Assignment:
        """The optimum."""
        return self._setting.assignments(self.measured.best(capacity)[0])

    def table(self) -> Table:
        """What was measured, of two widths."""
        index = self.measured.lowered @ (1 << np.arange(self._setting.n_players))
        return self.measured.losses[np.argsort(index)]


def check_enumerable(n_players: int, n_widths: int = 2) -> None:
    """Check that all assignments of so many players can be measured.

    Raises:
        EstimationError: If there are more than 2^`MOST_PLAYERS`.
    """
    if n_widths**n_players > 2**MOST_PLAYERS:
        raise EstimationError(
            f"{n_players} players have {n_widths}^{n_players} assignments; at most {2**MOST_PLAYERS:,} are enumerated, "
            "take another method"
        )


def shapley_values(table: Table) -> npt.NDArray[np.float64]:
    """Exact Shapley values, shape (n_players,), in the unit of the table.

    Source: Shapley, A Value for n-Person Games, 1953.
    """
    n, coalitions, of_size = _coalitions(table)
    values = np.empty(n)
    for player in range(n):
        without = coalitions[coalitions >> player & 1 == 0]
        weight = 1 / (n * np.array([comb(n - 1, size) for size in range(n)]))
        values[player] = weight[of_size[without]] @ (table[without | 1 << player] - table[without])
    return values


def shapley_interactions(table: Table) -> npt.NDArray[np.float64]:
    """Exact Shapley interaction index of all pairs, symmetric with a zero diagonal, shape (n_players, n_players).

    Source: Grabisch and Roubens, An axiomatic approach to the concept of interaction among players in cooperative
    games, 1999.
    """
    n, coalitions, of_size = _coalitions(table)
    values = np.zeros((n, n))
    weight = 1 / ((n - 1) * np.array([comb(n - 2, size) for size in range(n - 1)])) if n > 1 else np.zeros(0)
    for i in range(n):
        for j in range(i):
            without = coalitions[(coalitions >> i & 1 == 0) & (coalitions >> j & 1 == 0)]
            both, first, second = (table[without | mask] for mask in (1 << i | 1 << j, 1 << i, 1 << j))
            values[i, j] = values[j, i] = weight[of_size[without]] @ (both - first - second + table[without])
    return values


def best_quadratic(table: Table) -> tuple[float, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Constant, linear terms and pair terms of c + a'q + q'Kq nearest to the game in least squares over all coalitions.

    Returns:
        c; a, shape (n_players,); K, symmetric with a zero diagonal, shape (n_players, n_players).
    Source: the faithful Banzhaf interaction index of order 2; Tsai, Yeh and Ravikumar, Faith-Shap, 2023.
    """
    n, coalitions, _ = _coalitions(table)
    z = 2.0 * (coalitions[:, None] >> np.arange(n) & 1) - 1  # orthogonal terms: least squares is projection
    single = z.T @ table / len(table)
    pairs = (z.T * table) @ z / len(table)
    np.fill_diagonal(pairs, 0.0)
    constant = float(table.mean() - single.sum() + pairs.sum() / 2)
    return constant, 2 * single - 2 * pairs.sum(axis=1), 2 * pairs


def _coalitions(table: Table) -> tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Number of players, all coalitions as integers, and how many players each has."""
    n = len(table).bit_length() - 1
    coalitions = np.arange(len(table))
    return n, coalitions, (coalitions[:, None] >> np.arange(n) & 1).sum(axis=1)

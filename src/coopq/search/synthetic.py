"""Games without a model: small games given by a table, and games of any size with a known optimum."""

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from coopq.core.types import Assignments, Game, Losses
from coopq.search.space import SearchSpace

LOW, HIGH = 2, 4
"""The widths of games with two widths."""


class TableGame:
    """A game of a few players given by the loss of every assignment.

    Args:
        table: Loss of each coalition, shape (2**n_players,); bit i of the index says that player i is at `LOW`.

    Attributes:
        table: The same.
    """

    def __init__(self, table: npt.NDArray[np.float64]) -> None:
        self.table = table

    @property
    def n_players(self) -> int:
        """Number of players."""
        return int(self.table.size).bit_length() - 1

    def __call__(self, assignments: Assignments) -> Losses:
        """Losses of assignments of shape (n, n_players), shape (n,)."""
        return self.table[(assignments == LOW) @ (1 << np.arange(self.n_players))]


class SyntheticGame:
    """A game of any size: an increasing function of a random quadratic u = a'q + q'Kq.

    Players differ in what they cost alone as blocks of language models do, and interact most with players near by. The
    optimum under a budget is the optimum of u, whatever the function.

    Args:
        n_players: Number of players.
        form: Name of the function, one of `FORMS`.
        seed: Seed of the quadratic.

    Attributes:
        a: Linear terms, shape (n_players,).
        K: Pair terms, symmetric with a zero diagonal, shape (n_players, n_players).
    """

    FORMS: ClassVar[dict[str, Callable[[Losses], Losses]]] = {
        "quadratic": lambda u: u,
        "super-linear": lambda u: np.expm1(1.5 * u) / 1.5,
        "saturating": lambda u: -2 * np.expm1(-u / 2),
        "s-shaped": lambda u: 3 / (1 + np.exp(2.5 * (1.5 - u))),
    }

    def __init__(self, n_players: int, form: str, seed: int) -> None:
        rng = np.random.default_rng([seed, n_players, list(self.FORMS).index(form)])
        a = rng.lognormal(0, 0.8, n_players)
        distance = np.abs(np.subtract.outer(np.arange(n_players), np.arange(n_players)))
        shape = (n_players, n_players)
        K = np.triu(rng.normal(0, 1, shape) * np.exp(-distance / 6) + 0.3 * rng.normal(0, 1, shape), 1)
        K += K.T
        K *= 0.3 * a.mean() / np.sqrt((K**2).sum(axis=1).mean())
        # With all players lowered u is about 3, where the forms differ.
        scale = 3 / max(a.sum() + K.sum(), a.sum() / 2)
        self.a, self.K, self._form = a * scale, K * scale, self.FORMS[form]

    @property
    def n_players(self) -> int:
        """Number of players."""
        return len(self.a)

    def __call__(self, assignments: Assignments) -> Losses:
        """Losses of assignments of shape (n, n_players), shape (n,)."""
        q = (assignments == LOW).astype(np.float64)
        return self._form(q @ self.a + ((q @ self.K) * q).sum(axis=1))


class SteppedGame:
    """A game of several widths, made of a game of two widths: each step of the space is a player of that game.

    Args:
        game: The game of two widths, with as many players as the space has steps.
        space: The players and their widths.
    """

    def __init__(self, game: Game, space: SearchSpace) -> None:
        self._game, self._space = game, space

    def __call__(self, assignments: Assignments) -> Losses:
        """Losses of assignments of shape (n, n_players), shape (n,)."""
        return self._game(np.where(self._space.steps_down(assignments), LOW, HIGH).astype(np.float32))

"""What is known of the steps of a space before an assignment is measured: the prior of an informed search.

Let g_i > 0 be what step i costs alone, from a score or from a loss, up to one factor. With q the steps taken and g_0
what is lost at the highest widths, S(q) = g_0 + sum_i q_i g_i, and the share of step i is s_i = q_i g_i / S(q).

A gradient score predicts losses up to a factor that is much the same for all steps (benchmarks/informed.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from coopq.search.solver.quadratic_program import Steps
from coopq.search.space import SearchSpace

Floats = npt.NDArray[np.float64]

PRIOR_SCORE = "auto-quantize"
"""The score that is the prior of the active search: benchmarks/informed.py compares scores."""
_FALL = 4.0
"""One bit more divides the squared rounding error by this."""

_ALIKE = (0.25, 0.35, 0.2, 0.2)
"""Shares of the variance of d that a step has for itself, with its kind, with its widths, and with blocks near by."""
_REACH = 3.0
"""Blocks over which what is alike falls to a third."""


@dataclass(frozen=True)
class Prior:
    """What is known of steps before an assignment is measured.

    Attributes:
        gains: What each step costs alone, up to a factor, shape (n_steps,), positive.
        base: What is lost with no step taken, in the same unit, not negative.
        origin: Loss of the model in full precision, nats per token: 0 for divergences.
        blocks: Block of each step, shape (n_steps,).
        kinds: A number for the projection and the widths of each step, shape (n_steps,).
        widths: A number for the widths of each step, shape (n_steps,).
    """

    gains: Floats
    base: float
    origin: float
    blocks: npt.NDArray[np.intp]
    kinds: npt.NDArray[np.intp]
    widths: npt.NDArray[np.intp]

    @cached_property
    def alike(self) -> Floats:
        """Prior covariance of the factors d, with variance 1, shape (n_steps, n_steps)."""
        own, kind, width, near = _ALIKE
        return (
            own * np.eye(len(self.gains))
            + kind * np.equal.outer(self.kinds, self.kinds)
            + width * np.equal.outer(self.widths, self.widths)
            + near * self.near_steps
        )

    @property
    def near_steps(self) -> Floats:
        """How near the blocks of two steps are, 1 for the same block, shape (n_steps, n_steps)."""
        near: Floats = self._nearness[np.ix_(self.blocks, self.blocks)]
        return near

    @cached_property
    def _nearness(self) -> Floats:
        """How alike blocks are, shape (n_blocks, n_blocks)."""
        block = np.arange(self.blocks.max() + 1)
        near: Floats = np.exp(-np.abs(np.subtract.outer(block, block)) / _REACH)
        return near

    def totals(self, q: Steps) -> Floats:
        """S of points of shape (n, n_steps), shape (n,)."""
        return self.base + q @ self.gains

    def shares(self, q: Steps) -> Floats:
        """s of points of shape (n, n_steps), of the same shape."""
        return q * self.gains / self.totals(q)[:, None]

    def pair_kernel(self, first: Floats, second: Floats) -> Floats:
        """Covariance of the pair terms, with variance 1, of points by their shares, shape (n_first, n_second)."""
        roots = np.sqrt(first), np.sqrt(second)
        found = np.zeros((len(first), len(second)))
        by_block = np.stack([roots[0][:, steps] @ roots[1][:, steps].T for steps in self._steps_by_block])
        for row, nearness in zip(by_block, self._nearness, strict=True):
            found += row * np.tensordot(nearness, by_block, axes=1)
        return found / 2

    def pair_variance(self, shares: Floats) -> Floats:
        """The diagonal of `pair_kernel(shares, shares)`, shape (n,)."""
        by_block = np.stack([shares[:, steps].sum(axis=1) for steps in self._steps_by_block], axis=1)
        found: Floats = ((by_block @ self._nearness) * by_block).sum(axis=1) / 2
        return found

    @cached_property
    def _steps_by_block(self) -> list[npt.NDArray[np.intp]]:
        """Indices of the steps of each block."""
        return [np.flatnonzero(self.blocks == block) for block in range(len(self._nearness))]


def make_prior(
    space: SearchSpace, gains: Floats, origin: float, blocks: Sequence[int], layers: Sequence[Sequence[str]]
) -> Prior:
    """The prior that a score says.

    Args:
        space: Players and steps.
        gains: The score of each step, shape (n_steps,).
        origin: Loss of the model in full precision, nats per token.
        blocks: Block of each player, shape (n_players,).
        layers: Names of the linear layers of each player; the last part of a name is the projection.
    """
    positive = gains[gains > 0]
    gains = np.maximum(gains, 0.01 * float(np.median(positive)) if len(positive) else 1.0)
    pairs = [pair for widths in space.player_widths for pair in zip(widths[:0:-1], widths[-2::-1], strict=True)]
    is_first = np.diff(space.player_of_step, prepend=-1) > 0
    apart = np.array([high - low for high, low in pairs], dtype=np.float64)
    projections = ["+".join(name.rpartition(".")[2] for name in names) for names in layers]
    kinds = [projections[player] for player in space.player_of_step]
    return Prior(
        gains=gains,
        base=float((gains / (_FALL**apart - 1))[is_first].sum()),
        origin=origin,
        blocks=np.array(blocks, dtype=np.intp)[space.player_of_step],
        kinds=_numbers([f"{kind} {pair}" for kind, pair in zip(kinds, pairs, strict=True)]),
        widths=_numbers([str(pair) for pair in pairs]),
    )


def _numbers(names: Sequence[str]) -> npt.NDArray[np.intp]:
    """A number for each different name, in the order of the names."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], dtype=np.intp)


def knapsacks(capacities: Sequence[int], most: int, n: int) -> list[int]:
    """Capacities for first points: those of the budgets, and others from below the smallest to above the largest."""
    spread = np.linspace(0.8 * min(capacities), min(1.15 * max(capacities), most), n)
    return sorted({*capacities, *(int(capacity) for capacity in spread)})

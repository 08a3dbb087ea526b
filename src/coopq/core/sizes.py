"""Exact bytes of assignments, and the budgets that users set on them."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from coopq.core.errors import BudgetError, InfeasibleBudget, UnsupportedBits
from coopq.core.types import UNTOUCHED, Assignment, Width

_UNITS = {
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "B": 1,
}
_BUDGET = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(avg|bpw|KiB|MiB|GiB|kB|KB|MB|GB|B)\s*")


@dataclass(frozen=True)
class Budget:
    """An upper limit on the bytes of the quantized weights, scales, zeros and padding included.

    `unit` is "avg" (average bits between two widths, the paper's B(b)), "bpw" (bits per weight) or a
    unit of bytes. Build it with `Budget.parse`.
    """

    text: str
    value: Fraction
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """The budget written as "2.5avg", "2.8bpw" or "40MiB".

        Raises:
            BudgetError: If it reads otherwise.
        """
        match = _BUDGET.fullmatch(text)
        if match is None:
            raise BudgetError(
                f"budget {text!r} cannot be read; write average bits (2.5avg), "
                "bits per weight with scales and zeros (2.8bpw), or bytes (40MiB, 1.4GB)"
            )
        return cls(text=match[1] + match[2], value=Fraction(match[1]), unit=match[2])


@dataclass(frozen=True)
class Storage:
    """Bytes of every player at every bit-width.

    Attributes:
        n_weights: Weights of each player, shape (n_players,).
        n_bytes: Bytes of each player for each bit-width, as they will lie on disk.
        fixed: Bytes beside the players that budgets in bytes have to hold too: all else of an exported file, a cache.
    """

    n_weights: tuple[int, ...]
    n_bytes: Mapping[Width, tuple[int, ...]]
    fixed: int = 0

    def bytes_of(self, assignment: Assignment | Sequence[Width]) -> int:
        """Bytes of the players' weights under `assignment`."""
        return sum(self._width(float(bits))[player] for player, bits in enumerate(assignment))

    def untouched_bytes(self, assignment: Assignment | Sequence[Width]) -> int:
        """Those of them that belong to players left untouched."""
        kept = (player for player, bits in enumerate(assignment) if bits == UNTOUCHED)
        return sum(self.n_bytes[UNTOUCHED][player] for player in kept)

    def bits_per_weight(self, assignment: Assignment | Sequence[Width]) -> float:
        """Stored bits per quantized weight, scales, zeros and padding included."""
        return 8 * self.bytes_of(assignment) / sum(self.n_weights)

    def average_bits(self, assignment: Assignment | Sequence[Width]) -> float:
        """Bit-width averaged over the weights; scales and zeros do not count."""
        return sum(n * float(bits) for n, bits in zip(self.n_weights, assignment, strict=True)) / sum(self.n_weights)

    def limit(self, budget: Budget, low: Width, high: Width) -> int:
        """The budget in bytes for assignments of widths from `low` to `high`.

        Raises:
            InfeasibleBudget: If every assignment is larger, or even the largest leaves room.
        Source: the average-bits form is B(b) of CoopQ (2026).
        """
        smallest, largest = sum(self._width(low)), sum(self._width(high))
        if budget.unit == "avg":
            limit = smallest + (budget.value - Fraction(low)) / Fraction(high - low) * (largest - smallest)
        elif budget.unit == "bpw":
            limit = budget.value * sum(self.n_weights) / 8
        else:
            limit = budget.value * _UNITS[budget.unit] - self.fixed
        if not smallest <= limit <= largest:
            raise InfeasibleBudget(
                f"budget {budget.text} is infeasible with {low} and {high} bits; the smallest is "
                f"{self._describe(smallest, low, math.ceil)}, the largest {self._describe(largest, high, math.floor)}"
            )
        return int(limit)

    def levels(self, *widths: Width) -> tuple[tuple[Width, ...], ...]:
        """Those of some widths that each player has: not one between that takes no less than a wider one.

        Args:
            widths: Ascending.
        Returns:
            Ascending, for each player at least the lowest and the highest.
        Raises:
            UnsupportedBits: If the lowest takes no less than a wider one, or a width is of no player.
        """
        low, high = widths[0], widths[-1]
        levels: list[tuple[Width, ...]] = []
        for player in range(len(self.n_weights)):
            kept = [high]
            for width in reversed(widths[:-1]):
                if self._width(width)[player] < self._width(kept[0])[player]:
                    kept.insert(0, width)
                elif width == low:
                    raise UnsupportedBits(
                        f"player {player} takes no more bytes at {kept[0]} bits than at {low}; "
                        "leave one of these widths out"
                    )
            levels.append(tuple(kept))
        for width in widths:
            if not any(width in of_player for of_player in levels):
                raise UnsupportedBits(
                    f"every player takes no more bytes at a wider width than at {width}; leave it out"
                )
        return tuple(levels)

    def raise_costs(self, *widths: Width) -> npt.NDArray[np.int64]:
        """Bytes between neighbouring `levels` of each player, from the highest one down.

        Args and errors: as for `levels`.

        Returns:
            Shape (n_steps,), those of a player together; with two widths, what raising each player costs.
        """
        return np.array(
            [
                self.n_bytes[high][player] - self.n_bytes[low][player]
                for player, levels in enumerate(self.levels(*widths))
                for low, high in reversed(list(pairwise(levels)))
            ],
            dtype=np.int64,
        )

    def _width(self, bits: Width) -> tuple[int, ...]:
        if bits not in self.n_bytes:
            raise UnsupportedBits(f"no sizes are known for {bits} bits; known: {sorted(self.n_bytes)}")
        return self.n_bytes[bits]

    def _describe(self, n_bytes: int, bits: Width, towards_feasible: Callable[[float], int]) -> str:
        bits_per_weight = towards_feasible(8 * n_bytes / sum(self.n_weights) * 10**4) / 10**4
        return f"{bits}avg = {bits_per_weight:.4f}bpw = {n_bytes + self.fixed}B"

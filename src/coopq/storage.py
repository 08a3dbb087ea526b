"""Exact bytes of assignments, and the budgets that users set on them."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from coopq.errors import BudgetError, InfeasibleBudget, UnsupportedBits
from coopq.types import Assignment, Width

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
        """Bytes of the quantized weights under `assignment`."""
        return sum(self._width(float(bits))[player] for player, bits in enumerate(assignment))

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

    def raise_costs(self, *widths: Width) -> npt.NDArray[np.int64]:
        """Bytes between neighbouring widths of each player, from the highest width down.

        Args:
            widths: Ascending; with two, what raising each player costs.
        Returns:
            Shape (n_players * (n_widths - 1),), those of a player together.
        Raises:
            UnsupportedBits: If a width takes no more bytes than the one below it.
        """
        sizes = np.array([self._width(width) for width in reversed(widths)], dtype=np.int64)
        costs = (sizes[:-1] - sizes[1:]).T
        if not (costs > 0).all():
            player, step = np.argwhere(costs <= 0)[0]
            high, low = widths[::-1][step : step + 2]
            raise UnsupportedBits(
                f"player {player} takes no more bytes at {high} bits than at {low}; leave one of these widths out"
            )
        return costs.ravel()

    def _width(self, bits: Width) -> tuple[int, ...]:
        if bits not in self.n_bytes:
            raise UnsupportedBits(f"no sizes are known for {bits} bits; known: {sorted(self.n_bytes)}")
        return self.n_bytes[bits]

    def _describe(self, n_bytes: int, bits: Width, towards_feasible: Callable[[float], int]) -> str:
        bits_per_weight = towards_feasible(8 * n_bytes / sum(self.n_weights) * 10**4) / 10**4
        return f"{bits}avg = {bits_per_weight:.4f}bpw = {n_bytes + self.fixed}B"

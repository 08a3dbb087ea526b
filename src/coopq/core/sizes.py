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

_MOST_CHARACTERS = 40
"""Length of a budget: more digits than a size has are a mistake, and Python refuses numbers of thousands of digits."""


@dataclass(frozen=True)
class Budget:
    """An upper limit on bytes; scales, zeros and padding count.

    `unit` is "avg" (average bits between two widths, the paper's B(b)), "bpw" (bits per quantized weight) or a unit of
    bytes, which limits the whole file.
    Build a budget with `Budget.parse`.
    """

    text: str
    value: Fraction
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """The budget written as "2.5avg", "2.8bpw" or "40MiB".

        Raises:
            BudgetError: If the text has another form.
        """
        match = _BUDGET.fullmatch(text) if len(text) <= _MOST_CHARACTERS else None
        if match is None:
            shown = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
            raise BudgetError(
                f"budget {shown!r} cannot be read; write average bits (2.5avg), "
                "bits per weight with scales and zeros (2.8bpw), or bytes of the whole file (40MiB, 1.4GB)"
            )
        return cls(text=match[1] + match[2], value=Fraction(match[1]), unit=match[2])


@dataclass(frozen=True)
class Sizes:
    """Bytes of every player at every width.

    Attributes:
        n_weights: Weights of each player, shape (n_players,).
        n_bytes: Bytes of each player for each width, as they will lie on disk.
        fixed: Most bytes of the file beside the players. A budget in bytes holds the whole file.
        reserved: Bytes that a budget in bytes holds beside the file: a KV cache.
    """

    n_weights: tuple[int, ...]
    n_bytes: Mapping[Width, tuple[int, ...]]
    fixed: int = 0
    reserved: int = 0

    def total_bytes(self, assignment: Assignment | Sequence[Width]) -> int:
        """Bytes of the players' weights under an assignment of shape (n_players,)."""
        return sum(self._at(float(bits))[player] for player, bits in enumerate(assignment))

    def file_bytes(self, assignment: Assignment | Sequence[Width]) -> int:
        """Most bytes of the whole file under an assignment."""
        return self.total_bytes(assignment) + self.fixed

    def untouched_bytes(self, assignment: Assignment | Sequence[Width]) -> int:
        """Bytes of the players that an assignment leaves untouched."""
        kept = (player for player, bits in enumerate(assignment) if bits == UNTOUCHED)
        return sum(self.n_bytes[UNTOUCHED][player] for player in kept)

    def bits_per_weight(self, assignment: Assignment | Sequence[Width]) -> float:
        """Stored bits per quantized weight; scales, zeros and padding count."""
        return 8 * self.total_bytes(assignment) / sum(self.n_weights)

    def average_bits(self, assignment: Assignment | Sequence[Width]) -> float:
        """Width averaged over the weights; scales and zeros do not count."""
        return sum(n * float(bits) for n, bits in zip(self.n_weights, assignment, strict=True)) / sum(self.n_weights)

    def limit(self, budget: Budget, low: Width, high: Width) -> int:
        """The budget in bytes, for assignments between the widths `low` and `high`.

        Raises:
            InfeasibleBudget: If every assignment is larger than the budget, or if even the largest leaves room.
        Source: the form in average bits is B(b) of CoopQ (2026).
        """
        smallest, largest = sum(self._at(low)), sum(self._at(high))
        if budget.unit == "avg":
            limit = smallest + (budget.value - Fraction(low)) / Fraction(high - low) * (largest - smallest)
        elif budget.unit == "bpw":
            limit = budget.value * sum(self.n_weights) / 8
        else:
            limit = budget.value * _UNITS[budget.unit] - self.fixed - self.reserved
        if not smallest <= limit <= largest:
            raise InfeasibleBudget(
                f"budget {budget.text} is infeasible with {low} and {high} bits; the smallest is "
                f"{self._describe(smallest, low, math.ceil)}, the largest {self._describe(largest, high, math.floor)}"
            )
        return int(limit)

    def capacity(self, budget: Budget, low: Width, high: Width) -> int:
        """The bytes of a budget that are left above the smallest assignment: what raising players may cost together.

        Raises:
            InfeasibleBudget: As `limit`.
        """
        return self.limit(budget, low, high) - sum(self._at(low))

    def player_widths(self, widths: Sequence[Width]) -> tuple[tuple[Width, ...], ...]:
        """Widths usable by each player; dominated widths (not smaller than a wider one) are removed.

        Args:
            widths: Ascending.
        Returns:
            For each player its widths, ascending; the lowest and the highest are always among them.
        Raises:
            UnsupportedBits: If the lowest width is dominated for a player, or a width for all players.
        """
        low, high = widths[0], widths[-1]
        found: list[tuple[Width, ...]] = []
        for player in range(len(self.n_weights)):
            kept = [high]
            for width in reversed(widths[:-1]):
                if self._at(width)[player] < self._at(kept[0])[player]:
                    kept.insert(0, width)
                elif width == low:
                    raise UnsupportedBits(
                        f"player {player} takes no more bytes at {kept[0]} bits than at {low}; "
                        "leave one of these widths out"
                    )
            found.append(tuple(kept))
        for width in widths:
            if not any(width in own for own in found):
                raise UnsupportedBits(
                    f"every player takes no more bytes at a wider width than at {width}; leave it out"
                )
        return tuple(found)

    def step_bytes(self, widths: Sequence[Width]) -> npt.NDArray[np.int64]:
        """Bytes that each step between neighbouring `player_widths` saves, from the highest width down.

        Args and errors: as for `player_widths`.

        Returns:
            Shape (n_steps,); the steps of a player lie together.
        """
        return np.array(
            [
                self.n_bytes[high][player] - self.n_bytes[low][player]
                for player, own in enumerate(self.player_widths(widths))
                for low, high in reversed(list(pairwise(own)))
            ],
            dtype=np.int64,
        )

    def _at(self, bits: Width) -> tuple[int, ...]:
        """Bytes of each player at a width, shape (n_players,)."""
        if bits not in self.n_bytes:
            raise UnsupportedBits(f"no sizes are known for {bits} bits; known: {sorted(self.n_bytes)}")
        return self.n_bytes[bits]

    def _describe(self, n_bytes: int, bits: Width, towards_feasible: Callable[[float], int]) -> str:
        """A size in the three units of budgets."""
        bits_per_weight = towards_feasible(8 * n_bytes / sum(self.n_weights) * 10**4) / 10**4
        return f"{bits}avg = {bits_per_weight:.4f}bpw = {n_bytes + self.fixed + self.reserved}B"

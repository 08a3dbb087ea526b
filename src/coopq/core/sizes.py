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

    @property
    def is_bytes(self) -> bool:
        """Whether the budget is a number of bytes."""
        return self.unit in _UNITS

    def minus(self, n_bytes: int) -> "Budget":
        """A budget in bytes, less some bytes."""
        return Budget.parse(f"{max(0, int(self.value * _UNITS[self.unit]) - n_bytes)}B")


@dataclass(frozen=True)
class Sizes:
    """Bytes of every player at every width.

    Attributes:
        n_weights: Weights of each player, shape (n_players,).
        n_bytes: Bytes of each player for each width, as they will lie on disk; None for a player without the width.
        fixed: Most bytes of the file beside the players. A budget in bytes holds the whole file.
        reserved: Bytes that a budget in bytes holds beside the file: a KV cache.
    """

    n_weights: tuple[int, ...]
    n_bytes: Mapping[Width, tuple[int | None, ...]]
    fixed: int = 0
    reserved: int = 0

    def total_bytes(self, assignment: Assignment | Sequence[Width]) -> int:
        """Bytes of the players' weights under an assignment of shape (n_players,)."""
        return sum(self.player_bytes(player, float(bits)) for player, bits in enumerate(assignment))

    def player_bytes(self, player: int, bits: Width) -> int:
        """Bytes of a player at a width.

        Raises:
            UnsupportedBits: If the player does not have the width.
        """
        n_bytes = self._at(bits)[player]
        if n_bytes is None:
            own = [width for width in sorted(self.n_bytes) if self.n_bytes[width][player] is not None]
            raise UnsupportedBits(f"player {player} has no {bits:g} bits; it has {', '.join(map(str, own))}")
        return n_bytes

    def bytes_by_width(self, player: int) -> dict[str, int]:
        """Bytes of a player at each width that it has, by the width as text: what plan.json holds."""
        found = {f"{width:g}": n_bytes[player] for width, n_bytes in self.n_bytes.items()}
        return {width: n_bytes for width, n_bytes in found.items() if n_bytes is not None}

    def file_bytes(self, assignment: Assignment | Sequence[Width]) -> int:
        """Most bytes of the whole file under an assignment."""
        return self.total_bytes(assignment) + self.fixed

    def untouched_bytes(self, assignment: Assignment | Sequence[Width]) -> int:
        """Bytes of the players that an assignment leaves untouched."""
        kept = (player for player, bits in enumerate(assignment) if bits == UNTOUCHED)
        return sum(self.player_bytes(player, UNTOUCHED) for player in kept)

    def bits_per_weight(self, assignment: Assignment | Sequence[Width]) -> float:
        """Stored bits per quantized weight; scales, zeros and padding count."""
        return 8 * self.total_bytes(assignment) / sum(self.n_weights)

    def average_bits(self, assignment: Assignment | Sequence[Width]) -> float:
        """Width averaged over the weights; scales and zeros do not count."""
        return float(self._average(assignment))

    def limit(self, budget: Budget, widths: Sequence[Width]) -> int:
        """The budget in bytes, for assignments of some widths.

        A budget in average bits is interpolated linearly between all players at their lowest width and all at their
        highest. If all players have the same two widths, this is B(b) of CoopQ (2026). A budget of more bytes than all
        players take at their highest width is cut to those bytes.

        Args:
            budget: The budget.
            widths: Ascending.
        Raises:
            InfeasibleBudget: If every assignment is larger than the budget, or no assignment has so many bits.
        """
        own = self.player_widths(widths)
        lowest, highest = [each[0] for each in own], [each[-1] for each in own]
        smallest, largest = self.total_bytes(lowest), self.total_bytes(highest)
        if budget.unit == "avg":
            low, high = self._average(lowest), self._average(highest)
            limit = smallest + (budget.value - low) / (high - low) * (largest - smallest)
        elif budget.unit == "bpw":
            limit = budget.value * sum(self.n_weights) / 8
        else:
            limit = min(budget.value * _UNITS[budget.unit] - self.fixed - self.reserved, Fraction(largest))
        if not smallest <= limit <= largest:
            raise InfeasibleBudget(
                f"budget {budget.text} is infeasible with {widths[0]} to {widths[-1]} bits; the smallest is "
                f"{self._describe(lowest, budget.unit, math.ceil)}, the largest "
                f"{self._describe(highest, budget.unit, math.floor)}"
            )
        return int(limit)

    def holds_all(self, budget: Budget, widths: Sequence[Width]) -> bool:
        """Whether the budget is bytes, and no fewer than all players at their highest width take."""
        largest = self.total_bytes([own[-1] for own in self.player_widths(widths)])
        n_bytes = budget.value * _UNITS.get(budget.unit, 0) - self.fixed - self.reserved
        return n_bytes >= largest

    def capacity(self, budget: Budget, widths: Sequence[Width]) -> int:
        """The bytes of a budget that are left above the smallest assignment: what raising players may cost together.

        Args and errors: as for `limit`.
        """
        return self.limit(budget, widths) - self.total_bytes([own[0] for own in self.player_widths(widths)])

    def player_widths(self, widths: Sequence[Width]) -> tuple[tuple[Width, ...], ...]:
        """Widths usable by each player; dominated widths (not smaller than a wider one) are removed.

        Args:
            widths: Ascending. Each player has one of them at least.
        Returns:
            For each player its widths, ascending. Players may have different lowest and highest widths.
        Raises:
            UnsupportedBits: If no player has one of the widths, or no player has two.
        """
        found, usable = self._undominated(widths), self.usable_widths(widths)
        for width in widths:
            if width not in usable:
                raise UnsupportedBits(
                    f"no player has {width} bits: its layers have no such type, or a wider type takes no more bytes; "
                    f"leave {width} out"
                )
        if max(map(len, found)) < 2:
            raise UnsupportedBits(
                f"each player has only one of {', '.join(map(str, widths))} bits, so there is nothing to choose; name "
                "more widths"
            )
        return tuple(found)

    def usable_widths(self, widths: Sequence[Width]) -> tuple[Width, ...]:
        """The widths that `player_widths` leaves to some player, ascending."""
        found = self._undominated(widths)
        return tuple(width for width in widths if any(width in own for own in found))

    def _undominated(self, widths: Sequence[Width]) -> list[tuple[Width, ...]]:
        """For each player the widths of fewer bytes than every wider one, ascending."""
        found: list[tuple[Width, ...]] = []
        for player in range(len(self.n_weights)):
            kept: list[Width] = []
            for width in reversed(widths):
                n_bytes = self._at(width)[player]
                if n_bytes is not None and (not kept or n_bytes < self.player_bytes(player, kept[0])):
                    kept.insert(0, width)
            found.append(tuple(kept))
        return found

    def step_bytes(self, widths: Sequence[Width]) -> npt.NDArray[np.int64]:
        """Bytes that each step between neighbouring `player_widths` saves, from the highest width down.

        Args and errors: as for `player_widths`.

        Returns:
            Shape (n_steps,); the steps of a player lie together.
        """
        return np.array(
            [
                self.player_bytes(player, high) - self.player_bytes(player, low)
                for player, own in enumerate(self.player_widths(widths))
                for low, high in reversed(list(pairwise(own)))
            ],
            dtype=np.int64,
        )

    def _average(self, assignment: Assignment | Sequence[Width]) -> Fraction:
        """`average_bits`, exact."""
        parts = (n * Fraction(float(bits)) for n, bits in zip(self.n_weights, assignment, strict=True))
        return sum(parts, Fraction()) / sum(self.n_weights)

    def _at(self, bits: Width) -> tuple[int | None, ...]:
        """Bytes of each player at a width, shape (n_players,)."""
        if bits not in self.n_bytes:
            raise UnsupportedBits(f"no sizes are known for {bits} bits; known: {sorted(self.n_bytes)}")
        return self.n_bytes[bits]

    def _describe(self, assignment: Sequence[Width], unit: str, towards_feasible: Callable[[Fraction], int]) -> str:
        """The size of an assignment in the units of budgets, the given unit first."""
        n_bytes = self.total_bytes(assignment)
        whole = n_bytes + self.fixed + self.reserved
        exact = {"avg": self._average(assignment), "bpw": Fraction(8 * n_bytes, sum(self.n_weights))}
        if unit in _UNITS:
            exact[unit] = Fraction(whole, _UNITS[unit])
        sizes = {name: f"{towards_feasible(size * 10**4) / 10**4:.15g}{name}" for name, size in exact.items()}
        sizes["B"] = f"{whole}B"
        return " = ".join([sizes.pop(unit), *sizes.values()])

"""Named arrays and protocols that the stages hand to each other."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Width: TypeAlias = float
"""Bits of a weight, as its backend counts them: whole, but for types of ggml that lie between."""

Assignment: TypeAlias = npt.NDArray[np.float32]
"""Bit-width of each player, shape (n_players,); `UNTOUCHED` leaves a player as it is."""

Assignments: TypeAlias = npt.NDArray[np.float32]
"""Several assignments, shape (n_assignments, n_players)."""

Losses: TypeAlias = npt.NDArray[np.float64]
"""Mean negative log-likelihood of each assignment, shape (n_assignments,), nats per token."""

UNTOUCHED = 16
"""The bit-width that stands for a player's original weights, of which 16 bits are stored; all backends have it."""

REMOVED = 0
"""The bit-width of a player that is left out: its block hands on what it gets. The pruning game's low width."""


def as_width(number: Width | str) -> Width:
    """A width as a plain number: an integer where it is whole, as backends' libraries want and people read."""
    width = float(number)
    return int(width) if width.is_integer() else width


def as_widths(numbers: Iterable[Width | str]) -> list[Width]:
    """Several, of an assignment for example."""
    return [as_width(number) for number in numbers]


ProgressCallback: TypeAlias = Callable[[str, int, int], None]
"""Called with (stage, done, total) whenever `done` grows."""


def silent(stage: str, done: int, total: int) -> None:
    """The progress callback that reports nothing."""


class Game(Protocol):
    """The loss of a model as a function of the bit-widths of its players."""

    @property
    def n_players(self) -> int:
        """Number of players, the length of an assignment."""
        ...

    def __call__(self, assignments: Assignments) -> Losses:
        """Losses of the assignments, in their order."""
        ...


@dataclass(frozen=True)
class LinearLayer:
    """One matrix that is quantized: its name in the model and its shape (out, in).

    It is the weight of the module of that name; or, where experts are kept in one tensor, that parameter, with the rows
    of all experts one after the other.

    Attributes:
        name: In the model.
        shape: Outputs and inputs.
        is_plain: Whether it is an `nn.Linear`'s, and neither an embedding nor experts.
    """

    name: str
    shape: tuple[int, int]
    is_plain: bool = True

    @property
    def n_weights(self) -> int:
        """Number of entries of the weight matrix."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Player:
    """What gets one bit-width: linear layers of one transformer block, all of them, some, or a single one.

    Attributes:
        name: Module name of the block or of the linear layer; of several, with a "+" between.
        linears: Its linear layers.
        block: Index of the transformer block that they lie in.
        is_end: Whether it is the embedding, which counts as one of the first block, or the head, one of the last.
    """

    name: str
    linears: tuple[LinearLayer, ...]
    block: int
    is_end: bool = False

    @property
    def n_weights(self) -> int:
        """Number of weights that are quantized with this player."""
        return sum(linear.n_weights for linear in self.linears)

"""Arrays with names, and the protocols that stages share."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Width: TypeAlias = float
"""Bits of a weight as its backend counts them: whole numbers, or halves for some types of ggml (2.5 to 5.5)."""

Assignment: TypeAlias = npt.NDArray[np.float32]
"""Width of each player, shape (n_players,); `UNTOUCHED` leaves a player as it is."""

Assignments: TypeAlias = npt.NDArray[np.float32]
"""Several assignments, shape (n_assignments, n_players)."""

Losses: TypeAlias = npt.NDArray[np.float64]
"""Loss of each assignment, shape (n_assignments,), nats per token: negative log-likelihood, or KL divergence."""

UNTOUCHED = 16
"""The width of a player that keeps its original weights, stored in 16 bits; every backend has it."""

REMOVED = 0
"""The width of a player that is removed: its block passes its input on. It is the low width of the pruning game."""


def as_width(number: Width | str) -> Width:
    """A width as a plain number: an int if it is whole, which the backends' libraries want."""
    width = float(number)
    return int(width) if width.is_integer() else width


def as_widths(numbers: Iterable[Width | str]) -> list[Width]:
    """Several widths as plain numbers, of an assignment for example."""
    return [as_width(number) for number in numbers]


def next_width(own: Sequence[Width], bits: Width) -> Width:
    """The narrowest of a player's widths that has at least `bits`; the widest if all have fewer.

    Args:
        own: The player's widths, ascending.
        bits: A width that the player may lack.
    """
    return next((width for width in own if width >= bits), own[-1])


ProgressCallback: TypeAlias = Callable[[str, int, int], None]
"""Called with (stage, done, total) whenever `done` grows."""


def silent(stage: str, done: int, total: int) -> None:
    """The progress callback that reports nothing."""


class Game(Protocol):
    """The loss of a model as a function of the widths of its players."""

    def __call__(self, assignments: Assignments) -> Losses:
        """Losses of the assignments, in their order."""
        ...


@dataclass(frozen=True)
class LinearLayer:
    """One matrix that is quantized.

    The matrix is the weight of an `nn.Linear` or of an embedding, or a tensor that holds all experts of a block: then
    the rows of the experts lie one after the other.

    Attributes:
        name: Name of the module, or of the parameter that holds experts.
        shape: Outputs and inputs.
        is_plain: Whether it is the weight of an `nn.Linear`.
        n_experts: Number of experts in the tensor; 0 for a matrix of its own.
    """

    name: str
    shape: tuple[int, int]
    is_plain: bool = True
    n_experts: int = 0

    @property
    def n_weights(self) -> int:
        """Number of entries of the matrix."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Player:
    """What gets one width: all, some or one of the linear layers of a transformer block.

    Attributes:
        name: Module name of the block or of the linear layer; names of several layers are joined by "+".
        linears: The linear layers.
        block: Index of the transformer block that holds them.
        is_end: Whether the player is the embedding, which counts to the first block, or the head, to the last.
    """

    name: str
    linears: tuple[LinearLayer, ...]
    block: int
    is_end: bool = False

    @property
    def n_weights(self) -> int:
        """Number of weights of the player."""
        return sum(linear.n_weights for linear in self.linears)

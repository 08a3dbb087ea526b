"""A model, block by block, at the bit-widths of assignments."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from coopq.core.errors import EstimationError
from coopq.core.types import REMOVED, UNTOUCHED, Assignment, Assignments, Player
from coopq.model.blockwise import Blockwise, States
from coopq.quantizers.bank import WeightBank


class AssignedModel:
    """A model, block by block, whose players have the widths of an assignment.

    Args:
        blockwise: The model on its tokens.
        bank: The weights of the model's players at each width. The bank exchanges the model's weights.

    Attributes:
        blockwise: As given.
        members: The players of each block.
    """

    def __init__(self, blockwise: Blockwise, bank: WeightBank) -> None:
        self.blockwise = blockwise
        self.members = players_of_blocks(bank.players)
        self._bank = bank
        self._embeds = bank.players[0].is_end
        self._embedded: dict[float, States] = {}

    def embed(self, assignment: Assignment) -> States:
        """States before the first block, by the embedding at its width if the embedding is a player."""
        width = assignment[0].item() if self._embeds else UNTOUCHED
        if width == UNTOUCHED:
            return self.blockwise.embedded
        if width not in self._embedded:
            self._bank.set_player(0, width)
            self._embedded[width] = self.blockwise.embed()
        return self._embedded[width]

    def set_block(self, d: int, widths: Assignment) -> None:
        """Give block d's players their weights at some widths, shape (n_members,)."""
        for player, width in zip(self.members[d], widths.tolist(), strict=True):
            self._bank.set_player(player, width)

    @contextmanager
    def block_at(self, d: int, widths: Assignment) -> Iterator[None]:
        """Let block d compute at some widths, shape (n_members,), fast and on the device, inside the `with` block."""
        self.set_block(d, widths)
        with self.blockwise.placed(d), self.blockwise.fast(d):
            yield

    def assigned(self, assignment: Assignment) -> AbstractContextManager[None]:
        """Let the model's own forward compute at an assignment inside the `with` block."""
        return self._bank.assigned(assignment.tolist())

    def restore(self) -> None:
        """Give the model its own weights back."""
        self._bank.restore()

    def first_difference(self, assignment: Assignment, previous: Assignment | None) -> int:
        """The first block at which an assignment differs from the previous one; 0 without a previous one."""
        if previous is None:
            return 0
        return self._bank.players[int(np.argmax(assignment != previous))].block

    def left_out(self, assignments: Assignments) -> npt.NDArray[np.bool_]:
        """Which blocks each assignment leaves out, shape (n, n_blocks).

        Raises:
            EstimationError: If some but not all players of a block are `REMOVED`.
        """
        removed = assignments == REMOVED
        left_out = np.stack([removed[:, members].all(axis=1) for members in self.members], axis=1)
        for d, members in enumerate(self.members):
            if (removed[:, members].any(axis=1) != left_out[:, d]).any():
                raise EstimationError(
                    f"an assignment removes some players of block {self.blockwise.prefix}.{d} and keeps others; "
                    "a block is left out as a whole: remove all of its players, or none"
                )
        return left_out


Walk: TypeAlias = Iterator[tuple[Assignment, States, int]]
"""Each assignment, its states after the last block, and the block forwards spent since the assignment before."""
Traversal: TypeAlias = Callable[[AssignedModel, Assignments, npt.NDArray[np.bool_]], Walk]
"""An order in which blocks compute; from distinct assignments in lexicographic order, and the blocks they leave out."""


def players_of_blocks(players: Sequence[Player]) -> list[range]:
    """Indices of the players in each block; players are ordered by block."""
    blocks = [player.block for player in players]
    starts = np.searchsorted(blocks, np.arange(blocks[-1] + 2)).tolist()
    return [range(start, end) for start, end in pairwise(starts)]

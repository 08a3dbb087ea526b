"""What a plan is made for: a request with the players, sizes and fingerprint that belong to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from coopq.core.sizes import Sizes
from coopq.core.specs import Request
from coopq.core.types import Player, Width


@dataclass(frozen=True)
class SizedRequest:
    """A request with its players and their sizes.

    Attributes:
        request: What was asked for.
        players: The players, by block.
        sizes: Bytes of the players at each width, to the byte.
    """

    request: Request
    players: tuple[Player, ...]
    sizes: Sizes

    @cached_property
    def player_widths(self) -> tuple[tuple[Width, ...], ...]:
        """The widths of each player, ascending."""
        return self.sizes.player_widths(self.request.widths.bits)

    @property
    def blocks(self) -> list[int]:
        """The block of each player, ascending from 0, shape (n_players,)."""
        return [player.block for player in self.players]

    @property
    def n_blocks(self) -> int:
        """Number of blocks that hold players."""
        return self.players[-1].block + 1


@dataclass(frozen=True)
class Subject(SizedRequest):
    """What plans are made for.

    Attributes:
        fingerprint: What losses depend on.
    """

    fingerprint: Mapping[str, Any]

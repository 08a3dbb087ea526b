"""Names of players for people: "block 3, gate+up"."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from coopq.plan.plan import PlayerPlan

WHOLE_BLOCK = "whole block"
EMBEDDING, HEAD = "embedding", "head"


class PlayerName(NamedTuple):
    """Where a player is.

    Attributes:
        block: Index of the block.
        projection: Which layers of the block, or `WHOLE_BLOCK`, `EMBEDDING`, `HEAD`.
    """

    block: int
    projection: str

    def __str__(self) -> str:
        if self.projection in (EMBEDDING, HEAD):
            return self.projection
        return f"block {self.block}" + ("" if self.projection == WHOLE_BLOCK else f", {self.projection}")


def name_players(players: Sequence[PlayerPlan]) -> list[PlayerName]:
    """The name of each player; a projection is spelled out where a block has two of the same last name."""
    inside = [[_inside(module, player.block) for module in player.modules] for player in players]
    short = [_short(player, paths) for player, paths in zip(players, inside, strict=True)]
    seen = Counter((player.block, name) for player, name in zip(players, short, strict=True))
    doubled = {name for (_, name), times in seen.items() if times > 1}
    return [
        PlayerName(player.block, "+".join(filter(None, paths)) if name in doubled else name)
        for player, name, paths in zip(players, short, inside, strict=True)
    ]


def _inside(module: str, block: int) -> str | None:
    """The part of a module's name after the index of its block; None for a module outside of blocks."""
    parts = module.split(".")
    if str(block) not in parts:
        return None
    return ".".join(parts[parts.index(str(block)) + 1 :]).removesuffix("_proj")


def _short(player: PlayerPlan, paths: Sequence[str | None]) -> str:
    """The last names of the layers of a player."""
    if None in paths:
        return EMBEDDING if player.block == 0 and "head" not in player.name else HEAD
    if player.name.rpartition(".")[2] == str(player.block):
        return WHOLE_BLOCK
    return "+".join(str(path).rpartition(".")[2] for path in paths)

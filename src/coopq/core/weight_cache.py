"""Dequantized weights in memory: as many as there is room for."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from coopq.core.types import Player, Width

if TYPE_CHECKING:  # nothing here needs torch to run
    from torch import Tensor

Weights: TypeAlias = "Mapping[str, Tensor]"
"""Weights of a player's linear layers, by name."""
Key: TypeAlias = tuple[int, Width]
"""A player and a width."""

_STALE = 20
"""Weights are stale if they were not asked for while each player was asked for this often on average. Stale weights
give way first, whatever their block."""


def bytes_at_once(players: Sequence[Player], itemsize: int, shared: bool) -> int:
    """Bytes of the weights that compute at the same time: the largest block's, and those of the model's ends.

    Args:
        players: The players.
        itemsize: Bytes of a weight.
        shared: Whether blocks share weights, so that a block computes with the weights of others.
    """
    in_blocks: Counter[int] = Counter()
    for player, rank in zip(players, ranks(players, shared), strict=True):
        in_blocks[rank] += 0 if player.is_end else player.n_weights
    return (max(in_blocks.values()) + sum(player.n_weights for player in players if player.is_end)) * itemsize


def ranks(players: Sequence[Player], shared: bool) -> list[int]:
    """How late each player computes, shape (n_players,): its block; the model's ends are last.

    Args:
        players: The players.
        shared: Whether blocks share weights; then all have the same rank.
    """
    after = max(player.block for player in players) + 1
    return [after if player.is_end else 0 if shared else player.block for player in players]


class WeightCache:
    """Weights of players by width, within a number of bytes.

    An engine goes through the blocks from first to last, time and again, and most often starts at one of the last
    blocks. A cache that dropped the least recently used weights would drop those that are needed next. So weights give
    way to weights of later blocks only, or to all weights once they are stale. Weights without room are not kept.

    Args:
        ranks: How late each player computes, shape (n_players,).
        limit: Most bytes of all weights; None sets no limit.
    """

    def __init__(self, ranks: Sequence[int], limit: int | None) -> None:
        self._ranks = ranks
        self._limit = limit
        self._kept: dict[Key, Weights] = {}
        self._bytes: dict[Key, int] = {}
        self._used: dict[Key, int] = {}
        self._clock = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    @property
    def n_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(self._bytes.values())

    def get(self, key: Key) -> "Weights | None":
        """The weights of a player at a width; None if they are not kept."""
        self._clock += 1
        self._used[key] = self._clock
        return self._kept.get(key)

    def make_room(self, key: Key, n_bytes: int) -> list[Key] | None:
        """Remove what gives way to the weights of a player at a width.

        Args:
            key: The player and the width.
            n_bytes: Bytes of the weights.
        Returns:
            What was removed; None, with nothing removed, if the weights are not to be kept.
        """
        if self._limit is None:
            return []
        rank, removed = self._ranks[key[0]], list[Key]()
        excess = self.n_bytes + n_bytes - self._limit
        if excess <= 0:
            return removed
        oldest = self._clock - _STALE * len(self._ranks)
        order = {other: (self._used[other] > oldest, self._ranks[other[0]], self._used[other]) for other in self._kept}
        for other in sorted(order, key=order.__getitem__):
            is_fresh, other_rank, _ = order[other]
            if is_fresh and other_rank >= rank:
                continue
            removed.append(other)
            excess -= self._bytes[other]
            if excess <= 0:
                for gone in removed:
                    del self._kept[gone], self._bytes[gone]
                return removed
        return None

    def put(self, key: Key, weights: Weights) -> None:
        """Keep weights that `make_room` made room for."""
        self._kept[key] = weights
        self._bytes[key] = sum(tensor.nbytes for tensor in weights.values())

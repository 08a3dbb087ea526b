"""Exact sizes of players, before anything is quantized, in the file that a plan is made for."""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

from coopq.core.errors import BackendError, UnsupportedBits
from coopq.core.sizes import Sizes
from coopq.core.specs import Request
from coopq.core.types import UNTOUCHED, Player, ProgressCallback, Width

if TYPE_CHECKING:  # the contract imports torch
    from coopq.quantizers.backend import Backend


_LARGE_SHARE = 0.1
"""Share of the weights to quantize that a layer must have to be announced."""
_log = logging.getLogger(__name__)


class Target(Protocol):
    """The kind of file that plans are made for."""

    def fit(
        self, request: Request, skeleton: Any, players: Sequence[Player], backend: "Backend"
    ) -> tuple[Sequence[Player], Sizes]:
        """The players that the file can hold, and their sizes; other layers stay in full precision.

        Args:
            request: What is asked for.
            skeleton: The model without storage.
            players: All players, by block.
            backend: What quantizes.
        Raises:
            CoopQError: If the file cannot hold the model.
        """
        ...

    def check(self, request: Request, model: Any, players: Sequence[Player], progress: ProgressCallback) -> None:
        """Check the weights of the model, before any work is done.

        Args:
            request: What is asked for.
            model: The model.
            players: The players that the file holds.
            progress: Told of every step.
        Raises:
            CoopQError: If the file cannot hold the model.
        """
        ...


class _OurFile(Target):
    """What coopq itself saves: it holds every model."""

    def fit(
        self, request: Request, skeleton: Any, players: Sequence[Player], backend: "Backend"
    ) -> tuple[Sequence[Player], Sizes]:
        """See `Target.fit`."""
        return players, packed_sizes(players, backend, request.widths.bits)

    def check(self, request: Request, model: Any, players: Sequence[Player], progress: ProgressCallback) -> None:
        """See `Target.check`."""


OUR_FILE = _OurFile()


def packed_bytes(backend: "Backend", player: Player, width: Width) -> int:
    """Bytes of the packed weights of a player at a width."""
    return sum(backend.storage_bytes(linear.shape, width) for linear in player.linears)


def announce_large_layers(layers: Mapping[Width, Sequence[str]], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Log the layers that hold a large share of the weights to quantize; progress pauses at them.

    Args:
        layers: Names of the layers to quantize, for each width.
        shapes: Shape of each layer by name.
    """
    names = Counter(chain.from_iterable(layers.values()))
    n_weights = {name: n_widths * math.prod(shapes[name]) for name, n_widths in names.items()}
    total = sum(n_weights.values())
    for name, number in n_weights.items():
        share = number / total
        if share >= _LARGE_SHARE and len(n_weights) > 1:
            _log.info("%s takes about %.0f %% of the time to quantize; progress waits for it", name, 100 * share)


def in_portions(n_bytes: Mapping[str, int], room: int) -> Iterator[list[str]]:
    """Names in order, in portions that have room in memory together; what has no room alone is a portion.

    Args:
        n_bytes: Bytes by name.
        room: Bytes of the memory.
    """
    portion, left = list[str](), room
    for name, needed in n_bytes.items():
        if portion and needed > left:
            yield portion
            portion, left = [], room
        portion.append(name)
        left -= needed
    if portion:
        yield portion


def packed_sizes(players: Sequence[Player], backend: "Backend", widths: Sequence[Width]) -> Sizes:
    """Exact bytes of every player at every width; an `UNTOUCHED` weight takes 2 bytes.

    A player has a width if one of its layers has the width. Its other layers take their next wider width.

    Raises:
        BackendError: If the backend cannot quantize a layer, because of the layer's shape or kind, or lacks what the
            layer needs.
        UnsupportedBits: If a player has none of the widths.
    """
    special = [linear.name for player in players for linear in player.linears if not linear.is_plain]
    if backend.only_plain and special:
        raise BackendError(
            f"backend {backend.name!r} quantizes nn.Linear layers only, and {special[0]} is an embedding, a Conv1D or "
            "experts in one tensor; use --no-embeddings if it is an embedding, or choose another backend"
        )
    backend.check_layers([linear for player in players for linear in player.linears])
    for player in players:
        if all(_player_bytes(player, backend, width) is None for width in widths):
            shape = player.linears[0].shape
            raise UnsupportedBits(
                f"backend {backend.name!r} has no {' or '.join(map(str, widths))} bits for rows of {shape[1]} weights, "
                f"as {player.linears[0].name} has; add one of {', '.join(map(str, backend.widths_of(shape)))}"
            )
    return Sizes(
        n_weights=tuple(player.n_weights for player in players),
        n_bytes={width: tuple(_player_bytes(player, backend, width) for player in players) for width in widths},
    )


def _player_bytes(player: Player, backend: "Backend", width: Width) -> int | None:
    """Bytes of a player at a width; None for a player without the width."""
    if width == UNTOUCHED:
        return 2 * player.n_weights
    if not any(width in backend.widths_of(linear.shape) for linear in player.linears):
        return None
    return packed_bytes(backend, player, width)

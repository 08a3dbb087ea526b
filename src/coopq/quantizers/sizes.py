"""Exact sizes of players, before anything is quantized."""

from collections.abc import Sequence

from coopq.core.errors import BackendError
from coopq.core.sizes import Sizes
from coopq.core.types import UNTOUCHED, Player, Width
from coopq.quantizers.backend import Backend


def packed_sizes(players: Sequence[Player], backend: Backend, widths: Sequence[Width]) -> Sizes:
    """Exact bytes of every player at every width; an `UNTOUCHED` weight takes 2 bytes.

    Raises:
        BackendError: If the backend cannot quantize a layer, because of the layer's shape or kind.
    """
    special = [linear.name for player in players for linear in player.linears if not linear.is_plain]
    if backend.only_plain and special:
        raise BackendError(
            f"backend {backend.name!r} quantizes plain linear layers only, and {special[0]} is an embedding or experts "
            "in one tensor; leave --embeddings out, or choose another backend"
        )
    return Sizes(
        n_weights=tuple(player.n_weights for player in players),
        n_bytes={
            width: tuple(
                2 * player.n_weights
                if width == UNTOUCHED
                else sum(backend.storage_bytes(linear.shape, width) for linear in player.linears)
                for player in players
            )
            for width in widths
        },
    )

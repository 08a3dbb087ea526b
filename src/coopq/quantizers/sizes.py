"""Exact sizes of players, before anything is quantized, in the file that a plan is made for."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from coopq.core.errors import BackendError
from coopq.core.sizes import Sizes
from coopq.core.specs import Request
from coopq.core.types import UNTOUCHED, Player, ProgressCallback, Width

if TYPE_CHECKING:  # the contract imports torch
    from coopq.quantizers.backend import Backend


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


def packed_sizes(players: Sequence[Player], backend: "Backend", widths: Sequence[Width]) -> Sizes:
    """Exact bytes of every player at every width; an `UNTOUCHED` weight takes 2 bytes.

    Raises:
        BackendError: If the backend cannot quantize a layer, because of the layer's shape or kind, or lacks what the
            layer needs.
    """
    special = [linear.name for player in players for linear in player.linears if not linear.is_plain]
    if backend.only_plain and special:
        raise BackendError(
            f"backend {backend.name!r} quantizes plain linear layers only, and {special[0]} is an embedding or experts "
            "in one tensor; leave --embeddings out, or choose another backend"
        )
    backend.check_layers([linear for player in players for linear in player.linears])
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

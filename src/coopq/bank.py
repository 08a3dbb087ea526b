"""Dequantised weights of every player at every bit-width: made once, kept on disk, mapped into memory."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from coopq.backends import Backend
from coopq.errors import Mismatch, ModelError
from coopq.files import atomic_file, require_space, write_json
from coopq.storage import Storage
from coopq.tensors import load_tensors, save_tensors
from coopq.types import UNTOUCHED, Player, ProgressCallback, silent

_FORMAT_VERSION = 1


def measure_storage(players: Sequence[Player], backend: Backend, bits: Sequence[int]) -> Storage:
    """Exact bytes of every player at every width, before anything is quantized.

    Raises:
        BackendError: If a layer's shape cannot be quantized.
    """
    return Storage(
        n_weights=tuple(player.n_weights for player in players),
        n_bytes={
            width: tuple(
                sum(backend.storage_bytes(linear.shape, width) for linear in player.linears) for player in players
            )
            for width in bits
        },
    )


class WeightBank:
    """Weights by (player, bits).

    Args:
        folder: Where the weights are kept; a file for each player and width.
        model: The full-precision model.
        players: Its players.
        backend: What quantizes.
        fingerprint: What the weights depend on; a folder with another one is refused.

    Raises:
        Mismatch: If the folder belongs to something else.
    """

    def __init__(
        self,
        folder: Path,
        model: torch.nn.Module,
        players: Sequence[Player],
        backend: Backend,
        fingerprint: Mapping[str, Any],
    ) -> None:
        self.players = players
        self._folder = folder
        self._backend = backend
        self._linears = {
            linear.name: model.get_submodule(linear.name) for player in players for linear in player.linears
        }
        self._originals: dict[str, Tensor] = {
            name: cast(Tensor, linear.weight).data for name, linear in self._linears.items()
        }
        self._weights: dict[tuple[int, int], dict[str, Tensor]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        header = folder / "bank.json"
        ours = {"format_version": _FORMAT_VERSION, **fingerprint}
        if header.exists():
            theirs = json.loads(header.read_text(encoding="utf-8"))
            if theirs != json.loads(json.dumps(ours)):
                raise Mismatch(f"weight bank {folder} holds other weights", ours, theirs, "use another run folder")
        else:
            write_json(header, ours)

    def build(self, bits: Sequence[int], progress: ProgressCallback = silent) -> None:
        """Make sure that all players are there at the widths `bits`.

        Raises:
            OutputError: If the disk has no room for them.
            ModelError: If a weight is not finite.
        """
        missing = [
            (player, width)
            for player in range(len(self.players))
            for width in bits
            if width != UNTOUCHED and not self._path(player, width).exists()
        ]
        itemsize = next(iter(self._originals.values())).dtype.itemsize
        needed = sum(self.players[player].n_weights * itemsize for player, _ in missing)
        require_space(self._folder, needed, "the weight bank")
        for done, (player, width) in enumerate(missing):
            progress("quantizing", done, len(missing))
            weights = {
                linear.name: self._make(linear.name, linear.shape, width) for linear in self.players[player].linears
            }
            with atomic_file(self._path(player, width)) as temporary:
                save_tensors(weights, temporary)
        if missing:
            progress("quantizing", len(missing), len(missing))

    def set_player(self, player: int, bits: int) -> None:
        """Let the model's player have its weights at `bits`; pointers move, nothing is copied."""
        weights = self._originals if bits == UNTOUCHED else self.quantized(player, bits)
        for linear in self.players[player].linears:
            self._linears[linear.name].weight.data = weights[linear.name]

    def originals(self, player: int) -> dict[str, Tensor]:
        """The model's own weights of a player's linear layers, by name."""
        return {linear.name: self._originals[linear.name] for linear in self.players[player].linears}

    def quantized(self, player: int, bits: int) -> dict[str, Tensor]:
        """Dequantised weights of a player, by name; they must have been built."""
        if (player, bits) not in self._weights:
            device = str(next(iter(self._originals.values())).device)
            self._weights[player, bits] = load_tensors(self._path(player, bits), device=device)
        return self._weights[player, bits]

    def parameters(self, player: int) -> dict[str, nn.Parameter]:
        """The parameters that hold a player's weights at the moment, by name."""
        return {
            linear.name: cast(nn.Parameter, self._linears[linear.name].weight)
            for linear in self.players[player].linears
        }

    def restore(self) -> None:
        """Give the model its own weights back."""
        for player in range(len(self.players)):
            self.set_player(player, UNTOUCHED)

    def _make(self, name: str, shape: tuple[int, int], bits: int) -> Tensor:
        weight = self._originals[name]
        if not torch.isfinite(weight).all():
            raise ModelError(f"weight {name} holds values that are not finite; the checkpoint is damaged")
        return self._backend.dequantize(self._backend.quantize(weight, bits), shape, bits, weight.dtype).contiguous()

    def _path(self, player: int, bits: int) -> Path:
        return self._folder / f"player{player:03d}-{bits}bit.safetensors"

"""The weights of every player at every width: made once, kept packed on disk, and dequantized to compute."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from coopq.core.errors import Mismatch, ModelError
from coopq.core.files import as_plain, atomic_file, locked, read_json, require_space, write_json
from coopq.core.types import REMOVED, UNTOUCHED, Player, ProgressCallback, Width, as_width, silent
from coopq.core.weight_cache import Key, WeightCache, Weights, bytes_at_once, ranks
from coopq.model.load import LoadedModel
from coopq.model.matrices import matrix_of
from coopq.model.players import blocks_share_weights, find_blocks
from coopq.model.safetensors_io import load_tensors, save_tensors
from coopq.quantizers.backend import Backend, Packed
from coopq.quantizers.sizes import announce_large_layers, packed_bytes

_FORMAT_VERSION = 3
_WAY_OUT = "delete it and run the same command again"


class WeightBank:
    """The weights of a model's players by player and width.

    Attributes:
        players: The players of the model.
        matrices: The matrix of each linear layer, by name.
        model: The model.

    Args:
        folder: Folder of the packed weights, a file for each player and width.
        loaded: The full-precision model with its tokenizer.
        players: The players of the model.
        backend: The backend that quantizes.
        fingerprint: What the weights depend on; a folder with another fingerprint is refused.
        room: Bytes that dequantized weights may take besides the model's own; None has room for all. If there is room
            only for `bytes_at_once`, packed weights stay in the host's memory, and otherwise on the model's device.

    Raises:
        Mismatch: If the folder belongs to something else.
    """

    def __init__(
        self,
        folder: Path,
        loaded: LoadedModel,
        players: Sequence[Player],
        backend: Backend,
        fingerprint: Mapping[str, Any],
        *,
        room: int | None = None,
    ) -> None:
        self.players = players
        self.model = loaded.model
        self._folder = folder
        self._backend = backend
        self._tokenizer = loaded.tokenizer
        self.matrices = {each.name: matrix_of(loaded.model, each.name) for player in players for each in player.linears}
        self._originals: Weights = {name: matrix.parameter.data for name, matrix in self.matrices.items()}
        shared = blocks_share_weights(loaded.model)
        at_once = bytes_at_once(players, loaded.model.dtype.itemsize, shared)
        self._ranks = ranks(players, shared)
        self._cache = WeightCache(self._ranks, None if room is None else room - at_once)
        self._loose: set[int] = set()
        """Players that have quantized weights in the model which the cache does not keep."""
        self._bits: dict[int, Width] = {}
        """Width that each player has in the model."""
        self._room = room
        self._packed: dict[Key, dict[str, Packed]] = {}
        self._packed_on_host = room is not None and room <= at_once
        folder.mkdir(parents=True, exist_ok=True)
        header = folder / "bank.json"
        ours = {"format_version": _FORMAT_VERSION, **fingerprint}
        if header.exists():
            found = read_json(header)
            if found != as_plain(ours):
                raise Mismatch(f"weight bank {folder} holds other weights", ours, found, "use another run folder")
        else:
            write_json(header, ours)

    def build(
        self,
        widths: Sequence[Width],
        tokens: npt.NDArray[np.int64] | None = None,
        progress: ProgressCallback = silent,
        player_widths: Sequence[Sequence[Width]] | None = None,
    ) -> None:
        """Quantize the players at the widths that the folder lacks.

        Args:
            widths: The widths; `UNTOUCHED` needs no work.
            tokens: Tokens that weights are fitted to, shape (n_sequences, length); None for backends that fit none.
            progress: Called after every player.
            player_widths: The widths of each player; None if every player has all widths.
        Raises:
            OutputError: If the disk has no room for the weights.
            ModelError: If a weight is not finite.
            RunError: If another process builds in the folder.
        """
        with locked(self._folder, "weight bank"):
            missing = self._missing(widths, player_widths)
            total = sum(map(len, missing.values()))
            n_bytes = [packed_bytes(self._backend, self.players[p], width) for width in missing for p in missing[width]]
            require_space(self._folder, sum(n_bytes), "the weight bank")
            if not total:
                return
            done = 0
            progress("quantizing", done, total)  # before the first player, which may take long
            for done, (player, width, packed) in enumerate(self._quantize(missing, tokens, progress), 1):
                tensors = {
                    f"{name}.{key}": part.contiguous() for name, own in packed.items() for key, part in own.items()
                }
                with atomic_file(self._path(player, width)) as temporary:
                    save_tensors(tensors, temporary, self._about(player, width))
                progress("quantizing", done, total)
            assert done == total, (done, total)

    def set_player(self, player: int, bits: Width) -> None:
        """Give the model a player's weights at a width; pointers move, nothing is copied.

        If memory is short, players of other blocks get the model's own weights back.
        """
        if player in self._loose and self._bits[player] == bits:
            return
        if self._loose:
            self._let_go(player)
        self._point(player, self.weights(player, bits))
        if bits != UNTOUCHED and (player, bits) not in self._cache:
            self._loose.add(player)
        self._bits[player] = bits

    @contextmanager
    def assigned(self, assignment: Sequence[Width]) -> Iterator[None]:
        """Let the model's own forward compute at the widths of an assignment inside the `with` block.

        A block gets its weights when its turn comes, as there may be no room for those of all blocks. The model is left
        with the weights of the assignment, as far as there is room.
        """

        def give(players: Sequence[int]) -> None:
            for player in players:
                if assignment[player] != REMOVED:
                    self.set_player(player, assignment[player])

        def before(block: int) -> Callable[[nn.Module, Any], None]:
            own = [p for p, player in enumerate(self.players) if player.block == block and not player.is_end]
            return lambda *_: give(own)

        give([p for p, player in enumerate(self.players) if player.is_end])
        blocks = find_blocks(self.model)[1]
        handles = [block.register_forward_pre_hook(before(d)) for d, block in enumerate(blocks)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def weights(self, player: int, bits: Width) -> Weights:
        """Dequantized weights of a player at a width, by name; at `UNTOUCHED` the model's own weights.

        Weights at other widths must have been built.
        """
        if bits == UNTOUCHED:
            return {linear.name: self._originals[linear.name] for linear in self.players[player].linears}
        key = player, as_width(bits)
        if (found := self._cache.get(key)) is not None:
            return found
        evicted = self._cache.make_room(key, self.players[player].n_weights * self.model.dtype.itemsize)
        if evicted:
            self._loose.update(other for other, width in evicted if self._bits.get(other) == width)
            self._let_go(player)
        made = self._dequantize(*key)
        if evicted is not None:
            self._cache.put(key, made)
        return made

    def packed(self, bits: Mapping[str, Width]) -> Iterator[tuple[str, Packed]]:
        """Name and packed tensors of linear layers, in host memory; they must have been built.

        Args:
            bits: Width of each linear layer by name; all layers of a player have the same width.
        """
        for player, linears in enumerate(player.linears for player in self.players):
            if linears[0].name in bits:
                yield from self._read(player, bits[linears[0].name], "cpu").items()

    def parameters(self, player: int) -> dict[str, nn.Parameter]:
        """The model's parameters that hold a player's weights, by name."""
        return {linear.name: self.matrices[linear.name].parameter for linear in self.players[player].linears}

    def restore(self) -> None:
        """Give the model its own weights back."""
        for player in range(len(self.players)):
            self.set_player(player, UNTOUCHED)

    def _missing(
        self, widths: Sequence[Width], player_widths: Sequence[Sequence[Width]] | None
    ) -> dict[Width, list[int]]:
        """Players to quantize at each width."""
        missing: dict[Width, list[int]] = {}
        for width in widths:
            if width == UNTOUCHED:
                continue
            players = [p for p in range(len(self.players)) if player_widths is None or width in player_widths[p]]
            lacking = [player for player in players if not self._path(player, width).exists()]
            # Layers that depend on each other are quantized together.
            missing[width] = players if lacking and self._backend.whole_model else lacking
        return missing

    def _quantize(
        self, players: Mapping[Width, Sequence[int]], tokens: npt.NDArray[np.int64] | None, progress: ProgressCallback
    ) -> Iterator[tuple[int, Width, dict[str, Packed]]]:
        """Quantize players at widths.

        Yields:
            Player, width and packed tensors by name of the layer, as soon as all layers of a player are there.
        """
        layers = {
            width: [linear.name for player in chosen for linear in self.players[player].linears]
            for width, chosen in players.items()
            if chosen
        }
        place = {
            linear.name: (player, linear.shape)
            for player in sorted({player for chosen in players.values() for player in chosen})
            for linear in self.players[player].linears
        }
        announce_large_layers(layers, {name: shape for name, (_, shape) in place.items()})
        for name in place:
            if not torch.isfinite(self._originals[name]).all():
                raise ModelError(f"weight {name} holds values that are not finite; the checkpoint is damaged")
        made: dict[Key, dict[str, Packed]] = {}
        found = self._backend.quantize_widths(self.model, self._tokenizer, layers, tokens, progress)
        for width, name, tensors in found:
            player, shape = place[name]
            packed = made.setdefault((player, width), {})
            packed[name] = tensors
            rows = self._backend.dequantize(tensors, shape, width, self._originals[name].dtype)
            if not torch.isfinite(rows).all():
                raise ModelError(
                    f"backend {self._backend.name!r} makes values of {name} at {width:g} bits that are not finite: the "
                    "weight is too large for 16-bit scales; choose another backend"
                )
            if len(packed) == len(self.players[player].linears):
                yield player, width, made.pop((player, width))
        assert not made, list(made)

    def _dequantize(self, player: int, bits: Width) -> Weights:
        """Make the weights of a player at a width from the packed ones."""
        packed = self._packed.get((player, bits))
        if packed is None:
            first = self._originals[self.players[player].linears[0].name]
            packed = self._read(player, bits, "cpu" if self._packed_on_host else str(first.device))
            if self._room is not None:  # otherwise what is made of them is kept
                self._packed[player, bits] = packed
        weights = {}
        for linear in self.players[player].linears:
            own = self._originals[linear.name]
            tensors = {part: tensor.to(own.device) for part, tensor in packed[linear.name].items()}
            rows = self._backend.dequantize(tensors, linear.shape, bits, own.dtype)
            weights[linear.name] = self.matrices[linear.name].stored(rows)
        return weights

    def _read(self, player: int, bits: Width, device: str = "cpu") -> dict[str, Packed]:
        """Packed tensors of a player's linear layers at a width, by name, from disk."""
        tensors = load_tensors(self._path(player, bits), device, way_out=_WAY_OUT, about=self._about(player, bits))
        return {
            linear.name: {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
            for linear in self.players[player].linears
            for prefix in (f"{linear.name}.",)
        }

    def _point(self, player: int, weights: Weights) -> None:
        for linear in self.players[player].linears:
            self.matrices[linear.name].parameter.data = weights[linear.name]

    def _let_go(self, player: int) -> None:
        """Give this player, and players of other blocks, the model's own weights, unless the cache keeps the quantized.

        The model's ends compute with every block.
        """
        for other in tuple(self._loose):
            has_end = self.players[player].is_end or self.players[other].is_end
            if other == player or not (has_end or self._ranks[other] == self._ranks[player]):
                self._loose.remove(other)
                self._point(other, self.weights(other, UNTOUCHED))
                self._bits[other] = UNTOUCHED

    def _about(self, player: int, bits: Width) -> dict[str, str]:
        """What a file of the bank says that it holds."""
        return {"player": self.players[player].name, "bits": f"{bits:g}"}

    def _path(self, player: int, bits: Width) -> Path:
        return self._folder / f"player{player:03d}-{bits:g}bit.safetensors"

"""Weights of every player at every width: made once, kept on disk packed and dequantised; the latter are mapped."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from coopq.quantize import Backend
from coopq.quantize.backend import Packed
from coopq.core.errors import BackendError, EstimationError, Mismatch, ModelError
from coopq.core.files import atomic_file, read_json, require_space, write_json
from coopq.model.load import LoadedModel
from coopq.model.players import weight_of
from coopq.core.sizes import Storage
from coopq.model.safetensors_io import load_tensors, save_tensors
from coopq.core.types import UNTOUCHED, Player, ProgressCallback, Width, silent

_FORMAT_VERSION = 1


def measure_storage(players: Sequence[Player], backend: Backend, bits: Sequence[Width]) -> Storage:
    """Exact bytes of every player at every width, before anything is quantized.

    Raises:
        BackendError: If a layer cannot be quantized for its shape or its kind.
    """
    others = [linear.name for player in players for linear in player.linears if not linear.is_plain]
    if backend.only_plain and others:
        raise BackendError(
            f"backend {backend.name!r} quantizes linear layers alone, and {others[0]} is an embedding or experts in "
            "one tensor; leave --embeddings out, or take another backend"
        )
    return Storage(
        n_weights=tuple(player.n_weights for player in players),
        n_bytes={
            width: tuple(
                2 * player.n_weights
                if width == UNTOUCHED
                else sum(backend.storage_bytes(linear.shape, width) for linear in player.linears)
                for player in players
            )
            for width in bits
        },
    )


def round_untouched(loaded: LoadedModel, players: Sequence[Player], widths: Sequence[Width]) -> bool:
    """Where players may stay untouched, and their checkpoint has 32 bits, let the model have what 16 store of them.

    So what is measured is what is saved.

    Returns:
        Whether that was so.
    """
    if UNTOUCHED not in widths or loaded.checkpoint_dtype.itemsize == 2:
        return False
    for name in (linear.name for player in players for linear in player.linears):
        weight = weight_of(loaded.model, name)
        weight.data = weight.data.half().to(weight.dtype)
    return True


class WeightBank:
    """Weights by (player, bits).

    Args:
        folder: Where the weights are kept: for each player and width a file of them packed, unless the backend's depend
            on the widths of others, and one of them dequantised.
        loaded: The full-precision model with its tokenizer.
        players: Its players.
        backend: What quantizes.
        fingerprint: What the weights depend on; a folder with another one is refused.
        resident: Keep weights where the model computes, once read. Otherwise they are read whenever they are set: from
            the disk, or from what the system holds of it in memory.

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
        resident: bool = True,
    ) -> None:
        self.players = players
        self.resident = resident
        self._folder = folder
        self._backend = backend
        self._loaded = loaded
        self._parameters = {
            linear.name: weight_of(loaded.model, linear.name) for player in players for linear in player.linears
        }
        self._originals: dict[str, Tensor] = {name: weight.data for name, weight in self._parameters.items()}
        self._weights: dict[tuple[int, Width], dict[str, Tensor]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        header = folder / "bank.json"
        ours = {"format_version": _FORMAT_VERSION, **fingerprint}
        if header.exists():
            theirs = read_json(header)
            if theirs != json.loads(json.dumps(ours)):
                raise Mismatch(f"weight bank {folder} holds other weights", ours, theirs, "use another run folder")
        else:
            write_json(header, ours)

    def build(
        self,
        bits: Sequence[Width],
        tokens: npt.NDArray[np.int64] | None = None,
        progress: ProgressCallback = silent,
        levels: Sequence[Sequence[Width]] | None = None,
    ) -> None:
        """Make sure that all players are there at the widths `bits`.

        Args:
            bits: The widths; there is nothing to do for `UNTOUCHED`.
            tokens: What backends fit weights to that do, shape (n_sequences, length).
            progress: Told of every player.
            levels: Those of the widths that each player has; None where all have all.
        Raises:
            OutputError: If the disk has no room for them.
            ModelError: If a weight is not finite.
        """
        every = range(len(self.players))
        of_width = {width: [p for p in every if levels is None or width in levels[p]] for width in bits}
        missing = {
            width: [player for player in of if not self._is_there(player, width)]
            for width, of in of_width.items()
            if width != UNTOUCHED
        }
        if self._backend.whole_model:
            missing = {width: of_width[width] for width, players in missing.items() if players}
        total = sum(map(len, missing.values()))
        itemsize = next(iter(self._originals.values())).dtype.itemsize
        needed = sum(
            linear.n_weights * itemsize
            + (0 if self._backend.whole_model else self._backend.storage_bytes(linear.shape, width))
            for width, of in missing.items()
            for player in of
            for linear in self.players[player].linears
        )
        require_space(self._folder, needed, "the weight bank")
        if not total:
            return
        done = 0
        progress("quantizing", done, total)  # the first one may be long in coming
        for player, width, packed, weights in self._quantize(missing, tokens):
            if not self._backend.whole_model:
                with atomic_file(self._packed_path(player, width)) as temporary:
                    save_tensors(packed, temporary)
            with atomic_file(self._path(player, width)) as temporary:
                save_tensors(weights, temporary)
            done += 1
            progress("quantizing", done, total)
        assert done == total, (done, total)

    def set_player(self, player: int, bits: Width) -> None:
        """Let the model's player have its weights at `bits`; pointers move, nothing is copied."""
        weights = self.weights(player, bits)
        for linear in self.players[player].linears:
            self._parameters[linear.name].data = weights[linear.name]

    def weights(self, player: int, bits: Width) -> dict[str, Tensor]:
        """Weights of a player at `bits` by name, dequantised, or the model's own; they must have been built."""
        if bits == UNTOUCHED:
            return {linear.name: self._originals[linear.name] for linear in self.players[player].linears}
        if (player, bits) in self._weights:
            return self._weights[player, bits]
        device = str(self._originals[self.players[player].linears[0].name].device)
        way_out = "delete it and run the same command again"
        read = load_tensors(self._path(player, bits), device, way_out=way_out)
        weights = {name: weight.view_as(self._originals[name]) for name, weight in read.items()}  # experts: 3 axes
        if self.resident:
            self._weights[player, bits] = weights
        return weights

    def packed(self, bits: Mapping[str, Width]) -> Iterator[tuple[str, Packed]]:
        """Packed weights of players at widths by name, in the host's memory, as the backend made them.

        Args:
            bits: Width of each weight, the same for all of a player; they must have been built.
        """
        way_out = "delete it and run the same command again"
        for player, (first, *others) in enumerate(player.linears for player in self.players):
            if first.name in bits:
                tensors = load_tensors(self._packed_path(player, bits[first.name]), "cpu", way_out=way_out)
                for linear in (first, *others):
                    prefix = f"{linear.name}."
                    of_linear = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
                    yield linear.name, {key.removeprefix(prefix): tensor for key, tensor in of_linear.items()}

    def parameters(self, player: int) -> dict[str, nn.Parameter]:
        """The parameters that hold a player's weights at the moment, by name."""
        return {linear.name: self._parameters[linear.name] for linear in self.players[player].linears}

    @contextmanager
    def watching(self, players: Sequence[int]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """A dictionary that gets the input and the output of each linear layer of players, by name, when called.

        Raises:
            EstimationError: If a player has experts that are kept in one tensor: they have no outputs of their own.
        """
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(name: str) -> Callable[[Any, Any, Tensor], None]:
            return lambda _, inputs, output: seen.update({name: (inputs[0].detach(), output)})

        names = [linear.name for player in players for linear in self.players[player].linears]
        experts = [name for name in names if self._originals[name].dim() > 2]
        if experts:
            raise EstimationError(f"{experts[0]} holds experts, whose outputs cannot be seen; take another method")
        handles = [self._loaded.model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def restore(self) -> None:
        """Give the model its own weights back."""
        for player in range(len(self.players)):
            self.set_player(player, UNTOUCHED)

    def _quantize(
        self, players: Mapping[Width, Sequence[int]], tokens: npt.NDArray[np.int64] | None
    ) -> Iterator[tuple[int, Width, dict[str, Tensor], dict[str, Tensor]]]:
        """Weights of players at widths, one player after the other: player, width, packed and dequantised by name."""
        linears = {
            width: [(player, linear) for player in of for linear in self.players[player].linears]
            for width, of in players.items()
            if of
        }
        place = {linear.name: (player, linear.shape) for of in linears.values() for player, linear in of}
        for name in place:
            if not torch.isfinite(self._originals[name]).all():
                raise ModelError(f"weight {name} holds values that are not finite; the checkpoint is damaged")
        layers = {width: [linear.name for _, linear in of] for width, of in linears.items()}
        made: dict[tuple[int, Width], tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        for width, name, tensors in self._backend.quantize_widths(
            self._loaded.model, self._loaded.tokenizer, layers, tokens
        ):
            (player, shape), dtype = place[name], self._originals[name].dtype
            packed, weights = made.setdefault((player, width), ({}, {}))
            packed.update({f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()})
            weights[name] = self._backend.dequantize(tensors, shape, width, dtype).contiguous()
            if len(weights) == len(self.players[player].linears):
                yield player, width, *made.pop((player, width))
        assert not made, list(made)

    def _is_there(self, player: int, bits: Width) -> bool:
        """Whether all is on disk of a player at a width; what is packed is written first."""
        return self._path(player, bits).exists() and (
            self._backend.whole_model or self._packed_path(player, bits).exists()
        )

    def _packed_path(self, player: int, bits: Width) -> Path:
        return self._folder / f"player{player:03d}-{bits:g}bit-packed.safetensors"

    def _path(self, player: int, bits: Width) -> Path:
        return self._folder / f"player{player:03d}-{bits:g}bit.safetensors"

"""The weights of every player at every width: made once and kept on disk, both packed and dequantized."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from coopq.core.errors import Mismatch, ModelError
from coopq.core.files import as_plain, atomic_file, read_json, require_space, write_json
from coopq.core.types import UNTOUCHED, Player, ProgressCallback, Width, silent
from coopq.model.load import LoadedModel
from coopq.model.matrices import matrix_of
from coopq.model.safetensors_io import load_tensors, save_tensors
from coopq.quantizers.backend import Backend, Packed

_FORMAT_VERSION = 2
_WAY_OUT = "delete it and run the same command again"


def round_untouched(loaded: LoadedModel, players: Sequence[Player], widths: Sequence[Width]) -> bool:
    """Round the players' weights to 16 bits, if players may stay untouched and the checkpoint has 32 bits.

    A saved model stores 16 bits of an untouched weight, so the weight that is measured is the weight that is saved.

    Returns:
        Whether the weights were rounded.
    """
    if UNTOUCHED not in widths or loaded.checkpoint_dtype.itemsize == 2:
        return False
    for name in (linear.name for player in players for linear in player.linears):
        weight = matrix_of(loaded.model, name).parameter
        weight.data = weight.data.to(sixteen_bit_dtype(weight.data, loaded.checkpoint_dtype)).to(weight.dtype)
    return True


def sixteen_bit_dtype(weight: Tensor, checkpoint: torch.dtype) -> torch.dtype:
    """The dtype that an untouched weight is saved in.

    Args:
        weight: The weight.
        checkpoint: The checkpoint's dtype, which is kept if it has 16 bits.
    Returns:
        float16 for a wider checkpoint; bfloat16 if float16 cannot hold a value of the weight.
    """
    if checkpoint.itemsize <= 2:
        return checkpoint
    fits = weight.is_meta or not weight.numel() or bool(weight.abs().max() <= torch.finfo(torch.float16).max)
    return torch.float16 if fits else torch.bfloat16


class WeightBank:
    """The weights of a model's players by player and width.

    Attributes:
        players: The players of the model.
        matrices: The matrix of each linear layer, by name.
        resident: As given.

    Args:
        folder: Folder of the weights. Each player has two files for each width, the dequantized weights and the packed
            ones; the packed file is missing for backends with `whole_model`.
        loaded: The full-precision model with its tokenizer.
        players: The players of the model.
        backend: The backend that quantizes.
        fingerprint: What the weights depend on; a folder with another fingerprint is refused.
        resident: Keep weights on the model's device once they were read. Otherwise they are read from disk, or from the
            system's file cache, whenever they are set.

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
        self.matrices = {
            linear.name: matrix_of(loaded.model, linear.name) for player in players for linear in player.linears
        }
        self._parameters = {name: matrix.parameter for name, matrix in self.matrices.items()}
        self._originals: dict[str, Tensor] = {name: weight.data for name, weight in self._parameters.items()}
        self._weights: dict[tuple[int, Width], dict[str, Tensor]] = {}
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
        """
        missing = self._missing(widths, player_widths)
        total = sum(map(len, missing.values()))
        require_space(self._folder, self._needed_bytes(missing), "the weight bank")
        if not total:
            return
        done = 0
        progress("quantizing", done, total)  # before the first player, which may take long
        for player, width, packed, weights in self._quantize(missing, tokens):
            if not self._backend.whole_model:
                with atomic_file(self._packed_path(player, width)) as temporary:
                    save_tensors(packed, temporary, self._about(player, width, "packed"))
            with atomic_file(self._path(player, width)) as temporary:
                save_tensors(weights, temporary, self._about(player, width, "dequantized"))
            done += 1
            progress("quantizing", done, total)
        assert done == total, (done, total)

    def set_player(self, player: int, bits: Width) -> None:
        """Give the model a player's weights at a width; pointers move, nothing is copied."""
        weights = self.weights(player, bits)
        for linear in self.players[player].linears:
            self._parameters[linear.name].data = weights[linear.name]

    def weights(self, player: int, bits: Width) -> dict[str, Tensor]:
        """Dequantized weights of a player at a width, by name; at `UNTOUCHED` the model's own weights.

        Weights at other widths must have been built.
        """
        if bits == UNTOUCHED:
            return {linear.name: self._originals[linear.name] for linear in self.players[player].linears}
        if (player, bits) in self._weights:
            return self._weights[player, bits]
        device = str(self._originals[self.players[player].linears[0].name].device)
        about = self._about(player, bits, "dequantized")
        weights = load_tensors(self._path(player, bits), device, way_out=_WAY_OUT, about=about)
        if self.resident:
            self._weights[player, bits] = weights
        return weights

    def packed(self, bits: Mapping[str, Width]) -> Iterator[tuple[str, Packed]]:
        """Name and packed tensors of linear layers, in host memory; they must have been built.

        Args:
            bits: Width of each linear layer by name; all layers of a player have the same width.
        """
        for player, linears in enumerate(player.linears for player in self.players):
            if linears[0].name in bits:
                width = bits[linears[0].name]
                about = self._about(player, width, "packed")
                tensors = load_tensors(self._packed_path(player, width), way_out=_WAY_OUT, about=about)
                for linear in linears:
                    prefix = f"{linear.name}."
                    own = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
                    yield linear.name, {key.removeprefix(prefix): tensor for key, tensor in own.items()}

    @property
    def model(self) -> Any:
        """The model whose weights these are."""
        return self._loaded.model

    def parameters(self, player: int) -> dict[str, nn.Parameter]:
        """The model's parameters that hold a player's weights, by name."""
        return {linear.name: self._parameters[linear.name] for linear in self.players[player].linears}

    @contextmanager
    def watching(self, players: Sequence[int]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """A dictionary that gets the input and output of each linear layer of players, by name, in a forward pass.

        Experts that share one tensor have no outputs of their own, and are left out.
        """
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(name: str) -> Callable[[Any, Any, Tensor], None]:
            return lambda _, inputs, output: seen.update({name: (inputs[0].detach(), output)})

        linears = [linear for player in players for linear in self.players[player].linears]
        names = [linear.name for linear in linears if not linear.n_experts]
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

    def _missing(
        self, widths: Sequence[Width], player_widths: Sequence[Sequence[Width]] | None
    ) -> dict[Width, list[int]]:
        """Players to quantize at each width."""
        missing: dict[Width, list[int]] = {}
        for width in widths:
            if width == UNTOUCHED:
                continue
            players = [p for p in range(len(self.players)) if player_widths is None or width in player_widths[p]]
            lacking = [player for player in players if not self._is_there(player, width)]
            # Layers that depend on each other are quantized together.
            missing[width] = players if lacking and self._backend.whole_model else lacking
        return missing

    def _needed_bytes(self, missing: Mapping[Width, Sequence[int]]) -> int:
        """Bytes on disk of players at widths."""
        itemsize = next(iter(self._originals.values())).dtype.itemsize
        return sum(
            linear.n_weights * itemsize
            + (0 if self._backend.whole_model else self._backend.storage_bytes(linear.shape, width))
            for width, players in missing.items()
            for player in players
            for linear in self.players[player].linears
        )

    def _quantize(
        self, players: Mapping[Width, Sequence[int]], tokens: npt.NDArray[np.int64] | None
    ) -> Iterator[tuple[int, Width, dict[str, Tensor], dict[str, Tensor]]]:
        """Quantize players at widths.

        Yields:
            Player, width, packed tensors and dequantized weights by name, as soon as all layers of a player are there.
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
        for name in place:
            if not torch.isfinite(self._originals[name]).all():
                raise ModelError(f"weight {name} holds values that are not finite; the checkpoint is damaged")
        made: dict[tuple[int, Width], tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        for width, name, tensors in self._backend.quantize_widths(
            self._loaded.model, self._loaded.tokenizer, layers, tokens
        ):
            (player, shape), dtype = place[name], self._originals[name].dtype
            packed, weights = made.setdefault((player, width), ({}, {}))
            packed.update({f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()})
            rows = self._backend.dequantize(tensors, shape, width, dtype)
            if not torch.isfinite(rows).all():
                raise ModelError(
                    f"backend {self._backend.name!r} makes values of {name} at {width:g} bits that are not finite: the "
                    "weight is too large for 16-bit scales; choose another backend"
                )
            weights[name] = self.matrices[name].stored(rows)
            if len(weights) == len(self.players[player].linears):
                yield player, width, *made.pop((player, width))
        assert not made, list(made)

    def _is_there(self, player: int, bits: Width) -> bool:
        """Whether the folder has a player at a width, dequantized and packed."""
        return self._path(player, bits).exists() and (
            self._backend.whole_model or self._packed_path(player, bits).exists()
        )

    def _about(self, player: int, bits: Width, form: str) -> dict[str, str]:
        """What a file of the bank says that it holds."""
        return {"player": self.players[player].name, "bits": f"{bits:g}", "form": form}

    def _packed_path(self, player: int, bits: Width) -> Path:
        return self._folder / f"player{player:03d}-{bits:g}bit-packed.safetensors"

    def _path(self, player: int, bits: Width) -> Path:
        return self._folder / f"player{player:03d}-{bits:g}bit.safetensors"

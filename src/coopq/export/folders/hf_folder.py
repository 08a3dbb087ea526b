"""What the forms that transformers loads have in common: the folder of a saved model with other tensors."""

import shutil
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoConfig

from coopq.core.errors import ExportError, ModelError
from coopq.core.files import atomic_folder, read_json, require_new_folder, write_json
from coopq.core.sizes import Sizes
from coopq.core.specs import Request
from coopq.core.types import UNTOUCHED, Losses, Player, ProgressCallback, Width
from coopq.export.base_model import BaseModel
from coopq.export.checkpoint import SavedModel, load
from coopq.export.folders.folder_files import write_model_card
from coopq.export.folders.stored_tensors import stored_tensors
from coopq.export.formats import Form
from coopq.export.verification import probe_tokens, require_equal, token_losses
from coopq.model.load import checkpoint_dtype, load_skeleton
from coopq.model.matrices import matrix_of
from coopq.model.safetensors_io import require_finite, save_tensors, saved_size
from coopq.model.sources.classes import model_class
from coopq.plan.plan import Plan
from coopq.quantizers.backend import Backend, Packed
from coopq.quantizers.gptq.format import GPTQFormat

_WEIGHTS = "model.safetensors"
_NOT_COPIED = ("plan.json", "quantize_config.json", "quantized.safetensors", _WEIGHTS)
_OFFSET_DIGITS = 4
"""Digits that the two offsets of a tensor may have more in the file's header where players stay untouched: two each."""


class HFFolder(Form):
    """A form made from GPTQ's tensors, symmetric and in order; see `coopq.export.formats.Form`."""

    name: ClassVar[str]
    """The form's name in `coopq.export.formats.FORMS`, and the method's name in config.json."""

    computes_in: ClassVar[torch.dtype | None] = None
    """The dtype that transformers computes in; None for that of the model."""

    @abstractmethod
    def layout(self, shape: tuple[int, int], bits: int, group_size: int) -> dict[str, Tensor]:
        """Tensors of a module of shape (out, in), without storage; shapes and dtypes are those that `pack` gives."""

    @abstractmethod
    def pack(self, packed: Packed, bits: Width, tensor_format: GPTQFormat) -> dict[str, Tensor]:
        """Tensors of a module from GPTQ's tensors."""

    @abstractmethod
    def quantization_config(self, plan: Plan, tensor_format: GPTQFormat) -> dict[str, Any]:
        """What config.json says about the quantized modules."""

    def check_widths(self, widths: Mapping[str, Width]) -> None:
        """Check that engines take these widths together.

        Args:
            widths: Width of each module by name; before widths are chosen, the index of the player instead.
        Raises:
            ExportError: If not.
        """

    def check(self, backend: Backend) -> None:
        """See `Form.check`."""
        self._tensor_format(backend)

    def player_sizes(
        self, packed: Sizes, request: Request, skeleton: Any, players: Sequence[Player], backend: Backend
    ) -> Sizes:
        """See `Form.player_sizes`; `fixed` is right to a few bytes of the header, and never too small."""
        group_size, widths = self._tensor_format(backend).group_size, request.widths
        linears = [linear for player in players for linear in player.linears]
        self.check_widths({linear.name: index for index, player in enumerate(players) for linear in player.linears})
        for linear in linears:
            check_columns(linear.name, linear.shape[1], group_size, self.name)
        widest = widths.quantized[-1]
        all_at_widest = {linear.name: widest for linear in linears}
        expected = self._expected(skeleton, checkpoint_dtype(request.model.source), all_at_widest, group_size)
        fixed = saved_size(expected) + _OFFSET_DIGITS * len(expected)
        for linear in linears:
            n_bytes = {bits: _n_bytes(self.layout(linear.shape, int(bits), group_size)) for bits in widths.quantized}
            beyond_packed = [n_bytes[bits] - backend.storage_bytes(linear.shape, bits) for bits in widths.quantized]
            if UNTOUCHED in widths.bits:
                beyond_packed.append(0)
            fixed += max(beyond_packed) - n_bytes[widest]
        return replace(packed, fixed=fixed)

    def file_bytes(self, plan: Plan, backend: Backend, base: BaseModel) -> int:
        """See `Form.file_bytes`; the model's configuration is enough."""
        group_size, dtype = self._tensor_format(backend).group_size, checkpoint_dtype(base.source)
        return saved_size(self._expected(load_skeleton(base.source), dtype, plan.modules, group_size))

    def write(self, saved: SavedModel, out: Path, base: BaseModel, progress: ProgressCallback) -> int:
        """See `Form.write`; the saved model is enough.

        Raises:
            OutputError: If `out` is not empty.
            ModelError: If a tensor is not finite.
        """
        plan, tensor_format = saved.plan, self._tensor_format(saved.backend)
        if not plan.quantized:
            raise ExportError(f"{saved.folder} has no quantized weights; engines load the model as it is")
        require_new_folder(out)
        self.check_widths(plan.modules)
        packed, tensors = saved.read()
        for done, (name, bits) in enumerate(plan.quantized.items()):
            progress("packing", done, len(plan.quantized))
            parts = packed.pop(name)
            check_columns(name, parts["g_idx"].numel(), tensor_format.group_size, self.name)
            tensors |= {f"{name}.{part}": tensor for part, tensor in self.pack(parts, bits, tensor_format).items()}
        progress("packing", len(plan.quantized), len(plan.quantized))
        quantization = {"quant_method": self.name, **self.quantization_config(plan, tensor_format)}
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(out) as folder:
            for file in saved.folder.iterdir():
                if file.is_dir():
                    shutil.copytree(file, folder / file.name)
                elif file.name not in _NOT_COPIED:
                    shutil.copy(file, folder)
            config = read_json(saved.folder / "config.json")
            write_json(folder / "config.json", config | {"quantization_config": quantization})
            require_finite(tensors.items(), f"the model in the form {self.name}", "quantize with another --backend")
            save_tensors(tensors, folder / _WEIGHTS)
            n_bytes = (folder / _WEIGHTS).stat().st_size
            write_model_card(plan, folder, "transformers", n_bytes)
            self._check_written(saved, folder, progress)
        return n_bytes

    def is_loadable(self) -> bool:
        """Whether transformers can load the form here, so that what was written is tried."""
        return True

    def losses_by_transformers(self, folder: Path, tokens: npt.NDArray[np.int64], dtype: torch.dtype) -> Losses:
        """Losses of a folder of this form as `token_losses` has them, by transformers.

        Args:
            folder: The folder.
            tokens: Shape (1, length).
            dtype: What to compute in.
        """
        theirs = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=dtype).eval()
        return token_losses(theirs, tokens, "the exported model")

    def _check_written(self, saved: SavedModel, folder: Path, progress: ProgressCallback) -> None:
        """Check that transformers computes the saved model's loss from the folder, if it can load the form here.

        Raises:
            ExportError: If it cannot compute, or computes another loss.
        """
        if not self.is_loadable():
            return
        progress("checking the exported model", 0, 1)
        ours = load(saved.folder, device="cpu")
        tokens = probe_tokens(ours)
        expected = token_losses(ours, tokens, "the saved model")
        try:
            found = self.losses_by_transformers(folder, tokens, ours.dtype)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError, ModelError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise ExportError(
                f"transformers cannot compute with the exported model ({reason}); export to another form"
            ) from error
        require_equal(found, expected, self.computes_in or ours.dtype, "the exported model", ExportError)
        progress("checking the exported model", 1, 1)

    def _tensor_format(self, backend: Backend) -> GPTQFormat:
        """The tensor format of a backend whose weights the form can hold.

        Raises:
            ExportError: If the form cannot hold the backend's weights.
        """
        found = backend.format
        if not isinstance(found, GPTQFormat) or not found.symmetric or found.act_order:
            raise ExportError(
                f"{self.name} holds symmetric integers in groups along the rows, and not what backend "
                f"{backend.name!r} makes with {backend.settings}; search with --backend gptq --symmetric "
                "--no-act-order, or autoround --symmetric"
            )
        return found

    def _expected(
        self, model: Any, dtype: torch.dtype, widths: Mapping[str, Width], group_size: int
    ) -> dict[str, Tensor]:
        """All tensors of a folder, without storage.

        Args:
            model: The model without storage.
            dtype: The checkpoint's dtype.
            widths: Width of each of the players' modules by name.
            group_size: Weights along a row that share a scale.
        """
        tensors = dict(stored_tensors(model, widths, dtype))
        for name, bits in widths.items():
            if bits != UNTOUCHED:
                parts = self.layout(matrix_of(model, name).shape, int(bits), group_size)
                tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        return tensors


def check_columns(name: str, columns: int, group_size: int | str, form: str) -> None:
    """Check that rows of a layer are whole groups.

    Args:
        name: The layer.
        columns: Weights in a row.
        group_size: Weights in a group; "auto" is a size that divides the row.
        form: Name of the form, for the message.
    Raises:
        ExportError: If rows are not whole groups.
    """
    if isinstance(group_size, int) and columns % group_size:
        raise ExportError(
            f"rows of {name} hold {columns} weights, no whole groups of {group_size}, as {form} needs; "
            "search with a --group-size that divides them"
        )


def _n_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())

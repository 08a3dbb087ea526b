"""What forms of safetensors have in common: the folder of a saved model with other tensors."""

from abc import abstractmethod
from collections import Counter
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
from coopq.core.files import atomic_folder, read_json, require_new_folder, require_space, write_json
from coopq.core.sizes import Sizes
from coopq.core.specs import Request
from coopq.core.types import UNTOUCHED, Losses, Player, ProgressCallback, Width
from coopq.export.base_model import BaseModel
from coopq.export.checkpoint import SavedModel, load
from coopq.export.folders.folder_files import copy_files_beside_weights, write_model_card
from coopq.export.folders.stored_tensors import skeleton_of, stored_tensors
from coopq.export.formats import Form
from coopq.export.verification import last_line, probe_tokens, require_equal, token_losses
from coopq.model.load import checkpoint_dtype, load_skeleton
from coopq.model.matrices import matrix_of
from coopq.model.safetensors_io import require_finite, save_tensors, saved_size
from coopq.model.sources.classes import model_class
from coopq.plan.plan import Plan
from coopq.quantizers.backend import Backend, Packed
from coopq.quantizers.gptq.format import GPTQFormat

WEIGHTS = "model.safetensors"
"""The file of weights in a folder."""
_OFFSET_DIGITS = 4
"""Digits that the two offsets of a tensor may have more in the file's header where players stay untouched: two each."""


class HFFolder(Form):
    """A form that is a folder like those of transformers; see `coopq.export.formats.Form`."""

    name: ClassVar[str]
    """The form's name in `coopq.export.formats.FORMS`."""
    engine: ClassVar[str] = "transformers"
    """What loads the folder."""

    @abstractmethod
    def layout(self, shape: tuple[int, int], bits: int, backend: Backend, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors of a module, without storage; shapes and dtypes are those that `pack` gives.

        Args:
            shape: Outputs and inputs of the module.
            bits: Width of the module.
            backend: What packed the weight.
            dtype: The checkpoint's dtype.
        """

    @abstractmethod
    def pack(
        self, packed: Packed, shape: tuple[int, int], bits: int, backend: Backend, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Tensors of a module from a backend's packed weight; the other arguments are those of `layout`."""

    @abstractmethod
    def config_entries(
        self, config: Mapping[str, Any], widths: Mapping[str, Width], backend: Backend
    ) -> Mapping[str, Any]:
        """Entries of config.json that the form adds or changes.

        Args:
            config: The saved model's configuration.
            widths: Width of each of the players' modules by name.
            backend: What packed the weights.
        """

    def check_layers(self, model: Any, widths: Mapping[str, Width]) -> None:
        """Check that the engine takes these layers at these widths.

        Args:
            model: The model without storage.
            widths: Width of each module by name; before widths are chosen, the index of the player instead.
        Raises:
            ExportError: If not.
        """

    def player_sizes(
        self, packed: Sizes, request: Request, skeleton: Any, players: Sequence[Player], backend: Backend
    ) -> Sizes:
        """See `Form.player_sizes`; `fixed` is right to a few bytes of the header, and never too small."""
        dtype, widths = checkpoint_dtype(request.model.source), request.widths
        linears = [linear for player in players for linear in player.linears]
        self.check_layers(
            skeleton, {linear.name: index for index, player in enumerate(players) for linear in player.linears}
        )
        for linear in linears:
            check_columns(linear.name, linear.shape[1], backend.settings["group_size"], self.name)
        widest = widths.quantized[-1]
        expected = self.expected(skeleton, dtype, {linear.name: widest for linear in linears}, backend)
        fixed = saved_size(expected) + _OFFSET_DIGITS * len(expected)
        for linear in linears:
            n_bytes = {
                bits: _n_bytes(self.layout(linear.shape, int(bits), backend, dtype)) for bits in widths.quantized
            }
            beyond_packed = [n_bytes[bits] - backend.storage_bytes(linear.shape, bits) for bits in widths.quantized]
            if UNTOUCHED in widths.bits:
                beyond_packed.append(0)
            fixed += max(beyond_packed) - n_bytes[widest]
        return replace(packed, fixed=fixed)

    def file_bytes(self, plan: Plan, backend: Backend, base: BaseModel) -> int:
        """See `Form.file_bytes`; the model's configuration is enough."""
        dtype = checkpoint_dtype(base.source)
        return saved_size(self.expected(load_skeleton(base.source), dtype, plan.modules, backend))

    def write(self, saved: SavedModel, out: Path, base: BaseModel, progress: ProgressCallback) -> int:
        """See `Form.write`; the saved model is enough.

        Raises:
            OutputError: If `out` is not empty.
            ModelError: If a tensor is not finite.
        """
        plan, backend, dtype = saved.plan, saved.backend, saved.config.dtype
        if not plan.quantized:
            raise ExportError(f"{saved.folder} has no quantized weights; engines load the model as it is")
        require_new_folder(out)
        skeleton = skeleton_of(saved.config, dtype)
        self.check_layers(skeleton, plan.modules)
        require_space(out.parent, saved_size(self.expected(skeleton, dtype, plan.modules, backend)), str(out))
        packed, tensors = saved.read()
        for done, (name, bits) in enumerate(plan.quantized.items()):
            progress("packing", done, len(plan.quantized))
            shape = matrix_of(skeleton, name).shape
            check_columns(name, shape[1], backend.settings["group_size"], self.name)
            parts = self.pack(packed.pop(name), shape, int(bits), backend, dtype)
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        progress("packing", len(plan.quantized), len(plan.quantized))
        with atomic_folder(out) as folder:
            copy_files_beside_weights(saved.folder, folder)
            config = read_json(saved.folder / "config.json")
            write_json(folder / "config.json", {**config, **self.config_entries(config, plan.modules, backend)})
            require_finite(tensors.items(), f"the model in the form {self.name}", "quantize with another --backend")
            save_tensors(tensors, folder / WEIGHTS)
            n_bytes = (folder / WEIGHTS).stat().st_size
            write_model_card(plan, folder, self.engine, n_bytes, self.name)
            self._check_written(saved, folder, progress)
        return n_bytes

    def is_loadable(self) -> bool:
        """Whether the engine can load the form here, so that what was written is tried."""
        return True

    def rounds_to(self, measured: torch.dtype, checkpoint: torch.dtype) -> torch.dtype:
        """The dtype that sets how close the engine's losses are to ours.

        Args:
            measured: What we compute in.
            checkpoint: The checkpoint's dtype.
        """
        return measured

    def losses(self, folder: Path, tokens: npt.NDArray[np.int64], dtype: torch.dtype) -> Losses:
        """Losses of a folder of this form as `token_losses` has them, by the engine.

        Args:
            folder: The folder.
            tokens: Shape (1, length).
            dtype: What to compute in, if the engine leaves a choice.
        """
        theirs = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=dtype).eval()
        return token_losses(theirs, tokens, "the exported model")

    def expected(
        self, model: Any, dtype: torch.dtype, widths: Mapping[str, Width], backend: Backend
    ) -> dict[str, Tensor]:
        """All tensors of a folder, without storage.

        Args:
            model: The model without storage.
            dtype: The checkpoint's dtype.
            widths: Width of each of the players' modules by name.
            backend: What packs the weights.
        """
        tensors = dict(stored_tensors(model, widths, dtype))
        for name, bits in widths.items():
            if bits != UNTOUCHED:
                parts = self.layout(matrix_of(model, name).shape, int(bits), backend, dtype)
                tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        return tensors

    def _check_written(self, saved: SavedModel, folder: Path, progress: ProgressCallback) -> None:
        """Check that the engine computes the saved model's loss from the folder, if the engine can load the form here.

        Raises:
            ExportError: If the engine cannot compute, or computes another loss.
        """
        if not self.is_loadable():
            return
        progress("checking the exported model", 0, 1)
        ours = load(saved.folder, device="cpu")
        tokens = probe_tokens(ours)
        expected = token_losses(ours, tokens, "the saved model")
        try:
            found = self.losses(folder, tokens, ours.dtype)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError, ModelError) as error:
            raise ExportError(
                f"{self.engine} cannot compute with the exported model ({last_line(error)}); export to another form"
            ) from error
        require_equal(
            found, expected, self.rounds_to(ours.dtype, saved.config.dtype), "the exported model", ExportError
        )
        progress("checking the exported model", 1, 1)


class GPTQFolder(HFFolder):
    """A form that is made from GPTQ's tensors, symmetric and in order."""

    def check(self, backend: Backend) -> None:
        """See `Form.check`."""
        found = backend.format
        if not isinstance(found, GPTQFormat) or not found.symmetric or found.act_order:
            raise ExportError(
                f"{self.name} holds symmetric integers in groups along the rows, and not what backend "
                f"{backend.name!r} makes with {backend.settings}; search with --backend gptq --symmetric "
                "--no-act-order, or autoround --symmetric"
            )


def commonest_width(widths: Mapping[str, Width]) -> Width:
    """The width of most of the quantized modules; one module at least is quantized."""
    (common, _), *_ = Counter(bits for bits in widths.values() if bits != UNTOUCHED).most_common()
    return common


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
            f"rows of {name} have {columns} weights, which is not a multiple of the group size {group_size}; {form} "
            f"needs whole groups: search with a --group-size that divides {columns}"
        )


def _n_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())

"""GGUF files for llama.cpp: a full-precision GGUF file of the model, with the plan's types in the players' places.

Everything else (other tensors, tokenizer, settings) is copied from that base, once the base is known to be the model.
So every architecture that llama.cpp's converter writes can be exported.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from coopq.core.errors import ExportError, OutputError, first_names
from coopq.core.files import atomic_file, require_no_input, require_space, require_writable
from coopq.core.sizes import Sizes
from coopq.core.specs import Request
from coopq.core.types import UNTOUCHED, Player, ProgressCallback, Width, silent
from coopq.export.base_model import BaseModel
from coopq.export.checkpoint import SavedModel
from coopq.export.formats import Form
from coopq.export.gguf.base import BaseFile, BaseTensor
from coopq.export.gguf.compare import row_orders
from coopq.export.gguf.converter import converted
from coopq.export.gguf.names import TensorNames, module_tensors, require_complete, require_settings, require_shapes
from coopq.export.gguf.writer import PlannedType, bytes_beside, padded, write_file
from coopq.model.load import LoadedModel, gguf_file
from coopq.model.matrices import matrix_of, sixteen_bit_dtype
from coopq.model.players import without_layers
from coopq.model.sources.gguf import gguf_shards
from coopq.model.sources.gguf_header import is_gguf
from coopq.plan.plan import Plan
from coopq.quantizers.backend import Backend
from coopq.quantizers.ggml.types import GGMLFormat
from coopq.quantizers.packed_modules import PackedWeights

_log = logging.getLogger("coopq")


class GGUF(Form):
    """The form "gguf"; see `coopq.export.formats.Form`."""

    def check(self, backend: Backend) -> None:
        """See `Form.check`."""
        _tensor_format(backend)

    def held_players(self, request: Request, players: Sequence[Player], progress: ProgressCallback) -> Sequence[Player]:
        """See `Form.held_players`: layers that llama.cpp stores in parts of another form stay as in the base."""
        names = TensorNames(open_base(BaseModel.find(request), progress))
        kept = {linear.name for player in players for linear in player.linears if names.is_in_another_form(linear.name)}
        if not kept:
            return players
        _log.warning(
            "%d layers stay as in the base, since llama.cpp stores them in another form: %s",
            len(kept), first_names(sorted(kept)),
        )  # fmt: skip
        return without_layers(players, kept)

    def check_model(self, request: Request, model: Any, players: Sequence[Player], progress: ProgressCallback) -> None:
        """See `Form.check_model`: every tensor of the base is compared."""
        modules = [linear.name for player in players for linear in player.linears]
        base = open_base(BaseModel.find(request))
        _describe(base, model, players)
        row_orders(base, model, modules, progress)

    def player_sizes(
        self, packed: Sizes, request: Request, skeleton: Any, players: Sequence[Player], backend: Backend
    ) -> Sizes:
        """See `Form.player_sizes`; `fixed` holds the most padding that the players' tensors can have.

        Raises:
            ExportError: If the base cannot be read, or has no tensor of its own for a layer.
            Mismatch: If the base is of another model, as far as shapes and settings tell.
        """
        base = open_base(BaseModel.find(request))
        require_shapes(base, [linear for player in players for linear in player.linears])
        require_complete(base, skeleton)
        require_settings(base, skeleton.config)
        player_of = {linear.name: index for index, player in enumerate(players) for linear in player.linears}
        tensors = module_tensors(base, player_of)
        beside = bytes_beside(base, {tensor.name for tensor, _ in tensors})
        sizes = replace(packed, fixed=beside + len(tensors) * (base.alignment - 1))
        if UNTOUCHED not in request.widths.bits:
            return sizes
        untouched = [0] * len(players)
        for tensor, module in tensors:
            untouched[player_of[module]] += _n_bytes(tensor, backend, UNTOUCHED)
        return replace(sizes, n_bytes={**sizes.n_bytes, UNTOUCHED: tuple(untouched)})

    def file_bytes(self, plan: Plan, backend: Backend, base: BaseModel) -> int:
        """See `Form.file_bytes`; the base file and the plan are enough."""
        return _file_bytes(plan, backend, open_base(base))

    def write(self, saved: SavedModel, out: Path, base: BaseModel, progress: ProgressCallback) -> int:
        """See `Form.write`; `out` is a file, and an older file is replaced.

        Raises:
            OutputError: If `out` is a folder or an input, or cannot be written.
        """
        if out.is_dir():
            raise OutputError(f"output {out} is a folder; name a file that ends in .gguf")
        if out.is_file() and not is_gguf(out):
            raise OutputError(f"output {out} exists and is no GGUF file; name another")
        require_writable(out.parent)
        plan, file = saved.plan, open_base(base, progress)
        require_no_input(out, [saved.folder, *gguf_shards(file.path), Path(base.source)])
        size = _file_bytes(plan, saved.backend, file)
        require_space(out.parent, size, str(out))
        loaded = base.load(plan, progress)
        require_complete(file, loaded.model)
        require_settings(file, loaded.model.config)
        orders = row_orders(file, loaded.model, plan.modules, progress)
        tensors = _PlannedTensors(plan, file, saved.backend, loaded, saved.read()[0], orders)
        with atomic_file(out) as temporary:
            write_file(temporary, file, tensors.types, tensors.data(progress))
            written = temporary.stat().st_size
            assert written == size, (written, size)
        return size


class _PlannedTensors:
    """The tensors of a base in the types of a plan.

    Args:
        plan: The plan.
        base: The base.
        backend: What packed the weights.
        loaded: The plan's model in full precision.
        packed: The packed weights by module.
        orders: Which row of a module each row of a tensor is.
    """

    def __init__(
        self,
        plan: Plan,
        base: BaseFile,
        backend: Backend,
        loaded: LoadedModel,
        packed: PackedWeights,
        orders: Mapping[str, npt.NDArray[np.intp]],
    ) -> None:
        self._widths, self._backend = plan.modules, backend
        self._base, self._loaded, self._packed = base, loaded, packed
        self.modules = {tensor.name: module for tensor, module in module_tensors(base, plan.modules)}
        self._orders = orders
        self.types: dict[str, PlannedType] = {}
        for tensor in base.tensors.values():
            self.types[tensor.name] = PlannedType(tensor.tensor_type, tensor.n_bytes)
            module = self.modules.get(tensor.name)
            if module is None or _stays(tensor, self._widths[module]):
                continue
            kind = self._kind(tensor, module)
            self.types[tensor.name] = PlannedType(kind, _n_bytes(tensor, backend, self._widths[module]))

    def data(self, progress: ProgressCallback) -> Iterator[npt.NDArray[np.uint8]]:
        """Bytes of every tensor, in the order of the base.

        Raises:
            ExportError: If a number that would be written is not finite.
        """
        for done, tensor in enumerate(self._base.tensors.values()):
            progress("writing", done, len(self._base.tensors))
            module = self.modules.get(tensor.name)
            if module is None or _stays(tensor, self._widths[module]):
                yield tensor.data
                continue
            content = self._content(tensor)
            if not BaseTensor(tensor.name, tensor.shape, self.types[tensor.name].kind, content).is_finite():
                raise ExportError(
                    f"{tensor.name} would hold numbers that are not finite at {self._widths[module]} bits; give "
                    f"{module} another width"
                )
            yield content
        progress("writing", len(self._base.tensors), len(self._base.tensors))

    def _kind(self, tensor: BaseTensor, module: str) -> Any:
        """The type that a player's tensor is written in."""
        import gguf

        width, rows = self._widths[module], matrix_of(self._loaded.model, module).rows()
        if width == UNTOUCHED and sixteen_bit_dtype(rows, self._loaded.checkpoint_dtype) == torch.bfloat16:
            return gguf.GGMLQuantizationType.BF16
        return _tensor_format(self._backend).tensor_type(tensor.shape[0], width)

    def _content(self, tensor: BaseTensor) -> npt.NDArray[np.uint8]:
        """Bytes of a player's tensor in its type, shape (..., bytes of a row)."""
        module, kind = self.modules[tensor.name], self.types[tensor.name].kind
        if module in self._packed:
            rows = self._packed[module]["blocks"].cpu()
        else:
            dtype = torch.bfloat16 if kind.name == "BF16" else torch.float16
            rows = matrix_of(self._loaded.model, module).rows().to(dtype).contiguous().view(torch.uint8)
        content: npt.NDArray[np.uint8] = rows.numpy()[self._orders[tensor.name]]
        return content.reshape(*tensor.data.shape[:-1], -1)


def _describe(base: BaseFile, model: Any, players: Sequence[Player]) -> None:
    """Say what a user would not expect of the file."""
    if base.is_quantized:
        _log.warning(
            "base %s is quantized itself: its other tensors stay as they are, and the result may be larger than the "
            "base", base.path.name,
        )  # fmt: skip
    if any("language_model." in linear.name for player in players for linear in player.linears):
        _log.warning("%s: the GGUF file holds the text part only", type(model).__name__)


def _file_bytes(plan: Plan, backend: Backend, base: BaseFile) -> int:
    """Bytes of a plan's file."""
    widths = plan.modules
    sizes = {tensor.name: _n_bytes(tensor, backend, widths[module]) for tensor, module in module_tensors(base, widths)}
    return bytes_beside(base, sizes) + sum(padded(size, base.alignment) for size in sizes.values())


def _stays(tensor: BaseTensor, bits: Width) -> bool:
    """Whether a tensor of the base goes into the file as it is: a tensor of 32 bits is rounded to 16."""
    return bits == UNTOUCHED and tensor.tensor_type.name != "F32"


def _n_bytes(tensor: BaseTensor, backend: Backend, bits: Width) -> int:
    """Bytes of a tensor of the base at a width."""
    if _stays(tensor, bits):
        return tensor.n_bytes
    return backend.storage_bytes((tensor.n_rows, tensor.shape[0]), bits)


def _tensor_format(backend: Backend) -> GGMLFormat:
    """The tensor format of a backend of ggml's types.

    Raises:
        ExportError: If the backend makes other weights.
    """
    if not isinstance(backend.format, GGMLFormat):
        raise ExportError(
            f"GGUF files hold ggml's types, not those of backend {backend.name!r}; search with --backend ggml, ggml-iq "
            "or ggml-gptq, or deploy a plan with one of these: coopq apply PLAN --backend ggml --out FOLDER"
        )
    return backend.format


def open_base(base: BaseModel, progress: ProgressCallback = silent) -> BaseFile:
    """The base's GGUF file, made of the model if none is named.

    Raises:
        ExportError: If there is no such file, or the file cannot be made or read.
    """
    file = base.path or gguf_file(base.source) or converted(base.source, progress)
    return BaseFile.open(file)

"""GGUF files for llama.cpp: a full-precision GGUF file of the model, with the plan's types in the players' places.

Everything else (other tensors, tokenizer, settings) is copied from that base. So every architecture that llama.cpp's
converter writes can be exported.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coopq.core.errors import ExportError, Mismatch
from coopq.core.files import atomic_file, require_space
from coopq.core.sizes import Sizes
from coopq.core.specs import Request
from coopq.core.types import UNTOUCHED, Player, ProgressCallback, Width
from coopq.export.base_model import BaseModel
from coopq.export.checkpoint import SavedModel
from coopq.model.load import gguf_file
from coopq.model.players import weight_of
from coopq.plan.plan import Plan
from coopq.quantizers.backend import Backend
from coopq.quantizers.ggml.types import GGMLFormat
from coopq.quantizers.packed_modules import PackedWeights

_ARCHITECTURE_KEY = "general.architecture"
_TYPE_KEY, _VERSION_KEY = "general.file_type", "general.quantization_version"
"""Settings that the writer sets itself; the base's values are not copied."""


class GGUF:
    """The form "gguf"; see `coopq.export.formats.Form`."""

    def check(self, backend: Backend) -> None:
        """See `Form.check`."""
        _tensor_format(backend)

    def player_sizes(
        self, packed: Sizes, request: Request, skeleton: Any, players: Sequence[Player], backend: Backend
    ) -> Sizes:
        """See `Form.player_sizes`; `fixed` holds the most padding that the players' tensors can have."""
        reader = _open_base(BaseModel.find(request))
        player_of = {linear.name: index for index, player in enumerate(players) for linear in player.linears}
        tensors = _module_tensors(reader, player_of)
        beside = _bytes_beside(reader, [tensor.name for tensor, _ in tensors])
        sizes = replace(packed, fixed=beside + len(tensors) * (reader.alignment - 1))
        if UNTOUCHED not in request.widths.bits:
            return sizes
        untouched = [0] * len(players)
        for tensor, module in tensors:
            untouched[player_of[module]] += _n_bytes(tensor, backend, UNTOUCHED)
        return replace(sizes, n_bytes={**sizes.n_bytes, UNTOUCHED: tuple(untouched)})

    def file_bytes(self, plan: Plan, backend: Backend, base: BaseModel) -> int:
        """See `Form.file_bytes`; the base file and the plan are enough."""
        return _file_bytes(plan, backend, _open_base(base))

    def write(self, saved: SavedModel, out: Path, base: BaseModel, progress: ProgressCallback) -> int:
        """See `Form.write`; `out` is a file, and an older file is replaced."""
        import gguf

        plan, reader = saved.plan, _open_base(base)
        size = _file_bytes(plan, saved.backend, reader)
        out.parent.mkdir(parents=True, exist_ok=True)
        require_space(out.parent, size, str(out))
        tensors = _PlannedTensors(plan, reader, saved.backend, base.load(plan, progress).model, saved.read()[0])
        with atomic_file(out) as temporary:
            writer = gguf.GGUFWriter(temporary, _text(reader, _ARCHITECTURE_KEY))
            _copy_settings(reader, writer)
            for done, tensor in enumerate(reader.tensors):
                progress("writing", done, len(reader.tensors))
                data, kind = tensors.planned(tensor)
                writer.add_tensor(tensor.name, data, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            written = temporary.stat().st_size
            assert written == size, (written, size)
        progress("writing", len(reader.tensors), len(reader.tensors))
        return size


class _PlannedTensors:
    """The tensors of a base in the types of a plan.

    Args:
        plan: The plan.
        reader: The base.
        backend: What packed the weights.
        model: The plan's model in full precision.
        packed: The packed weights by module.
    """

    def __init__(self, plan: Plan, reader: Any, backend: Backend, model: Any, packed: PackedWeights) -> None:
        self._widths = plan.modules
        self._format = _tensor_format(backend)
        self._model, self._packed = model, packed
        self._modules = {tensor.name: module for tensor, module in _module_tensors(reader, plan.modules)}
        self._n_tensors = Counter(self._modules.values())

    def planned(self, tensor: Any) -> tuple[npt.NDArray[Any], Any]:
        """Data and type of a tensor of the base.

        Raises:
            Mismatch: If the tensor belongs to a player, and has other weights than the model.
        """
        module = self._modules.get(tensor.name)
        if module is None:
            return tensor.data, tensor.tensor_type
        weight = weight_of(self._model, module).data.flatten(0, -2)
        order = _row_order(tensor, weight, module, self._n_tensors[module])
        if _stays(tensor, self._widths[module]):
            return tensor.data, tensor.tensor_type
        kind = self._format.tensor_type(int(tensor.shape[0]), self._widths[module])
        rows = self._packed[module]["blocks"] if module in self._packed else weight.half()
        return rows.cpu().numpy()[order].reshape(*tensor.data.shape[:-1], -1), kind


def _copy_settings(reader: Any, writer: Any) -> None:
    """Give a writer the base's alignment and settings."""
    import gguf

    writer.data_alignment = reader.alignment
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in (_ARCHITECTURE_KEY, _TYPE_KEY, _VERSION_KEY):
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_type)
    writer.add_file_type(gguf.LlamaFileType.GUESSED)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _file_bytes(plan: Plan, backend: Backend, reader: Any) -> int:
    """Bytes of a plan's file."""
    widths = plan.modules
    sizes = {
        tensor.name: _n_bytes(tensor, backend, widths[module]) for tensor, module in _module_tensors(reader, widths)
    }
    return _bytes_beside(reader, sizes) + sum(_padded(size, reader.alignment) for size in sizes.values())


def _stays(tensor: Any, bits: Width) -> bool:
    """Whether a tensor of the base goes into the file as it is: a tensor of 32 bits is rounded to 16."""
    import gguf

    return bits == UNTOUCHED and tensor.tensor_type != gguf.GGMLQuantizationType.F32


def _n_bytes(tensor: Any, backend: Backend, bits: Width) -> int:
    """Bytes of a tensor of the base at a width."""
    if _stays(tensor, bits):
        return int(tensor.n_bytes)
    return backend.storage_bytes((int(np.prod(tensor.shape[1:])), int(tensor.shape[0])), bits)


def _bytes_beside(reader: Any, players: Collection[str]) -> int:
    """Bytes of the head of the file and of all tensors but the players'.

    Args:
        reader: The base.
        players: Names of the players' tensors.
    """
    head = 24  # magic, version, and the numbers of tensors and keys
    for key in (_TYPE_KEY, _VERSION_KEY):
        head += 8 + len(key) + 4 + 4
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in (_TYPE_KEY, _VERSION_KEY):
            head += sum(part.nbytes for part in field.parts)
    head += sum(part.nbytes for tensor in reader.tensors for part in tensor.field.parts)
    copied = (tensor for tensor in reader.tensors if tensor.name not in players)
    return _padded(head, reader.alignment) + sum(_padded(int(tensor.n_bytes), reader.alignment) for tensor in copied)


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


def _open_base(base: BaseModel) -> Any:
    """A reader of the base's GGUF file.

    Raises:
        ExportError: If there is no such file.
    """
    import gguf

    file = base.path or gguf_file(base.source)
    if file is None:
        raise ExportError(
            f"model {base.source!r} is no GGUF file; name a GGUF file of the model in full precision with --base: "
            "llama.cpp's convert_hf_to_gguf.py writes one"
        )
    if not file.is_file():
        raise ExportError(f"there is no file {file}; name a GGUF file of the model in full precision with --base")
    return gguf.GGUFReader(file)


def _text(reader: Any, key: str) -> str:
    return str(reader.fields[key].contents())


def _module_tensors(reader: Any, modules: Iterable[str]) -> list[tuple[Any, str]]:
    """The tensors of modules in a GGUF file, each with the name of its module.

    Experts have one tensor, or two where transformers keeps gates and ups together and llama.cpp does not.

    Raises:
        ExportError: If a module has no tensor of its own.
    """
    import gguf

    architecture = _text(reader, _ARCHITECTURE_KEY)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    n_blocks = int(reader.fields[f"{architecture}.block_count"].contents())
    names = gguf.get_tensor_name_map(kinds[architecture], n_blocks)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    found = []
    for module in modules:
        experts = module.removesuffix(".gate_up_proj") if module.endswith(".experts.gate_up_proj") else None
        for part in (module,) if experts is None else (f"{experts}.gate_proj", f"{experts}.up_proj"):
            name = names.get_name(f"{part}.weight", try_suffixes=(".weight",))
            if name not in tensors:
                raise ExportError(
                    f"{part} has no tensor of its own in the GGUF file ({name or 'no name is known for it'}); models "
                    "that llama.cpp stores in another form cannot be exported"
                )
            found.append((tensors[name], module))
    return found


def _row_order(tensor: Any, weight: Tensor, module: str, n_tensors: int) -> npt.NDArray[np.intp]:
    """Which row of the model's weight each row of the base's tensor is.

    llama.cpp reorders the rows of some projections. Equal rows have equal blocks, so any of several equal rows will do.

    Args:
        tensor: The base's tensor.
        weight: The model's weight, shape (rows, columns).
        module: Name of the module.
        n_tensors: Number of the base's tensors that hold the module, each with as many rows.
    Raises:
        Mismatch: If the base has other rows.
    """
    import gguf

    base_rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type) + np.float32(0)  # no negative zeros
    base_rows = base_rows.reshape(-1, base_rows.shape[-1])
    narrow = {gguf.GGMLQuantizationType.F16: torch.float16, gguf.GGMLQuantizationType.BF16: torch.bfloat16}
    dtype = narrow.get(tensor.tensor_type, torch.float32)
    model_rows = weight.detach().cpu().to(dtype).float().numpy() + np.float32(0)
    if np.array_equal(model_rows, base_rows):
        return np.arange(len(model_rows))
    if model_rows.shape == (n_tensors * len(base_rows), base_rows.shape[1]):
        places = {row.tobytes(): index for index, row in enumerate(model_rows)}
        order = np.array([places.get(row.tobytes(), -1) for row in base_rows])
        if order.min() >= 0:
            return order
    raise Mismatch(
        f"{tensor.name} of the GGUF file is not {module} of the model",
        {"rows": model_rows.shape},
        {"rows": base_rows.shape},
        "name an unquantized GGUF file of the same weights with --base",
    )


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment

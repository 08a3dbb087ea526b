"""OpenVINO models: a full-precision OpenVINO model, with packed integers in the places of the players' weights.

Everything else (cache, tokenizer, other weights) is copied from that base. So every architecture that Optimum exports
can be exported.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from coopq.core.errors import ExportError
from coopq.core.files import atomic_folder, require_new_folder
from coopq.core.sizes import Sizes
from coopq.core.specs import Request
from coopq.core.types import UNTOUCHED, Player, ProgressCallback, Width
from coopq.export.base_model import BaseModel
from coopq.export.checkpoint import SavedModel, load
from coopq.export.folders.hf_folder import check_columns
from coopq.export.formats import Form
from coopq.export.verification import graph_losses, probe_tokens, require_equal, token_losses
from coopq.model.load import load_skeleton
from coopq.model.matrices import matrix_of
from coopq.model.safetensors_io import require_finite
from coopq.plan.plan import Plan
from coopq.quantizers.backend import Affine, Backend

_FORM, _FILE = "openvino", "openvino_model"
_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
"""Types of the base's weights."""
_SHAPE_BYTES = 16
"""Bytes of the constant that gives packed weights their shape: two int64."""


class OpenVINO(Form):
    """The form "openvino"; see `coopq.export.formats.Form`."""

    def check(self, backend: Backend) -> None:
        """See `Form.check`."""
        if not backend.is_affine:
            raise ExportError(
                f"{_FORM} holds integers in groups along the rows, and not what backend {backend.name!r} makes with "
                f"{backend.settings}; search with --backend rtn, hqq, quanto, autoround, or gptq --no-act-order"
            )

    def player_sizes(
        self, packed: Sizes, request: Request, skeleton: Any, players: Sequence[Player], backend: Backend
    ) -> Sizes:
        """See `Form.player_sizes`; `fixed` takes each layer at the width that needs most beyond `packed`."""
        shapes = {linear.name: linear.shape for player in players for linear in player.linears}
        for name, shape in shapes.items():
            check_columns(name, shape[1], backend.settings["group_size"], _FORM)
        folder = _base_folder(BaseModel.find(request))
        itemsizes = _itemsizes(folder)
        fixed = _bytes_beside(folder, itemsizes, shapes)
        for shape in shapes.values():
            beyond_packed = [
                own + sum(size for size, _ in shared) - backend.storage_bytes(shape, bits)
                for bits in request.widths.quantized
                for own, shared in [_constant_bytes(backend, shape, bits)]
            ]
            if UNTOUCHED in request.widths.bits:
                beyond_packed.append((itemsizes[shape] - 2) * shape[0] * shape[1])
            fixed += max(beyond_packed)
        return replace(packed, fixed=fixed)

    def file_bytes(self, plan: Plan, backend: Backend, base: BaseModel) -> int:
        """See `Form.file_bytes`; the base and the plan are enough.

        OpenVINO stores constants with the same bytes once. So zero points in the middle of the range are stored once
        for each of their shapes. Other constants may be equal by chance; the prediction does not count on that.
        """
        folder, skeleton = _base_folder(base), load_skeleton(base.source)
        shapes = {name: matrix_of(skeleton, name).shape for name in plan.quantized}
        constants = [_constant_bytes(backend, shapes[name], bits) for name, bits in plan.quantized.items()]
        shared = {part for constant in constants for part in constant.shared}
        beside = _bytes_beside(folder, _itemsizes(folder), shapes)
        return beside + sum(constant.own for constant in constants) + sum(size for size, _ in shared)

    def write(self, saved: SavedModel, out: Path, base: BaseModel, progress: ProgressCallback) -> int:
        """See `Form.write`; `out` is a folder.

        Raises:
            OutputError: If `out` is not empty.
        """
        plan, backend = saved.plan, saved.backend
        require_new_folder(out)
        source = _base_folder(base)
        library, graph = _library(), _graph(source)
        constants = _find_constants(plan.quantized, base.load(plan, progress).model, source, graph)
        packed, _ = saved.read()
        for done, (name, bits) in enumerate(plan.quantized.items()):
            progress("packing", done, len(plan.quantized))
            rows, columns = map(int, constants[name].shape)
            check_columns(name, columns, backend.settings["group_size"], _FORM)
            weight = backend.affine(packed.pop(name), (rows, columns), bits)
            _replace(constants[name], _packed_node(weight, bits, name))
        progress("packing", len(plan.quantized), len(plan.quantized))
        graph.validate_nodes_and_infer_types()
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(out) as folder:
            for file in source.iterdir():
                if file.is_file() and file.stem != _FILE:
                    shutil.copy(file, folder)
            require_finite(_floats(graph), "the model for OpenVINO", "quantize with another --backend")
            library.save_model(graph, folder / f"{_FILE}.xml", compress_to_fp16=False)
            _check_written(saved, folder / f"{_FILE}.xml", progress)
            return (folder / f"{_FILE}.bin").stat().st_size


class _ConstantBytes(NamedTuple):
    """Bytes of the constants of a weight.

    Attributes:
        own: Bytes of the constants that no other weight has.
        shared: Bytes of each constant that other weights may have too, with the width, which sets the constant's value.
    """

    own: int
    shared: list[tuple[int, Width]]


def _constant_bytes(backend: Backend, shape: tuple[int, int], bits: Width) -> _ConstantBytes:
    """Bytes of the constants of a weight of shape (out, in)."""
    form = backend.affine_form(shape, bits)
    n_groups = shape[0] * shape[1] // form.group_size
    zero_bits = int(bits) if _is_whole(form.zeros, bits) else max(form.zeros.itemsize * 8, 16)
    zeros = _packed_bytes(n_groups, zero_bits)
    own = _packed_bytes(shape[0] * shape[1], int(bits)) + 2 * n_groups
    return _ConstantBytes(own, [(zeros, bits)]) if form.symmetric else _ConstantBytes(own + zeros, [])


def _packed_bytes(n: int, bits: int) -> int:
    """Bytes of n numbers; numbers of three bits come in groups of eight."""
    return -(-n // 8) * 3 if bits == 3 else -(-n * bits // 8)


def _bytes_beside(folder: Path, itemsizes: Mapping[tuple[int, ...], int], shapes: Mapping[str, tuple[int, int]]) -> int:
    """Bytes of a base's weights without those of some modules, and of the constants that give new weights their shapes.

    Args:
        folder: The base.
        itemsizes: As `_itemsizes` gives them.
        shapes: Shape of each module's weight.
    Raises:
        ExportError: If the base has no constant of a module's shape.
    """
    if lacking := next((name for name, shape in shapes.items() if shape not in itemsizes), None):
        raise ExportError(
            f"{folder} has no constant of the shape of {lacking}, {shapes[lacking]}; name a base of this model"
        )
    old = sum(itemsizes[shape] * shape[0] * shape[1] for shape in shapes.values())
    return (folder / f"{_FILE}.bin").stat().st_size - old + _SHAPE_BYTES * len(set(shapes.values()))


def _itemsizes(folder: Path) -> dict[tuple[int, ...], int]:
    """Bytes of a number in the base's constants of each shape."""
    constants = _weights(_graph(folder))
    return {tuple(node.shape): _DTYPES[node.get_element_type().to_string()].itemsize for node in constants}


def _floats(graph: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and values of the constants. Single numbers, and masks, may be infinite on purpose."""
    for node in _weights(graph):
        if 2 <= len(node.shape) <= 3 and (dtype := _DTYPES[node.get_element_type().to_string()]):
            values = node.data.copy().view(f"int{8 * dtype.itemsize}")  # the file's own values cannot be written
            yield node.get_friendly_name(), torch.from_numpy(values).view(dtype)


def _check_written(saved: SavedModel, file: Path, progress: ProgressCallback) -> None:
    """Check that OpenVINO computes the saved model's loss; an ExportError says if not."""
    progress("checking the exported model", 0, 1)
    ours = load(saved.folder, device="cpu")
    expected = token_losses(ours, tokens := probe_tokens(ours), "the saved model")
    require_equal(graph_losses(file, tokens), expected, ours.dtype, "the model for OpenVINO", ExportError)
    progress("checking the exported model", 1, 1)


def _base_folder(base: BaseModel) -> Path:
    """The folder of the base.

    Raises:
        ExportError: If no base is named, or the folder holds no model.
    """
    if base.path is not None and (base.path / f"{_FILE}.xml").is_file():
        return base.path
    lacking = "no base is given" if base.path is None else f"there is no {_FILE}.xml in {base.path}"
    raise ExportError(
        f"{lacking}; name a folder of the model in full precision with --base: optimum-cli export openvino "
        f"--model {base.source} --task text-generation-with-past --weight-format fp16 FOLDER"
    )


def _library() -> Any:
    """The module `openvino`.

    Raises:
        ExportError: If OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise ExportError(
            f"{_FORM} needs the package openvino ({error}); run: pip install 'coopq[openvino]'"
        ) from error
    return openvino


def _graph(folder: Path) -> Any:
    """The base's graph. Its constants are mapped from the base's file."""
    return _library().Core().read_model(folder / f"{_FILE}.xml")


def _weights(graph: Any) -> Iterator[Any]:
    """Constants that may be weights."""
    for node in graph.get_ops():
        if node.get_type_name() == "Constant" and node.get_element_type().to_string() in _DTYPES:
            yield node


def _find_constants(modules: Iterable[str], model: Any, folder: Path, graph: Any) -> dict[str, Any]:
    """The base's constant of each module, found by the values of the model's weights. Names do not matter.

    Args:
        modules: Names of the modules.
        model: The plan's model in full precision.
        folder: The base, for messages.
        graph: The base's graph.
    Raises:
        ExportError: If a module has no constant.
    """
    candidates: dict[tuple[int, ...], list[Any]] = {}
    for node in _weights(graph):
        candidates.setdefault(tuple(node.shape), []).append(node)
    found = {}
    for name in modules:
        weight = matrix_of(model, name).rows()
        same_shape = candidates.get(tuple(weight.shape), [])
        same = next((node for node in same_shape if _holds(node, weight)), None)
        if same is None:
            raise ExportError(
                f"{folder} has no constant with the weights of {name}; models that Optimum stores in another form, or "
                "quantized, cannot be the base"
            )
        found[name] = same
        same_shape.remove(same)
    return found


def _holds(node: Any, weight: Tensor) -> bool:
    """Whether a constant is a weight, in the constant's type."""
    dtype = _DTYPES[node.get_element_type().to_string()]
    # The comparison is of integers, because numpy has no bfloat16.
    kind = torch.int16 if dtype.itemsize == 2 else torch.int32
    values = node.data.view(f"int{8 * kind.itemsize}")
    # The first row tells most weights apart.
    return all(
        np.array_equal(values[rows], weight[rows].to(dtype).view(kind).numpy()) for rows in (slice(1), slice(None))
    )


def _packed_node(weight: Affine, bits: Width, name: str) -> Any:
    """A node that gives a weight in float32, shape (out, in), from packed constants."""
    ops, types = _library().opset13, _library().Type

    def constant(values: Tensor, kind: Any = None) -> Any:
        return ops.constant(values.contiguous().numpy(), dtype=kind)  # numbers in the order of memory

    kind = getattr(types, f"u{bits}")
    as_floats = weight.zeros if weight.zeros.dtype == torch.float32 else weight.zeros.half()
    zeros = constant(weight.zeros, kind) if _is_whole(weight.zeros.dtype, bits) else constant(as_floats)
    codes, scales = constant(weight.codes, kind), constant(weight.scales.half())
    shifted = ops.subtract(ops.convert(codes, "f32"), ops.convert(zeros, "f32"))
    groups = ops.multiply(shifted, ops.convert(scales, "f32"))
    rows = ops.constant([weight.codes.shape[0], weight.codes[0].numel()], dtype=types.i64)
    return ops.reshape(groups, rows, special_zero=False, name=name)


def _is_whole(zeros: torch.dtype, bits: Width) -> bool:
    """Whether zero points are stored as integers.

    Integer zero points of 2 bits have no kernel on CPUs that compute in bfloat16 (seen in OpenVINO 2026.4).
    """
    return zeros == torch.uint8 and bits != 2


def _replace(constant: Any, new: Any) -> None:
    """Let every reader of a constant, or of the constant's conversion to float32, read another node."""
    for reader in list(constant.output(0).get_target_inputs()):
        node = reader.get_node()
        if node.get_type_name() == "Convert":
            for converted in list(node.output(0).get_target_inputs()):
                converted.replace_source_output(new.output(0))
        else:
            reader.replace_source_output(new.output(0))

"""OpenVINO models: a full-precision OpenVINO model, with packed integers in the places of the players' weights.

Everything else (cache, tokenizer, other weights) is copied from that base. So every architecture that Optimum exports
can be exported.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coopq.core.errors import ExportError
from coopq.core.files import atomic_folder, require_new_folder, require_space
from coopq.core.sizes import Sizes
from coopq.core.specs import Request
from coopq.core.types import UNTOUCHED, Player, ProgressCallback, Width
from coopq.export.base_model import BaseModel
from coopq.export.checkpoint import SavedModel, load
from coopq.export.folders.hf_folder import check_columns
from coopq.export.folders.openvino_base import (
    DTYPES,
    FILE,
    FORM,
    base_folder,
    find_constants,
    library,
    read_graph,
    weight_constants,
)
from coopq.export.formats import Form
from coopq.export.verification import graph_losses, last_line, probe_tokens, require_equal, token_losses
from coopq.model.load import load_skeleton
from coopq.model.matrices import matrix_of
from coopq.model.safetensors_io import require_finite
from coopq.plan.plan import Plan
from coopq.quantizers.backend import Affine, Backend

_SHAPE_BYTES = 16
"""Bytes of the constant that gives packed weights their shape: two int64."""


class OpenVINO(Form):
    """The form "openvino"; see `coopq.export.formats.Form`."""

    def check(self, backend: Backend) -> None:
        """See `Form.check`."""
        if not backend.is_affine:
            raise ExportError(
                f"{FORM} holds integers in groups along the rows, and not what backend {backend.name!r} makes with "
                f"{backend.settings}; search with --backend rtn, hqq, quanto, autoround, or gptq --no-act-order"
            )

    def check_model(self, request: Request, model: Any, players: Sequence[Player], progress: ProgressCallback) -> None:
        """See `Form.check_model`: the weight of every player is looked for in the base.

        Raises:
            ExportError: If the base has no such weight.
        """
        folder = base_folder(BaseModel.find(request))
        names = [linear.name for player in players for linear in player.linears]
        find_constants(names, model, folder, read_graph(folder))

    def player_sizes(
        self, packed: Sizes, request: Request, skeleton: Any, players: Sequence[Player], backend: Backend
    ) -> Sizes:
        """See `Form.player_sizes`; `fixed` takes each layer at the width that needs most beyond `packed`."""
        shapes = {linear.name: linear.shape for player in players for linear in player.linears}
        for name, shape in shapes.items():
            check_columns(name, shape[1], backend.settings["group_size"], FORM)
        folder = base_folder(BaseModel.find(request))
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
        folder, skeleton = base_folder(base), load_skeleton(base.source)
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
        source = base_folder(base)
        graph = read_graph(source)
        constants = find_constants(plan.quantized, base.load(plan, progress).model, source, graph)
        require_space(out.parent, self.file_bytes(plan, backend, base), str(out))
        packed, _ = saved.read()
        for done, (name, bits) in enumerate(plan.quantized.items()):
            progress("packing", done, len(plan.quantized))
            rows, columns = map(int, constants[name].shape)
            check_columns(name, columns, backend.settings["group_size"], FORM)
            weight = backend.affine(packed.pop(name), (rows, columns), bits)
            _replace(constants[name], _packed_node(weight, bits, name))
        progress("packing", len(plan.quantized), len(plan.quantized))
        graph.validate_nodes_and_infer_types()
        with atomic_folder(out) as folder:
            for file in source.iterdir():
                if file.is_file() and file.stem != FILE:
                    shutil.copyfile(file, folder / file.name)
            require_finite(_floats(graph), "the model for OpenVINO", "quantize with another --backend")
            try:
                library().save_model(graph, folder / f"{FILE}.xml", compress_to_fp16=False)
            except RuntimeError as error:
                raise ExportError(f"OpenVINO cannot write {out} ({last_line(error)}); choose another folder") from error
            _check_written(saved, folder / f"{FILE}.xml", progress)
            return (folder / f"{FILE}.bin").stat().st_size


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
    return (folder / f"{FILE}.bin").stat().st_size - old + _SHAPE_BYTES * len(set(shapes.values()))


def _itemsizes(folder: Path) -> dict[tuple[int, ...], int]:
    """Bytes of a number in the base's constants of each shape."""
    constants = weight_constants(read_graph(folder))
    return {tuple(node.shape): DTYPES[node.get_element_type().to_string()].itemsize for node in constants}


def _floats(graph: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and values of the constants. Single numbers, and masks, may be infinite on purpose."""
    for node in weight_constants(graph):
        if 2 <= len(node.shape) <= 3 and (dtype := DTYPES[node.get_element_type().to_string()]):
            values = node.data.copy().view(f"int{8 * dtype.itemsize}")  # the file's own values cannot be written
            yield node.get_friendly_name(), torch.from_numpy(values).view(dtype)


def _check_written(saved: SavedModel, file: Path, progress: ProgressCallback) -> None:
    """Check that OpenVINO computes the saved model's loss; an ExportError says if not."""
    progress("checking the exported model", 0, 1)
    ours = load(saved.folder, device="cpu")
    expected = token_losses(ours, tokens := probe_tokens(ours), "the saved model")
    require_equal(graph_losses(file, tokens), expected, ours.dtype, "the model for OpenVINO", ExportError)
    progress("checking the exported model", 1, 1)


def _packed_node(weight: Affine, bits: Width, name: str) -> Any:
    """A node that gives a weight in float32, shape (out, in), from packed constants."""
    ops, types = library().opset13, library().Type

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

"""OpenVINO models: a full-precision one, with packed integers in the places of the players' weights.

Cache, tokenizer and all else come from that base as they are, so that every architecture that Optimum exports can be.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from coopq.quantize import Backend, get_backend
from coopq.quantize.backend import Affine
from coopq.export.checkpoint import read_saved, saved_plan
from coopq.core.errors import ExportError
from coopq.export.hf_folder import check_columns
from coopq.export.base_model import load_source
from coopq.core.files import atomic_folder, require_new_folder
from coopq.model.load import LoadedModel, load_skeleton
from coopq.plan.plan import Plan
from coopq.model.players import weight_of
from coopq.core.config import RunConfig
from coopq.core.types import UNTOUCHED, Player, ProgressCallback, Width, silent

_FORM, _FILE = "openvino", "openvino_model"
_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
"""Types of the base's weights."""


def export_openvino(
    saved: Path, out: Path, *, base: Path | None, model: str | None = None, progress: ProgressCallback = silent
) -> int:
    """Write a saved model as an OpenVINO folder; it appears whole or not at all.

    Args:
        saved: A model saved with a backend of `check_affine`.
        out: A folder that does not exist, or is empty.
        base: Folder of the model in full precision, as Optimum exports it.
        model: Where the plan's model is now; None takes the plan's word.
        progress: Told of every module.
    Returns:
        Bytes of the weights' file, which are those that `predicted_bytes` foretells.
    Raises:
        ExportError: If the form cannot hold the model, OpenVINO is missing, or there is no base.
        Mismatch: If the base is not the plan's model.
    """
    plan = saved_plan(saved)
    backend = check_affine(get_backend(**plan.quantizer))
    require_new_folder(out)
    base = _base(base, RunConfig.from_json(plan.config))
    library, graph = _library(), _graph(base)
    constants = _constants_of(plan.quantized, load_source(plan, model, progress), base, graph)
    packed, _ = read_saved(saved)
    for done, (name, bits) in enumerate(plan.quantized.items()):
        progress("packing", done, len(plan.quantized))
        rows, columns = map(int, constants[name].shape)
        check_columns(name, columns, backend.settings["group_size"], _FORM)
        _replace(constants[name], _packed(backend.affine(packed.pop(name), (rows, columns), bits), bits, name))
    progress("packing", len(plan.quantized), len(plan.quantized))
    graph.validate_nodes_and_infer_types()
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as folder:
        for file in base.iterdir():
            if file.is_file() and file.stem != _FILE:
                shutil.copy(file, folder)
        library.save_model(graph, folder / f"{_FILE}.xml", compress_to_fp16=False)
        return (folder / f"{_FILE}.bin").stat().st_size


def check_affine(backend: Backend) -> Backend:
    """Check that what a backend makes can be written.

    Raises:
        ExportError: If not.
    """
    if not backend.is_affine:
        raise ExportError(
            f"{_FORM} holds integers in groups along the rows, and not what backend {backend.name!r} makes with "
            f"{backend.settings}; search with --backend rtn, hqq, quanto, autoround, or gptq --no-act-order"
        )
    return backend


def predicted_bytes(plan: Plan, *, base: Path | None = None, model: str | None = None) -> int:
    """Bytes of the weights' file that a plan will be exported to, from the base and the plan alone.

    The library stores constants once that have the same bytes. So zero points in the middle are stored once for each of
    their shapes; that others should agree is a chance that is not counted on.

    Args and errors: as for `export_openvino`.
    """
    config, backend = RunConfig.from_json(plan.config), check_affine(get_backend(**plan.quantizer))
    base = _base(base, config)
    skeleton = load_skeleton(model or config.model)
    shapes = {name: _shape(weight_of(skeleton, name)) for name in plan.quantized}
    parts = {name: _sizes(backend, shapes[name], bits) for name, bits in plan.quantized.items()}
    alike = {size for of in parts.values() for size in of.alike}
    beside = _beside(base, _itemsizes(base), shapes)
    return beside + sum(of.own for of in parts.values()) + sum(size for size, _ in alike)


def fixed_bytes(config: RunConfig, players: Sequence[Player], backend: Backend) -> int:
    """Bytes of that file beside what the backend's tensors of the players take, at most.

    Raises:
        ExportError: If there is no base, or it has no constant of a player's shape.
    """
    base = _base(None, config)
    shapes = {linear.name: linear.shape for player in players for linear in player.linears}
    itemsizes = _itemsizes(base)
    n_bytes = _beside(base, itemsizes, shapes)
    for shape in shapes.values():
        apart = [
            own + sum(size for size, _ in alike) - backend.storage_bytes(shape, bits)
            for bits in config.quantized_widths
            for own, alike in [_sizes(backend, shape, bits)]
        ]
        if UNTOUCHED in config.widths:
            apart.append((itemsizes[shape] - 2) * shape[0] * shape[1])
        n_bytes += max(apart)
    return n_bytes


class _Sizes(NamedTuple):
    """Bytes of a weight's constants: of those that are its own, and of each that others may have too."""

    own: int
    alike: list[tuple[int, Width]]  # with the bits of the weight, which tell their bytes apart


def _sizes(backend: Backend, shape: tuple[int, int], bits: Width) -> _Sizes:
    form = backend.affine_form(shape, bits)
    n_groups = shape[0] * shape[1] // form.group_size
    of_zero = int(bits) if _is_whole(form.zeros, bits) else max(form.zeros.itemsize * 8, 16)
    zeros = _packed_bytes(n_groups, of_zero)
    own = _packed_bytes(shape[0] * shape[1], int(bits)) + 2 * n_groups
    return _Sizes(own, [(zeros, bits)]) if form.symmetric else _Sizes(own + zeros, [])


def _packed_bytes(n: int, bits: int) -> int:
    """Bytes of n numbers: three bits come by eights."""
    return -(-n // 8) * 3 if bits == 3 else -(-n * bits // 8)


def _beside(base: Path, itemsizes: Mapping[tuple[int, ...], int], shapes: Mapping[str, tuple[int, int]]) -> int:
    """Bytes of the base's weights without those of some modules, and of what tells new ones their shapes."""
    if lacking := next((name for name, shape in shapes.items() if shape not in itemsizes), None):
        raise ExportError(f"{base} has no constant of the shape of {lacking}, {shapes[lacking]}; is it of this model?")
    old = sum(itemsizes[shape] * shape[0] * shape[1] for shape in shapes.values())
    return (base / f"{_FILE}.bin").stat().st_size - old + 16 * len(set(shapes.values()))


def _itemsizes(base: Path) -> dict[tuple[int, ...], int]:
    """Bytes of a number in the base's constants of each shape."""
    return {tuple(node.shape): _DTYPES[node.get_element_type().to_string()].itemsize for node in _weights(_graph(base))}


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def _base(base: Path | None, config: RunConfig) -> Path:
    """The folder to start from: what is named, or what the plan's search was told."""
    found = base or (None if config.base is None else Path(config.base))
    if found is None or not (found / f"{_FILE}.xml").is_file():
        lacking = "no base is given" if found is None else f"there is no {_FILE}.xml in {found}"
        raise ExportError(
            f"{lacking}; name a folder of the model in full precision with --base: "
            f"optimum-cli export openvino --model {config.model} --weight-format fp16 FOLDER"
        )
    return found


def _graph(base: Path) -> Any:
    """The base's graph, whose constants are mapped from its file."""
    return _library().Core().read_model(base / f"{_FILE}.xml")


def _weights(graph: Any) -> Iterator[Any]:
    """Constants that may be weights."""
    for node in graph.get_ops():
        if node.get_type_name() == "Constant" and node.get_element_type().to_string() in _DTYPES:
            yield node


def _library() -> Any:
    """OpenVINO."""
    try:
        import openvino
    except ImportError as error:
        raise ExportError(
            f"{_FORM} needs the package openvino ({error}); run: pip install 'coopq[openvino]'"
        ) from error
    return openvino


def _constants_of(modules: Iterable[str], loaded: LoadedModel, base: Path, graph: Any) -> dict[str, Any]:
    """The base's constant of each module: it holds the very weights of the plan's model, whatever its name.

    Raises:
        ExportError: If a module has none.
    """
    of_shape: dict[tuple[int, ...], list[Any]] = {}
    for node in _weights(graph):
        of_shape.setdefault(tuple(node.shape), []).append(node)
    found = {}
    for name in modules:
        weight = weight_of(loaded.model, name).data
        same = [node for node in of_shape.get(tuple(weight.shape), ()) if _holds(node, weight)]
        if not same:
            raise ExportError(
                f"{base} has no constant with the weights of {name}; models that Optimum stores in another form, or "
                "quantized, cannot be the base"
            )
        found[name] = same[0]
        of_shape[tuple(weight.shape)].remove(same[0])
    return found


def _holds(node: Any, weight: Tensor) -> bool:
    """Whether a constant is a weight, in the constant's type."""
    dtype = _DTYPES[node.get_element_type().to_string()]
    # As integers, for numpy has no bfloat16.
    kind = torch.int16 if dtype.itemsize == 2 else torch.int32
    theirs = node.data.view(f"int{8 * kind.itemsize}")
    # The first row tells most apart.
    return all(
        np.array_equal(theirs[rows], weight[rows].to(dtype).view(kind).numpy()) for rows in (slice(1), slice(None))
    )


def _packed(weight: Affine, bits: Width, name: str) -> Any:
    """The nodes of a weight, of which the last gives it in float32, shape (out, in)."""
    ops, types = _library().opset13, _library().Type

    def constant(values: Tensor, kind: Any = None) -> Any:
        # It takes numbers in the order of memory.
        return ops.constant(values.contiguous().numpy(), dtype=kind)

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

    Those of 2 bits have no kernel then on CPUs that compute in bfloat16 (seen in OpenVINO 2026.4).
    """
    return zeros == torch.uint8 and bits != 2


def _replace(constant: Any, by: Any) -> None:
    """Let what reads a constant, or its conversion to float32, read another node."""
    for reader in list(constant.output(0).get_target_inputs()):
        node = reader.get_node()
        if node.get_type_name() == "Convert":
            for of_float in list(node.output(0).get_target_inputs()):
                of_float.replace_source_output(by.output(0))
        else:
            reader.replace_source_output(by.output(0))

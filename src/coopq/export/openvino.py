"""OpenVINO models: a full-precision one, with packed integers in the places of the players' weights.

Cache, tokenizer and all else come from that base as they are, so that every architecture that Optimum exports can be.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coopq.backends import Backend, get_backend
from coopq.backends.base import Affine
from coopq.checkpoint import read_saved, saved_plan
from coopq.errors import ExportError
from coopq.export.folder import check_columns
from coopq.export.source import load_source
from coopq.files import atomic_folder, require_new_folder
from coopq.models import LoadedModel
from coopq.players import weight_of
from coopq.run import RunConfig
from coopq.types import ProgressCallback, silent

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
        Bytes of the weights' file.
    Raises:
        ExportError: If the form cannot hold the model, OpenVINO is missing, or there is no base.
        Mismatch: If the base is not the plan's model.
    """
    plan = saved_plan(saved)
    backend = check_affine(get_backend(**plan.quantizer))
    require_new_folder(out)
    if base is None or not (base / f"{_FILE}.xml").is_file():
        lacking = "no base is given" if base is None else f"there is no {_FILE}.xml in {base}"
        raise ExportError(
            f"{lacking}; name a folder of the model in full precision with --base: "
            f"optimum-cli export openvino --model {RunConfig.from_json(plan.config).model} --weight-format fp16 FOLDER"
        )
    library = _library()
    graph = library.Core().read_model(base / f"{_FILE}.xml")
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
            f"{backend.settings}; search with --backend rtn, hqq, quanto, or gptq --no-act-order"
        )
    return backend


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
    for node in graph.get_ops():
        if node.get_type_name() == "Constant" and node.get_element_type().to_string() in _DTYPES:
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


def _packed(weight: Affine, bits: int, name: str) -> Any:
    """The nodes of a weight, of which the last gives it in float32, shape (out, in)."""
    ops, types = _library().opset13, _library().Type

    def constant(values: Tensor, kind: Any = None) -> Any:
        # It takes numbers in the order of memory.
        return ops.constant(values.contiguous().numpy(), dtype=kind)

    kind = getattr(types, f"u{bits}")
    # Whole zero points of 2 bits have no kernel on CPUs that compute in bfloat16 (seen in OpenVINO 2026.4).
    is_whole = weight.zeros.dtype == torch.uint8 and bits != 2
    as_floats = weight.zeros if weight.zeros.dtype == torch.float32 else weight.zeros.half()
    zeros = constant(weight.zeros, kind) if is_whole else constant(as_floats)
    codes, scales = constant(weight.codes, kind), constant(weight.scales.half())
    shifted = ops.subtract(ops.convert(codes, "f32"), ops.convert(zeros, "f32"))
    groups = ops.multiply(shifted, ops.convert(scales, "f32"))
    rows = ops.constant([weight.codes.shape[0], weight.codes[0].numel()], dtype=types.i64)
    return ops.reshape(groups, rows, special_zero=False, name=name)


def _replace(constant: Any, by: Any) -> None:
    """Let what reads a constant, or its conversion to float32, read another node."""
    for reader in list(constant.output(0).get_target_inputs()):
        node = reader.get_node()
        if node.get_type_name() == "Convert":
            for of_float in list(node.output(0).get_target_inputs()):
                of_float.replace_source_output(by.output(0))
        else:
            reader.replace_source_output(by.output(0))

"""The base of an OpenVINO model: a folder in full precision that users give, found whole and of the plan's model."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coopq.core.errors import ExportError
from coopq.export.base_model import BaseModel
from coopq.export.verification import last_line
from coopq.model.matrices import matrix_of

FORM, FILE = "openvino", "openvino_model"
"""The form's name in `coopq.export.formats.FORMS`, and the stem of the files of a model."""
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
"""Types of the base's weights."""


def base_folder(base: BaseModel) -> Path:
    """The folder of the base.

    Raises:
        ExportError: If no base is named, or the folder holds no model.
    """
    if base.path is not None and (base.path / f"{FILE}.xml").is_file():
        return base.path
    lacking = "no base is given" if base.path is None else f"there is no {FILE}.xml in {base.path}"
    raise ExportError(
        f"{lacking}; name a folder of the model in full precision with --base: optimum-cli export openvino "
        f"--model {base.source} --task text-generation-with-past --weight-format fp16 FOLDER"
    )


def library() -> Any:
    """The module `openvino`.

    Raises:
        ExportError: If OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise ExportError(f"{FORM} needs the package openvino ({error}); run: pip install 'coopq[openvino]'") from error
    return openvino


def read_graph(folder: Path) -> Any:
    """The base's graph. Its constants are mapped from the base's file.

    Raises:
        ExportError: If the files are damaged.
    """
    try:
        return library().Core().read_model(folder / f"{FILE}.xml")
    except RuntimeError as error:
        raise ExportError(
            f"OpenVINO cannot read base {folder} ({last_line(error)}); export the base again with optimum-cli, or name "
            "another with --base"
        ) from error


def weight_constants(graph: Any) -> Iterator[Any]:
    """Constants that may be weights."""
    for node in graph.get_ops():
        if node.get_type_name() == "Constant" and node.get_element_type().to_string() in DTYPES:
            yield node


def find_constants(modules: Iterable[str], model: Any, folder: Path, graph: Any) -> dict[str, Any]:
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
    for node in weight_constants(graph):
        candidates.setdefault(tuple(node.shape), []).append(node)
    found = {}
    for name in modules:
        weight = matrix_of(model, name).rows()
        same_shape = candidates.get(tuple(weight.shape), [])
        same = next((node for node in same_shape if _holds(node, weight)), None)
        if same is None:
            raise ExportError(
                f"{folder} has no constant with the weights of {name}; export the model again by optimum-cli with "
                "--weight-format fp16, or choose another form"
            )
        found[name] = same
        same_shape.remove(same)
    return found


def _holds(node: Any, weight: Tensor) -> bool:
    """Whether a constant is a weight, in the constant's type."""
    dtype = DTYPES[node.get_element_type().to_string()]
    # The comparison is of integers, because numpy has no bfloat16.
    kind = torch.int16 if dtype.itemsize == 2 else torch.int32
    values = node.data.view(f"int{8 * kind.itemsize}")
    # The first row tells most weights apart.
    return all(
        np.array_equal(values[rows], weight[rows].to(dtype).cpu().view(kind).numpy())
        for rows in (slice(1), slice(None))
    )

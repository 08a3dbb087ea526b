"""What the forms that transformers loads have in common: a folder with other tensors and another configuration."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from coopq.backends import Backend, get_backend
from coopq.backends.gptq import GPTQBackend
from coopq.checkpoint import saved_plan
from coopq.errors import ExportError
from coopq.files import atomic_folder, read_json, require_new_folder, write_json
from coopq.plan import Plan
from coopq.tensors import save_tensors

_WEIGHTS = "model.safetensors"
_NOT_COPIED = ("plan.json", "quantize_config.json", _WEIGHTS)


def write_folder(saved: Path, out: Path, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]) -> int:
    """Write a saved model's folder with other tensors; it appears whole or not at all.

    Args:
        saved: The saved model.
        out: A folder that does not exist, or is empty.
        tensors: All tensors, by name.
        quantization: What config.json says of them.
    Returns:
        Bytes of the weights' file.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as folder:
        for file in saved.iterdir():
            if file.is_file() and file.name not in _NOT_COPIED:
                shutil.copy(file, folder)
        write_json(folder / "config.json", read_json(saved / "config.json") | {"quantization_config": quantization})
        save_tensors(tensors, folder / _WEIGHTS)
        return (folder / _WEIGHTS).stat().st_size


def begin(saved: Path, out: Path, form: str) -> tuple[Plan, GPTQBackend]:
    """The plan and the backend of a saved model that is to be written in a form, once both and `out` are checked.

    Raises:
        ExportError: If the form cannot hold what the backend made.
        OutputError: If `out` is there and not empty.
    """
    plan = saved_plan(saved)
    backend = check_backend(get_backend(**plan.quantizer), form)
    if not plan.quantized:
        raise ExportError(f"{saved} has no quantized weights; engines load the model as it is")
    require_new_folder(out)
    return plan, backend


def check_backend(backend: Backend, form: str) -> GPTQBackend:
    """Check that what a backend makes can be written.

    Raises:
        ExportError: If not.
    """
    if not isinstance(backend, GPTQBackend) or not backend.symmetric or backend.act_order:
        raise ExportError(
            f"{form} holds symmetric integers in groups along the rows, and not what backend {backend.name!r} makes "
            f"with {backend.settings}; search with --backend gptq --symmetric --no-act-order"
        )
    return backend


def check_columns(name: str, columns: int, group_size: int | str, form: str) -> None:
    """Check that rows of a layer are whole groups; "auto" are whatever divides them.

    Raises:
        ExportError: If not.
    """
    if isinstance(group_size, int) and columns % group_size:
        raise ExportError(
            f"rows of {name} hold {columns} weights, no whole groups of {group_size}, as {form} wants; "
            "search with a --group-size that divides them"
        )

"""What the forms that transformers loads have in common: a folder with other tensors and another configuration."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from coopq.quantize import Backend, get_backend
from coopq.quantize.gptq.backend import GPTQBackend
from coopq.export.checkpoint import saved_plan
from coopq.core.errors import ExportError
from coopq.core.files import atomic_folder, read_json, require_new_folder, write_json
from coopq.model.load import checkpoint_dtype, load_skeleton
from coopq.plan.plan import Plan
from coopq.model.players import weight_of
from coopq.core.config import RunConfig
from coopq.model.safetensors_io import save_tensors, saved_size
from coopq.core.types import UNTOUCHED, Player, Width

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


Layout: TypeAlias = Callable[[tuple[int, int], int, int], dict[str, Tensor]]
"""Tensors without storage of a module of shape (out, in), of its bits and group size."""


def folder_bytes(plan: Plan, form: str, layout: Layout, *, model: str | None = None) -> int:
    """Bytes of the weights' file that a plan will be exported to, from the plan and the model's configuration alone.

    Args:
        plan: A plan of a backend with GPTQ's tensors.
        form: Its name, for errors.
        layout: Of the form.
        model: Where the plan's model is now; None takes the plan's word.
    Raises:
        ExportError: If the form cannot hold what the backend makes.
    """
    backend = check_backend(get_backend(**plan.quantizer), form)
    source = model or RunConfig.from_json(plan.config).model
    dtype = checkpoint_dtype(source)
    return saved_size(_expected(load_skeleton(source), dtype, plan.modules, backend.group_size, layout))


def fixed_bytes(config: RunConfig, model: Any, players: Sequence[Player], backend: GPTQBackend, layout: Layout) -> int:
    """Bytes of that file beside what the backend's tensors of the players take, at most."""
    linears = [linear for player in players for linear in player.linears]
    widest = config.quantized_widths[-1]
    every = {linear.name: widest for linear in linears}
    expected = _expected(model, checkpoint_dtype(config.model), every, backend.group_size, layout)
    # The header tells where tensors begin and end, in numbers that may have two digits more with 16 bits.
    n_bytes = saved_size(expected) + 4 * len(expected)
    for linear in linears:
        sizes = {
            bits: _bytes_of(layout(linear.shape, int(bits), backend.group_size)) for bits in config.quantized_widths
        }
        apart = [size - backend.storage_bytes(linear.shape, bits) for bits, size in sizes.items()]
        n_bytes += max(apart + [0] * (UNTOUCHED in config.widths)) - sizes[widest]
    return n_bytes


def _bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _expected(
    model: Any, dtype: torch.dtype, widths: Mapping[str, Width], group_size: int, layout: Layout
) -> dict[str, Tensor]:
    """All tensors of a folder, without storage: `layout`'s, and the others as `save_model` keeps them."""
    quantized = {name for name, bits in widths.items() if bits != UNTOUCHED}
    halved = {id(weight_of(model, name)) for name in widths if name not in quantized}
    seen = {id(weight_of(model, name)) for name in quantized}
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept = dtype if tensor.is_floating_point() else tensor.dtype
            kept = torch.float16 if id(tensor) in halved and kept.itemsize > 2 else kept
            tensors[name] = torch.empty(tensor.shape, dtype=kept, device="meta")
    for name in quantized:
        rows, columns = weight_of(model, name).shape
        parts = layout((rows, columns), int(widths[name]), group_size)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return tensors


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
            f"with {backend.settings}; search with --backend gptq --symmetric --no-act-order, or autoround --symmetric"
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

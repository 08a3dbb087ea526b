"""Folders in the form "pack-quantized" of compressed-tensors, which vLLM and transformers load.

Each width is a group of the configuration that names its modules. Only symmetric weights can be written: readers do not
agree on packed zero points.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coopq.backends import Backend, get_backend
from coopq.backends.gptq import GPTQBackend
from coopq.checkpoint import read_saved, saved_plan
from coopq.errors import ExportError
from coopq.files import atomic_folder, read_json, require_new_folder, write_json
from coopq.players import fused_groups
from coopq.tensors import save_tensors
from coopq.types import ProgressCallback, silent

_WEIGHTS = "model.safetensors"
_NOT_COPIED = ("plan.json", "quantize_config.json", _WEIGHTS)


def export_compressed_tensors(saved: Path, out: Path, *, progress: ProgressCallback = silent) -> int:
    """Write a saved model in the form of compressed-tensors; the folder appears whole or not at all.

    Args:
        saved: A model saved with the backend gptq, symmetric and without act-order.
        out: A folder that does not exist, or is empty.
        progress: Told of every module.
    Returns:
        Bytes of the weights' file.
    Raises:
        ExportError: If the form cannot hold the model.
    """
    plan = saved_plan(saved)
    backend = check_backend(get_backend(**plan.quantizer))
    check_fused(plan.modules)
    require_new_folder(out)
    packed, tensors = read_saved(saved)
    for done, (name, bits) in enumerate(plan.modules.items()):
        progress("packing", done, len(plan.modules))
        tensors |= {f"{name}.{key}": tensor for key, tensor in _pack(backend, packed.pop(name), bits, name).items()}
    progress("packing", len(plan.modules), len(plan.modules))
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as folder:
        for file in saved.iterdir():
            if file.is_file() and file.name not in _NOT_COPIED:
                shutil.copy(file, folder)
        config = read_json(saved / "config.json") | {"quantization_config": _configuration(plan.modules, backend)}
        write_json(folder / "config.json", config)
        save_tensors(tensors, folder / _WEIGHTS)
        return (folder / _WEIGHTS).stat().st_size


def check_backend(backend: Backend) -> GPTQBackend:
    """Check that what a backend makes can be written.

    Raises:
        ExportError: If not.
    """
    if not isinstance(backend, GPTQBackend) or not backend.symmetric or backend.act_order:
        raise ExportError(
            f"compressed-tensors holds symmetric integers in groups along the rows, and not what backend "
            f"{backend.name!r} makes with {backend.settings}; search with --backend gptq --symmetric --no-act-order"
        )
    return backend


def check_fused(widths: Mapping[str, int]) -> None:
    """Check that layers which vLLM multiplies as one matrix have one width, or are of one player.

    Raises:
        ExportError: If not.
    """
    for names in fused_groups(widths):
        if len({widths[name] for name in names}) > 1:
            raise ExportError(
                f"{', '.join(names)} need one width, since vLLM multiplies them as one matrix; search with "
                "--granularity fused, or block"
            )


def check_columns(name: str, columns: int, group_size: int) -> None:
    """Check that rows of a layer are whole groups.

    Raises:
        ExportError: If not.
    """
    if columns % group_size:
        raise ExportError(
            f"rows of {name} hold {columns} weights, no whole groups of {group_size}, as compressed-tensors wants; "
            "search with a --group-size that divides them"
        )


def _pack(backend: GPTQBackend, packed: dict[str, Tensor], bits: int, name: str) -> dict[str, Tensor]:
    """One module's tensors."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    rows, columns = packed["qweight"].shape[1], packed["g_idx"].numel()
    check_columns(name, columns, backend.group_size)
    codes, _ = backend.codes(packed, (rows, columns), bits)
    return {
        "weight_packed": pack_to_int32((codes.T - 2 ** (bits - 1)).to(torch.int8), bits),
        "weight_scale": packed["scales"].T.contiguous(),
        "weight_shape": torch.tensor([rows, columns]),
    }


def _configuration(modules: dict[str, int], backend: GPTQBackend) -> dict[str, Any]:
    """What loaders read: the modules of each width, and everything else left as it is."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    groups = {
        f"bits_{width}": QuantizationScheme(
            targets=[name for name, bits in modules.items() if bits == width],
            weights=QuantizationArgs(
                num_bits=width, type="int", symmetric=True, strategy="group", group_size=backend.group_size
            ),
        )
        for width in sorted(set(modules.values()))
    }
    config = QuantizationConfig(
        config_groups=groups, format="pack-quantized", quantization_status="compressed", ignore=["lm_head"]
    )
    written: dict[str, Any] = config.model_dump(mode="json")
    return {"quant_method": "compressed-tensors", **written}

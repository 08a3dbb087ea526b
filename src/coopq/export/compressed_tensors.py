"""Folders in the form "pack-quantized" of compressed-tensors, which vLLM and transformers load.

Each width is a group of the configuration that names its modules. Only symmetric weights can be written: readers do not
agree on packed zero points.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coopq.quantize.gptq.backend import GPTQBackend
from coopq.export.checkpoint import read_saved
from coopq.core.errors import ExportError
from coopq.export.hf_folder import begin, check_columns, write_folder
from coopq.plan.plan import Plan
from coopq.model.players import fused_groups
from coopq.core.types import ProgressCallback, Width, silent

_FORM = "compressed-tensors"


def export_compressed_tensors(saved: Path, out: Path, *, progress: ProgressCallback = silent) -> int:
    """Write a saved model in the form of compressed-tensors; the folder appears whole or not at all.

    Args:
        saved: A model saved with GPTQ's tensors, symmetric and without act-order.
        out: A folder that does not exist, or is empty.
        progress: Told of every module.
    Returns:
        Bytes of the weights' file.
    Raises:
        ExportError: If the form cannot hold the model.
    """
    plan, backend = begin(saved, out, _FORM)
    check_fused(plan.modules)
    packed, tensors = read_saved(saved)
    for done, (name, bits) in enumerate(plan.quantized.items()):
        progress("packing", done, len(plan.quantized))
        tensors |= {f"{name}.{key}": tensor for key, tensor in _pack(backend, packed.pop(name), bits, name).items()}
    progress("packing", len(plan.quantized), len(plan.quantized))
    return write_folder(saved, out, tensors, _configuration(plan, backend))


def check_fused(widths: Mapping[str, Width]) -> None:
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


def layout(shape: tuple[int, int], bits: int, group_size: int) -> dict[str, Tensor]:
    """A module's tensors without storage; their shapes and dtypes are those of `_pack`."""
    rows, columns = shape
    return {
        "weight_packed": torch.empty(rows, -(-columns * bits // 32), dtype=torch.int32, device="meta"),
        "weight_scale": torch.empty(rows, columns // group_size, dtype=torch.float16, device="meta"),
        "weight_shape": torch.empty(2, dtype=torch.int64, device="meta"),
    }


def _pack(backend: GPTQBackend, packed: dict[str, Tensor], bits: Width, name: str) -> dict[str, Tensor]:
    """One module's tensors."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    rows, columns = packed["qweight"].shape[1], packed["g_idx"].numel()
    check_columns(name, columns, backend.group_size, _FORM)
    codes, _ = backend.codes(packed, (rows, columns), bits)
    return {
        "weight_packed": pack_to_int32((codes.T - 2 ** (bits - 1)).to(torch.int8), bits),
        "weight_scale": packed["scales"].T.contiguous(),
        "weight_shape": torch.tensor([rows, columns]),
    }


def _configuration(plan: Plan, backend: GPTQBackend) -> dict[str, Any]:
    """What loaders read: the modules of each width, and everything else left as it is."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    groups = {
        f"bits_{width}": QuantizationScheme(
            targets=[name for name, bits in plan.quantized.items() if bits == width],
            weights=QuantizationArgs(
                num_bits=width, type="int", symmetric=True, strategy="group", group_size=backend.group_size
            ),
        )
        for width in sorted(set(plan.quantized.values()))
    }
    kept = [name for name in plan.modules if name not in plan.quantized]
    config = QuantizationConfig(
        config_groups=groups, format="pack-quantized", quantization_status="compressed", ignore=["lm_head", *kept]
    )
    written: dict[str, Any] = config.model_dump(mode="json")
    return {"quant_method": _FORM, **written}

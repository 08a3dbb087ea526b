"""Folders in AutoRound's form of GPTQ's tensors, which transformers loads with a width for each module.

transformers reads GPTQ's own configuration as if all modules had one width.
"""

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from coopq.export.checkpoint import read_saved
from coopq.export.hf_folder import begin, check_columns, write_folder
from coopq.core.types import ProgressCallback, silent

_FORM = "auto-round"


def export_auto_round(saved: Path, out: Path, *, progress: ProgressCallback = silent) -> int:
    """Write a saved model in AutoRound's form; the folder appears whole or not at all.

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
    packed, tensors = read_saved(saved)
    for done, (name, parts) in enumerate(packed.items()):
        progress("packing", done, len(packed))
        check_columns(name, parts["g_idx"].numel(), backend.group_size, _FORM)
        # Groups are in order, so that their indices, which the form does not know, say nothing.
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items() if part != "g_idx"}
    progress("packing", len(packed), len(packed))
    (common, _), *_ = Counter(plan.quantized.values()).most_common()
    of_module = {"group_size": backend.group_size, "sym": True, "data_type": "int"}
    others = {name: {"bits": bits, **of_module} for name, bits in plan.modules.items() if bits != common}
    form = {"quant_method": _FORM, "packing_format": "auto_round:auto_gptq", "bits": common, **of_module}
    return write_folder(saved, out, tensors, form | {"extra_config": others})


def layout(shape: tuple[int, int], bits: int, group_size: int) -> dict[str, Tensor]:
    """A module's tensors without storage."""
    rows, columns = shape
    groups = columns // group_size
    return {
        "qweight": torch.empty(-(-columns * bits // 32), rows, dtype=torch.int32, device="meta"),
        "qzeros": torch.empty(groups, -(-rows * bits // 32), dtype=torch.int32, device="meta"),
        "scales": torch.empty(groups, rows, dtype=torch.float16, device="meta"),
    }

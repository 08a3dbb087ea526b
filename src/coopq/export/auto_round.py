"""Folders in AutoRound's form of GPTQ's tensors, which transformers loads with a width for each module.

transformers reads GPTQ's own configuration as if all modules had one width.
"""

from collections import Counter
from typing import Any, ClassVar

import torch
from torch import Tensor

from coopq.core.types import Width
from coopq.export.hf_folder import HFFolder
from coopq.plan.plan import Plan
from coopq.quantizers.backend import Packed
from coopq.quantizers.gptq.format import GPTQFormat


class AutoRound(HFFolder):
    """The form "auto-round"."""

    name: ClassVar[str] = "auto-round"

    def layout(self, shape: tuple[int, int], bits: int, group_size: int) -> dict[str, Tensor]:
        """See `HFFolder.layout`."""
        rows, columns = shape
        groups = columns // group_size
        return {
            "qweight": torch.empty(-(-columns * bits // 32), rows, dtype=torch.int32, device="meta"),
            "qzeros": torch.empty(groups, -(-rows * bits // 32), dtype=torch.int32, device="meta"),
            "scales": torch.empty(groups, rows, dtype=torch.float16, device="meta"),
        }

    def pack(self, packed: Packed, bits: Width, tensor_format: GPTQFormat) -> dict[str, Tensor]:
        """See `HFFolder.pack`."""
        # Groups are in order, so their indices say nothing. The form has no indices.
        return {part: tensor for part, tensor in packed.items() if part != "g_idx"}

    def quantization_config(self, plan: Plan, tensor_format: GPTQFormat) -> dict[str, Any]:
        """See `HFFolder.quantization_config`: the most common width, and modules of other widths by name."""
        (common, _), *_ = Counter(plan.quantized.values()).most_common()
        settings = {"group_size": tensor_format.group_size, "sym": True, "data_type": "int"}
        exceptions = {name: {"bits": bits, **settings} for name, bits in plan.modules.items() if bits != common}
        form = {"packing_format": "auto_round:auto_gptq", "bits": common, **settings}
        return {**form, "extra_config": exceptions}

"""Folders in the form "pack-quantized" of compressed-tensors, which vLLM and transformers load.

Each width is a group of the configuration that names the group's modules. Only symmetric weights can be written:
readers of the form do not agree on packed zero points.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from coopq.core.errors import ExportError
from coopq.core.types import UNTOUCHED, Width
from coopq.export.folders.hf_folder import GPTQFolder
from coopq.model.players import fused_groups
from coopq.quantizers.backend import Backend, Packed
from coopq.quantizers.gptq.format import pack_codes


class CompressedTensors(GPTQFolder):
    """The form "compressed-tensors"."""

    name: ClassVar[str] = "compressed-tensors"

    def check(self, backend: Backend) -> None:
        """See `Form.check`; the library describes the form."""
        super().check(backend)
        if importlib.util.find_spec("compressed_tensors") is None:
            raise ExportError(f"{self.name} needs the package compressed-tensors; run: pip install 'coopq[vllm]'")

    def layout(self, shape: tuple[int, int], bits: int, backend: Backend, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `HFFolder.layout`."""
        (rows, columns), group_size = shape, backend.settings["group_size"]
        return {
            "weight_packed": torch.empty(rows, -(-columns * bits // 32), dtype=torch.int32, device="meta"),
            "weight_scale": torch.empty(rows, columns // group_size, dtype=torch.float16, device="meta"),
            "weight_shape": torch.empty(2, dtype=torch.int64, device="meta"),
        }

    def pack(
        self, packed: Packed, shape: tuple[int, int], bits: int, backend: Backend, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """See `HFFolder.pack`."""
        codes = backend.affine(packed, shape, bits).codes.flatten(1)
        return {
            # Both formats store a code plus half the range, and put the first code lowest. They differ in the axis.
            "weight_packed": pack_codes(codes, bits),
            "weight_scale": packed["scales"].T.contiguous(),
            "weight_shape": torch.tensor(shape),
        }

    def config_entries(
        self, config: Mapping[str, Any], widths: Mapping[str, Width], backend: Backend
    ) -> Mapping[str, Any]:
        """See `HFFolder.config_entries`: the modules of each width, and everything else left as it is."""
        from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

        form = {"type": "int", "symmetric": True, "strategy": "group", "group_size": backend.settings["group_size"]}
        groups = {
            f"bits_{width}": QuantizationScheme(
                targets=[name for name, bits in widths.items() if bits == width],
                weights=QuantizationArgs(num_bits=width, **form),
            )
            for width in sorted(set(widths.values()) - {UNTOUCHED})
        }
        untouched = [name for name, bits in widths.items() if bits == UNTOUCHED]
        quantization = QuantizationConfig(
            config_groups=groups,
            format="pack-quantized",
            quantization_status="compressed",
            ignore=["lm_head", *untouched],
        )
        return {"quantization_config": {"quant_method": self.name, **quantization.model_dump(mode="json")}}

    def check_layers(self, model: Any, widths: Mapping[str, Width]) -> None:
        """Check that layers which vLLM multiplies as one matrix have one width; see `HFFolder.check_layers`."""
        for names in fused_groups(widths):
            if len({widths[name] for name in names}) > 1:
                raise ExportError(
                    f"{', '.join(names)} need one width, since vLLM multiplies them as one matrix; search with "
                    "--granularity fused, or block"
                )

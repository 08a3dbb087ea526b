"""Folders in AutoRound's form of GPTQ's tensors, which transformers loads with a width for each module.

transformers reads GPTQ's own configuration as if all modules had one width.
"""

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coopq.core.types import Losses, Width
from coopq.export.folders.hf_folder import GPTQFolder, commonest_width
from coopq.export.folders.library_process import answer_of
from coopq.quantizers.backend import Backend, Packed

_log = logging.getLogger("coopq")


class AutoRound(GPTQFolder):
    """The form "auto-round"."""

    name: ClassVar[str] = "auto-round"

    def layout(self, shape: tuple[int, int], bits: int, backend: Backend, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `HFFolder.layout`."""
        rows, columns = shape
        groups = columns // backend.settings["group_size"]
        return {
            "qweight": torch.empty(-(-columns * bits // 32), rows, dtype=torch.int32, device="meta"),
            "qzeros": torch.empty(groups, -(-rows * bits // 32), dtype=torch.int32, device="meta"),
            "scales": torch.empty(groups, rows, dtype=torch.float16, device="meta"),
        }

    def pack(
        self, packed: Packed, shape: tuple[int, int], bits: int, backend: Backend, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """See `HFFolder.pack`."""
        # Groups are in order, so their indices say nothing. The form has no indices.
        return {part: tensor for part, tensor in packed.items() if part != "g_idx"}

    def config_entries(
        self, config: Mapping[str, Any], widths: Mapping[str, Width], backend: Backend
    ) -> Mapping[str, Any]:
        """See `HFFolder.config_entries`: the most common width, and modules of other widths by name."""
        common = commonest_width(widths)
        settings = {"group_size": backend.settings["group_size"], "sym": True, "data_type": "int"}
        exceptions = {name: {"bits": bits, **settings} for name, bits in widths.items() if bits != common}
        form = {"packing_format": "auto_round:auto_gptq", "bits": common, **settings}
        return {"quantization_config": {"quant_method": self.name, **form, "extra_config": exceptions}}

    def is_loadable(self) -> bool:
        """See `HFFolder.is_loadable`; says so if the library is missing."""
        is_installed = importlib.util.find_spec("auto_round") is not None
        if not is_installed:
            _log.warning("the folder is not tested: auto-round is missing; run: pip install 'coopq[autoround]'")
        return is_installed

    def rounds_to(self, measured: torch.dtype, checkpoint: torch.dtype) -> torch.dtype:
        """See `HFFolder.rounds_to`: the library computes in float16 only."""
        return torch.float16

    def losses(self, folder: Path, tokens: npt.NDArray[np.int64], dtype: torch.dtype) -> Losses:
        """See `HFFolder.losses`; in a process of its own, since the library takes over logging.

        Raises:
            RuntimeError: With the last line of the process, if it fails.
        """
        request = {"folder": str(folder), "tokens": tokens.tolist()}
        return np.array(answer_of("coopq.export.folders.auto_round_process", request))

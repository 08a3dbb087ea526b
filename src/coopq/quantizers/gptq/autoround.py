"""AutoRound (Cheng et al., 2024) by the library auto-round, which runs in a process of its own."""

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from coopq.core.errors import BackendError
from coopq.core.types import UNTOUCHED, Width
from coopq.core.versions import check_version
from coopq.model.players import linear_layers
from coopq.model.safetensors_io import load_tensors
from coopq.quantizers.backend import Packed, require_library
from coopq.quantizers.gptq.backend import GPTQTensors
from coopq.quantizers.gptq.format import PACKING, GPTQFormat, pack_weight
from coopq.quantizers.gptq.subprocess_job import DONE, running_job

_TRIED = "0.16"
"""Version of auto-round whose private parts `coopq.quantizers.gptq.autoround_worker` uses."""
_ITERATIONS = 200
"""Steps of signed gradient descent for each block, the library's default."""
_MULTIPLE = 32
"""The library leaves a layer unquantized if a side of its weight is not a multiple of this."""
_WORKER = "coopq.quantizers.gptq.autoround_worker"


class AutoRoundBackend(GPTQTensors):
    """Signed gradient descent on the rounding of each weight and the range of each group, for the block's output.

    AutoRound takes many times as long as GPTQ, and its loss at 2 bits is far lower. As with `gptq`, a block's weights
    depend on the blocks before it, and a saved mixed model is quantized anew. Do not judge on the tokens that weights
    are fitted to: there the loss at 2 bits is no higher than at 4.

    Args:
        group_size: Weights along a row that share a scale; None is 128.
        symmetric: Zero points in the middle of the range (the library's `sym`).
    """

    name: ClassVar[str] = "autoround"
    whole_model: ClassVar[bool] = True

    def __init__(self, group_size: int | None = None, *, symmetric: bool = True) -> None:
        require_library(self.name, "auto_round", "autoround")
        super().__init__(GPTQFormat.make(group_size, act_order=False, symmetric=symmetric))

    @property
    def version(self) -> str:
        """Version of auto-round."""
        return version("auto-round")

    @property
    def settings(self) -> dict[str, Any]:
        """Group size, symmetry, steps, and the version of the packing."""
        form = self.format
        own = {"group_size": form.group_size, "symmetric": form.symmetric, "iterations": _ITERATIONS}
        return {**own, "packing": PACKING}

    def quantize_model(
        self, model: Any, tokenizer: Any, bits: Mapping[str, Width], tokens: npt.NDArray[np.int64] | None
    ) -> Iterator[tuple[str, Packed]]:
        """See `Backend.quantize_model`.

        Raises:
            BackendError: If the library leaves a layer unquantized, or fails, with the last line that it printed.
        """
        check_version("auto-round", _TRIED, f"backend {self.name!r}")
        names = dict.fromkeys([*(layer.name for layer in linear_layers(model, routers=True)), *bits])
        job = {
            "bits": {name: bits.get(name, UNTOUCHED) for name in names},
            "settings": {"group_size": self.format.group_size, "sym": self.format.symmetric, "iters": _ITERATIONS},
        }
        with running_job("AutoRound", _WORKER, model, tokenizer, tokens, job) as wait_for:
            folder = wait_for(DONE).parent
            for name, width in bits.items():
                file = folder / f"{name}.safetensors"
                if not file.exists():
                    raise BackendError(f"AutoRound left {name} unquantized; choose another backend for this model")
                solved = load_tensors(file, str(model.device), way_out="run the same command again")
                yield name, pack_weight(solved, width)

    def storage_bytes(self, shape: tuple[int, int], bits: Width) -> int:
        """See `Backend.storage_bytes`."""
        if any(size % _MULTIPLE for size in shape):
            raise BackendError(
                f"AutoRound leaves layers of {shape[0]} x {shape[1]} weights unquantized: sides must be multiples of "
                f"{_MULTIPLE}; choose another backend for this model"
            )
        return super().storage_bytes(shape, bits)

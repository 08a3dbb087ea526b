"""AutoRound (Cheng et al., 2024): rounding and ranges learnt block by block, by the library auto-round."""

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from coopq.quantize.backend import Packed
from coopq.quantize.gptq.backend import GPTQBackend, packed_form
from coopq.quantize.gptq.subprocess_job import DONE, working
from coopq.core.errors import BackendError
from coopq.model.players import find_players
from coopq.model.safetensors_io import load_tensors
from coopq.core.types import UNTOUCHED, Width

_ITERATIONS = 200
"""Steps of signed gradient descent for each block, the library's default."""
_MULTIPLE = 32
"""Layers of other shapes are left as they are by the library."""
_WORKER = "coopq.quantize.gptq.autoround_worker"


class AutoRoundBackend(GPTQBackend):
    """Signed gradient descent on how each weight rounds and how far its group reaches, for the block's output.

    It takes many times the time of GPTQ, and loses far less at 2 bits. What it makes has the form of GPTQ's tensors. As
    there, a block's result depends on the blocks before it, and a saved mixed model is quantized anew. On the tokens
    that it learns from, 2 bits lose no more than 4.

    Args:
        group_size: Weights along a row that share a scale.
        symmetric: Zero points in the middle of the range (the library's `sym`).
    """

    name: ClassVar[str] = "autoround"
    package: ClassVar[str] = "auto_round"
    extra: ClassVar[str] = "autoround"

    def __init__(self, group_size: int | None = None, *, symmetric: bool = True) -> None:
        super().__init__(group_size, symmetric=symmetric)

    @property
    def version(self) -> str:
        """Version of auto-round."""
        return version("auto-round")

    @property
    def settings(self) -> dict[str, Any]:
        """Group size, symmetry and steps."""
        return {"group_size": self.group_size, "symmetric": self.symmetric, "iterations": _ITERATIONS}

    def quantize_model(
        self, model: Any, tokenizer: Any, bits: Mapping[str, Width], tokens: npt.NDArray[np.int64] | None
    ) -> Iterator[tuple[str, Packed]]:
        """See `Backend.quantize_model`.

        Raises:
            BackendError: If a layer is left as it is, or the library fails, with its last words.
        """
        every = [linear.name for player in find_players(model) for linear in player.linears]
        widths = {name: bits.get(name, UNTOUCHED) for name in dict.fromkeys([*every, *bits])}
        settings = {"group_size": self.group_size, "sym": self.symmetric, "iters": _ITERATIONS}
        with working("AutoRound", _WORKER, model, tokenizer, tokens, {"bits": widths, "settings": settings}) as made:
            folder = made(DONE).parent
            for name, width in bits.items():
                file = folder / f"{name}.safetensors"
                if not file.exists():
                    raise BackendError(f"AutoRound left {name} unquantized; choose another backend for this model")
                solved = load_tensors(file, model.device.type, way_out="run the same command again")
                yield name, packed_form(solved, width)

    def storage_bytes(self, shape: tuple[int, int], bits: Width) -> int:
        """See `Backend.storage_bytes`."""
        if any(size % _MULTIPLE for size in shape):
            raise BackendError(
                f"AutoRound leaves layers of {shape[0]} x {shape[1]} weights as they are, for it wants multiples of "
                f"{_MULTIPLE}; choose another backend for this model"
            )
        return super().storage_bytes(shape, bits)

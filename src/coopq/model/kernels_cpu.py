"""Linear layers in float32 by oneDNN, where the BLAS that torch calls for them leaves half of the processor idle.

On x86 torch multiplies float32 matrices by MKL, whose AVX-512 kernels are for Intel's processors; on others with
AVX-512 it runs AVX2. oneDNN goes by what a processor can do (benchmarks/layer_forward.py measures both).
"""

from functools import partial

import torch
from torch import Tensor, nn


class ByOneDNN:
    """While it is entered, the float32 linear layers of a model on the CPU compute by oneDNN, without gradients.

    Whether they do depends on the processor alone, so that losses are the same in every run on one machine.

    Args:
        model: A model, or a part of one, that keeps its dtype and its device.
    """

    def __init__(self, model: nn.Module) -> None:
        linears = [m for m in model.modules() if type(m) is nn.Linear and _is_better_at(m)]
        # Into the modules' dictionaries, past torch's own bookkeeping: a block is entered for every layer forward.
        self._forwards = [(vars(linear), partial(_forward, linear)) for linear in linears]

    def __enter__(self) -> None:
        for attributes, forward in self._forwards:
            attributes["forward"] = forward

    def __exit__(self, *_: object) -> None:
        for attributes, _forward in self._forwards:
            del attributes["forward"]


def _is_better_at(linear: nn.Linear) -> bool:
    capable = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return capable and linear.weight.dtype == torch.float32 and linear.weight.device.type == "cpu"


def _forward(linear: nn.Linear, inputs: Tensor) -> Tensor:
    """The operation to which torch itself compiles linear layers; its arguments say that nothing follows it."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, linear.weight, linear.bias, "none", [], "")
    return output

"""Linear layers in float32 by oneDNN, where the BLAS that torch calls for them leaves half of the processor idle.

On x86 torch multiplies float32 matrices by MKL, whose AVX-512 kernels are for Intel's processors; on others with
AVX-512 it runs AVX2. oneDNN goes by what a processor can do (benchmarks/layer_forward.py measures both).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


@contextmanager
def linears_by_onednn(model: nn.Module) -> Iterator[None]:
    """Let the float32 linear layers of a model on the CPU compute by oneDNN; no gradients flow through them then.

    Whether it does depends on the processor alone, so that losses are the same in every run on one machine.
    """
    linears = [m for m in model.modules() if type(m) is nn.Linear and _is_better_at(m)]
    try:
        for linear in linears:
            linear.forward = partial(_forward, linear)  # type: ignore[method-assign]
        yield
    finally:
        for linear in linears:
            del linear.forward


def _is_better_at(linear: nn.Linear) -> bool:
    capable = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return capable and linear.weight.dtype == torch.float32 and linear.weight.device.type == "cpu"


def _forward(linear: nn.Linear, inputs: Tensor) -> Tensor:
    """The operation to which torch itself compiles linear layers; its arguments say that nothing follows it."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, linear.weight, linear.bias, "none", [], "")
    return output

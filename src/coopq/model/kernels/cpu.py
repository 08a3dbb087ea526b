"""Linear layers by oneDNN on CPUs, where the BLAS library that torch calls leaves half of the processor idle.

On x86 torch multiplies float32 matrices by MKL. MKL has AVX-512 kernels for Intel processors only; on other processors
with AVX-512 it runs AVX2 kernels. oneDNN uses what the processor can do: benchmarks/layer_forward.py measures both.
"""

from functools import partial

import torch
from torch import Tensor, nn

from coopq.model.kernels.forward import Forward


def onednn_forwards(model: nn.Module) -> dict[nn.Module, Forward]:
    """Forwards without gradients for the linear layers that oneDNN computes faster, for `override_forward`.

    The processor alone decides, so that losses are the same in every run on one machine.

    Args:
        model: A model or a part of a model on the CPU. Its dtype and its device must not change afterwards.
    Returns:
        The forward of each float32 linear layer; empty on processors without AVX-512.
    """
    return {
        module: partial(_forward, module)
        for module in model.modules()
        if type(module) is nn.Linear and _is_faster_by_onednn(module)
    }


def _is_faster_by_onednn(linear: nn.Linear) -> bool:
    has_avx512 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_avx512 and linear.weight.dtype == torch.float32 and linear.weight.device.type == "cpu"


def _forward(linear: nn.Linear, inputs: Tensor) -> Tensor:
    """The operation to which torch itself compiles linear layers; the last arguments say that nothing is fused."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, linear.weight, linear.bias, "none", [], "")
    return output

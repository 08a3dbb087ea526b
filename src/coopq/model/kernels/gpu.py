"""Kernels that torch compiles for a GPU: the operations between matrix products, fused.

By torch's own operations, a block of an 8B model spends a third of its time on an H100 between matrix products, and the
loss takes longer than its matrix product (benchmarks/gpu.py).
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from coopq.core.errors import one_line
from coopq.model.kernels.forward import Forward

_log = logging.getLogger(__name__)


def is_compilable(model: Any) -> bool:
    """Whether the blocks of a model, none of them offloaded, can be compiled for its GPU.

    Blocks of a model that accelerate divides between GPUs are not compiled: accelerate's hooks move hidden states
    between the GPUs inside the blocks' forwards.
    """
    return model.device.type == "cuda" and not _is_sharded(model) and _has_compiler(model.device)


def compiled_forward(block: Any) -> Forward:
    """The forward of a block without gradients as torch compiles it, for `override_forward`.

    Weights are inputs of the compiled function, so equal blocks share one.
    """
    return torch.compile(block.forward, dynamic=False)


def log_total(logits: Tensor) -> Tensor:
    """Logarithm of the sum of exponentials of each row, shape (n,), in float32."""
    if logits.device.type == "cuda" and _has_compiler(logits.device):
        return _compiled_log_total()(logits)
    # One pass of a softmax takes less time than torch's own logsumexp, which has several.
    logits = logits.float()
    return logits[:, 0] - torch.log_softmax(logits, dim=1)[:, 0]


@cache
def _compiled_log_total() -> Callable[[Tensor], Tensor]:
    """Compiled at the first call: torch's compiler is slow to import, and CPUs do not need it."""
    return torch.compile(lambda logits: torch.logsumexp(logits.float(), dim=1), dynamic=True)


def _is_sharded(model: Any) -> bool:
    """Whether accelerate divides a model between devices."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


@cache
def _has_compiler(device: torch.device) -> bool:
    """Whether torch can compile for a device; Triton or its C compiler may be missing."""
    try:
        torch.compile(lambda x: 2 * x + 1, dynamic=False)(torch.ones(16, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        _log.warning("torch cannot compile for %s, so blocks run uncompiled and slower: %s", device, one_line(error))
        return False
    return True

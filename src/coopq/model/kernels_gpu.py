"""Kernels that torch compiles for a GPU: what comes between matrix products, fused.

By torch's own operations a block of an 8B model spends a third of its time on an H100 there, and the loss more than on
its matrix product (benchmarks/gpu.py).
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)


class Compiled:
    """While it is entered, a block on a GPU computes as torch compiles it, without gradients.

    Weights are inputs of what is compiled, so that blocks which differ in nothing else share it.

    Args:
        block: A block whose forward nothing has replaced.
    """

    def __init__(self, block: Any) -> None:
        self._attributes = vars(block)
        self._forward = torch.compile(block.forward, dynamic=False)

    def __enter__(self) -> None:
        self._attributes["forward"] = self._forward

    def __exit__(self, *_: object) -> None:
        del self._attributes["forward"]


def is_compilable(block: Any, device: torch.device) -> bool:
    """Whether a block computes on a GPU by the forward of its class, and torch can compile there."""
    return device.type == "cuda" and "forward" not in vars(block) and _works_on(device)


def log_total(logits: Tensor) -> Tensor:
    """Logarithm of the sum of exponentials of each row, shape (n,), in float32."""
    if logits.device.type == "cuda" and _works_on(logits.device):
        return _log_total()(logits)
    # One pass of a softmax costs less than a sum that torch composes.
    logits = logits.float()
    return logits[:, 0] - torch.log_softmax(logits, dim=1)[:, 0]


@cache
def _log_total() -> Callable[[Tensor], Tensor]:
    """Compiled when it is first called: torch's compiler is slow to import, and CPUs do without it."""
    return torch.compile(lambda logits: torch.logsumexp(logits.float(), dim=1), dynamic=True)


@cache
def _works_on(device: torch.device) -> bool:
    """Whether torch can compile for a device: Triton may be missing, or its C compiler."""
    try:
        torch.compile(lambda x: 2 * x + 1, dynamic=False)(torch.ones(16, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        _log.warning("torch cannot compile for %s, so blocks run uncompiled and slower: %s", device, reason)
        return False
    return True

"""Offloaded blocks: they stay in the host's memory and visit the accelerator, for models larger than its memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from coopq.model.kernels.forward import Forward
from coopq.model.players import find_blocks


class OffloadedBlocks:
    """Moves a model to a device, all but its blocks. A block is on the device while it is placed or while it computes.

    A block's parameters are copied when the block arrives, and point to the host's memory again when the block leaves.
    Nothing is copied back, so weights must not be changed or exchanged while their block is placed.

    Args:
        model: A causal language model of transformers, in the host's memory.
        device: The device that computes.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._device = device
        self._blocks = list(find_blocks(model)[1])
        self._placed: set[int] = set()
        in_blocks = {id(tensor) for block in self._blocks for tensor in _tensors(block)}
        for tensor in _tensors(model):
            if id(tensor) not in in_blocks:
                tensor.data = tensor.data.to(device)
        for d, block in enumerate(self._blocks):
            block.forward = self._visiting(d, block.forward)  # for good, unlike `override_forward`

    @contextmanager
    def placed(self, d: int) -> Iterator[None]:
        """Let block d be on the device inside the `with` block."""
        if d in self._placed:
            yield
            return
        on_host = [(tensor, tensor.data) for tensor in _tensors(self._blocks[d])]
        try:
            for tensor, data in on_host:
                tensor.data = data.to(self._device)
            self._placed.add(d)
            yield
        finally:
            self._placed.discard(d)
            for tensor, data in on_host:
                tensor.data = data

    def _visiting(self, d: int, forward: Forward) -> Forward:
        """The forward of block d, which places the block while the block computes."""

        def visit(*args: Any, **kwargs: Any) -> Any:
            with self.placed(d):
                return forward(*args, **kwargs)

        return visit


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]

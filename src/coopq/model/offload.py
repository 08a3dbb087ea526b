"""Blocks that stay in the host's memory and visit the accelerator: for models larger than its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from coopq.model.players import find_blocks


class HostedBlocks:
    """Moves a model to a device, all but its blocks; each of those is there while it is placed, or while it computes.

    What a parameter points to when its block arrives is copied, and pointed to again when the block leaves: nothing is
    copied back, so weights must not be changed or exchanged meanwhile.

    Args:
        model: A causal language model of transformers, on the host.
        device: Where it computes.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._device = device
        self._blocks = list(find_blocks(model)[1])
        self._placed: set[int] = set()
        inside = {id(tensor) for block in self._blocks for tensor in _tensors(block)}
        for tensor in _tensors(model):
            if id(tensor) not in inside:
                tensor.data = tensor.data.to(device)
        for d, block in enumerate(self._blocks):
            block.forward = self._visiting(d, block.forward)

    @contextmanager
    def placed(self, d: int) -> Iterator[None]:
        """Let block d be on the device."""
        if d in self._placed:
            yield
            return
        at_home = [(tensor, tensor.data) for tensor in _tensors(self._blocks[d])]
        try:
            for tensor, data in at_home:
                tensor.data = data.to(self._device)
            self._placed.add(d)
            yield
        finally:
            self._placed.discard(d)
            for tensor, data in at_home:
                tensor.data = data

    def _visiting(self, d: int, forward: Any) -> Any:
        def visit(*args: Any, **kwargs: Any) -> Any:
            with self.placed(d):
                return forward(*args, **kwargs)

        return visit


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]

"""Gradients of a model's mean loss, one block or a portion of the head at a time.

Every gradient is of the mean negative log-likelihood over all predicted tokens, in nats per token.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from coopq.game.losses import Reference, portions_divergence
from coopq.model.blockwise import Blockwise, States
from coopq.quantizers.bank import WeightBank


def head_gradients(blockwise: Blockwise, final: States) -> States:
    """Gradients by the states after the last block.

    The head computes a portion of the positions at a time, as sequences of one token.
    """
    n_scored = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in blockwise.batches)
    portion = blockwise.positions_at_once()
    found = []
    for states, tokens in zip(final, blockwise.batches, strict=True):
        scored, targets = states[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        parts = []
        for positions, target in zip(scored.split(portion), targets.split(portion), strict=True):
            with torch.enable_grad():
                leaf = positions.detach().unsqueeze(1).requires_grad_()
                logits = blockwise.head(leaf).float()[:, 0]
                loss = functional.cross_entropy(logits, target.to(logits.device), reduction="sum")
            parts.append(torch.autograd.grad(loss / n_scored, leaf)[0][:, 0])
        gradient = torch.zeros_like(states)
        gradient[:, :-1] = torch.cat(parts).unflatten(0, (len(states), -1))
        found.append(gradient)
    return found


def weight_gradients(
    blockwise: Blockwise, block: int, states: States, upstream: States, weights: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Gradients by weights of one block, by name, each of the weight's shape.

    Args:
        blockwise: The model.
        block: The block.
        states: The states before the block.
        upstream: Gradients by the states after the block. They are replaced by the gradients by the states before it.
        weights: The weights, by name.
    """
    with blockwise.placed(block):
        totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for j, batch in enumerate(states):
            with torch.enable_grad():
                leaf = batch.detach().requires_grad_()
                output = blockwise.call_block(block, j, leaf)
            upstream[j], *gradients = torch.autograd.grad(output, [leaf, *weights.values()], upstream[j])
            for total, gradient in zip(totals.values(), gradients, strict=True):
                total += gradient
    return totals


def output_gradients(
    output: Tensor, leaf: Tensor, upstream: Tensor, seen: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Gradients by the states before a block and by the outputs of linear layers in the block, for one batch.

    Args:
        output: The states after the block, with their graph.
        leaf: The states before the block.
        upstream: The gradient by `output`.
        seen: Inputs and outputs of the linear layers, by name.
    Returns:
        The gradient by `leaf`; and by name of the linear layer its inputs and the gradient by its outputs.
    """
    outputs = [layer_output for _, layer_output in seen.values()]
    downstream, *gradients = torch.autograd.grad(output, [leaf, *outputs], upstream)
    inputs = [layer_inputs for layer_inputs, _ in seen.values()]
    return downstream, dict(zip(seen, zip(inputs, gradients, strict=True), strict=True))


def divergence(blockwise: Blockwise, final: States, moved: States) -> npt.NDArray[np.float64]:
    """KL divergence of the next token at each scored position, nats, shape (n_sequences * (length - 1),).

    Args:
        blockwise: The model.
        final: States after the last block in full precision.
        moved: States after the last block otherwise.
    """
    portion = blockwise.positions_at_once()
    found = []
    for batch in zip(final, moved, strict=True):
        for pair in zip(*(states[:, :-1].flatten(0, 1).split(portion) for states in batch), strict=True):
            full, other = (blockwise.head(positions.unsqueeze(1))[:, 0] for positions in pair)
            found.append(portions_divergence([(0, other)], Reference.from_logits([(0, full)])))
    return torch.cat(found).cpu().numpy()


@contextmanager
def watching(bank: WeightBank, players: Sequence[int]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """A dictionary that gets the input and output of each linear layer of players, by name, in a forward pass.

    Experts that share one tensor have no outputs of their own, and are left out.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[[Any, Any, Tensor], None]:
        return lambda _, inputs, output: seen.update({name: (inputs[0].detach(), output)})

    linears = [linear for player in players for linear in bank.players[player].linears]
    names = [linear.name for linear in linears if not linear.n_experts]
    handles = [bank.model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()

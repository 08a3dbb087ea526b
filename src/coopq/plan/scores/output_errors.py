"""How far quantization moves the outputs of each layer, weighted by gradients, at all widths in one pass.

With y the gradient of the sequence's mean loss by an output, and m how far the output moves, the loss of T tokens rises
by about T/2 (y m)^2, summed over outputs and tokens: a diagonal Fisher approximation, in nats per token.

* An embedding's outputs are the states before the first block.
* Of a head, and of an embedding that is the head too, the divergence itself is computed: that takes no more.
* Experts in one tensor have no outputs of their own. Their error is estimated from the mean squares of their inputs and
  of the gradients by the block's outputs. It is right to a factor that all experts share.

Source: Model Optimizer's auto_quantize, see `coopq.plan.scores.auto_quantize`; the scale is that of `fisher`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from coopq.core.types import UNTOUCHED, LinearLayer, Width
from coopq.game.losses import Reference, portions_divergence
from coopq.game.sensitivity import Sensitivity
from coopq.game.streamed_gradients import head_gradients, output_gradients, watching
from coopq.model.blockwise import States
from coopq.model.matrices import in_float64
from coopq.quantizers.input_statistics import column_importance

Errors = npt.NDArray[np.float64]


def output_errors(sensitivity: Sensitivity, widths: Sequence[Width]) -> Errors:
    """Rise of the loss by quantizing each player alone, shape (n_widths, n_players), nats per token, to one factor."""
    blockwise, bank, players = sensitivity.blockwise, sensitivity.bank, sensitivity.players
    states = sensitivity.all_states()
    final = states.pop()
    n_sequences = sum(len(batch) for batch in blockwise.batches)
    upstream = [gradient * n_sequences for gradient in head_gradients(blockwise, final)]
    errors = np.zeros((len(widths), len(players)))
    experts = _expert_inputs(sensitivity)
    for block in reversed(range(blockwise.n_blocks)):
        sensitivity.block_forwards += 4 + len(widths)
        members = [p for p in sensitivity.members[block] if not players[p].is_end]
        with blockwise.placed(block):
            mean_square = float(torch.cat([gradient.square().mean()[None] for gradient in upstream]).mean())
            for j, batch in enumerate(states.pop()):
                leaf = batch.detach().requires_grad_()
                with torch.enable_grad(), watching(bank, members) as seen:
                    output = blockwise.call_block(block, j, leaf)
                upstream[j], gradients = output_gradients(output, leaf, upstream[j], seen)
                for row, width in enumerate(widths):
                    for player in members:
                        errors[row, player] += _squares(sensitivity, player, width, gradients)
        for row, width in enumerate(widths):
            for player in members:
                errors[row, player] += n_sequences * _of_experts(sensitivity, player, width, experts, mean_square)
    errors *= sensitivity.scored_tokens / 2 / n_sequences
    for player in (index for index, each in enumerate(players) if each.is_end):
        for row, width in enumerate(widths):
            errors[row, player] = _of_end(sensitivity, player, width, final, upstream)
    return errors


def _squares(
    sensitivity: Sensitivity, player: int, width: Width, gradients: Mapping[str, tuple[Tensor, Tensor]]
) -> float:
    """Sum of (y m)^2 over the outputs of a player's linear layers, for one batch."""
    quantized, total = sensitivity.quantized(player, width), 0.0
    for name, weight in sensitivity.weights(player).items():
        if name in gradients:
            inputs, gradient = gradients[name]
            error = sensitivity.bank.matrices[name].rows(quantized[name] - weight).to(inputs.device)
            total += float(in_float64((functional.linear(inputs, error) * gradient).square()).sum())
    return total


def _expert_inputs(sensitivity: Sensitivity) -> dict[str, Tensor]:
    """Mean squares of the inputs of experts in one tensor, by name, shape (n_experts, in); empty without experts."""
    names = [linear.name for player in sensitivity.players for linear in player.linears if linear.n_experts]
    if not names:
        return {}
    sensitivity.block_forwards += sensitivity.blockwise.n_blocks
    tokens = torch.cat(list(sensitivity.blockwise.batches)).cpu().numpy()
    return column_importance(sensitivity.bank.model, names, tokens)


def _of_experts(
    sensitivity: Sensitivity, player: int, width: Width, inputs: Mapping[str, Tensor], mean_square: float
) -> float:
    """What stands for the sum of (y m)^2 of one sequence over the outputs of a player's experts."""
    total = 0.0
    for linear in sensitivity.players[player].linears:
        if linear.name in inputs:
            moved = _moved_by_token(sensitivity, player, width, linear, inputs[linear.name])
            total += sensitivity.scored_tokens * mean_square * moved
    return total


def _moved_by_token(sensitivity: Sensitivity, player: int, width: Width, linear: LinearLayer, inputs: Tensor) -> float:
    """How far the outputs of an expert move on average, squared and summed over outputs."""
    matrix, name = sensitivity.bank.matrices[linear.name], linear.name
    error = matrix.rows(sensitivity.quantized(player, width)[name] - sensitivity.weights(player)[name])
    by_expert = error.unflatten(0, (linear.n_experts, -1)).float().square()
    return float(in_float64(by_expert * inputs.to(by_expert)[:, None]).sum()) / linear.n_experts


@torch.no_grad()
def _of_end(sensitivity: Sensitivity, player: int, width: Width, final: States, upstream: States) -> float:
    """Rise of the loss by quantizing the embedding or the head.

    Args:
        sensitivity: The model.
        player: The embedding or the head.
        width: Its width.
        final: States after the last block.
        upstream: Gradients of each sequence's mean loss by the states before the first block.
    """
    blockwise, bank, total = sensitivity.blockwise, sensitivity.bank, 0.0
    width = sensitivity.width_of(player, width)
    (parameter,) = bank.parameters(player).values()
    embedding, head = bank.model.get_input_embeddings().weight, bank.model.get_output_embeddings().weight
    n_sequences = sum(len(batch) for batch in blockwise.batches)
    try:
        if parameter is embedding:
            bank.set_player(player, width)
            moved = [after - before for after, before in zip(blockwise.embed(), blockwise.embedded, strict=True)]
            squares = [in_float64((m * y).square()).sum() for m, y in zip(moved, upstream, strict=True)]
            total += sensitivity.scored_tokens / 2 / n_sequences * float(torch.stack(squares).sum())
        if parameter is head:
            total += _head_divergence(sensitivity, player, width, final)
    finally:
        bank.set_player(player, UNTOUCHED)
    return total


def _head_divergence(sensitivity: Sensitivity, player: int, width: Width, final: States) -> float:
    """Mean divergence of the next token by quantizing the head alone, nats per token."""
    blockwise, bank, found = sensitivity.blockwise, sensitivity.bank, []
    for states in final:
        for positions in states[:, :-1].flatten(0, 1).split(blockwise.positions_at_once()):
            bank.set_player(player, UNTOUCHED)
            reference = Reference.from_logits([(0, blockwise.head(positions.unsqueeze(1))[:, 0])])
            bank.set_player(player, width)
            found.append(portions_divergence([(0, blockwise.head(positions.unsqueeze(1))[:, 0])], reference))
    return float(torch.cat(found).mean())

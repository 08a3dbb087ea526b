"""Importance matrix: squared errors of weights, each weighted by the mean square of what the weight multiplies.

That is how far quantization moves a layer's outputs, squared and summed over outputs, if inputs are not correlated; a
layer counts by that alone, whatever becomes of its outputs. Source: llama.cpp's pull request 15550, which adds these
errors over tensors to choose types for a target size. There a sample of rows counts, here all rows do. An expert counts
as often as another. Weights without a known importance have 1, for example those of an embedding that is not the head.
"""

from collections.abc import Sequence

import numpy as np
import torch

from coopq.game.sensitivity import Sensitivity
from coopq.model.matrices import in_float64
from coopq.plan.scores import Gains
from coopq.quantizers.input_statistics import column_importance


def gains(sensitivities: Sequence[Sensitivity]) -> Gains:
    """Decrease of the weighted squared error by not taking each step, shape (n_players, n_pairs of widths).

    Args:
        sensitivities: One for each pair of neighbouring widths, the highest first; all are computed in one pass.
    """
    sensitivity = sensitivities[0]
    widths = [sensitivity.high, *(each.low for each in sensitivities)]
    bank, blockwise = sensitivity.bank, sensitivity.blockwise
    names = [linear.name for player in sensitivity.players for linear in player.linears]
    importance = column_importance(bank.model, names, torch.cat(list(blockwise.batches)).cpu().numpy())
    sensitivity.block_forwards += blockwise.n_blocks
    errors = np.zeros((len(widths), len(sensitivity.players)))
    for player in range(len(sensitivity.players)):
        originals = sensitivity.weights(player)
        for row, width in enumerate(widths):
            for name, quantized in sensitivity.quantized(player, width).items():
                squares = bank.matrices[name].rows(quantized - originals[name]).float().square()
                if name in importance:
                    by_expert = importance[name].to(squares).reshape(-1, 1, squares.shape[-1])
                    squares = squares.unflatten(0, (len(by_expert), -1)) * by_expert
                errors[row, player] += float(in_float64(squares).sum())
    difference: Gains = np.diff(errors, axis=0).T
    return difference

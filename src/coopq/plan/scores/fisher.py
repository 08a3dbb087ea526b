"""Empirical Fisher: the loss to second order from per-sequence gradients, for all pairs of players at once.

With u_is = <g_s, Q(W_i) - W_i> for sequence s, the loss changes by mean_s sum_i u_is + T/2 mean_s (sum_i u_is)^2. The
second term is the quadratic form of the empirical Fisher matrix, which stands for the Hessian. A sequence's gradient
g_s is the mean over its T scored tokens; if tokens were independent, T g_s g_s' would estimate the Fisher matrix.

Source: the diagonal is what Fisher-weighted quantization uses, for example Kim et al., SqueezeLLM, 2023 (arXiv
2306.07629); all pairs as in Singh and Alistarh, WoodFisher, 2020, between players instead of weights.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from coopq.game.sensitivity import Sensitivity


def terms(sensitivities: Sequence[Sensitivity]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Linear and pair terms of steps down, shapes (n_steps,) and (n_steps, n_steps), nats per token.

    Args:
        sensitivities: One for each pair of neighbouring widths, the highest first.
    """
    changes = [sensitivity.sequence_changes() for sensitivity in sensitivities]
    n_tokens = sensitivities[0].scored_tokens
    at_highest = changes[0][1].sum(axis=0)
    steps_down = np.stack([low - high for low, high in changes], axis=1).reshape(-1, len(at_highest))
    linear = steps_down.mean(axis=1) + n_tokens * steps_down @ at_highest / len(at_highest)
    return linear, n_tokens / 2 * steps_down @ steps_down.T / len(at_highest)

"""How sure a choice is, from the losses of single sequences."""

from dataclasses import dataclass

import numpy as np

from coopq.core.types import Losses

_BOOTSTRAPS = 10_000


@dataclass(frozen=True)
class Evidence:
    """How sure the choice is, as far as the calibration set can say; by its sequences.

    The chosen one is often the best of hundreds on the same sequences, so differences are optimistic; and few sequences
    give coarse intervals.

    Attributes:
        stderr: Standard error of the measured loss; None for a single sequence.
        difference: Loss of the runner-up minus that of the chosen, nats per token; None without a runner-up.
        interval: Its 95 % interval by a paired bootstrap over sequences.
        probability: Share of the bootstrap's samples in which the chosen one is better.
    """

    stderr: float | None
    difference: float | None
    interval: tuple[float, float] | None
    probability: float | None

    @classmethod
    def of(cls, losses: Losses, runner_up: Losses | None) -> "Evidence":
        """From the losses of both on each sequence, shape (n_sequences,)."""
        n = len(losses)
        stderr = float(losses.std(ddof=1) / np.sqrt(n)) if n > 1 else None
        if runner_up is None or n == 1:
            return cls(stderr, None if runner_up is None else float((runner_up - losses).mean()), None, None)
        differences = runner_up - losses
        means = differences[np.random.default_rng(0).integers(0, n, size=(_BOOTSTRAPS, n))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        ties = float((means == 0).mean())
        return cls(stderr, float(differences.mean()), (float(low), float(high)), float((means > 0).mean()) + ties / 2)

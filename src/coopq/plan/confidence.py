"""How sure a choice is, from the losses of single sequences."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.core.types import Losses

_N_RESAMPLES = 10_000


@dataclass(frozen=True)
class Confidence:
    """How sure the choice is, as far as the sequences of the calibration set can say.

    The chosen assignment is often the best of hundreds on the same sequences, so differences are optimistic. Few
    sequences give coarse intervals.

    Attributes:
        stderr: Standard error of the measured loss over sequences; None for a single sequence.
        difference: Loss of the runner-up minus the loss of the choice, nats per token; None without a runner-up.
        interval: 95 % interval of the difference, by a paired bootstrap over sequences.
        probability: Share of the bootstrap's samples in which the choice is better.
    """

    stderr: float | None
    difference: float | None
    interval: tuple[float, float] | None
    probability: float | None


def confidence(losses: Losses, runner_up: Losses | None) -> Confidence:
    """The confidence in a choice.

    Args:
        losses: Losses of the choice on each sequence, shape (n_sequences,), nats per token.
        runner_up: Losses of the runner-up on the same sequences.
    """
    from scipy.stats import bootstrap, sem  # slow to import

    n = len(losses)
    stderr = float(sem(losses)) if n > 1 else None
    if runner_up is None or n == 1:
        return Confidence(stderr, None if runner_up is None else float((runner_up - losses).mean()), None, None)
    differences = runner_up - losses
    if np.ptp(differences) == 0:
        mean = float(differences[0])
        return Confidence(stderr, mean, (mean, mean), 0.5 * (1 + float(np.sign(mean))))
    result = bootstrap(
        (differences,), np.mean, n_resamples=_N_RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    )
    interval = float(result.confidence_interval.low), float(result.confidence_interval.high)
    return Confidence(stderr, float(differences.mean()), interval, _share_above_zero(result.bootstrap_distribution))


def _share_above_zero(means: npt.NDArray[Any]) -> float:
    """Share of values above zero; ties count half."""
    return float((means > 0).mean()) + float((means == 0).mean()) / 2

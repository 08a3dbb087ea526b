"""How sure a choice is, from the losses of single sequences."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.core.types import Losses

NORMAL = 1.96
"""Standard errors in half a 95 % interval."""
_N_RESAMPLES = 10_000
_N_SELECTIONS = 2_000
"""Resamples in which the choice is made again. Each resample costs a sum over the sequences for each point."""

Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Confidence:
    """How sure the choice is, as far as the sequences of the calibration set can say.

    Few sequences give coarse intervals.

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

    @property
    def half(self) -> float | None:
        """Half of the 95 % interval of the measured loss, nats per token."""
        return None if self.stderr is None else NORMAL * self.stderr


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


def selected_confidence(
    losses: npt.NDArray[np.float64], chosen: int, differs: Booleans, *, is_best: bool
) -> tuple[Confidence, int | None]:
    """The confidence in a choice against its runner-up, where one or both were selected on the same sequences.

    The best of hundreds looks better on the sequences that selected it than on others. The bootstrap repeats the
    selection on each resample of the sequences, and looks at the selected pair on all sequences: what the pair loses by
    that, on average, is taken from the difference and its interval.

    Args:
        losses: Losses of points on each sequence, shape (n_points, n_sequences), nats per token.
        chosen: Row of the choice.
        differs: Whether two points differ in a real choice, shape (n_points, n_points).
        is_best: Whether the choice is the best point; otherwise only the runner-up is selected by its loss.
    Returns:
        The confidence, and the row of the runner-up: the best point that differs in a real choice, if there is one.
    Source: the bootstrap's estimate of optimism, Efron, Estimating the error rate of a prediction rule, 1983.
    """
    n = losses.shape[1]
    means = losses.mean(axis=1)
    if not differs[chosen].any():
        return confidence(losses[chosen], None), None
    runner_up = int(np.where(differs[chosen], means, np.inf).argmin())
    if n == 1:
        return confidence(losses[chosen], losses[runner_up]), runner_up
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), _N_SELECTIONS) / n
    resampled = draws @ losses.T
    again = resampled.argmin(axis=1) if is_best else np.full(_N_SELECTIONS, chosen)
    others = np.where(differs[again], resampled, np.inf)
    rows, rival = np.arange(_N_SELECTIONS), others.argmin(axis=1)
    gains = (resampled[rows, rival] - resampled[rows, again]) - (means[rival] - means[again])
    optimism = float(gains[np.isfinite(others[rows, rival])].mean())
    differences = draws @ (losses[runner_up] - losses[chosen]) - optimism
    interval = float(np.quantile(differences, 0.025)), float(np.quantile(differences, 0.975))
    difference = float(means[runner_up] - means[chosen]) - optimism
    stderr = confidence(losses[chosen], None).stderr
    return Confidence(stderr, difference, interval, _share_above_zero(differences)), runner_up


def _share_above_zero(means: npt.NDArray[Any]) -> float:
    """Share of values above zero; ties count half."""
    return float((means > 0).mean()) + float((means == 0).mean()) / 2

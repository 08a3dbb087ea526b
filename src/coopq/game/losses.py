"""The losses that searches can lower, from logits that come a portion of the vocabulary at a time."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from coopq.core.errors import EstimationError, hint
from coopq.model.kernels.gpu import log_total
from coopq.model.matrices import in_float64

Portions = Iterable[tuple[int, Tensor]]
"""The first token of each portion of the vocabulary, and the logits of the portion, shape (n, size)."""
_NEAR = 3.0
"""Divergence in nats below which no term of the exact sum overflows in practice. Chosen by hand."""
LOSSES = {
    "nll": "negative log-likelihood of the next token, the paper's loss",
    "kl": "Kullback-Leibler divergence of the next token's distribution from full precision",
}
"""What each loss is, in nats per token."""


class Loss(Protocol):
    """What an engine measures from the logits of a batch.

    Attributes:
        needs_reference: Whether `set_reference` has to be called before the first loss.
    """

    needs_reference: bool

    def set_reference(self, batches: Iterable[Portions]) -> None:
        """Keep what the loss needs of the full-precision model's logits of each batch."""
        ...

    def sequence_losses(self, j: int, portions: Portions, tokens: Tensor) -> npt.NDArray[np.float64]:
        """Loss of each sequence of one batch.

        Args:
            j: Index of the batch.
            portions: Logits of all positions but the last of each sequence.
            tokens: Shape (n_sequences, length), on the device of the logits.
        Returns:
            Shape (n_sequences,), nats per token.
        """
        ...


class NegativeLogLikelihood:
    """Mean negative log-likelihood of the next token."""

    needs_reference = False

    def set_reference(self, batches: Iterable[Portions]) -> None:
        """Nothing to keep."""

    def sequence_losses(self, j: int, portions: Portions, tokens: Tensor) -> npt.NDArray[np.float64]:
        """See `Loss`."""
        return sequence_means(portions_nll(portions, tokens[:, 1:].flatten()), tokens)


class Divergence:
    """Mean Kullback-Leibler divergence of the next token's distribution from the full-precision model's."""

    needs_reference = True

    def __init__(self) -> None:
        self._references: list[Reference] = []

    def set_reference(self, batches: Iterable[Portions]) -> None:
        """Keep the distributions of the full-precision model."""
        self._references = [Reference.from_logits(portions) for portions in batches]

    def sequence_losses(self, j: int, portions: Portions, tokens: Tensor) -> npt.NDArray[np.float64]:
        """See `Loss`."""
        return sequence_means(portions_divergence(portions, self._references[j]), tokens)


def make_loss(name: str) -> Loss:
    """A loss by its name in `LOSSES`.

    Raises:
        EstimationError: If the name is unknown.
    """
    if name not in LOSSES:
        raise EstimationError(f"loss {name!r} is unknown; {hint(name, LOSSES)}")
    return Divergence() if name == "kl" else NegativeLogLikelihood()


@torch.no_grad()
def sequence_nll(logits: Tensor, tokens: Tensor) -> npt.NDArray[np.float64]:
    """Mean negative log-likelihood of each sequence.

    Args:
        logits: Shape (n_sequences, length, vocabulary).
        tokens: Shape (n_sequences, length); the first token of each sequence is not scored.
    Returns:
        Shape (n_sequences,), nats per token, summed in float64.
    """
    nll = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return sequence_means(nll, tokens)


def sequence_means(scores: Tensor, tokens: Tensor) -> npt.NDArray[np.float64]:
    """Mean score of each sequence, shape (n_sequences,), summed in float64.

    Args:
        scores: Scores of all tokens but the first of each sequence, one sequence after the other, shape (n,).
        tokens: Shape (n_sequences, length).
    """
    return scores.cpu().reshape(len(tokens), -1).mean(dim=1).numpy()


def portions_nll(portions: Portions, targets: Tensor) -> Tensor:
    """Negative log-likelihood of the next token at each position, in nats, shape (n,).

    Args:
        portions: The logits.
        targets: The next tokens, shape (n,).
    """
    totals, target_logits = [], torch.zeros(len(targets), device=targets.device)
    for first, logits in portions:
        totals.append(log_total(logits))
        size = logits.shape[1]
        is_inside = (targets >= first) & (targets < first + size)
        found = logits.gather(1, (targets - first).clamp(0, size - 1)[:, None])[:, 0]
        target_logits = torch.where(is_inside, found.float(), target_logits)
    return torch.logsumexp(torch.stack(totals), dim=0) - target_logits


@dataclass(frozen=True)
class Reference:
    """Distributions of the next token by the full-precision model.

    Attributes:
        log_probabilities: Logarithm of each token's probability at each position, shape (n, vocabulary), float32.
        entropy: Entropy of each distribution, nats, shape (n,).
    """

    log_probabilities: Tensor
    entropy: Tensor

    @classmethod
    def from_logits(cls, portions: Portions) -> "Reference":
        """The distributions that logits stand for."""
        log_probabilities = functional.log_softmax(torch.cat([logits for _, logits in portions], dim=1).float(), dim=1)
        return cls(log_probabilities, -torch.linalg.vecdot(log_probabilities.exp(), log_probabilities))


def portions_divergence(portions: Portions, reference: Reference) -> Tensor:
    """Kullback-Leibler divergence from the reference at each position, in nats, shape (n,), float64.

    With p the reference and x its logarithm's distance to the logits, less any constant, the divergence is
    log(sum p e^x) - sum p x. The two terms are equal to many digits where x is small. So what is summed is
    p (e^x - 1 - x), which is never negative, with x about zero on average over the first portion. Where a distribution
    is far off, e^x may overflow, and nothing cancels: there the logarithms of the totals are subtracted.
    """
    totals, expected_logits = [], torch.zeros_like(reference.entropy)
    curved = torch.zeros_like(in_float64(reference.entropy))
    along, centre = torch.zeros_like(curved), None
    for first, logits in portions:
        log_probabilities = reference.log_probabilities[:, first : first + logits.shape[1]]
        probabilities, distance = log_probabilities.exp(), logits.float() - log_probabilities
        totals.append(log_total(logits))
        expected_logits += torch.linalg.vecdot(probabilities, logits.float())
        if centre is None:
            centre = (torch.linalg.vecdot(probabilities, distance) / probabilities.sum(dim=1))[:, None]
        distance -= centre
        along += in_float64(torch.linalg.vecdot(probabilities, distance))
        curved += in_float64(torch.linalg.vecdot(probabilities, torch.expm1(distance) - distance))
    far = in_float64(torch.logsumexp(torch.stack(totals), dim=0) - expected_logits - reference.entropy)
    return torch.where(far < _NEAR, torch.log1p(along + curved) - along, far)

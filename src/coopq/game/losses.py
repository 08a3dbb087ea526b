"""What assignments are judged by: losses from logits, which may come a portion of the vocabulary at a time."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from coopq.model.kernels_gpu import log_total

Portions = Iterable[tuple[int, Tensor]]
"""The first token of a portion of the vocabulary, and the logits of some positions, shape (n, size)."""
LOSSES = {
    "nll": "negative log-likelihood of the next token, the paper's loss",
    "kl": "Kullback-Leibler divergence of the next token's distribution from that in full precision",
}
"""The losses that searches can lower, both in nats per token."""


@torch.no_grad()
def sequence_nll(logits: Tensor, tokens: Tensor) -> npt.NDArray[np.float64]:
    """Mean negative log-likelihood of each sequence.

    Args:
        logits: Shape (n_sequences, length, vocabulary).
        tokens: Shape (n_sequences, length); the first token of each is not scored.
    Returns:
        Shape (n_sequences,), nats per token, summed in float64.
    """
    nll = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return sequence_means(nll, tokens)


def sequence_means(scores: Tensor, tokens: Tensor) -> npt.NDArray[np.float64]:
    """Mean over the scored tokens of each sequence, summed in float64, shape (n_sequences,).

    Args:
        scores: Of all tokens but the first of each sequence, one sequence after the other, shape (n,).
        tokens: Shape (n_sequences, length).
    """
    return scores.cpu().double().reshape(len(tokens), -1).mean(dim=1).numpy()


def portions_nll(portions: Portions, targets: Tensor) -> Tensor:
    """Negative log-likelihood of the next token at each position, in nats, shape (n,).

    Args:
        portions: The logits.
        targets: The next tokens, shape (n,).
    """
    totals, of_target = [], torch.zeros(len(targets), device=targets.device)
    for first, logits in portions:
        totals.append(log_total(logits))
        size = logits.shape[1]
        inside = (targets >= first) & (targets < first + size)
        found = logits.gather(1, (targets - first).clamp(0, size - 1)[:, None])[:, 0]
        of_target = torch.where(inside, found.float(), of_target)
    return torch.logsumexp(torch.stack(totals), dim=0) - of_target


@dataclass(frozen=True)
class Reference:
    """The distributions that divergence is measured from.

    Attributes:
        probabilities: Of each token at each position, shape (n, vocabulary), float32.
        entropy: Of each distribution, nats, shape (n,).
    """

    probabilities: Tensor
    entropy: Tensor

    @classmethod
    def of(cls, portions: Portions) -> "Reference":
        """From logits."""
        log_probabilities = functional.log_softmax(torch.cat([logits for _, logits in portions], dim=1).float(), dim=1)
        probabilities = log_probabilities.exp()
        return cls(probabilities, -torch.linalg.vecdot(probabilities, log_probabilities))


def portions_divergence(portions: Portions, reference: Reference) -> Tensor:
    """Kullback-Leibler divergence from the reference at each position, in nats, shape (n,)."""
    totals, crossed = [], torch.zeros_like(reference.entropy)
    for first, logits in portions:
        totals.append(log_total(logits))
        crossed += torch.linalg.vecdot(reference.probabilities[:, first : first + logits.shape[1]], logits.float())
    return torch.logsumexp(torch.stack(totals), dim=0) - crossed - reference.entropy

"""The losses that searches can lower, from logits that come a portion of the vocabulary at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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
JUDGED = "judged"
"""Name of what judging measures. No search can lower it."""


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
            Shape (n_sequences,), nats per token; `Judged` gives several numbers for each sequence.
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


class JudgeScores(Divergence):
    """The means over each sequence of all that `TokenScores` holds, in its order."""

    def sequence_losses(self, j: int, portions: Portions, tokens: Tensor) -> npt.NDArray[np.float64]:
        """See `Loss`; shape (n_sequences * 3,), the numbers of a sequence lie together."""
        scores = portions_scores(portions, self._references[j], tokens[:, 1:].flatten())
        return np.stack([sequence_means(score, tokens) for score in scores], axis=1).flatten()


LOSSES: dict[str, type[Loss]] = {"nll": NegativeLogLikelihood, "kl": Divergence}
"""The losses that searches can lower, nats per token."""


def make_loss(name: str) -> Loss:
    """A loss by its name in `LOSSES`, or what `JUDGED` names.

    Raises:
        EstimationError: If the name is unknown.
    """
    kinds = {**LOSSES, JUDGED: JudgeScores}
    if name not in kinds:
        raise EstimationError(f"loss {name!r} is unknown; {hint(name, LOSSES)}")
    return kinds[name]()


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
    return in_float64(scores.cpu()).reshape(len(tokens), -1).mean(dim=1).numpy()


def portions_nll(portions: Portions, targets: Tensor) -> Tensor:
    """Negative log-likelihood of the next token at each position, in nats, shape (n,).

    Args:
        portions: The logits.
        targets: The next tokens, shape (n,).
    """
    totals, found = [], _Picked(targets)
    for first, logits in portions:
        totals.append(log_total(logits))
        found.add(first, logits)
    return torch.logsumexp(torch.stack(totals), dim=0) - found.logits


class _Picked:
    """The logit of one token at each position, out of portions that pass by.

    Args:
        tokens: The tokens, shape (n,).
    """

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens
        self.logits = torch.zeros(len(tokens), device=tokens.device)

    def add(self, first: int, logits: Tensor) -> None:
        """Look into one portion."""
        size = logits.shape[1]
        is_inside = (self._tokens >= first) & (self._tokens < first + size)
        found = logits.gather(1, (self._tokens - first).clamp(0, size - 1)[:, None])[:, 0]
        self.logits = torch.where(is_inside, found.float(), self.logits)


@dataclass(frozen=True)
class Reference:
    """Distributions of the next token by the full-precision model.

    Attributes:
        log_probabilities: Logarithm of each token's probability at each position, shape (n, vocabulary), float32.
        entropy: Entropy of each distribution, nats, shape (n,).
        top: The most likely token at each position, shape (n,).
    """

    log_probabilities: Tensor
    entropy: Tensor
    top: Tensor

    @classmethod
    def from_logits(cls, portions: Portions) -> "Reference":
        """The distributions that logits stand for."""
        log_probabilities = functional.log_softmax(torch.cat([logits for _, logits in portions], dim=1).float(), dim=1)
        entropy = -torch.linalg.vecdot(log_probabilities.exp(), log_probabilities)
        return cls(log_probabilities, entropy, log_probabilities.argmax(dim=1))


def portions_divergence(portions: Portions, reference: Reference) -> Tensor:
    """Kullback-Leibler divergence from the reference at each position, in nats, shape (n,), float64.

    With p the reference and x its logarithm's distance to the logits, less any constant, the divergence is
    log(sum p e^x) - sum p x. The two terms are equal to many digits where x is small. So what is summed is
    p (e^x - 1 - x), which is never negative, with x about zero on average over each portion; the distances of the
    portions' averages from the whole average are added in float64. Where a distribution is far off, e^x may overflow,
    and nothing cancels: there the logarithms of the totals are subtracted.
    """
    totals, expected_logits = [], torch.zeros_like(reference.entropy)
    sums: list[Tensor] = []
    for first, logits in portions:
        log_probabilities = reference.log_probabilities[:, first : first + logits.shape[1]]
        probabilities, distance = log_probabilities.exp(), logits.float() - log_probabilities
        totals.append(log_total(logits))
        expected_logits += torch.linalg.vecdot(probabilities, logits.float())
        mass = probabilities.sum(dim=1)
        centre = torch.linalg.vecdot(probabilities, distance) / mass.clamp(min=torch.finfo(mass.dtype).tiny)
        distance -= centre[:, None]
        along = torch.linalg.vecdot(probabilities, distance)
        curved = torch.linalg.vecdot(probabilities, torch.expm1(distance) - distance)
        sums.append(in_float64(torch.stack([mass, centre, along, curved])))
    mass, centre, along, curved = torch.stack(sums, dim=1)
    apart = centre - (mass * centre + along).sum(dim=0)
    total = (mass * torch.expm1(apart) + apart.exp() * (along + curved)).sum(dim=0)
    near = (torch.log1p(total) - (mass * apart + along).sum(dim=0)).clamp(min=0)
    far = in_float64(torch.logsumexp(torch.stack(totals), dim=0) - expected_logits - reference.entropy)
    return torch.where((far < _NEAR) & near.isfinite(), near, far)


class TokenScores(NamedTuple):
    """What a model predicts at each position, compared with the reference.

    Attributes:
        nll: Negative log-likelihood of the next token, nats, shape (n,).
        divergence: Kullback-Leibler divergence from the reference, nats, shape (n,).
        same_top: Whether the reference's most likely token is the most likely token, shape (n,).
    """

    nll: Tensor
    divergence: Tensor
    same_top: Tensor


def portions_scores(portions: Portions, reference: Reference, targets: Tensor) -> TokenScores:
    """All scores of each position from one pass over the portions.

    Args:
        portions: The logits.
        reference: The distributions to compare with.
        targets: The next tokens, shape (n,).
    """
    totals, highest, target, top = [], [], _Picked(targets), _Picked(reference.top)

    def watched() -> Iterator[tuple[int, Tensor]]:
        for first, logits in portions:
            totals.append(log_total(logits))
            highest.append(logits.amax(dim=1).float())
            target.add(first, logits)
            top.add(first, logits)
            yield first, logits

    divergence = portions_divergence(watched(), reference)
    nll = torch.logsumexp(torch.stack(totals), dim=0) - target.logits
    return TokenScores(nll, divergence, top.logits >= torch.stack(highest).amax(dim=0))

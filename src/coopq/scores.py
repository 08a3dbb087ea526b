"""What an evaluation finds out."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
        nll: Mean negative log-likelihood, nats per scored token.
        tokens: Scored tokens.
        bytes: Bytes of the players' weights.
        text: Which text, in which windows.
    """

    nll: float
    tokens: int
    bytes: int
    text: str

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)


@dataclass(frozen=True)
class Comparison:
    """One row of the comparison: a group of assignments, `n` of them, their losses averaged.

    Attributes:
        name: "CoopQ", "uniform 4", "random", ...
        n: Assignments in the group.
        bits_per_weight: Averaged over the group.
        calibration_nll: Mean over the group, nats per token.
        nll: The same on the judging text.
        perplexity: Mean of the perplexities of the group.
    """

    name: str
    n: int
    bits_per_weight: float
    calibration_nll: float
    nll: float
    perplexity: float

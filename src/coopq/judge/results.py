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
    """One row of a comparison: the assignments of one method at one budget, their values averaged.

    Attributes:
        method: "coopq", a baseline, "random", "uniform" or "full precision".
        budget: As the user wrote it; None for what has no budget.
        n: Number of assignments.
        average_bits: Weight bits alone.
        bits_per_weight: With scales, zeros and padding.
        calibration_nll: Loss on the calibration set, nats per token.
        nll: Loss on the judging text, nats per token.
        perplexity: Mean of the assignments' perplexities on the judging text.
    """

    method: str
    budget: str | None
    n: int
    average_bits: float
    bits_per_weight: float
    calibration_nll: float
    nll: float
    perplexity: float

    @property
    def name(self) -> str:
        """Method and budget for people, or the width where it is uniform."""
        if self.method == "uniform":
            return f"uniform {self.average_bits:g}"
        mean = f" (mean of {self.n})" if self.n > 1 else ""
        return self.method + (f" {self.budget}" if self.budget else "") + mean


@dataclass(frozen=True)
class Accuracy:
    """How often a model is right at a task.

    Attributes:
        task: Its name.
        accuracy: Share of the questions answered rightly.
        stderr: Its standard error over questions.
        normalized: The same with each choice's log-likelihood divided by its length in characters, and its standard
            error; None for tasks without it.
        questions: How many were asked.
    """

    task: str
    accuracy: float
    stderr: float
    normalized: tuple[float, float] | None
    questions: int

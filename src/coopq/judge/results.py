"""What judging finds out: records for tables and for JSON."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from coopq.core.errors import EstimationError, RunError
from coopq.core.files import locked, read_record, write_record
from coopq.core.types import Width

_FORMAT_VERSION, _JUDGED = 1, "judged.json"
_NEAR = 0.005
"""Average bits above the width of a uniform row from which some layers are wider; less is rounding."""
MOST_NLL = 700.0
"""A larger loss has a perplexity that no float holds."""


@dataclass(frozen=True)
class Estimate:
    """A statistic of a text.

    Attributes:
        value: The statistic.
        interval: Its 95 % interval, by a bootstrap over windows; None for a single window.
    """

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Divergence:
    """How far a model's predictions of the next token are from the original's, over the scored tokens of a text.

    Attributes:
        mean: Mean of the Kullback-Leibler divergence from the original, nats per token.
        median: Median of the divergence, nats.
        percentile_99: What 99 % of the tokens do not exceed, nats.
        maximum: The largest divergence, nats. Its interval tells only how much hangs on single windows.
        same_top: Share of the tokens at which both models have the same most likely token.
    """

    mean: Estimate
    median: Estimate
    percentile_99: Estimate
    maximum: Estimate
    same_top: Estimate


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
        nll: Mean negative log-likelihood, nats per scored token.
        tokens: Number of scored tokens.
        file_bytes: Bytes of the files that hold the weights; of the exported file if the model is for an engine.
        bytes: Bytes of the players' weights; of the whole file for a GGUF file.
        text: Name of the text, and how the text is cut into windows.
        divergence: How far the model is from the original; None without an original.
    """

    nll: float
    tokens: int
    file_bytes: int
    bytes: int
    text: str
    divergence: Divergence | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll).

        Raises:
            EstimationError: If the loss is too large for a working model.
        """
        if self.nll > MOST_NLL:
            raise EstimationError(
                f"{self.nll:.4g} nats per token are no loss of a working model; check the model's files, or compute in "
                "float32"
            )
        return math.exp(self.nll)


@dataclass(frozen=True)
class Comparison:
    """One row of a comparison: the assignments of one method at one budget, averaged.

    Attributes:
        method: A name of `coopq.plan.methods.METHODS`, or a name of `coopq.judge.references.REFERENCES`.
        budget: The budget as the user wrote it; None for rows without a budget.
        n: Number of assignments.
        average_bits: Width averaged over the weights; scales and zeros do not count.
        bits_per_weight: Stored bits per weight; scales, zeros and padding count.
        loss: Which loss `calibration_loss` is: "nll" or "kl", as in `coopq.core.specs.SearchSpec`.
        calibration_loss: Loss on the calibration set, nats per token.
        nll: Negative log-likelihood on the judging text, nats per token.
        perplexity: Mean of the assignments' perplexities on the judging text.
        windows: Negative log-likelihood on each window of the judging text, mean of the assignments, nats per token.
        divergence: Kullback-Leibler divergence from the original on the judging text, nats per token; None for the
            original, the reference, and where no divergence was measured.
        same_top: Share of the tokens with the most likely token of the original; None likewise.
        file_bytes: Bytes of the whole file, or the most that it can take; None where the file is not known.
        width: The width of a uniform row. A layer that lacks the width has its next wider one, or else its widest.
    """

    method: str
    budget: str | None
    n: int
    average_bits: float
    bits_per_weight: float
    loss: str
    calibration_loss: float
    nll: float
    perplexity: float
    windows: tuple[float, ...]
    divergence: Estimate | None = None
    same_top: Estimate | None = None
    file_bytes: int | None = None
    width: Width | None = None

    @property
    def name(self) -> str:
        """Method and budget for people, or the width of a uniform row."""
        if self.width is not None:
            return uniform_name(self.width, self.average_bits)
        return self.method + (f" {self.budget}" if self.budget else "") + self.draws

    @property
    def draws(self) -> str:
        """How many assignments the row is the mean of, for people."""
        return f", {self.n} draws" if self.n > 1 else ""


def uniform_name(width: Width, average_bits: float) -> str:
    """The name of a uniform row for people: some layers are wider where they lack the width."""
    return f"uniform {width:g}" + (" and wider" if average_bits > width + _NEAR else "")


@dataclass(frozen=True)
class Accuracy:
    """How often a model answers the questions of a task correctly.

    Attributes:
        task: Name of the task.
        accuracy: Share of the questions answered correctly.
        stderr: Standard error of the accuracy over questions; None for a single question.
        normalized: Accuracy with the log-likelihood of each choice divided by the choice's length in characters, and
            the standard error as above; None for tasks without.
        questions: Number of questions.
    """

    task: str
    accuracy: float
    stderr: float | None
    normalized: tuple[float, float | None] | None
    questions: int


@dataclass(frozen=True)
class JudgedPlan:
    """What was found out about the model of a plan on one text.

    Attributes:
        fingerprint: The plan's fingerprint.
        assignment: The plan's widths, one for each player.
        evaluation: The evaluation of the model.
        rows: The model, the original, uniform and random widths, and llama.cpp's mix; empty without a comparison.
    """

    fingerprint: dict[str, Any]
    assignment: list[Width]
    evaluation: Evaluation
    rows: list[Comparison]

    def _subject(self) -> tuple[object, ...]:
        return self.fingerprint, self.assignment, self.evaluation.text


class _Kept(msgspec.Struct, frozen=True):
    """judged.json."""

    judged: list[JudgedPlan]


def keep_judged(run: Path, judged: JudgedPlan) -> None:
    """Keep what was found out in a run folder, in place of what was known of the same model on the same text.

    A comparison and a divergence that were measured before stay if the new record has none.
    """
    with locked(run):
        kept = kept_judged(run)
        for one in kept:
            if one._subject() == judged._subject():
                divergence = judged.evaluation.divergence or one.evaluation.divergence
                evaluation = replace(judged.evaluation, divergence=divergence)
                judged = replace(judged, evaluation=evaluation, rows=judged.rows or one.rows)
        others = [one for one in kept if one._subject() != judged._subject()]
        write_record(run / _JUDGED, _Kept([*others, judged]), _FORMAT_VERSION)


def kept_judged(run: Path) -> list[JudgedPlan]:
    """All that `keep_judged` kept in a run folder.

    Raises:
        RunError: If the file is damaged, or of another version.
    """
    file = run / _JUDGED
    if not file.is_file():
        return []
    way_out = "delete it, and run coopq evaluate"
    kept = read_record(
        file, _Kept, _FORMAT_VERSION, what="record of judging", missing="", way_out=way_out, error=RunError
    )
    return kept.judged

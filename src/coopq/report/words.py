"""What tables and pages call sizes, losses and scores."""

import math

from coopq.plan.methods import METHODS

LOSS_NAMES = {"nll": "calibration loss", "kl": "calibration KL divergence"}
"""Names of the losses that searches lower, by `coopq.core.specs.SearchSpec.loss`."""


def size_text(file_bytes: int, n_bytes: int, limit: int | None = None) -> str:
    """Bytes of a file of weights and of its quantized part: the whole file first.

    Args:
        file_bytes: Bytes of the file.
        n_bytes: Bytes of the quantized part.
        limit: Most bytes of the quantized part; None for no limit.
    """
    most = "" if limit is None else f" of {megabytes(limit)}"
    return f"file {megabytes(file_bytes)} (quantized part {megabytes(n_bytes)}{most})"


def megabytes(n_bytes: int) -> str:
    """Bytes in MB: millions of bytes, as disks and hubs count."""
    return f"{n_bytes / 1e6:,.2f} MB"


def with_half(value: float, half: float) -> str:
    """A value and half of its interval, both to the second digit of the half."""
    if not 0 < half < math.inf:
        return f"{value:.2g} ± {half:.2g}"
    decimals = max(0, 1 - math.floor(math.log10(half)))
    return f"{value:.{decimals}f} ± {half:.{decimals}f}"


def counted(n: int, noun: str) -> str:
    """A number of things, such as "1 case" or "2 cases"."""
    return f"{n} {noun}" + ("" if n == 1 else "s")


def score_text(method: str) -> str:
    """What a method's score of a layer is, with its unit: see `coopq.plan.plan.PlayerPlan.score`."""
    found = METHODS[method]
    if found.takes_prior:
        return "rise of the loss if the layer alone goes to its lowest width, nats per token"
    if found.kind == "score":
        return "the method's score: what lowering the layer costs, in a unit of its own"
    if found.kind == "search" or method == "interactions":
        return "Shapley value of lowering the layer in a quadratic fitted to the losses, nats per token"
    if found.whole_blocks:
        return "Shapley value: rise of the loss by removing the block, nats per token"
    return "Shapley value: rise of the loss by lowering the layer, nats per token"

"""Evaluations, comparisons and accuracies for people. Divergence from the original leads where it tells most."""

from collections.abc import Callable, Sequence

import numpy as np
from rich.table import Table

from coopq.judge.references import REFERENCES
from coopq.judge.results import Accuracy, Comparison, Estimate, Evaluation
from coopq.report.tables import empty_table
from coopq.report.words import size_text, with_half

_LEADS_FROM = 3
"""Average bits from which divergence leads. Below, many models are ruined, and perplexity says how far."""


def evaluation_text(model: str, evaluation: Evaluation) -> str:
    """What was found out about a model, and its size, in lines."""
    size = size_text(evaluation.file_bytes, evaluation.bytes)
    return "\n".join([f"{model}: {size}", *evaluation_lines(evaluation)])


def evaluation_lines(evaluation: Evaluation) -> list[str]:
    """What was found out about a model, in two to four lines."""
    found, lines = evaluation.divergence, []
    if found is not None:
        tail = {"median": found.median, "99 %": found.percentile_99, "maximum": found.maximum}
        more = ", ".join(f"{name} {with_interval(value, '{:.3g}')}" for name, value in tail.items())
        lines.append(f"KL divergence from the original, nats per token: {with_interval(found.mean, '{:.3g}')}, {more}")
        lines.append(f"same most likely token as the original: {with_interval(found.same_top, '{:.1%}')} of the tokens")
    likelihood = f"perplexity {evaluation.perplexity:.3f}, {evaluation.nll:.5f} nats per token"
    # Without a divergence the model is what others are compared with.
    lines.append(likelihood if found is not None else f"{likelihood}, reference")
    text = f"{evaluation.tokens} tokens scored ({evaluation.text})"
    return [*lines, text if found is None else f"{text}; in brackets 95 %, bootstrap over windows"]


def comparison_table(rows: Sequence[Comparison], text: str) -> Table:
    """A comparison, in the order given; `text` is the judging text."""
    title = (
        f"Judged on {text}\nKL divergence from the original in nats per token, share of tokens with the same most "
        "likely token; ± half of the 95 % interval"
    )
    head, cells = judged_cells(rows)
    table = empty_table(title, *head)
    for column in table.columns:
        column.no_wrap = column.header != "weights"  # on a narrow terminal the names wrap, and not what leads
    for row in cells:
        table.add_row(*row)
    return table


def judged_cells(rows: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """Names of the columns, and the cells of each row."""
    plans = [row.average_bits for row in rows if row.method not in REFERENCES]
    leads = min(plans, default=_LEADS_FROM) >= _LEADS_FROM
    cells = []
    for row in rows:
        size = f"{row.bits_per_weight:.3f} bpw" if row.file_bytes is None else f"{row.file_bytes / 1e6:,.1f} MB"
        diverging = [_reference_or(row.divergence, with_half, "{:.2g}"), _reference_or(row.same_top, _shares, "{:.1%}")]
        likely = [f"{row.perplexity:,.2f}"]
        cells.append([row.name, size, *([*diverging, *likely] if leads else [*likely, *diverging])])
    divergence, likelihood = ["KL", "same top"], ["perplexity"]
    return ["weights", "size", *([*divergence, *likelihood] if leads else [*likelihood, *divergence])], cells


def accuracy_table(rows: Sequence[Accuracy], model: str) -> Table:
    """Accuracies with standard errors."""
    table = empty_table(f"Zero-shot accuracy of {model}", "task", "accuracy", "normalized by length", "questions")
    for row in rows:
        normalized = "" if row.normalized is None else _with_stderr(*row.normalized)
        table.add_row(row.task, _with_stderr(row.accuracy, row.stderr), normalized, f"{row.questions:,}")
    return table


def _with_stderr(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def _reference_or(found: Estimate | None, both: Callable[[float, float], str], alone: str) -> str:
    """A statistic with half of its interval; without a statistic the row is the reference."""
    if found is None:
        return "reference"
    if found.interval is None:
        return alone.format(found.value)
    return both(found.value, float(np.ptp(found.interval)) / 2)


def _shares(value: float, half: float) -> str:
    return f"{value:.1%} ± {half:.1%}"


def with_interval(found: Estimate, form: str) -> str:
    """A statistic with its interval in brackets."""
    if found.interval is None:
        return form.format(found.value)
    low, high = map(form.format, found.interval)
    return f"{form.format(found.value)} ({low} to {high})"

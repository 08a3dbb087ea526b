"""The pages of a comparison and of a bench."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coopq.core.specs import Request, request_words
from coopq.core.versions import installed
from coopq.judge.references import REFERENCES
from coopq.judge.results import Comparison
from coopq.model.texts import HeldOut
from coopq.report.page.document import Figure, Section, code, details, paragraph, save_page, table
from coopq.report.page.ranking.figures import line_colours, lines_figure, rank_figure
from coopq.report.page.ranking.rank import Cell, Rank, bench_cells, comparison_cells, not_compared, rank
from coopq.report.words import counted

if TYPE_CHECKING:  # it imports torch
    from coopq.judge.bench.results import Result

_RANKED = (
    "How much worse than the best-ranked method each method is, with 95 % intervals over windows of the judging text. "
    "Differences are paired. An interval that crosses zero means that this text cannot tell the two apart."
)
_LINES = (
    "Loss on text that no search sees. Lower is better, left is smaller. Coloured lines are named at their right end, "
    "grey lines on hover; squares are uniform widths."
)


def save_comparison_page(request: Request, held_out: HeldOut, rows: Sequence[Comparison], path: Path) -> Path:
    """Write the page of a comparison.

    Args:
        request: What was asked for.
        held_out: The judging text.
        rows: The comparison.
        path: The HTML file.
    """
    text = held_out.text
    cells = comparison_cells(rows)
    ranks = rank(cells)
    budgets = dict.fromkeys(row.budget for row in rows if row.budget is not None)
    methods = dict.fromkeys(row.method for row in rows if row.method not in REFERENCES)
    words = ["coopq", "compare", *request_words(request)]
    words += [word for budget in budgets for word in ("--budget", budget)]
    words += [word for method in methods for word in ("--method", method)]
    words += ["--judge-length", str(held_out.length)]
    words += [] if held_out.max_tokens is None else ["--judge-tokens", str(held_out.max_tokens)]
    sections = [
        *_ranked(cells, ranks, text),
        *_case("Which loss does each method have at each size?", "lines", cells, ranks),
        Section(
            "How can this be repeated?",
            [code(shlex.join([*words, "--run", path.resolve().parent.name])), _versions(request)],
        ),
    ]
    return save_page(path, f"Methods on {request.model.source}", _subtitle(request, text), sections)


def save_bench_page(title: str, results: "Sequence[Result]", path: Path) -> Path:
    """Write the page of a bench.

    Args:
        title: Title of the bench.
        results: The results of its runs.
        path: The HTML file.
    """
    cells = bench_cells(results)
    cases = list(dict.fromkeys(cell.case for cell in cells))
    text = "WikiText-2"
    ranks = rank(cells)
    sections = list(_ranked(cells, ranks, text))
    for number, case in enumerate(cases):
        own = [cell for cell in cells if cell.case == case]
        sections += _case(case, f"lines-{number}", own, ranks)
    requests: dict[str, Request] = {}
    for result in results:  # the first seed's
        requests.setdefault(result.case, result.request)
    commands = [f"{case}: {shlex.join(request_words(request))}" for case, request in requests.items()]
    how = paragraph("The options of each case; the TOML file of the bench lists methods, budgets and seeds.")
    sections.append(Section("How can this be repeated?", [how, code("\n".join(commands)), _versions(None)]))
    n_seeds = len({result.seed for result in results})
    amount = f"{counted(len(cases), 'case')}, {counted(n_seeds, 'seed')}"
    subtitle = f"CoopQ bench. {amount}, judged on {text}, which no method sees"
    return save_page(path, title, subtitle, sections)


def _ranked(cells: Sequence[Cell], ranks: Sequence[Rank], text: str) -> Iterator[Section]:
    """The answer: which method is best, and which methods cannot be told from it."""
    if len(ranks) < 2:
        return
    best, others = ranks[0], ranks[1:]
    where = "at the one budget" if best.n_cells == 1 else f"averaged over {best.n_cells} budgets"
    answer = f"{best.method} has the lowest loss on {text}, {where}. {_told(best.method, others)}"
    if left_out := not_compared(cells, ranks):
        answer += f" Not compared, because they share no budget with {best.method}: {', '.join(left_out)}."
    rows = [
        (str(place), one.method, f"{one.above:+.4f}", "" if one.half is None else f"± {one.half:.4f}", str(one.n_cells))
        for place, one in enumerate(ranks, start=1)
    ]
    head = ("rank", "method", "NLL above the best", "95 % interval", "budgets")
    yield Section(
        "Which method is best?",
        [
            paragraph(answer),
            Figure("ranks", rank_figure(ranks, line_colours(ranks)), _RANKED),
            details("As a table", table(head, rows)),
        ],
    )


def _told(best: str, others: Sequence[Rank]) -> str:
    """What the intervals of the other methods say."""
    if any(one.half is None for one in others):
        return "The judging text is a single window, so differences have no interval."
    close = [one.method for one in others if one.half is not None and abs(one.above) <= one.half]
    better = [one.method for one in others if one.half is not None and one.above < -one.half]
    parts = []
    if close:
        parts.append(f"No clear difference from {best}: {', '.join(close)}.")
    if better:
        parts.append(f"Better than {best} at the budgets that both have: {', '.join(better)}.")
    return " ".join(parts) or "All other methods are clearly worse."


def _case(title: str, name: str, cells: Sequence[Cell], ranks: Sequence[Rank]) -> Iterator[Section]:
    """The methods of one case: lines and a table."""
    head = ["weights", "budget", "bits per weight", "calibration loss", "NLL", "perplexity", "forwards"]
    rows = [
        (
            cell.label,
            cell.budget or "",
            f"{cell.bits_per_weight:.3f}",
            f"{cell.calibration_loss:.4f}",
            f"{cell.nll:.4f}",
            f"{cell.perplexity:,.2f}",
            f"{cell.forwards:,.0f}" if cell.forwards else "",
        )
        for cell in cells
    ]
    figure = Figure(name, lines_figure(cells, line_colours(ranks)), _LINES)
    yield Section(title, [figure, details("All numbers", table(head, rows))])


def _subtitle(request: Request, text: str) -> str:
    widths = request.widths
    return (
        f"CoopQ comparison. Backend {request.quantizer.backend}, {widths.text} bits by {widths.granularity}, judged on "
        f"{text}, which no method sees"
    )


def _versions(request: Request | None) -> str:
    seeds = "" if request is None else f"Seeds: {request.text.seed} for the text, {request.search.seed} for searches. "
    return paragraph(f"{seeds}This page was made by {installed()}.")

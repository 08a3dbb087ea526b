"""The report of a bench: a tidy table, Markdown and figures."""

import csv
import io
from collections.abc import Iterator, Sequence
from importlib.metadata import distributions
from pathlib import Path

import numpy as np

from coopq.plan.scores import PAPER_BASELINES
from coopq.judge.bench.run import Result
from coopq.judge.bench.aggregate import REFERENCES, Cell, cells
from coopq.judge.bench.config import Bench
from coopq.report.bench_plots import save_figures
from coopq.plan.confidence import Evidence
from coopq.core.files import atomic_file

_COLUMNS = (
    "case",
    "model",
    "backend",
    "bits",
    "granularity",
    "seed",
    "method",
    "budget",
    "average_bits",
    "bits_per_weight",
    "layer_forwards",
    "calibration_nll",
    "nll",
    "perplexity",
)
_RANGES = ((2.0, 2.5), (2.5, 3.0), (3.0, 3.5), (3.5, 4.0))
"""Average bits as the paper's tables group them: above the first number, up to the second."""
_PACKAGES = ("coopq", "torch", "transformers", "optimum-quanto", "hqq", "gptqmodel", "auto-round", "libggml-python")


def save_report(bench: Bench, results: Sequence[Result], out: Path) -> list[Path]:
    """Write results.csv, report.md and the figures into a folder; the files written."""
    figures = save_figures(bench, results, out)
    files = [out / "results.csv", out / "report.md"]
    for path, text in zip(files, (tidy(results), markdown(bench, results, figures)), strict=True):
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [*files, *(out / figure for figure in figures)]


def tidy(results: Sequence[Result]) -> str:
    """Every row of every result as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for result in results:
        config = result.config
        shared = [
            result.case,
            config["model"],
            config["backend"],
            " ".join(map(str, (config["low"], *config.get("between", ()), config["high"]))),
            config["granularity"] + (" embeddings" if config.get("embeddings") else ""),
            result.seed,
        ]
        for row in result.rows:
            measured = [getattr(row, column) for column in _COLUMNS[len(shared) :]]
            writer.writerow([*shared, *measured])
    return text.getvalue()


def markdown(bench: Bench, results: Sequence[Result], figures: Sequence[str] = ()) -> str:
    """The report.

    Args:
        bench: What was asked for.
        results: What came of it.
        figures: File names of figures to show.
    """
    of_all = cells(results)
    methods = [m for m in dict.fromkeys(m for cell in of_all for m in cell.windows) if m not in REFERENCES]
    lines = [f"# {bench.title}", "", *_provenance(bench), "", "## All cases", "", *_summary(of_all, methods)]
    lines += ["", "## The paper's method against its baselines", "", *_against(of_all, "coopq", PAPER_BASELINES)]
    others = [method for method in methods if method != "active"]
    lines += ["", "## The active search against everything else", "", *_against(of_all, "active", others)]
    lines += ["", "## In the form of the paper's tables", "", *_paper_form(bench, of_all)]
    lines += _equal_bytes(bench, of_all)
    lines += ["", "## Who beats whom", "", *_wins(of_all, methods)]
    for case in bench.cases:
        of_case = [result for result in results if result.case == case.name]
        text = case.config.calibration
        lines += [
            "",
            f"## {case.name}",
            "",
            f"{text.sequences} x {text.length} tokens of {text.source}, {case.config.permutations} walks, seeds "
            f"{', '.join(map(str, case.seeds))}; {len(of_case[0].players)} players in {of_case[0].blocks} blocks.",
            f"Perplexity, {_references(of_case)}.",
            "",
            *_table([cell for cell in of_all if cell.case == case.name], of_case),
        ]
    lines += [line for figure in figures if figure.endswith(".png") for line in ("", f"![{figure}]({figure})")]
    return "\n".join(lines) + "\n"


def _provenance(bench: Bench) -> list[str]:
    judged = "all" if bench.judge_tokens is None else f"the first {bench.judge_tokens:,}"
    packages = ", ".join(f"{of.name} {of.version}" for name in _PACKAGES for of in distributions(name=name))
    return [
        f"Judged on {judged} tokens of the WikiText-2 test split in windows of {bench.judge_length}, which no method",
        "sees. Intervals: 95 %, paired bootstrap over windows, of the mean over seeds. Cost: layer forwards for all",
        "budgets of a case together, prefixes shared, in forwards of the whole model over the calibration tokens.",
        f"{packages}.",
        *(["", f"Not finished, and left out: {', '.join(bench.unfinished)}."] if bench.unfinished else []),
    ]


def _summary(of_all: Sequence[Cell], methods: Sequence[str]) -> Iterator[str]:
    """Each method over all cells: how often it is lowest, how far above the lowest it is, and what it takes."""
    yield (
        "| method | lowest in | NLL above the lowest, mean ± standard error | worst "
        "| calibration loss above the lowest, mean | cost, median |"
    )
    yield "| --- | --- | --- | --- | --- | --- |"
    lowest = {id(cell): min(cell.nll(m) for m in methods if m in cell.windows) for cell in of_all}
    above = {
        m: np.array([cell.nll(m) - lowest[id(cell)] for cell in of_all if m in cell.windows])
        for m in dict.fromkeys(m for cell in of_all for m in cell.windows)
    }
    for method in sorted(above, key=lambda m: float(above[m].mean())):
        excess = above[method]
        error = excess.std(ddof=1) / np.sqrt(len(excess)) if len(excess) > 1 else np.nan
        cost = float(np.median([cell.cost[method] for cell in of_all if method in cell.cost]))
        fitted = np.mean(
            [
                cell.calibration[method] - min(cell.calibration[m] for m in methods if m in cell.calibration)
                for cell in of_all
                if method in cell.calibration
            ]
        )
        yield (
            f"| {method} | {(excess <= 0).sum()} of {len(excess)} | {excess.mean():.4f} ± {error:.4f} "
            f"| {excess.max():.4f} | {fitted:.4f} | {cost:,.0f} |"
        )


def _against(of_all: Sequence[Cell], ours: str, others: Sequence[str]) -> Iterator[str]:
    """One method against the best of others, cell by cell."""
    rows = []
    for cell in of_all:
        theirs = [method for method in others if method in cell.windows]
        if ours not in cell.windows or not theirs:
            continue
        best = min(theirs, key=cell.nll)
        evidence = Evidence.of(cell.windows[ours], cell.windows[best])
        least, most = (np.expm1(-np.array(evidence.interval or (np.nan, np.nan))) * 100)[::-1]
        change = float(np.expm1(cell.nll(ours) - cell.nll(best)) * 100)
        rows.append((change, least, most, cell, best))
    if not rows:
        yield f"{ours} or what it is compared with was not asked for."
        return
    lower, higher = [row for row in rows if row[0] < 0], [row for row in rows if row[0] > 0]
    yield (
        f"Lower in {len(lower)} of {len(rows)} cells ({sum(row[2] < 0 for row in lower)} beyond the interval), "
        f"higher in {len(higher)} ({sum(row[1] > 0 for row in higher)} beyond)."
    )
    yield ""
    yield f"| case | budget | {ours} | best of the others | its perplexity | change of perplexity |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for change, least, most, cell, best in rows:
        yield (
            f"| {cell.case} | {cell.budget} | {np.exp(cell.nll(ours)):,.2f} | {best} | {np.exp(cell.nll(best)):,.2f} "
            f"| {change:+.1f} % ({least:+.1f} to {most:+.1f}) |"
        )


def _paper_form(bench: Bench, of_all: Sequence[Cell]) -> Iterator[str]:
    """Perplexity by range of average bits, of the paper's method and its baselines, at 2 and 4 bits."""
    cases = [case for case in bench.cases if case.config.widths == (2, 4)]
    methods = ("coopq", *PAPER_BASELINES, "active")
    rows = [
        (case.name, method, [_in_range(of_all, case.name, method, bits) for bits in _RANGES])
        for case in cases
        for method in methods
    ]
    yield "Perplexity at 2 and 4 bits; of several budgets in a range, the geometric mean."
    yield ""
    yield f"| case | method | {' | '.join(f'{low + 0.01:.2f} to {high:g}' for low, high in _RANGES)} |"
    yield f"| --- | --- |{' --- |' * len(_RANGES)}"
    for name, method, found in rows:
        if any(nll is not None for nll in found):
            shown = ("" if nll is None else f"{np.exp(nll):,.2f}" for nll in found)
            yield f"| {name} | {method} | {' | '.join(shown)} |"


def _in_range(of_all: Sequence[Cell], case: str, method: str, bits: tuple[float, float]) -> float | None:
    """Mean loss over the budgets of a case in a range of average bits; None without any."""
    found = [
        cell.nll(method)
        for cell in of_all
        if cell.case == case and method in cell.windows and cell.budget.endswith("avg")
        if bits[0] < float(cell.budget.removesuffix("avg")) <= bits[1]
    ]
    return float(np.mean(found)) if found else None


def _equal_bytes(bench: Bench, of_all: Sequence[Cell]) -> Iterator[str]:
    """Cases of one model and backend that share budgets which are bytes, whatever the players and widths are."""
    sources = [(case.config.model, case.config.backend) for case in bench.cases]
    for source in dict.fromkeys(sources):
        cases = [case for case, of in zip(bench.cases, sources, strict=True) if of == source]
        shared = [
            budget
            for budget in cases[0].budgets
            if not budget.endswith("avg") and all(budget in case.budgets for case in cases)
        ]
        if len(cases) < 2 or not shared:
            continue
        found = {(cell.case, cell.budget): cell for cell in of_all}
        lowest = [min((found[case.name, budget] for case in cases), key=lambda c: c.nll(c.best)) for budget in shared]
        yield from ["", f"## {' by '.join(source)} at equal bytes", "", "Perplexity; cost as below.", ""]
        yield f"| case | method | {' | '.join(shared)} | cost |"
        yield f"| --- | --- |{' --- |' * len(shared)} --- |"
        for case in cases:
            of_case = [found[case.name, budget] for budget in shared]
            for method in (method for method in case.methods if all(method in cell.windows for cell in of_case)):
                perplexities = [f"{np.exp(cell.nll(method)):,.2f}" for cell in of_case]
                shown = [
                    f"**{text}**" if (cell, method) == (least, least.best) else text
                    for text, cell, least in zip(perplexities, of_case, lowest, strict=True)
                ]
                yield f"| {case.name} | {method} | {' | '.join(shown)} | {of_case[0].cost[method]:,.0f} |"


def _wins(of_all: Sequence[Cell], methods: Sequence[str]) -> Iterator[str]:
    """Cells in which one method is lower than another, and in how many of them beyond the interval."""
    yield "Cells in which the method of the row is lower than that of the column, and those beyond the interval."
    yield ""
    yield f"| | {' | '.join(methods)} |"
    yield f"| --- |{' --- |' * len(methods)}"
    for row in methods:
        shown = []
        for column in methods:
            pairs = [(c.windows[row], c.windows[column]) for c in of_all if row in c.windows and column in c.windows]
            lower = [(ours, theirs) for ours, theirs in pairs if ours.mean() < theirs.mean()]
            sure = sum((Evidence.of(ours, theirs).interval or (0.0,))[0] > 0 for ours, theirs in lower)
            shown.append("" if row == column else f"{len(lower)} ({sure})")
        yield f"| {row} | {' | '.join(shown)} |"


def _references(of_case: Sequence[Result]) -> str:
    """Perplexity of full precision and of uniform widths."""
    rows = [row for row in of_case[0].rows if row.method in ("full precision", "uniform")]
    return ", ".join(
        f"{row.method}{'' if row.method == 'full precision' else f' {row.average_bits:g} bits'} {row.perplexity:,.2f}"
        for row in rows
    )


def _table(of_case: Sequence[Cell], results: Sequence[Result]) -> Iterator[str]:
    """Methods by budgets, with the spread over seeds."""
    methods = dict.fromkeys(method for cell in of_case for method in cell.windows)
    yield f"| method | cost | {' | '.join(cell.budget for cell in of_case)} |"
    yield f"| --- | --- |{' --- |' * len(of_case)}"
    for method in sorted(methods, key=lambda m: float(np.mean([c.nll(m) for c in of_case if m in c.windows]))):
        shown = []
        for cell in of_case:
            if method not in cell.windows:
                shown.append("")
                continue
            by_seed = [
                row.nll
                for result in results
                for row in result.rows
                if (row.method, row.budget) == (method, cell.budget)
            ]
            value = f"{np.exp(cell.nll(method)):,.2f}"
            spread = f" ({np.exp(min(by_seed)):,.2f} to {np.exp(max(by_seed)):,.2f})" if len(by_seed) > 1 else ""
            shown.append(f"**{value}**{spread}" if method == cell.best else value + spread)
        cost = next(cell.cost[method] for cell in of_case if method in cell.cost)
        yield f"| {method} | {cost:,.0f} | {' | '.join(shown)} |"

"""The report of a bench: results.csv, report.md and figures."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, permutations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from coopq.core.files import atomic_file
from coopq.core.versions import installed
from coopq.judge.bench.aggregate import above_lowest, average_over_seeds, check_pandas, method_names, tidy
from coopq.judge.bench.config import Bench, Case
from coopq.judge.bench.results import Result
from coopq.judge.references import ORIGINAL, UNIFORM
from coopq.plan.confidence import confidence
from coopq.plan.methods import names
from coopq.report.bench_plots import save_figures

if TYPE_CHECKING:  # pandas is optional
    import pandas as pd

_EDGES = (2.0, 2.5, 3.0, 3.5, 4.0)
"""Edges of the ranges of average bits that the paper's tables have; a range holds its upper edge."""
_OF_ALL_CASES = ("ranking.png", "cost.png")
_PAPER_METHODS = names(is_in_paper=True)


def save_report(bench: Bench, results: Sequence[Result], out: Path) -> list[Path]:
    """Write results.csv, report.md and the figures into a folder.

    Args:
        bench: What was asked for.
        results: The result of each run.
        out: The folder.
    Returns:
        The files written; figures are left out without matplotlib.
    Raises:
        BackendError: If pandas is not installed.
    """
    check_pandas()
    rows = tidy(results)
    figures = save_figures(bench, results, average_over_seeds(rows), out)
    texts = {
        out / "results.csv": rows.drop(columns=["cost", "windows"]).to_csv(index=False, lineterminator="\n"),
        out / "report.md": markdown(bench, results, figures),
    }
    for path, text in texts.items():
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [*texts, *(out / figure for figure in figures)]


def markdown(bench: Bench, results: Sequence[Result], figures: Sequence[str] = ()) -> str:
    """The report.

    Args:
        bench: What was asked for.
        results: The result of each run.
        figures: File names of figures to show.
    """
    rows = tidy(results)
    cells = average_over_seeds(rows)
    methods = method_names(cells)
    others = [method for method in methods if method != "active"]
    lines = [
        f"# {bench.title}",
        "",
        *_provenance(bench),
        "",
        "## All cases",
        "",
        *_images(figure for figure in figures if figure in _OF_ALL_CASES),
        *_summary(cells, rows["loss"].unique()),
    ]
    lines += ["", "## The paper's method against its baselines", "", *_against(cells, "coopq", _PAPER_METHODS)]
    lines += ["", "## The active search against everything else", "", *_against(cells, "active", others)]
    lines += ["", "## In the form of the paper's tables", "", *_paper_form(bench, cells)]
    lines += _equal_bytes(bench, cells)
    lines += ["", "## Who beats whom", "", *_wins(cells, methods)]
    for case in bench.cases:
        runs = [result for result in results if result.case == case.name]
        lines += ["", *_case(case, runs, rows[rows["case"] == case.name], cells.xs(case.name, level="case"))]
    lines += ["", *_images(figure for figure in figures if figure not in _OF_ALL_CASES)]
    return "\n".join(lines).rstrip() + "\n"


def _images(figures: Iterable[str]) -> Iterator[str]:
    """Figures in Markdown, in the form that all readers show."""
    for figure in figures:
        if figure.endswith(".png"):
            yield from (f"![{figure.removesuffix('.png')}]({figure})", "")


def _provenance(bench: Bench) -> list[str]:
    judged = "all" if bench.judge_tokens is None else f"the first {bench.judge_tokens:,}"
    return [
        f"Judged on {judged} tokens of the WikiText-2 test split in windows of {bench.judge_length}, which no method",
        "sees. Intervals: 95 %, paired bootstrap over windows, of the mean over seeds. Cost: block forwards for all",
        "budgets of a case together, prefixes shared, in forwards of the whole model over the calibration tokens.",
        f"{installed()}.",
        *(["", f"Not finished, and left out: {', '.join(bench.unfinished)}."] if bench.unfinished else []),
    ]


def _summary(cells: "pd.DataFrame", losses: Sequence[str]) -> Iterator[str]:
    """Each method over all cells: how often its loss is lowest, how far above the lowest, and the cost."""
    import pandas as pd

    above = above_lowest(cells).groupby("method", sort=False)
    mean, n = above.mean().sort_values("nll", kind="stable"), above.size()
    is_lowest = (above_lowest(cells)["nll"] <= 0).groupby("method").sum()
    stderr, worst, cost = above["nll"].sem(), above["nll"].max(), cells["cost"].groupby("method").median()
    yield from _lines(
        pd.DataFrame(
            {
                "method": method,
                "lowest in": f"{is_lowest[method]} of {n[method]}",
                "NLL above the lowest, mean ± standard error": f"{row.nll:.4f} ± {stderr[method]:.4f}",
                "worst": f"{worst[method]:.4f}",
                f"calibration loss ({', '.join(losses)}) above the lowest, mean": f"{row.calibration_loss:.4f}",
                "cost, median": f"{cost[method]:,.0f}",
            }
            for method, row in mean.iterrows()
        )
    )


def _against(cells: "pd.DataFrame", ours: str, others: Sequence[str]) -> Iterator[str]:
    """One method against the best of other methods, cell by cell."""
    import pandas as pd

    found, changes = [], []
    for (case, budget), cell in cells.groupby(["case", "budget"], sort=False):
        cell = cell.droplevel(["case", "budget"])
        rivals = [method for method in others if method in cell.index]
        if ours not in cell.index or not rivals:
            continue
        nll = cell["nll"]
        best = nll[rivals].idxmin()
        sure = confidence(cell["windows"][ours], cell["windows"][best])
        least, most = (np.expm1(-np.array(sure.interval or (np.nan, np.nan))) * 100)[::-1]
        change = float(np.expm1(nll[ours] - nll[best]) * 100)
        changes.append((change, least, most))
        found.append(
            {
                "case": case,
                "budget": budget,
                ours: f"{np.exp(nll[ours]):,.2f}",
                "best of the others": best,
                "its perplexity": f"{np.exp(nll[best]):,.2f}",
                "change of perplexity": f"{change:+.1f} % ({least:+.1f} to {most:+.1f})",
            }
        )
    if not found:
        yield f"{ours} or what it is compared with was not asked for."
        return
    lower = [most for change, _, most in changes if change < 0]
    higher = [least for change, least, _ in changes if change > 0]
    yield (
        f"Lower in {len(lower)} of {len(changes)} cells ({sum(most < 0 for most in lower)} beyond the interval), "
        f"higher in {len(higher)} ({sum(least > 0 for least in higher)} beyond)."
    )
    yield ""
    yield from _lines(pd.DataFrame(found))


def _paper_form(bench: Bench, cells: "pd.DataFrame") -> Iterator[str]:
    """Perplexity by range of average bits, of the paper's method and its baselines, at 2 and 4 bits."""
    import pandas as pd

    cases = [case.name for case in bench.cases if case.request.widths.bits == (2, 4)]
    methods = ["coopq", *_PAPER_METHODS, "active"]
    nll = cells.loc[cells.index.isin(cases, "case") & cells.index.isin(methods, "method"), "nll"].reset_index()
    bits = pd.to_numeric(nll["budget"].str.removesuffix("avg"), errors="coerce")  # nan for budgets in other units
    ranges = [f"{low + 0.01:.2f} to {high:g}" for low, high in pairwise(_EDGES)]
    nll["range"] = pd.cut(bits, _EDGES, labels=ranges)
    found = nll.groupby(["case", "method", "range"], observed=True)["nll"].mean()
    table = [
        {"case": case, "method": method, **{name: _perplexity(found.get((case, method, name))) for name in ranges}}
        for case in cases
        for method in methods
        if (case, method) in found.index.droplevel("range")
    ]
    if not table:
        yield "No case has budgets of 2 to 4 average bits between 2 and 4 bits."
        return
    yield "Perplexity at 2 and 4 bits; of several budgets in a range, the geometric mean."
    yield ""
    yield from _lines(pd.DataFrame(table))


def _equal_bytes(bench: Bench, cells: "pd.DataFrame") -> Iterator[str]:
    """Cases of one model and backend at the budgets that they share and that are bytes for any players and widths."""
    import pandas as pd

    sources = [(case.request.model.source, case.request.quantizer.backend) for case in bench.cases]
    for source in dict.fromkeys(sources):
        cases = [case for case, found in zip(bench.cases, sources, strict=True) if found == source]
        layers = {(case.request.widths.embeddings, case.request.widths.routers) for case in cases}
        relative = "avg" if len(layers) == 1 else ("avg", "bpw")  # bits of other weights are other bytes
        in_all = [budget for budget in cases[0].budgets if all(budget in case.budgets for case in cases)]
        shared = [budget for budget in in_all if not budget.endswith(relative)]
        if len(cases) < 2 or not shared:
            continue
        names_of_cases = [case.name for case in cases]
        nll = cells.loc[cells.index.isin(names_of_cases, "case") & cells.index.isin(shared, "budget"), "nll"]
        lowest = list(nll.groupby("budget").idxmin())
        texts = {key: _bold(_perplexity(loss), key in lowest) for key, loss in nll.items()}
        table = [
            {
                "case": case.name,
                "method": method,
                **{budget: texts[case.name, budget, method] for budget in shared},
                "cost": f"{cells['cost'][case.name, shared[0], method]:,.0f}",
            }
            for case in cases
            for method in case.methods
            if all((case.name, budget, method) in texts for budget in shared)
        ]
        yield from ["", f"## {' by '.join(source)} at equal bytes", "", "Perplexity; cost as below.", ""]
        yield from _lines(pd.DataFrame(table))


def _wins(cells: "pd.DataFrame", methods: Sequence[str]) -> Iterator[str]:
    """Cells in which one method is lower than another, and in how many of them beyond the interval."""
    import pandas as pd

    windows = cells["windows"].unstack("method")
    table = pd.DataFrame("", index=list(methods), columns=list(methods))
    for row, column in permutations(methods, 2):
        pairs = windows[[row, column]].dropna().itertuples(index=False, name=None)
        lower = [(ours, theirs) for ours, theirs in pairs if ours.mean() < theirs.mean()]
        sure = sum((confidence(ours, theirs).interval or (0.0,))[0] > 0 for ours, theirs in lower)
        table.loc[row, column] = f"{len(lower)} ({sure})"
    yield "Cells in which the method of the row is lower than the method of the column (and beyond the interval)."
    yield ""
    yield from _lines(table.reset_index(names="method"))


def _case(case: Case, results: Sequence[Result], rows: "pd.DataFrame", cells: "pd.DataFrame") -> Iterator[str]:
    """A case: methods by budgets, with the spread over seeds."""
    import pandas as pd

    text, first = case.request.text, results[0]
    yield f"## {case.name}"
    yield ""
    yield (
        f"{text.n_sequences} x {text.sequence_length} tokens of {text.source}, "
        f"{case.request.search.permutations} walks, seeds {', '.join(map(str, case.seeds))}; "
        f"{len(first.players)} players in {first.blocks} blocks."
    )
    yield f"Perplexity, {_references(first)}."
    yield ""
    nll, lowest = cells["nll"], list(cells["nll"].groupby("budget").idxmin())
    spread = rows.groupby(["budget", "method"])["nll"].agg(["min", "max", "size"])
    texts = {key: _bold(_perplexity(loss), key in lowest) + _spread(spread, key) for key, loss in nll.items()}
    table = [
        {
            "method": method,
            "cost": f"{cells['cost'].xs(method, level='method').iloc[0]:,.0f}",
            **{budget: texts.get((budget, method), "") for budget in nll.index.unique("budget")},
        }
        for method in nll.groupby("method", sort=False).mean().sort_values(kind="stable").index
    ]
    yield from _lines(pd.DataFrame(table))


def _spread(spread: "pd.DataFrame", key: tuple[str, str]) -> str:
    """The lowest and the highest perplexity of seeds; empty for a single seed."""
    if spread["size"][key] < 2:
        return ""
    return f" ({_perplexity(spread['min'][key])} to {_perplexity(spread['max'][key])})"


def _references(result: Result) -> str:
    """Perplexity of the original and of uniform widths."""
    return ", ".join(
        f"{row.method}{'' if row.method == ORIGINAL else f' {row.average_bits:g} bits'} {row.perplexity:,.2f}"
        for row in result.rows
        if row.method in (ORIGINAL, UNIFORM)
    )


def _perplexity(nll: float | None) -> str:
    return "" if nll is None else f"{np.exp(nll):,.2f}"


def _bold(text: str, is_bold: bool) -> str:
    return f"**{text}**" if is_bold else text


def _lines(table: "pd.DataFrame") -> Iterator[str]:
    """A table of texts as lines of Markdown. (`DataFrame.to_markdown` needs a further package.)"""
    yield f"| {' | '.join(table.columns)} |"
    yield f"|{' --- |' * len(table.columns)}"
    for row in table.itertuples(index=False, name=None):
        yield f"| {' | '.join(row)} |"

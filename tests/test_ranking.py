"""The pages of comparisons and benches: which method is called best, and what is said of the others."""

import re
import shlex
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from coopq import Request
from coopq.cli.judge_commands import compare
from coopq.judge.bench.results import Result, Row
from coopq.judge.results import Comparison
from coopq.model.texts import HeldOut
from coopq.report.page.ranking.figures import lines_figure
from coopq.report.page.ranking.page import save_bench_page, save_comparison_page
from coopq.report.page.ranking.rank import Cell, comparison_cells, rank
from tests.pages import checked, many_methods

REQUEST = Request.from_options(model="demo", seed=3, embeddings=True)


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """The page of a comparison of twenty methods."""
    held_out = HeldOut(64, max_tokens=512)
    return save_comparison_page(REQUEST, held_out, many_methods(20), tmp_path / "comparison.html")


def test_methods_are_ranked_with_paired_intervals() -> None:
    ranks = rank(comparison_cells(many_methods(20)))
    assert len(ranks) == 20
    assert ranks[0].method == "active"
    assert ranks[0].above == 0
    assert {one.method for one in ranks[1:2]} == {"method-1"}
    assert all(0.09 < one.above < 0.5 and one.half is not None and one.half < 0.01 for one in ranks[1:])


def test_cells_that_few_methods_have_do_not_decide() -> None:
    def cell(method: str, budget: str, nll: float) -> Cell:
        return Cell("", method, budget, 3.0, method, 0.0, np.array([nll, nll + 1]), 1.0)

    ranks = rank([cell("a", "1", 1.0), cell("a", "2", 9.0), cell("b", "1", 2.0)])
    assert [(one.method, one.above, one.n_cells) for one in ranks] == [("a", 0.0, 2), ("b", 1.0, 1)]
    assert rank([]) == []


def test_a_comparison_of_twenty_methods_is_readable(comparison: Path) -> None:
    page = checked(comparison)
    assert set(page.specs) == {"ranks", "lines"}
    assert len(page.specs["ranks"]["data"]["values"]) == 20
    labels = page.specs["lines"]["layer"][2]["data"]["values"]
    assert len(labels) <= 6
    heights = sorted(label["at"] for label in labels)
    assert min(np.diff(heights)) > 0.01
    assert "active has the lowest loss" in page.text


def test_the_command_of_a_comparison_parses(comparison: Path) -> None:
    (text,) = re.findall("<pre>.*?(coopq compare .*?)</", comparison.read_text(encoding="utf-8"), re.DOTALL)
    _, name, *words = shlex.split(unescape(text))
    given = compare.make_context(name, words).params
    assert Request.from_options(**{key: given[key] for key in REQUEST.options() if key in given}) == REQUEST
    assert (given["judge_tokens"], given["judge_length"]) == (512, 64)
    assert given["budget"] == ("2.5avg", "3.0avg", "3.5avg")
    assert len(given["method"]) == 20


def bench_result(case: str, losses: dict[tuple[str, str], float]) -> Result:
    """A result of two windows, with a loss for each method and budget."""
    rows = [
        Row(
            method=method,
            budget=budget,
            width=None,
            assignment=(4,),
            average_bits=4,
            bits_per_weight=4.25,
            block_forwards=1,
            calibration_loss=nll,
            windows=(nll, nll + 1),
        )
        for (method, budget), nll in losses.items()
    ]
    return Result(
        case=case,
        seed=0,
        request=REQUEST,
        loss="nll",
        blocks=1,
        players=("a",),
        rows=tuple(rows),
        shapley=None,
        covariance=None,
        interactions=((0.0,),),
    )


def test_a_method_alone_in_a_case_is_not_the_best(tmp_path: Path) -> None:
    losses = {
        (method, budget): nll + add
        for method, add in (("coopq", 0.1), ("active", 0.0), ("lim", 0.5))
        for budget, nll in (("2avg", 3.0), ("3avg", 2.0), ("4avg", 1.5))
    }
    results = [bench_result("one", losses), bench_result("two", {("hawq", "2avg"): 9.0})]
    page = checked(save_bench_page("a bench", results, tmp_path / "report.html"))
    assert (
        "active has the lowest loss on WikiText-2, averaged over 3 budgets. All other methods are clearly" in page.text
    )
    assert "Not compared, because they share no budget with active: hawq." in page.text
    assert [row["method"] for row in page.specs["ranks"]["data"]["values"]] == ["active", "coopq", "lim"]


def test_a_single_window_tells_no_two_methods_apart(tmp_path: Path) -> None:
    rows = [replace(row, windows=row.windows[:1]) for row in many_methods(3)]
    page = checked(save_comparison_page(REQUEST, HeldOut(64), rows, tmp_path / "comparison.html"))
    assert "single window, so differences have no interval" in page.text
    assert "clearly worse" not in page.text


def test_uniform_rows_are_called_by_their_width() -> None:
    def row(method: str, width: float | None, average: float) -> Comparison:
        return Comparison(method, None, 1, average, average, "kl", 0.1, 2.0, 7.4, (2.0, 2.0), width=width)

    cells = comparison_cells([row("original", None, 16.0), row("uniform", 5, 7.6), row("uniform", 4, 4.0)])
    assert [cell.label for cell in cells] == ["original", "uniform 5 and wider", "uniform 4"]


def a_cell(method: str, budget: str | None, nll: float) -> Cell:
    """A cell of one case; without a budget it is a reference."""
    return Cell("", method, budget, 3.0, method, 0.0, np.array([nll]), 1.0)


def test_labels_stand_at_their_lines_where_the_axis_is_logarithmic() -> None:
    losses = {"a": 0.1, "b": 0.11, "c": 10.0}
    figure = lines_figure([a_cell(name, "3avg", nll) for name, nll in losses.items()], dict.fromkeys(losses, "#000000"))
    at = {label["method"]: label["at"] for label in figure["layer"][1]["data"]["values"]}
    assert at["a"] == 0.1
    assert 0.11 < at["b"] < 0.15, "apart from a, and not far from its own line"
    assert at["c"] == pytest.approx(10.0)


def test_references_alone_are_a_figure() -> None:
    assert lines_figure([a_cell("uniform", None, 2.0), a_cell("original", None, 1.0)], {})["layer"]

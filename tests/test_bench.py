"""A bench on a real model small enough to run whole, its report, and what its configuration may hold."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coopq.judge.bench.run import Result, Row, run_bench
from coopq.judge.bench.aggregate import cells, wins
from coopq.judge.bench.config import Bench, Case, read_bench
from coopq.report.bench_tables import markdown, save_report, tidy
from coopq.core.errors import BudgetError, EstimationError, RunError
from coopq.core.config import RunConfig
from tests.command_line import command, refused
from tests.conftest import STORIES

SECOND = """[[case]]
backends = ["rtn"]
bits = [[3, 4]]
budgets = ["3.5avg"]
methods = ["zd"]
label = "one-score"
"""
TOML = f"""
title = "Small"
models = ["{STORIES}"]
methods = ["lim", "coopq", "zd", "active"]
permutations = 3
tokens = 128
sequence-length = 64
judge-tokens = 512
judge-length = 64

[[case]]
backends = ["rtn"]
bits = [[2, 4]]
budgets = ["2.5avg", "3avg"]
seeds = [0, 1]

{SECOND}"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "small.toml"
    path.write_text(TOML)
    return path


def test_a_bench_ends_in_tables_and_figures_and_is_not_repeated(config: Path) -> None:
    out = config.parent / "out"
    code, text, err = command("bench", config, "--out", out, "--json")
    assert code == 0, err
    results = [Result.from_json(result) for result in json.loads(text)["results"]]
    assert [(result.case, result.seed) for result in results] == [
        ("stories260k-rtn-2-4", 0),
        ("stories260k-rtn-2-4", 1),
        ("stories260k-rtn-3-4-one-score", 0),
    ]
    first = results[0]
    by_name = {(row.method, row.budget): row for row in first.rows}
    assert set(by_name) == {
        ("full precision", None),
        ("uniform", None),
        *((method, budget) for method in ("random", "lim", "coopq", "zd", "active") for budget in ("2.5avg", "3avg")),
    }
    assert by_name["full precision", None].nll < by_name["active", "3avg"].nll < by_name["active", "2.5avg"].nll
    for budget in ("2.5avg", "3avg"):
        lowest = min(row.calibration_nll for row in first.rows if row.budget == budget)
        assert by_name["active", budget].calibration_nll == lowest, "32 assignments are searched wholly"
    assert len(first.rows[0].windows) == 8
    assert first.shapley is not None
    assert results[2].shapley is None, "nothing walks there"
    assert np.array(first.interactions).shape == (5, 5)
    assert results[0].rows[-1].calibration_nll != results[1].rows[-1].calibration_nll, "other sequences"
    bank = list((out / "runs" / "stories260k-rtn-2-4" / "bank").glob("*.safetensors"))
    assert len(bank) == 2 * 10, "packed and dequantised, once for both seeds"
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert len(rows) == sum(len(result.rows) for result in results)
    assert {row["method"] for row in rows if row["case"] == "stories260k-rtn-3-4-one-score"} == {
        "full precision",
        "uniform",
        "random",
        "zd",
    }
    report = (out / "report.md").read_text()
    both = [by_name["coopq", budget].nll for budget in ("2.5avg", "3avg")]
    seed1 = {(row.method, row.budget): row.nll for row in results[1].rows}
    mean = [np.exp((nll + seed1["coopq", budget]) / 2) for nll, budget in zip(both, ("2.5avg", "3avg"), strict=True)]
    assert f"| stories260k-rtn-2-4 | coopq | {mean[0]:,.2f} | {mean[1]:,.2f} |  |  |" in report
    assert "## stories260k-rtn-2-4" in report
    for line in report.splitlines():
        if line.startswith("!["):
            assert (out / line.split("(")[1].rstrip(")")).is_file()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("journal.jsonl")}
    again = run_bench(read_bench(config), out)
    assert tidy(again) == (out / "results.csv").read_text()
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("journal.jsonl")}, "nothing was opened"


def test_searches_learn_nothing_from_other_methods(config: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.toml"
    alone.write_text(TOML.replace('["lim", "coopq", "zd", "active"]', '["active"]', 1).replace("seeds = [0, 1]", ""))
    (result, *_) = run_bench(read_bench(alone), tmp_path / "out")
    (beside, *_) = run_bench(read_bench(config), config.parent / "out")
    of_active = [row for row in beside.rows if row.method == "active"]
    assert [row for row in result.rows if row.method == "active"] == of_active
    assert of_active[0].layer_forwards > 0


def row(method: str, budget: str | None, windows: list[float], layer_forwards: int = 0) -> Row:
    return Row(method, budget, (2, 4), 3.0, 3.5, layer_forwards, 1.0, tuple(windows))


def toy(rows: list[Row], seed: int = 0, case: str = "toy") -> Result:
    config = {"model": "m", "backend": "rtn", "low": 2, "high": 4, "granularity": "block"}
    return Result(case, seed, config, 2, ("a", "b"), tuple(rows), None, None, ((0.0, 0.1), (0.1, 0.0)))


def test_what_is_finished_can_be_reported_while_the_rest_goes_on(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "nothing that 'Small' asks for is finished" in refused("bench", config, "--out", out, "--so-far")
    command("bench", config, "--out", config.parent / "out")
    (out / "results").mkdir(parents=True)
    name = "stories260k-rtn-2-4-seed1.json"
    data = json.loads((config.parent / "out" / "results" / name).read_text())
    del data["asked"]["config"]["loss"]  # as a version before this setting wrote it
    (out / "results" / name).write_text(json.dumps(data))
    code, text, err = command("bench", config, "--out", out, "--so-far", "--json")
    assert code == 0, err
    assert [result["seed"] for result in json.loads(text)["results"]] == [1]
    report = (out / "report.md").read_text()
    assert "left out: stories260k-rtn-2-4 (seeds 0), stories260k-rtn-3-4-one-score (seeds 0)." in report
    assert not (out / "runs").exists()


def test_who_wins_by_hand() -> None:
    references = [row("full precision", None, [0.5, 0.5]), row("uniform", None, [1.0, 1.0])]
    first = toy([*references, row("coopq", "3avg", [1.0, 2.0], 60), row("lim", "3avg", [2.0, 3.0], 2)])
    second = toy([*references, row("coopq", "3avg", [1.0, 4.0], 40), row("lim", "3avg", [2.0, 3.0], 2)], seed=1)
    (cell,) = cells([first, second])
    assert cell.windows["coopq"].tolist() == [1.0, 3.0], "the mean over seeds"
    assert cell.cost["coopq"] == 25
    assert cell.best == "coopq"
    matrix = wins([cell], ["coopq", "lim"])
    assert matrix[0, 1] == 1
    assert matrix[1, 0] == 0
    assert np.isnan(matrix[0, 0])
    shown = markdown(Bench("Toy", (), None, 64), [first, second])
    assert "Lower in 1 of 1 cells (0 beyond the interval), higher in 0 (0 beyond)." in shown
    assert f"| toy | 3avg | {np.exp(2):.2f} | lim | {np.exp(2.5):.2f} | {np.expm1(-0.5) * 100:+.1f} % " in shown
    assert "| coopq | 1 of 1 | 0.0000 ± nan | 0.0000 | 0.0000 | 25 |" in shown


def test_cases_that_share_budgets_in_bytes_stand_side_by_side() -> None:
    blocks = RunConfig("m", "rtn")
    fused = replace(blocks, granularity="fused")
    cases = tuple(Case(config, ("3avg", "3bpw"), ("coopq", "lim"), (0,)) for config in (blocks, fused))
    references = [row("full precision", None, [0.5, 0.5]), row("uniform", None, [1.0, 1.0])]
    results = [
        toy(
            [*references, *(row(method, budget, [nll, nll], 60) for method in ("coopq", "lim") for budget in budgets)],
            case=case.name,
        )
        for case, nll, budgets in zip(cases, (2.0, 1.5), [case.budgets for case in cases], strict=True)
    ]
    shown = markdown(Bench("Toy", cases, None, 64), results)
    assert "## m by rtn at equal bytes" in shown
    assert "| case | method | 3bpw | cost |" in shown, "equal average bits may be other bytes"
    assert f"| m-rtn-2-4 | lim | {np.exp(2):.2f} | 30 |" in shown
    assert f"| m-rtn-2-4-fused | coopq | **{np.exp(1.5):.2f}** | 30 |" in shown
    assert "equal bytes" not in markdown(Bench("Toy", cases[:1], None, 64), results[:1]), "there is nothing beside it"


@pytest.mark.parametrize(
    ("before", "after", "error", "message"),
    [
        ('"lim", "coopq"', '"limm", "coopq"', EstimationError, "'lim'"),
        ("permutations = 3", "permutation = 3", RunError, "'permutations'"),
        ("[[2, 4]]", "[2, 4]", RunError, "write lists of widths"),
        ("tokens = 128", "tokens = 100", RunError, "not a multiple"),
        ('"2.5avg", "3avg"', '"2.5avg", "5avg"', BudgetError, "5avg"),
        (
            SECOND,
            SECOND.replace("3, 4", "2, 4").replace("one-score", ""),
            RunError,
            "two cases are stories260k-rtn-2-4",
        ),
        ('"one-score"', '"../one"', RunError, "label = '../one'"),
        ('title = "Small"', "title = Small", RunError, "cannot be read as TOML"),
        ("methods =", "method =", RunError, "'methods'"),
    ],
)
def test_mistakes_are_found_before_anything_is_measured(
    before: str, after: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(TOML.replace(before, after, 1))
    with pytest.raises(error, match=message.replace("[", ".")):
        run_bench(read_bench(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    assert "nowhere.toml" in refused("bench", tmp_path / "nowhere.toml", "--out", tmp_path / "out")


def test_reports_are_the_same_from_the_same_results(config: Path, tmp_path: Path) -> None:
    bench = read_bench(config)
    results = run_bench(bench, config.parent / "out")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        save_report(bench, results, tmp_path / folder)
    for path in (tmp_path / "one").iterdir():
        if path.suffix in (".csv", ".md", ".svg"):
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()

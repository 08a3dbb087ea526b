"""A bench on a real model small enough to run whole, its report, and what its configuration may hold."""

import csv
import json
import sys
from itertools import product
from pathlib import Path

import msgspec
import numpy as np
import pytest

from coopq.core.errors import BackendError, BudgetError, EstimationError, RunError
from coopq.judge.bench.aggregate import tidy
from coopq.judge.bench.config import read_bench
from coopq.judge.bench.results import Result
from coopq.judge.bench.run import pair_terms, run_bench
from coopq.report.bench_tables import markdown, save_report
from coopq.search import Measured, SearchSpace
from tests.command_line import FAST, command, refused
from tests.conftest import STORIES

NO_FIGURES = "no figures are drawn: they need the package matplotlib; run: pip install 'coopq[plot]'"
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
    results = msgspec.convert(json.loads(text)["results"], list[Result])
    assert [(result.case, result.seed) for result in results] == [
        ("stories260k-rtn-2-4", 0),
        ("stories260k-rtn-2-4", 1),
        ("stories260k-rtn-3-4-one-score", 0),
    ]
    first = results[0]
    by_name = {(row.method, row.budget): row for row in first.rows}
    assert set(by_name) == {
        ("original", None),
        ("uniform", None),
        *((method, budget) for method in ("random", "lim", "coopq", "zd", "active") for budget in ("2.5avg", "3avg")),
    }
    assert by_name["original", None].nll < by_name["active", "3avg"].nll < by_name["active", "2.5avg"].nll
    for budget in ("2.5avg", "3avg"):
        lowest = min(row.calibration_loss for row in first.rows if row.budget == budget)
        assert by_name["active", budget].calibration_loss == lowest, "32 assignments are searched wholly"
    assert len(first.rows[0].windows) == 8
    assert first.shapley is not None
    assert results[2].shapley is None, "nothing walks there"
    assert np.array(first.interactions).shape == (5, 5)
    assert results[0].rows[-1].calibration_loss != results[1].rows[-1].calibration_loss, "other sequences"
    bank = list((out / "runs" / "stories260k-rtn-2-4" / "bank").glob("*.safetensors"))
    assert len(bank) == 10, "once for both seeds"
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert len(rows) == sum(len(result.rows) for result in results)
    assert {row["method"] for row in rows if row["case"] == "stories260k-rtn-3-4-one-score"} == {
        "original",
        "uniform",
        "random",
        "zd",
    }
    report = (out / "report.md").read_text()
    assert report.index("](ranking.png)") < report.index("](cost.png)") < report.index("| method | lowest in |")
    assert all(path.stat().st_size < 200_000 for path in (*out.glob("*.png"), *out.glob("*.svg")))
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
    assert tidy(again)["nll"].tolist() == [float(row["nll"]) for row in rows]
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("journal.jsonl")}, "nothing was opened"


def test_interactions_are_what_two_players_lose_beyond_their_sum() -> None:
    space = SearchSpace.uniform((2, 4), np.full(5, 10))
    q = np.array(list(product((False, True), repeat=5)))
    measured = Measured(space)
    together = 0.2 * (q[:, 0] & q[:, 1]) - 0.1 * (q[:, 2] & q[:, 3])
    measured.add(space.assignments(q), 3 + q @ np.arange(1.0, 6) / 10 + together)
    found = pair_terms(space, measured)
    expected = np.zeros((5, 5))
    expected[0, 1] = expected[1, 0] = 0.2
    expected[2, 3] = expected[3, 2] = -0.1
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_searches_learn_nothing_from_other_methods(config: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.toml"
    alone.write_text(TOML.replace('["lim", "coopq", "zd", "active"]', '["active"]', 1).replace("seeds = [0, 1]", ""))
    (result, *_) = run_bench(read_bench(alone), tmp_path / "out")
    (beside, *_) = run_bench(read_bench(config), config.parent / "out")
    active = [row for row in beside.rows if row.method == "active"]
    assert [row for row in result.rows if row.method == "active"] == active
    assert active[0].block_forwards > 0


def test_what_is_finished_can_be_reported_while_the_rest_goes_on(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "nothing that 'Small' asks for is finished" in refused("bench", config, "--out", out, "--so-far")
    command("bench", config, "--out", config.parent / "out")
    (out / "results").mkdir(parents=True)
    name = "stories260k-rtn-2-4-seed1.json"
    (out / "results" / name).write_text((config.parent / "out" / "results" / name).read_text())
    code, text, err = command("bench", config, "--out", out, "--so-far", "--json")
    assert code == 0, err
    assert [result["seed"] for result in json.loads(text)["results"]] == [1]
    report = (out / "report.md").read_text()
    assert "left out: stories260k-rtn-2-4 (seeds 0), stories260k-rtn-3-4-one-score (seeds 0)." in report
    assert not (out / "runs").exists()


@pytest.mark.parametrize(
    ("before", "after", "error", "message"),
    [
        ('"lim", "coopq"', '"limm", "coopq"', EstimationError, "'lim'"),
        ("permutations = 3", "permutation = 3", RunError, "did you mean 'permutations'"),
        ("seeds = [0, 1]", "seed = 1", RunError, "did you mean 'seeds'"),
        ("permutations = 3", "sequence_length = 64", RunError, "'sequence-length' is given twice"),
        ("permutations = 3", "loss = 'kll'", RunError, "choose from nll, kl"),
        ("judge-tokens = 512", "judge-tokens = 'all'", RunError, "judge-tokens = 'all' does not fit"),
        ("permutations = 3", "fit-tokens = 64", BackendError, "fits its weights to no text"),
        ("[[2, 4]]", "[2, 4]", RunError, "write lists of widths"),
        ("tokens = 128", "tokens = 100", RunError, "not a positive multiple"),
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


def test_a_case_overrides_the_top_in_either_spelling(tmp_path: Path) -> None:
    (path := tmp_path / "two.toml").write_text(TOML.replace("[[case]]", "[[case]]\nsequence_length = 32", 1))
    assert [case.request.text.sequence_length for case in read_bench(path).cases] == [32, 64]


def test_results_of_another_version_are_refused(config: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "stories260k-rtn-2-4-seed0.json").write_text('{"format_version": 1}')
    with pytest.raises(RunError, match="format 1, and this version of coopq reads 4; delete the file"):
        run_bench(read_bench(config), tmp_path)


def test_a_divergence_is_not_called_a_likelihood(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["--budget", "3avg", "--method", "lim", "--judge-tokens", "512", "--judge-length", "64"]
    code, text, err = command("compare", STORIES, "--run", run, *FAST, *arguments, "--loss", "kl")
    assert code == 0, err
    assert "nll" not in text.lower().split()
    saved = (run / "comparison.json").read_text()
    assert "calibration_nll" not in saved
    rows = json.loads(saved)["comparison"]
    assert {row["loss"] for row in rows} == {"kl"}
    full = next(row for row in rows if row["method"] == "original")
    assert full["calibration_loss"] == pytest.approx(0, abs=1e-6) != full["nll"]
    (path := tmp_path / "kl.toml").write_text(
        TOML.split("[[case]]")[0] + "loss = 'kl'\n[[case]]\n" + SECOND.removeprefix("[[case]]")
    )
    results = run_bench(read_bench(path), tmp_path / "out")
    first = tidy(results).iloc[0]
    assert (first["method"], first["loss"]) == ("original", "kl")
    assert first["calibration_loss"] == pytest.approx(0, abs=1e-6)
    assert "calibration loss (kl) above the lowest" in markdown(read_bench(path), results)


def test_without_matplotlib_everything_but_figures_is_written(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    caplog.set_level("INFO", "coopq")
    files = save_report(read_bench(config), run_bench(read_bench(config), config.parent / "out"), tmp_path)
    assert [path.name for path in files] == ["results.csv", "report.md"]
    assert [line for line in caplog.messages if "coopq[plot]" in line] == [NO_FIGURES], "one line"
    caplog.clear()
    assert "![" not in (tmp_path / "report.md").read_text()
    arguments = ["--budget", "3avg", "--method", "lim", "--judge-tokens", "512", "--judge-length", "64"]
    code, text, err = command("compare", STORIES, "--run", tmp_path / "run", *FAST, *arguments)
    assert code == 0, err
    assert NO_FIGURES in caplog.messages
    assert text.rstrip().endswith("comparison.html")
    assert not list((tmp_path / "run").glob("comparison.[ps]*"))


def test_without_pandas_a_bench_is_refused_before_anything_is_measured(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert "pip install 'coopq[bench]'" in refused("bench", config, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_reports_are_the_same_from_the_same_results(config: Path, tmp_path: Path) -> None:
    bench = read_bench(config)
    results = run_bench(bench, config.parent / "out")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        save_report(bench, results, tmp_path / folder)
    for path in (tmp_path / "one").iterdir():
        if path.suffix in (".csv", ".md", ".svg"):
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()

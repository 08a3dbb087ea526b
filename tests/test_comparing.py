"""Methods beside each other: none learns from another, and what cannot be judged is refused before the work."""

from dataclasses import replace
from pathlib import Path

import pytest

from coopq.core.specs import Request
from coopq.game.prepared import prepare
from coopq.game.run_folder import RunFolder
from coopq.game.session import open_session
from coopq.judge.bench.config import read_bench
from coopq.judge.bench.run import run_bench
from coopq.judge.comparison import beside_references, compare
from coopq.model.texts import HeldOut
from coopq.plan.plan import Plan, load_plans
from tests.command_line import refused
from tests.conftest import STORIES

REQUEST = Request.from_options(model=str(STORIES), permutations=3, tokens=256, sequence_length=64)
TEXT = HeldOut(64, 512)
BENCH = f"""
models = ["{STORIES}"]
backends = ["rtn"]
bits = [[2, 4]]
budgets = ["3avg"]
methods = ["coopq"]
permutations = 3
tokens = 128
sequence-length = 64
judge-tokens = 512
judge-length = 64
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (path := tmp_path / "small.toml").write_text(BENCH)
    return path


@pytest.mark.parametrize("screen_tokens", [None, 64])
def test_what_a_search_finds_and_takes_depends_on_no_other_method(screen_tokens: int | None, tmp_path: Path) -> None:
    plans: list[list[Plan]] = []
    for methods in (["greedy-down", "active"], ["active", "greedy-down"]):
        run = tmp_path / methods[0]
        compare(REQUEST.replace(screen_tokens=screen_tokens), ["3avg"], run, TEXT, methods=methods)
        plans.append(load_plans(sorted(RunFolder(run).plans.glob("*.json"))))
    assert [plan.method for plan in plans[0]] == ["active", "greedy-down"]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("judge-tokens = 512", "judge-tokens = -5", "no window of 64 tokens fits into -5 tokens"),
        ("judge-tokens = 512", "judge-tokens = 63", "no window of 64 tokens fits into 63 tokens"),
        (f'["{STORIES}"]', "[]", "models = [] does not fit"),
        ('["3avg"]', "[]", "budgets = [] does not fit"),
        ('["3avg"]', '["40 MiB", "40MiB"]', "names '40MiB' twice"),
        ('["3avg"]', '["much"]', "budget 'much' cannot be read"),
        ("permutations = 3", "seeds = [0, 0]", "names 0 twice"),
    ],
)
def test_what_a_bench_cannot_do_is_refused_before_the_work(
    before: str, after: str, message: str, config: Path, tmp_path: Path
) -> None:
    config.write_text(BENCH.replace(before, after))
    assert message in refused("bench", config, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_budgets_of_a_bench_are_those_of_its_rows(config: Path) -> None:
    config.write_text(BENCH.replace("3avg", " 40  MiB "))
    assert read_bench(config).cases[0].budgets == ("40MiB",)


def test_a_uniform_row_has_the_width_that_was_asked(tmp_path: Path) -> None:
    with open_session(prepare(REQUEST), tmp_path / "run") as session:
        n_bytes = {width: list(sizes) for width, sizes in session.sizes.n_bytes.items()}
        n_bytes[4][0] = None  # the first player has no width but 2
        lacking = replace(session.sizes, n_bytes={width: tuple(sizes) for width, sizes in n_bytes.items()})
        judged = beside_references(replace(session, sizes=lacking), [], 0, TEXT)
    assert [(one.method, one.width) for one in judged] == [("original", None), ("uniform", 4), ("uniform", 2)]
    assert judged[1].assignments[0].tolist() == [2, 4, 4, 4, 4]


def test_a_bench_passes_over_an_estimation_of_other_walks(config: Path, tmp_path: Path) -> None:
    (walked,) = run_bench(read_bench(config), tmp_path / "out")
    assert walked.shapley is not None
    config.write_text(BENCH.replace('["coopq"]', '["zd"]').replace("permutations = 3", "permutations = 4"))
    (scored,) = run_bench(read_bench(config), tmp_path / "out")
    assert scored.shapley is None

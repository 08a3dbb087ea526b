"""Methods beside each other: none learns from another, and what cannot be judged is refused before the work."""

from pathlib import Path

import pytest

from coopq.core.specs import Request
from coopq.game.run_folder import RunFolder
from coopq.judge.bench.config import read_bench
from coopq.judge.bench.run import run_bench
from coopq.judge.comparison import compare
from coopq.model.texts import HeldOut
from coopq.plan.plan import Plan, load_plans
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


def test_a_bench_passes_over_an_estimation_of_other_walks(config: Path, tmp_path: Path) -> None:
    (walked,) = run_bench(read_bench(config), tmp_path / "out")
    assert walked.shapley is not None
    config.write_text(BENCH.replace('["coopq"]', '["zd"]').replace("permutations = 3", "permutations = 4"))
    (scored,) = run_bench(read_bench(config), tmp_path / "out")
    assert scored.shapley is None

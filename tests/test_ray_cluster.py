"""The game on a Ray cluster of two workers: the same numbers, whatever happens to a worker."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coopq.game.ray_cluster import Cluster, RayConfig
from coopq.plan.methods import plans_on
from coopq.core.config import CalibrationConfig, RunConfig
from coopq.core.sizes import Budget
from coopq.core.types import Assignments
from coopq.game.session import Workbench, open_workbench
from tests.command_line import FAST, in_new_process, refused
from tests.conftest import STORIES

CONFIG = RunConfig(str(STORIES), permutations=6, calibration=CalibrationConfig(sequences=4, length=64))
EVERY: Assignments = np.where(np.arange(32)[:, None] >> np.arange(5) & 1, 2, 4).astype(np.float32)

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    with open_workbench(CONFIG, tmp_path_factory.mktemp("ray"), ray=RayConfig("local", 2)) as opened:
        yield opened


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    with open_workbench(CONFIG, tmp_path_factory.mktemp("alone")) as opened:
        yield opened


def test_two_workers_measure_what_one_process_does_and_plan_the_same(bench: Workbench, alone: Workbench) -> None:
    budgets = [Budget.parse("2.5avg"), Budget.parse("3.3avg")]
    ours, theirs = ([p for m in ("active", "coopq") for p in plans_on(b, m, budgets)] for b in (bench, alone))
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        assert replace(ours_, config={}) == replace(theirs_, config={})
    assert journal(bench) == journal(alone)


def journal(bench: Workbench) -> dict[bytes, float]:
    with bench.calibration_game("reading") as game:
        points, losses = game.journal.first(1000)
    return dict(zip((point.tobytes() for point in points), losses.tolist(), strict=True))


def test_a_worker_killed_in_the_middle_costs_nothing_but_its_chunk(bench: Workbench, alone: Workbench) -> None:
    cluster = bench.cluster
    assert cluster is not None
    doomed = cluster._ray.get(cluster.workers[0].process.remote())
    name, tokens = "other tokens", bench.calibration.tokens[:, ::-1].copy()
    found: dict[bytes, float] = {}
    for assignment, losses, _ in cluster.evaluate(name, tokens, EVERY, "nll"):
        if not found:
            os.kill(doomed, signal.SIGKILL)
        assert assignment.tobytes() not in found, "no value comes twice"
        found[assignment.tobytes()] = float(losses.mean())
    assert len(found) == len(EVERY)
    assert cluster._ray.get(cluster.workers[0].process.remote()) != doomed, "another took its place"
    reversed_ = replace(alone.calibration, tokens=tokens)
    with alone.game(reversed_, alone.folder.path / "reversed.jsonl", "reversed") as game:
        expected = game(EVERY)
    np.testing.assert_array_equal([found[row.tobytes()] for row in EVERY], expected)


def test_idle_workers_repeat_what_began_first_and_only_once() -> None:
    first, second = EVERY[:2], EVERY[2:4]
    running = {1: (None, first), 2: (None, second)}
    assert Cluster._slowest(running, set()) is first
    assert Cluster._slowest({**running, 3: (None, first)}, set()) is second
    assert Cluster._slowest(running, {first.tobytes(), second.tobytes()}) is None


def test_the_main_job_on_a_cluster_started_here(tmp_path: Path) -> None:
    arguments: list[str | Path] = ["quantize", STORIES, "--budget", "3avg", "--tokens", "128"]
    arguments += ["--sequence-length", "64", "--out", tmp_path / "out", "--ray-address", "local", "--workers", "2"]
    code, out, err = in_new_process(*arguments)
    assert code == 0, err
    assert "saved in" in out


def test_a_cluster_that_is_not_there_is_named(tmp_path: Path) -> None:
    code, _, err = in_new_process("estimate", STORIES, "--run", tmp_path / "run", "--ray-address", "127.0.0.1:1", *FAST)
    assert code == 2
    assert "error: no Ray cluster at '127.0.0.1:1'" in err.splitlines()[-1]
    assert "--ray-address" in refused("estimate", STORIES, "--run", tmp_path / "run", "--workers", "2")

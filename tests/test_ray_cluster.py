"""The game on a Ray cluster of two workers: the same numbers, whatever happens to a worker."""

import os
import signal
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from coopq.core.sizes import Budget
from coopq.core.specs import Request, SolverSpec
from coopq.core.types import Assignments
from coopq.game.engines.ray_cluster import Cluster, RayConfig, _slowest
from coopq.game.engines.ray_worker import Worker
from coopq.game.prepared import prepare
from coopq.game.run_folder import RunFolder
from coopq.game.session import Session, open_session
from coopq.plan.methods import make_plans
from tests.command_line import FAST, in_new_process, refused
from tests.conftest import STORIES
from tests.folders import save_source

REQUEST = Request.from_options(model=str(STORIES), permutations=6, tokens=256, sequence_length=64)
EVERY: Assignments = np.where(np.arange(32)[:, None] >> np.arange(5) & 1, 2, 4).astype(np.float32)

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with open_session(prepare(REQUEST), tmp_path_factory.mktemp("ray"), ray=RayConfig("local", 2)) as opened:
        yield opened


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with open_session(prepare(REQUEST), tmp_path_factory.mktemp("alone")) as opened:
        yield opened


def test_two_workers_measure_what_one_process_does_and_plan_the_same(session: Session, alone: Session) -> None:
    budgets = [Budget.parse("2.5avg"), Budget.parse("3.3avg")]
    on_cluster, in_one_process = (
        [plan for method in ("active", "coopq") for plan in make_plans(opened, method, budgets, SolverSpec())]
        for opened in (session, alone)
    )
    assert on_cluster == in_one_process
    assert journal(session) == journal(alone)


def journal(session: Session) -> dict[bytes, float]:
    with session.game("reading") as game:
        points, losses = game.journal.first(1000)
    return dict(zip((point.tobytes() for point in points), losses.tolist(), strict=True))


def test_a_worker_killed_in_the_middle_costs_nothing_but_its_chunk(session: Session, alone: Session) -> None:
    cluster = session.cluster
    assert isinstance(cluster, Cluster)
    doomed = cluster._ray.get(cluster.workers[0].process.remote())
    name, tokens = "other tokens", session.calibration.tokens[:, ::-1].copy()
    found: dict[bytes, float] = {}
    for assignment, losses, _ in cluster.evaluate(name, tokens, EVERY, "nll"):
        if not found:
            os.kill(doomed, signal.SIGKILL)
        assert assignment.tobytes() not in found, "no value comes twice"
        found[assignment.tobytes()] = float(losses.mean())
    assert len(found) == len(EVERY)
    assert cluster._ray.get(cluster.workers[0].process.remote()) != doomed, "another took its place"
    backwards = replace(alone.calibration, tokens=tokens)
    with alone.game_on(backwards, alone.folder.path / "backwards.jsonl", "backwards") as game:
        expected = game(EVERY)
    np.testing.assert_array_equal([found[row.tobytes()] for row in EVERY], expected)


def test_idle_workers_repeat_what_began_first_and_only_once() -> None:
    first, second = EVERY[:2], EVERY[2:4]
    running = {1: (None, first), 2: (None, second)}
    assert _slowest(running, set()) is first
    assert _slowest({**running, 3: (None, first)}, set()) is second
    assert _slowest(running, {first.tobytes(), second.tobytes()}) is None


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A session whose backend fits weights to text, of a model whose rows have K-quants."""
    folder = tmp_path_factory.mktemp("fitted")
    torch.manual_seed(0)
    size = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = hf.LlamaConfig(vocab_size=512, num_hidden_layers=2, **size, bos_token_id=1, eos_token_id=2)
    save_source(hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32), folder / "model")
    text = {"tokens": 128, "sequence_length": 64, "fit_tokens": 256}
    request = Request.from_options(model=str(folder / "model"), backend="ggml", bits=(2, 3), **text)
    with open_session(prepare(request), folder / "run") as opened:
        yield opened


def weights_of_bank(session: Session) -> dict[str, Any]:
    """What the weights of a session's bank depend on."""
    return {key: value for key, value in session.fingerprint.items() if key not in ("tokens", "bos", "loss")}


def largest_difference(worker: Worker, session: Session) -> float:
    """Between the weights of a worker and those of a session, over all players and widths."""
    return max(
        float((weight - session.bank.weights(player, bits)[name]).abs().max())
        for player in range(len(session.players))
        for bits in session.request.widths.bits
        for name, weight in worker.bank.weights(player, bits).items()
    )


def test_a_worker_without_the_drivers_disk_fits_the_same_weights(
    fitted: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster in this process: its workers get what a cluster gives them, and cannot see the bank."""
    made: list[Worker] = []

    class Actor:
        @staticmethod
        def remote(*arguments: Any) -> Worker:
            made.append(Worker(*arguments))
            return made[-1]

    ray = types.ModuleType("ray")
    replacements: dict[str, Any] = {
        "kill": lambda _: None,
        "put": lambda value: value,
        "cluster_resources": lambda: {"CPU": torch.get_num_threads()},
        "nodes": lambda: [{"Alive": True}],
        "remote": lambda **_: lambda _: Actor,
    }
    vars(ray).update(replacements)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "worker"))
    far = replace(fitted, folder=RunFolder(fitted.folder.path, bank=tmp_path / "nowhere"))
    weights = weights_of_bank(fitted)
    with Cluster(RayConfig("local", 1), far, weights):
        (worker,) = made
    assert not (tmp_path / "nowhere").exists()
    assert len([*tmp_path.glob("worker/coopq/bank-*/bank.json")]) == 1, "quantized for its machine"
    assert largest_difference(worker, fitted) == 0
    nowhere, threads = str(tmp_path / "nowhere"), torch.get_num_threads()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "astray"))
    request = fitted.request.replace(calibration="nowhere.txt")  # the text lies on the driver's disk alone
    astray = Worker(request, fitted.players, weights, nowhere, fitted.calibration.tokens, fitted.player_widths, threads)
    assert largest_difference(astray, fitted) > 0, "the tokens that weights are fitted to matter"


def test_a_worker_that_sees_the_drivers_disk_uses_its_bank(
    fitted: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokens, threads = fitted.fitting, torch.get_num_threads()
    assert tokens is not None
    bank, weights = str(fitted.folder.bank), weights_of_bank(fitted)
    worker = Worker(fitted.request, fitted.players, weights, bank, tokens.tokens, fitted.player_widths, threads)
    assert largest_difference(worker, fitted) == 0
    assert not any(tmp_path.iterdir()), "the weights are there"


@pytest.mark.slow
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

"""What a run will take, against what runs take."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from coopq.core.errors import OutOfMemory
from coopq.core.sizes import Budget
from coopq.core.specs import Request, SolverSpec, TextSpec
from coopq.game.engines.prefix_engine import make_engine
from coopq.game.session import open_session, prepare
from coopq.model import memory
from coopq.model.load import load_model, load_skeleton
from coopq.model.memory import Footprint, free_memory
from coopq.model.offload import OffloadedBlocks
from coopq.model.players import find_players
from coopq.pipeline import estimate
from coopq.plan.forecast import forecast, forecast_methods
from coopq.plan.methods import make_plans
from tests.command_line import command, refused
from tests.conftest import STORIES

REQUEST = Request.from_options(model=str(STORIES), permutations=4, tokens=256, sequence_length=64)


def test_a_skeleton_has_the_footprint_of_the_model() -> None:
    model, skeleton = load_model(str(STORIES)).model, load_skeleton(str(STORIES))
    assert all(parameter.device.type == "meta" for parameter in skeleton.parameters())
    by_model, by_skeleton = (Footprint.estimate(m, find_players(m), REQUEST.text, "cpu") for m in (model, skeleton))
    assert by_model == by_skeleton
    assert by_model.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert by_model.states == (5 + 3) * 64 * 4 * 256  # blocks, the embedding and two in flight; width, bytes, tokens


def test_the_bank_is_as_large_as_foreseen(tmp_path: Path) -> None:
    prepared = prepare(REQUEST)
    with open_session(prepared, tmp_path) as session:
        weights = [session.bank.weights(player, bits) for player in range(5) for bits in (2, 4)]
    assert sum(tensor.nbytes for by_name in weights for tensor in by_name.values()) == prepared.footprint.dequantized
    packed = [load_file(file) for file in (tmp_path / "bank").glob("*.safetensors")]
    assert sum(tensor.nbytes for by_name in packed for tensor in by_name.values()) == prepared.footprint.bank


def test_dequantized_weights_get_what_a_run_leaves() -> None:
    skeleton = load_skeleton(str(STORIES))
    cpu, gpu = (
        Footprint.estimate(skeleton, find_players(skeleton), REQUEST.text, kind, 2, 1000) for kind in ("cpu", "cuda")
    )
    assert cpu.needed == cpu.total - cpu.dequantized + cpu.at_once + 1000
    assert gpu.needed == gpu.total - gpu.dequantized + gpu.at_once  # packed weights can stay on the host
    assert cpu.room(None) is None
    assert cpu.room(2 * cpu.total) is None
    assert cpu.room(cpu.needed) == cpu.at_once
    half = cpu.room(round(1.1 * (cpu.total - cpu.dequantized)) + cpu.dequantized // 2)
    assert half == cpu.dequantized // 2 - 1000
    assert gpu.room(gpu.blocks + gpu.dequantized) == gpu.at_once
    assert gpu.room(2 * gpu.blocks + gpu.dequantized, offloaded=True) is None


def test_too_little_memory_is_refused_with_what_fits() -> None:
    skeleton = load_skeleton(str(STORIES))
    players = find_players(skeleton)
    footprint = Footprint.estimate(skeleton, players, TextSpec(tokens=1024 * 64, sequence_length=64), "cpu")
    free = footprint.needed - 1
    with pytest.raises(OutOfMemory, match="--tokens") as caught:
        footprint.check(free)
    tokens = int(str(caught.value).split("--tokens ")[1].split()[0])
    Footprint.estimate(skeleton, players, TextSpec(tokens=tokens, sequence_length=64), "cpu").check(free)
    footprint.check(footprint.needed)
    footprint.check(None)
    with pytest.raises(OutOfMemory, match="bfloat16"):
        footprint.check(footprint.weights)


@pytest.fixture
def too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that holds no model, and where none may be loaded."""

    def not_loaded(*_: object, **__: object) -> None:
        raise AssertionError("the model is loaded though it does not fit")

    monkeypatch.setattr("coopq.game.session.free_memory", lambda device: 1000)
    monkeypatch.setattr("coopq.game.session.load_model", not_loaded)


@pytest.mark.usefixtures("too_small")
def test_a_run_that_does_not_fit_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    line = refused("quantize", STORIES, "--budget", "3avg", "--out", tmp_path / "out")
    assert "are free on the cpu" in line
    assert not (tmp_path / "out-run" / "bank").exists()


@pytest.mark.usefixtures("too_small")
def test_a_dry_run_that_does_not_fit_is_refused_before_the_model_is_loaded() -> None:
    line = refused("estimate", STORIES, "--dry-run")
    assert "the run needs" in line
    assert "are free on the cpu" in line


def test_a_model_that_must_be_offloaded_is_forecast_with_offloaded_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU stands for the device: the blocks are on the host, and visit a CPU."""
    on_host: list[bool] = []
    offloaded: list[OffloadedBlocks | None] = []

    def watched_load(*arguments: Any, **options: Any) -> Any:
        on_host.append(options["on_host"])
        return load_model(*arguments, **options)

    def watched_engine(*arguments: Any) -> Any:
        offloaded.append(arguments[-1])
        return make_engine(*arguments)

    monkeypatch.setattr("coopq.game.session.load_model", watched_load)
    monkeypatch.setattr("coopq.plan.forecast.make_engine", watched_engine)
    expected = forecast(REQUEST)
    assert on_host == [False]
    assert offloaded == [None]
    monkeypatch.setattr(Footprint, "must_offload", lambda self, free: True)
    found = forecast(REQUEST)
    assert on_host == [False, True], "the weights stay in the host's memory"
    assert isinstance(offloaded[1], OffloadedBlocks)
    assert found.methods == expected.methods
    assert found.block_seconds > 0
    assert found.head_seconds > 0


def test_free_memory_is_that_of_the_machine_or_of_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_memory("cpu")
    assert free is None or free > 2**20
    if free is not None:
        monkeypatch.setattr(memory, "_left_to_group", lambda: [12345])
        assert free_memory("cpu") == 12345


@pytest.mark.parametrize("granularity", ["block", pytest.param("fused", marks=pytest.mark.slow)])
def test_methods_take_what_was_forecast(granularity: str, tmp_path: Path) -> None:
    request = REQUEST.replace(granularity=granularity)
    prepared = prepare(request)
    expected = forecast_methods(prepared)
    walks = estimate(request, tmp_path / "walks")
    assert expected["coopq, M = 4"].block_forwards == walks.spent.block_forwards
    with open_session(prepared, tmp_path / "run") as session:
        for method in ("greedy-down", "active"):
            (plan,) = make_plans(session, method, [Budget.parse("3avg")], SolverSpec())
            work = expected[method]
            if work.is_bound:
                assert plan.block_forwards <= work.block_forwards
            else:
                assert plan.block_forwards == pytest.approx(work.block_forwards, rel=0.35)


def test_a_run_with_little_memory_has_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.array([[2, 4, 2, 4, 4], [4, 4, 4, 4, 4]], dtype=np.float32)
    found, needed = [], prepare(REQUEST).footprint.needed
    for free in (None, needed):
        monkeypatch.setattr("coopq.game.session.free_memory", lambda device, free=free: free)
        with open_session(prepare(REQUEST), tmp_path / str(free)) as session, session.game("measuring") as game:
            assert (session.bank._room is None) == (free is None)
            found.append(game(points))
    np.testing.assert_array_equal(found[0], found[1])


def test_a_dry_run_says_what_it_would_take_and_leaves_nothing(tmp_path: Path) -> None:
    arguments: list[str | Path] = ["estimate", STORIES, "--dry-run", "--permutations", "4", "--tokens", "256"]
    code, out, err = command(*arguments, "--sequence-length", "64", "--run", tmp_path / "run", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["methods"]["active"]["seconds"] > 0
    assert data["block_seconds"] > 0
    assert not (tmp_path / "run").exists()
    assert prepare(REQUEST).fit()[0].weights == data["footprint"]["weights"]
    code, out, err = command(*arguments, "--sequence-length", "64")
    assert code == 0, err
    assert "greedy-down" in out
    assert "GiB of memory" in out
    assert "of disk" in out


def test_estimate_without_a_folder_says_what_to_do() -> None:
    assert "--dry-run" in refused("estimate", STORIES)

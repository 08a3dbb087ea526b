"""What a run will take, against what runs take."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coopq.model import memory
from coopq.core.errors import OutOfMemory
from coopq.plan.forecast import forecast, works
from coopq.model.memory import Footprint, free_memory
from coopq.plan.methods import plans_on
from coopq.model.load import load_model, load_skeleton
from coopq.pipeline import estimate
from coopq.model.players import find_players
from coopq.core.config import CalibrationConfig, RunConfig
from coopq.core.sizes import Budget
from coopq.game.session import open_workbench
from tests.command_line import command, refused
from tests.conftest import STORIES

CONFIG = RunConfig(str(STORIES), permutations=4, calibration=CalibrationConfig(sequences=4, length=64))


def test_a_skeleton_has_the_footprint_of_the_model() -> None:
    model, skeleton = load_model(str(STORIES)).model, load_skeleton(str(STORIES))
    assert all(parameter.device.type == "meta" for parameter in skeleton.parameters())
    of_model, of_skeleton = (Footprint.of(m, find_players(m), CONFIG.calibration, "cpu") for m in (model, skeleton))
    assert of_model == of_skeleton
    assert of_model.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert of_model.states == (5 + 3) * 64 * 4 * 256  # blocks, the embedding and two in flight; width, bytes, tokens


def test_the_bank_is_as_large_as_foreseen(tmp_path: Path) -> None:
    with open_workbench(CONFIG, tmp_path) as bench:
        expected = Footprint.of(bench.loaded.model, bench.players, CONFIG.calibration, "cpu").bank
        weights = [bench.bank.weights(player, bits) for player in range(5) for bits in (2, 4)]
    assert sum(tensor.nbytes for of_player in weights for tensor in of_player.values()) == expected


def test_too_little_memory_is_refused_with_what_fits() -> None:
    skeleton = load_skeleton(str(STORIES))
    players = find_players(skeleton)
    footprint = Footprint.of(skeleton, players, CalibrationConfig(sequences=1024, length=64), "cpu")
    free = footprint.needed - 1
    with pytest.raises(OutOfMemory, match="--tokens") as caught:
        footprint.check(free)
    tokens = int(str(caught.value).split("--tokens ")[1].split()[0])
    Footprint.of(skeleton, players, CalibrationConfig(sequences=tokens // 64, length=64), "cpu").check(free)
    footprint.check(footprint.needed)
    footprint.check(None)
    with pytest.raises(OutOfMemory, match="bfloat16"):
        footprint.check(footprint.weights)


def test_a_run_that_does_not_fit_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coopq.game.session.free_memory", lambda device: 1000)
    line = refused("quantize", STORIES, "--budget", "3avg", "--out", tmp_path / "out")
    assert "are free on the cpu" in line
    assert not (tmp_path / "out-run" / "bank").exists()


def test_free_memory_is_that_of_the_machine_or_of_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_memory("cpu")
    assert free is None or free > 2**20
    if free is not None:
        monkeypatch.setattr(memory, "_left_to_group", lambda: [12345])
        assert free_memory("cpu") == 12345


@pytest.mark.parametrize("granularity", ["block", "fused"])
def test_methods_take_what_was_forecast(granularity: str, tmp_path: Path) -> None:
    config = replace(CONFIG, granularity=granularity)
    expected = works(find_players(load_skeleton(str(STORIES)), granularity), config)
    assert expected["coopq, M = 4"].layer_forwards == estimate(config, tmp_path / "walks").layer_forwards
    with open_workbench(config, tmp_path / "run") as bench:
        for method in ("greedy-down", "active"):
            (plan,) = plans_on(bench, method, [Budget.parse("3avg")])
            work = expected[method]
            if work.is_bound:
                assert plan.layer_forwards <= work.layer_forwards
            else:
                assert plan.layer_forwards == pytest.approx(work.layer_forwards, rel=0.35)


def test_a_bank_that_is_not_resident_gives_the_same_losses(tmp_path: Path) -> None:
    points = np.array([[2, 4, 2, 4, 4], [4, 4, 4, 4, 4]], dtype=np.float32)
    with open_workbench(CONFIG, tmp_path) as bench, bench.calibration_game("resident") as game:
        resident = game(points)
        bench.bank.resident = False
        bench.bank._weights.clear()
        again = game._engine.evaluate(points)
        np.testing.assert_array_equal([losses.mean() for _, losses, _ in again], resident)
        assert not bench.bank._weights


def test_a_dry_run_says_what_it_would_take_and_leaves_nothing(tmp_path: Path) -> None:
    arguments: list[str | Path] = ["estimate", STORIES, "--dry-run", "--permutations", "4", "--tokens", "256"]
    code, out, err = command(*arguments, "--sequence-length", "64", "--run", tmp_path / "run", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["methods"]["active"]["seconds"] > 0
    assert data["layer_forward"] > 0
    assert not (tmp_path / "run").exists()
    assert forecast(CONFIG).footprint.weights == data["footprint"]["weights"]
    code, out, err = command(*arguments, "--sequence-length", "64")
    assert code == 0, err
    assert "greedy-down" in out
    assert "GiB of memory" in out


def test_estimate_without_a_folder_says_what_to_do() -> None:
    assert "--dry-run" in refused("estimate", STORIES)

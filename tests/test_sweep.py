"""The layer-major order, and blocks that visit the device: the same losses as in depth-first order."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model

from coopq.game.game import prefix_engine as engine_module
from coopq.game.prefix_engine import PrefixEngine, prefix_tree_size
from coopq.core.errors import ModelError, OutOfMemory
from coopq.model.offload import HostedBlocks
from coopq.model.memory import Footprint
from coopq.plan.methods import plans_on
from coopq.model.load import pick_device
from coopq.model.players import find_players
from coopq.core.config import CalibrationConfig, RunConfig
from coopq.core.sizes import Budget
from coopq.game.layer_major_engine import LayerMajorEngine
from coopq.core.types import REMOVED, UNTOUCHED
from coopq.game.session import open_workbench
from tests.architectures import CONFIGS, tiny_model
from tests.conftest import STORIES
from tests.test_engine import TOKENS, build

CPU = torch.device("cpu")


def points(granularity: str) -> Any:
    rng = np.random.default_rng(0)
    found = rng.choice([2, 4], size=(12, 3)).astype(np.float32)
    found[0] = UNTOUCHED
    if granularity == "block":
        found[1, 1] = REMOVED
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_both_orders_give_the_same_losses(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    bank = build(model, tmp_path)
    expected = list(PrefixEngine(model, bank, TOKENS).evaluate(points("block")))
    engine = LayerMajorEngine(model, bank, TOKENS, HostedBlocks(model, CPU))
    for (ours, losses, _), (theirs, of_theirs, _) in zip(engine.evaluate(points("block")), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(losses, of_theirs)


def test_blocks_visit_once_for_each_of_their_settings(tmp_path: Path) -> None:
    model = tiny_model("llama")
    bank = build(model, tmp_path, "linear")
    visits: list[int] = []

    class Counting(HostedBlocks):
        @contextmanager
        def placed(self, d: int) -> Iterator[None]:
            if d not in self._placed:
                visits.append(d)
            with super().placed(d):
                yield

    engine = LayerMajorEngine(model, bank, TOKENS, Counting(model, CPU))
    engine.record()
    n = len(bank.players)
    rows = np.random.default_rng(1).choice([2, 4], size=(1, n)).astype(np.float32)
    ((_, first, spent),) = engine.evaluate(rows)
    assert spent == 3
    visits.clear()
    ((_, again, _),) = engine.evaluate(rows)
    assert visits == [0, 1, 2]
    np.testing.assert_array_equal(first, again)


def test_the_cost_is_that_of_the_prefix_trees_of_chunks() -> None:
    class Many(LayerMajorEngine):
        def __init__(self, n_blocks: int) -> None:
            self.members = [[d] for d in range(n_blocks)]
            self.embedded = []
            self.calls = 0

        def _set(self, d: int, bits: Any) -> None:
            pass

        def placed(self, d: int) -> Any:
            return nullcontext()

        fast = placed

        def _first_block(self, assignment: Any, previous: Any) -> int:
            return int(np.argmax(assignment != previous))

        def forward_block(self, d: int, hidden: Any, room: Any = None) -> Any:
            self.calls += 1
            return hidden

    unique = np.unique(np.random.default_rng(0).choice([2, 4], size=(50, 12)), axis=0).astype(np.float32)
    engine = Many(12)
    spent = sum(of for *_, of in engine._walk(unique, np.zeros(unique.shape, dtype=bool)))
    assert spent == engine.calls == sum(prefix_tree_size(unique[i : i + 6]) for i in range(0, len(unique), 6))


def test_a_block_that_visits_computes_there_and_goes_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a dtype in the part of the device: states in float64 meet no weight that stayed in float32."""
    monkeypatch.setattr(engine_module, "ByOneDNN", lambda module: nullcontext())
    model = tiny_model("qwen3")
    bank = build(model, tmp_path)
    expected = [losses for _, losses, _ in PrefixEngine(model, bank, TOKENS).evaluate(points("block"))]
    at_home = {name: tensor.data_ptr() for name, tensor in model.model.layers.named_parameters()}
    engine = LayerMajorEngine(model, bank, TOKENS, HostedBlocks(model, torch.float64))  # type: ignore[arg-type]
    found = [losses for _, losses, _ in engine.evaluate(points("block"))]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert model.get_output_embeddings().weight.dtype == torch.float64
    assert {name: tensor.data_ptr() for name, tensor in model.model.layers.named_parameters()} == at_home


def test_a_model_with_accelerates_hooks_gives_the_same_losses(tmp_path: Path) -> None:
    """As a model has them that is divided between GPUs: they stand in the place of its modules' forwards."""
    model = tiny_model("gemma2")
    bank = build(model, tmp_path)
    expected = [losses for _, losses, _ in PrefixEngine(model, bank, TOKENS).evaluate(points("block"))]
    dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    hooked = [vars(block)["forward"] for block in model.model.layers]
    found = [losses for _, losses, _ in PrefixEngine(model, bank, TOKENS).evaluate(points("block"))]
    np.testing.assert_array_equal(found, expected)
    assert [vars(block)["forward"] for block in model.model.layers] == hooked


def test_several_gpus_are_asked_for_where_there_are_none() -> None:
    if torch.cuda.device_count() < 2:
        with pytest.raises(ModelError, match="needs several GPUs"):
            pick_device("sharded")


def test_a_search_with_hosted_blocks_ends_with_the_same_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(str(STORIES), calibration=CalibrationConfig(sequences=4, length=64))
    budget = Budget.parse("3avg")
    with open_workbench(config, tmp_path / "whole") as bench:
        (expected,) = plans_on(bench, "active", [budget])
    monkeypatch.setattr(Footprint, "is_hosted", lambda self, free: True)
    with open_workbench(config, tmp_path / "hosted") as bench:
        assert isinstance(bench.engine(bench.calibration), LayerMajorEngine)
        (plan,) = plans_on(bench, "active", [budget])
    assert plan == expected


def test_a_model_larger_than_a_gpu_is_hosted_and_refused_when_not_even_that_fits() -> None:
    model = tiny_model("llama")
    footprint = Footprint.of(model, find_players(model), CalibrationConfig(sequences=4, length=64), "cuda")
    assert footprint.hosted < footprint.needed
    assert footprint.is_hosted(footprint.needed - 1)
    assert not footprint.is_hosted(footprint.needed)
    footprint.check(footprint.hosted)
    with pytest.raises(OutOfMemory, match="--tokens"):
        footprint.check(footprint.hosted - 1)

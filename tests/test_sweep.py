"""Layer-major order and offloaded blocks: the same losses as in depth-first order."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model

from coopq.core.errors import ModelError, OutOfMemory
from coopq.core.sizes import Budget
from coopq.core.specs import Request, SolverSpec, TextSpec
from coopq.core.types import REMOVED, UNTOUCHED
from coopq.game.engines.layer_major_engine import layer_major
from coopq.game.engines.prefix_engine import make_engine, prefix_tree_size
from coopq.game.prepared import prepare
from coopq.game.session import open_session
from coopq.model import blockwise
from coopq.model.load import pick_device
from coopq.model.memory import Footprint
from coopq.model.offload import OffloadedBlocks
from coopq.model.players import find_players
from coopq.plan.methods import make_plans
from tests.architectures import CONFIGS, tiny_model
from tests.conftest import STORIES
from tests.engines import TOKENS, build

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
    expected = list(make_engine(model, bank, TOKENS).evaluate(points("block")))
    engine = make_engine(model, bank, TOKENS, offloaded=OffloadedBlocks(model, CPU))
    for (point, losses, _), expected_row in zip(engine.evaluate(points("block")), expected, strict=True):
        np.testing.assert_array_equal(point, expected_row[0])
        np.testing.assert_array_equal(losses, expected_row[1])


def test_a_block_visits_once_for_each_setting_of_its_players(tmp_path: Path) -> None:
    model = tiny_model("llama")
    bank = build(model, tmp_path, "linear")
    visits: list[int] = []

    class Visits(OffloadedBlocks):
        @contextmanager
        def placed(self, d: int) -> Iterator[None]:
            if d not in self._placed:
                visits.append(d)
            with super().placed(d):
                yield

    engine = make_engine(model, bank, TOKENS, offloaded=Visits(model, CPU))
    engine.blockwise.record()
    n = len(bank.players)
    rows = np.random.default_rng(1).choice([2, 4], size=(1, n)).astype(np.float32)
    ((_, first, spent),) = engine.evaluate(rows)
    assert spent == 3
    visits.clear()
    ((_, again, _),) = engine.evaluate(rows)
    assert visits == [0, 1, 2]
    np.testing.assert_array_equal(first, again)


class Counting:
    """Stands for a model whose players are blocks; counts the block forwards."""

    def __init__(self, n_blocks: int) -> None:
        self.members = [range(d, d + 1) for d in range(n_blocks)]
        self.blockwise, self.embedded, self.calls = self, [torch.zeros(1)], 0

    def block_at(self, d: int, widths: Any) -> Any:
        return nullcontext()

    def first_difference(self, assignment: Any, previous: Any) -> int:
        return 0 if previous is None else int(np.argmax(assignment != previous))

    def forward_block(self, d: int, states: Any) -> Any:
        self.calls += 1
        return states

    def memory(self) -> list[Any]:
        return []

    def remember(self, memory: Any) -> None:
        assert memory == []


def test_the_cost_is_that_of_the_prefix_trees_of_chunks() -> None:
    unique = np.unique(np.random.default_rng(0).choice([2, 4], size=(50, 12)), axis=0).astype(np.float32)
    model: Any = Counting(12)
    spent = sum(forwards for *_, forwards in layer_major(model, unique, np.zeros(unique.shape, dtype=bool)))
    assert spent == model.calls == sum(prefix_tree_size(unique[i : i + 6]) for i in range(0, len(unique), 6))


def test_an_offloaded_block_computes_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dtype stands for the device: states in float64 meet no weight that stayed in float32."""
    monkeypatch.setattr(blockwise, "onednn_forwards", lambda module: {})
    model = tiny_model("qwen3")
    bank = build(model, tmp_path)
    expected = [losses for _, losses, _ in make_engine(model, bank, TOKENS).evaluate(points("block"))]
    on_host = {name: tensor.data_ptr() for name, tensor in model.model.layers.named_parameters()}
    engine = make_engine(model, bank, TOKENS, offloaded=OffloadedBlocks(model, torch.float64))  # type: ignore[arg-type]
    found = [losses for _, losses, _ in engine.evaluate(points("block"))]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert model.get_output_embeddings().weight.dtype == torch.float64
    assert {name: tensor.data_ptr() for name, tensor in model.model.layers.named_parameters()} == on_host


def test_a_model_with_accelerates_hooks_gives_the_same_losses(tmp_path: Path) -> None:
    """A model divided between GPUs has such hooks in place of its modules' forwards."""
    model = tiny_model("gemma2")
    bank = build(model, tmp_path)
    expected = [losses for _, losses, _ in make_engine(model, bank, TOKENS).evaluate(points("block"))]
    dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    hooked = [vars(block)["forward"] for block in model.model.layers]
    found = [losses for _, losses, _ in make_engine(model, bank, TOKENS).evaluate(points("block"))]
    np.testing.assert_array_equal(found, expected)
    assert [vars(block)["forward"] for block in model.model.layers] == hooked


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="this machine has several GPUs")
def test_several_gpus_are_asked_for_where_there_are_none() -> None:
    with pytest.raises(ModelError, match="needs several GPUs"):
        pick_device("sharded")


def test_a_search_with_offloaded_blocks_ends_with_the_same_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(Request.from_options(model=str(STORIES), tokens=256, sequence_length=64))
    budget, plans = Budget.parse("3avg"), []
    for is_offloaded in (False, True):
        monkeypatch.setattr(Footprint, "must_offload", lambda self, free, forced=is_offloaded: forced)
        with open_session(prepared, tmp_path / str(is_offloaded)) as session:
            assert (session.offloaded is not None) == is_offloaded
            plans += make_plans(session, "active", [budget], SolverSpec())
    assert plans[0] == plans[1]


def test_libraries_of_whole_models_need_the_whole_model_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Request.from_options(model=str(STORIES), tokens=256, sequence_length=64, bits=(2, 4), backend="gptq-static")
    prepared = prepare(asked)
    monkeypatch.setattr(Footprint, "must_offload", lambda self, free: True)
    with pytest.raises(
        OutOfMemory, match=r"backend 'gptq-static' needs the whole model on the GPU; use rtn, hqq or gg"
    ):
        prepared.fit()


def test_a_model_larger_than_a_gpu_is_offloaded_and_refused_when_not_even_that_fits() -> None:
    model, text = tiny_model("llama"), TextSpec(tokens=256, sequence_length=64)
    footprint = Footprint.estimate(model, find_players(model), text, "cuda")
    assert footprint.needed_offloaded < footprint.needed
    assert footprint.must_offload(footprint.needed - 1)
    assert not footprint.must_offload(footprint.needed)
    footprint.check(footprint.needed_offloaded)
    with pytest.raises(OutOfMemory, match="--tokens"):
        footprint.check(footprint.needed_offloaded - 1)

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from coopq.backends import get_backend
from coopq.bank import WeightBank
from coopq.engine import PrefixEngine, prefix_tree_size
from coopq.errors import EstimationError, ModelError
from coopq.models import LoadedModel
from coopq.players import find_blocks, find_players
from coopq.types import REMOVED, UNTOUCHED, Assignment
from tests.architectures import CONFIGS, tiny_model

TOKENS = np.random.default_rng(0).integers(3, 97, size=(20, 40))


def build(model: Any, folder: Path) -> WeightBank:
    bank = WeightBank(
        folder, LoadedModel(model, None, torch.float32), find_players(model), get_backend("rtn", group_size=16), {}
    )
    bank.build((2, 4))
    return bank


def plain_loss(model: Any, bank: WeightBank, assignment: Assignment) -> Any:
    """The loss by transformers' own forward and its own loss, a sequence at a time."""
    for player, bits in enumerate(assignment):
        bank.set_player(player, int(bits))
    ids = torch.from_numpy(TOKENS)
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in ids]
    bank.restore()
    return losses


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_equal_the_models_own_on_every_architecture(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    bank = build(model, tmp_path)
    assert len(bank.players) == 3
    points = np.array([[2, 4, 2], [4, 4, 4], [UNTOUCHED] * 3, [2, 4, UNTOUCHED], [2, 4, 2]], dtype=np.int8)
    engine = PrefixEngine(model, bank, TOKENS)
    losses = {assignment.tobytes(): values for assignment, values, _ in engine.evaluate(points)}
    assert len(losses) == 4
    for point in points:
        np.testing.assert_allclose(losses[point.tobytes()], plain_loss(model, bank, point), rtol=2e-5)
    means = [values.mean() for values in losses.values()]
    assert len(set(np.round(means, 6))) == 4, "the bits must matter"
    assert engine.layer_forwards == 10  # of 12: [2 4 2] and [2 4 16] share two blocks


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_models_own_on_every_architecture(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    engine = PrefixEngine(model, build(model, tmp_path), TOKENS[:4])
    list(engine.evaluate(np.full((1, 3), UNTOUCHED, dtype=np.int8)))
    states = engine.embedded
    for depth in range(3):
        states = engine.forward_block(depth, states)
    (batch,) = engine.batches
    with torch.no_grad():
        torch.testing.assert_close(engine.head(0, states[0]), model(input_ids=batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_players_hold_every_linear_layer_of_the_blocks_and_no_other(name: str) -> None:
    model = tiny_model(name)
    found = {linear.name: linear.shape for player in find_players(model) for linear in player.linears}
    expected = {
        module_name: tuple(module.weight.shape)
        for module_name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in module_name
    }
    assert found == expected


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_removed_block_hands_on_what_it_gets(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    engine = PrefixEngine(model, build(model, tmp_path), TOKENS)
    points = np.array([[REMOVED, UNTOUCHED, REMOVED], [REMOVED] * 3], dtype=np.int8)
    measured = [(losses, spent) for _, losses, spent in engine.evaluate(points)]
    assert [spent for _, spent in measured] == [0, 1]
    kept = find_blocks(model)[1][1]
    for remaining, (losses, _) in zip(([], [kept]), measured, strict=True):
        (model.model if name == "llama" else model.gpt_neox).layers = torch.nn.ModuleList(remaining)
        model.config.num_hidden_layers = len(remaining)
        with torch.no_grad():
            expected = [
                float(model(input_ids=row[None], labels=row[None], use_cache=False).loss)
                for row in torch.from_numpy(TOKENS)
            ]
        np.testing.assert_allclose(losses, expected, rtol=2e-5)


def test_the_model_gets_its_own_weights_back(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = PrefixEngine(model, build(model, tmp_path), TOKENS)
    walk = engine.evaluate(np.array([[2, 2, 2], [4, 4, 4]], dtype=np.int8))
    next(walk)
    walk.close()  # given up half-way
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@given(arrays(np.int8, array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.sampled_from([2, 3, 4])))
def test_the_prefix_tree_has_one_node_for_each_distinct_prefix(points: Any) -> None:
    prefixes = {tuple(row[: d + 1]) for row in points for d in range(len(row))}
    assert prefix_tree_size(points) == len(prefixes)


def test_the_engine_spends_exactly_the_prefix_tree(tmp_path: Path) -> None:
    model = tiny_model("llama")
    engine = PrefixEngine(model, build(model, tmp_path), TOKENS[:2])
    list(engine.evaluate(np.array([[4, 4, 4]], dtype=np.int8)))  # the first evaluation also records and checks
    before = engine.layer_forwards
    points = np.random.default_rng(1).choice(np.array([2, 4], dtype=np.int8), size=(7, 3))
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for block in model.model.layers:
        block.register_forward_hook(count)
    spent = sum(forwards for _, _, forwards in engine.evaluate(points))
    heads = len(np.unique(points, axis=0)) * 3  # the head's pass calls each block's stub once
    assert spent == engine.layer_forwards - before == prefix_tree_size(points) == calls - heads


def test_blocks_that_share_more_than_hidden_states_are_noticed(tmp_path: Path) -> None:
    model = tiny_model("llama")
    bank = build(model, tmp_path)
    calls = itertools.count()
    model.model.layers[1].register_forward_hook(lambda _, __, output: output + next(calls))
    with pytest.raises(ModelError, match="its blocks depend on more than the hidden states"):
        list(PrefixEngine(model, bank, TOKENS[:2]).evaluate(np.array([[2, 2, 2]], dtype=np.int8)))


def test_a_loss_that_is_not_a_number_is_an_error_with_the_assignment(tmp_path: Path) -> None:
    model = tiny_model("llama")
    bank = build(model, tmp_path)
    engine = PrefixEngine(model, bank, TOKENS[:2])
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EstimationError, match=r"assignment \[2, 4, 4\] is not a number"):
        list(engine.evaluate(np.array([[2, 4, 4]], dtype=np.int8)))


def test_a_model_without_blocks_gets_an_error_that_says_what_was_looked_for() -> None:
    # GPT-2's projections are not nn.Linear, so its blocks hold nothing to quantize.
    model = hf.AutoModelForCausalLM.from_config(hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))
    with pytest.raises(
        ModelError, match=r"looked for one nn.ModuleList of num_hidden_layers = 2 blocks .*transformer\.h \(2\)"
    ):
        find_players(model)

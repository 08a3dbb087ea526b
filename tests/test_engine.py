"""Losses of assignments: those of the model's own forward, for as many block forwards as prefixes differ."""

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from coopq.core.errors import CalibrationError, EstimationError, ModelError
from coopq.core.types import REMOVED, UNTOUCHED, Assignment, LinearLayer
from coopq.game.engines.prefix_engine import make_engine, model_nll, prefix_tree_size
from coopq.model.players import GRANULARITIES, find_blocks, find_players
from coopq.quantizers.bank import WeightBank
from tests.architectures import CONFIGS, tiny_model
from tests.engines import TOKENS, build


def block_prefixes(points: Any, blocks: list[int]) -> set[Any]:
    """Every distinct prefix of the points that ends where a block does."""
    ends = [end for end in range(1, len(blocks) + 1) if end == len(blocks) or blocks[end] > blocks[end - 1]]
    return {tuple(point[:end]) for point in points for end in ends}


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
    points = np.array([[2, 4, 2], [4, 4, 4], [UNTOUCHED] * 3, [2, 4, UNTOUCHED], [2, 4, 2]], dtype=np.float32)
    engine = make_engine(model, bank, TOKENS)
    losses = {assignment.tobytes(): values for assignment, values, _ in engine.evaluate(points)}
    assert len(losses) == 4
    for point in points:
        np.testing.assert_allclose(losses[point.tobytes()], plain_loss(model, bank, point), rtol=2e-5)
    means = [values.mean() for values in losses.values()]
    assert len(set(np.round(means, 6))) == 4, "the bits must matter"
    assert engine.block_forwards == 10  # of 12: [2 4 2] and [2 4 16] share two blocks


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_of_linear_players_equal_the_models_own_on_every_architecture(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    bank = build(model, tmp_path, "linear")
    blocks = [player.block for player in bank.players]
    points = np.random.default_rng(0).choice(np.array([2, 4, UNTOUCHED], dtype=np.float32), size=(5, len(blocks)))
    points[1:4] = points[0]  # and one player of each block differs, the first or the last in it
    for row, player in enumerate((blocks.index(1) - 1, blocks.index(1), len(blocks) - 1), start=1):
        points[row, player] = 2 if points[0, player] == 4 else 4
    engine = make_engine(model, bank, TOKENS)
    losses = {assignment.tobytes(): values for assignment, values, _ in engine.evaluate(points)}
    for point in points:
        np.testing.assert_allclose(losses[point.tobytes()], plain_loss(model, bank, point), rtol=2e-5)
    assert len({round(values.mean(), 7) for values in losses.values()}) == 5, "the bits must matter"
    assert engine.block_forwards == len(block_prefixes(points, blocks)) == 3 + 3 + 2 + 1 + 3


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_models_own_on_every_architecture(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    engine = make_engine(model, build(model, tmp_path), TOKENS[:4])
    list(engine.evaluate(np.full((1, 3), UNTOUCHED, dtype=np.float32)))
    pieces = engine.blockwise
    states = pieces.embedded
    for depth in range(3):
        states = pieces.forward_block(depth, states)
    (batch,) = pieces.batches
    with torch.no_grad():
        torch.testing.assert_close(pieces.head(states[0]), model(input_ids=batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_players_hold_every_linear_layer_of_the_blocks_and_no_other(name: str) -> None:
    model = tiny_model(name)
    expected = [
        LinearLayer(module_name, (module.weight.shape[0], module.weight.shape[1]))
        for module_name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in module_name
    ]
    blocks, linears = find_players(model), find_players(model, "linear")
    assert [linear for player in blocks for linear in player.linears] == expected
    assert [player.block for player in blocks] == [0, 1, 2]
    assert [player.linears for player in linears] == [(linear,) for linear in expected]
    assert [player.name for player in linears] == [linear.name for linear in expected]
    assert all(f".layers.{player.block}." in player.name for player in linears)


def test_an_unknown_granularity_names_the_choices() -> None:
    with pytest.raises(ModelError, match="granularity 'head' is unknown; choose from block, fused, linear"):
        find_players(tiny_model("llama"), "head")


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_removed_block_hands_on_what_it_gets(name: str, granularity: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    bank = build(model, tmp_path, granularity)
    engine = make_engine(model, bank, TOKENS)
    blocks = [player.block for player in bank.players]
    points = np.array([[REMOVED, UNTOUCHED, REMOVED], [REMOVED] * 3], dtype=np.float32)[:, blocks]
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


def test_a_walk_writes_over_no_states_that_are_still_needed(tmp_path: Path) -> None:
    model = tiny_model("llama")
    bank = build(model, tmp_path)
    points = np.array(list(itertools.product([REMOVED, 2, 4], repeat=3)), dtype=np.float32)
    together = [losses for _, losses, _ in make_engine(model, bank, TOKENS).evaluate(points)]
    for point, losses in zip(points, together, strict=True):
        ((_, alone, _),) = make_engine(model, bank, TOKENS).evaluate(point[None])
        np.testing.assert_array_equal(losses, alone)


def test_a_block_is_removed_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    model = tiny_model("llama")
    engine = make_engine(model, build(model, tmp_path, "linear"), TOKENS)
    points = np.full((2, 21), 4, dtype=np.float32)
    points[1, 7:13] = REMOVED  # all but the last of the second block
    with pytest.raises(EstimationError, match=r"removes some players of block model\.layers\.1 and keeps others"):
        next(engine.evaluate(points))
    assert not engine.blockwise.embedded, "noticed before anything is computed"


def test_the_model_gets_its_own_weights_back(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = make_engine(model, build(model, tmp_path), TOKENS)
    walk = engine.evaluate(np.array([[2, 2, 2], [4, 4, 4]], dtype=np.float32))
    next(walk)
    walk.close()  # given up half-way
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.sampled_from([2, 3, 4])))
def test_the_prefix_tree_has_one_node_for_each_distinct_prefix(points: Any) -> None:
    each = list(range(points.shape[1]))
    assert prefix_tree_size(points) == prefix_tree_size(points, each) == len(block_prefixes(points, each))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_the_prefix_tree_of_smaller_players_has_one_node_for_each_distinct_prefix_of_blocks(
    sizes: list[int], data: st.DataObject
) -> None:
    blocks = [block for block, size in enumerate(sizes) for _ in range(size)]
    shape = (data.draw(st.integers(1, 8)), len(blocks))
    points = data.draw(arrays(np.float32, shape, elements=st.sampled_from([2, 4])))
    assert prefix_tree_size(points, blocks) == len(block_prefixes(points, blocks))


def test_the_engine_spends_exactly_the_prefix_tree_of_smaller_players(tmp_path: Path) -> None:
    model = tiny_model("llama")
    bank = build(model, tmp_path, "linear")
    engine = make_engine(model, bank, TOKENS[:1, :4])
    blocks = [player.block for player in bank.players]
    # Few players differ, so that points share prefixes, and within blocks too.
    flips = st.lists(st.sets(st.integers(0, len(blocks) - 1), max_size=2), min_size=1, max_size=6)

    @given(flips)
    @settings(max_examples=25)
    def check(raised: list[set[int]]) -> None:
        points = np.array([[4 if p in wide else 2 for p in range(len(blocks))] for wide in raised], dtype=np.float32)
        before = engine.block_forwards
        spent = sum(forwards for _, _, forwards in engine.evaluate(points))
        assert spent == engine.block_forwards - before == prefix_tree_size(points, blocks)
        assert spent == len(block_prefixes(points, blocks))

    check()


def test_the_engine_spends_exactly_the_prefix_tree(tmp_path: Path) -> None:
    model = tiny_model("llama")
    engine = make_engine(model, build(model, tmp_path), TOKENS[:2])
    list(engine.evaluate(np.array([[4, 4, 4]], dtype=np.float32)))  # the first evaluation also records and checks
    before = engine.block_forwards
    points = np.random.default_rng(1).choice(np.array([2, 4], dtype=np.float32), size=(7, 3))
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for block in model.model.layers:
        block.register_forward_hook(count)
    spent = sum(forwards for _, _, forwards in engine.evaluate(points))
    heads = len(np.unique(points, axis=0)) * 3  # the head's pass calls each block's stub once
    assert spent == engine.block_forwards - before == prefix_tree_size(points) == calls - heads


def test_blocks_that_share_more_than_hidden_states_are_noticed(tmp_path: Path) -> None:
    model = tiny_model("llama")
    bank = build(model, tmp_path)
    calls = itertools.count()
    model.model.layers[1].register_forward_hook(lambda _, __, output: output + next(calls))
    with pytest.raises(ModelError, match="its blocks depend on more than the hidden states"):
        list(make_engine(model, bank, TOKENS[:2]).evaluate(np.array([[2, 2, 2]], dtype=np.float32)))


@pytest.mark.parametrize(
    ("part", "named"),
    [("model.norm", "the head"), ("model.layers.1.input_layernorm", "block model.layers.1 at widths [4]"),
     ("model.embed_tokens", "the embedding")],
)  # fmt: skip
def test_a_loss_that_is_not_finite_is_an_error_with_the_part_at_fault(part: str, named: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    bank = build(model, tmp_path)
    engine = make_engine(model, bank, TOKENS[:2])
    with torch.no_grad():
        model.get_submodule(part).weight.fill_(float("inf"))
    with pytest.raises(EstimationError, match=re.escape(f"{named} gives numbers that are not finite")):
        list(engine.evaluate(np.array([[2, 4, 4]], dtype=np.float32)))


def test_a_token_that_a_model_has_no_row_for_is_refused() -> None:
    model = tiny_model("llama")
    tokens = np.array([[1, 2, 97]])
    with pytest.raises(CalibrationError, match="holds token 97, and the model's embedding has 97 rows"):
        list(model_nll(model, tokens))


def test_a_model_without_blocks_gets_an_error_that_says_what_was_looked_for() -> None:
    model = hf.AutoModelForCausalLM.from_config(hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))
    model.config.n_layer = 3
    with pytest.raises(
        ModelError, match=r"looked for one nn.ModuleList of num_hidden_layers = 3 blocks .*transformer\.h \(2\)"
    ):
        find_players(model)

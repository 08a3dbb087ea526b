"""Players whose rows allow different types of ggml: each has the widths of its own rows."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers as hf

import coopq
from coopq import Goal, QuantizerSpec, Request
from coopq.core.errors import EstimationError, InfeasibleBudget, UnsupportedBits
from coopq.core.sizes import Budget, Sizes
from coopq.core.specs import SolverSpec
from coopq.export.checkpoint import SavedModel, dequantized
from coopq.export.formats import export_model, predicted_bytes
from coopq.game.prepared import prepare
from coopq.game.session import open_session
from coopq.judge.comparison import compare_on
from coopq.model.load import load_model
from coopq.model.safetensors_io import load_tensors
from coopq.model.texts import HeldOut
from coopq.plan.methods import check_methods, make_plans, names
from coopq.plan.plan import Plan
from coopq.search import Measured, SearchSpace
from tests.folders import save_source
from tests.gguf_files import write_gguf

BITS = (2, 3, 4, 5, 8)
LONG, SHORT = BITS, (4, 5, 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy Qwen-3 of two blocks: outputs of attention and down projections have rows of 256, all others of 64."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.Qwen3Config(
        vocab_size=512, num_hidden_layers=2, head_dim=64, **size, tie_word_embeddings=True, max_position_embeddings=128
    )
    folder = tmp_path_factory.mktemp("types") / "model"
    save_source(hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32), folder)
    write_gguf(load_model(str(folder), device="cpu").model, folder.with_name("base.gguf"))
    return folder


def request_of(model: Path, **options: object) -> Request:
    given = {"backend": "ggml", "bits": BITS, "granularity": "fused"} | options
    return Request.from_options(model=str(model), tokens=64, sequence_length=32, fit_tokens=128, **given)


def test_each_player_has_the_widths_of_its_rows(model: Path) -> None:
    prepared = prepare(request_of(model))
    own = dict(zip((player.linears[-1].name for player in prepared.players), prepared.player_widths, strict=True))
    assert own["model.layers.0.self_attn.v_proj"] == own["model.layers.1.mlp.up_proj"] == SHORT
    assert own["model.layers.0.self_attn.o_proj"] == own["model.layers.1.mlp.down_proj"] == LONG
    between = prepare(request_of(model, bits=(2, 4, 4.5, 5, 5.5, 8)))
    assert set(between.player_widths) == {(2, 4, 5, 8), (4, 4.5, 5, 5.5, 8)}
    # One layer of a block has the width, and its other layers take their next wider one.
    block = prepare(request_of(model, granularity="block"))
    assert set(block.player_widths) == {LONG}
    at_two = {linear.name: block.backend.storage_bytes(linear.shape, 2) for linear in block.players[0].linears}
    n_down, n_up = 64 * 256 // 256 * 84, 256 * 64 // 32 * 18  # blocks of Q2_K and of IQ4_NL
    assert (at_two["model.layers.0.mlp.down_proj"], at_two["model.layers.0.mlp.up_proj"]) == (n_down, n_up)
    assert block.sizes.player_bytes(0, 2) == sum(at_two.values())


def test_the_wrong_widths_are_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedBits, match=r"has no 2 or 3 bits for rows of 64 weights, as .*q_proj has; add one of 4"
    ):
        prepare(request_of(model, bits=(2, 3)))
    wide = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "num_attention_heads": 4}
    config = hf.Qwen3Config(vocab_size=512, num_hidden_layers=1, **wide, max_position_embeddings=128)
    hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(
        UnsupportedBits, match=r"no player has 4\.5 bits: its layers have no such type, .* leave 4\.5 out"
    ):
        prepare(request_of(tmp_path, bits=(2, 4.5, 8)))


@pytest.mark.parametrize(("granularity", "backend"), [("fused", "ggml"), ("block", "ggml-gptq")])
def test_what_is_measured_is_saved_and_exported(model: Path, granularity: str, backend: str, tmp_path: Path) -> None:
    base, saved, file = model.with_name("base.gguf"), tmp_path / "saved", tmp_path / "out.gguf"
    request = request_of(model, granularity=granularity, backend=backend, target="gguf", base=str(base))
    prepared = prepare(request)
    plan = coopq.quantize(request, Goal(budget="4.1bpw", method="auto-quantize"), saved)
    assert plan.bytes == prepared.sizes.total_bytes(plan.assignment) == SavedModel(saved).n_bytes() <= plan.budget_bytes
    assert min(plan.assignment) < 4
    for player, (own, each) in enumerate(zip(prepared.player_widths, plan.players, strict=True)):
        assert each.bits in own
        for bits in own:
            path = tmp_path / "saved-run" / "bank" / f"player{player:03d}-{bits:g}bit.safetensors"
            n_bytes = sum(tensor.nbytes for tensor in load_tensors(path, "cpu", way_out="").values())
            assert n_bytes == prepared.sizes.player_bytes(player, bits)
    n_bytes = export_model(saved, "gguf", file, base=base)
    assert n_bytes == file.stat().st_size == predicted_bytes(plan, "gguf", base=base)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, weight in dequantized(saved):
        tensor = (
            tensors[name.replace("model.layers", "blk").replace("mlp.down_proj", "ffn_down")]
            if "down" in name
            else None
        )
        if tensor is not None:
            theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_allclose(weight.numpy(), theirs, rtol=1e-5, atol=1e-7)


def test_every_method_keeps_to_the_own_widths(model: Path, tmp_path: Path) -> None:
    prepared = prepare(request_of(model))
    lowest = prepared.sizes.total_bytes([own[0] for own in prepared.player_widths])
    budgets = [Budget.parse("5avg"), Budget.parse(f"{lowest + prepared.sizes.fixed}B"), Budget.parse("8avg")]
    with open_session(prepared, tmp_path) as session:
        for name in ("active", "greedy-up", "one-shot-low", "evopress", "auto-quantize", "fisher", "lim"):
            plans = make_plans(session, name, budgets, SolverSpec())
            for plan in plans:
                assert all(bits in own for bits, own in zip(plan.assignment, session.player_widths, strict=True))
                assert plan.bytes <= plan.budget_bytes
            assert plans[1].bytes == lowest
        rows = compare_on(session, make_plans(session, "one-shot-high", budgets[:1], SolverSpec()), HeldOut(32, 64))
        uniform = [row.average_bits for row in rows if row.method == "uniform"]
        assert uniform == sorted(uniform, reverse=True)
        assert len(uniform) == len(BITS), "at 2 and 3 bits, players without have 4"
        assert uniform[-1] == pytest.approx(session.sizes.average_bits([own[0] for own in session.player_widths]))


def test_a_player_may_have_one_width(model: Path, tmp_path: Path) -> None:
    request = request_of(model, bits=(2, 4))
    prepared = prepare(request)
    assert set(prepared.player_widths) == {(2, 4), (4,)}
    for method in names(most_widths=2):
        with pytest.raises(EstimationError, match=r"two widths of every player, and .*v_proj has one of them only"):
            check_methods([method], prepared)
    with open_session(prepared, tmp_path) as session:
        for name in ("active", "exact", "regression", "auto-quantize"):
            (plan,) = make_plans(session, name, [Budget.parse("3.8avg")], SolverSpec())
            assert plan.average_bits <= 3.8
            assert {2, 4} == set(plan.assignment)


def test_points_of_players_with_one_width() -> None:
    space = SearchSpace(((4,), (2, 3, 4), (8,), (2, 4), (4,)), np.array([1, 2, 4]), (3,))
    q = np.array([[1, 1, 0], [0, 0, 1]], dtype=bool)
    assert space.assignments(q).tolist() == [[4, 2, 8, 4, 4], [4, 4, 8, 2, 4]]
    assert np.array_equal(space.steps_down(space.assignments(q)), q)
    assert space.sum_by_player(np.array([1.0, 2.0, 4.0])).tolist() == [0, 3, 0, 4, 0]
    measured = Measured(space)
    measured.add(np.array([[4, 2, 8, 4, 4], [2, 2, 8, 4, 4]], dtype=np.float32), np.zeros(2))
    assert len(measured) == 1, "the second is outside of the space"


def test_average_bits_lie_between_the_own_ends() -> None:
    sizes = Sizes(n_weights=(100, 300), n_bytes={2: (25, None), 4: (50, 150), 8: (100, 300)})
    limits = [sizes.limit(Budget.parse(text), (2, 4, 8)) for text in ("3.5avg", "5.75avg", "8avg", "175B", "8bpw")]
    assert limits == [175, 287, 400, 175, 400]
    with pytest.raises(InfeasibleBudget, match=r"smallest is 3.5avg = 3.5bpw = 175B, the largest 8avg = 8bpw"):
        sizes.limit(Budget.parse("3.4avg"), (2, 4, 8))
    with pytest.raises(UnsupportedBits, match="player 1 has no 2 bits; it has 4, 8"):
        sizes.total_bytes([2, 2])
    with pytest.raises(UnsupportedBits, match="only one of 2, 4 bits, so there is nothing to choose"):
        Sizes(n_weights=(1, 1), n_bytes={2: (1, None), 4: (None, 1)}).player_widths((2, 4))


def test_a_plan_is_deployed_by_another_backend_of_ggml(model: Path, tmp_path: Path) -> None:
    plan = coopq.quantize(request_of(model), Goal(budget="4.9avg", method="auto-quantize"), tmp_path / "out")
    deployed = coopq.apply(plan, tmp_path / "gptq", deployment=QuantizerSpec("ggml-gptq"))
    assert deployed.bytes == SavedModel(tmp_path / "gptq").n_bytes() <= deployed.budget_bytes
    assert isinstance(Plan.load(tmp_path / "gptq" / "plan.json"), Plan)


@pytest.mark.real
def test_the_demo_model_has_narrow_down_projections() -> None:
    """Its rows of 576 have no type below 4 bits, and those of 1,536 have."""
    prepared = prepare(Request.from_options(model="demo", backend="ggml-iq", bits=(2.5, 4, 8), granularity="fused"))
    own = {
        player.linears[0].name.rpartition(".")[2]: widths
        for player, widths in zip(prepared.players, prepared.player_widths, strict=True)
    }
    assert own == {"q_proj": (4, 8), "o_proj": (4, 8), "gate_proj": (4, 8), "down_proj": (2.5, 4, 8)}

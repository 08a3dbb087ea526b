"""Mixtures of experts: all experts of a block are quantized together."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

import coopq
from coopq.core.specs import QuantizerSpec
from coopq.core.types import UNTOUCHED
from coopq.export.checkpoint import SavedModel
from coopq.export.formats import predicted_bytes
from coopq.game.engines.prefix_engine import make_engine, model_nll
from coopq.model.load import LoadedModel
from coopq.model.matrices import matrix_of, round_untouched
from coopq.model.players import find_players
from coopq.quantizers import get_backend
from coopq.quantizers.bank import WeightBank
from coopq.quantizers.ggml.gptq import GGMLGPTQ, elimination_order, second_order
from coopq.quantizers.ggml.library import to_blocks
from coopq.quantizers.ggml.types import GGMLBackend
from coopq.quantizers.input_statistics import column_importance, second_moments
from tests.architectures import GROUPED
from tests.checkpoints import Tokenizer, plan_for, save
from tests.command_line import command, refused
from tests.folders import save_source
from tests.llama_cpp import llama_cpp_nll_of_last

EXPERTS: dict[str, Any] = {
    "mixtral": lambda of: hf.MixtralConfig(**of, num_local_experts=4),
    "qwen3_moe": lambda of: hf.Qwen3MoeConfig(**of, num_experts=4, moe_intermediate_size=32),
}


def tiny(name: str, vocabulary: int = 97, chosen: int = 2) -> Any:
    torch.manual_seed(0)
    config = EXPERTS[name]({**GROUPED, "vocab_size": vocabulary, "num_experts_per_tok": chosen})
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.2)
    return model


@pytest.mark.parametrize(
    ("granularity", "quantizer"),
    [("block", ("rtn", 16, 3)), ("fused", ("quanto", None, 2)), ("linear", ("hqq", 16, 3))],
)
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_measured_and_saved_as_they_are_quantized(
    name: str, granularity: str, quantizer: tuple[str, int | None, int], tmp_path: Path
) -> None:
    model = tiny(name)
    players = find_players(model, granularity)
    inside = [linear.name.rpartition("layers.0.")[2] for p in players if p.block == 0 for linear in p.linears]
    assert inside[-2:] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    in_block = {"block": 1, "fused": 4, "linear": 6}[granularity]
    assert len(players) == 3 * in_block
    experts = model.model.layers[0].mlp.experts.gate_up_proj
    assert sum(of.n_weights for p in players if p.block == 0 for of in p.linears) >= experts.numel()
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 97, size=(3, 16))
    backend_name, group_size, low = quantizer
    loaded = LoadedModel(model, Tokenizer(), torch.float32)
    backend = get_backend(QuantizerSpec(backend_name, group_size))
    assert round_untouched(loaded, players, (UNTOUCHED,))
    bank = WeightBank(tmp_path / "bank", loaded, players, backend, {})
    bank.build((low, 8))
    points = rng.choice([low, 8, UNTOUCHED], size=(6, len(players))).astype(np.float32)
    points[0] = [(low, UNTOUCHED, 8)[player.block] for player in players]
    measured = {point.tobytes(): losses for point, losses, _ in make_engine(model, bank, tokens).evaluate(points)}
    for point in points:
        for index, bits in enumerate(point):
            bank.set_player(index, int(bits))
        np.testing.assert_allclose(measured[point.tobytes()], np.concatenate(list(model_nll(model, tokens))), rtol=1e-5)
    bank.restore()
    plan = plan_for(model, backend_name, group_size, points[0].tolist(), granularity)
    save(loaded, plan, tmp_path / "saved")
    assert SavedModel(tmp_path / "saved").n_bytes() == plan.bytes
    again = coopq.load(tmp_path / "saved", device="cpu", dequantize=False)
    sizes = [layer.mlp.experts.gate_up_proj.numel() for layer in again.model.layers]
    assert sizes == [0, experts.numel(), 0], "nothing is dequantised but in a forward"
    np.testing.assert_allclose(np.concatenate(list(model_nll(again, tokens))), measured[points[0].tobytes()], rtol=1e-5)
    assert [layer.mlp.experts.gate_up_proj.numel() for layer in again.model.layers] == sizes


def test_the_main_job_on_a_mixture_of_experts(tmp_path: Path) -> None:
    model = tiny("mixtral", 512)
    save_source(model, tmp_path / "model")
    arguments: list[str | Path] = ["quantize", tmp_path / "model", "--bits", "2,4,8", "--granularity", "linear"]
    arguments += ["--tokens", "128", "--sequence-length", "32", "--group-size", "16"]
    code, _, err = command(*arguments, "--budget", "4avg", "--out", tmp_path / "out")
    assert code == 0, err
    plan = coopq.Plan.load(tmp_path / "out" / "plan.json")
    assert plan.bytes == SavedModel(tmp_path / "out").n_bytes() <= plan.budget_bytes
    code, _, err = command("evaluate", tmp_path / "out", "--tokens", "64", "--sequence-length", "32")
    assert code == 0, err
    line = refused(*arguments, "--budget", "4avg", "--method", "fisher", "--out", tmp_path / "other")
    assert "model.layers.0.mlp.experts.gate_up_proj holds several experts; take another method" in line
    line = refused(*arguments, "--budget", "4avg", "--backend", "gptq", "--out", tmp_path / "another")
    assert (
        "nn.Linear layers only, and model.layers.0.mlp.experts.gate_up_proj is an embedding, a Conv1D or experts"
        in line
    )


@pytest.mark.parametrize("name", EXPERTS)
def test_each_expert_has_the_importance_of_its_own_inputs(name: str) -> None:
    model = tiny(name, chosen=1)
    experts, of_module = model.model.layers[1].mlp.experts, "model.layers.1.mlp.experts"
    seen: list[tuple[torch.Tensor, ...]] = []
    handle = experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    tokens = np.random.default_rng(2).integers(3, 97, size=(1, 4))
    names = [f"{of_module}.gate_up_proj", f"{of_module}.down_proj"]
    before = model.get_experts_implementation()
    found, moments = (of(model, names, tokens) for of in (column_importance, second_moments))
    handle.remove()
    assert model.get_experts_implementation() == before != {"": "eager"}
    (inputs, chosen, _), _ = seen
    reached = [(chosen == expert).any(dim=1) for expert in range(4)]
    expected: dict[str, list[torch.Tensor]] = {of: [] for of in names}
    for expert, rows in enumerate(reached):
        gates, ups = (inputs[rows] @ experts.gate_up_proj[expert].T).chunk(2, dim=1)
        for of, values in zip(names, (inputs[rows], torch.nn.functional.silu(gates) * ups), strict=True):
            expected[of].append(values.T @ values / len(values))
    for of, rows_of in expected.items():
        hit = [row for row in rows_of if not row.isnan().any()]
        assert 1 < len(hit) < 4
        others = torch.stack(hit).mean(dim=0)
        wanted = torch.stack([others if row.isnan().any() else row for row in rows_of])
        torch.testing.assert_close(moments[of], wanted, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found[of], wanted.diagonal(dim1=1, dim2=2), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_whose_block_visits_a_gpu_have_their_importance(name: str) -> None:
    """A block's tensors are exchanged for copies when the block arrives."""
    model, tokens = tiny(name), np.random.default_rng(2).integers(3, 97, size=(2, 32))
    names = [linear.name for player in find_players(model) for linear in player.linears]
    wanted = column_importance(model, names, tokens)

    def arrive(block: torch.nn.Module, _: Any) -> None:
        for parameter in block.parameters():
            parameter.data = parameter.data.clone()

    for block in model.model.layers:
        block.register_forward_pre_hook(arrive)
    found = column_importance(model, names, tokens)
    assert {*found} == {*wanted} == {*names}
    assert all(torch.equal(found[of], wanted[of]) for of in names)


def test_a_layer_that_no_token_reaches_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model, tokens = tiny("mixtral"), np.random.default_rng(2).integers(3, 97, size=(2, 32))
    linears = [linear.name for player in find_players(model) for linear in player.linears]
    model.model.layers[1].mlp.experts.forward = lambda hidden, *_: hidden
    found = column_importance(model, ["model.embed_tokens", *linears], tokens)
    missing = [f"model.layers.1.mlp.experts.{part}_proj" for part in ("gate_up", "down")]
    assert sorted({*linears} - {*found}) == sorted(missing)
    (line,) = (line for line in caplog.messages if "no token" in line)
    assert "embed" not in line
    assert all(name in line for name in missing)


def test_experts_are_rounded_by_their_own_importance() -> None:
    backend, weight = GGMLBackend(), torch.randn(3 * 24, 256)
    importance = torch.rand(3, 256) ** 8
    together = backend.quantize(weight, 3, importance)["blocks"]
    alone = [backend.quantize(part, 3, of)["blocks"] for part, of in zip(weight.chunk(3), importance, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, backend.quantize(weight, 3, importance[0])["blocks"])


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_rounded_by_their_own_moments(name: str) -> None:
    model, tokens = tiny(name), np.random.default_rng(2).integers(3, 97, size=(2, 32))
    of, backend = "model.layers.1.mlp.experts.down_proj", GGMLGPTQ()
    experts, moments = matrix_of(model, of).parameter.data, second_moments(model, [of], tokens)[of]
    ((_, packed),) = backend.quantize_model(model, None, {of: 4}, tokens)
    kind = backend.format.tensor_type(experts.shape[2], 4)
    for blocks, weight, of_expert in zip(packed["blocks"].chunk(len(experts)), experts, moments, strict=True):
        rounded = to_blocks(kind, weight, of_expert.diagonal())
        assert torch.equal(blocks, second_order(kind, weight, rounded, elimination_order(of_expert)))
        assert not torch.equal(blocks, rounded)


@pytest.mark.parametrize("name", ["qwen3_moe", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_llama_cpp_computes_the_same_loss(name: str, tmp_path: Path) -> None:
    """It keeps gates and ups of experts apart, and orders the rows of Mixtral's queries anew."""
    model = tiny(name, 512, chosen=4)  # all: rounding chooses no others
    save_source(model, tmp_path / "model")
    base, saved, file = (tmp_path / of for of in ("base.gguf", "saved", "small.gguf"))
    convert = Path(__file__).parents[1] / "benchmarks" / "convert.py"
    done = subprocess.run([sys.executable, convert, tmp_path / "model", base], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    arguments: list[str | Path] = ["quantize", tmp_path / "model", "--bits", "4,8", "--granularity", "linear"]
    arguments += ["--tokens", "128", "--fit-tokens", "256", "--sequence-length", "32"]
    arguments += ["--backend", "ggml", "--target", "gguf", "--base", base]
    limit = base.stat().st_size * 2 // 3
    code, _, err = command(*arguments, "--budget", f"{limit}B", "--method", "first-last", "--out", saved)
    assert code == 0, err
    plan = coopq.Plan.load(saved / "plan.json")
    assert {plan.modules[of] for of in plan.modules if "experts" in of} == {4, 8}
    code, _, err = command("export", saved, "--to", "gguf", "--out", file)
    assert code == 0, err
    assert file.stat().st_size == predicted_bytes(plan, "gguf") <= limit
    tokens = torch.from_numpy(np.random.default_rng(0).integers(3, 512, size=(16, 24)))
    with torch.no_grad():
        logits = [of(input_ids=tokens).logits[:, -2] for of in (coopq.load(saved, device="cpu"), model)]
    ours, whole = (torch.nn.functional.cross_entropy(of, tokens[:, -1], reduction="none").numpy() for of in logits)
    theirs = llama_cpp_nll_of_last(file, tokens.numpy(), 512)
    assert np.abs(theirs - ours).mean() < 0.05, "llama.cpp rounds activations to eight bits"
    assert np.abs(ours - whole).mean() > 0.1

"""On a GPU, in 32 bits, the same losses and plans as on the CPU; skipped where there is none."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import coopq.quantizers.gptq.autoround as autoround
from coopq.core.sizes import Budget
from coopq.core.specs import QuantizerSpec, Request, SolverSpec
from coopq.core.types import REMOVED, UNTOUCHED
from coopq.game.engines.prefix_engine import make_engine
from coopq.game.prepared import prepare
from coopq.game.session import open_session
from coopq.model.load import load_model
from coopq.model.offload import OffloadedBlocks
from coopq.model.players import find_players
from coopq.plan.methods import make_plans
from coopq.quantizers import get_backend
from coopq.quantizers.ggml.gptq import GGMLGPTQ
from tests.architectures import CONFIGS, tiny_model
from tests.conftest import STORIES
from tests.engines import TOKENS, build
from tests.folders import save_source

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
POINTS = np.array([[2, 2, 2], [2, 4, 2], [REMOVED, 4, 4], [UNTOUCHED] * 3], dtype=np.float32)


@pytest.mark.parametrize("loss", ["nll", "kl"])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_on_a_gpu_are_those_on_the_cpu(name: str, loss: str, tmp_path: Path) -> None:
    expected, found = (
        np.array([losses for _, losses, _ in engine.evaluate(POINTS)])
        for engine in (
            make_engine(model, build(model, tmp_path / model.device.type), TOKENS, loss)
            for model in (tiny_model(name), tiny_model(name).cuda())
        )
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_blocks_on_a_gpu_are_compiled(tmp_path: Path) -> None:
    model = tiny_model("llama").cuda()
    engine = make_engine(model, build(model, tmp_path), TOKENS)
    assert engine.blockwise.is_compiled


def test_offloaded_blocks_on_a_gpu_give_the_losses_of_the_cpu(tmp_path: Path) -> None:
    model = tiny_model("gemma2")
    bank = build(model, tmp_path)
    expected = [losses for _, losses, _ in make_engine(model, bank, TOKENS).evaluate(POINTS)]
    engine = make_engine(model, bank, TOKENS, offloaded=OffloadedBlocks(model, torch.device("cuda")))
    np.testing.assert_allclose([losses for _, losses, _ in engine.evaluate(POINTS)], expected, rtol=1e-4)
    assert {tensor.device.type for tensor in model.model.layers.parameters()} == {"cpu"}


def test_a_search_on_a_gpu_ends_with_the_plan_of_the_cpu(tmp_path: Path) -> None:
    plans = []
    for device in ("cpu", "cuda"):
        request = Request.from_options(model=str(STORIES), device=device, tokens=256, sequence_length=64)
        with open_session(prepare(request), tmp_path / device) as session:
            plans += make_plans(session, "active", [Budget.parse("3avg")], SolverSpec())
    on_cpu, on_gpu = plans
    assert on_cpu.assignment == on_gpu.assignment
    assert on_cpu.measured_loss == pytest.approx(on_gpu.measured_loss, abs=1e-5)


def test_weights_rounded_by_gptq_on_a_gpu_are_nearly_those_of_the_cpu() -> None:
    """A level that is as near as another may be taken for it, and what comes after it then differs."""
    blocks = {}
    for model in (tiny_model("llama"), tiny_model("llama").cuda()):
        names = [linear.name for player in find_players(model, embeddings=True) for linear in player.linears]
        for name, packed in GGMLGPTQ().quantize_model(model, None, dict.fromkeys(names, 4), TOKENS):
            assert packed["blocks"].device.type == model.device.type
            blocks[model.device.type, name] = packed["blocks"].cpu()
    for name in names:
        assert (blocks["cpu", name] == blocks["cuda", name]).float().mean() > 0.9


@pytest.mark.parametrize(
    ("name", "package", "group_size"),
    [
        ("rtn", "torch", 32),
        ("quanto", "optimum", None),
        ("hqq", "hqq", 32),
        ("gptq", "gptqmodel", 32),
        ("gptq-static", "gptqmodel", 32),
        ("autoround", "auto_round", 32),
    ],
)
def test_every_library_rounds_on_a_gpu_as_well_as_on_the_cpu(
    name: str, package: str, group_size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(package) is None:  # importing it would change this process
        pytest.skip(f"needs {package}")
    monkeypatch.setattr(autoround, "_ITERATIONS", 20)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    save_source(AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=512, **shape)), tmp_path)
    tokens = np.random.default_rng(0).integers(3, 500, size=(4, 64))
    backend = get_backend(QuantizerSpec(name, group_size))
    lost = {}
    for device in ("cpu", "cuda"):
        loaded = load_model(str(tmp_path), device=device)
        bits = {linear.name: 4 for player in find_players(loaded.model) for linear in player.linears}
        for layer, packed in backend.quantize_model(loaded.model, loaded.tokenizer, bits, tokens):
            assert {tensor.device.type for tensor in packed.values()} == {device}
            weight = loaded.model.get_submodule(layer).weight.detach()
            rounded = backend.dequantize(packed, (weight.shape[0], weight.shape[1]), 4, torch.float32)
            lost[device, layer] = float((rounded - weight).norm() / weight.norm())
    assert len(lost) == 2 * len(bits)
    for layer in bits:
        assert 0.01 < lost["cuda", layer] == pytest.approx(lost["cpu", layer], rel=0.1)

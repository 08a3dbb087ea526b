"""A saved model with dequantized weights: ordinary layers with the values that were measured."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

import coopq
from coopq.export import checkpoint
from coopq.export.checkpoint import SavedModel
from coopq.game.engines.prefix_engine import model_nll
from coopq.model.load import LoadedModel, load_model
from coopq.quantizers.packed_modules import PackedLinear
from tests.architectures import COMMON, tiny_model
from tests.checkpoints import Tokenizer, plan_for, save
from tests.quantizers import WEIGHT_ONLY

TOKENS = np.random.default_rng(0).integers(3, 97, (2, 24))


def nll(model: object) -> float:
    return float(np.concatenate(list(model_nll(model, TOKENS))).mean())


@pytest.mark.parametrize("backend", WEIGHT_ONLY)
def test_weights_are_those_that_packed_tensors_stand_for(backend: str, stories: str, tmp_path: Path) -> None:
    loaded = load_model(stories, device="cpu")
    save(loaded, plan_for(loaded.model, backend, None, [4, 2, 8, 2, 4]), tmp_path / "saved")
    packed, plain = (coopq.load(tmp_path / "saved", device="cpu", dequantize=choice) for choice in (False, True))
    saved = SavedModel(tmp_path / "saved")
    weights, _ = saved.read()
    for name, bits in saved.plan.quantized.items():
        layer = plain.get_submodule(name)
        assert type(layer) is nn.Linear
        rows, columns = layer.weight.shape
        expected = weights.backend.dequantize(weights[name], (rows, columns), bits, torch.float32)
        assert torch.equal(layer.weight, expected)
    assert nll(plain) == pytest.approx(nll(packed), rel=1e-6)
    prompt = torch.from_numpy(TOKENS[:1, :8])
    texts = [model.generate(prompt, max_new_tokens=8, do_sample=False) for model in (packed, plain)]
    assert torch.equal(*texts)


def test_every_way_to_hold_a_weight_is_dequantized(tmp_path: Path) -> None:
    gpt2 = hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    experts = hf.MixtralConfig(**COMMON, intermediate_size=48, num_local_experts=4, num_key_value_heads=2)
    transposed, shared = (
        hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval() for config in (gpt2, experts)
    )
    # "llama" ties its head to the embedding, "qwen3" does not.
    models = {"transposed": transposed, "experts": shared, "tied": tiny_model("llama"), "untied": tiny_model("qwen3")}
    for name, model in models.items():
        embeddings = name.endswith("tied")
        n_players = 3 + embeddings + (name == "untied")
        plan = plan_for(model, "rtn", 16, [4] * n_players, "block", embeddings=embeddings)
        save(LoadedModel(model, Tokenizer(), torch.float32), plan, tmp_path / name)
        packed, plain = (coopq.load(tmp_path / name, device="cpu", dequantize=choice) for choice in (False, True))
        assert nll(plain) == pytest.approx(nll(packed), rel=1e-6), name
        assert nll(plain) != pytest.approx(nll(model), rel=1e-6), name
        assert [type(module) for module in plain.modules()] == [type(module) for module in model.modules()]
        assert plain.num_parameters() == model.num_parameters()


def test_weights_stay_packed_where_memory_is_short(
    stories: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_model(stories, device="cpu")
    save(loaded, plan_for(loaded.model, "rtn", 64, [4] * 5), tmp_path / "saved")
    name = "model.layers.0.mlp.up_proj"
    assert type(coopq.load(tmp_path / "saved", device="cpu").get_submodule(name)) is nn.Linear
    needed = sum(tensor.nbytes for tensor in loaded.model.parameters())
    monkeypatch.setattr(checkpoint, "free_memory", lambda _: needed)
    with caplog.at_level(logging.WARNING, "coopq"):
        assert type(coopq.load(tmp_path / "saved", device="cpu").get_submodule(name)) is PackedLinear
    assert "weights stay packed, as memory is short" in caplog.text

"""AutoRound through its library, on a random model whose layers have shapes that it takes; in a process of its own."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import coopq
import coopq.quantizers.gptq.autoround as autoround
from coopq.core.errors import BackendError
from coopq.core.goal import Goal
from coopq.core.specs import Request
from coopq.export.checkpoint import SavedModel
from coopq.export.formats import export_model, predicted_bytes
from coopq.game.engines.prefix_engine import model_nll
from coopq.model.load import load_model
from coopq.model.players import find_players
from coopq.quantizers.backend import Packed
from coopq.quantizers.gptq.format import pack_weight
from coopq.quantizers.sizes import packed_sizes
from tests.folders import save_source
from tests.quantizers import backend as make


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two blocks."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=512, **shape))
    return save_source(model, tmp_path_factory.mktemp("autoround") / "model")


@pytest.fixture(scope="module", autouse=True)
def _few_steps() -> Iterator[None]:
    """What is checked here does not depend on how well the library rounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoround, "_ITERATIONS", 4)
        yield


def test_packed_integers_are_the_weights_that_the_library_made(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Packed] = []

    def keep(solved: Packed, bits: int) -> Packed:
        made.append(solved)
        return pack_weight(solved, bits)

    monkeypatch.setattr(autoround, "pack_weight", keep)
    loaded = load_model(str(source), device="cpu")
    tokens = np.random.default_rng(0).integers(3, 500, size=(2, 32))
    bits = {f"model.layers.{i}.mlp.{part}_proj": 2 + 2 * i for i in range(2) for part in ("gate", "down")}
    backend = make("autoround", group_size=32, symmetric=False)
    packed = dict(backend.quantize_model(loaded.model, loaded.tokenizer, bits, tokens))
    assert list(packed) == list(bits)
    for (name, width), theirs in zip(bits.items(), made, strict=True):
        weight = loaded.model.get_submodule(name).weight.detach()
        ours = backend.dequantize(packed[name], (weight.shape[0], weight.shape[1]), width, torch.float32)
        torch.testing.assert_close(ours, theirs["weight"], rtol=2e-3, atol=1e-6)
        assert len(ours[0, :32].unique()) <= 2**width
        assert float((ours - weight).norm() / weight.norm()) < (0.6 if width == 2 else 0.2)
        assert sum(tensor.nbytes for tensor in packed[name].values()) == backend.storage_bytes(weight.shape, width)
    assert "auto_round" not in sys.modules


@pytest.mark.slow
def test_the_main_job_saves_a_mixed_model_that_other_engines_load(source: Path, tmp_path: Path) -> None:
    request = Request.from_options(
        model=str(source),
        device="cpu",
        backend="autoround",
        group_size=32,
        bits=(2, 16),
        granularity="fused",
        tokens=128,
        sequence_length=64,
        fit_tokens=128,
    )
    plan = coopq.quantize(request, Goal(budget="9avg", method="first-last"), tmp_path / "out")
    assert set(plan.assignment) == {2, 16}
    assert plan.saved_loss is not None
    assert SavedModel(tmp_path / "out").n_bytes() == plan.bytes
    assert plan.fingerprint["fitted to"] != plan.fingerprint["tokens"]
    ours = coopq.load(tmp_path / "out", device="cpu")
    tokens = np.random.default_rng(0).integers(3, 500, size=(2, 32))
    loss = np.concatenate(list(model_nll(ours, tokens)))
    assert export_model(tmp_path / "out", "auto-round", tmp_path / "theirs") == predicted_bytes(plan, "auto-round")
    n_bytes = export_model(tmp_path / "out", "compressed-tensors", tmp_path / "exported")
    assert n_bytes == predicted_bytes(plan, "compressed-tensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32).eval()
    np.testing.assert_allclose(np.concatenate(list(model_nll(theirs, tokens))), loss, atol=1e-3)
    packed, _ = SavedModel(tmp_path / "out").read()
    assert packed.keys() == plan.quantized.keys()


def test_layers_that_the_library_leaves_are_refused(source: Path) -> None:
    with pytest.raises(BackendError, match="leaves layers of 172 x 64 weights unquantized"):
        make("autoround").storage_bytes((172, 64), 4)
    players = find_players(load_model(str(source), device="cpu").model, embeddings=True)
    with pytest.raises(
        BackendError, match=r"nn\.Linear layers only, and model\.embed_tokens is an embedding, a Conv1D or experts"
    ):
        packed_sizes(players, make("autoround"), (2, 4))

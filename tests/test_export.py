"""Exports, loaded and run by the engines that they are for; GGUF files and OpenVINO have tests of their own."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma4TextConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    RwkvConfig,
)

import coopq
from coopq import Goal, QuantizerSpec, Request
from coopq.core.errors import CoopQError, ExportError, Mismatch, OutputError
from coopq.export.checkpoint import SavedModel
from coopq.export.formats import FORMS, export_model, get_form, predicted_bytes
from coopq.export.kv_cache import cache_bytes
from coopq.game.engines.prefix_engine import model_nll
from coopq.model.load import LoadedModel, fingerprint_weights, load_model
from coopq.quantizers import BACKENDS, get_backend
from tests.checkpoints import plan_for, save
from tests.command_line import command
from tests.conftest import STORIES
from tests.folders import save_source
from tests.openvino import EXACT, openvino_nll, save_openvino


@pytest.mark.parametrize("name", BACKENDS)
def test_the_table_names_the_backends_that_a_form_holds(name: str) -> None:
    backend = get_backend(QuantizerSpec(name, symmetric=True if "symmetric" in BACKENDS[name].options else None))
    for form, entry in FORMS.items():
        if name in entry.backends:
            get_form(form).check(backend)
        else:
            with pytest.raises(ExportError, match=re.escape(name)):
                get_form(form).check(backend)


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        (LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3), 3 * 4 * 16),
        (MambaConfig(), 0),
        (
            Lfm2Config(
                hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
                layer_types=["conv", "full_attention"],
            ),
            2 * 2 * 16,
        ),
        (
            Gemma4TextConfig(
                num_attention_heads=4, num_key_value_heads=2, head_dim=16, global_head_dim=32, num_hidden_layers=3,
                num_kv_shared_layers=1, layer_types=["sliding_attention", "full_attention", "full_attention"],
            ),
            2 * 2 * (16 + 32),
        ),
    ],
)  # fmt: skip
def test_a_cache_has_the_keys_and_values_of_each_layer(config: Any, numbers: int) -> None:
    assert cache_bytes(SimpleNamespace(config=config), 10) == 2 * numbers * 10


def test_a_configuration_that_says_nothing_of_heads_has_no_known_cache() -> None:
    with pytest.raises(ExportError, match=r"does not tell the size of its cache .*leave out --context"):
        cache_bytes(SimpleNamespace(config=RwkvConfig()), 10)


def test_a_budget_holds_the_cache(stories: str, tmp_path: Path) -> None:
    request = Request.from_options(model=stories, bits=(2, 8), tokens=32, sequence_length=32)
    goal = Goal(budget="300kB", method="first-last")
    plain = coopq.quantize(request, goal, tmp_path / "plain")
    # Keys and values of 5 layers, 4 heads of 8 each, 2 bytes: 640 bytes a token.
    with_cache = coopq.quantize(request.replace(context=64), goal, tmp_path / "cache")
    assert plain.budget_bytes - with_cache.budget_bytes == 640 * 64
    assert with_cache.file_bytes + 640 * 64 <= 300_000 < plain.file_bytes + 640 * 64


def test_exports_refuse_what_they_cannot_hold(stories: str, tmp_path: Path) -> None:
    request = Request.from_options(model=stories, bits=(3, 4), tokens=32, sequence_length=32)
    coopq.quantize(request, Goal(budget="3.5avg", method="first-last"), tmp_path / "saved")
    with pytest.raises(ExportError, match=r"GGUF files hold ggml's types, not those of backend 'rtn'.*coopq apply"):
        export_model(tmp_path / "saved", "gguf", tmp_path / "out.gguf")
    with pytest.raises(ExportError, match="search with --backend gptq"):
        export_model(tmp_path / "saved", "compressed-tensors", tmp_path / "out")
    with pytest.raises(ExportError, match="--base and --model are for gguf and openvino"):
        export_model(tmp_path / "saved", "auto-round", tmp_path / "out", model=stories)
    with pytest.raises(ExportError, match="form 'ggguf' is unknown; did you mean 'gguf'"):
        export_model(tmp_path / "saved", "ggguf", tmp_path / "out")
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("gguf", {}, "not those of backend 'rtn'; search with --backend ggml"),
        ("gguf", {"backend": "ggml", "bits": (4, 8)}, "has no types for rows of 172 weights: blocks have 32"),
        ("ggfu", {}, "form 'ggfu' is unknown; did you mean 'gguf'"),
        ("compressed-tensors", {}, "--backend gptq --symmetric"),
        (
            "openvino",
            {"backend": "gptq", "bits": (2, 4), "group_size": 32, "act_order": True},
            "not what backend 'gptq' makes",
        ),
        ("openvino", {}, "not a multiple of the group size 64; openvino needs"),
        ("compressed-tensors", {"backend": "gptq", "bits": (2, 4), "group_size": 32}, "--granularity fused, or block"),
        (
            "compressed-tensors",
            {"backend": "gptq", "bits": (2, 4), "granularity": "block"},
            "not a multiple of the group size 128",
        ),
    ]
    for target, changes, message in cases:
        other = request.replace(**{"granularity": "linear", **changes}, target=target)
        with pytest.raises(CoopQError, match=re.escape(message)):
            coopq.quantize(other, Goal(budget="3.5avg"), tmp_path / "other")


def random_llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=512, **shape, **settings)).eval()


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> tuple[coopq.Plan, Path]:
    """A small random model saved by gptq; its rows are whole groups, as those of the story model are not."""
    folder = tmp_path_factory.mktemp("gptq")
    model = random_llama()
    loaded = LoadedModel(model, AutoTokenizer.from_pretrained(STORIES), torch.float32)
    plan = plan_for(model, "gptq", 32, [2, 4, 16, 2, 4, 16, 2, 4], "fused")
    tokens = np.random.default_rng(0).integers(3, 500, size=(2, 64))
    return save(loaded, plan, folder / "saved", tokens), folder / "saved"


@pytest.mark.parametrize(
    ("form", "tied", "limit"),
    [("compressed-tensors", False, 225_000), pytest.param("auto-round", True, 115_000, marks=pytest.mark.slow)],
)
def test_folders_have_the_predicted_size_within_the_budget(form: str, tied: bool, limit: int, tmp_path: Path) -> None:
    source = tmp_path / "model"
    save_source(random_llama(tie_word_embeddings=tied).to(torch.float16), source)
    tokens = ["--tokens", "32", "--sequence-length", "32", "--fit-tokens", "32"]
    quantizer = ["--backend", "gptq-static", "--group-size", "32", "--bits", "2,4,16", "--granularity", "fused"]
    what = ["--budget", f"{limit}B", "--target", form, "--method", "first-last", "--json"]
    where: list[str | Path] = ["--run", tmp_path / "run", "--out", tmp_path / "saved"]
    code, out, _ = command("quantize", source, *quantizer, *tokens, *what, *where)
    assert code == 0
    n_bytes = export_model(tmp_path / "saved", form, tmp_path / "out")
    assert n_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size == json.loads(out)["exported_bytes"]
    assert limit - 8_000 < n_bytes <= limit, "less than raising a player further takes is left"


def test_transformers_loads_compressed_tensors_with_the_same_weights(
    gptq: tuple[coopq.Plan, Path], tmp_path: Path
) -> None:
    plan, saved = gptq
    out = tmp_path / "out"
    (saved / ".git").mkdir()
    (saved / "notes.txt").write_text("a user's own")
    (saved / "README.md").chmod(0o444)
    (saved / "LICENSE").write_text("as you like")
    assert export_model(saved, "compressed-tensors", out) == (out / "model.safetensors").stat().st_size
    assert sorted(path.name for path in out.iterdir()) == [
        "LICENSE",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (out / "README.md").stat().st_mode & 0o200, "a file that can be written again"
    assert "--to compressed-tensors" in (out / "README.md").read_text()
    # Its option to dequantize at once reads every group at the first one's width; a first forward does it rightly.
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ours = coopq.load(saved, device="cpu")
    tokens = torch.from_numpy(np.random.default_rng(0).integers(3, 500, size=(2, 32)))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens).logits, rtol=1e-3, atol=1e-3)
    packed, _ = SavedModel(saved).read()
    for name, bits in plan.quantized.items():
        weight = theirs.get_submodule(name).weight.detach()
        expected = packed.backend.dequantize(packed[name], (weight.shape[0], weight.shape[1]), bits, torch.float32)
        torch.testing.assert_close(weight, expected, rtol=2e-3, atol=1e-6)
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert {name for group in groups.values() for name in group["targets"]} == set(plan.quantized)
    with pytest.raises(OutputError, match="is not empty"):
        export_model(saved, "compressed-tensors", out)


def test_transformers_loads_auto_round_with_the_same_logits(gptq: tuple[coopq.Plan, Path], tmp_path: Path) -> None:
    plan, saved = gptq
    out = tmp_path / "out"
    export_model(saved, "auto-round", out)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(3, 500, size=(2, 32)))
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    code = f"""
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(out)!r}, dtype=torch.float16).eval()
widths = {{name: module.bits for name, module in model.named_modules() if hasattr(module, "qweight")}}
assert widths == {plan.quantized!r}, widths
with torch.no_grad():
    logits = model(load_file({str(tmp_path / "tokens.safetensors")!r})["tokens"]).logits.float()
save_file({{"logits": logits}}, {str(tmp_path / "theirs.safetensors")!r})
"""
    # In a process of its own: the library takes over logging.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "UNEXPECTED" not in done.stderr + done.stdout
    with torch.no_grad():
        ours = coopq.load(saved, device="cpu")(tokens).logits
    torch.testing.assert_close(load_file(tmp_path / "theirs.safetensors")["logits"], ours, rtol=0.01, atol=0.01)


@pytest.mark.slow
def test_openvino_computes_the_same_loss_of_gptq(gptq: tuple[coopq.Plan, Path], tmp_path: Path) -> None:
    saved, source, base = tmp_path / "saved", tmp_path / "model", tmp_path / "base"
    save_source(random_llama(), source)
    loaded = load_model(str(source), device="cpu")
    shutil.copytree(gptq[1], saved)
    fingerprint = {**gptq[0].fingerprint, "weights": fingerprint_weights(loaded.model)}
    gptq[0].replace(fingerprint=fingerprint).save(saved / "plan.json")
    base.mkdir()
    save_openvino(loaded.model, base)
    with pytest.raises(Mismatch, match="was made for another model"):
        export_model(saved, "openvino", tmp_path / "out", base=base, model=str(STORIES))
    n_bytes = export_model(saved, "openvino", tmp_path / "out", base=base, model=str(source))
    assert n_bytes == predicted_bytes(gptq[0], "openvino", base=base, model=str(source))
    tokens = np.random.default_rng(0).integers(3, 500, size=(2, 32))
    ours = np.concatenate(list(model_nll(coopq.load(saved, device="cpu"), tokens)))
    np.testing.assert_allclose(openvino_nll(tmp_path / "out", tokens, **EXACT), ours, atol=1e-4)


def test_a_folder_that_cannot_be_tested_is_written_with_a_warning(
    gptq: tuple[coopq.Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "auto_round", None)  # what Python itself takes for "not installed"
    export_model(gptq[1], "auto-round", tmp_path / "out")
    assert "the folder is not tested: auto-round is missing; run: pip install 'coopq[autoround]'" in caplog.messages


def test_layers_that_vllm_fuses_need_one_width(gptq: tuple[coopq.Plan, Path], tmp_path: Path) -> None:
    shutil.copytree(gptq[1], tmp_path / "saved")
    file = tmp_path / "saved" / "plan.json"
    player, *others = gptq[0].players
    assert [name.rpartition(".")[2] for name in player.modules] == ["q_proj", "k_proj", "v_proj"]
    *first, last = player.modules
    split = [
        msgspec.structs.replace(player, modules=tuple(first)),
        msgspec.structs.replace(player, modules=(last,), bits=6 - player.bits, n_bytes={f"{6 - player.bits:g}": 0}),
    ]
    gptq[0].replace(players=(*split, *others)).save(file)
    with pytest.raises(ExportError, match=r"q_proj, .*v_proj need one width.*--granularity fused"):
        export_model(tmp_path / "saved", "compressed-tensors", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(("form", "part"), [("compressed-tensors", "weight_scale"), ("auto-round", "scales")])
def test_an_exported_folder_that_computes_something_else_is_not_written(
    form: str, part: str, gptq: tuple[coopq.Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(get_form(form))
    pack = kind.pack  # type: ignore[attr-defined]

    def wrong(*arguments: Any) -> Any:
        packed = pack(*arguments)
        return {**packed, part: 30 * packed[part]}

    monkeypatch.setattr(kind, "pack", wrong)
    with pytest.raises(ExportError, match="computes other losses"):
        export_model(gptq[1], form, tmp_path / "out")
    assert not (tmp_path / "out").exists()

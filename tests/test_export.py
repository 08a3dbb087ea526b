"""Exports, loaded and run by the engines that they are for."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from coopq.core.config import CalibrationConfig, RunConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import coopq
from coopq.core.errors import BackendError, CoopQError, ExportError, Mismatch, OutputError, UnsupportedBits
from coopq.core.types import Width
from coopq.export.checkpoint import read_saved, save_model
from coopq.export.formats import export_model, predicted_bytes
from coopq.game.prefix_engine import model_nll
from coopq.judge.llama_cpp import llama_cpp_nll
from coopq.model.load import LoadedModel, fingerprint_weights, gguf_file, load_model
from coopq.model.players import find_players
from coopq.model.texts import calibration_set
from coopq.quantizers import Backend, get_backend
from coopq.quantizers.contract import check_backend
from coopq.quantizers.ggml.types import GGMLBackend, IQuants
from coopq.quantizers.input_statistics import column_importance
from tests.architectures import tiny_model
from tests.checkpoints import plan_for
from tests.command_line import command
from tests.llama_cpp import llama_cpp_text
from tests.openvino import EXACT, openvino_nll, save_openvino

STORIES = Path(__file__).parent / "data" / "stories260k"
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DEMO = RunConfig(
    "demo", "ggml", low=4, high=8, calibration=CalibrationConfig(sequences=1, length=128, fitting=1), target="gguf"
)
FILE = 100_000_000


@pytest.mark.parametrize("name", ["ggml", "ggml-iq", "ggml-gptq"])
@pytest.mark.parametrize("columns", [256, 768, 96, 576])
def test_ggml_keeps_the_contract_where_rows_allow(name: str, columns: int) -> None:
    backend, weight = get_backend(name), torch.randn(24, columns) * torch.rand(24, 1)
    widths = (4, 5, 8) if columns % 256 else backend.bits
    for bits in backend.bits:
        if bits in widths:
            # I-quants choose among some vectors of codes, none of which may be near in every weight.
            check_backend(backend, weight, bits, 1.0 if name == "ggml" else 1.2)
            packed = backend.quantize(weight, bits)["blocks"].numpy()
            theirs = gguf.quants.dequantize(packed, getattr(gguf.GGMLQuantizationType, _type(backend, columns, bits)))
            ours = backend.dequantize({"blocks": torch.from_numpy(packed)}, (24, columns), bits, torch.float32)
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5, atol=1e-7)
        else:
            with pytest.raises(BackendError, match=rf"no type of {bits} bits for rows of {columns}.*has 4, 5, 8"):
                backend.storage_bytes((24, columns), bits)


def _type(backend: Backend, columns: int, bits: Width) -> str:
    settings = backend.settings
    return str(settings["short_rows" if columns % 256 else "long_rows"][str(bits)])


@pytest.mark.parametrize("backend", [GGMLBackend(), IQuants()])
def test_important_columns_are_rounded_less(backend: GGMLBackend) -> None:
    weight = torch.randn(64, 256)
    importance = torch.ones(256)
    importance[::2] = 100.0
    for bits in backend.bits[:5]:
        errors = [
            (backend.dequantize(backend.quantize(weight, bits, of), (64, 256), bits, torch.float32) - weight).square()
            for of in (None, importance)
        ]
        plain, weighted = ((error.mean(0) * importance).mean() for error in errors)
        assert weighted < plain


def test_importance_is_the_mean_square_of_inputs(stories: str) -> None:
    loaded = load_model(stories, device="cpu")
    tokens = np.random.default_rng(0).integers(3, 500, size=(3, 16))
    name = "model.layers.2.mlp.down_proj"
    seen: list[torch.Tensor] = []
    handle = loaded.model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        loaded.model(input_ids=torch.from_numpy(tokens))
    handle.remove()
    expected = torch.cat(seen).flatten(0, 1).square().mean(0)
    torch.testing.assert_close(column_importance(loaded.model, [name], tokens)[name], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_has_the_importance_of_its_inputs(tied: bool) -> None:
    """An embedding has it too where it is the head, and none where it is not."""
    model = tiny_model("llama" if tied else "qwen3")
    head = "model.embed_tokens" if tied else "lm_head"
    tokens = np.random.default_rng(0).integers(3, 97, size=(3, 16))
    names = [linear.name for player in find_players(model, embeddings=True) for linear in player.linears]
    found = column_importance(model, names, tokens)
    assert set(names) - set(found) == (set() if tied else {"model.embed_tokens"})
    with torch.no_grad():
        hidden = model(input_ids=torch.from_numpy(tokens), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found[head], hidden.square().mean(dim=(0, 1)), rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[coopq.Plan, Path, Path]:
    """The demo model saved at 4 and 8 bits, and exported."""
    folder = tmp_path_factory.mktemp("gguf")
    plan = coopq.quantize(DEMO, f"{FILE}B", folder / "saved", method="first-last")
    n_bytes = export_model(folder / "saved", "gguf", folder / "demo.gguf")
    assert n_bytes == (folder / "demo.gguf").stat().st_size
    return plan, folder / "saved", folder / "demo.gguf"


@pytest.mark.real
def test_the_file_has_the_predicted_size_and_the_planned_types(demo: tuple[coopq.Plan, Path, Path]) -> None:
    plan, _, file = demo
    assert set(plan.assignment) == {4, 8}
    assert predicted_bytes(plan, "gguf") == file.stat().st_size
    assert FILE - 2_000_000 < file.stat().st_size <= FILE, "less than raising a block further takes is left"
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    for player, bits in enumerate(plan.assignment):
        # Rows of 576 have no K-quants; those of the down projection, 1,536, have.
        assert types[f"blk.{player}.attn_q.weight"] == {4: "IQ4_NL", 8: "Q8_0"}[bits]
        assert types[f"blk.{player}.ffn_down.weight"] == {4: "Q4_K", 8: "Q8_0"}[bits]
    source = gguf_file("demo")
    assert source is not None
    before = {tensor.name: tensor.data for tensor in gguf.GGUFReader(source).tensors}
    for tensor in gguf.GGUFReader(file).tensors:
        if not tensor.name.startswith("blk.") or "norm" in tensor.name:
            assert np.array_equal(tensor.data, before[tensor.name])


@pytest.mark.real
def test_llama_cpp_computes_the_same_loss(demo: tuple[coopq.Plan, Path, Path]) -> None:
    _, saved, file = demo
    loaded = load_model("demo", device="cpu")
    tokens = calibration_set(CalibrationConfig(sequences=3, length=128, seed=1), loaded.tokenizer).tokens
    model = coopq.load(saved, device="cpu")
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens)).logits[:, :-1]
    ours = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(tokens[:, 1:]).flatten(), reduction="none"
    ).numpy()
    theirs = llama_cpp_nll(file, tokens).flatten()
    # llama.cpp rounds activations to eight bits.
    assert abs(float(ours.mean() - theirs.mean())) < 0.02
    assert float(np.abs(ours - theirs).mean()) < 0.1
    source = gguf_file("demo")
    assert source is not None
    assert abs(float(llama_cpp_nll(source, tokens).mean() - theirs.mean())) > 0.02


@pytest.mark.real
def test_llama_cpp_writes_text_from_it(demo: tuple[coopq.Plan, Path, Path]) -> None:
    assert "Paris" in llama_cpp_text(demo[2], "The capital of France is")


@pytest.mark.real
@pytest.mark.parametrize("backend", ["ggml", "ggml-iq", "ggml-gptq"])
def test_llama_cpp_computes_the_same_loss_at_every_width(backend: str, tmp_path: Path) -> None:
    """Of a model whose rows have them all, the embedding among its players, from llama.cpp's own conversion."""
    source, base, saved = str(BENCHMARKS / "data" / "qwen"), tmp_path / "base.gguf", tmp_path / "saved"
    done = subprocess.run([sys.executable, BENCHMARKS / "convert.py", "qwen", base], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = load_model(source, device="cpu")
    tokens = calibration_set(CalibrationConfig(sequences=4, length=128), loaded.tokenizer).tokens
    between = [2, 3, 4] if backend == "ggml" else [2.5, 3.5, 4.5]
    plan = plan_for(loaded.model, backend, None, [6, 2, 3, 4, 5, 6, 8, 2, *between, 16, 8], embeddings=True)
    plan = replace(
        plan,
        config={**plan.config, "model": source},
        fingerprint={**plan.fingerprint, "weights": fingerprint_weights(loaded.model)},
    )
    save_model(loaded, plan, get_backend(backend), tokens, saved)
    file = tmp_path / "small.gguf"
    export_model(saved, "gguf", file, base=base)
    assert file.stat().st_size == predicted_bytes(plan, "gguf", base=base)
    with torch.no_grad():
        ours = np.concatenate(list(model_nll(coopq.load(saved, device="cpu"), tokens)))
    theirs, whole = (llama_cpp_nll(of, tokens).mean(axis=1) for of in (file, base))
    np.testing.assert_allclose(theirs, ours, atol=0.03)  # llama.cpp rounds activations to eight bits
    assert np.abs(ours - whole).mean() > 0.03


@pytest.mark.real
def test_untouched_tensors_are_those_of_the_base(tmp_path: Path) -> None:
    """Of a file that is quantized itself, 16 bits are its own types: nothing is lost that a budget does not ask for."""
    whole, base, saved, file = (tmp_path / name for name in ("whole.gguf", "base.gguf", "saved", "small.gguf"))
    done = subprocess.run([sys.executable, BENCHMARKS / "convert.py", "llama", whole], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    first = RunConfig(
        str(BENCHMARKS / "data" / "llama"), "ggml", low=4, high=8, embeddings=True, target="gguf", base=str(whole)
    )
    first = replace(first, calibration=CalibrationConfig(sequences=1, length=64, fitting=1))
    coopq.quantize(first, "4avg", tmp_path / "first", method="greedy-down")
    export_model(tmp_path / "first", "gguf", base)
    size = base.stat().st_size
    config = replace(first, model=str(base), low=3, high=16, between=(5,), base=None)
    with pytest.raises(UnsupportedBits, match="every player takes no more bytes at a wider width than at 5; leave it"):
        coopq.quantize(config, f"{size - 100_000}B", saved)
    config = replace(config, between=())
    plan = coopq.quantize(config, f"{size - 100_000}B", saved, method="greedy-down")
    assert set(plan.assignment) == {3, 16}
    assert export_model(saved, "gguf", file) == predicted_bytes(plan, "gguf") == file.stat().st_size
    assert size - 300_000 < file.stat().st_size <= size - 100_000
    before = {tensor.name: tensor for tensor in gguf.GGUFReader(base).tensors}
    kinds = {tensor.name: (tensor.tensor_type.name, tensor) for tensor in gguf.GGUFReader(file).tensors}
    lowered = {name for name, (kind, tensor) in kinds.items() if tensor.tensor_type != before[name].tensor_type}
    assert {kinds[name][0] for name in lowered} == {"Q3_K"}
    assert len(lowered) == sum(bits == 3 for bits in plan.modules.values())
    assert all(np.array_equal(of.data, before[name].data) for name, (_, of) in kinds.items() if name not in lowered)
    deployed = coopq.apply(plan, tmp_path / "deployed", backend="ggml-iq")
    assert deployed.bytes < plan.bytes  # its three bits are IQ3_XXS
    assert export_model(tmp_path / "deployed", "gguf", file) == file.stat().st_size <= size - 100_000


@pytest.mark.real
def test_the_base_must_be_the_very_model(demo: tuple[coopq.Plan, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(Mismatch, match=r"is not model\.layers\..* of the model"):
        export_model(demo[1], "gguf", tmp_path / "other.gguf", base=demo[2])
    assert not list(tmp_path.iterdir())


def test_a_budget_holds_the_cache(stories: str, tmp_path: Path) -> None:
    config = RunConfig(stories, low=2, high=8, calibration=CalibrationConfig(sequences=1, length=32))
    plain = coopq.quantize(config, "120kB", tmp_path / "plain", method="first-last")
    # Keys and values of 5 layers, 4 heads of 8 each, 2 bytes: 640 bytes a token.
    with_cache = coopq.quantize(
        dataclasses.replace(config, context=64), "120kB", tmp_path / "cache", method="first-last"
    )
    assert plain.budget_bytes - with_cache.budget_bytes == 640 * 64
    assert with_cache.bytes + 640 * 64 <= 120_000 < plain.bytes + 640 * 64


def test_exports_refuse_what_they_cannot_hold(stories: str, tmp_path: Path) -> None:
    config = RunConfig(stories, low=3, high=4, calibration=CalibrationConfig(sequences=1, length=32))
    coopq.quantize(config, "3.5avg", tmp_path / "saved", method="first-last")
    with pytest.raises(ExportError, match=r"quantized by 'rtn', and GGUF files hold ggml's types.*--backend ggml"):
        export_model(tmp_path / "saved", "gguf", tmp_path / "out.gguf")
    with pytest.raises(ExportError, match="search with --backend gptq"):
        export_model(tmp_path / "saved", "compressed-tensors", tmp_path / "out")
    with pytest.raises(ExportError, match="'ggguf' is unknown; did you mean 'gguf'"):
        export_model(tmp_path / "saved", "ggguf", tmp_path / "out")
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("gguf", {}, "not those of 'rtn'; add --backend ggml"),
        (
            "gguf",
            {"backend": "ggml", "low": 4, "high": 8},
            "has no types for rows of 172 weights: blocks have 32",
        ),
        ("ggfu", {}, "target 'ggfu' is unknown; did you mean 'gguf'"),
        ("compressed-tensors", {}, "--backend gptq --symmetric"),
        (
            "openvino",
            {"backend": "gptq", "low": 2, "group_size": 32, "act_order": True},
            "not what backend 'gptq' makes",
        ),
        ("openvino", {}, "no whole groups of 64, as openvino wants"),
        ("compressed-tensors", {"backend": "gptq", "low": 2, "group_size": 32}, "--granularity fused, or block"),
        ("compressed-tensors", {"backend": "gptq", "low": 2, "granularity": "block"}, "no whole groups of 128"),
    ]
    for target, changes, message in cases:
        other = dataclasses.replace(config, **{"granularity": "linear", **changes}, target=target)
        with pytest.raises(CoopQError, match=re.escape(message)):
            coopq.quantize(other, "3.5avg", tmp_path / "other")
    plan = coopq.Plan.load(tmp_path / "saved" / "plan.json")
    with pytest.raises(ExportError, match=r"is no GGUF file.*--base: llama.cpp's convert_hf_to_gguf.py"):
        predicted_bytes(plan, "gguf")


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
    backend, saved = get_backend("gptq", group_size=32), folder / "saved"
    return save_model(loaded, plan, backend, tokens, saved, calibration=tokens), saved


@pytest.mark.parametrize(
    ("form", "tied", "limit"), [("compressed-tensors", False, 225_000), ("auto-round", True, 115_000)]
)
def test_folders_have_the_predicted_size_within_the_budget(form: str, tied: bool, limit: int, tmp_path: Path) -> None:
    source = tmp_path / "model"
    random_llama(tie_word_embeddings=tied).to(torch.float16).save_pretrained(source)
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(source)
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
    assert export_model(saved, "compressed-tensors", out) == (out / "model.safetensors").stat().st_size
    # Its option to dequantize at once reads every group at the first one's width; a first forward does it rightly.
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ours = coopq.load(saved, device="cpu")
    tokens = torch.from_numpy(np.random.default_rng(0).integers(3, 500, size=(2, 32)))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens).logits, rtol=1e-3, atol=1e-3)
    backend, packed = get_backend(**plan.quantizer), read_saved(saved)[0]
    for name, bits in plan.quantized.items():
        weight = theirs.get_submodule(name).weight.detach()
        expected = backend.dequantize(packed[name], (weight.shape[0], weight.shape[1]), bits, torch.float32)
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


def test_openvino_computes_the_same_loss_of_gptq(gptq: tuple[coopq.Plan, Path], tmp_path: Path) -> None:
    saved, source, base = tmp_path / "saved", tmp_path / "model", tmp_path / "base"
    random_llama().save_pretrained(source)
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(source)
    loaded = load_model(str(source), device="cpu")
    shutil.copytree(gptq[1], saved)
    fingerprint = {**gptq[0].fingerprint, "weights": fingerprint_weights(loaded.model)}
    replace(gptq[0], fingerprint=fingerprint).save(saved / "plan.json")
    base.mkdir()
    save_openvino(loaded.model, base)
    with pytest.raises(Mismatch, match="was made for another model"):
        export_model(saved, "openvino", tmp_path / "out", base=base, model=str(STORIES))
    n_bytes = export_model(saved, "openvino", tmp_path / "out", base=base, model=str(source))
    assert n_bytes == predicted_bytes(gptq[0], "openvino", base=base, model=str(source))
    tokens = np.random.default_rng(0).integers(3, 500, size=(2, 32))
    ours = np.concatenate(list(model_nll(coopq.load(saved, device="cpu"), tokens)))
    np.testing.assert_allclose(openvino_nll(tmp_path / "out", tokens, **EXACT), ours, atol=1e-4)


def test_layers_that_vllm_fuses_need_one_width(gptq: tuple[coopq.Plan, Path], tmp_path: Path) -> None:
    shutil.copytree(gptq[1], tmp_path / "saved")
    file = tmp_path / "saved" / "plan.json"
    data = json.loads(file.read_text())
    player = data["players"][0]
    assert [name.rpartition(".")[2] for name in player["modules"]] == ["q_proj", "k_proj", "v_proj"]
    *first, last = player["modules"]
    data["players"][0] = player | {"modules": first}
    data["players"].insert(1, player | {"modules": [last], "bits": 6 - player["bits"]})
    file.write_text(json.dumps(data))
    with pytest.raises(ExportError, match=r"q_proj, .*v_proj need one width.*--granularity fused"):
        export_model(tmp_path / "saved", "compressed-tensors", tmp_path / "out")

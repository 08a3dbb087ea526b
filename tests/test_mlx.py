"""mlx-lm's form: mlx gives our weights, and mlx-lm computes our losses from a file of the predicted size."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MixtralConfig, XGLMConfig

import coopq
from coopq import Goal, QuantizerSpec, Request
from coopq.core.errors import ExportError
from coopq.export.folders.mlx import pack_affine
from coopq.export.folders.mlx_process import is_installed, mlx_losses
from coopq.export.formats import export_model, get_form, predicted_bytes
from coopq.export.verification import token_losses
from coopq.model.load import load_model
from coopq.model.players import find_players
from coopq.model.sources.classes import make_model
from coopq.plan.plan import Plan
from coopq.quantizers import get_backend
from coopq.quantizers.backend import Affine
from coopq.quantizers.gptq.format import pack_weight
from tests.checkpoints import plan_for, save
from tests.command_line import command
from tests.folders import save_source
from tests.quantizers import weight_quantizer

TOKENS = np.random.default_rng(0).integers(3, 500, size=(1, 48))
needs_mlx = pytest.mark.skipif(not is_installed(), reason="mlx-lm is not installed")


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_gives_the_weights_of_every_width_and_group_size(bits: int, group_size: int) -> None:
    mx = pytest.importorskip("mlx.core")
    shape = (6, 512 // group_size)
    codes = torch.randint(2**bits, (*shape, group_size), dtype=torch.uint8)
    zeros = torch.randint(2**bits, (*shape, 1), dtype=torch.uint8)
    weight = Affine(codes, zeros, torch.rand(*shape, 1).half())
    ours = ((codes.float() - zeros.float()) * weight.scales.float()).flatten(1).numpy()
    step = weight.scales.float().expand_as(codes).flatten(1).numpy()
    # A bias is below 2**bits steps, and 16 bits keep 11 or 8 of its bits. bfloat16 rounds the scale too.
    most_steps = {torch.float32: 0.0, torch.float16: 2.0 ** (bits - 11), torch.bfloat16: 2.0 ** (bits - 7)}
    for dtype, steps in most_steps.items():
        packed = pack_affine(weight, bits, group_size, dtype)
        words, scales, biases = (mx.array(as_numpy(packed[part])) for part in ("weight", "scales", "biases"))
        theirs = np.array(mx.dequantize(words, scales, biases, group_size=group_size, bits=bits))
        assert (np.abs(theirs - ours) <= steps * step).all(), dtype


def as_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The values of a tensor; numpy has no bfloat16."""
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


@pytest.mark.parametrize(("backend", "group_size", "theirs"), [("rtn", 96, 32), ("rtn", 256, 128), ("hqq", 64, 64)])
def test_groups_of_mlx_divide_those_of_a_backend(backend: str, group_size: int, theirs: int) -> None:
    mx = pytest.importorskip("mlx.core")
    form: Any = get_form("mlx")
    quantizer = weight_quantizer(backend, group_size=group_size)
    packed = quantizer.quantize(torch.randn(4, 768), 3)
    parts = form.pack(packed, (4, 768), 3, quantizer, torch.float32)
    assert parts["scales"].shape == (4, 768 // theirs)
    words, scales, biases = (mx.array(as_numpy(parts[part])) for part in ("weight", "scales", "biases"))
    weight = np.array(mx.dequantize(words, scales, biases, group_size=theirs, bits=3))
    np.testing.assert_allclose(
        weight, quantizer.dequantize(packed, (4, 768), 3, torch.float32).numpy(), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mlx_gives_the_weights_of_gptq(bits: int) -> None:
    mx = pytest.importorskip("mlx.core")
    (rows, columns), form = (32, 128), get_form("mlx")
    gptq: Any = get_backend(QuantizerSpec("gptq", group_size=32))
    scales, zeros = torch.rand(rows, 4).half().float(), torch.full((rows, 4), 2 ** (bits - 1))
    codes, group = torch.randint(2**bits, (rows, columns)), torch.arange(columns) // 32
    weight = (codes - zeros[:, group]) * scales[:, group]
    packed = pack_weight({"weight": weight, "scales": scales, "zeros": zeros, "g_idx": group}, bits)
    parts = cast(Any, form).pack(packed, (rows, columns), bits, gptq, torch.float16)
    words, *affine = (mx.array(as_numpy(parts[part])) for part in ("weight", "scales", "biases"))
    # Zero points in the middle of the range are powers of two, so even 16 bits hold the biases.
    assert np.array_equal(np.array(mx.dequantize(words, *affine, group_size=32, bits=bits)), weight.numpy())


def small(kind: Any = LlamaConfig, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A small random model; its rotary base is not the one that mlx-lm takes by default."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
    if kind is LlamaConfig:
        settings = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, **settings}
    torch.manual_seed(0)
    model = make_model(kind(**shape, intermediate_size=128, **settings), torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[coopq.Plan, Path]]:
    """Saves a model at a plan by hand; gives the plan and the folder."""

    def make(dtype: torch.dtype, backend: str, bits: list[int], tied: bool = True) -> tuple[coopq.Plan, Path]:
        folder = tmp_path_factory.mktemp("mlx")
        source = str(save_source(small(dtype=dtype, tie_word_embeddings=tied), folder / "source"))
        loaded = load_model(source, device="cpu")
        players = find_players(loaded.model, "linear", embeddings=True)
        widths = [bits[index % len(bits)] for index in range(len(players))]
        plan = plan_for(loaded.model, backend, 32, widths, "linear", embeddings=True)
        plan = plan.replace(request=plan.request.replace(model=source))
        return save(loaded, plan, folder / "saved"), folder / "saved"

    return make


@needs_mlx
@pytest.mark.parametrize(
    ("dtype", "backend", "tied", "apart"),
    [
        (torch.float32, "rtn", True, 1e-4),
        (torch.float16, "rtn", False, 0.02),
        (torch.bfloat16, "rtn", True, 0.2),
        (torch.float16, "hqq", True, 0.02),
    ],
)
def test_mlx_lm_computes_the_same_losses_at_every_width(
    dtype: torch.dtype, backend: str, tied: bool, apart: float, made: Any, tmp_path: Path
) -> None:
    (plan, saved), out = made(dtype, backend, [8, 2, 3, 4, 16], tied), tmp_path / "out"
    n_bytes = export_model(saved, "mlx", out)
    assert n_bytes == (out / "model.safetensors").stat().st_size == predicted_bytes(plan, "mlx")
    ours = token_losses(coopq.load(saved, device="cpu"), TOKENS, "the saved model")
    assert np.abs(mlx_losses(out, TOKENS) - ours).mean() < apart
    whole = token_losses(load_model(plan.request.model.source, device="cpu").model, TOKENS, "the model")
    assert np.abs(ours - whole).mean() > 0.5
    code = f"""
from mlx_lm import generate, load
model, tokenizer = load({str(out)!r})
widths = {{name: module.bits for name, module in model.named_modules() if hasattr(module, "bits")}}
assert widths == {plan.quantized!r}, widths
assert {str(dtype)!r}.endswith(str(model.model.embed_tokens.scales.dtype).rpartition(".")[2])
assert generate(model, tokenizer, "Once upon a time", max_tokens=4)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@needs_mlx
def test_a_folder_has_the_predicted_size_within_the_budget(tmp_path: Path) -> None:
    source, limit = save_source(small(dtype=torch.float16), tmp_path / "source"), 200_000
    quantizer = ["--backend", "rtn", "--group-size", "32", "--bits", "2,4,16", "--granularity", "fused"]
    tokens = ["--tokens", "32", "--sequence-length", "32"]
    what = ["--budget", f"{limit}B", "--target", "mlx", "--method", "first-last", "--json"]
    where: list[str | Path] = ["--run", tmp_path / "run", "--out", tmp_path / "saved"]
    code, out, err = command("quantize", source, *quantizer, *tokens, *what, *where)
    assert code == 0, err
    n_bytes = export_model(tmp_path / "saved", "mlx", tmp_path / "out")
    assert n_bytes == json.loads(out)["exported_bytes"]
    assert limit - 8_000 < n_bytes <= limit, "less than raising a player further takes is left"
    moved, plan = source.rename(tmp_path / "moved"), Plan.load(tmp_path / "saved" / "plan.json")
    assert coopq.apply(plan, tmp_path / "applied", model=str(moved)).file_bytes == n_bytes


@needs_mlx
@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (XGLMConfig, {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4}, "xglm not supported"),
        (GPT2Config, {"n_embd": 64, "n_layer": 2, "n_head": 4}, "c_attn of GPT2LMHeadModel .* inputs before"),
        (MixtralConfig, {"num_local_experts": 2}, "experts.* of MixtralForCausalLM holds its experts in one tensor"),
    ],
)
def test_models_that_mlx_lm_does_not_load_are_refused_before_a_search(
    kind: Any, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    request = Request.from_options(
        model=str(save_source(small(kind, **settings), tmp_path / "source")),
        bits=(2, 4), group_size=32, tokens=32, sequence_length=32, target="mlx",
    )  # fmt: skip
    with pytest.raises(ExportError, match=message):
        coopq.quantize(request, Goal(budget="3avg"), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 16}, "in groups of 32, 64 or 128 .*'group_size': 16"),
        ({"backend": "quanto", "bits": (2, 4)}, "not what backend 'quanto' makes"),
        ({"group_size": 32}, "not a multiple of the group size 32; mlx needs"),
    ],
)
def test_groups_that_mlx_does_not_have_are_refused(
    changes: dict[str, Any], message: str, stories: str, tmp_path: Path
) -> None:
    request = Request.from_options(model=stories, tokens=32, sequence_length=32, target="mlx")
    with pytest.raises(ExportError, match=message):
        coopq.quantize(request.replace(**changes), Goal(budget="3avg"), tmp_path / "out")


@needs_mlx
def test_an_exported_folder_that_computes_something_else_is_not_written(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, saved = made(torch.float32, "rtn", [4])
    monkeypatch.setattr("coopq.export.folders.mlx._rotary_entries", lambda config: {})
    with pytest.raises(ExportError, match="computes other losses"):
        export_model(saved, "mlx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_before_a_search(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlx_lm", None)  # what Python itself takes for "not installed"
    message = r"needs the package mlx-lm; run: pip install 'coopq\[mlx\]'"
    with pytest.raises(ExportError, match=message):
        export_model(finished, "mlx", tmp_path / "out")
    request = Request.from_options(model=str(tmp_path / "not looked at"), target="mlx")
    with pytest.raises(ExportError, match=message):
        coopq.deliver(request, Goal(budget="3avg"), tmp_path / "out")

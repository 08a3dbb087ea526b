"""GGUF files, loaded and run by llama.cpp."""

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import coopq
from coopq import Goal, QuantizerSpec, Request
from coopq.core.errors import ExportError, Mismatch, UnsupportedBits
from coopq.core.specs import TextSpec
from coopq.core.types import Width, silent
from coopq.export.formats import export_model, predicted_bytes
from coopq.game.engines.prefix_engine import model_nll
from coopq.judge.engines.engine_check import check_in_llama_cpp
from coopq.judge.engines.llama_cpp import llama_cpp_nll
from coopq.model.load import fingerprint_weights, gguf_file, load_model
from coopq.model.players import find_players
from coopq.model.texts import calibration_set
from coopq.quantizers.backend import Backend
from coopq.quantizers.contract import check_backend
from coopq.quantizers.ggml.types import GGMLBackend, IQuants
from coopq.quantizers.input_statistics import column_importance
from tests.architectures import tiny_model
from tests.checkpoints import plan_for, save
from tests.llama_cpp import llama_cpp_text
from tests.quantizers import weight_quantizer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DEMO = Request.from_options(
    model="demo", backend="ggml", bits=(4, 8), tokens=128, sequence_length=128, fit_tokens=128, target="gguf"
)
FILE = 100_000_000


@pytest.mark.parametrize("name", ["ggml", "ggml-iq", "ggml-gptq"])
@pytest.mark.parametrize("columns", [256, 768, 96, 576])
def test_ggml_keeps_the_contract_where_rows_allow(name: str, columns: int) -> None:
    backend, weight = weight_quantizer(name), torch.randn(24, columns) * torch.rand(24, 1)
    for bits in backend.bits:
        if bits in backend.widths_of((24, columns)):
            # I-quants choose among some vectors of codes, none of which may be near in every weight.
            check_backend(backend, weight, bits, 1.0 if name == "ggml" else 1.2)
            packed = backend.quantize(weight, bits)["blocks"].numpy()
            theirs = gguf.quants.dequantize(packed, getattr(gguf.GGMLQuantizationType, _type(backend, columns, bits)))
            ours = backend.dequantize({"blocks": torch.from_numpy(packed)}, (24, columns), bits, torch.float32)
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5, atol=1e-7)
        else:
            wider = min(width for width in backend.widths_of((24, columns)) if width > bits)
            assert torch.equal(backend.quantize(weight, bits)["blocks"], backend.quantize(weight, wider)["blocks"])


def _type(backend: Backend, columns: int, bits: Width) -> str:
    settings = backend.settings
    return str(settings["short_rows" if columns % 256 else "long_rows"][str(bits)])


@pytest.mark.parametrize("backend", [GGMLBackend(), IQuants()])
def test_important_columns_are_rounded_less(backend: GGMLBackend) -> None:
    weight = torch.randn(64, 256)
    columns = torch.ones(256)
    columns[::2] = 100.0
    for bits in backend.widths_of((64, 256))[:5]:
        quantized = (backend.quantize(weight, bits, importance) for importance in (None, columns))
        errors = [backend.dequantize(packed, (64, 256), bits, torch.float32) - weight for packed in quantized]
        plain, weighted = ((error.square().mean(0) * columns).mean() for error in errors)
        assert weighted < plain


def test_columns_without_importance_keep_their_weights() -> None:
    weight = torch.randn(8, 256)
    importance = torch.ones(256)
    importance[:64] = 0
    backend = GGMLBackend()
    for bits in (2, 3, 4, 5, 6):
        packed = backend.quantize(weight, bits, importance)
        restored = backend.dequantize(packed, (8, 256), bits, torch.float32)
        assert float((restored - weight)[:, :64].norm() / weight[:, :64].norm()) < 0.6, bits
        dead = backend.quantize(weight, bits, torch.zeros(256))
        alike = backend.quantize(weight, bits, torch.ones(256))
        assert torch.equal(dead["blocks"], alike["blocks"])


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
    plan = coopq.quantize(DEMO, Goal(budget=f"{FILE}B", method="first-last"), folder / "saved")
    n_bytes = export_model(folder / "saved", "gguf", folder / "demo.gguf")
    assert n_bytes == (folder / "demo.gguf").stat().st_size
    return plan, folder / "saved", folder / "demo.gguf"


@pytest.mark.slow
@pytest.mark.real
def test_the_file_has_the_predicted_size_and_the_planned_types(demo: tuple[coopq.Plan, Path, Path]) -> None:
    plan, _, file = demo
    assert set(plan.assignment) == {4, 8}
    assert predicted_bytes(plan, "gguf") == file.stat().st_size
    assert FILE - 2_000_000 < file.stat().st_size <= FILE, "less than raising a block further takes is left"
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    for player, bits in enumerate(plan.assignment):
        # Rows of 576 have no K-quants; those of the down projection, 1,536, have.
        assert types[f"blk.{player}.attn_q.weight"] == {4: "IQ4_NL", 8: "Q8_0"}[int(bits)]
        assert types[f"blk.{player}.ffn_down.weight"] == {4: "Q4_K", 8: "Q8_0"}[int(bits)]
    source = gguf_file("demo")
    assert source is not None
    before = {tensor.name: tensor.data for tensor in gguf.GGUFReader(source).tensors}
    for tensor in gguf.GGUFReader(file).tensors:
        if not tensor.name.startswith("blk.") or "norm" in tensor.name:
            assert np.array_equal(tensor.data, before[tensor.name])


@pytest.mark.slow
@pytest.mark.real
def test_llama_cpp_computes_the_same_loss(demo: tuple[coopq.Plan, Path, Path]) -> None:
    _, saved, file = demo
    loaded = load_model("demo", device="cpu")
    tokens = calibration_set(TextSpec(tokens=384, sequence_length=128, seed=1), loaded.tokenizer).tokens
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


@pytest.mark.slow
@pytest.mark.real
def test_llama_cpp_writes_text_from_it(demo: tuple[coopq.Plan, Path, Path]) -> None:
    assert "Paris" in llama_cpp_text(demo[2], "The capital of France is")


@pytest.mark.slow
@pytest.mark.real
def test_the_check_in_llama_cpp_compares_losses_and_prints_no_log(
    demo: tuple[coopq.Plan, Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, saved, file = demo
    check = check_in_llama_cpp(file, saved, None, silent)
    assert check is not None
    assert abs(check.loss - check.ours) < 0.2
    assert check.text.startswith("The most important thing is ")
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    with pytest.raises(ExportError, match=r"llama\.cpp does not load .*no\.gguf"):
        check_in_llama_cpp(tmp_path / "no.gguf", saved, None, silent)
    assert capfd.readouterr().err == ""


@pytest.mark.real
@pytest.mark.parametrize(
    "backend",
    ["ggml-gptq", pytest.param("ggml", marks=pytest.mark.slow), pytest.param("ggml-iq", marks=pytest.mark.slow)],
)
def test_llama_cpp_computes_the_same_loss_at_every_width(backend: str, tmp_path: Path) -> None:
    """Of a model whose rows have them all, the embedding among its players, from llama.cpp's own conversion."""
    source, base, saved = str(BENCHMARKS / "data" / "qwen"), tmp_path / "base.gguf", tmp_path / "saved"
    done = subprocess.run([sys.executable, BENCHMARKS / "convert.py", "qwen", base], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = load_model(source, device="cpu")
    tokens = calibration_set(TextSpec(tokens=512, sequence_length=128), loaded.tokenizer).tokens
    between = [2, 3, 4] if backend == "ggml" else [2.5, 3.5, 4.5]
    plan = plan_for(loaded.model, backend, None, [6, 2, 3, 4, 5, 6, 8, 2, *between, 16, 8], embeddings=True)
    plan = plan.replace(
        request=plan.request.replace(model=source),
        fingerprint={**plan.fingerprint, "weights": fingerprint_weights(loaded.model)},
    )
    save(loaded, plan, saved, tokens)
    file = tmp_path / "small.gguf"
    export_model(saved, "gguf", file, base=base)
    assert file.stat().st_size == predicted_bytes(plan, "gguf", base=base)
    with torch.no_grad():
        ours = np.concatenate(list(model_nll(coopq.load(saved, device="cpu"), tokens)))
    theirs, whole = (llama_cpp_nll(path, tokens).mean(axis=1) for path in (file, base))
    np.testing.assert_allclose(theirs, ours, atol=0.03)  # llama.cpp rounds activations to eight bits
    assert np.abs(ours - whole).mean() > 0.03


@pytest.mark.slow
@pytest.mark.real
def test_untouched_tensors_are_those_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that is quantized itself, 16 bits are its own types: nothing is lost that a budget does not ask for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # the base is converted to be loaded
    whole, base, saved, file = (tmp_path / name for name in ("whole.gguf", "base.gguf", "saved", "small.gguf"))
    done = subprocess.run([sys.executable, BENCHMARKS / "convert.py", "llama", whole], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    first = DEMO.replace(
        model=str(BENCHMARKS / "data" / "llama"),
        embeddings=True,
        base=str(whole),
        tokens=64,
        sequence_length=64,
        fit_tokens=64,
    )
    coopq.quantize(first, Goal(budget="4avg", method="greedy-down"), tmp_path / "first")
    export_model(tmp_path / "first", "gguf", base)
    size = base.stat().st_size
    request = first.replace(model=str(base), bits=(3, 16), base=None)
    goal = Goal(budget=f"{size - 100_000}B", method="greedy-down")
    with pytest.raises(UnsupportedBits, match="or a wider type takes no more bytes; leave 5 out"):
        coopq.quantize(request.replace(bits=(3, 5, 16)), goal, saved)
    plan = coopq.quantize(request, goal, saved)
    assert set(plan.assignment) == {3, 16}
    assert export_model(saved, "gguf", file) == predicted_bytes(plan, "gguf") == file.stat().st_size
    assert size - 300_000 < file.stat().st_size <= size - 100_000
    before = {tensor.name: tensor for tensor in gguf.GGUFReader(base).tensors}
    kinds = {tensor.name: (tensor.tensor_type.name, tensor) for tensor in gguf.GGUFReader(file).tensors}
    lowered = {name for name, (kind, tensor) in kinds.items() if tensor.tensor_type != before[name].tensor_type}
    assert {kinds[name][0] for name in lowered} == {"Q3_K"}
    assert len(lowered) == sum(bits == 3 for bits in plan.modules.values())
    assert all(np.array_equal(t.data, before[name].data) for name, (_, t) in kinds.items() if name not in lowered)
    deployed = coopq.apply(plan, tmp_path / "deployed", deployment=QuantizerSpec("ggml-iq"))
    assert deployed.bytes < plan.bytes  # its three bits are IQ3_XXS
    assert export_model(tmp_path / "deployed", "gguf", file) == file.stat().st_size <= size - 100_000


@pytest.mark.slow
@pytest.mark.real
def test_the_base_must_be_the_very_model(demo: tuple[coopq.Plan, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(Mismatch, match=r"is not model\.layers\..* of the model"):
        export_model(demo[1], "gguf", tmp_path / "other.gguf", base=demo[2])
    assert not list(tmp_path.iterdir())

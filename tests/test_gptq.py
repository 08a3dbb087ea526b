"""GPTQ through GPTQModel, on a real tiny model; the library runs in processes of its own throughout."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import coopq
from coopq.core.errors import BackendError, OutputError
from coopq.core.goal import Goal
from coopq.core.specs import Request, TextSpec
from coopq.export.checkpoint import SavedModel
from coopq.game.engines.prefix_engine import model_nll
from coopq.model.load import load_model
from coopq.model.texts import calibration_set, fitting_set
from coopq.quantizers.gptq.subprocess_job import DONE, only_gpu, running_job
from tests.conftest import STORIES
from tests.quantizers import backend as make

PROMPT = "Once upon a time, a girl named Lily went to the park with her mom."


TEXT = TextSpec(tokens=512, sequence_length=128, fit_tokens=512)


@pytest.fixture(scope="module", params=[pytest.param("gptq", marks=pytest.mark.slow), "gptq-static"])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[coopq.Plan, Path]:
    """The main job with GPTQ: bank at 2 and 4 bits, some players as they are, a saved checkpoint."""
    out = tmp_path_factory.mktemp("gptq") / "out"
    asked = Request.from_options(
        model=str(STORIES),
        device="cpu",
        backend=request.param,
        group_size=32,
        bits=(2, 4, 16),
        tokens=TEXT.tokens,
        sequence_length=TEXT.sequence_length,
        fit_tokens=TEXT.fit_tokens,
    )
    return coopq.quantize(asked, Goal(budget="6avg", method="first-last"), out), out


def test_the_saved_model_is_mixed_and_its_own_loss_is_known(job: tuple[coopq.Plan, Path]) -> None:
    plan, out = job
    assert set(plan.assignment) == {2, 4, 16}
    assert plan.measured_loss is not None
    assert coopq.Plan.load(out / "plan.json") == plan
    tokenizer = load_model(str(STORIES), device="cpu").tokenizer
    assert plan.fingerprint["fitted to"] == fitting_set(TEXT, tokenizer).fingerprint != plan.fingerprint["tokens"]
    tokens = calibration_set(TEXT, tokenizer).tokens
    loss = float(np.concatenate(list(model_nll(coopq.load(out, device="cpu"), tokens))).mean())
    if plan.quantizer.backend == "gptq":
        # The bank's weights were made with uniform inputs, the saved ones with mixed inputs: near, not equal.
        assert plan.saved_loss == pytest.approx(loss, rel=1e-6)
        assert loss == pytest.approx(plan.measured_loss, rel=0.1)
        assert loss != pytest.approx(plan.measured_loss, rel=1e-4)
    else:
        assert plan.saved_loss is None
        assert loss == pytest.approx(plan.measured_loss, rel=1e-5)
    assert SavedModel(out).n_bytes() == plan.bytes
    rules = json.loads((out / "quantize_config.json").read_text())
    others = [bits for bits in plan.assignment if bits != rules["bits"]]
    assert len(rules["dynamic"]) == 7 * len(others)
    assert sum(rule.startswith("-") for rule in rules["dynamic"]) == 7 * others.count(16)
    tensors = load_file(out / "model.safetensors")
    for name, bits in plan.quantized.items():
        assert tensors[f"{name}.qweight"].shape[0] == -(-tensors[f"{name}.g_idx"].numel() * bits // 32)
    for name in plan.modules.keys() - plan.quantized.keys():
        assert f"{name}.qweight" not in tensors
        assert tensors[f"{name}.weight"].dtype == torch.float16


def test_gptqmodel_loads_it_and_computes_the_same(job: tuple[coopq.Plan, Path], tmp_path: Path) -> None:
    _, out = job
    # The library's kernels have no float32.
    code = f"""
import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import save_file
model = GPTQModel.load({str(out)!r}, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
ids = model.tokenizer({PROMPT!r}, return_tensors="pt")["input_ids"]
with torch.no_grad():
    logits = model.model(input_ids=ids).logits.float()
weights = {{
    name: module.dequantize_weight().T.float().contiguous()
    for name, module in model.model.named_modules()
    if hasattr(module, "qweight")
}}
save_file({{"ids": ids, "logits": logits, **weights}}, {str(tmp_path / "theirs.safetensors")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = load_file(tmp_path / "theirs.safetensors")
    model = coopq.load(out, device="cpu")
    with torch.no_grad():
        ours = model(input_ids=theirs["ids"]).logits
    torch.testing.assert_close(ours, theirs["logits"], atol=0.1, rtol=0.02)
    assert torch.equal(ours.argmax(-1)[0, -8:], theirs["logits"].argmax(-1)[0, -8:])
    backend = make("gptq", group_size=32)
    plan = coopq.Plan.load(out / "plan.json")
    packed = load_file(out / "model.safetensors")
    for name, bits in plan.quantized.items():
        parts = {part: packed[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        shape = (theirs[name].shape[0], theirs[name].shape[1])
        restored = backend.dequantize(parts, shape, bits, torch.float32)
        torch.testing.assert_close(restored, theirs[name], atol=1e-3, rtol=1e-3)


def test_the_library_leaves_this_process_alone(job: tuple[coopq.Plan, Path]) -> None:
    assert "gptqmodel" not in sys.modules
    assert not any("GPTQMODEL" in name for name in os.environ)
    assert not any("logbar" in type(handler).__module__ for handler in logging.getLogger().handlers)


@pytest.mark.slow
def test_act_order_and_symmetry_reach_the_library(stories: str) -> None:
    loaded = load_model(stories, device="cpu")
    tokens = np.random.default_rng(0).integers(3, 500, size=(4, 64))
    name = "model.layers.0.self_attn.q_proj"
    bits = {
        f"model.layers.{i}.{m}": 4
        for i in range(5)
        for m in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    }
    settings: dict[str, Any] = {"group_size": 32, "act_order": True, "symmetric": False}
    backend = make("gptq", **settings)
    packed = dict(backend.quantize_model(loaded.model, loaded.tokenizer, bits, tokens))[name]
    # Nothing is before the first layers, so that both ways solve the same: the library packed one, we the other.
    by_itself = make("gptq-static", **settings)
    ((_, ours),) = by_itself.quantize_model(loaded.model, loaded.tokenizer, {name: 4}, tokens)
    assert ours.keys() == packed.keys()
    for part, tensor in ours.items():
        assert tensor.dtype == packed[part].dtype
        assert torch.equal(tensor, packed[part]), part
    assert not torch.equal(packed["g_idx"], torch.arange(64, dtype=torch.int32) // 32)
    assert len(set(packed["qzeros"].flatten().tolist())) > 1
    weight = loaded.model.get_submodule(name).weight.detach()
    restored = backend.dequantize(packed, (64, 64), 4, torch.float32)
    assert float((restored - weight).norm() / weight.norm()) < 0.2
    assert sum(tensor.nbytes for tensor in packed.values()) == backend.storage_bytes((64, 64), 4)


def test_options_of_gptq_are_refused_elsewhere() -> None:
    with pytest.raises(BackendError, match="backend 'rtn' has no option act-order"):
        make("rtn", act_order=True)


def test_a_full_temporary_folder_is_noticed_before_the_work(stories: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(stories, device="cpu")
    tokens = np.random.default_rng(0).integers(3, 500, size=(2, 16))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    quantized = make("gptq").quantize_model(loaded.model, loaded.tokenizer, {"model.layers.0.mlp.up_proj": 4}, tokens)
    with pytest.raises(
        OutputError, match=r"GPTQModel's copy of the model needs 2 MiB in .*, and .* set TMPDIR to a folder"
    ):
        next(quantized)


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (
            "os.kill(os.getpid(), 9)",
            r"the library was ended by signal 9, probably because memory ran out; use a device",
        ),
        ("sys.exit('torch.OutOfMemoryError: 2 GiB')", r"out of memory \(torch.OutOfMemoryError: 2 GiB\); use a device"),
        ("sys.exit('KeyError: 7')", r"the library failed \(KeyError: 7\); it may not support this architecture"),
    ],
)
def test_an_error_of_a_worker_says_what_to_do(
    end: str, message: str, stories: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ending_worker.py").write_text(f"import os, sys\nprint('INFO 37 of 224', flush=True)\n{end}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    loaded = load_model(stories, device="cpu")
    job = running_job("the library", "ending_worker", loaded.model, loaded.tokenizer, np.zeros((1, 4), np.int64), {})
    with job as wait_for, pytest.raises(BackendError, match=message):
        wait_for(DONE)


def test_a_worker_sees_only_the_gpu_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert only_gpu(torch.device("cpu")) == {}
    assert only_gpu(torch.device("cuda:1")) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert only_gpu(torch.device("cuda:1")) == {"CUDA_VISIBLE_DEVICES": "5"}


def test_a_worker_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "copy of the model"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    worker = f"""
import multiprocessing, pathlib, time
from coopq.quantizers.gptq.subprocess_job import end_with_parent
end_with_parent(pathlib.Path({str(folder)!r}))
time.sleep(1)
child = multiprocessing.get_context("fork").Process(target=int)  # libraries have such
child.start()
child.join(20)
print(child.exitcode, flush=True)
time.sleep(60)
"""
    parent = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {worker!r}], stdin=subprocess.PIPE).wait()
"""
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "0\n"
        finally:
            process.kill()
        killed = time.monotonic()
        process.stdout.read()  # the worker holds it open too
        assert time.monotonic() - killed < 30, "it went on alone"
    assert not folder.exists()

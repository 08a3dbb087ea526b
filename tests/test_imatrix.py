"""Imatrix files of llama.cpp instead of statistics of our own."""

import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers as hf

import coopq
from coopq.core.errors import BackendError
from coopq.core.specs import QuantizerSpec
from coopq.model.players import find_players
from coopq.quantizers import get_backend
from coopq.quantizers.ggml.imatrix import ImportanceMatrix
from coopq.quantizers.ggml.names import gguf_names
from coopq.quantizers.input_statistics import column_importance
from tests.architectures import GROUPED, tiny_model
from tests.command_line import command, refused
from tests.folders import save_source

Entries = Mapping[str, npt.NDArray[np.float32]]
TOKENS = 64
"""A power of two, so that sums divide without rounding."""
FAST = ["--backend", "ggml", "--bits", "4,8", "--budget", "5avg", "--method", "first-last"]
FAST += ["--tokens", "64", "--sequence-length", "32"]


def write_gguf_form(path: Path, entries: Entries) -> Path:
    """As llama-imatrix writes: sums of squares and numbers of tokens, for each expert."""
    writer = gguf.GGUFWriter(path, "imatrix")
    for name, means in entries.items():
        means = means.reshape(-1, means.shape[-1])
        writer.add_tensor(f"{name}.in_sum2", means * TOKENS)
        writer.add_tensor(f"{name}.counts", np.full((len(means), 1), TOKENS, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_legacy_form(path: Path, entries: Entries) -> Path:
    """As llama-imatrix wrote before it wrote GGUF."""
    content = struct.pack("<i", len(entries))
    for name, means in entries.items():
        content += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", TOKENS, means.size)
        content += (means * TOKENS).tobytes()
    path.write_bytes(content + struct.pack("<i", TOKENS))
    return path


def statistics(model: Any, tokens: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.float32]]:
    """Our own importance of every layer, by names of llama.cpp."""
    names = [linear.name for player in find_players(model) for linear in player.linears]
    return {gguf_names(name)[0]: found.numpy() for name, found in column_importance(model, names, tokens).items()}


@pytest.mark.parametrize("write", [write_gguf_form, write_legacy_form])
@pytest.mark.parametrize("experts", [False, True])
def test_the_same_importance_makes_the_same_weights(
    tmp_path: Path, write: Callable[[Path, Entries], Path], experts: bool
) -> None:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, **sizes)).eval() if experts else tiny_model("llama")
    tokens = np.random.default_rng(0).integers(3, 97, size=(4, 32))
    file = write(tmp_path / "imatrix", statistics(model, tokens))
    layers = {linear.name: 4 for player in find_players(model) for linear in player.linears}
    plain, weighted = (get_backend(QuantizerSpec("ggml", imatrix=path)) for path in (None, str(file)))
    assert (plain.calibrated, weighted.calibrated) == (True, False)
    ours, theirs = (
        {name: packed["blocks"] for name, packed in backend.quantize_model(model, None, layers, given)}
        for backend, given in ((plain, tokens), (weighted, None))
    )
    without = {name: packed["blocks"] for name, packed in plain.quantize_model(model, None, layers, None)}
    assert len(ours) == len(layers)
    assert all(torch.equal(ours[name], theirs[name]) for name in layers)
    assert not all(torch.equal(ours[name], without[name]) for name in layers), "importance matters"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Llama with the tests' tokenizer."""
    made = hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, "vocab_size": 512}))
    return save_source(made, tmp_path / "tiny")


def entries_of(model: Path) -> dict[str, npt.NDArray[np.float32]]:
    return statistics(hf.AutoModelForCausalLM.from_pretrained(model), np.arange(64).reshape(2, 32) + 3)


def test_another_content_of_the_file_is_another_request(model: Path, tmp_path: Path) -> None:
    entries, file, out = entries_of(model), tmp_path / "imatrix.gguf", tmp_path / "out"
    write_gguf_form(file, entries)
    options: list[str | Path] = [model, *FAST, "--out", out, "--imatrix", file]
    code, _, err = command("quantize", *options)
    assert code == 0, err
    plan = json.loads((out / "plan.json").read_text())
    digest = ImportanceMatrix.read(file).digest
    assert plan["fingerprint"]["backend"]["settings"]["importance"] == f"imatrix {digest}"
    assert "fitted to" not in plan["fingerprint"]
    assert command("quantize", *options)[0] == 0, "a finished job is not repeated"
    write_gguf_form(file, {name: values + 1 for name, values in entries.items()})
    assert "is not what its model was made from (backend differ)" in refused("quantize", *options)
    shutil.rmtree(out)
    assert f"imatrix {digest}" in refused("quantize", *options)
    file.unlink()
    assert "cannot read imatrix" in refused("quantize", model, *FAST, "--out", tmp_path / "new", "--imatrix", file)


def test_a_saved_model_is_loaded_without_the_file(model: Path, tmp_path: Path) -> None:
    file = write_gguf_form(tmp_path / "imatrix.gguf", entries_of(model))
    assert command("quantize", model, *FAST, "--out", tmp_path / "out", "--imatrix", file)[0] == 0
    file.unlink()
    code, _, err = command("show", tmp_path / "out")
    assert code == 0, err
    assert coopq.load(tmp_path / "out", device="cpu").config.model_type == "llama"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"lacks model.layers.1.mlp.down_proj (blk.1.ffn_down.weight); make the file for this model"),
        ("length", "blk.1.ffn_down.weight of imatrix"),
        ("nan", "holds negative or non-finite numbers for blk.1.ffn_down.weight"),
        ("garbage", "is not an imatrix, or is damaged"),
        ("truncated", "is not an imatrix, or is damaged"),
        ("folder", "cannot read imatrix"),
    ],
)
@pytest.mark.parametrize("write", [write_gguf_form, write_legacy_form])
def test_a_file_that_does_not_fit_is_refused_before_any_work(
    model: Path, tmp_path: Path, write: Callable[[Path, Entries], Path], damage: str, message: str
) -> None:
    file, name, entries = tmp_path / "imatrix", "blk.1.ffn_down.weight", entries_of(model)
    if damage == "missing":
        del entries[name]
    elif damage == "length":
        entries[name] = entries[name][:32]
    elif damage == "nan":
        entries[name][3] = np.nan
    if damage == "folder":
        file.mkdir()
    else:
        write(file, entries)
    if damage == "garbage":
        file.write_bytes(b"\x93" * 4096)
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-200])
    line = refused("quantize", model, *FAST, "--out", tmp_path / "out", "--imatrix", file)
    assert message in line
    assert not (tmp_path / "out-run").exists()


def test_a_model_named_as_imatrix_is_refused_without_reading_it(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("blk.0.ffn_down.weight", np.zeros((4, 2**20), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tracemalloc.start()
    with pytest.raises(BackendError, match="it holds no sums of squares"):
        ImportanceMatrix.read(tmp_path / "model.gguf")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**22


def test_other_backends_take_no_imatrix(model: Path, tmp_path: Path) -> None:
    options: list[str | Path] = ["quantize", model, "--budget", "5avg", "--bits", "4,8", "--out", tmp_path / "out"]
    options += ["--imatrix", "file"]
    for backend in "rtn", "ggml-gptq":
        line = refused(*options, "--backend", backend)
        assert (
            f"backend {backend!r} has no option imatrix; leave it out, or use a backend with it: ggml, ggml-iq" in line
        )
    assert "leave --fit-tokens out" in refused(*options, "--backend", "ggml", "--fit-tokens", "512")

"""Sizes of whole files: predicted for budgets, shown to people, and kept small by 16-bit tensors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import coopq
from coopq import Goal, Request
from coopq.core.types import UNTOUCHED
from coopq.export.formats import TargetFile
from coopq.game.prepared import prepare
from coopq.model.load import LoadedModel
from coopq.model.matrices import round_untouched
from coopq.model.players import find_players
from coopq.model.sources.gguf import gguf_dtype, gguf_file
from coopq.plan.plan import Plan
from coopq.report.tables import plan_summary
from coopq.report.words import with_half
from tests.architectures import tiny_model
from tests.checkpoints import plan_for
from tests.command_line import refused
from tests.conftest import STORIES
from tests.gguf_files import write_gguf
from tests.quantizers import WEIGHT_ONLY

TEXT = {"tokens": 64, "sequence_length": 32, "device": "cpu"}


@pytest.mark.parametrize(("backend", "embeddings"), [*((name, False) for name in WEIGHT_ONLY), ("rtn", True)])
def test_a_budget_in_bytes_holds_the_whole_file(backend: str, embeddings: bool, tmp_path: Path) -> None:
    bits = (2, 4) if backend == "quanto" else (3, 4)
    request = Request.from_options(model=str(STORIES), backend=backend, bits=bits, embeddings=embeddings, **TEXT)
    sizes = prepare(request, target=TargetFile()).sizes
    limit = sum(sizes.file_bytes([width] * len(sizes.n_weights)) for width in bits) // 2
    plan = coopq.quantize(request, Goal(budget=f"{limit}B", method="auto-quantize"), tmp_path / "out")
    size = (tmp_path / "out" / "quantized.safetensors").stat().st_size
    assert plan.file_bytes == size <= limit
    (planned,) = (Plan.load(path) for path in (tmp_path / "out-run" / "plans").glob("*.json"))
    assert size <= planned.file_bytes <= limit
    assert planned.file_bytes - size < 25_000, "the header is the only part that is not known"
    assert plan.source_bytes == (STORIES / "model.safetensors").stat().st_size
    shown = plan_summary(plan)
    assert f"file {size / 1e6:,.2f} MB (quantized part {plan.bytes / 1e6:,.2f} MB of " in shown
    assert "LARGER" not in shown
    assert plan.confidence is not None
    assert plan.confidence.stderr is not None
    assert plan.measured_loss is not None
    assert f"{with_half(plan.measured_loss, 1.96 * plan.confidence.stderr)} measured (nats per token, ± half" in shown


def test_an_impossible_budget_names_sizes_of_whole_files(tmp_path: Path) -> None:
    line = refused("quantize", STORIES, "--bits", "3,4", "--budget", "100kB", "--out", tmp_path / "out")
    smallest, *others, n_bytes = line.partition("the smallest is ")[2].partition(",")[0].split(" = ")
    assert 250 < float(smallest.removesuffix("kB")) < 300, "in the unit that was asked"
    assert int(n_bytes.removesuffix("B")) == pytest.approx(1000 * float(smallest.removesuffix("kB")))
    assert [text[-3:] for text in others] == ["avg", "bpw"]


def test_tensors_that_were_quantized_before_have_no_16_bits_in_an_average() -> None:
    plan = plan_for(tiny_model("llama"), "rtn", 16, [4, 4, UNTOUCHED])
    assert not plan.keeps_quantized
    assert f"{plan.average_bits:.3f} average bits" in plan_summary(plan)
    before = plan.replace(untouched_bytes=plan.untouched_bytes // 4)
    assert before.keeps_quantized
    assert "average bits" not in plan_summary(before)


def test_a_result_that_is_larger_than_its_source_says_so() -> None:
    plan = plan_for(tiny_model("llama"), "rtn", 16, [4] * 3).replace(source_bytes=1)
    assert "the result is LARGER than the 0.0 MB that it came from" in plan_summary(plan)
    assert "LARGER" not in plan_summary(plan.replace(source_bytes=plan.file_bytes))


def test_matrices_of_a_gguf_file_tell_how_many_bits_it_has(tmp_path: Path) -> None:
    def narrow(_: str, values: Any) -> Any:
        return values.astype(np.float16) if values.ndim > 1 else values

    model = tiny_model("llama")
    assert gguf_dtype(write_gguf(model, tmp_path / "wide.gguf")) == torch.float32
    assert gguf_dtype(write_gguf(model, tmp_path / "narrow.gguf", change=narrow)) == torch.float16


def test_what_is_stored_in_16_bits_is_rounded_before_it_is_measured() -> None:
    model = tiny_model("qwen3")
    players, loaded = find_players(model), LoadedModel(model, None, torch.float16)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    assert round_untouched(loaded, players, (2, 4))
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}, "no vectors, and no weights of players"
    assert not round_untouched(loaded, players, (2, 4)), "rounding again changes nothing"
    assert not round_untouched(LoadedModel(model, None, torch.float32), players, (2, 4))
    assert round_untouched(loaded, players, (2, 16))


@pytest.mark.real
def test_the_demo_is_saved_in_16_bits_and_says_that_it_is_larger(tmp_path: Path) -> None:
    request = Request.from_options(model="demo", bits=(3, 4), tokens=64, sequence_length=64, device="cpu")
    plan = coopq.quantize(request, Goal(budget="3.5avg", method="first-last"), tmp_path / "out")
    source = gguf_file("demo")
    assert source is not None
    assert plan.source_bytes == source.stat().st_size < plan.file_bytes < 115_000_000
    assert "weights that stay are rounded to float16" in plan_summary(plan)
    assert "LARGER than the 98.4 MB" in plan_summary(plan)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"

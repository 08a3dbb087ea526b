"""llama.cpp's own mixes: their sizes are those of llama.cpp's files, and plans are judged beside them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

import coopq
from coopq import Goal, Request
from coopq.export.gguf.base import BaseFile
from coopq.export.gguf.mixes import mix_bytes, mix_types, nearest_mix
from coopq.judge.mixes import judge_mix
from coopq.judge.results import Comparison
from coopq.model.load import gguf_file, load_model
from coopq.model.texts import HeldOut
from tests.architectures import tiny_model
from tests.gguf_files import write_gguf

MADE_BY_LLAMA_CPP = {
    "Q3_K_S": 88_201_792,
    "Q3_K_M": 93_510_208,
    "Q4_K_S": 102_039_616,
    "Q4_K_M": 105_454_144,
    "Q5_K_S": 109_974_592,
}
"""Bytes of the files that llama-quantize makes of the demo model."""


@pytest.fixture(scope="module")
def demo() -> BaseFile:
    file = gguf_file("demo")
    assert file is not None
    return BaseFile.open(file)


@pytest.mark.real
def test_sizes_are_those_of_llama_cpps_files(demo: BaseFile) -> None:
    assert {mix: mix_bytes(demo, mix_types(demo, mix)) for mix in MADE_BY_LLAMA_CPP} == MADE_BY_LLAMA_CPP
    for mix, n_bytes in MADE_BY_LLAMA_CPP.items():
        assert nearest_mix(demo, n_bytes + 1000) == mix, "and not Q2_K, which is Q3_K_S where rows are short"


@pytest.mark.real
def test_rows_that_no_k_quant_fits_have_the_types_of_llama_cpp(demo: BaseFile) -> None:
    types = mix_types(demo, "Q4_K_M")
    assert types["token_embd.weight"] == GGMLQuantizationType.Q8_0
    assert types["blk.0.attn_q.weight"] == GGMLQuantizationType.Q5_0
    assert types["blk.0.ffn_down.weight"] == GGMLQuantizationType.Q6_K
    assert types["blk.4.ffn_down.weight"] == GGMLQuantizationType.Q4_K
    assert not any("norm" in name for name in types)


def test_models_with_rules_of_their_own_have_no_mix(tmp_path: Path) -> None:
    experts = write_gguf(tiny_model("llama"), tmp_path / "experts.gguf", settings={"llama.expert_count": 4})
    assert mix_types(BaseFile.open(experts), "Q4_K_M") == {}
    other = write_gguf(tiny_model("llama"), tmp_path / "other.gguf")
    assert mix_types(BaseFile.open(other), "Q4_K_M") != {}
    renamed = other.read_bytes().replace(b"blk.0.ffn_up.weight", b"blk.0.altup_.weight")
    (tmp_path / "renamed.gguf").write_bytes(renamed)
    assert mix_types(BaseFile.open(tmp_path / "renamed.gguf"), "Q4_K_M") == {}, "llama.cpp leaves such matrices alone"
    assert nearest_mix(BaseFile.open(experts), 1000) is None


@pytest.mark.real
def test_a_plan_is_judged_beside_the_mix_of_its_size(tmp_path: Path) -> None:
    request = Request.from_options(
        model="demo", backend="ggml", bits=(4, 16), tokens=64, sequence_length=64, fit_tokens=64, target="gguf"
    )
    run, text = tmp_path / "run", HeldOut(64, 128)
    plan = coopq.quantize(request, Goal(budget="92MB", method="first-last"), tmp_path / "saved", run=run)

    def judged() -> Comparison | None:
        return judge_mix(plan, run, text, reference=None, device="cpu", progress=lambda *_: None)

    row = judged()
    assert row is not None
    assert (row.budget, row.file_bytes) == ("Q3_K_M", MADE_BY_LLAMA_CPP["Q3_K_M"])
    assert row.divergence is not None
    assert 0.02 < row.divergence.value < 0.5, "Q4_0 loses much of this model"
    original = load_model("demo", device="cpu")
    windows = torch.from_numpy(text.windows(original.tokenizer).tokens)
    with torch.no_grad():
        full = [float(original.model(input_ids=window[None], labels=window[None]).loss) for window in windows]
    assert row.nll > np.mean(full)
    assert 4 < row.average_bits < row.bits_per_weight < row.average_bits + 1.5
    files = sorted((run / "evaluation").glob("scores-*"))
    assert len(files) == 2
    assert judged() == row, "read from the two files of scores"
    assert sorted((run / "evaluation").glob("scores-*")) == files

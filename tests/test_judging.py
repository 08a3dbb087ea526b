"""Judging: divergence from the original and its intervals, on WikiText-2 and on a user's own text."""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from rich.console import Console

from coopq.core.errors import EstimationError
from coopq.judge.divergence import compare_logits, estimate, summarize, token_scores
from coopq.judge.results import Comparison, Estimate, Evaluation
from coopq.model.sources.gguf import gguf_file
from coopq.report.judged import comparison_table, evaluation_text
from coopq.report.words import with_half
from tests.architectures import tiny_model
from tests.command_line import FAST, command, refused
from tests.conftest import STORIES

TEXT = ["--tokens", "256", "--sequence-length", "64"]
STATISTICS = {"mean", "median", "percentile_99", "maximum", "same_top"}


def judged(*arguments: str | Path) -> Any:
    code, out, err = command("evaluate", *arguments, *TEXT, "--json")
    assert code == 0, err
    return json.loads(out)


def test_scores_are_those_of_whole_logits_in_double_precision() -> None:
    torch.manual_seed(0)
    full = 10 + 3 * torch.randn(300, 97)
    other, targets = full + 0.01 * torch.randn(300, 97), torch.randint(97, (300,))
    found = compare_logits(other, targets, full)
    ours, theirs = other.double().log_softmax(1), full.double().log_softmax(1)
    np.testing.assert_allclose(found["divergence"], (theirs.exp() * (theirs - ours)).sum(1), rtol=1e-2)
    np.testing.assert_allclose(found["nll"], -ours[torch.arange(300), targets], rtol=1e-4)
    np.testing.assert_array_equal(found["same_top"], ours.argmax(1) == theirs.argmax(1))
    np.testing.assert_allclose(compare_logits(other, targets)["nll"], found["nll"], rtol=1e-5)


def test_a_model_has_no_divergence_from_itself_and_from_another_it_has() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    tokens = np.random.default_rng(0).integers(3, 97, (6, 24))
    parts = list(token_scores(model, tokens, model))
    scores = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert scores["divergence"].shape == (6, 23)
    own = summarize(scores)
    assert own is not None
    assert 0 <= own.maximum.value < 1e-7
    assert own.same_top == Estimate(1.0, (1.0, 1.0))
    (apart,) = token_scores(other, tokens[:1], model)
    found = summarize(apart)
    assert found is not None
    assert 1e-6 < found.median.value < found.percentile_99.value <= found.maximum.value
    assert found.mean.interval is None, "a single window has no interval"


def test_models_of_other_vocabularies_are_not_compared() -> None:
    with pytest.raises(EstimationError, match=r"predicts 97 tokens and its reference 98; .* --reference"):
        compare_logits(torch.zeros(2, 97), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 98))


def test_an_interval_covers_what_windows_vary_by() -> None:
    windows = np.random.default_rng(0).normal(1.0, 0.1, size=(50, 1)) * np.ones((1, 20))
    found = estimate(windows)
    assert found.interval is not None
    low, high = found.interval
    # 1.96 standard errors of the mean of 50 windows on either side; tokens of a window say the same.
    assert high - low == pytest.approx(2 * 1.96 * windows[:, 0].std() / np.sqrt(50), rel=0.1)
    assert low < found.value < high
    assert estimate(windows) == found, "the same windows give the same interval"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 3 and 4 bits whose original is a copy, so that the original can move."""
    folder = tmp_path_factory.mktemp("judged")
    shutil.copytree(STORIES, folder / "original")
    arguments = ["--bits", "3,4", "--budget", "3.5avg", "--method", "first-last", *FAST]
    code, _, err = command("quantize", folder / "original", "--out", folder / "out", *arguments)
    assert code == 0, err
    return folder / "out"


def test_a_saved_model_is_judged_beside_its_original_on_both_texts(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("Once upon a time there was a little girl who had a red ball. " * 60)
    data = judged(saved, "--text", tmp_path / "own.txt")
    assert data["text"].startswith("4 x 64 tokens of WikiText-2 test")
    assert data["own_text"]["text"].startswith("4 x 64 tokens of own.txt (")
    assert data["file_bytes"] == (saved / "quantized.safetensors").stat().st_size > data["bytes"]
    for evaluation in (data, data["own_text"]):
        assert set(evaluation["divergence"]) == STATISTICS
        for found in evaluation["divergence"].values():
            assert found["interval"][0] <= found["value"] <= found["interval"][1]
        rows = {row["method"]: row for row in evaluation["comparison"]}
        assert rows["original"]["divergence"] is None
        plan = rows["first-last"]
        assert plan["divergence"]["value"] == pytest.approx(evaluation["divergence"]["mean"]["value"], rel=1e-3)
        assert plan["same_top"]["value"] == pytest.approx(evaluation["divergence"]["same_top"]["value"], abs=0.01)
        assert rows["random"]["divergence"]["value"] > 0


def test_a_model_is_judged_beside_any_reference() -> None:
    same = judged(STORIES, "--reference", STORIES)
    assert 0 <= same["divergence"]["maximum"]["value"] < 1e-7


def test_the_original_may_have_moved_and_no_other_model_replaces_it(saved: Path, tmp_path: Path) -> None:
    judged(saved, "--no-compare")
    kept = {file: file.read_bytes() for file in saved.with_name("out-run").glob("evaluation/*")}
    assert kept
    original = saved.with_name("original")
    original.rename(tmp_path / "moved")
    try:
        line = refused("evaluate", saved, "--no-compare", *TEXT)
        assert "cannot load model" in line or "there is no folder" in line
        assert judged(saved, "--no-compare", "--reference", tmp_path / "moved")["divergence"] is not None
        assert {file: file.read_bytes() for file in kept} == kept, "nothing is measured again"
        alone = judged(saved, "--reference", "none")
        assert alone["divergence"] is None
        assert "comparison" not in alone
        config = json.loads((tmp_path / "moved" / "config.json").read_text())
        shutil.copytree(tmp_path / "moved", tmp_path / "other")
        (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
        line = refused("evaluate", saved, "--no-compare", "--reference", tmp_path / "other", *TEXT)
        assert "made for another model" in line
        assert "--reference" in line
    finally:
        (tmp_path / "moved").rename(original)


@pytest.mark.parametrize(("name", "message"), [("no.txt", "no text file at"), ("a.pdf", "neither .txt nor .jsonl")])
def test_a_text_that_cannot_be_read_is_refused_before_any_work(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("text")
    assert message in refused("evaluate", STORIES, "--text", tmp_path / name)
    (tmp_path / "short.txt").write_text("Once.")
    assert "fits into all tokens of short.txt" in refused("evaluate", STORIES, "--text", tmp_path / "short.txt")


def test_a_model_that_coopq_did_not_save_has_nothing_to_compare_with(tmp_path: Path) -> None:
    for options in (["--compare"], ["--run", str(tmp_path)]):
        assert f"{options[0]} is for models that coopq saved" in refused("evaluate", STORIES, *options)
    short = ["--tokens", "64", "--sequence-length", "32"]
    code, _, err = command("evaluate", STORIES, "--no-compare", *short)
    assert code == 0, err


def test_a_uniform_row_says_where_layers_are_wider() -> None:
    row = Comparison("uniform", None, 1, 5.0, 5.5, "kl", 3.0, 3.1, 22.2, (3.1,), width=5)
    assert row.name == "uniform 5"
    assert replace(row, average_bits=13.7).name == "uniform 5 and wider"


def test_divergence_leads_from_three_bits_and_full_precision_is_the_reference() -> None:
    row = Comparison(
        "active", "3.5avg", 1, 3.5, 3.8, "nll", 3.0, 3.1, 22.2, (3.1,), Estimate(0.01, (0.008, 0.012)), None
    )
    full = replace(row, method="original", budget=None, average_bits=16, divergence=None)
    for bits, columns in (
        (3.5, ["KL", "same top", "perplexity"]),
        (2.5, ["perplexity", "KL", "same top"]),
    ):
        table = comparison_table([full, replace(row, average_bits=bits)], "a text")
        assert [str(column.header) for column in table.columns[2:5]] == columns
        cells = dict(zip([str(c.header) for c in table.columns], [list(c.cells) for c in table.columns], strict=True))
        assert cells["KL"] == ["reference", "0.0100 ± 0.0020"]
        with (console := Console(width=80)).capture() as shown:
            console.print(table)
        assert {"reference", "0.0100 ± 0.0020", "3.800 bpw", "22.20"} <= set(re.split(r" *│ *", shown.get())), (
            "at 80 columns"
        )
    for value, half, text in (
        (0.0795, 0.0042, "0.0795 ± 0.0042"),
        (0.1384, 0.0117, "0.138 ± 0.012"),
        (12.34, 1.5, "12.3 ± 1.5"),
        (123.4, 31.0, "123 ± 31"),
        (0.0, 0.0, "0 ± 0"),
    ):
        assert with_half(value, half) == text
    alone = Evaluation(3.0, 10, 2_000_000, 1_000_000, "a text")
    assert "reference" in evaluation_text("m", alone)
    assert asdict(alone)["divergence"] is None


@pytest.mark.real
def test_gguf_files_are_judged_by_llama_cpp(tmp_path: Path) -> None:
    base = gguf_file("demo")
    assert base is not None
    same = judged(base, "--reference", base)
    assert 0 <= same["divergence"]["maximum"]["value"] < 1e-7
    assert same["divergence"]["same_top"]["value"] == 1
    assert same["file_bytes"] == base.stat().st_size
    assert 2 < same["nll"] < 8, "the fork of llama.cpp errs with this file's types"
    other = Path(shutil.copy(base, tmp_path / "other.gguf"))
    (norm,) = [tensor for tensor in gguf.GGUFReader(other, "r+").tensors if tensor.name == "output_norm.weight"]
    norm.data[:] *= 1.1
    found = judged(other, "--reference", base)["divergence"]
    assert 1e-4 < found["mean"]["value"] < 0.5
    assert found["same_top"]["value"] > 0.9, "all logits are a tenth larger, but for what llama.cpp rounds"
    line = refused("evaluate", other, "--reference", base, "--tokens", "16384", "--sequence-length", "16384")
    assert "sequences of 16384 tokens exceed the model's 8192 positions" in line
    assert "there is no GGUF file" in refused("evaluate", other, "--reference", tmp_path / "no.gguf")

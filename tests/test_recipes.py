"""The four recipes of docs/extending.md, each tried on a toy: a class or a function, and one line in a table."""

import json
from pathlib import Path

import pytest
import torch

from coopq.core.specs import QuantizerSpec
from coopq.export.formats import FORMS, FormEntry
from coopq.plan.methods import METHODS, Method
from coopq.quantizers import BACKENDS, BackendEntry, get_backend
from coopq.quantizers.contract import check_backend
from tests.command_line import command, refused

TEXT = ["--tokens", "128", "--sequence-length", "64"]


def test_a_backend(tmp_path: Path, stories: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "toy", BackendEntry("tests.toys:ToyBackend", "one scale for a weight"))
    for bits in (2, 4):
        check_backend(get_backend(QuantizerSpec(backend="toy")), torch.randn(24, 64), bits)
    arguments = ["quantize", stories, "--budget", "3avg", "--method", "greedy-up", *TEXT]
    code, out, err = command(*arguments, "--backend", "toy", "--out", tmp_path / "out", "--json")
    assert code == 0, err
    assert set(json.loads(out)["bits"].values()) <= {2, 4}
    assert "'toy' has no 8 bits" in refused(*arguments, "--backend", "toy", "--bits", "4,8", "--out", tmp_path / "new")
    assert "'toy' has no option group-size" in refused(
        *arguments, "--backend", "toy", "--group-size", "8", "--out", tmp_path / "new"
    )


def test_a_strategy(tmp_path: Path, stories: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Method("toy", "search", "ten random assignments", 10, "tests.toys:ToySearch")
    monkeypatch.setitem(METHODS, "toy", method)
    arguments = ["quantize", stories, "--budget", "3avg", "--method", "toy", "--bits", "2,3,4", *TEXT]
    code, out, err = command(*arguments, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["method"] == "toy"
    assert data["average_bits"] <= 3
    assert "toy" in command("methods")[1]


def test_a_score(tmp_path: Path, stories: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Method("toy", "score", "the largest weight", 0, "tests.toys:largest_weights", proves=True)
    monkeypatch.setitem(METHODS, "toy", method)
    arguments = ["quantize", stories, "--budget", "3avg", "--method", "toy", *TEXT]
    code, out, err = command(*arguments, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["status"] == "optimal"
    assert data["block_forwards"] == 0
    assert "not embeddings" in refused(*arguments, "--embeddings", "--out", tmp_path / "new")


def test_an_export_form(tmp_path: Path, stories: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMS, "toy", FormEntry("tests.toys:ToyForm", "toys", "a copy", ("rtn",)))
    arguments = ["quantize", stories, "--budget", "80kB", "--method", "greedy-up", "--target", "toy", *TEXT]
    code, out, err = command(*arguments, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["exported_bytes"] == data["bytes"] + 8 <= 80_000, "a budget in bytes is that of the exported file"
    code, out, err = command("export", tmp_path / "out", "--to", "toy", "--out", tmp_path / "toy", "--json")
    assert code == 0, err
    assert json.loads(out)["bytes"] == data["exported_bytes"]
    assert "toy" in command("targets")[1]
    assert "did you mean 'toy'" in refused("export", tmp_path / "out", "--to", "toyy", "--out", tmp_path / "new")

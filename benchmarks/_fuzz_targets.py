"""Kinds of files that coopq reads, each with the public command that reads the files."""

import contextlib
import hashlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from _common import DATA, ROOT

STORIES = ROOT / "tests" / "data" / "stories260k"
TWELVE = DATA / "twelve"
"""For GGUF files: rows of the smaller model do not fit into blocks of 32."""
SHORT = ["--tokens", "128", "--sequence-length", "64"]
FAST = ["--permutations", "3", "--bits", "2,4", "--granularity", "block", "--loss", "kl", *SHORT]

Answer = Callable[[Path], str]
"""Runs what reads a file in a copy of the material, and returns the answer as a text."""


class Target(NamedTuple):
    """Files of one kind.

    Attributes:
        files: Pattern of the files within the material.
        parts: Folders of the material that a trial copies.
        answer: What reads the files.
        is_ours: Whether coopq wrote the files, so that a mutation may not change the answer.
    """

    files: str
    parts: tuple[str, ...]
    answer: Answer
    is_ours: bool = True


class Refused(Exception):
    """A command ended with exit code 2 and one line."""


def run(*arguments: object) -> str:
    """Standard output of a command, run within this process.

    Raises:
        Refused: If the command refuses.
    """
    from coopq.cli.main import main

    sys.argv = ["coopq", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    lines = err.getvalue().strip().splitlines()
    if code == 2 and lines and lines[-1].startswith("error: ") and "Traceback" not in err.getvalue():
        raise Refused(lines[-1])
    if code not in (0, None):
        raise RuntimeError(f"exit code {code}: {lines[-1] if lines else ''}")
    return out.getvalue()


def saved_answer(folder: Path) -> str:
    """The plan and the tensors of a saved model."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    plan.pop("checksum")
    plan["request"]["model"] = None
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):  # the order of names in a header is no part of the answer
        for name, tensor in sorted(load_file(file).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return json.dumps([plan, digest.hexdigest()])


def quantized_again(*options: str) -> Answer:
    """A job over the run folder of a finished job: all that was measured and quantized is read again."""

    def answer(place: Path) -> str:
        run("quantize", STORIES, "--budget", "3avg", "--out", place / "new", "--run", place / "out-run", *options)
        return saved_answer(place / "new")

    return answer


def evaluated(model: str, *options: str) -> Answer:
    """The loss of a model of the material."""

    def answer(place: Path) -> str:
        found = json.loads(run("evaluate", place / model, "--no-compare", "--json", *SHORT, *options))
        return json.dumps(found["evaluation"]["nll"] if "evaluation" in found else found["nll"])

    return answer


def exported(place: Path) -> str:
    """The file that is exported over a base."""
    run("export", place / "ggml", "--to", "gguf", "--base", place / "base" / "base.gguf", "--out", place / "new.gguf")
    return hashlib.sha256((place / "new.gguf").read_bytes()).hexdigest()


def calibrated(place: Path) -> str:
    """What a calibration text gives."""
    options = ["--calibration", place / "text" / "text.jsonl", *FAST, "--method", "first-last"]
    run("quantize", STORIES, "--budget", "3avg", "--out", place / "new", *options)
    return saved_answer(place / "new")


def show(*path: str) -> Answer:
    """What `show` says of a file or folder."""
    return lambda place: run("show", place.joinpath(*path), "--json")


def page(shown: str, name: str) -> Answer:
    """The report page of what a path holds."""

    def answer(place: Path) -> str:
        run("show", place / shown, "--page")
        pages = sorted((place / "out-run").glob(name))  # one for each size
        assert pages, name
        return "".join(page.read_text(encoding="utf-8") for page in pages).replace(str(place), "")

    return answer


def bench_answer(place: Path) -> str:
    """The report of a finished bench."""
    run("bench", place / "bench" / "bench.toml", "--out", place / "bench" / "out", "--so-far")
    return (place / "bench" / "out" / "report.md").read_text(encoding="utf-8")


_RUN = ("out-run",)
TARGETS: dict[str, Target] = {
    "plan.json": Target("out/plan.json", ("out",), show("out")),
    "plan.json, applied": Target(
        "out/plan.json",
        ("out",),
        lambda place: (
            (run("apply", place / "out/plan.json", "--out", place / "new"), "")[1] or saved_answer(place / "new")
        ),
    ),
    "run.json": Target("out-run/run.json", _RUN, show("out-run")),
    "estimate.json": Target(
        "out-run/estimate.json",
        _RUN,
        lambda place: run("allocate", place / "out-run", "--budget", "2.5avg", "--json").replace(str(place), ""),
    ),
    "journal.jsonl": Target("out-run/journal.jsonl", _RUN, quantized_again("--method", "coopq", *FAST)),
    "journal.jsonl, shown": Target("out-run/journal.jsonl", _RUN, show("out-run")),
    "searches.json": Target("out-run/searches.json", _RUN, quantized_again(*FAST)),
    "scores": Target("out-run/scores/lim.json", _RUN, quantized_again("--method", "lim", *FAST)),
    "judged.json": Target("out-run/judged.json", ("out", "out-run"), page("out", "report-*.html")),
    "comparison.json": Target("out-run/comparison.json", _RUN, page("out-run", "comparison.html")),
    "bank.json": Target("out-run/bank/*.json", _RUN, quantized_again("--method", "coopq", *FAST)),
    "bank tensors": Target("out-run/bank/*.safetensors", _RUN, quantized_again("--method", "coopq", *FAST)),
    "saved tensors": Target("out/*.safetensors", ("out",), evaluated("out")),
    "saved config.json": Target("out/config.json", ("out",), evaluated("out")),
    "saved tokenizer.json": Target("out/tokenizer.json", ("out",), evaluated("out")),
    "saved hashes.json": Target("out/hashes.json", ("out",), evaluated("out")),
    "bench result": Target("bench/out/results/*.json", ("bench",), bench_answer),
    "bench TOML": Target("bench/bench.toml", ("bench",), bench_answer, is_ours=False),
    "model config.json": Target("model/config.json", ("model",), evaluated("model"), is_ours=False),
    "model tokenizer.json": Target("model/tokenizer.json", ("model",), evaluated("model"), is_ours=False),
    "model tensors": Target("model/*.safetensors", ("model",), evaluated("model"), is_ours=False),
    "model GGUF": Target("base/base.gguf", ("base",), evaluated("base/base.gguf"), is_ours=False),
    "GGUF base": Target("base/base.gguf", ("base", "ggml"), exported),
    "calibration text": Target("text/text.jsonl", ("text",), calibrated, is_ours=False),
}

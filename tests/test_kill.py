"""A run that is killed again and again ends where an uninterrupted one does, and measures nothing twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from coopq import tensors
from coopq.plan import Plan
from tests.command_line import interruptible

METHODS = {
    "coopq": ["--method", "coopq", "--permutations", "40", "--tokens", "1024"],
    "active": ["--granularity", "linear", "--tokens", "512", "--screen-tokens", "256"],
}
SETTINGS = ["--sequence-length", "256", "--budget", "3avg", "--json"]


def start(stories: str, out: Path, method: str = "coopq") -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "coopq.cli", "quantize", stories, "--out", str(out), *SETTINGS, *METHODS[method]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=interruptible
    )


def n_lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


@pytest.mark.parametrize(("method", "name"), [("coopq", "journal.jsonl"), ("active", "screening-1.jsonl")])
def test_killed_ten_times_at_random_moments(method: str, name: str, stories: str, tmp_path: Path) -> None:
    whole = start(stories, tmp_path / "whole", method)
    _, errors = whole.communicate(timeout=120)
    assert whole.returncode == 0, errors
    expected = Plan.load(tmp_path / "whole" / "plan.json")
    total = n_lines(tmp_path / "whole-run" / name)
    assert total > 30

    journal = tmp_path / "out-run" / name
    # Ten moments spread over the whole estimation, each at a random place within its tenth, some of them
    # before its first value and some in the middle of a line.
    moments = [random.uniform(k, k + 1) * (total - 2) / 10 for k in range(10)]
    for kills, moment in enumerate(moments):
        process = start(stories, tmp_path / "out", method)
        deadline = time.monotonic() + 60
        while n_lines(journal) < moment and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"kill {kills} came too late"
        if kills % 3 == 0 and n_lines(journal) > 1:  # a kill in the middle of a write
            content = journal.read_bytes()
            start_of_last = content.rstrip(b"\n").rfind(b"\n") + 1
            journal.write_bytes(content[: random.randrange(start_of_last + 1, len(content))])

    last = start(stories, tmp_path / "out", method)
    _, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors
    assert Plan.load(tmp_path / "out" / "plan.json") == expected
    points = [tuple(json.loads(line)["bits"]) for line in journal.read_text().splitlines()[1:]]
    assert len(points) == len(set(points)) == total - 1, "no value is measured twice"


def test_a_second_process_on_a_run_is_refused(stories: str, tmp_path: Path) -> None:
    first = start(stories, tmp_path / "out")
    while n_lines(tmp_path / "out-run" / "journal.jsonl") < 2 and first.poll() is None:
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)  # holds the run folder for as long as the test wants
    second = start(stories, tmp_path / "out")
    _, errors = second.communicate(timeout=60)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert second.returncode == 2
    assert errors.strip().splitlines()[-1].startswith("error: run folder")
    assert "is in use by another process" in errors


def test_an_interrupt_waits_for_a_file_that_is_read(stories: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of it safetensors would make another error of the interrupt."""
    finished: list[str] = []

    def load_file(*_: object, **__: object) -> dict[str, torch.Tensor]:
        signal.raise_signal(signal.SIGINT)
        finished.append("read")
        return {}

    monkeypatch.setattr(tensors, "load_file", load_file)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            tensors.load_tensors(Path(stories), way_out="")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert finished == ["read"]


def test_an_interrupt_says_how_to_go_on(stories: str, tmp_path: Path) -> None:
    process = start(stories, tmp_path / "out")
    while n_lines(tmp_path / "out-run" / "journal.jsonl") < 2 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "run the same command again to go on" in errors
    assert "Traceback" not in errors

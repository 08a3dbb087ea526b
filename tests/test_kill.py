"""A run that is killed again and again ends where an uninterrupted one does, and measures nothing twice."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch

from coopq.cli.main import main
from coopq.model import safetensors_io
from coopq.plan.plan import Plan
from tests.command_line import SMALL

METHODS = {
    "coopq": ["--method", "coopq", "--permutations", "40", "--tokens", "1024"],
    "active": ["--granularity", "fused", "--tokens", "512", "--screen-tokens", "256"],
}
SETTINGS = [*SMALL, "--sequence-length", "256", "--budget", "3avg", "--json"]


# What a command imports takes longer than these runs: their processes are forked from one that has imported it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["coopq.pipeline", "transformers.models.llama.modeling_llama"])


def run(arguments: list[str], log: Path) -> None:
    """The command line, as a process of its own would run it."""
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let their background jobs ignore it
    torch.set_num_threads(1)
    sys.argv = ["coopq", *arguments]
    main()


def start(stories: str, out: Path, method: str = "coopq") -> ForkServerProcess:
    """A run in a process of its own; what it prints goes to a file beside its output."""
    arguments = ["quantize", stories, "--out", str(out), *SETTINGS, *METHODS[method]]
    process = FORKS.Process(target=run, args=(arguments, out.with_suffix(".log")))
    process.start()
    return process


def end(process: ForkServerProcess, with_signal: signal.Signals | None = None) -> int | None:
    """Its exit code, after it ended by itself or by a signal."""
    if with_signal is not None:
        assert process.pid is not None
        os.kill(process.pid, with_signal)
    process.join(timeout=120)
    return process.exitcode


def n_lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def wait_for_lines(journal: Path, wanted: float, process: ForkServerProcess) -> None:
    """Wait until a journal has so many lines, the process ends, or a minute has passed."""
    deadline = time.monotonic() + 60
    while n_lines(journal) < wanted and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)


@pytest.mark.parametrize(("method", "name"), [("coopq", "journal.jsonl"), ("active", "screening-1.jsonl")])
@pytest.mark.parametrize("n_kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(n_kills: int, method: str, name: str, stories: str, tmp_path: Path) -> None:
    assert end(start(stories, tmp_path / "whole", method)) == 0, (tmp_path / "whole.log").read_text()
    expected = Plan.load(tmp_path / "whole" / "plan.json")
    total = n_lines(tmp_path / "whole-run" / name)
    assert total > 20

    journal = tmp_path / "out-run" / name
    # Moments spread over the whole job, each at a random place within its share, some of them before the first value
    # and some in the middle of a line.
    moments = [random.uniform(k, k + 1) * (total - 2) / n_kills for k in range(n_kills)]
    for kills, moment in enumerate(moments):
        process = start(stories, tmp_path / "out", method)
        wait_for_lines(journal, moment, process)
        assert end(process, signal.SIGKILL) == -signal.SIGKILL, f"kill {kills} came too late"
        if kills % 3 == 0 and n_lines(journal) > 1:  # a kill in the middle of a write
            content = journal.read_bytes()
            start_of_last = content.rstrip(b"\n").rfind(b"\n") + 1
            journal.write_bytes(content[: random.randrange(start_of_last + 1, len(content))])

    assert end(start(stories, tmp_path / "out", method)) == 0, (tmp_path / "out.log").read_text()
    assert Plan.load(tmp_path / "out" / "plan.json") == expected
    points = [tuple(json.loads(line)["bits"]) for line in journal.read_text().splitlines()[1:]]
    assert len(points) == len(set(points)) == total - 1, "no value is measured twice"


def test_a_second_process_on_a_run_is_refused(stories: str, tmp_path: Path) -> None:
    first = start(stories, tmp_path / "out")
    wait_for_lines(tmp_path / "out-run" / "journal.jsonl", 2, first)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGSTOP)  # holds the run folder for as long as the test wants
    code = end(start(stories, tmp_path / "out"))
    end(first, signal.SIGKILL)
    errors = (tmp_path / "out.log").read_text()
    assert code == 2
    assert errors.strip().splitlines()[-1].startswith("error: run folder")
    assert "is in use by another process" in errors


def test_an_interrupt_waits_for_a_file_that_is_read(stories: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of it safetensors would make another error of the interrupt."""
    finished: list[str] = []

    def load_file(*_: object, **__: object) -> dict[str, torch.Tensor]:
        signal.raise_signal(signal.SIGINT)
        finished.append("read")
        return {}

    monkeypatch.setattr(safetensors_io, "load_file", load_file)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            safetensors_io.load_tensors(Path(stories), way_out="")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert finished == ["read"]


def test_an_interrupt_says_how_to_go_on(stories: str, tmp_path: Path) -> None:
    process = start(stories, tmp_path / "out")
    wait_for_lines(tmp_path / "out-run" / "journal.jsonl", 2, process)
    code, errors = end(process, signal.SIGINT), (tmp_path / "out.log").read_text()
    assert code == 130, errors
    assert "run the same command again to go on" in errors
    assert "Traceback" not in errors

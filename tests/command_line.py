"""Running the command line in tests."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from coopq.cli.main import main

FAST = ["--permutations", "3", "--tokens", "128", "--sequence-length", "64"]
PAPER = ["--method", "coopq", *FAST]
SMALL = ["--bits", "2,4", "--granularity", "block", "--loss", "nll"]
"""The smallest game: what a test of `quantize` plays unless it names a recipe, or other settings after these."""
_COLUMNS = "100"


def interruptible() -> None:
    """For a new process: heed SIGINT, which shells let their background jobs ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def in_new_process(
    *arguments: str | Path, cwd: Path | None = None, setup: Callable[[], None] | None = None
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command, which has to import everything first."""
    whole = [sys.executable, "-m", "coopq.cli.main", *_small(arguments)]
    environment = {**os.environ, "COLUMNS": _COLUMNS}
    done = subprocess.run(
        whole, capture_output=True, text=True, cwd=cwd, env=environment, preexec_fn=setup, check=False
    )
    return done.returncode, done.stdout, done.stderr


def command(*arguments: str | Path) -> tuple[int | str | None, str, str]:
    """The same within this process: what most commands do takes less time than to import libraries."""
    return as_written(*_small(arguments))


def as_written(*arguments: str) -> tuple[int | str | None, str, str]:
    """The same without the settings of the smallest game."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["coopq", *arguments])
        patch.setenv("COLUMNS", _COLUMNS)
        try:
            main()
        except SystemExit as stop:
            return stop.code, out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


def _small(arguments: Sequence[str | Path]) -> list[str]:
    """The arguments, with the settings of the smallest game where a job is asked for without a recipe."""
    texts = list(map(str, arguments))
    if texts[:1] == ["quantize"] and not {"--for", "--recipe", "--help"} & set(texts):
        texts[1:1] = SMALL
    return texts


def refused(*arguments: str | Path, setup: Callable[[], None] | None = None) -> str:
    """The one line of a user error; nothing else but progress may be printed."""
    code, out, err = command(*arguments) if setup is None else in_new_process(*arguments, setup=setup)
    assert code == 2, (code, out, err)
    assert out == ""
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: "), err
    return line

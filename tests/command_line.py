"""Running the command line in tests."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from coopq.cli import main

FAST = ["--permutations", "3", "--tokens", "128", "--sequence-length", "64"]
PAPER = ["--method", "coopq", *FAST]


def interruptible() -> None:
    """For a new process: heed SIGINT, which shells let their background jobs ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def coopq(
    *arguments: str | Path, cwd: Path | None = None, setup: Callable[[], None] | None = None
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    command = [sys.executable, "-m", "coopq.cli", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, preexec_fn=setup, check=False
    )
    return done.returncode, done.stdout, done.stderr


def refused(*arguments: str | Path, setup: Callable[[], None] | None = None) -> str:
    """The one line of a user error; nothing else but progress may be printed.

    In this process, unless it has to be set up otherwise: most mistakes are found faster than libraries are imported.
    """
    if setup is None:
        code, out, err = in_process(*arguments)
    else:
        code, out, err = coopq(*arguments, setup=setup)
    assert code == 2, (code, out, err)
    assert out == ""
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: "), err
    return line


def in_process(*arguments: str | Path) -> tuple[int | str | None, str, str]:
    """The same as `coopq`, without a process of its own."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["coopq", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as stop:
        return stop.code, out.getvalue(), err.getvalue()
    finally:
        sys.argv = before
    return 0, out.getvalue(), err.getvalue()

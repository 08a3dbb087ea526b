"""What the command line shows: progress bars, results, errors."""

import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from coopq.core.types import ProgressCallback

STDOUT = Console()
STDERR = Console(stderr=True)
_SECONDS_A_LINE = 60.0
"""Of a log that nobody watches."""


@contextmanager
def progress_bars() -> Iterator[ProgressCallback]:
    """A bar for every stage, with rate and time left, on standard error; where that is no terminal, a line a minute."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=STDERR) as bars:
        tasks: dict[str, TaskID] = {}
        told = time.monotonic()

        def report(stage: str, done: int, total: int) -> None:
            nonlocal told
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, completed=done)
            bars.update(tasks[stage], completed=done, total=total)
            if not STDERR.is_terminal and time.monotonic() - told >= _SECONDS_A_LINE:
                told = time.monotonic()
                STDERR.print(f"{stage}: {done} of {total}", highlight=False, soft_wrap=True, markup=False)

        try:
            yield report
        except KeyboardInterrupt:
            STDERR.print("interrupted; nothing computed is lost: run the same command again to go on")
            raise


class _RateColumn(ProgressColumn):
    """Steps a second, or seconds a step where that is more than one."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


class _AboveTheBars(logging.Handler):
    """Prints a line as it is: bars that are shown stay below it."""

    def emit(self, record: logging.LogRecord) -> None:
        STDERR.print(record.getMessage(), highlight=False, soft_wrap=True, markup=False)


def show_log() -> None:
    """Show what this package says, memory before work for one, and what others warn of, above the bars."""
    logging.basicConfig(level=logging.WARNING, handlers=[_AboveTheBars()])
    logging.getLogger("coopq").setLevel(logging.INFO)
    for library in ("torchao", "torch.utils._pytree", "lm_eval"):  # full of warnings that nobody here can heed
        logging.getLogger(library).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Leave the terminal to our own bars; the libraries' errors still come as exceptions."""
    from transformers.utils import logging as library

    library.set_verbosity_error()
    library.disable_progress_bar()
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # they would round what is asked for in 32 bits


def print_result(data: Any, text: RenderableType, as_json: bool) -> None:
    """Print a result: its data for machines, or its text for people."""
    if as_json:
        typer.echo(json.dumps(data, indent=1))
    else:
        STDOUT.print(text, highlight=False, soft_wrap=True, markup=False)


def fail(message: str, debug: bool) -> None:
    """End with exit code 2 and one line, after a traceback if asked for."""
    if debug:
        traceback.print_exc()
    typer.echo(f"error: {message}", err=True)
    sys.exit(2)

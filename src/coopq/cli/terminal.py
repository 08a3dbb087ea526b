"""What the command line shows: progress bars, results, errors. rich is imported when something is shown."""

import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import click

from coopq.core.types import ProgressCallback

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_SECONDS_PER_LINE = 60.0
"""How often progress is printed where nobody watches a terminal."""


@cache
def stderr() -> "Console":
    """Where progress and notes are printed."""
    from rich.console import Console

    return Console(stderr=True, emoji=False)


def note(text: str) -> None:
    """Print a line on standard error as it is; bars that are shown stay below the line."""
    stderr().print(text, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def progress_bars() -> Iterator[ProgressCallback]:
    """A bar for every stage, with rate and time left, on standard error; without a terminal, a line a minute."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr()) as bars:
        tasks: dict[str, Task] = {}
        told = time.monotonic()

        def report(stage: str, done: int, total: int) -> None:
            nonlocal told
            if stage not in tasks:
                bars.add_task(stage, total=total, rate="")
                tasks[stage] = bars.tasks[-1]
            task = tasks[stage]
            if task.total is not None:  # a total that grows is not known: a search finds more to measure
                task.total = total if total <= task.total else None
            bars.update(task.id, completed=done, rate=_rate(task.finished_speed or task.speed))
            if not stderr().is_terminal and time.monotonic() - told >= _SECONDS_PER_LINE:
                told = time.monotonic()
                note(f"{stage}: {done} so far" if task.total is None else f"{stage}: {done} of {total}")

        try:
            yield report
        except KeyboardInterrupt:
            note("interrupted; nothing computed is lost: run the same command again to go on")
            raise
        finally:
            for task in tasks.values():
                if task.total is None:  # the end is known now
                    bars.update(task.id, total=task.completed)


def _rate(speed: float | None) -> str:
    """Steps a second, or seconds a step where a step takes longer than a second."""
    if not speed:
        return ""
    return f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each"


class _AboveTheBars(logging.Handler):
    """Prints the log's lines as they are."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def show_log() -> None:
    """Show what this package logs, and what other libraries warn of, above the bars."""
    logging.basicConfig(level=logging.WARNING, handlers=[_AboveTheBars()])
    logging.getLogger("coopq").setLevel(logging.INFO)
    for library in ("torchao", "torch.utils._pytree", "lm_eval"):  # their warnings are about themselves
        logging.getLogger(library).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Leave the terminal to our own bars; errors of the libraries still come as exceptions."""
    from transformers.utils import logging as library

    library.set_verbosity_error()
    library.disable_progress_bar()
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # those cores would round float32


def print_result(data: Any, text: "RenderableType", as_json: bool) -> None:
    """Print a result: its data for machines, or its text for people."""
    if as_json:
        click.echo(json.dumps(data, indent=1))
        return
    from rich.console import Console

    Console(emoji=False).print(text, highlight=False, soft_wrap=True, markup=False)


def fail(message: str, debug: bool) -> None:
    """End with exit code 2 and one line, after a traceback if asked for."""
    if debug:
        traceback.print_exc()
    click.echo(f"error: {message}", err=True)
    sys.exit(2)

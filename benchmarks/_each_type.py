"""Work on many types of models: a process, a folder, a log and a time limit for each type, and its result in a file."""

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from importlib import resources
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from _common import RESULTS, WORK, command_line, trial_page, write_report
from coopq.core.files import read_json, write_json

SECONDS = 180
"""Most seconds for a type."""

Result = dict[str, Any]
"""What came of a type: its "outcome", the "reason", and what else a benchmark notes."""
Examine = Callable[[str, Path, Path], Result]
"""Examines a type, in an empty folder, with a small text to calibrate on."""


def sweep(
    description: str | None,
    name: str,
    good: str,
    kinds: Sequence[str],
    examine: Examine,
    report_lines: Callable[[dict[str, Result]], list[str]],
) -> None:
    """The command line of a benchmark of types: examine types, and write the report.

    Args:
        description: The script's docstring.
        name: Name of the folder of results in `build`, and of the report.
        good: The outcome that `--again` does not examine again.
        kinds: All types.
        examine: Examines a type.
        report_lines: The report on all results.
    """
    parser = command_line(description)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--again", action="store_true", help=f"examine the types whose result is not {good} again")
    parser.add_argument("--report", action="store_true", help="examine nothing")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--work", type=Path, default=WORK / name, help="folder of the results")
    page = RESULTS / f"{name}.md"
    parser.add_argument(
        "--out", type=Path, help=f"the report (default: docs/results/{page.name} if no type is missing)"
    )
    options = parser.parse_args()
    if unknown := set(options.types) - set(kinds):
        parser.error(f"types unknown: {', '.join(sorted(unknown))}")

    def is_wanted(kind: str) -> bool:
        file = result_file(options.work, kind)
        return not file.exists() or (options.again and read_json(file)["outcome"] != good)

    if not options.report:
        run_all(options.types or [kind for kind in kinds if is_wanted(kind)], options.work, options.jobs, examine)
    found = results(kinds, options.work)
    out = options.out or (page if len(found) == len(kinds) else trial_page(name))
    write_report(out, report_lines(found), quiet=not options.report)
    print(out)


def run_all(wanted: Sequence[str], work: Path, jobs: int, examine: Examine) -> None:
    """Examine types, each in a process of its own, and keep each result in a file of `work`."""
    work.mkdir(parents=True, exist_ok=True)
    text = work / "text.txt"
    packaged = resources.files("coopq.model.texts") / "data" / "wikitext2_test.txt"
    text.write_text(packaged.read_text(encoding="utf-8")[:30_000], encoding="utf-8")
    waiting, running = list(wanted), dict[str, tuple[BaseProcess, float]]()
    fork = multiprocessing.get_context("fork")  # the libraries are imported once
    while waiting or running:
        while waiting and len(running) < jobs:
            kind = waiting.pop(0)
            process: BaseProcess = fork.Process(target=_child, args=(kind, work, text, examine))
            process.start()
            running[kind] = (process, time.monotonic())
        for kind, (process, start) in list(running.items()):
            seconds = time.monotonic() - start
            if process.is_alive() and seconds < SECONDS:
                continue
            process.kill()
            process.join()
            del running[kind]
            file = result_file(work, kind)
            if not file.exists():
                log = _log_file(work, kind).read_text(encoding="utf-8", errors="replace")
                end = "takes too long" if seconds >= SECONDS else f"ends with code {process.exitcode}"
                write_json(file, {"outcome": "FAILS", "reason": f"the process {end}", "traceback": log[-3000:]})
            shutil.rmtree(_folder(work, kind), ignore_errors=True)
            found = read_json(file)
            print(f"{kind:30} {found['outcome']:9} {seconds:4.0f} s  {reason(found)[:200]}", flush=True)
        time.sleep(0.05)


def _child(kind: str, work: Path, text: Path, examine: Examine) -> None:
    """Examine one type; all output goes to a log."""
    folder = _folder(work, kind)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    result_file(work, kind).unlink(missing_ok=True)
    log = os.open(_log_file(work, kind), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    found = examine(kind, folder, text)
    write_json(result_file(work, kind), json.loads(json.dumps(found).replace(str(folder), kind)))


def results(kinds: Sequence[str], work: Path) -> dict[str, Result]:
    """The results that there are, by type."""
    return {kind: read_json(file) for kind in kinds if (file := result_file(work, kind)).exists()}


def _folder(work: Path, kind: str) -> Path:
    """Where a type is worked on."""
    return work / kind.replace(":", "-")


def result_file(work: Path, kind: str) -> Path:
    """The file of a type's result."""
    return work / f"{_folder(work, kind).name}.json"


def _log_file(work: Path, kind: str) -> Path:
    """The file of what a type prints."""
    return work / f"{_folder(work, kind).name}.log"


def reason(found: Result) -> str:
    """Why a type does not work, for a cell of a table."""
    return " ".join(found.get("reason", "").split()).replace("|", "\\|")[:400]


def shown(kind: str) -> str:
    """A type's name for people."""
    return kind.removeprefix("wrapper:")

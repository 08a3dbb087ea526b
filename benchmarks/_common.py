"""What the benchmarks share: folders, command lines, reports in Markdown, and times. Nothing here imports torch."""

import argparse
import json
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from _answers import NUMBERS, head
from coopq.core.types import Losses
from coopq.judge.bench.results import Result
from coopq.plan.confidence import confidence

BENCHMARKS = Path(__file__).parent
ROOT = BENCHMARKS.parent
DATA = BENCHMARKS / "data"
"""Reference models and texts."""
WORK = ROOT / "build"
"""Each benchmark keeps its work in a folder of its own in here, and resumes from there."""
RESULTS = ROOT / "docs" / "results"
"""The reports."""
_PLACES = ("folder", "out", "work")
"""Options that say where files lie. They change no number of a page."""


def command_line(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def command_and_page(
    parser: argparse.ArgumentParser, options: argparse.Namespace, name: str, **published: object
) -> tuple[str, Path]:
    """The command that a page names, and the file of the page.

    A run with other options than the published page is a trial. A trial has a page below `build`, so that the
    published page stays as it is.

    Args:
        parser: The script's command line, without positional arguments.
        options: The options of this run.
        name: Name of the script and of its page.
        published: Options of the published page that differ from their defaults.
    Returns:
        The command with every option that differs from its default, and the file.
    """
    words, is_trial = ["python", f"benchmarks/{name}.py"], False
    for option, value in vars(options).items():
        if option in _PLACES:
            continue
        default = parser.get_default(option)
        is_trial |= value != published.get(option, default)
        if value != default:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{option.replace('_', '-')}", *map(str, values)]
    return shlex.join(words), trial_page(name) if is_trial else RESULTS / f"{name}.md"


def trial_page(name: str) -> Path:
    """The page of a trial: a run that must not replace the published page of a name."""
    return WORK / f"{name}-trial.md"


def mean_windows(results: Sequence[Result], method: str, budget: str | None) -> npt.NDArray[np.float64] | None:
    """Loss of a method at a budget on each window, averaged over seeds, shape (n_windows,); None if nobody asked."""
    found = [row.windows for result in results for row in result.rows if (row.method, row.budget) == (method, budget)]
    return np.mean(found, axis=0) if found else None


def write_lines(file: Path, lines: Sequence[str]) -> None:
    """Write lines of text into a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def write_report(report: Path, lines: Sequence[str], *, quiet: bool = False) -> None:
    """Write a report, and print the report unless `quiet`.

    A report without a title has the question and the answer of answers.toml above, which somebody then reads again.
    """
    write_lines(report, lines if lines[0].startswith("# ") else [*head(report.stem, lines), *lines])
    if not quiet:
        print("\n".join(lines), flush=True)


def write_models_report(
    description: str | None,
    report: Path,
    above: Sequence[str],
    rows: Callable[[str], list[str]],
    default: Sequence[str] = ("llama",),
) -> None:
    """Read names of models from the command line, and write one report on all these models.

    A run on other models than the default is a trial, whose page lies below `build` and names the models.

    Args:
        description: The script's docstring.
        report: The published page; the script has the same name.
        above: Lines above the models. The first line names the script.
        rows: Returns the lines of a model.
        default: Models that are taken if none is named.
    """
    parser = command_line(description)
    named = f"folders of benchmarks/data (default: {' '.join(default)})"
    parser.add_argument("models", nargs="*", metavar="MODEL", help=named)
    models = parser.parse_args().models or default
    if sorted(models) != sorted(default):
        script = f"benchmarks/{report.stem}.py"
        assert script in above[0], above[0]
        above = [above[0].replace(script, shlex.join([script, *models])), *above[1:]]
        report = trial_page(report.stem)
    write_report(report, [*above, *(row for name in models for row in rows(name))])


def write_section(report: Path, lines: Sequence[str], section: Sequence[str]) -> None:
    """Write a report that has a section for each processor: this section replaces the earlier one of this processor.

    Args:
        report: The file.
        lines: Lines above all sections.
        section: What was measured, without a heading.
    """
    text = report.read_text(encoding="utf-8") if report.exists() else ""
    parts = text.split(f"\n{NUMBERS}\n")[-1].split("\n## ")[1:]
    kept = [part for part in parts if not part.startswith(f"{processor()}, ")]
    new = "\n".join([f"{processor()}, {date.today().isoformat()}", "", *section]) + "\n"
    above = head(report.stem, lines)
    report.write_text("\n## ".join(["\n".join([*above, *lines]) + "\n", *sorted([*kept, new])]), encoding="utf-8")


def mean_difference(differences: Losses) -> str:
    """The mean of differences on windows with its sign, and its standard error, for people."""
    return f"{differences.mean():+.5f} ± {differences.std(ddof=1) / len(differences) ** 0.5:.5f}"


def table(columns: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [row(columns), row(["---"] * len(columns)), *map(row, rows)]


def row(cells: Iterable[object]) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(map(str, cells))} |"


def write_documents(path: Path, texts: Iterable[str]) -> None:
    """Write texts as a .jsonl file, a document a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def perplexity(losses: Losses) -> str:
    """The perplexity of losses on windows, for people."""
    return f"{np.exp(losses.mean()):.2f}"


def loss_above(losses: Losses, reference: Losses) -> str:
    """How far losses on windows lie above a reference's, with the paired 95 % interval, for people."""
    low, high = confidence(reference, losses).interval or (np.nan, np.nan)
    return f"{losses.mean() - reference.mean():+.4f} ({low:+.4f} to {high:+.4f})"


def processor() -> str:
    """The processor's name, as the system says it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def run_alone(script: str, *arguments: str) -> Any:
    """Run a script in a process of its own; returns the JSON in the last line that the script prints."""
    done = subprocess.run([sys.executable, script, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def cpu_seconds() -> float:
    """Processor time of this process and of the finished processes that it started, seconds."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def median_seconds(work: Callable[[], object], repeats: int, wait: Callable[[], object] = lambda: None) -> float:
    """The median time of `work`, after a warm-up, seconds.

    Args:
        work: What is timed.
        repeats: Number of repeats.
        wait: Waits until the device has done its work.
    """
    times = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def resident_bytes(field: str) -> int:
    """A size of this process in bytes, as Linux states it: VmRSS is the size now, VmHWM the size at its peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))

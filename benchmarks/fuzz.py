"""Whether a damaged file is refused in one line: seeded mutations of every file that coopq reads.

    python benchmarks/fuzz.py                          # about a quarter of an hour on one core
    python benchmarks/fuzz.py --only run.json scores   # these kinds of files; writes build/fuzz-trial.md

Each mutation is tried by the public command that reads the file, in a child process with a time limit. A file that
coopq wrote may not change an answer: such a mutation is refused, or the answer stays the same. A file that a user gives
(a model, a text, a list of cases) is the question itself, so another value may give another answer; a traceback and a
hang are faults there too. Writes docs/results/fuzz.md. Needs the packages of the extras llama.cpp and bench.
"""

import logging
import multiprocessing
import os
import random
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from _common import ROOT, WORK, command_and_page, command_line, processor, table, write_report
from _fuzz_targets import FAST, SHORT, STORIES, TARGETS, TWELVE, Answer, Refused, run
from _mutations import mutate

LIMIT = 120.0
"""Seconds after which a trial counts as hanging. The slowest command takes ten on an idle core."""
OUTCOMES = ("refused", "same answer", "another, said", "another answer", "traceback", "hang")


def prepare(place: Path) -> None:
    """Make the material: finished jobs, a bench, a GGUF file, a text."""
    from convert import convert

    if (place / "done").exists():
        return
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    run("quantize", STORIES, "--budget", "3avg", "--out", place / "out", "--method", "coopq", *FAST)
    for number, method in enumerate((["--method", "lim"], [])):  # a score, and a search that learns from the walks
        out = place / f"more{number}"
        run("quantize", STORIES, "--budget", "3avg", "--out", out, "--run", place / "out-run", *method, *FAST)
    run("evaluate", place / "out", *SHORT)
    judge = ["--judge-tokens", "128", "--judge-length", "64"]
    run("compare", STORIES, "--budget", "3avg", "--run", place / "out-run", "--method", "coopq", *FAST, *judge)
    shutil.copytree(STORIES, place / "model")
    (place / "base").mkdir()
    convert(TWELVE, place / "base" / "base.gguf")
    ggml = ["--backend", "ggml", "--bits", "4,8", "--fit-tokens", "128", "--method", "first-last", *SHORT]
    run("quantize", TWELVE, "--budget", "5avg", "--out", place / "ggml", *ggml)
    (place / "text").mkdir()
    sample = (ROOT / "src" / "coopq" / "model" / "texts" / "data" / "c4_sample.jsonl").read_text(encoding="utf-8")
    (place / "text" / "text.jsonl").write_text("\n".join(sample.split("\n")[:8]) + "\n", encoding="utf-8")
    (place / "bench").mkdir()
    (place / "bench" / "bench.toml").write_text(
        f'models = ["{STORIES}"]\nbackends = ["rtn"]\nbits = [[2, 4]]\nbudgets = ["3avg"]\nmethods = ["lim", "coopq"]\n'
        'title = "Fuzz"\njudge-tokens = 128\njudge-length = 64\ntokens = 128\nsequence-length = 64\npermutations = 3\n',
        encoding="utf-8",
    )
    run("bench", place / "bench" / "bench.toml", "--out", place / "bench" / "out")
    (place / "done").touch()


class Trial(NamedTuple):
    """What came of one mutation."""

    outcome: str
    text: str
    seconds: float


def attempt(answer: Answer, place: Path) -> Trial:
    """Run what reads the files, in a child process; the text is the answer, the message or the traceback."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_child, args=(answer, place, theirs))
    start = time.monotonic()
    child.start()
    theirs.close()
    outcome, text = "hang", ""
    try:
        if ours.poll(LIMIT):
            outcome, text = ours.recv()
    except EOFError:
        outcome, text = "traceback", "the process died"
    child.kill()
    child.join()
    return Trial(outcome, text, time.monotonic() - start)


class _Warnings(logging.Handler):
    """Keeps the warnings of a trial."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line; that a GGUF file was converted is no warning about its content."""
        if not record.getMessage().startswith("converted "):
            self.lines.append(record.getMessage())


def _child(answer: Answer, place: Path, pipe: Any) -> None:
    """Send the outcome: any exception but a refusal is what this benchmark looks for."""
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")
    warnings = _Warnings()
    logging.getLogger("coopq").addHandler(warnings)
    try:
        found = ("same answer", answer(place))
        if warnings.lines:
            found = ("another, said", found[1])
    except Refused as line:
        found = ("refused", str(line))
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - a panic of a library in Rust is no Exception
        found = ("traceback", traceback.format_exc())
    pipe.send(found)
    pipe.close()


def fuzz(material: Path, name: str, n: int, seed: int, scratch: Path) -> list[tuple[str, Trial]]:
    """Mutations of one kind of file, and what came of them."""
    target, rng = TARGETS[name], random.Random(f"{seed} {name}")

    def fresh() -> Path:
        shutil.rmtree(scratch, ignore_errors=True)
        for part in target.parts:
            shutil.copytree(material / part, scratch / part)
        return scratch

    target.answer(fresh())  # what the command imports is imported once, and forks have it
    whole = attempt(target.answer, fresh())
    if whole.outcome != "same answer":
        raise SystemExit(f"{name}: the file as it was written gives {whole.outcome}: {whole.text}")
    found: list[tuple[str, Trial]] = []
    for _ in range(n):
        file = rng.choice(sorted(fresh().glob(target.files)))
        content, kind = mutate(file.read_bytes(), rng, file.name)
        file.write_bytes(content)
        trial = attempt(target.answer, scratch)
        if trial.outcome == "another, said" and trial.text == whole.text:
            trial = trial._replace(outcome="same answer")
        if trial.outcome == "same answer" and trial.text != whole.text:
            trial = trial._replace(outcome="another answer")
        if trial.outcome in ("traceback", "hang") or (trial.outcome == "another answer" and target.is_ours):
            kept = scratch.parent / "faults" / f"{name.replace(' ', '-').replace(',', '')}-{len(found)}"
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.with_name(f"{kept.name}.txt").write_text(f"{kind} of {file.name}\n{trial.text}\n", encoding="utf-8")
            kept.with_name(f"{kept.name}.bin").write_bytes(content[:1_000_000])
        found.append((kind, trial))
    return found


def report(found: dict[str, list[tuple[str, Trial]]], command: str) -> list[str]:
    """The lines of the report."""
    rows: list[list[object]] = []
    totals, wrong = Counter[str](), 0
    for name, trials in found.items():
        counted, is_ours = Counter(trial.outcome for _, trial in trials), TARGETS[name].is_ours
        rows.append([name, "yes" if is_ours else "no", len(trials), *(counted[outcome] for outcome in OUTCOMES)])
        totals += counted
        wrong += counted["traceback"] + counted["hang"] + (counted["another answer"] if is_ours else 0)
    total = [totals.total(), *(totals[outcome] for outcome in OUTCOMES)]
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "msgspec", "safetensors"))
    return [
        f"`{command}` makes this page: {total[0]} mutations, {wrong} faults. {processor()}, {packages}.",
        "",
        "A fault is a traceback, a hang, or another answer from a file that coopq wrote. A file that a user gives is",
        "the question itself: there another answer is the answer to another question. 'Another, said' is another",
        "answer with a warning.",
        "",
        *table(["file", "written by coopq", "mutations", *OUTCOMES], [*rows, ["all", "", *total]]),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the material, fuzz, report."""
    parser = command_line(__doc__)
    parser.add_argument("--mutations", type=int, default=25, help="of each kind of file (default: 25)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(TARGETS), default=list(TARGETS), metavar="KIND")
    parser.add_argument("--work", type=Path, default=WORK / "fuzz")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    command, page = command_and_page(parser, asked, "fuzz")
    torch.set_num_threads(1)
    material = (asked.work / "material").resolve()
    prepare(material)
    found = {}
    for name in asked.only:
        found[name] = fuzz(material, name, asked.mutations, asked.seed, asked.work.resolve() / "scratch")
        counted = Counter(trial.outcome for _, trial in found[name])
        print(f"{name}: {dict(counted)}, {sum(trial.seconds for _, trial in found[name]):.0f} s", flush=True)
    write_report(asked.out or page, report(found, command))


if __name__ == "__main__":
    main()

"""Whether a damaged file is refused in one line: seeded mutations of every file that coopq reads.

    python benchmarks/fuzz.py --mutations 40 --seed 0

Each mutation is tried by the public command that reads the file, in a child process with a time limit. A file that
coopq wrote may not change an answer: such a mutation is refused, or the answer stays the same. A file that a user gives
(a model, a text, a list of cases) is the question itself, so another value may give another answer; a traceback and a
hang are faults there too. Needs the packages of the extras llama.cpp and bench.
"""

import contextlib
import hashlib
import io
import json
import logging
import multiprocessing
import os
import random
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import load_file

from _common import DATA, RESULTS, ROOT, WORK, command_line, processor, table, write_report

STORIES = ROOT / "tests" / "data" / "stories260k"
TWELVE = DATA / "twelve"
"""For GGUF files: rows of the smaller model do not fit into blocks of 32."""
SHORT = ["--tokens", "128", "--sequence-length", "64"]
FAST = ["--permutations", "3", "--bits", "2,4", "--granularity", "block", "--loss", "kl", *SHORT]
LIMIT = 120.0
"""Seconds after which a trial counts as hanging. The slowest command takes ten on an idle core."""
OUTCOMES = ("refused", "same answer", "another, said", "another answer", "traceback", "hang")
DEEP = 100_000

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
        (written,) = (place / "out-run").glob(name)
        return written.read_text(encoding="utf-8").replace(str(place), "")

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


def mutate(content: bytes, rng: random.Random, name: str) -> tuple[bytes, str]:
    """Another content, and how it came about."""
    kinds = list(_BYTES)
    if name.endswith((".json", ".jsonl")):
        kinds += ["value", "key", "number"] * 3
    elif name.endswith(".toml"):
        kinds += ["number"] * 3
    while True:
        kind = rng.choice(kinds)
        changed = _BYTES[kind](content, rng) if kind in _BYTES else _structured(content, rng, kind)
        if changed is not None and changed != content:
            return changed, kind


def _place(content: bytes, rng: random.Random) -> int:
    """A position; half of them in the first two thousand bytes, where binary files have their headers."""
    return rng.randrange(max(1, min(len(content), 2000) if rng.random() < 0.5 else len(content)))


def _flip(content: bytes, rng: random.Random) -> bytes:
    at = _place(content, rng)
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


def _replace(content: bytes, rng: random.Random) -> bytes:
    at, n = _place(content, rng), rng.choice((1, 4, 64))
    return content[:at] + rng.randbytes(n) + content[at + n :]


def _insert(content: bytes, rng: random.Random) -> bytes:
    at = _place(content, rng)
    return content[:at] + rng.choice((rng.randbytes(8), b"\0" * 16, b"\n", b"{", b"NaN")) + content[at:]


def _delete(content: bytes, rng: random.Random) -> bytes:
    at = _place(content, rng)
    return content[:at] + content[at + rng.choice((1, 8, 200)) :]


def _swap(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    return b"".join(lines)


def _drop_line(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    del lines[rng.randrange(len(lines))]
    return b"".join(lines)


_BYTES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "flip": _flip,
    "replace": _replace,
    "insert": _insert,
    "delete": _delete,
    "swap lines": _swap,
    "drop line": _drop_line,
    "truncate": lambda content, rng: content[: _place(content, rng)],
    "zeros": lambda content, rng: content[: _place(content, rng)].ljust(len(content), b"\0"),
    "twice": lambda content, rng: content * 2,
    "garbage": lambda content, rng: rng.randbytes(rng.choice((0, 1, 300))),
    "byte order mark": lambda content, rng: b"\xef\xbb\xbf" + content,
}
_VALUES = ("null", "true", "-1", "0", "1e308", "1e999", "NaN", '""', '"x"', "[]", "{}", "1" * 5000, "0.5", "[" * DEEP)


def _structured(content: bytes, rng: random.Random, kind: str) -> bytes | None:
    """A change of one value, key or digit of a file of JSON or TOML; None if the file has none."""
    if kind == "number":
        places = [index for index, byte in enumerate(content) if 48 <= byte <= 57]
        if not places:
            return None
        at = rng.choice(places)
        return content[:at] + str(rng.randrange(10)).encode() + content[at + 1 :]
    lines = content.splitlines(keepends=True)
    row = rng.randrange(len(lines)) if len(lines) > 1 and lines[0].rstrip().endswith(b"}") else None
    data: Any = json.loads(content if row is None else lines[row])
    spots = list(_spots(data))
    if not spots:
        return None
    holder, key = rng.choice(spots)
    if kind == "key":
        value = holder.pop(key)
        if isinstance(holder, dict) and rng.random() < 0.5:
            holder[f"{key}x"] = value
        text = json.dumps(data)
    else:
        holder[key] = "@@"
        text = json.dumps(data).replace('"@@"', rng.choice(_VALUES), 1)
    return text.encode() if row is None else b"".join([*lines[:row], text.encode() + b"\n", *lines[row + 1 :]])


def _spots(data: Any) -> "list[tuple[Any, Any]]":
    """Every place of a value in nested lists and dictionaries."""
    found: list[tuple[Any, Any]] = []
    for key in list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        found.append((data, key))
        found += _spots(data[key])
    return found


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
    except BaseException:  # noqa: BLE001
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
    parser.add_argument("--mutations", type=int, default=40, help="of each kind of file (default: 40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(TARGETS), default=list(TARGETS), metavar="KIND")
    parser.add_argument("--work", type=Path, default=WORK / "fuzz")
    parser.add_argument("--out", type=Path, default=RESULTS / "fuzz.md")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    material = (asked.work / "material").resolve()
    prepare(material)
    found = {}
    for name in asked.only:
        found[name] = fuzz(material, name, asked.mutations, asked.seed, asked.work.resolve() / "scratch")
        counted = Counter(trial.outcome for _, trial in found[name])
        print(f"{name}: {dict(counted)}, {sum(trial.seconds for _, trial in found[name]):.0f} s", flush=True)
    command = f"python benchmarks/fuzz.py --mutations {asked.mutations} --seed {asked.seed}"
    write_report(asked.out, report(found, command))


if __name__ == "__main__":
    main()

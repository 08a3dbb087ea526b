"""Which architectures of transformers work: a tiny random model of each is quantized, saved, loaded and compared.

    python benchmarks/architectures.py                # all types that have no result yet; some 50 minutes on one core
    python benchmarks/architectures.py --again        # the types whose result is not WORKS too
    python benchmarks/architectures.py llama gpt2     # these types, again
    python benchmarks/architectures.py --report       # only write the report

The logits of the saved and loaded model are compared with those of the original model, loaded by its own class of
transformers, whose parameters got the dequantized weights. Each type has a process of its own and a time limit. The
result of each type is a file in build/architectures. Writes docs/results/architectures.md.
"""

import os
import shutil
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers

import coopq
import coopq.export.checkpoint
import coopq.pipeline
from _common import ROOT, table
from _each_type import Result, reason, shown, sweep
from _tiny_models import BROKEN, NotBuiltError, build, described, kinds, logits_of, some_tokens
from coopq.core.errors import CoopQError

TOKENIZER = ROOT / "tests" / "data" / "stories260k"
GRANULARITIES = ("fused", "block")
OUTCOMES = ("WORKS", "REFUSES", "FAILS", "NOT BUILT")
GROUPS = ("causal language models", "wrappers of language models", "variants")
FULLY_COVERED = 0.95
TOLERANCE = 1e-3
"""Largest difference of logits, of the largest logit. Chosen by hand: float32 sums in another order differ by 1e-5."""


def examine(kind: str, folder: Path, text: Path) -> Result:
    """What becomes of one type.

    Args:
        kind: The type.
        folder: An empty folder to work in.
        text: A small text to calibrate on.
    """
    torch.set_num_threads(1)
    source = folder / "model"
    try:
        model = build(kind)
    except NotBuiltError as error:
        return {"outcome": "NOT BUILT", "reason": str(error)}
    try:
        model.save_pretrained(source)
    except BROKEN as error:
        return {"outcome": "NOT BUILT", "reason": f"cannot be saved: {described(error)}"}
    for file in TOKENIZER.glob("token*"):
        shutil.copy(file, source)
    found = {each: _judge(model, source, each, folder / each, text) for each in GRANULARITIES}
    worst = max(found.values(), key=lambda each: OUTCOMES.index(each["outcome"]))
    return {"class": type(model).__name__, **found, **worst}


def _judge(model: Any, source: Path, granularity: str, out: Path, text: Path) -> Result:
    """Quantize, load and compare one model with players of one kind."""
    request = coopq.Request.from_options(
        model=str(source),
        bits=(2, 4),
        backend="rtn",
        granularity=granularity,
        calibration=str(text),
        tokens=256,
        sequence_length=64,
    )
    try:
        plan = coopq.quantize(request, coopq.Goal(budget="3avg", method="one-shot-high"), out)
    except CoopQError as error:
        message = str(error)
        outcome = "FAILS" if "\n" in message else "REFUSES"  # a refusal is one line
        return {"outcome": outcome, "reason": f"{type(error).__name__}: {message}"}
    except BROKEN as error:
        return _failure("quantizing", error)
    try:
        problem = _difference(model, source, out, plan.quantized)
    except (CoopQError, *BROKEN) as error:
        return _failure("comparing", error)
    covered = {"covered": plan.covered, "players": len(plan.players)}
    return {"outcome": "FAILS", "reason": problem, **covered} if problem else {"outcome": "WORKS", **covered}


def _failure(stage: str, error: BaseException) -> Result:
    """The result of an error that nobody foresaw, with the last place in coopq."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/coopq/" in frame.filename][-1:]
    where = "".join(f" < {Path(frame.filename).name}:{frame.lineno}" for frame in ours)
    trace = "".join(traceback.format_exception(error))[-3000:]
    return {"outcome": "FAILS", "reason": f"{stage}: {described(error)}{where}", "traceback": trace}


def _difference(model: Any, source: Path, out: Path, quantized: dict[str, Any]) -> str:
    """How a saved model differs from the original with the saved weights; empty if it does not."""
    loaded = coopq.load(out, device="cpu")
    if type(loaded) is not type(model):
        return f"the saved model loads as {type(loaded).__name__}, and was {type(model).__name__}"
    original = type(model).from_pretrained(source, dtype=torch.float32).eval()
    tokens = some_tokens()
    before = logits_of(original, tokens)
    largest = max(1.0, float(before.abs().max()))
    if not _same(before, logits_of(model, tokens), largest):
        return "transformers itself loads another model than it saved"
    parameters = dict(original.named_parameters(remove_duplicate=False))
    unchanged = []
    with torch.no_grad():
        names = []
        for name, weight in coopq.dequantized(out):
            names.append(name)
            if torch.equal(parameters[name], weight):
                unchanged.append(name)
            parameters[name].copy_(weight)
    if len(names) != len(quantized) or unchanged:
        return f"{len(names)} of {len(quantized)} modules have dequantized weights, {len(unchanged)} of them unchanged"
    expected, ours = logits_of(original, tokens), logits_of(loaded, tokens)
    if not _same(expected, ours, largest):
        off = float((expected - ours).abs().max())
        return f"logits differ by {off:.3g}, and the largest is {largest:.3g}"
    if torch.equal(expected, before):
        return "quantizing changes no logit"
    return ""


def _same(first: torch.Tensor, second: torch.Tensor, largest: float) -> bool:
    """Whether two models' logits are equal but for rounding; NaN is equal to nothing."""
    return bool((first - second).abs().max() <= TOLERANCE * largest)


def report_lines(found: dict[str, Result]) -> list[str]:
    """The report on all results."""
    lines = [
        "A tiny random model of each architecture is quantized to 2 and 4 bits (rtn), saved, loaded and compared, with",
        "fused layers and with blocks as players. WORKS: the saved model loads as its own class, and its logits are",
        "those of the original model, in transformers' own class, with the dequantized weights. REFUSES: one line says",
        "why, before anything is saved. FAILS: anything else. NOT BUILT: this benchmark has no tiny model of the type.",
        "",
        f"`python benchmarks/architectures.py`, transformers {version('transformers')}, torch {torch.__version__}.",
        "",
    ]
    missing = len(kinds()) - len(found)
    lines += [f"{missing} of {len(kinds())} types have no result yet.", ""] if missing else []
    grouped = {group: [kind for kind in sorted(found) if _group(kind) == group] for group in GROUPS}
    counts = [
        [group, *(sum(found[kind]["outcome"] == outcome for kind in grouped[group]) for outcome in OUTCOMES)]
        for group in GROUPS
    ]
    lines += [*table(["types", *(f"{outcome}" for outcome in OUTCOMES)], counts), ""]
    for group in filter(grouped.get, GROUPS):
        working = [kind for kind in grouped[group] if found[kind]["outcome"] == "WORKS"]
        lines += [f"## {group[0].upper()}{group[1:]}", ""]
        lines += [f"WORKS: {', '.join(map(shown, working)) or 'none'}.", ""]
        partly = [(kind, share) for kind in working if (share := found[kind]["covered"] or 0) < FULLY_COVERED]
        if partly:
            said = ", ".join(f"{shown(kind)} {share:.0%}" for kind, share in partly)
            lines += [
                f"Share of the blocks' weights that is quantized, where it is below {FULLY_COVERED:.0%}: {said}.",
                "",
            ]
        rest = [each for outcome in OUTCOMES[1:] for each in grouped[group] if found[each]["outcome"] == outcome]
        rows = [[shown(kind), found[kind]["outcome"], reason(found[kind])] for kind in rest]
        lines += [*table(["type", "outcome", "why"], rows), ""] if rows else []
    return lines


def _group(kind: str) -> str:
    """The group of a type in the report."""
    return GROUPS[1] if kind.startswith("wrapper:") else GROUPS[2] if "@" in kind else GROUPS[0]


def main() -> None:
    """Examine types, and write the report."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sweep(__doc__, "architectures", "WORKS", kinds(), examine, report_lines)


if __name__ == "__main__":
    main()

"""AutoRound's AutoScheme and the active search on the same models, budgets, tokens and weights.

    python benchmarks/auto_scheme.py     # an hour on one core; resumes

Players are linear layers, 2 or 4 bits, groups of 64. AutoScheme scores a layer by the gradient times the change of the
layer's output, and chooses under an average width, in a process of its own. The budget of the active search is the size
of AutoScheme's choice. The search is run three times, each from nothing: to its first plan, for as long as AutoScheme
takes, and to its end. Both sides run on one thread, where processor time is the time that passes. `rtn` deploys all
choices, and WikiText-2 judges them. Writes docs/results/auto_scheme.md.
"""

import math
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

# On one thread AutoScheme's processor seconds can limit the minutes of a search. Numpy and torch read this once.
os.environ["OMP_NUM_THREADS"] = "1"

import msgspec
import numpy as np

from _common import RESULTS, WORK, cpu_seconds, loss_above, perplexity, row, table, write_documents, write_models_report
from _models import session_on, source_of
from coopq.core.files import write_json
from coopq.core.goal import Limit
from coopq.core.sizes import Budget
from coopq.core.specs import DEFAULT_SOLVER, Request, TextSpec
from coopq.core.types import UNTOUCHED
from coopq.judge.windows import judge_windows
from coopq.model.load import load_model
from coopq.model.texts import HeldOut, calibration_set
from coopq.plan.methods import make_plans

FOLDER = WORK / "auto_scheme"
MODELS, AVERAGES = ("llama", "qwen"), (2.5, 3.0)
TEXT = TextSpec(tokens=2048, sequence_length=256)
GROUP, JUDGE_TOKENS, WINDOW = 64, 32768, 512
AUTO_SCHEME = """
import json, sys, time
from pathlib import Path
import torch
from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme
from transformers import AutoModelForCausalLM, AutoTokenizer
source, text, n, length, average, group, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
alike = dict(group_size=int(group), sym=False, data_type="int", act_bits=16)
options = [QuantizationScheme(bits=bits, **alike) for bits in (2, 4)]
shared = dict(nsamples=int(n), seqlen=int(length), dataset=text, enable_torch_compile=False)
scheme = AutoScheme(avg_bits=float(average), options=options, ignore_scale_zp_bits=True, batch_size=1, **shared)
start = time.process_time()
tokenizer = AutoTokenizer.from_pretrained(source)
_, chosen = AutoRound(model, tokenizer, scheme=scheme, iters=0, device_map="cpu", **shared).quantize()
widths = {name: layer["bits"] for name, layer in chosen.items() if layer["bits"] < 16}
Path(out).write_text(json.dumps({"widths": widths, "seconds": time.process_time() - start}))
"""


class Scheme(msgspec.Struct):
    """What AutoScheme chooses.

    Attributes:
        widths: Width of each linear layer by name.
        seconds: Processor time.
    """

    widths: dict[str, int]
    seconds: float


def auto_scheme(model: str, average: float) -> Scheme:
    """What AutoScheme chooses for a model under an average width."""
    out, text = FOLDER / f"{model}-{average}.json", FOLDER / f"{model}.jsonl"
    if not out.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        tokenizer = load_model(source_of(model), device="cpu").tokenizer
        write_documents(text, map(tokenizer.decode, calibration_set(TEXT, tokenizer).tokens))
        arguments = [source_of(model), text, TEXT.n_sequences, TEXT.sequence_length - 1, average, GROUP, out]
        command = [sys.executable, "-c", AUTO_SCHEME, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    return msgspec.json.decode(out.read_bytes(), type=Scheme)


def describe(model: str) -> list[str]:
    """The lines of a model in the table."""
    return [line for loss in ("nll", "kl") for average in AVERAGES for line in compare(model, loss, average)]


def compare(model: str, loss: str, average: float) -> list[str]:
    """AutoScheme against the active search at the size of AutoScheme's choice: a line for each length of search.

    Args:
        model: Name of a reference model.
        loss: What the active search lowers.
        average: Average width for AutoScheme.
    """
    scheme, place = auto_scheme(model, average), FOLDER / f"{model}-{average}-{loss}"
    request = Request.from_options(
        model=source_of(model),
        backend="rtn",
        group_size=GROUP,
        bits=(2, 4),
        granularity="linear",
        loss=loss,
        tokens=TEXT.tokens,
        sequence_length=TEXT.sequence_length,
    )
    found = {name: search(request, scheme, limits, place / name) for name, limits in searches(scheme).items()}
    with session_on(request, place / "judged") as session:
        chosen = [scheme.widths[player.name] for player in session.players]
        points = [chosen, [UNTOUCHED] * len(chosen), *(one.assignment for one in found.values())]
        by_scheme, full, *ours = judge_windows(
            session, np.array(points, dtype=np.float32), HeldOut(WINDOW, JUDGE_TOKENS)
        )
        average_bits = f"{session.sizes.average_bits(chosen):.3f}"
    cells = [f"{model} ({perplexity(full)})", loss, average_bits, perplexity(by_scheme), f"{scheme.seconds:.0f}"]
    return [
        row([*cells, name, f"{one.forwards:.0f}", f"{one.seconds:.0f}", perplexity(own), loss_above(own, by_scheme)])
        for (name, one), own in zip(found.items(), ours, strict=True)
    ]


def searches(scheme: Scheme) -> dict[str, tuple[float, float]]:
    """Most forwards and most minutes of each search by its name; opening the session counts as minutes."""
    return {
        "first plan": (1, math.inf),
        "AutoScheme's time": (math.inf, scheme.seconds / 60),
        "whole search": (math.inf, math.inf),
    }


class Found(msgspec.Struct):
    """What a search chooses.

    Attributes:
        assignment: Width of each player.
        forwards: Forwards of the whole model over the calibration tokens, score included.
        seconds: Processor time, with loading the model and quantizing the weights.
    """

    assignment: tuple[float, ...]
    forwards: float
    seconds: float


def search(request: Request, scheme: Scheme, limits: tuple[float, float], folder: Path) -> Found:
    """What the active search chooses at the size of AutoScheme's choice, in a folder of its own."""
    kept = folder.with_suffix(".json")
    if not kept.exists():
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted search the seconds would be missing
        start = cpu_seconds()
        with session_on(request, folder) as session:
            names = [player.name for player in session.players]
            assert set(names) == set(scheme.widths), set(names) ^ set(scheme.widths)
            chosen = [scheme.widths[name] for name in names]
            budget = Budget.parse(f"{session.sizes.file_bytes(chosen) + session.sizes.reserved}B")
            forwards, minutes = limits
            left = Limit(forwards, max(0.0, minutes - (cpu_seconds() - start) / 60))
            (plan,) = make_plans(session, "active", [budget], DEFAULT_SOLVER, left)
            forwards = plan.block_forwards / len(set(session.blocks))
            write_json(kept, msgspec.to_builtins(Found(tuple(plan.assignment), forwards, cpu_seconds() - start)))
    return msgspec.json.decode(kept.read_bytes(), type=Found)


def main() -> None:
    """Measure the models that are named, and write the report."""
    columns = ["model", "our loss", "average bits", "AutoScheme", "its seconds"]
    columns += ["our search", "forwards", "seconds", "active", "difference"]
    head = [
        "Written by `python benchmarks/auto_scheme.py`: linear layers at 2 or 4 bits, groups of",
        f"{GROUP}, asymmetric, {TEXT.n_sequences} x {TEXT.sequence_length} tokens of C4 for both; deployed by `rtn`;",
        f"perplexity on the first {JUDGE_TOKENS:,} tokens of WikiText-2 in windows of {WINDOW}, in full precision in",
        f"brackets. auto-round {version('auto-round')}. Differences: ours less AutoScheme's, nats per token, 95 %,",
        "paired bootstrap over windows. Seconds of the processor, one thread, quantizing the weights included; ours",
        "include loading the model, AutoScheme's do not. Forwards of the whole model over the calibration tokens,",
        "score included.",
        "",
        *table(columns, []),
    ]
    write_models_report(__doc__, RESULTS / "auto_scheme.md", head, describe, MODELS)


if __name__ == "__main__":
    main()

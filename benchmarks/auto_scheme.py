"""AutoRound's AutoScheme and the active search on the same models, budgets, tokens and weights.

    python benchmarks/auto_scheme.py            # an hour and a half on one core; resumes

Players are linear layers, 2 or 4 bits, groups of 64. AutoScheme scores a layer by the gradient times the change of its
output, and chooses under an average width; it runs in a process of its own. Ours gets what its choice came to as its
budget. Both are deployed alike, by the backend rtn, and judged on WikiText-2. Writes docs/results/auto_scheme.md.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.progress import Progress

from coopq.model.texts import calibration_set
from coopq.judge.comparison import judge_windows
from coopq.plan.confidence import Evidence
from coopq.core.files import read_json, write_json
from coopq.plan.methods import measure, plans_on
from coopq.model.load import load_model
from coopq.core.config import CalibrationConfig, RunConfig
from coopq.core.sizes import Budget
from coopq.core.types import UNTOUCHED
from coopq.game.session import open_workbench
from main_job import bars_for

ROOT = Path(__file__).parents[1]
WORK, RESULTS = ROOT / "build" / "auto_scheme", ROOT / "docs" / "results" / "auto_scheme.md"
DATA = Path("benchmarks") / "data"
MODELS, AVERAGES = ("llama", "qwen"), (2.5, 3.0)
TEXT = CalibrationConfig(sequences=8, length=256)
GROUP, JUDGE_TOKENS, WINDOW = 64, 32768, 512
THEIRS = """
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
widths = {name: of["bits"] for name, of in chosen.items() if of["bits"] < 16}
Path(out).write_text(json.dumps({"widths": widths, "seconds": time.process_time() - start}))
"""


def auto_scheme(name: str, average: float) -> dict[str, float | dict[str, int]]:
    """Widths by linear layer that AutoScheme chooses, and the processor's seconds that it took."""
    out, text = WORK / f"{name}-{average}.json", WORK / f"{name}.jsonl"
    if not out.exists():
        tokenizer = load_model(str(DATA / name), device="cpu").tokenizer
        sequences = calibration_set(TEXT, tokenizer).tokens
        text.write_text("".join(json.dumps({"text": tokenizer.decode(ids)}) + "\n" for ids in sequences))
        arguments = [str(DATA / name), text, TEXT.sequences, TEXT.length - 1, average, GROUP, out]
        command = [sys.executable, "-c", THEIRS, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, float | dict[str, int]] = read_json(out)
    return found


def assignment_of(players: tuple[str, ...], widths: Mapping[str, int]) -> list[int]:
    """The same in the order of players."""
    assert set(players) == set(widths), set(players) ^ set(widths)
    return [widths[player] for player in players]


def run(name: str, bars: Progress) -> list[str]:
    """The rows of a model."""
    lines = []
    for loss in ("nll", "kl"):
        config = RunConfig(
            str(DATA / name),
            "rtn",
            GROUP,
            2,
            4,
            calibration=TEXT,
            granularity="linear",
            loss=loss,
        )
        for average in AVERAGES:
            theirs = auto_scheme(name, average)
            assert isinstance(theirs["widths"], dict)
            done = WORK / f"{name}-{average}-{loss}.json"
            folder, title = WORK / f"{name}-{average}-{loss}", f"{name} {average} {loss}"
            with open_workbench(config, folder, bars_for(bars, title), bank=WORK / f"{name}-bank") as bench:
                chosen = assignment_of(tuple(player.name for player in bench.players), theirs["widths"])
                n_bytes = bench.storage.bytes_of(chosen)
                if not done.exists():
                    start = time.process_time()
                    (plan,) = (measure(bench, p) for p in plans_on(bench, "active", [Budget.parse(f"{n_bytes}B")]))
                    seconds = time.process_time() - start
                    write_json(done, {"assignment": list(plan.assignment), "seconds": seconds})
                ours = read_json(done)
                points = np.array([chosen, ours["assignment"], [UNTOUCHED] * len(chosen)], dtype=np.float32)
                scheme, active, full = judge_windows(bench, points, length=WINDOW, max_tokens=JUDGE_TOKENS)
                low, high = Evidence.of(scheme, active).interval or (np.nan, np.nan)
                lines.append(
                    f"| {name} ({np.exp(full.mean()):.2f}) | {loss} | {bench.storage.average_bits(chosen):.3f} "
                    f"| {np.exp(scheme.mean()):.2f} | {np.exp(active.mean()):.2f} "
                    f"| {active.mean() - scheme.mean():+.4f} ({low:+.4f} to {high:+.4f}) "
                    f"| {theirs['seconds']:.0f} | {ours['seconds']:.0f} |"
                )
    return lines


def main() -> None:
    """Some models, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(MODELS)}; all unless named")
    models = parser.parse_args().models or MODELS
    WORK.mkdir(parents=True, exist_ok=True)
    with Progress() as bars:
        rows = [row for name in models for row in run(name, bars)]
    lines = [
        "# AutoScheme and the active search",
        "",
        "Written by `python benchmarks/auto_scheme.py`: linear layers at 2 or 4 bits, groups of",
        f"{GROUP}, asymmetric, {TEXT.sequences} x {TEXT.length} tokens of C4 for both; deployed by `rtn`; perplexity",
        f"on the first {JUDGE_TOKENS:,} tokens of WikiText-2 in windows of {WINDOW}, that of full precision in",
        f"brackets. auto-round {version('auto-round')}. Differences: ours less AutoScheme's, nats per token, 95 %,",
        "paired bootstrap over windows. Seconds of the processor: AutoScheme's with rounding the weights, ours of the",
        "search alone.",
        "",
        "| model | our loss | average bits | AutoScheme | active | difference | its seconds | ours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *rows,
    ]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

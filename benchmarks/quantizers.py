"""What each quantizer loses by itself, and what it takes.

    python benchmarks/quantizers.py            # half an hour on one core, nearly all of it AutoRound's; resumes

A reference model with every layer at 2, and at 4 bits, on the calibration tokens and on WikiText-2. Writes
docs/results/quantizers.md.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from coopq.model.texts import fitting_set
from coopq.judge.comparison import judge_windows
from coopq.plan.confidence import Evidence
from coopq.core.files import read_json, write_json
from coopq.core.config import CalibrationConfig, RunConfig
from coopq.core.types import UNTOUCHED, Losses
from coopq.game.session import open_workbench
from gptq_static import spent
from main_job import bars_for

ROOT = Path(__file__).parents[1]
WORK, RESULTS = ROOT / "build" / "quantizers", ROOT / "docs" / "results" / "quantizers.md"
DATA = ROOT / "benchmarks" / "data"
TEXT = CalibrationConfig(sequences=8, length=512)
WIDTHS, GROUP, JUDGE_TOKENS, WINDOW = (2, 4), 64, 32768, 512
QUANTIZERS: Mapping[str, Mapping[str, Any]] = {
    "rtn": {"backend": "rtn"},
    "hqq": {"backend": "hqq"},
    "quanto": {"backend": "quanto", "group_size": None},  # its own: 128
    "gptq": {"backend": "gptq"},
    "gptq --asymmetric": {"backend": "gptq", "symmetric": False},
    "gptq-static --asymmetric": {"backend": "gptq-static", "symmetric": False},
    "autoround": {"backend": "autoround"},
}


@dataclass(frozen=True)
class Found:
    """What a model is worth with every layer at one width.

    Attributes:
        text: Loss on the calibration tokens, and on those that weights are fitted to where they are.
        losses: On windows of WikiText-2, and the same of the untouched model, shape (2, n_windows).
        seconds: Of the processor, for the weights; None where they were interrupted.
    """

    text: tuple[float, float]
    losses: Losses
    seconds: float | None


def found_by(
    folder: Path, name: str, quantizer: Mapping[str, Any], width: int, fitting: int | None, bars: Progress
) -> Found:
    """One model, quantizer and width, fitted to so many sequences; the work is kept in a folder."""
    settings = {"group_size": GROUP, "low": width, "high": UNTOUCHED, **quantizer}
    text = replace(TEXT, fitting=fitting)
    config = RunConfig(str(DATA / name), calibration=text, **settings)
    timed, is_new, start = folder / "seconds.json", not folder.exists(), spent()
    with open_workbench(config, folder, bars_for(bars, folder.name)) as bench:
        if not timed.exists():
            write_json(timed, spent() - start if is_new else None)
        points = np.array([[of] * len(bench.players) for of in (width, UNTOUCHED)], dtype=np.float32)
        seen = []
        fitted = fitting_set(text, bench.loaded.tokenizer)
        for tokens, journal in ((bench.calibration, "calibration.jsonl"), (fitted, "fitted.jsonl")):
            with bench.game(tokens, folder / journal, "measuring") as game:
                seen.append(float(game(points[:1])[0]))
        losses = judge_windows(bench, points, length=WINDOW, max_tokens=JUDGE_TOKENS)
    return Found((seen[0], seen[1]), losses, read_json(timed))


def perplexity(losses: Losses) -> str:
    """For people."""
    return f"{np.exp(losses.mean()):.2f}"


def above(losses: Losses, others: Losses) -> str:
    """How much higher losses are than others, with the paired interval, for people."""
    low, high = Evidence.of(others, losses).interval or (np.nan, np.nan)
    return f"{losses.mean() - others.mean():+.4f} ({low:+.4f} to {high:+.4f})"


def run(name: str, bars: Progress) -> list[str]:
    """The report of a model."""
    every = {
        of: {
            width: found_by(WORK / f"{name}-{of.replace(' ', '')}-{width}", name, settings, width, None, bars)
            for width in WIDTHS
        }
        for of, settings in QUANTIZERS.items()
    }
    full = every["rtn"][WIDTHS[0]].losses[1]
    columns = "calibration | fitted to | perplexity | loss above full precision | seconds"
    header = [f"{width} bits: {columns}" for width in WIDTHS]
    lines = [
        "",
        f"## {name}",
        "",
        f"In full precision {perplexity(full)}.",
        "",
        f"| backend | {' | '.join(header)} |",
        "| --- |" + " --- |" * 5 * len(WIDTHS),
    ]
    for quantizer, by_width in every.items():
        cells = [quantizer]
        for found in by_width.values():
            seconds = "" if found.seconds is None else f"{found.seconds:.0f}"
            cells += [f"{loss:.4f}" for loss in found.text]
            cells += [perplexity(found.losses[0]), above(found.losses[0], full), seconds]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_report(
    description: str | None, results: Path, head: list[str], run: Callable[[str, Progress], list[str]]
) -> None:
    """Ask for models, llama unless named, and write what a bench says of them under a head."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="of benchmarks/data; llama unless named")
    models = parser.parse_args().models or ["llama"]
    with Progress() as bars:
        text = "\n".join([*head, *(row for name in models for row in run(name, bars))])
    results.write_text(text + "\n", encoding="utf-8")
    print(text)


def main() -> None:
    """Some models, or all."""
    head = [
        "# Quantizers",
        "",
        "Written by `python benchmarks/quantizers.py`: every layer of the blocks at one width, groups of",
        f"{GROUP} (quanto: 128). Losses on {TEXT.sequences} sequences of {TEXT.length} tokens of C4, as a search would",
        "see them, and on the 64 others that gptq, gptq-static and autoround are fitted to.",
        f"Perplexity on the first {JUDGE_TOKENS:,} tokens of WikiText-2 in windows of {WINDOW}. Losses in nats per",
        "token, differences with 95 %, paired bootstrap over windows; seconds of the processor for the weights.",
    ]
    write_report(__doc__, RESULTS, head, run)


if __name__ == "__main__":
    main()

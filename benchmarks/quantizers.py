"""The loss that each quantizer causes by itself, and the time that it takes.

    python benchmarks/quantizers.py            # half an hour on one core, nearly all of it AutoRound; resumes

Every layer of a reference model is quantized to 2 bits, and to 4 bits, and measured on calibration tokens and on
WikiText-2. Writes docs/results/quantizers.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from _common import RESULTS, WORK, cpu_seconds, loss_above, perplexity, table, write_models_report
from _models import session_on, source_of
from coopq.core.files import read_json, write_json
from coopq.core.specs import Request
from coopq.core.types import UNTOUCHED, Losses
from coopq.judge.windows import judge_windows
from coopq.model.texts import HeldOut, fitting_set

TOKENS, LENGTH = 4096, 512
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
class Quantized:
    """A model with every layer at one width.

    Attributes:
        calibration: Loss on the calibration tokens, nats per token.
        fitted: Loss on the tokens that weights are fitted to, nats per token.
        windows: Losses on windows of WikiText-2, shape (n_windows,), nats per token.
        full: Losses of the model in full precision on the same windows.
        seconds: Processor time of the quantization; None if the quantization was interrupted.
    """

    calibration: float
    fitted: float
    windows: Losses
    full: Losses
    seconds: float | None


def quantized(
    work: Path, model: str, quantizer: str, options: Mapping[str, Any], width: int, n_fitted: int | None = None
) -> Quantized:
    """A model quantized to one width and measured.

    Args:
        work: Folder of the run folders.
        model: Name of a reference model.
        quantizer: Name of the quantizer.
        options: Options of the quantizer.
        width: Width of every layer.
        n_fitted: Sequences that weights are fitted to; None takes the default.
    """
    name = f"{model}-{quantizer.replace(' ', '')}-{width}"
    folder = work / (name if n_fitted is None else f"{name}-{n_fitted}")
    fit_tokens = None if n_fitted is None else n_fitted * LENGTH
    text = {"tokens": TOKENS, "sequence_length": LENGTH, "fit_tokens": fit_tokens}
    options = {"group_size": GROUP, "bits": (width, UNTOUCHED), **text, **options}
    request = Request.from_options(model=source_of(model), **options)
    timed, is_new, start = folder / "seconds.json", not folder.exists(), cpu_seconds()
    with session_on(request, folder) as session:
        if not timed.exists():
            write_json(timed, cpu_seconds() - start if is_new else None)
        points = np.array([[bits] * len(session.players) for bits in (width, UNTOUCHED)], dtype=np.float32)
        with session.game_on(session.calibration, folder / "calibration.jsonl", "measuring") as game:
            calibration = float(game(points[:1])[0])
        fitted_to = fitting_set(request.text, session.loaded.tokenizer)
        with session.game_on(fitted_to, folder / "fitted.jsonl", "measuring") as game:
            fitted = float(game(points[:1])[0])
        windows, full = judge_windows(session, points, HeldOut(WINDOW, JUDGE_TOKENS))
    return Quantized(calibration, fitted, windows, full, read_json(timed))


def describe(model: str) -> list[str]:
    """The report of a model."""
    work = WORK / "quantizers"
    every = {
        name: {width: quantized(work, model, name, options, width) for width in WIDTHS}
        for name, options in QUANTIZERS.items()
    }
    full = every["rtn"][WIDTHS[0]].full
    columns = ("calibration", "fitted to", "perplexity", "loss above full precision", "seconds")
    head = ["backend", *(f"{width} bits: {column}" for width in WIDTHS for column in columns)]
    rows = []
    for name, by_width in every.items():
        cells = [name]
        for found in by_width.values():
            seconds = "" if found.seconds is None else f"{found.seconds:.0f}"
            cells += [f"{found.calibration:.4f}", f"{found.fitted:.4f}", perplexity(found.windows)]
            cells += [loss_above(found.windows, full), seconds]
        rows.append(cells)
    return ["", f"## {model}", "", f"In full precision {perplexity(full)}.", "", *table(head, rows)]


def main() -> None:
    """Measure the models that are named, and write the report."""
    head = [
        "Written by `python benchmarks/quantizers.py`: every layer of the blocks at one width, groups of",
        f"{GROUP} (quanto: 128). Losses on {TOKENS // LENGTH} sequences of {LENGTH} tokens of C4, as a search sees",
        "them, and on the 64 other sequences that gptq, gptq-static and autoround are fitted to.",
        f"Perplexity on the first {JUDGE_TOKENS:,} tokens of WikiText-2 in windows of {WINDOW}. Losses in nats per",
        "token, differences with 95 %, paired bootstrap over windows; seconds: processor time for the weights.",
    ]
    write_models_report(__doc__, RESULTS / "quantizers.md", head, describe)


if __name__ == "__main__":
    main()

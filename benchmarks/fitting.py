"""How many tokens should weights be fitted to?

    python benchmarks/fitting.py            # a quarter of an hour on one core; resumes

Every layer of a reference model is quantized to 2 bits, and to 4 bits, by quantizers that fit their weights to a text.
The text has more and more sequences of C4, which are not those of the search. Writes docs/results/fitting.md.
"""

from collections.abc import Mapping
from typing import Any

from _common import RESULTS, WORK, perplexity, table, write_models_report
from quantizers import GROUP, JUDGE_TOKENS, LENGTH, QUANTIZERS, TOKENS, WIDTHS, WINDOW, quantized

SEQUENCES = (8, 32, 64, 128)
FITTED: Mapping[str, Mapping[str, Any]] = {
    **{name: QUANTIZERS[name] for name in ("gptq --asymmetric", "gptq-static --asymmetric")},
    "ggml": {"backend": "ggml", "group_size": None},
}


def describe(model: str) -> list[str]:
    """The report of a model."""
    lines = ["", f"## {model}"]
    for width in WIDTHS:
        rows = []
        for name, options in FITTED.items():
            cells = [name]
            for n in SEQUENCES:
                found = quantized(WORK / "fitting", model, name, options, width, n)
                seconds = "" if found.seconds is None else f", {found.seconds:.0f} s"
                cells.append(f"{perplexity(found.windows)} ({found.calibration:.4f}, {found.fitted:.4f}{seconds})")
            rows.append(cells)
        lines += ["", *table([f"{width} bits", *(f"{n} sequences" for n in SEQUENCES)], rows)]
    return lines


def main() -> None:
    """Measure the models that are named, and write the report."""
    head = [
        f"Written by `python benchmarks/fitting.py`: every layer of the blocks at one width, groups of {GROUP}",
        f"(ggml: its own), fitted to sequences of {LENGTH} tokens of C4; perplexity on the first",
        f"{JUDGE_TOKENS:,} tokens of WikiText-2 in windows of {WINDOW}. In brackets: the loss on the",
        f"{TOKENS // LENGTH} sequences of C4 that a search sees, the loss on the sequences that weights are fitted",
        "to, and the processor time for the weights.",
    ]
    write_models_report(__doc__, RESULTS / "fitting.md", head, describe)


if __name__ == "__main__":
    main()

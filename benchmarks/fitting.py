"""How many tokens should weights be fitted to?

    python benchmarks/fitting.py            # a quarter of an hour on one core; resumes

A reference model with every layer at 2, and at 4 bits, by quantizers that fit their weights, to more and more sequences
of C4 that are not those of the search. Writes docs/results/fitting.md.
"""

from collections.abc import Mapping
from typing import Any

from rich.progress import Progress

from quantizers import GROUP, JUDGE_TOKENS, QUANTIZERS, ROOT, TEXT, WIDTHS, WINDOW, found_by, perplexity, write_report

WORK, RESULTS = ROOT / "build" / "fitting", ROOT / "docs" / "results" / "fitting.md"
SEQUENCES = (8, 32, 64, 128)
FITTED: Mapping[str, Mapping[str, Any]] = {
    **{name: QUANTIZERS[name] for name in ("gptq --asymmetric", "gptq-static --asymmetric")},
    "ggml": {"backend": "ggml", "group_size": None},
}


def run(name: str, bars: Progress) -> list[str]:
    """The rows of a model."""
    lines = ["", f"## {name}", ""]
    for width in WIDTHS:
        lines += [
            f"| {width} bits | {' | '.join(f'{n} sequences' for n in SEQUENCES)} |",
            "| --- |" + " --- |" * len(SEQUENCES),
        ]
        for label, settings in FITTED.items():
            cells = [label]
            for n in SEQUENCES:
                folder = WORK / f"{name}-{label.replace(' ', '')}-{width}-{n}"
                found = found_by(folder, name, settings, width, n, bars)
                seconds = "" if found.seconds is None else f", {found.seconds:.0f} s"
                cells.append(f"{perplexity(found.losses[0])} ({found.text[0]:.4f}, {found.text[1]:.4f}{seconds})")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines[:-1]


def main() -> None:
    """Some models, or all."""
    head = [
        "# Tokens that weights are fitted to",
        "",
        f"Written by `python benchmarks/fitting.py`: every layer of the blocks at one width, groups of {GROUP}",
        f"(ggml: its own), fitted to sequences of {TEXT.length} tokens of C4; perplexity on the first",
        f"{JUDGE_TOKENS:,} tokens of WikiText-2 in windows of {WINDOW}. In brackets the loss on {TEXT.sequences} other",
        "sequences of C4, that on those that weights are fitted to, and seconds of the processor for the weights.",
    ]
    write_report(__doc__, RESULTS, head, run)


if __name__ == "__main__":
    main()

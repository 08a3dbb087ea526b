"""What each choice is worth by itself, at equal bytes: players, widths, rounding, types, loss, tokens and search.

    python benchmarks/factors.py            # seconds, from docs/results/recipes.json of benchmarks/recipes.py

Writes docs/results/factors.md.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from _common import RESULTS, command_line, table, write_report
from coopq.core.files import read_json
from recipes import RANDOM_WIDTHS, SCORE

ENGINES = {"coopq": "CoopQ's own form", "llama.cpp": "llama.cpp"}
FACTORS: dict[tuple[str, str, str], dict[str, str]] = {
    ("search", "random widths", "the search"): dict.fromkeys(ENGINES, RANDOM_WIDTHS),
    ("search", "the score alone", "the search"): dict.fromkeys(ENGINES, SCORE),
    ("players", "blocks", "linear layers"): dict.fromkeys(ENGINES, "blocks"),
    ("players", "fused layers", "linear layers"): dict.fromkeys(ENGINES, "fused layers"),
    ("widths", "2 and 4 bits", "2, 3, 4 and 8 bits"): {"coopq": "2 and 4 bits"},
    ("rounding", "`hqq`", "`rtn`"): {"coopq": "hqq"},
    ("rounding", "`ggml`, without GPTQ", "`ggml-gptq`"): {"llama.cpp": "ggml"},
    ("types", "`ggml-iq`", "`ggml-gptq`"): {"llama.cpp": "ggml-iq"},
    ("loss", "likelihood", "divergence"): {"coopq": "nll"},
    ("tokens", "1,024", "4,096"): dict.fromkeys(ENGINES, "1,024 tokens"),
    ("tokens", "16,384", "4,096"): dict.fromkeys(ENGINES, "16,384 tokens"),
}
"""The choice, what is tried, what the recipe has; and the name in recipes.json by engine."""


def ratio(variants: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """Divergence as a multiple of the recipe's, mean over windows, and its standard error."""
    ratios = np.divide(variants[name]["divergences"], variants["the recipe"]["divergences"])
    return f"{ratios.mean():.2f} ± {ratios.std(ddof=1) / np.sqrt(len(ratios)):.2f}"


def report_lines(record: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The report: a row for each change of a choice, a column for each model and engine."""
    cases = {
        f"{model.title()}, {shown}": f"{model}, {engine}, 3.5bpw"
        for engine, shown in ENGINES.items()
        for model in ("llama", "qwen")
    }
    rows = []
    for (choice, tried, recipe), names in FACTORS.items():
        cells = []
        for case in cases.values():
            name = names.get(case.split(", ")[1], "")
            cells.append(ratio(record[case], name) if name in record[case] else "")
        rows.append([choice, tried, recipe, *cells])
    return [
        "Written by `python benchmarks/factors.py`, from what `python benchmarks/recipes.py` measured at 3.5 bits per",
        "weight ([settings](recipes.md)). Each row changes one choice of a recipe. A number is the divergence from the",
        "original on WikiText-2 as a multiple of the recipe's: the mean over 32 windows of 256 tokens ± its error.",
        "",
        *table(["choice", "instead", "the recipe", *cases], rows),
    ]


def main() -> None:
    """Write the report."""
    command_line(__doc__).parse_args()
    write_report(RESULTS / "factors.md", report_lines(read_json(RESULTS / "recipes.json")))


if __name__ == "__main__":
    main()

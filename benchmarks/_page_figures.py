"""Figures of pages whose table is a few rows: what each finds or loses, from the tables on the pages."""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from _answers import read_tables
from _common import RESULTS
from _figures import numbers_in, tables_of
from _shapes import draw_dots, draw_lines
from recipes import OF_FACTORS

_SETTINGS = re.compile(r"^## (\w+), ([\w.]+), ([\d.]+)bpw$")
MODELS = {"llama": "Llama", "qwen": "Qwen", "gemma": "Gemma", "demo": "SmolLM2-135M"}
"""How the models are named in figures."""


def first(cell: str) -> float:
    """The first number of a cell."""
    return numbers_in(cell)[0]


def headings(name: str, level: str = "## ") -> list[str]:
    """The headings of a page below "Measurement", without marks."""
    lines = (RESULTS / f"{name}.md").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix(level) for line in lines if line.startswith(level) and line != "## Measurement"]


def draw_informed(out: Path) -> list[Path]:
    """How far above the end of the search each answer is, by what it costs."""
    lines, alone = {}, defaultdict(list)
    names = {"auto-quantize": "the score alone", "one-shot-high": "one-shot losses alone"}
    for case, rows in zip(headings("informed"), tables_of("informed"), strict=False):
        if "forwards" not in rows[0] or case.split(", ")[0] not in MODELS:
            continue
        found = {row["method"]: row for row in rows}
        budgets = [column for column in rows[0] if column.endswith("bpw") and not column.startswith("held out")]
        end = [float(found["active, at its end"][budget]) for budget in budgets]
        place = {
            method: (
                float(row["forwards"]),
                100
                * float(np.mean([float(row[budget]) / least - 1 for budget, least in zip(budgets, end, strict=True)])),
            )
            for method, row in found.items()
        }
        model, players, backend = case.split(":")[0].split(", ")[:3]
        line = [place[method] for method in place if method.startswith("active")]
        lines[f"{MODELS[model]}, {players}, {backend}"] = list(dict.fromkeys(line))
        for method, shown in names.items():
            alone[shown].append(place[method])
    return draw_lines(
        out / "informed",
        lines,
        alone=alone,
        alike="the search, seven cases",
        title="The search, by what it spends, its score alone, and one-shot losses alone",
        xlabel="forwards of the model, for all budgets together",
        ylabel="divergence above the search's end, %,\nmean over budgets",
        height=4.2,
    )


def draw_recipes(out: Path) -> list[Path]:
    """Divergence of each setting beside that of the recipe: a dot for each model, by engine."""
    rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for case, table in zip(headings("recipes"), tables_of("recipes"), strict=True):
        _, engine, _ = case.split(", ")
        shown = "CoopQ's own form, MLX" if engine in ("coopq", "mlx") else engine  # the same settings
        for row in table:
            if row["settings"] not in ("the recipe", *OF_FACTORS):
                rows[row["settings"]][shown].append(float(row["ratio"]))
    ranked = sorted(rows.items(), key=lambda row: float(np.mean(np.log(np.concatenate(list(row[1].values()))))))
    return draw_dots(
        out / "recipes",
        ranked,
        log=True,
        reference=1.0,
        apart=True,
        title="What another setting loses beside the recipe of the engine",
        xlabel="divergence from the original, as a multiple of the recipe's; right of 1 the recipe is better",
    )


def draw_factors(out: Path) -> list[Path]:
    """Divergence after each change of a choice, as a multiple of the recipe's."""
    (table,) = tables_of("factors")
    words = ("choice", "instead", "the recipe")
    rows = [
        (
            f"{row['choice']}: {row['instead']}".replace("`", ""),
            {case: first(row[case]) for case in reversed(row) if case not in words and row[case]},
        )
        for row in table
    ]
    return draw_dots(
        out / "factors",
        rows,
        log=True,
        reference=1.0,
        apart=True,
        title="What each choice is worth by itself, at 3.5 bits per weight",
        xlabel="divergence from the original, as a multiple of the recipe's; right of 1 the recipe is better",
    )


def draw_demo_mixes(out: Path) -> list[Path]:
    """Divergence of our files and of the mixes, by size."""
    name = "llama_mixes-demo-linear"
    sizes, divergences, strongest = read_tables((RESULTS / f"{name}.md").read_text(encoding="utf-8").splitlines())
    best = {row["bytes at most"]: float(row["its divergence"]) for row in strongest}
    rows: dict[str, dict[str, float]] = {}
    for size, lost in zip(sizes, divergences, strict=True):
        label = f"{first(size['its bytes']) / 1e6:.1f} MB"
        values = {"CoopQ": float(lost["ours"]), "strongest mix": best[size["its bytes"]]}
        rows[label] = values | {"mix as it is": float(lost["WikiText-2: its divergence"])}
    return draw_dots(
        out / name,
        list(rows.items()),
        title="SmolLM2-135M: CoopQ's files beside llama.cpp's mixes of the same size",
        xlabel="KL divergence from the model's own file, nats per token of WikiText-2",
    )


def draw_later_sizes(out: Path) -> list[Path]:
    """Forwards of a size asked alone, and after others."""
    rows = [
        (
            f"{MODELS[model]}, {row['size'].removesuffix('bpw')} bits",
            {"alone": float(row["forwards alone"]), "after the sizes above": float(row["after the sizes above"])},
        )
        for model, table in zip(headings("later_sizes"), tables_of("later_sizes"), strict=True)
        for row in table
    ]
    title = "Sizes asked for one after the other in a run folder"
    return draw_dots(out / "later_sizes", rows, title=title, xlabel="forwards of the model over the calibration tokens")


def draw_fitting(out: Path) -> list[Path]:
    """Perplexity against the number of sequences that weights are fitted to, at 2 bits."""
    rows = tables_of("fitting")[0]
    lines = {
        row["2 bits"]: [(first(column), first(cell)) for column, cell in row.items() if column.endswith("sequences")]
        for row in rows
    }
    return draw_lines(
        out / "fitting",
        lines,
        log="xy",
        title="The reference Llama with every layer at 2 bits",
        xlabel="sequences of 512 tokens that weights are fitted to",
        ylabel="perplexity on WikiText-2",
    )


def draw_tied_head(out: Path) -> list[Path]:
    """Divergence of an embedding in each type, by how it is rounded; the reference Llama and SmolLM2-135M."""
    rows = [
        (
            f"{MODELS[row['model']]}, {row['type']}",
            {how: float(row[how]) for how in ("GPTQ", "no importance", "importance")},
        )
        for row in tables_of("tied_head")[0]
        if row["model"] in ("llama", "demo")
    ]
    title = "The embedding, which is also the head, in one of ggml's types"
    xlabel = "KL divergence from full precision, nats per token of C4"
    return draw_dots(out / "tied_head", rows, log=True, title=title, xlabel=xlabel)


def draw_gptq_static(out: Path) -> list[Path]:
    """Loss of gptq-static less that of gptq, by budget and model."""
    rows: dict[str, dict[str, float]] = defaultdict(dict)
    for model, table in zip(headings("gptq_static"), tables_of("gptq_static"), strict=True):
        for row in table:
            rows[f"{row['budget'].removesuffix('avg')} average bits"][MODELS[model]] = first(row["difference"])
    return draw_dots(
        out / "gptq_static",
        list(rows.items()),
        reference=0.0,
        title="Fitted to inputs of the full-precision model",
        xlabel="loss on WikiText-2 of gptq-static less that of gptq, nats per token",
    )


def draw_enumerated(out: Path) -> list[Path]:
    """Regret of each method on the text it searched and on another, mean over six cases."""
    by_method: dict[str, list[list[float]]] = defaultdict(list)
    for table in tables_of("enumerated"):
        for row in table:
            if "method" not in row:
                continue
            searched = [first(cell) for column, cell in row.items() if column.endswith("searched")]
            by_method[row["method"]].append([float(np.mean(searched)), float(row["cost"])])
    means = {method: np.mean(found, axis=0) for method, found in by_method.items()}
    ranked = sorted(means.items(), key=lambda one: (one[1][0], one[1][1]))
    least = 0.001
    rows = [(f"{method} ({cost:.0f})", {"regret": max(float(regret), least)}) for method, (regret, cost) in ranked]
    title = "A model of twelve blocks: regret by method, forwards in brackets"
    xlabel = f"regret: 1 is random, {least} the optimum or so close to it"
    return draw_dots(out / "enumerated", rows, log=True, title=title, xlabel=xlabel)


def draw_ablations(out: Path) -> list[Path]:
    """Loss after each step of walks that lower widths, and of walks that prune."""
    tables = [table for table in tables_of("ablations") if "loss after steps" in table[0]]
    lines = {}
    for name, table, kinds in (("hqq, 4 to 2 bits", tables[0], 2), ("rtn, 4 to 3 bits", tables[1], 1)):
        for row in table[:kinds]:
            points = [(float(step), first(cell)) for step, cell in row.items() if step.isdigit()]
            lines["pruning" if row["loss after steps"] == "pruning" else name] = points
    return draw_lines(
        out / "ablations",
        lines,
        log="y",
        title="SmolLM2-135M: lowering widths, and pruning instead",
        xlabel="blocks lowered or pruned",
        ylabel="loss, nats per token, mean of ten walks",
    )


def draw_own_types(out: Path) -> list[Path]:
    """Error of each type of SmolLM2-135M against its bits, by row length."""
    table = next(table for table in tables_of("own_types") if "bits for each weight" in table[0])
    alone: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in table:
        error = float(row["error, sum over players"])
        if error > 0:  # the file's own type loses nothing
            alone[row["type"].partition(", ")[2]].append((float(row["bits for each weight"]), error))
    return draw_lines(
        out / "own_types",
        {},
        alone=alone,
        log="y",
        title="SmolLM2-135M: only long rows have types below 4.5 bits",
        xlabel="bits per weight",
        ylabel="error of outputs, sum over players",
    )


OF_FINDINGS = (
    draw_ablations,
    draw_demo_mixes,
    draw_enumerated,
    draw_factors,
    draw_fitting,
    draw_gptq_static,
    draw_informed,
    draw_later_sizes,
    draw_own_types,
    draw_recipes,
    draw_tied_head,
)
